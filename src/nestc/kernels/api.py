"""The contract between a region and the kernels it becomes: layouts, launches, and families of lowerings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.tensor.ir import DOT_GROUPS, Kernel


@dataclass(frozen=True)
class Layout:
    """How a value lies in memory: ``block == 0`` is ONNX's own row-major order; ``block == c`` is NCHWc.

    NCHWc splits axis 1 in blocks of c channels and puts the place within the block last:
    logical (n, ch, *spatial) lies at physical (n, ch // c, *spatial, ch % c). Channels are padded up to a whole
    block; whoever writes the value writes **zeros** into the padding, so readers may use it freely.
    """

    block: int = 0


PLAIN = Layout(0)


def physical_shape(type_: TensorType, layout: Layout) -> tuple[int, ...]:
    """Shape of the buffer that holds a value of `type_` in `layout`."""
    if layout.block == 0:
        return type_.shape
    n, channels, *spatial = type_.shape
    return (n, -(-channels // layout.block), *spatial, layout.block)


def to_layout(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Reorder a plain array into `layout` (for constants and tests); the padding is zero."""
    if layout.block == 0:
        return np.ascontiguousarray(array)
    n, channels, *spatial = array.shape
    block = layout.block
    padded = np.zeros((n, -(-channels // block) * block, *spatial), array.dtype)
    padded[:, :channels] = array
    split = padded.reshape(n, -1, block, *spatial)
    return np.ascontiguousarray(np.moveaxis(split, 2, -1))


def from_layout(array: np.ndarray, type_: TensorType, layout: Layout) -> np.ndarray:
    """The plain array of a value that lies in `layout`."""
    if layout.block == 0:
        return array.reshape(type_.shape)
    split = np.moveaxis(array.reshape(physical_shape(type_, layout)), -1, 2)
    n, channels, *spatial = type_.shape
    return np.ascontiguousarray(split.reshape(n, -1, *spatial)[:, :channels])


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: ``args[i]`` is the value that ``kernel.params[i]`` stands for.

    A value name is an input or output of the region, a key of ``Lowered.temporaries``, or of ``Lowered.constants``.
    Which parameters a kernel writes is seen from its stores.
    """

    kernel: Kernel
    args: tuple[str, ...]


@dataclass(frozen=True)
class Lowered:
    """A region as kernel launches in order, with the buffers between them and the packed constants they read."""

    launches: tuple[Launch, ...]
    temporaries: Mapping[str, TensorType] = field(default_factory=dict)
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class CpuMachine:
    """What a kernel may know of a CPU; all sizes in bytes. One kernel text serves every machine through these."""

    name: str
    triple: str
    cpu: str
    features: str
    vector_bytes: int
    vector_registers: int
    fma: bool
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    f16c: bool = False
    dot_bytes: int = 0  # widest vector of the instructions behind `Dot`; x86 always has pmaddwd among them
    vnni: bool = False  # x86: vpdpbusd and vpdpwssd
    bf16: bool = False  # products of bfloat16 added in pairs: x86 vdpbf16ps, Arm bfdot
    dotprod: bool = False  # Arm: sdot and udot

    def lanes(self, dtype: str) -> int:
        """Lanes of one vector register for `dtype` (float16 and bfloat16 are computed as float32)."""
        size = {"float64": 8, "int64": 8, "uint64": 8, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1}
        return max(1, self.vector_bytes // size.get(dtype, 4))

    @property
    def tile_registers(self) -> int:
        """Vector registers that a tile of multiply-adds may fill; without FMA, products and copies need some too."""
        return self.vector_registers if self.fma else max(4, self.vector_registers - 3)

    @property
    def dot_dtypes(self) -> tuple[str, str]:
        """The factors (a, b) of the `Dot` that multiplies most 8-bit integers an instruction; (int16, int16) where
        they have to be widened first."""
        return ("uint8", "int8") if self.vnni else ("int8", "int8") if self.dotprod else ("int16", "int16")

    @property
    def dot_group(self) -> int:
        """Products that such a `Dot` adds to one lane."""
        return DOT_GROUPS[self.dot_dtypes]


class Family(Protocol):
    """One family of kernels. `kernels.families.FAMILIES` lists them, most special first; the generic one is last."""

    name: str

    def refusal(self, region: Region) -> str | None:
        """None if this family lowers `region`, else why not, in words."""
        ...

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """The layout of every input and output of the region that this family wants.

        `incoming` holds the layout in which each input is available. Where the answer for an input differs from it,
        the framework inserts a conversion; so answer `incoming[name]` wherever the kernel can read that well.
        """
        ...

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """Build the kernels for the given layouts of inputs and outputs."""
        ...
