"""The target API: what a CPU, an NPU, a PIM or a vendor's runtime states about itself, and nothing else.

A target never edits the graph; matching, placement, transfers, memory and bundling belong to the framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from nestc.bundle.artifact import Artifact, Device, Elapsed, Program
from nestc.graph.region import Region, TensorType

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "Artifact",
    "Commanded",
    "Constraint",
    "Device",
    "Elapsed",
    "Link",
    "Machine",
    "Memory",
    "Offer",
    "Partition",
    "Program",
    "QuantSpec",
    "Target",
    "constraint",
]


@dataclass(frozen=True)
class Memory:
    """One memory of a device: `bytes` of capacity (0: not limited here), `alignment` in bytes."""

    name: str
    bytes: int
    alignment: int = 1


@dataclass(frozen=True)
class Link:
    """How a device is reached from the host's memory; the default is a device that works in that memory itself.

    Each launch of a partition takes `launch_seconds`, each tensor that crosses `latency_seconds` and its bytes over
    `bytes_per_second` (0: nothing is copied) and `joules_per_byte`. ``kind`` is "estimated" where figures are assumed.
    """

    launch_seconds: float = 0.0
    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    joules_per_byte: float = 0.0
    kind: Literal["measured", "modelled", "estimated"] = "measured"

    def seconds(self, nbytes: int) -> float:
        """Time of a tensor on its way to or from the host's memory."""
        return self.latency_seconds + (nbytes / self.bytes_per_second if self.bytes_per_second else 0.0)


@dataclass(frozen=True)
class Machine:
    """Facts of a device that the compiler needs. Rates are per second, energies in joules; 0 means not stated.

    ``resource``: devices that name the same one never run at the same time ("cpu" for all that use its cores); empty:
    the device's own name. ``watts``: power while it runs, from which energies of measured times are *estimated*.
    ``capacity_bytes``: what the constants of all its partitions may take together; 0 is no limit.
    """

    name: str
    memories: tuple[Memory, ...]
    dtypes: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    link: Link = field(default_factory=Link)
    resource: str = ""
    watts: float = 0.0
    capacity_bytes: int = 0


@dataclass(frozen=True)
class QuantSpec:
    """The number format that an offer needs, by the name of a quantization scheme (``int8-pow2``, ``bf16`` ...)."""

    scheme: str


@dataclass(frozen=True)
class Constraint:
    """A predicate over a region; ``reason`` is the sentence shown to the user when it does not hold."""

    holds: Callable[[Region], bool]
    reason: str


def constraint(predicate: Callable[[Region], bool]) -> Constraint:
    """Make a Constraint of a function, whose docstring is the reason shown on refusal."""
    reason = (predicate.__doc__ or "").strip()
    if not reason:
        raise ValueError(f"constraint {predicate.__name__} needs a docstring: it is the reason shown to the user")
    return Constraint(predicate, " ".join(reason.split()))


@dataclass(frozen=True)
class Offer:
    """One thing a target can do: regions whose operators are all in `ops` and (if given) whose anchor is in `anchors`.

    ``cost`` gives the modelled seconds for a region, used where the device cannot be measured.
    """

    name: str
    ops: frozenset[str]
    anchors: frozenset[str | None] | None = None
    where: tuple[Constraint, ...] = ()
    quant: QuantSpec | None = None
    cost: Callable[[Region], float] | None = None

    def refusal(self, region: Region) -> str | None:
        """Why this offer does not take `region`, in words; None if it does."""
        if self.anchors is not None and region.anchor not in self.anchors:
            return f"offer {self.name} is not for {region.anchor or 'elementwise'} regions"
        for op in region.ops:
            name = op.op_type if not op.domain else f"{op.domain}::{op.op_type}"
            if name not in self.ops:
                return f"operator {name} (node {op.name!r}) is not offered"
        for rule in self.where:
            if not rule.holds(region):
                return rule.reason
        return None


@dataclass(frozen=True)
class Partition:
    """Regions of one device, in execution order, with the partition's border.

    ``model`` is the same thing as a self-contained ONNX model (built on demand), so that a vendor's runtime can
    take it. ``inputs``/``outputs`` are value names; constants are inside the regions.
    """

    name: str
    device: str
    regions: tuple[Region, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: Mapping[str, TensorType]
    model: Callable[[], ir.Model]


class Target(Protocol):
    """The compile side of a target; needs no hardware."""

    name: str
    machine: Machine
    offers: tuple[Offer, ...]

    def compile(self, partition: Partition, emit: Callable[[str, str, str], None] | None = None) -> Artifact:
        """Compile one partition. `emit(level, name, text)` receives each intermediate form (tensor, llvm, asm ...)."""
        ...

    def open(self) -> Device: ...


@runtime_checkable
class Modelled(Protocol):
    """A target whose compiler knows what a partition takes: its artifacts state a modelled ``timing``."""

    def compile_unproven(self, partition: Partition) -> Artifact:
        """What `compile` makes, without the proof that it is safe to run: for its timing and the size of its constants
        only. Many partitions are compiled before one is chosen."""
        ...


@runtime_checkable
class Commanded(Protocol):
    """A target whose device executes a stream of commands, which another simulator of that device can replay."""

    def commands(self, partition: str, artifact: Artifact) -> Mapping[str, bytes]:
        """Files for a replay, by name: the commands, the memory they start from, inputs and the outputs to expect."""
        ...
