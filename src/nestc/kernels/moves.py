"""Moved data between narrow numbers: Concat and its like read integers, rescale them and write integers in one pass."""

from __future__ import annotations

from collections.abc import Mapping

from nestc.graph.region import Region
from nestc.kernels import ops
from nestc.kernels.api import CpuMachine, Layout, Lowered
from nestc.kernels.generic import Generic
from nestc.kernels.quantized import prologue

_GENERIC = Generic()


class MovesFamily:
    """Regions with a prologue whose anchor only moves data: the generic lowering substitutes the prologue into it, and
    folds the scales (`fold_scales`). Its readers take each element once, so nothing is widened twice."""

    name = "moves"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        if not prologue(region):
            return "its operands need not be widened"
        if region.anchor not in ops.move.RULES:
            return f"{region.anchor} does more than move data"
        return _GENERIC.refusal(region)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Those of the generic lowering."""
        return _GENERIC.layouts(region, machine, incoming)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """Kernels of the generic lowering."""
        return _GENERIC.lower(region, machine, layouts)


MOVES = MovesFamily()
