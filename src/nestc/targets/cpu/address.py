"""Values that are addresses in other values: views, the parts of concatenations, and what Split and Slice take out.

Parts that lie one behind the other in memory need no copying: whoever makes a part of a Concat writes it where the
whole lies, and whoever reads what a Split gives reads it where the whole lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from nestc.codegen.llvm_types import width
from nestc.codegen.schedule import Alias
from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, Layout, physical_shape
from nestc.kernels.ops.attributes import axis_of
from nestc.kernels.ops.move import taken
from nestc.kernels.small import storage
from nestc.targets.cpu.layout import Convert, Lower, Program, Turns, View, same_bytes, stored


@dataclass(frozen=True)
class Copy:
    """Copy all bytes of the buffer `source` to the buffer `target`, seen as a vector."""

    source: str
    target: str
    elements: TensorType


Step: TypeAlias = Lower | Convert | Copy | Turns


@dataclass(frozen=True)
class Addressed:
    """What is left to be done, in order, and where the buffers lie that are parts of others.

    ``sizes``: bytes of each alias, and of each buffer that no step makes as a whole.
    """

    steps: tuple[Step, ...]
    aliases: Mapping[str, Alias]
    sizes: Mapping[str, int]


def nbytes(type_: TensorType, layout: Layout) -> int:
    """Bytes of the buffer of a value."""
    return prod(physical_shape(type_, layout)) * width(storage(type_.dtype)) // 8


def address(
    actions: Program,
    inputs: Sequence[str],
    outputs: Sequence[str],
    types: Mapping[str, TensorType],
) -> Addressed:
    """Turn views, and the concatenations and splits that can be, into addresses; what is inside of `Turns` stays.

    `inputs` and `outputs` are the buffers at the border.
    """
    return _Addresser(inputs, outputs, types).run(actions)


class _Addresser:
    def __init__(self, inputs: Sequence[str], outputs: Sequence[str], types: Mapping[str, TensorType]) -> None:
        self.border = frozenset((*inputs, *outputs))
        self.outputs = frozenset(outputs)
        self.types = types
        self.steps: list[Step] = []
        self.aliases: dict[str, Alias] = {}
        self.sizes: dict[str, int] = {}
        self.made: dict[str, int] = {}  # bytes of the buffers that steps write

    def run(self, actions: Program) -> Addressed:
        for action in actions:
            if isinstance(action, View):
                self.view(action)
            elif isinstance(action, Turns):
                self.made.update(action.sizes)
                self.steps.append(action)
            elif isinstance(action, Convert):
                type_ = self.types[action.value]
                if same_bytes(type_, action.source, action.target):
                    source, target = (stored(action.value, each) for each in (action.source, action.target))
                    self.same(source, target, nbytes(type_, action.target), type_.dtype)
                    continue
                self.made[stored(action.value, action.target)] = nbytes(self.types[action.value], action.target)
                self.steps.append(action)
            elif not (self.joined(action) or self.cut(action)):
                for name in action.region.outputs:
                    layout = action.layouts.get(name, PLAIN)
                    self.made[stored(name, layout)] = nbytes(self.types[name], layout)
                self.steps.append(action)
        return Addressed(tuple(self.steps), self.aliases, self.sizes)

    def alias(self, name: str, value: str, offset: int, size: int) -> None:
        self.aliases[name] = Alias(value, offset)
        self.sizes[name] = size

    def copy(self, source: str, target: str, dtype: str, size: int) -> None:
        elements = size * 8 // width(storage(dtype))
        self.steps.append(Copy(source, target, TensorType(dtype, (elements,))))

    def root(self, name: str) -> tuple[str, int]:
        """The buffer that `name` lies in, and where."""
        offset = 0
        while name in self.aliases:
            offset += self.aliases[name].offset
            name = self.aliases[name].value
        return name, offset

    def free(self, names: Sequence[str], sizes: Sequence[int]) -> tuple[str, int] | None:
        """The buffer that the first few of some buffers fill one behind the other, and how many that are.

        None unless steps make that buffer, and it may be put anywhere.
        """
        root, _ = self.root(names[0])
        if root in self.border or root not in self.made:
            return None
        filled = 0
        for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
            if self.root(name) != (root, filled):
                return None
            filled += size
            if filled >= self.made[root]:
                return (root, number + 1) if filled == self.made[root] else None
        return None

    def view(self, action: View) -> None:
        """The output is its input under another name."""
        type_ = self.types[action.output]
        self.same(action.source, stored(action.output, action.made), nbytes(type_, action.made), type_.dtype)

    def same(self, source: str, target: str, size: int, dtype: str) -> None:
        """`target` is the beginning of `source`; where both have a place of their own, it is copied."""
        if target not in self.outputs:
            self.alias(target, source, 0, size)
            return
        free = self.free([source], [size])
        if free is not None:
            self.alias(free[0], target, 0, size)
            return
        self.copy(source, target, dtype, size)

    def joined(self, action: Lower) -> bool:
        """Put the parts of a Concat where they belong; only those that cannot lie there are copied."""
        if not _joinable(action.region, action.layouts, self.types):
            return False
        op = action.region.ops[0]
        layout = action.layouts.get(op.outputs[0], PLAIN)
        whole = self.types[op.outputs[0]]
        parts = [self.types[name] for name in op.inputs]
        output = stored(op.outputs[0], layout)
        sources = [stored(name, layout) for name in op.inputs]
        sizes = [nbytes(part, layout) for part in parts]
        offset = number = 0
        while number < len(parts):
            free = self.free(sources[number:], sizes[number:])
            count = 1 if free is None else free[1]
            size = sum(sizes[number : number + count])
            if free is not None:
                self.alias(free[0], output, offset, size)
            else:
                place = f"{output}+{offset}"
                self.alias(place, output, offset, size)
                self.copy(sources[number], place, whole.dtype, size)
            offset += size
            number += count
        self.made[output] = offset
        if output not in self.border:
            self.sizes[output] = offset
        return True

    def cut(self, action: Lower) -> bool:
        """Let what a Split or a Slice takes out be read where it lies; only outputs of the partition are copied."""
        before = _before(action.region, action.layouts, self.types)
        if before is None:
            return False
        op = action.region.ops[0]
        layout = action.layouts.get(op.inputs[0], PLAIN)
        parts = [self.types[name] for name in op.outputs]
        source = stored(op.inputs[0], layout)
        offset = nbytes(before, layout)
        for name, part in zip(op.outputs, parts, strict=True):
            size = nbytes(part, layout)
            target = stored(name, layout)
            if target in self.outputs:
                place = f"{source}+{offset}+{name}"
                self.alias(place, source, offset, size)
                self.copy(place, target, part.dtype, size)
            else:
                self.alias(target, source, offset, size)
            offset += size
        return True


def addressable(region: Region, layouts: Mapping[str, Layout], types: Mapping[str, TensorType]) -> bool:
    """Whether a region needs no kernel in these layouts: a Concat whose parts lie one behind the other, or a Split or
    Slice that takes out such parts."""
    return _joinable(region, layouts, types) or _before(region, layouts, types) is not None


def _joinable(region: Region, layouts: Mapping[str, Layout], types: Mapping[str, TensorType]) -> bool:
    op = _only(region, "Concat")
    if op is None or any(name not in region.inputs for name in op.inputs):
        return False
    layout = layouts.get(op.outputs[0], PLAIN)
    if any(layouts.get(name, PLAIN) != layout for name in op.inputs):
        return False
    whole = types[op.outputs[0]]
    parts = [types[name] for name in op.inputs]
    return _one_behind_the_other(parts, whole, layout, axis_of(op, len(whole.shape)))


def _before(region: Region, layouts: Mapping[str, Layout], types: Mapping[str, TensorType]) -> TensorType | None:
    """What lies before the first piece that a Split or Slice takes, perhaps nothing; None if pieces do not lie one
    behind the other."""
    op = _only(region, "Split", "Slice")
    if op is None or op.inputs[0] not in region.inputs:
        return None
    layout = layouts.get(op.inputs[0], PLAIN)
    if any(layouts.get(name, PLAIN) != layout for name in op.outputs if name):
        return None
    whole = types[op.inputs[0]]
    found = taken(op, region)
    if found is None:
        return None
    axis, start = found
    before = _first(whole, start, axis)
    parts = [types[name] for name in op.outputs]
    rest = _first(whole, whole.shape[axis] - start - sum(part.shape[axis] for part in parts), axis)
    pieces = [each for each in (before, *parts, rest) if each.shape[axis]]
    return before if _one_behind_the_other(pieces, whole, layout, axis) else None


def _only(region: Region, *kinds: str) -> Op | None:
    """The only operator of a region, if it is one of these."""
    op = region.ops[0]
    return op if len(region.ops) == 1 and op.op_type in kinds and op.domain in ("", "ai.onnx") else None


def _first(type_: TensorType, extent: int, axis: int) -> TensorType:
    return TensorType(type_.dtype, (*type_.shape[:axis], extent, *type_.shape[axis + 1 :]))


def _one_behind_the_other(parts: Sequence[TensorType], whole: TensorType, layout: Layout, axis: int) -> bool:
    """Whether the buffers of the parts along an axis, put one behind the other, are the buffer of the whole."""
    if 0 in whole.shape or any(0 in part.shape or part.dtype != whole.dtype for part in parts):
        return False
    if layout.block and axis == 1 and any(part.shape[1] % layout.block for part in parts[:-1]):
        return False
    if prod(physical_shape(whole, layout)[:axis]) != 1:
        return False
    return width(storage(whole.dtype)) % 8 == 0
