"""What a measured choice of kernels depends on, as text: the region's structure, the machine, and our own code."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np

from nestc import __version__
from nestc.blobs import code_digest
from nestc.graph.region import Region
from nestc.graph.structure import digest, plain, structure
from nestc.kernels.api import CpuMachine

_FEW = 16
"""Integers of so many elements or fewer may be sizes, axes or places, which decide what is computed."""

_NO_PART = ("name", "triple", "features", "l3_bytes")
"""Of a machine: what changes no choice, but differs between virtual machines on the same processor. Features that
kernels are chosen by are fields of their own."""


def region_key(region: Region) -> str:
    """A hash of operators, attributes, types, how values connect and which of them are constant.

    Names do not count, nor do the values of weights: layers of one geometry share what is known. Only few integers
    count by their contents, such as where a Slice begins.
    """
    return digest(structure(region, lambda name: _contents(region, name)))


def machine_key(machine: CpuMachine) -> str:
    """A readable name of a kind of machine, and a hash of what kernels are chosen by."""
    known = {key: value for key, value in dataclasses.asdict(machine).items() if key not in _NO_PART}
    return f"{machine.cpu}-{digest(known)[:12]}"


@lru_cache(maxsize=1)
def code_version() -> str:
    """The version of nestc and a digest of the code that makes kernels as fast as they are."""
    return f"{__version__}-{code_digest('kernels', 'codegen', 'tensor')[:12]}"


def _contents(region: Region, name: str) -> Any:
    type_ = region.types[name]
    if type_.dtype not in ("int32", "int64") or np.prod(type_.shape) > _FEW:
        return "parameter"
    return plain(region.constants[name]())
