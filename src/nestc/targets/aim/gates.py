"""What a region of elementwise operators is to AiM: sums and products of values in the banks, the rest on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

from nestc.graph.region import Op, Region
from nestc.runtime.aim.host import OPERATORS, HostOp
from nestc.targets.aim.elementwise import Elementwise, Step
from nestc.targets.aim.recurrent import read_region
from nestc.targets.aim.regions import NUMBERS, Array, Product, Refused, host_operator

STEPS = {"Mul": "mul", "Add": "add"}
"""Operators that banks (EWMUL) and registers (EWADD) have."""

MOST_ELEMENTS = 1 << 15
"""Elements of a value. Each 16 of them are a request to write and one to read, which the stream holds one by one."""


@dataclass(frozen=True, eq=False)
class Part:
    """Steps in the memory, if ``layer`` is not None, then operators of the host that may read its results.

    Values of the layer have ``shape``; what it takes from the host is broadcast to that. ``constants`` are those that
    the host's operators read.
    """

    layer: Elementwise | None
    shape: tuple[int, ...]
    number: str
    host: tuple[HostOp, ...]
    constants: Mapping[str, Array]


def read_parts(region: Region, rounded: str | None = None) -> tuple[Product | Part, ...]:
    """What any region is to AiM, in order. Raises Refused with the reason."""
    return read_elements(region, rounded) if region.anchor is None else read_region(region, rounded)


def read_elements(region: Region, rounded: str | None = None) -> tuple[Part, ...]:
    """The parts of a region without an anchor, in order. Raises Refused with the reason.

    A Mul or Add is done in the memory if its operands and its result are numbers of 16 bits: by their type; or since
    a Cast has widened all of them, and the result is narrowed again; or since float32 may be `rounded`.
    """
    if region.anchor is not None:
        raise Refused("AiM multiplies and adds values in regions without an anchor, and this one has one")
    return _Reader(region, rounded).read()


@dataclass
class _Open:
    """A layer under construction."""

    shape: tuple[int, ...]
    steps: list[Step] = field(default_factory=list[Step])
    constants: dict[str, Array] = field(default_factory=dict[str, Array])
    origin: list[str] = field(default_factory=list[str])

    @property
    def results(self) -> set[str]:
        return {step.result for step in self.steps}


class _Reader:
    """A region while it is cut into parts."""

    def __init__(self, region: Region, rounded: str | None) -> None:
        self.region, self.rounded = region, rounded
        self.widened = {op.outputs[0]: op.inputs[0] for op in region.ops if op.op_type == "Cast"}
        self.parts: list[Part] = []
        self.host: list[HostOp] = []
        self.constants: dict[str, Array] = {}
        self.before: tuple[Elementwise | None, tuple[int, ...]] = (None, ())
        self.open: _Open | None = None
        self.same: dict[str, str] = {}
        """The value that a Cast gives another type, by what it makes, where the numbers stay the same."""
        if not any(op.op_type in STEPS for op in region.ops):
            raise Refused("the region has no product or sum of two values, and AiM does nothing else without a matrix")
        self.number = self.format()

    def format(self) -> str:
        """The 16-bit format of the region: the only one that it has, or that it is rounded to."""
        found = {self.region.types[name].dtype for op in self.region.ops for name in op.inputs if name} & set(NUMBERS)
        if self.rounded is not None:
            found.add(self.rounded)
        if len(found) > 1:
            raise Refused("the region has numbers of several formats of 16 bits, and AiM has one")
        if not found:
            op = next(op for op in self.region.ops if op.op_type in STEPS)
            dtype = self.region.types[op.outputs[0]].dtype
            raise Refused(
                f"{op.op_type} (node {op.name!r}) is on {dtype}, which the scheme bf16 leaves as it is; "
                "AiM multiplies and adds numbers of 16 bits: have them rounded with aim:round=true"
            )
        return next(iter(found))

    def read(self) -> tuple[Part, ...]:
        for op in self.region.ops:
            if op.op_type not in OPERATORS or op.domain or len(op.outputs) != 1:
                raise Refused(f"{op.op_type} (node {op.name!r}) is not among what AiM computes element by element")
            if self.only_another_type(op):
                self.same[op.outputs[0]] = self.same.get(op.inputs[0], op.inputs[0])
            elif self.in_memory(op):
                self.step(op)
            else:
                self.on_host(op)
        self.close()
        self.flush()
        if all(part.layer is None for part in self.parts):
            raise Refused(
                f"the region has no product or sum of two values of {self.number}, by which AiM would save anything"
            )
        return tuple(self.parts)

    def in_memory(self, op: Op) -> bool:
        """Whether the memory does an operator, or rather the host."""
        if op.op_type not in STEPS or len(op.inputs) != 2:
            return False
        result = self.region.types[op.outputs[0]]
        fixed = [name in self.region.constants for name in op.inputs]
        if all(fixed) or any(
            f and prod(self.region.types[n].shape) == 1 for f, n in zip(fixed, op.inputs, strict=True)
        ):
            return False
        if not 1 <= prod(result.shape) <= MOST_ELEMENTS or not self.narrow_result(op.outputs[0]):
            return False
        return all(self.narrow(name) for name in op.inputs)

    def only_another_type(self, op: Op) -> bool:
        """Whether an operator is a Cast of numbers of 16 bits that only steps in the memory read, where they are such
        numbers in whatever type."""
        name = op.inputs[0]
        if op.op_type != "Cast" or op.outputs[0] in self.region.outputs or name in self.region.constants:
            return False
        maker = next((each for each in self.region.ops if name in each.outputs), None)
        if not self.narrow(name) and (maker is None or not self.in_memory(maker)):
            return False
        if self.region.types[op.outputs[0]].dtype not in (self.number, "float32"):
            return False
        users = [each for each in self.region.ops if op.outputs[0] in each.inputs]
        return all(self.in_memory(each) or self.only_another_type(each) for each in users)

    def narrow(self, name: str) -> bool:
        """Whether a value has 16 bits, in whatever type it comes, or may be rounded."""
        dtype = self.region.types[name].dtype
        if dtype == self.number or (dtype == "float32" and self.rounded is not None):
            return True
        if dtype != "float32":
            return False
        if name in self.widened:
            return self.region.types[self.widened[name]].dtype == self.number
        array = self.region.constant(name)
        return array is not None and bool((array.astype(NUMBERS[self.number]).astype(np.float32) == array).all())

    def narrow_result(self, name: str) -> bool:
        """Whether a result is rounded to 16 bits anyway, or may be."""
        dtype = self.region.types[name].dtype
        if dtype == self.number or (dtype == "float32" and self.rounded is not None):
            return True
        users = [op for op in self.region.ops if name in op.inputs]
        casts = all(op.op_type == "Cast" and self.region.types[op.outputs[0]].dtype == self.number for op in users)
        return dtype == "float32" and bool(users) and casts and name not in self.region.outputs

    def step(self, op: Op) -> None:
        shape = self.region.types[op.outputs[0]].shape
        if self.open is not None and self.open.shape != shape:
            self.close()
        if self.open is None:
            self.open = _Open(shape)
        for name in op.inputs:
            array = self.region.constant(name)
            if array is not None and name not in self.open.constants:
                self.open.constants[name] = np.broadcast_to(array.astype(np.float32), shape).reshape(-1)
        left, right = (self.same.get(name, name) for name in op.inputs)
        self.open.steps.append(Step(STEPS[op.op_type], left, right, op.outputs[0]))
        self.open.origin.append(f"{op.op_type}:{op.name}")

    def on_host(self, op: Op) -> None:
        """An operator of the host: before the layer under construction, if it reads none of its results."""
        if self.open is not None and self.open.results & set(op.inputs):
            self.close()
        for name in op.inputs:
            array = self.region.constant(name)
            if array is not None:
                self.constants[name] = array if array.dtype.kind in "iub" else array.astype(np.float32)
        self.host.append(host_operator(op, self.region, "in a region of AiM"))

    def close(self) -> None:
        """End the layer under construction: what came before it is a part."""
        if self.open is None:
            return
        made = self.open
        self.open = None
        self.flush()
        inside = {step.result: step for step in made.steps}
        names = [name for step in made.steps for name in (step.left, step.right)]
        inputs = dict.fromkeys(n for n in names if n not in inside and n not in made.constants)
        own = {step.result for step in made.steps}
        others = [op for op in self.region.ops if op.outputs[0] not in own and not self.only_another_type(op)]
        used = {self.origin(name) for op in others for name in op.inputs}
        outputs = [name for name in inside if name in used or name in self.region.outputs]
        stem = f"{self.region.name}.{sum(part.layer is not None for part in self.parts)}"
        layer = Elementwise(
            name=stem if len(self.parts) else self.region.name,
            steps=tuple(made.steps),
            inputs=tuple(inputs),
            constants=made.constants,
            outputs=tuple(outputs),
            elements=prod(made.shape),
            origin=tuple(made.origin),
        )
        self.before = (layer, made.shape)

    def origin(self, name: str) -> str:
        """What a value is before Casts that only give it another type, of all the region's operators."""
        op = next((op for op in self.region.ops if name in op.outputs), None)
        return self.origin(op.inputs[0]) if op is not None and self.only_another_type(op) else name

    def flush(self) -> None:
        """Hand out the last layer, and what the host does after it."""
        layer, shape = self.before
        if layer is not None or self.host:
            self.parts.append(Part(layer, shape, self.number, tuple(self.host), self.constants))
        self.before, self.host, self.constants = (None, ()), [], {}
