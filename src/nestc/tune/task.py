"""One region to be tuned, as data that can be sent to another process, and the ways there are to compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from nestc.bundle.dtypes import numpy_dtype
from nestc.graph.region import Region, TensorType
from nestc.kernels.api import CpuMachine, Family, Layout
from nestc.kernels.families import alternatives
from nestc.kernels.ways import named
from nestc.tune.key import region_key

_FEW = 16
"""Floating constants of so many elements or fewer may decide how a kernel computes; others are as good drawn."""


@dataclass(frozen=True)
class Kept:
    """Reads a constant that is sent along."""

    array: np.ndarray

    def __call__(self) -> np.ndarray:
        return self.array


@dataclass(frozen=True)
class Drawn:
    """Reads a constant whose values do not matter: normally distributed, the same each time."""

    type: TensorType
    seed: int

    def __call__(self) -> np.ndarray:
        drawn = np.random.default_rng(self.seed).standard_normal(self.type.shape, np.float32)
        return drawn.astype(numpy_dtype(self.type.dtype))


@dataclass(frozen=True)
class Task:
    """A region whose ways are to be measured.

    ``machine`` and ``code`` are the fingerprint that whoever measures must have (`measure.fingerprint`). ``borders``:
    layouts in which its inputs and outputs lie in the network (`CpuTarget.kernels`). ``evicted``: bytes of other data
    that pass through the caches between two of its runs. ``count``: how often the network computes such a region;
    ``weight``: the seconds that all of them take in it, by which regions are ordered.
    """

    key: str
    region: Region
    borders: Mapping[str, Layout]
    arch: str
    machine: str
    code: str
    threads: int
    exact: bool
    evicted: int
    count: int = 1
    weight: float = 0.0


def portable(region: Region) -> Region:
    """The region with constants that can be sent: large floating ones are drawn anew wherever they are read."""
    constants: dict[str, Callable[[], np.ndarray]] = {}
    for seed, (name, read) in enumerate(region.constants.items()):
        type_ = region.types[name]
        drawn = type_.dtype in ("float64", "float32", "float16", "bfloat16") and prod(type_.shape) > _FEW
        constants[name] = Drawn(type_, seed) if drawn else Kept(np.asarray(read()))
    return replace(region, constants=constants)


def ways(region: Region, machine: CpuMachine, exact: bool, wanted: Sequence[str]) -> dict[str, Family]:
    """The families of these names that lower a region; those that do not, or that nobody knows, are left out."""
    known: dict[str, Family | None] = {family.name: family for family in alternatives(region, machine, exact)}
    found = {name: known[name] if name in known else named(name, region) for name in wanted}
    return {name: family for name, family in found.items() if family is not None}


def distinct(regions: Sequence[Region], machine: CpuMachine, exact: bool) -> dict[str, list[Region]]:
    """The regions that can be computed in several ways, those of one geometry together, by `region_key`."""
    found: dict[str, list[Region]] = {}
    for region in regions:
        if len(alternatives(region, machine, exact)) > 1:
            found.setdefault(region_key(region), []).append(region)
    return found
