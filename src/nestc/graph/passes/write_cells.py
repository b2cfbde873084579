"""Write out LSTM and GRU of known length as products and gates, so that targets without loops take the products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, array, operand

MOST_NODES = 1024
"""Nodes that one operator may become; a longer one stays."""

_NODES = {"LSTM": 16, "GRU": 18}
"""Nodes of one step, about."""

_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}
_GATES = {"LSTM": 4, "GRU": 3}


@dataclass(frozen=True)
class _Cell:
    """Sizes of a node, and where its nodes are inserted."""

    node: ir.Node
    gates: int
    hidden: int
    batch: int


class WriteCells(Rewrite):
    """Replace LSTM and GRU by a Gemm for the input and one for the state at each step, and gates between them.

    Equations: ONNX, operators LSTM and GRU. A node is left alone if its weights are not constant, it has peepholes,
    lengths of sequences, a clip or functions of its own, or would become more than `MOST_NODES` nodes.
    """

    what = "recurrent operators written out"

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type not in _GATES or not self.plain(node):
            return False
        shape = static_shape(node.inputs[0]) if node.inputs[0] is not None else None
        weights, states, biases = (array(operand(node, index)) for index in (1, 2, 3))
        if shape is None or weights is None or states is None or (operand(node, 3) is not None and biases is None):
            return False
        steps, batch, _ = shape
        directions, rows, hidden = states.shape
        if not 0 < steps * directions * _NODES[node.op_type] <= MOST_NODES or 0 in (batch, hidden, weights.shape[2]):
            return False
        if biases is None:
            biases = np.zeros((directions, 2 * rows), weights.dtype)
        cell = _Cell(node, _GATES[node.op_type], hidden, batch)
        way = node.attributes["direction"].as_string() if "direction" in node.attributes else "forward"
        ends: list[list[ir.Value]] = []
        for direction in range(directions):
            backwards = way == "reverse" or direction == 1
            given = [self.start(cell, index, direction) for index in ((5, 6) if node.op_type == "LSTM" else (5,))]
            ends.append(
                self.direction(cell, backwards, weights[direction], states[direction], biases[direction], given, steps)
            )
        self.give(cell, ends, steps)
        return True

    def plain(self, node: ir.Node) -> bool:
        """Whether the node has nothing but weights, biases, initial states and its direction."""
        names = [value for value in node.attributes if value not in ("direction", "hidden_size", "linear_before_reset")]
        for name in names:
            attribute = node.attributes[name]
            if name == "activations":
                given = list(attribute.as_strings())
                default = _DEFAULTS[node.op_type]
                if given not in (default, default * 2):
                    return False
            elif name in ("layout", "input_forget"):
                if attribute.as_int():
                    return False
            else:
                return False
        x = node.inputs[0]
        lengths, peepholes = operand(node, 4), operand(node, 7)
        return x is not None and x.dtype == ir.DataType.FLOAT and lengths is None and peepholes is None

    def start(self, cell: _Cell, index: int, direction: int) -> ir.Value:
        """An initial state of one direction, (batch, hidden)."""
        given = operand(cell.node, index)
        shape = [cell.batch, cell.hidden]
        if given is None:
            return self.constant(np.zeros(shape, np.float32), f"{cell.node.name}.start")
        return self.gather(cell, given, direction, shape)

    def gather(self, cell: _Cell, value: ir.Value, place: int, shape: Sequence[int]) -> ir.Value:
        at = self.constant(np.array(place, np.int64), f"{cell.node.name}.at")
        return self.insert(cell.node, "Gather", [value, at], {"axis": 0}, like=value, shape=shape)

    def direction(
        self,
        cell: _Cell,
        backwards: bool,
        weights: np.ndarray,
        states: np.ndarray,
        biases: np.ndarray,
        start: Sequence[ir.Value],
        steps: int,
    ) -> list[ir.Value]:
        """One direction: the state after every step, in the order of the input; for LSTM the last cell's at the end."""
        node, rows = cell.node, len(weights)
        x = node.inputs[0]
        assert x is not None
        lstm = node.op_type == "LSTM"
        # An LSTM adds both products at once, so that one bias will do; a GRU's reset gate comes between them.
        first = biases[:rows] + biases[rows:] if lstm else biases[:rows]
        names = (f"{node.name}.W", f"{node.name}.R", f"{node.name}.Wb", f"{node.name}.Rb")
        w, r, wb = (self.constant(a, n) for a, n in zip((weights, states, first), names[:3], strict=True))
        rest = None if lstm else self.constant(biases[rows:], names[3])
        candidate: tuple[ir.Value, ir.Value] | None = None
        late = "linear_before_reset" not in node.attributes or not node.attributes["linear_before_reset"].as_int()
        if not lstm and late:
            h = cell.hidden
            r, rest = self.constant(states[: 2 * h], names[1]), self.constant(biases[rows : rows + 2 * h], names[3])
            candidate = (self.constant(states[2 * h :], names[1]), self.constant(biases[rows + 2 * h :], names[3]))
        found: list[ir.Value] = []
        state, memory = start[0], start[-1]
        for step in reversed(range(steps)) if backwards else range(steps):
            row = self.gather(cell, x, step, [cell.batch, weights.shape[1]])
            inner = self.gemm(cell, row, w, wb, rows)
            if lstm:
                outer = self.gemm(cell, state, r, None, rows)
                state, memory = self.lstm(cell, self.binary(cell, "Add", inner, outer), memory)
            else:
                outer = self.gemm(cell, state, r, rest, rows if candidate is None else 2 * cell.hidden)
                state = self.gru(cell, inner, outer, state, candidate)
            found.append(state)
        ordered = found[::-1] if backwards else found
        return [*ordered, found[-1], *([memory] if lstm else [])]

    def lstm(self, cell: _Cell, gates: ir.Value, memory: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The next state and cell, from gates i, o, f and c."""
        enter, leave, forget, new = self.split(cell, gates, 4)
        kept = self.binary(cell, "Mul", self.unary(cell, "Sigmoid", forget), memory)
        added = self.binary(cell, "Mul", self.unary(cell, "Sigmoid", enter), self.unary(cell, "Tanh", new))
        memory = self.binary(cell, "Add", kept, added)
        return self.binary(cell, "Mul", self.unary(cell, "Sigmoid", leave), self.unary(cell, "Tanh", memory)), memory

    def gru(
        self,
        cell: _Cell,
        inner: ir.Value,
        outer: ir.Value,
        state: ir.Value,
        candidate: tuple[ir.Value, ir.Value] | None,
    ) -> ir.Value:
        """The next state, from gates z, r and h; the reset is applied before or after the state's last product."""
        x_update, x_reset, x_new = self.split(cell, inner, 3)
        h_update, h_reset, *h_new = self.split(cell, outer, 3 if candidate is None else 2)
        update = self.unary(cell, "Sigmoid", self.binary(cell, "Add", x_update, h_update))
        reset = self.unary(cell, "Sigmoid", self.binary(cell, "Add", x_reset, h_reset))
        if candidate is None:
            past = self.binary(cell, "Mul", reset, h_new[0])
        else:
            past = self.gemm(cell, self.binary(cell, "Mul", reset, state), *candidate, cell.hidden)
        new = self.unary(cell, "Tanh", self.binary(cell, "Add", x_new, past))
        # (1 - z) h' + z h
        difference = self.binary(cell, "Sub", state, new)
        return self.binary(cell, "Add", new, self.binary(cell, "Mul", update, difference))

    def give(self, cell: _Cell, ends: Sequence[Sequence[ir.Value]], steps: int) -> None:
        """Let whoever uses Y, Y_h and Y_c use what they have become."""
        node = cell.node
        whole = [cell.batch, cell.hidden]
        wanted = [value if value.uses() or value.is_graph_output() else None for value in node.outputs]
        wanted += [None] * (3 - len(wanted))
        y, *last = wanted
        if y is not None:
            # Each step is (directions, batch, hidden).
            each = [self.joined(cell, [one[step] for one in ends], whole) for step in range(steps)]
            self.replace(y, self.joined(cell, each, [len(ends), *whole]))
        for index, value in enumerate(last):
            if value is not None:
                self.replace(value, self.joined(cell, [one[steps + index] for one in ends], whole))

    # --- nodes

    def joined(self, cell: _Cell, values: Sequence[ir.Value], shape: Sequence[int]) -> ir.Value:
        """Values of a shape along a new first axis."""
        axes = self.constant(np.array([0], np.int64), f"{cell.node.name}.axis")
        raised = [self.insert(cell.node, "Unsqueeze", [value, axes], like=value, shape=[1, *shape]) for value in values]
        if len(raised) == 1:
            return raised[0]
        return self.insert(cell.node, "Concat", raised, {"axis": 0}, like=raised[0], shape=[len(raised), *shape])

    def gemm(self, cell: _Cell, x: ir.Value, weights: ir.Value, bias: ir.Value | None, rows: int) -> ir.Value:
        operands = [x, weights] if bias is None else [x, weights, bias]
        return self.insert(cell.node, "Gemm", operands, {"transB": 1}, like=x, shape=[cell.batch, rows])

    def split(self, cell: _Cell, value: ir.Value, parts: int) -> list[ir.Value]:
        found: list[ir.Value] = []
        axis = self.constant(np.array([1], np.int64), f"{cell.node.name}.axis")
        for part in range(parts):
            ends = [np.array([(part + more) * cell.hidden], np.int64) for more in (0, 1)]
            bounds = [self.constant(end, f"{cell.node.name}.bound") for end in ends]
            shape = [cell.batch, cell.hidden]
            found.append(self.insert(cell.node, "Slice", [value, *bounds, axis], like=value, shape=shape))
        return found

    def unary(self, cell: _Cell, op: str, x: ir.Value) -> ir.Value:
        return self.insert(cell.node, op, [x], like=x)

    def binary(self, cell: _Cell, op: str, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.insert(cell.node, op, [a, b], like=a)
