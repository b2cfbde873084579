"""Write out Loop and Scan whose number of steps is known, so that their bodies are compiled like any other nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from nestc.graph.infer_shapes import InferShapes
from nestc.graph.model import static_shape
from nestc.graph.passes.fold_constants import FoldConstants
from nestc.graph.passes.rewrite import Rewrite, array, ints, operand

MOST_NODES = 1024
"""Nodes that one loop may become; a longer one stays a loop."""


class Unroll(Rewrite):
    """Put the body of a Loop or a Scan in its place, once for each step.

    A Loop is left alone where its condition is computed in the body, where the number of steps is not a constant, and
    where there are no steps at all.
    """

    what = "loops unrolled"

    def rewrite(self, node: ir.Node) -> bool:
        if not all(isinstance(value.type, ir.TensorType) or not value.uses() for value in node.outputs):
            return False
        if node.op_type == "Loop":
            return self.loop(node)
        return node.op_type == "Scan" and self.scan(node)

    def loop(self, node: ir.Node) -> bool:
        body = node.attributes["body"].as_graph()
        steps, condition = array(operand(node, 0)), array(operand(node, 1))
        if operand(node, 1) is None:
            condition = np.array(True)
        if steps is None or condition is None or not bool(condition.reshape(-1)[0]) or not _goes_on(body):
            return False
        count = int(steps.reshape(-1)[0])
        if not 0 < count * max(1, len(body)) <= MOST_NODES:
            return False
        weights = self.weights(body)
        states: list[ir.Value | None] = list(node.inputs[2:])
        # Body inputs are scalars, unless the body says that they have one axis, which ONNX Runtime allows.
        ranks = [len(value.shape) if value.shape is not None else 0 for value in body.inputs[:2]]
        on = self.constant(np.full((1,) * ranks[1], True), f"{node.name}.on")
        scanned: list[list[ir.Value]] = [[] for _ in body.outputs[1 + len(states) :]]
        for step in range(count):
            number = self.constant(np.full((1,) * ranks[0], step, np.int64), f"{node.name}.step")
            results = self.body(node, body, [number, on, *states], weights)
            states = [*results[1 : 1 + len(states)]]
            for collected, value in zip(scanned, results[1 + len(states) :], strict=True):
                collected.append(value)
        self.give(node, states, [self.joined(node, values, 0) for values in scanned])
        return True

    def scan(self, node: ir.Node) -> bool:
        body = node.attributes["body"].as_graph()
        first = len(node.inputs) - node.attributes["num_scan_inputs"].as_int()
        sources = node.inputs[first:]
        shapes = [None if value is None else static_shape(value) for value in sources]
        if not sources or any(shape is None for shape in shapes):
            return False
        axes = ints(node, "scan_input_axes", (0,) * len(sources))
        sizes = {shape[axis] for shape, axis in zip(shapes, axes, strict=True) if shape is not None}
        count = sizes.pop()
        if sizes or not 0 < count * (len(body) + len(sources)) <= MOST_NODES:
            return False
        states: list[ir.Value | None] = list(node.inputs[:first])
        made = len(body.outputs) - len(states)
        backwards = ints(node, "scan_input_directions", (0,) * len(sources))
        out_axes = ints(node, "scan_output_axes", (0,) * made)
        out_backwards = ints(node, "scan_output_directions", (0,) * made)
        weights = self.weights(body)
        scanned: list[list[ir.Value]] = [[] for _ in range(made)]
        for step in range(count):
            slices: list[ir.Value | None] = []
            for source, shape, axis, back in zip(sources, shapes, axes, backwards, strict=True):
                assert source is not None and shape is not None
                at = self.constant(np.array(count - 1 - step if back else step, np.int64), f"{node.name}.step")
                rest = [size for other, size in enumerate(shape) if other != axis % len(shape)]
                slices.append(self.insert(node, "Gather", [source, at], {"axis": axis}, like=source, shape=rest))
            results = self.body(node, body, [*states, *slices], weights)
            states = [*results[: len(states)]]
            for collected, value in zip(scanned, results[len(states) :], strict=True):
                collected.append(value)
        stacked = [
            self.joined(node, values[::-1] if back else values, axis)
            for values, axis, back in zip(scanned, out_axes, out_backwards, strict=True)
        ]
        self.give(node, states, stacked)
        return True

    def weights(self, body: ir.Graph) -> Mapping[str, ir.Value]:
        """The weights of a body as weights of the main graph, by their names in the body."""
        found: dict[str, ir.Value] = {}
        for name, value in body.initializers.items():
            label = self.fresh(name)
            found[name] = ir.Value(name=label, type=value.type, shape=value.shape, const_value=value.const_value)
            self.graph.register_initializer(found[name])
        return found

    def body(
        self, before: ir.Node, body: ir.Graph, inputs: Sequence[ir.Value | None], weights: Mapping[str, ir.Value]
    ) -> list[ir.Value]:
        """A copy of the body's nodes before `before`; the values that its outputs are."""
        copy = body.clone(allow_outer_scope_values=True)
        known: dict[ir.Value, ir.Value] = {}
        for inner, outer in zip(copy.inputs, inputs, strict=True):
            assert outer is not None
            known[inner] = outer
        known.update({value: weights[name] for name, value in copy.initializers.items()})
        outputs = list(copy.outputs)
        copy.outputs.clear()
        for inner, outer in known.items():
            inner.replace_all_uses_with(outer)
        nodes = list(copy)
        copy.remove(nodes)
        for node in nodes:
            node.name = self.fresh(node.name or node.op_type)
            for value in node.outputs:
                value.name = self.fresh(value.name) if value.name else None
                value.shape = None  # may differ from step to step
        self.graph.insert_before(before, nodes)
        return [known.get(value, value) for value in outputs]

    def joined(self, node: ir.Node, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """The values of all steps along a new axis."""
        axes = self.constant(np.array([axis], np.int64), f"{node.name}.axis")
        raised = [self.insert(node, "Unsqueeze", [value, axes], like=value) for value in values]
        for value in raised:
            value.shape = None
        result = self.insert(node, "Concat", raised, {"axis": axis}, like=raised[0])
        result.shape = None
        return result

    def give(self, node: ir.Node, states: Sequence[ir.Value | None], stacked: Sequence[ir.Value]) -> None:
        """Let whoever uses the node use what it has become."""
        for old, new in zip(node.outputs, [*states, *stacked], strict=True):
            if new is not None and (old.uses() or old.is_graph_output()):
                self.replace(old, new)


def _goes_on(body: ir.Graph) -> bool:
    """Whether the body of a Loop never says stop: its condition is passed on, or a constant that is true."""
    value = body.outputs[0]
    while True:
        producer = value.producer()
        if producer is None or producer.domain or producer.op_type not in ("Identity", "Constant"):
            break
        if producer.op_type == "Constant":
            tensor = ir.convenience.get_const_tensor(value)
            return tensor is not None and bool(tensor.numpy().reshape(-1)[0])
        source = producer.inputs[0]
        if source is None:
            return False
        value = source
    if value is body.inputs[1]:
        return True
    constant = array(value)
    return constant is not None and bool(constant.reshape(-1)[0])


class UnrollAll(ir.passes.InPlacePass):
    """Unroll loops, then fold and infer shapes anew, as long as there are loops left to unroll: they may be nested."""

    def __init__(self, notes: list[str] | None = None) -> None:
        super().__init__()
        self.notes = [] if notes is None else notes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        while Unroll(self.notes)(model).modified:
            modified = True
            FoldConstants(self.notes)(model)
            InferShapes()(model)
        return ir.passes.PassResult(model, modified)
