"""Cutting regions: what is fused for one device may be too much for another, which then takes a piece of it.

Regions are formed as large as any device could use them. Where a device refuses a region but would take what it
computes up to some node, or what follows it, the region is cut there, so that placement can choose; pieces that end up
side by side on a device that takes the whole are joined again (`place.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from nestc.graph.model import Model
from nestc.graph.region import Op, Region
from nestc.graph.regions import form, regions
from nestc.partition.match import Claim, claim, takes
from nestc.targets.api import Target

VIEW = "view"
_MOST_CUTS = 3  # of one region: each border costs a device a launch, and more pieces never paid


def find_cuts(every: Sequence[Region], targets: Sequence[Target]) -> list[str]:
    """Names of the nodes after which regions are to be cut, for all targets but ``host``."""
    names: list[str] = []
    for region in every:
        for target in targets:
            if target.name == "host" or takes(target, region):
                continue
            for node in _cuts_for(region, target):
                if node not in names:
                    names.append(node)
    return names


def cut_in_order(
    model: Model, formed: Model, claims: Sequence[Claim], targets: Sequence[Target]
) -> tuple[Model, list[Claim], list[str]]:
    """A model formed anew, with the claims, where targets that come before the one that claims a region take a piece.

    `model` is what `formed` was formed of. Only products are worth that, since nobody asks what it costs.
    """
    cuts: list[str] = []
    for each in claims:
        for target in targets:
            if target.name in (each.target, "host"):
                break
            if each.region.anchor is not None:
                cuts += [node for node in _cuts_for(each.region, target) if node not in cuts]
    if not cuts:
        return formed, list(claims), []
    made = form(model, cuts=cuts)
    return made, [claim(region, targets) for region in regions(made)], cuts


def _cuts_for(region: Region, target: Target) -> list[str]:
    """Where to cut a region that `target` refuses, so that it takes as much of it as it can."""
    found: list[str] = []
    rest = region
    while len(found) < _MOST_CUTS and not takes(target, rest):
        cut = _best_cut(rest, target)
        if cut is None:
            break
        found.append(cut)
        rest = pieces(rest, cut)[1]
    return found


def _best_cut(region: Region, target: Target) -> str | None:
    """The last operator whose value cuts off a head that `target` takes, or the first before a tail that it takes.

    The anchor is the work: a head or tail without it is not worth a border, unless the region has none.
    """
    if region.anchor == VIEW or len(region.ops) < 2:
        return None
    candidates = [op for op in region.ops[:-1] if op.name and _splits(region, op)]
    for op in reversed(candidates):
        head = pieces(region, op.name)[0]
        if _worthwhile(region, head) and takes(target, head):
            return op.name
    for op in candidates:
        tail = pieces(region, op.name)[1]
        if _worthwhile(region, tail) and takes(target, tail):
            return op.name
    return None


def _worthwhile(region: Region, piece: Region) -> bool:
    return piece.anchor is not None or region.anchor is None


def _splits(region: Region, op: Op) -> bool:
    """Whether cutting after `op` leaves two parts with one value between them."""
    head, tail = pieces(region, op.name)
    between = set(head.outputs) & set(tail.inputs)
    return bool(tail.ops) and len(between) == 1 and len(head.outputs) == 1


def pieces(region: Region, node: str) -> tuple[Region, Region]:
    """What the node of that name and all it needs compute, and the rest; as `graph.regions.form` cuts them."""
    maker = {value: op for op in region.ops for value in op.outputs if value}
    inside: set[str] = set()
    waiting = [next(op for op in region.ops if op.name == node)]
    while waiting:
        op = waiting.pop()
        if op.name not in inside:
            inside.add(op.name)
            waiting += [maker[value] for value in op.inputs if value in maker]
    head = [op for op in region.ops if op.name in inside]
    tail = [op for op in region.ops if op.name not in inside]
    return _part(region, head, tail), _part(region, tail, head)


def _part(region: Region, ops: Sequence[Op], others: Sequence[Op]) -> Region:
    """Some operators of a region as a region of their own."""
    made = {value for op in ops for value in op.outputs if value}
    read = dict.fromkeys(value for op in ops for value in op.inputs if value)
    wanted = {value for op in others for value in op.inputs} | set(region.outputs)
    heavy = any(op.op_type == region.anchor for op in ops)
    constants = {name: reader for name, reader in region.constants.items() if name in read}
    return Region(
        name=region.name,
        anchor=region.anchor if heavy else None,
        ops=tuple(ops),
        inputs=tuple(name for name in read if name not in made and name not in constants),
        outputs=tuple(value for op in ops for value in op.outputs if value in wanted),
        types={name: type_ for name, type_ in region.types.items() if name in made or name in read},
        constants=constants,
    )
