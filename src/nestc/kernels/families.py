"""All kernel families in the order in which they are asked; the generic one takes what no other wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Protocol

from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine, Family
from nestc.kernels.attention import ATTENTION
from nestc.kernels.conv import CONV, conv_ways
from nestc.kernels.conv_bf16 import CONV_BF16
from nestc.kernels.conv_int8 import CONV_INT8
from nestc.kernels.conv_transpose import CONV_TRANSPOSE
from nestc.kernels.depthwise_int8 import DEPTHWISE_INT8
from nestc.kernels.dequantize import DequantizeFamily
from nestc.kernels.dynamic_quantize import DYNAMIC_QUANTIZE
from nestc.kernels.gemm import GEMM, gemm_ways
from nestc.kernels.gemm_int8 import GEMM_INT8
from nestc.kernels.generic import Generic
from nestc.kernels.lookup import LOOKUP
from nestc.kernels.moves import MOVES
from nestc.kernels.normalization import NORMALIZATION
from nestc.kernels.pool import POOL
from nestc.kernels.pool_int8 import POOL_INT8
from nestc.kernels.quantized import prologue
from nestc.kernels.recurrent import RECURRENT
from nestc.kernels.resize import RESIZE
from nestc.kernels.shuffle import SHUFFLE
from nestc.kernels.softmax import SOFTMAX
from nestc.kernels.strassen import STRASSEN
from nestc.kernels.weight_only import WEIGHT_ONLY
from nestc.kernels.winograd import WINOGRAD
from nestc.kernels.winograd_folded import WINOGRAD_FOLDED
from nestc.kernels.winograd_int8 import WINOGRAD_INT8

GENERIC = Generic()

NARROW: tuple[Family, ...] = (
    CONV_INT8,
    DEPTHWISE_INT8,
    GEMM_INT8,
    WEIGHT_ONLY,
    LOOKUP,
    MOVES,
    POOL_INT8,
)
"""Families for narrow operands (quantized, bfloat16); asked first. Most of them want a prologue (`quantized.py`)."""

FAMILIES: tuple[Family, ...] = (
    CONV,
    CONV_TRANSPOSE,
    GEMM,
    ATTENTION,
    POOL,
    RESIZE,
    SOFTMAX,
    NORMALIZATION,
    RECURRENT,
    DYNAMIC_QUANTIZE,
    SHUFFLE,
    GENERIC,
)
"""Families for regions without a prologue."""


def choose(region: Region) -> tuple[Family | None, Mapping[str, str]]:
    """The first family that lowers `region` (None: nobody), and the reasons of those before it, by name."""
    refusals: dict[str, str] = {}
    for family in (*NARROW, *((DEQUANTIZE, GENERIC) if prologue(region) else FAMILIES)):
        reason = family.refusal(region)
        if reason is None:
            return family, refusals
        refusals[family.name] = reason
    return None, refusals


def alternatives(region: Region, machine: CpuMachine, exact: bool = False) -> tuple[Family, ...]:
    """Every family that lowers `region` on `machine`, with names of their own, the one expected fastest first.

    The order is modelled, nothing is measured. With `exact`, only those that add and multiply as a direct kernel does.
    Empty where nobody lowers the region.
    """
    plain = choose(region)[0]
    if plain is None:
        return ()
    if plain is GEMM:
        products = gemm_ways(region, machine)
        return products if exact else (*by_cost(GEMM, (STRASSEN,), region, machine), *products[1:])
    if plain is CONV_INT8:
        return by_cost(plain, WINOGRAD_INT8, region, machine)
    if plain is DEQUANTIZE and machine.bf16 and CONV_BF16.refusal(region) is None:
        return (CONV_BF16, plain)
    if plain is not CONV:
        return (plain,)
    direct = conv_ways(region, machine)
    if exact:
        return direct
    return (*by_cost(CONV, (*WINOGRAD, *WINOGRAD_FOLDED, STRASSEN), region, machine), *direct[1:])


class _Transforming(Family, Protocol):
    """A family that computes what another one does after transforms, at a modelled price."""

    def cycles(self, region: Region, machine: CpuMachine) -> tuple[float, float]: ...

    def other(self, region: Region, machine: CpuMachine) -> Family: ...


def by_cost(
    plain: Family, transforming: Sequence[_Transforming], region: Region, machine: CpuMachine
) -> tuple[Family, ...]:
    """`plain` and those of `transforming` that lower the region, the one with the least modelled cycles first, then
    their other forms."""
    faster: list[tuple[float, Family]] = []
    slower: list[tuple[float, Family]] = []
    others: list[Family] = []
    for family in transforming:
        if family.refusal(region) is not None:
            continue
        took, limit = family.cycles(region, machine)
        if took == inf:  # not in vectors of this machine
            continue
        (faster if took < limit else slower).append((took, family))
        others.append(family.other(region, machine))
    before, after = ([family for _, family in sorted(ways, key=lambda way: way[0])] for ways in (faster, slower))
    return (*before, plain, *after, *others)


DEQUANTIZE = DequantizeFamily(choose)
