"""Channel shuffles of a partition as single regions, so that one kernel permutes the channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import CpuMachine
from nestc.kernels.shuffle import ANCHOR, SHUFFLE
from nestc.targets.cpu.layout import VIEW

_BLOCKED = frozenset({"Conv", "MaxPool", "AveragePool", ANCHOR})
"""Anchors whose values lie in blocks of channels."""


def merge_shuffles(regions: Sequence[Region], outputs: Sequence[str], machine: CpuMachine) -> list[Region]:
    """Regions of Concat, Reshape, Transpose, Reshape and Split, each the only reader of the one before, made one.

    Concat and Split may be missing. Only between values that lie in blocks of channels, where the five would have to
    be brought into plain layout and back. `outputs` are the values of the partition that others read.
    """
    return _Merger(regions, outputs, machine).run()


class _Merger:
    def __init__(self, regions: Sequence[Region], outputs: Sequence[str], machine: CpuMachine) -> None:
        self.regions = list(regions)
        self.machine = machine
        self.maker = {name: region for region in regions for name in region.outputs}
        uses = Counter(name for region in regions for name in region.inputs)
        self.readers = {name: region for region in regions for name in region.inputs if uses[name] == 1}
        for name in outputs:
            self.readers.pop(name, None)

    def run(self) -> list[Region]:
        if self.machine.lanes("float32") == 1:
            return self.regions
        last: dict[str, Region] = {}  # a merged region by the name of the last one that it stands for
        gone: set[str] = set()
        for region in self.regions:
            chain = self.chain(region)
            merged = None if chain is None else self.merged(chain)
            if chain is None or merged is None:
                continue
            gone.update(each.name for each in chain)
            last[chain[-1].name] = merged
            self.maker.update(dict.fromkeys(merged.outputs, merged))
        return [last.get(each.name, each) for each in self.regions if each.name in last or each.name not in gone]

    def chain(self, turned: Region) -> list[Region] | None:
        """The regions around a Transpose that stands alone, in order."""
        if not _single(turned, "Transpose"):
            return None
        before = self.maker.get(turned.inputs[0])
        after = self.readers.get(turned.outputs[0])
        if before is None or after is None or before.anchor != VIEW or after.anchor != VIEW or not before.inputs:
            return None
        if self.readers.get(turned.inputs[0]) is not turned:
            return None
        chain = [before, turned, after]
        joined = self.maker.get(before.inputs[0])
        if joined is not None and _single(joined, "Concat") and self.readers.get(before.inputs[0]) is before:
            chain.insert(0, joined)
        split = self.readers.get(after.outputs[0])
        if split is not None and _single(split, "Split"):
            chain.append(split)
        return chain

    def merged(self, chain: Sequence[Region]) -> Region | None:
        inputs = chain[0].inputs
        makers = [self.maker.get(name) for name in inputs]
        if not any(maker is not None and maker.anchor in _BLOCKED for maker in makers):
            return None
        types: dict[str, TensorType] = {}
        constants: dict[str, Callable[[], np.ndarray]] = {}
        for each in chain:
            types.update(each.types)
            constants.update(each.constants)
        ops = tuple(op for each in chain for op in each.ops)
        region = Region(chain[-1].name, ANCHOR, ops, inputs, chain[-1].outputs, types, constants)
        return region if SHUFFLE.refusal(region) is None else None


def _single(region: Region, kind: str) -> bool:
    """Whether a region is one operator of this kind, none of whose data is constant."""
    op = region.ops[0]
    data = op.inputs if kind == "Concat" else op.inputs[:1]
    return len(region.ops) == 1 and op.op_type == kind and not op.domain and set(data) <= set(region.inputs)
