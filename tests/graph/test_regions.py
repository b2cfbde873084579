"""Regions: which nodes go together, that the formed model still computes the same, and what a Region says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graph_nets import NETS
from graph_support import assert_same, feeds, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.graph import pipeline, regions
from nestc.graph.model import Model
from nestc.graph.region import Region, TensorType
from nestc.importers.onnx import load


def formed(name: str) -> tuple[Model, Model]:
    model = load(NETS[name](), dims={"N": 2} if name == "resnet" else None)
    return model, regions.form(pipeline.optimize(model))


def ops(region: Region) -> str:
    return " ".join(op.op_type for op in region.ops)


@pytest.mark.parametrize("name", NETS)
def test_formed_model_computes_the_same(name: str) -> None:
    model, result = formed(name)
    inputs = feeds(model)
    expected = run(model, inputs)
    assert_same(expected, run(result, inputs))
    names = [region.name for region in regions.regions(result)]
    assert_same(expected, run(regions.submodel(result, names), inputs))


@pytest.mark.parametrize("name", NETS)
def test_regions_are_complete_and_in_order(name: str) -> None:
    model, result = formed(name)
    check(regions.regions(result), list(model.inputs), list(model.outputs))


def check(found: list[Region], inputs: list[str], outputs: list[str]) -> None:
    """Every operand is an input, a constant, or made before; every region is typed and named once."""
    known = set(inputs)
    assert len({region.name for region in found}) == len(found)
    for region in found:
        inside = set(region.inputs) | region.constants.keys()
        assert known >= set(region.inputs)
        for op in region.ops:
            assert inside >= set(filter(None, op.inputs))
            inside |= set(filter(None, op.outputs))
        assert inside >= set(region.outputs)
        assert set(region.types) >= inside
        for name, read in region.constants.items():
            kind = region.types[name]
            assert (read().shape, str(read().dtype)) == (kind.shape, kind.dtype)
        known |= set(region.outputs)
    assert known >= set(outputs)


def test_anchors_take_their_tails() -> None:
    _, result = formed("mobilenet")
    found = [(region.anchor, ops(region)) for region in regions.regions(result)]
    assert found == [
        ("Conv", "Conv HardSwish"),
        ("Conv", "Conv Clip"),
        ("Conv", "Conv Clip"),
        ("ReduceMean", "ReduceMean"),
        ("Conv", "Conv Relu"),
        ("Conv", "Conv Sigmoid"),
        (None, "Mul"),  # its operands wait for each other: the gate is computed from the other one
        ("Conv", "Conv Add"),
        ("Conv", "Conv HardSwish"),
        ("GlobalAveragePool", "GlobalAveragePool"),
        ("view", "Flatten"),
        ("Gemm", "Gemm"),
        ("Softmax", "Softmax"),
    ]


def test_region_as_plain_data() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    model = parse(
        "g (float[4,2] x, float[4,3] r) => (float[4,3] y) { a = MatMul(x, w)  y = LeakyRelu<alpha=0.5>(a) }", w=weight
    )
    result = regions.form(model)
    (region,) = regions.regions(result)
    assert (region.name, region.anchor) == ("r000_MatMul_LeakyRelu", "MatMul")
    assert (region.inputs, region.outputs) == (("x",), ("y",))
    assert [op.op_type for op in region.ops] == ["MatMul", "LeakyRelu"]
    assert region.ops[0].inputs == ("x", "w")
    assert region.ops[1].attributes == {"alpha": 0.5}
    assert region.origin == tuple(f"{node.op_type}:{node.name}" for node in model.ir.graph)
    assert region.types == {
        "x": TensorType("float32", (4, 2)),
        "w": TensorType("float32", (2, 3)),
        "a": TensorType("float32", (4, 3)),
        "y": TensorType("float32", (4, 3)),
    }
    np.testing.assert_array_equal(region.constant("w"), weight)
    assert region.constant("x") is None


def groups(graph: str, **weights: np.ndarray) -> list[str]:
    model = parse(graph, **weights)
    result = regions.form(model)
    inputs = feeds(model)
    assert_same(run(model, inputs), run(result, inputs))
    return [ops(region) for region in regions.regions(result)]


def test_a_gate_computed_inside_the_tail_is_taken() -> None:
    graph = """g (float[2,3] x) => (float[2,4] y) {
        a = MatMul(x, w)  b = Softplus(a)  c = Tanh(b)  d = Mul(a, c)  y = Abs(d) }"""
    assert groups(graph, w=np.ones((3, 4), np.float32)) == ["MatMul Softplus Tanh Mul Abs"]


def test_a_tail_ends_where_the_value_is_needed_elsewhere() -> None:
    graph = """g (float[2,2] x) => (float[2,2] y) {
        a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, w)  d = Relu(c)  y = Add(d, b) }"""
    assert groups(graph, w=np.ones((2, 2), np.float32)) == ["MatMul Relu", "MatMul Relu Add"]


def test_scales_are_computed_before_the_product_that_they_scale() -> None:
    graph = """g (float[2,3] x) => (float[2,4] y) {
        a, s, z = DynamicQuantizeLinear(x)
        i = MatMulInteger(a, w, z)  f = Cast<to=1>(i)  t = Mul(s, v)  m = Mul(f, t)  y = Add(m, b) }"""
    weights = {"w": np.ones((3, 4), np.int8), "v": np.ones(4, np.float32), "b": np.ones(4, np.float32)}
    assert groups(graph, **weights) == ["DynamicQuantizeLinear", "Mul", "MatMulInteger Cast Mul Add"]


def test_a_residual_of_two_products_goes_into_the_later_one() -> None:
    graph = "g (float[2,2] x) => (float[2,2] y) { a = MatMul(x, w)  b = MatMul(w, x)  c = Add(a, b)  y = Relu(c) }"
    assert groups(graph, w=np.ones((2, 2), np.float32)) == ["MatMul", "MatMul Add Relu"]


def test_elementwise_operators_of_one_shape_fuse_with_several_outputs() -> None:
    graph = """g (float[2,3] x, float[3] z) => (float[2,3] y, float[2,3] u, float[3] v) {
        a = Exp(x)  b = Add(a, z)  y = Relu(b)  c = Sub(b, a)  u = Abs(c)  v = Neg(z) }"""
    assert groups(graph) == ["Exp Add Relu Sub Abs", "Neg"]


def test_data_movement_takes_the_operators_after_it() -> None:
    graph = """g (float[2,3] x) => (float[3,2] y) {
        a = Abs(x)  t = Transpose(a)  b = Exp(t)  y = Neg(b) }"""
    assert groups(graph) == ["Abs", "Transpose Exp Neg"]


def test_views_make_a_region_of_their_own() -> None:
    graph = """g (float[2,3,4] x) => (float[24] y) {
        a = Flatten(x)  s = Squeeze(a)  f = Flatten<axis=0>(s)  k = Shape<start=1>(f)  y = Reshape(f, k) }"""
    model = parse(graph)
    result = regions.form(pipeline.optimize(model))
    (region,) = regions.regions(result)
    assert region.anchor == "view"
    assert region.types["y"].shape == (24,)


def test_nodes_alone() -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Exp(x)  b = Neg(a)  y = Abs(b) }")
    middle = list(model.ir.graph)[1].name
    assert middle is not None
    assert [ops(region) for region in regions.regions(regions.form(model, alone=[middle]))] == ["Exp", "Neg", "Abs"]


def test_nodes_with_graphs_inside_stay_whole_and_say_what_they_read() -> None:
    graph = """g (float[2] x, bool c) => (float[2] y) {
        a = Exp(x)
        b = If (c) <then_branch = p () => (float[2] u) { u = Neg(a) },
            else_branch = q () => (float[2] v) { v = Add(x, w) }>
        y = Abs(b) }"""
    model = parse(graph, w=np.ones(2, np.float32))
    result = regions.form(model)
    inputs = {"x": np.array([1, 2], np.float32), "c": np.array(False)}
    assert_same(run(model, inputs), run(result, inputs))
    found = regions.regions(result)
    assert [(region.anchor, ops(region)) for region in found] == [(None, "Exp"), ("If", "If"), (None, "Abs")]
    assert set(found[1].inputs) == {"c", "a", "x"}
    assert set(found[1].constants) == {"w"}
    part = regions.submodel(result, [found[1].name, found[2].name])
    assert {value.name for value in part.graph.inputs} == {"c", "a", "x"}
    values = {"a": np.exp(inputs["x"]), **inputs}
    assert_same(run(model, inputs), run(part, values))


def test_unknown_sizes_and_sequences() -> None:
    graph = """g (float[2,3] x) => (int64[2,n] y, int64 z) {
        y = NonZero(x)  s = SplitToSequence<axis=0>(x)  z = SequenceLength(s) }"""
    result = regions.form(parse(graph))
    found = {ops(region): region for region in regions.regions(result)}
    assert list(found) == ["NonZero", "SplitToSequence", "SequenceLength"]
    assert found["NonZero"].types["y"] == TensorType("int64", (2, -1))
    assert found["SequenceLength"].types["s"].dtype == "sequence(float32)"


def test_submodel_of_some_regions_has_the_border_as_inputs_and_outputs() -> None:
    model, result = formed("resnet")
    found = regions.regions(result)
    chosen = found[2:5]
    part = regions.submodel(result, [region.name for region in chosen])
    made = {name for region in chosen for name in region.outputs}
    assert [value.name for value in part.graph.inputs] == [found[1].outputs[0]]
    assert {value.name for value in part.graph.outputs} <= made
    assert all(node.domain == "" for node in part.graph)
    inputs = feeds(model)
    whole = result.ir.clone()
    border = [value for node in whole.graph for value in node.outputs if value.name in {found[1].outputs[0], *made}]
    whole.graph.outputs.extend(value for value in border if value not in whole.graph.outputs)
    values = dict(zip([value.name or "" for value in whole.graph.outputs], run(whole, inputs), strict=True))
    expected = [values[value.name or ""] for value in part.graph.outputs]
    assert_same(expected, run(part, {found[1].outputs[0]: values[found[1].outputs[0]]}))


def test_submodel_of_an_unknown_region() -> None:
    _, result = formed("resnet")
    with pytest.raises(KeyError, match="r999"):
        regions.submodel(result, ["r999"])


OPS = ("Add", "Mul", "Relu", "Exp", "MatMul", "Softmax", "Transpose", "Flatten", "ReduceMax", "Concat")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=25))
def test_random_graphs_are_cut_without_a_cycle(plan: list[tuple[str, int, int]]) -> None:
    """Square values throughout, so that any operator can follow any other."""
    values = [ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 2])) for i in range(2)]
    inputs, nodes = list(values), []
    for number, (op_type, first, second) in enumerate(plan):
        a, b = values[first % len(values)], values[second % len(values)]
        operands = [a, b] if op_type in {"Add", "Mul", "MatMul"} else [a]
        shape = [4, 2] if op_type == "Concat" else [1, 2] if op_type == "ReduceMax" else [2, 2]
        attributes = {"Transpose": {"perm": [1, 0]}, "Concat": {"axis": 0}, "Flatten": {"axis": 1}}.get(op_type, {})
        operands = [a, b] if op_type == "Concat" else operands
        output = ir.Value(name=f"v{number}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        nodes.append(ir.node(op_type, operands, attributes, outputs=[output], name=f"n{number}"))
        if shape == [2, 2]:
            values.append(output)
    used = {value for node in nodes for value in node.inputs}
    outputs = [node.outputs[0] for node in nodes if node.outputs[0] not in used]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 24}, name="g")
    _set_reductions(graph)
    model = Model(ir.Model(graph, ir_version=11))
    result = regions.form(model)
    found = regions.regions(result)
    assert sorted(op.name for region in found for op in region.ops) == sorted(node.name or "" for node in nodes)
    check(found, [value.name or "" for value in inputs], [value.name or "" for value in outputs])
    random = np.random.default_rng(0)
    feed = {f"x{i}": random.uniform(-0.5, 0.5, (2, 2)).astype(np.float32) for i in range(2)}
    with np.errstate(all="ignore"):
        expected, got = run(model, feed), run(result, feed)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, equal_nan=True)


def _set_reductions(graph: ir.Graph) -> None:
    axes = ir.Value(name="axes", const_value=ir.tensor(np.array([0], np.int64), name="axes"))
    axes.type, axes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    graph.register_initializer(axes)
    for node in graph:
        if node.op_type == "ReduceMax":
            node.resize_inputs(2)
            node.replace_input_with(1, axes)


def test_operands_are_widened_in_the_region_that_needs_them() -> None:
    graph = """g (uint8[1,2,4,4] x, uint8[1,2,4,4] r) => (uint8[1,2,4,4] y) {
        a = DequantizeLinear(x, s, z)  b = DequantizeLinear(r, s, z)  k = DequantizeLinear(w, s)
        c = Conv(a, k)  q = QuantizeLinear(c, s, z)  d = DequantizeLinear(q, s, z)
        e = Add(d, b)  f = Relu(e)  y = QuantizeLinear(f, s, z) }"""
    weights = {
        "s": np.array(0.1, np.float32),
        "z": np.array(3, np.uint8),
        "w": np.ones((2, 2, 1, 1), np.int8),
    }
    assert groups(graph, **weights) == [
        "DequantizeLinear DequantizeLinear Conv QuantizeLinear DequantizeLinear DequantizeLinear Add Relu QuantizeLinear"
    ]


def test_a_region_ends_narrow_and_its_users_widen() -> None:
    graph = """g (float[2,3] x) => (uint8[2,3] y, uint8[2,3] v) {
        q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)  b = DequantizeLinear(q, s, z)
        c = Softmax(a)  y = QuantizeLinear(c, s, z)  d = Add(b, b)  v = QuantizeLinear(d, s, z) }"""
    weights = {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8)}
    assert groups(graph, **weights) == [
        "QuantizeLinear",
        "DequantizeLinear Softmax QuantizeLinear",
        "DequantizeLinear Add QuantizeLinear",
    ]


def test_a_smaller_operand_is_widened_before() -> None:
    graph = """g (uint8[1,2,4,4] x, uint8[1,2,1,1] gate) => (uint8[1,2,4,4] y) {
        a = DequantizeLinear(x, s)  b = DequantizeLinear(gate, s)  c = Mul(a, b)  y = QuantizeLinear(c, s, z) }"""
    weights = {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8)}
    assert groups(graph, **weights) == ["DequantizeLinear", "DequantizeLinear Mul QuantizeLinear"]


def test_quantized_operands_of_a_concat() -> None:
    graph = """g (uint8[1,2,4] x, int8[1,3,4] z) => (uint8[1,5,4] y) {
        a = DequantizeLinear(x, s)  b = DequantizeLinear(z, s)  c = Concat<axis=1>(a, b)  y = QuantizeLinear(c, s) }"""
    assert groups(graph, s=np.array(0.1, np.float32)) == ["DequantizeLinear DequantizeLinear Concat QuantizeLinear"]


def test_the_result_of_the_model_may_be_wide() -> None:
    graph = """g (uint8[2,2] x) => (float[2,2] y) {
        a = DequantizeLinear(x, s)  b = MatMul(a, w)  q = QuantizeLinear(b, s)  y = DequantizeLinear(q, s) }"""
    weights = {"s": np.array(0.1, np.float32), "w": np.ones((2, 2), np.float32)}
    assert groups(graph, **weights) == ["DequantizeLinear MatMul QuantizeLinear DequantizeLinear"]
