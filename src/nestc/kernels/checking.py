"""Checks of a kernel family against ONNX Runtime and the node tests of the onnx package, for tests and new families."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import helper

from nestc.errors import Error
from nestc.kernels.api import PLAIN, Family, Layout
from nestc.kernels.testing import host_machine, region_of, run_lowered

Arrays = Mapping[str, np.ndarray]


def by_onnxruntime(nodes: Sequence[onnx.NodeProto], feeds: Arrays, opset: int = 22) -> dict[str, np.ndarray]:
    """Every value that a chain of nodes makes, computed by ONNX Runtime (of the test extra)."""
    import onnxruntime

    made = [name for node in nodes for name in node.output if name]
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in feeds.items()],
        [helper.make_empty_tensor_value_info(name) for name in made],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return {name: np.asarray(value) for name, value in zip(made, session.run(made, dict(feeds)), strict=True)}


@cache
def node_cases(*operators: str) -> list[Any]:
    """The tests of the onnx package that consist of one node of one of the operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    wanted = [[op] for op in operators]
    return [case for case in cases if case.model and [node.op_type for node in case.model.graph.node] in wanted]


class FamilyCheck:
    """Runs regions through one family and compares what comes out."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.machine = host_machine()

    def lowered_values(
        self,
        nodes: Sequence[onnx.NodeProto],
        feeds: Arrays,
        expected: Arrays,
        outputs: Sequence[str],
        blocked: bool,
        constants: Sequence[str] = (),
        jit: bool = True,
    ) -> Mapping[str, np.ndarray]:
        """The outputs by our kernels; `expected` gives the types of all made values."""
        region = region_of(nodes, {**feeds, **expected}, outputs, constants)
        reason = self.family.refusal(region)
        assert reason is None, reason
        block = Layout(self.machine.lanes("float32"))
        incoming = {n: block if blocked and len(region.types[n].shape) > 2 else PLAIN for n in region.inputs}
        layouts = self.family.layouts(region, self.machine, incoming)
        lowered = self.family.lower(region, self.machine, layouts)
        return run_lowered(region, lowered, feeds, self.machine, layouts, jit)

    def compare(
        self,
        nodes: Sequence[onnx.NodeProto],
        feeds: Arrays,
        blocked: bool = False,
        constants: Sequence[str] = (),
        jit: Sequence[bool] = (True,),
        outputs: Sequence[str] | None = None,
        expected: Arrays | None = None,
        tolerance: float = 2e-5,
    ) -> None:
        """Our outputs equal those of ONNX Runtime (or `expected`): integers exactly, floats within `tolerance` of the
        output's scale. Each way in `jit` is tried: machine code (True) or the interpreter."""
        expected = by_onnxruntime(nodes, feeds) if expected is None else expected
        outputs = [n for n in nodes[-1].output if n] if outputs is None else outputs
        for way in jit:
            found = self.lowered_values(nodes, feeds, expected, outputs, blocked, constants, way)
            for name in outputs:
                wanted, got = expected[name], found[name]
                assert got.shape == wanted.shape and got.dtype == wanted.dtype
                if wanted.dtype.kind in "iub":
                    np.testing.assert_array_equal(got, wanted)
                    continue
                a, b = got.astype(np.float64), wanted.astype(np.float64)
                scale = float(np.max(np.abs(b))) if b.size else 1.0
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)

    def run_node_case(
        self, case: Any, blocked: bool, refused: Sequence[str] = (), constants: Sequence[str] = ()
    ) -> None:
        """One test of the onnx package; those in `refused` must be refused. Raises AssertionError naming the case."""
        graph = case.model.graph
        (inputs, outputs), (node,) = case.data_sets[0], graph.node
        feeds = {value.name: np.asarray(array) for value, array in zip(graph.input, inputs, strict=True)}
        expected = {value.name: np.asarray(array) for value, array in zip(graph.output, outputs, strict=True)}
        if case.name in refused:
            assert self.family.refusal(region_of([node], {**feeds, **expected}, list(expected)))
            return
        try:
            self.compare([node], feeds, blocked, constants, expected=expected, outputs=list(expected), tolerance=1e-4)
        except (AssertionError, Error) as error:
            raise AssertionError(f"{case.name}: {error}") from error
