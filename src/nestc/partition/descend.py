"""Claim or descend: offer every region, replace by its definition what nobody takes, and offer again."""

from __future__ import annotations

from collections.abc import Sequence

from nestc.errors import UnsupportedOp
from nestc.graph import regions
from nestc.graph.decompose import expand, expandable
from nestc.graph.model import Model
from nestc.graph.region import Op
from nestc.partition.match import Claim, claim, unknown_at_compile_time
from nestc.targets.api import Target


def claim_or_descend(model: Model, targets: Sequence[Target]) -> tuple[Model, Model, list[Claim]]:
    """The model (with refused operators replaced by their definitions), formed into regions, and who takes each.

    ``host`` would take nearly anything, so it is asked only when descending helps no more. A definition is used only
    if all of it can be taken or replaced further: half of an operator in an interpreter is worse than all of it.
    """
    natives = [target for target in targets if target.name != "host"]
    formed, claims = _offer(model, natives)
    hopeless: set[str] = set()
    while True:
        refused = [op for op in _refused(claims) if op.op_type not in hopeless and expandable(op)]
        if not refused:
            return model, formed, [claim(each.region, targets) for each in claims]
        chosen = refused[0].op_type
        before = {node.name for node in model.ir.graph}
        try:
            lower = expand(model, {op.name for op in refused if op.op_type == chosen})
        except UnsupportedOp:
            hopeless.add(chosen)
            continue
        lower_formed, lower_claims = _offer(lower, natives)
        pieces = [op for op in _refused(lower_claims, fixed_sizes=False) if op.name not in before]
        if any(op.op_type in hopeless or not expandable(op) for op in pieces):
            hopeless.add(chosen)
            continue
        model, formed, claims = lower, lower_formed, lower_claims


def _offer(model: Model, natives: Sequence[Target]) -> tuple[Model, list[Claim]]:
    formed = regions.form(model)
    return formed, [claim(region, natives) for region in regions.regions(formed)]


def _refused(claims: Sequence[Claim], fixed_sizes: bool = True) -> list[Op]:
    """Operators of regions that nobody takes; with `fixed_sizes` only where a definition could change that."""
    return [
        op
        for each in claims
        if each.target is None and not (fixed_sizes and unknown_at_compile_time(each.region) is not None)
        for op in each.region.ops
    ]
