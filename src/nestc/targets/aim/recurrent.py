"""LSTM and GRU nodes: a product with each time step's input, one with the state, and the gates on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from nestc.graph.region import Op, Region
from nestc.runtime.aim.host import HostOp
from nestc.targets.aim.regions import NUMBERS, Array, Product, Refused, format_of, read

RECURRENT = frozenset({"LSTM", "GRU"})
GATES = {"LSTM": 4, "GRU": 3}

MOST_STEPS = 256
"""Time steps times sequences: each is a product of its own, and the stream holds all of them."""


def read_region(region: Region, rounded: str | None = None) -> tuple[Product, ...]:
    """The products of a region, in order, each with what the host does after it. Raises Refused with the reason."""
    return read_recurrent(region, rounded) if region.anchor in RECURRENT else (read(region, rounded),)


def read_recurrent(region: Region, rounded: str | None = None) -> tuple[Product, ...]:
    """The products of a region whose anchor is an LSTM or GRU, in order, each with what the host does after it.

    The state is rounded to 16 bits where it goes into the memory; cell and gates are float32. Raises Refused with the
    reason.
    """
    op = next(op for op in region.ops if op.op_type in RECURRENT)
    return _Reader(op, region, rounded).read()


class _Reader:
    """Sizes of a node, and its products under construction. T steps, B sequences, H units."""

    def __init__(self, op: Op, region: Region, rounded: str | None) -> None:
        self.op, self.region = op, region
        self.where = f"{op.op_type} (node {op.name!r})"
        self.widened = {each.outputs[0]: each.inputs[0] for each in region.ops if each.op_type == "Cast"}
        self.require_plain()
        x = self.widened.get(op.inputs[0], op.inputs[0])
        if region.types[x].dtype == "float32" and rounded is None:
            raise Refused(
                f"{self.where} multiplies float32, and AiM multiplies bfloat16 or float16: quantize the model with "
                "scheme bf16 (or have operands rounded with aim:round=true)"
            )
        self.source, self.number = x, format_of(region.types[x].dtype, self.where, rounded)
        self.steps, self.batch, self.size = region.types[x].shape
        self.hidden, self.directions = region.types[op.inputs[2]].shape[2], region.types[op.inputs[2]].shape[0]
        if self.steps * self.batch > MOST_STEPS or 0 in region.types[x].shape:
            raise Refused(
                f"{self.where} has {self.steps} steps of {self.batch} sequences, each a product of its own; AiM takes "
                f"1 to {MOST_STEPS}"
            )
        if self.number != rounded and not all(self.held(index) for index in (1, 2)):
            raise Refused(f"{self.where} has weights in another format than its input")
        self.products: list[Product] = []
        self.host: list[HostOp] = []
        self.constants: dict[str, Array] = {}

    def require_plain(self) -> None:
        """Raises Refused for forms of the node that the host's gates do not have."""
        op, region = self.op, self.region
        casts = [each for each in region.ops if each is not op]
        if any(each.op_type != "Cast" or each.outputs[0] != op.inputs[0] for each in casts):
            raise Refused(f"{self.where} is followed by other operators in its region")
        for index, what in ((1, "weights"), (2, "weights"), (3, "a bias")):
            if op.input(index) and op.input(index) not in region.constants:
                raise Refused(f"{self.where} has {what} that the model computes; AiM holds constant matrices")
        lengths = region.constant(op.input(4)) if op.input(4) else None
        if op.input(4) and (lengths is None or (lengths != region.types[op.inputs[0]].shape[0]).any()):
            raise Refused(f"{self.where} has sequences of different lengths")
        if op.input(7):
            raise Refused(f"{self.where} has peepholes")
        if op.attributes.get("activations") or op.attributes.get("clip") or op.attributes.get("layout"):
            raise Refused(f"{self.where} has activations, a clip or a layout of its own")
        if op.attributes.get("input_forget"):
            raise Refused(f"{self.where} couples its gates")
        if op.op_type == "GRU" and not op.attributes.get("linear_before_reset"):
            raise Refused(f"{self.where} resets the state before its product (linear_before_reset=0)")

    def held(self, index: int) -> bool:
        """Whether a matrix has the input's format, or float32 values that are the same in it: scheme bf16 leaves the
        latter, once its casts of constants are folded."""
        name = self.op.inputs[index]
        array = self.region.constant(name)
        if array is None or self.region.types[name].dtype != "float32":
            return self.region.types[name].dtype == self.number
        return bool((array.astype(NUMBERS[self.number]).astype(np.float32) == array).all())

    def read(self) -> tuple[Product, ...]:
        """All directions, step by step, and the node's outputs at the end."""
        states = [self.direction(which) for which in range(self.directions)]
        outputs = (*self.op.outputs, "", "")[:3]
        last = [hidden[0 if self.reversed(which) else -1] for which, (hidden, _) in enumerate(states)]
        every = [hidden[step] for step in range(self.steps) for hidden, _ in states]
        for name, values in zip(outputs, (every, last, [cell for _, cell in states]), strict=True):
            if name and name in self.region.types:
                type_ = self.region.types[name]
                self.host.append(HostOp("Stack", tuple(values), name, type_.dtype, type_.shape, {}))
        self.flush()
        return tuple(self.products)

    def reversed(self, which: int) -> bool:
        """Whether a direction goes back in time."""
        direction = self.op.attributes.get("direction", "forward")
        return direction in ("reverse", b"reverse") or which == 1

    def direction(self, which: int) -> tuple[list[str], str]:
        """Names of the hidden states of one direction by time step, and of the last cell state."""
        gates, lstm = GATES[self.op.op_type] * self.hidden, self.op.op_type == "LSTM"
        stem = f"{self.region.name}.{which}"
        bias = self.region.constant(self.op.input(3))
        inner, outer = np.zeros(gates, np.float32), np.zeros(gates, np.float32)
        if bias is not None:
            outer, inner = (part.astype(np.float32) for part in np.split(bias[which], 2))
        if lstm:  # a GRU's reset multiplies the state's bias, too
            outer, inner = outer + inner, np.zeros_like(inner)
        inputs, rows = f"{stem}.inputs", self.steps * self.batch
        self.product(inputs, self.source, rows, self.size, gates, lambda: self.matrix(1, which), outer)
        hidden = self.initial(5, which, f"{stem}.h")
        cell = self.initial(6, which, f"{stem}.c") if lstm else ""
        found = [""] * self.steps
        order = range(self.steps)[::-1] if self.reversed(which) else range(self.steps)
        for step in order:
            name = f"{stem}.{step}"
            state = ""
            if hidden or not lstm:
                if not hidden:
                    hidden = f"{stem}.h"
                    self.constants[hidden] = np.zeros((self.batch, self.hidden), np.float32)
                state = f"{name}.state"
                recurrent = inner if inner.any() else None
                self.product(state, hidden, self.batch, self.hidden, gates, lambda: self.matrix(2, which), recurrent)
            shape, at = (self.batch, self.hidden), {"first": step * self.batch, "count": self.batch}
            if lstm:
                self.host.append(HostOp("LstmCell", (inputs, state, cell), f"{name}.c", "float32", shape, at))
                cell, before = f"{name}.c", f"{name}.c"
            else:
                before = hidden
            hidden = found[step] = f"{name}.h"
            kind = "LstmHidden" if lstm else "GruHidden"
            self.host.append(HostOp(kind, (inputs, state, before), hidden, "float32", shape, at))
        return found, cell

    def initial(self, index: int, which: int, name: str) -> str:
        """The initial state of a direction by name, ``""`` if it is zero."""
        given = self.op.input(index)
        if not given:
            return ""
        array = self.region.constant(given)
        if array is not None:
            if not array.any():
                return ""
            self.constants[name] = np.ascontiguousarray(array[which], np.float32)
            return name
        shape = (self.batch, self.hidden)
        self.host.append(HostOp("Part", (given,), name, "float32", shape, {"first": which, "count": 1}))
        return name

    def matrix(self, index: int, which: int) -> Array:
        array = self.region.constant(self.op.inputs[index])
        assert array is not None
        return array[which].astype(NUMBERS[self.number])

    def product(
        self, result: str, source: str, rows: int, k: int, m: int, weights: Callable[[], Array], bias: Array | None
    ) -> None:
        """The next product; what the host has to do so far comes before it."""
        self.flush()
        self.products.append(
            Product(
                name=f"{self.region.name}.{len(self.products)}",
                anchor=self.op,
                source=source,
                number=self.number,
                rows=rows,
                m=m,
                k=k,
                take=None,
                order=None,
                weights=weights,
                bias=bias,
                activation=None,
                result=result,
                result_shape=(rows, m),
                host=(),
                constants={},
            )
        )

    def flush(self) -> None:
        """Hand what the host does to the last product, after which it comes."""
        if not self.products:
            return
        last = self.products[-1]
        self.products[-1] = replace(last, host=(*last.host, *self.host), constants={**last.constants, **self.constants})
        self.host, self.constants = [], {}
