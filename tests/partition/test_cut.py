"""Regions are cut where a device takes a piece of what it refuses as a whole, and the pieces compute the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest

import nestc
from nestc.graph import pipeline
from nestc.graph.model import Model
from nestc.graph.region import Op, Region, TensorType
from nestc.graph.regions import form, regions
from nestc.partition.cut import find_cuts, pieces
from nestc.partition.match import takes
from nestc.targets import make
from nestc.targets.api import Artifact, Device, Machine, Offer, Partition


def silu_net() -> onnx.ModelProto:
    """Two convolutions of 16 channels on 8x8 with a SiLU between, every value rounded to int8 by a power of two."""
    rng = np.random.default_rng(0)
    constants = {"zero": np.int8(0), "step": np.float32(0.0625), "fine": np.float32(0.0078125)}
    constants |= {f"w{index}": rng.integers(-127, 128, (16, 16, 3, 3), dtype=np.int8) for index in range(2)}
    nodes = [oh.make_node("QuantizeLinear", ["x", "step", "zero"], ["xq"], "q_x")]

    def narrow(source: str, name: str) -> None:
        nodes.append(oh.make_node("QuantizeLinear", [source, "step", "zero"], [f"{name}q"], f"q_{name}"))
        nodes.append(oh.make_node("DequantizeLinear", [f"{name}q", "step", "zero"], [name], f"dq_{name}"))

    def convolve(source: str, index: int) -> None:
        nodes.append(oh.make_node("DequantizeLinear", [source, "step", "zero"], [f"a{index}"], f"dq_a{index}"))
        nodes.append(oh.make_node("DequantizeLinear", [f"w{index}", "fine", "zero"], [f"v{index}"], f"dq_w{index}"))
        nodes.append(oh.make_node("Conv", [f"a{index}", f"v{index}"], [f"c{index}"], f"conv{index}", pads=[1] * 4))

    convolve("xq", 0)
    narrow("c0", "n0")
    nodes.append(oh.make_node("Sigmoid", ["n0"], ["s0"], "sigmoid0"))
    nodes.append(oh.make_node("Mul", ["n0", "s0"], ["m0"], "mul0"))
    nodes.append(oh.make_node("QuantizeLinear", ["m0", "step", "zero"], ["m0q"], "q_m0"))
    convolve("m0q", 1)
    narrow("c1", "y")
    graph = oh.make_graph(
        nodes,
        "silu",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 16, 8, 8])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 16, 8, 8])],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="module")
def quantized() -> Model:
    return pipeline.optimize(nestc.load(silu_net().SerializeToString()))


def test_a_convolution_leaves_its_curve_for_the_device_that_has_none(quantized: Model) -> None:
    vta, cpu = make("vta"), make("cpu")
    whole = regions(form(quantized))
    refused = [region for region in whole if region.anchor == "Conv" and not takes(vta, region)]
    assert {"Conv", "Swish"} <= {op.op_type for op in refused[0].ops}
    cuts = find_cuts(whole, [vta, cpu])
    cut = regions(form(quantized, cuts=cuts))
    assert len(cut) == len(whole) + len(cuts) > len(whole)
    head = next(region for region in cut if region.name.startswith(f"{refused[0].name[:4]}a_"))
    assert takes(vta, head) and head.anchor == "Conv" and head.ops[-1].op_type == "QuantizeLinear"
    assert all(takes(cpu, region) for region in cut)


def test_the_cut_model_computes_the_same(quantized: Model) -> None:
    vta = make("vta")
    cuts = find_cuts(regions(form(quantized)), [vta])
    x = np.random.default_rng(2).standard_normal((1, 16, 8, 8)).astype(np.float32)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = [
        ort.InferenceSession(ir.to_proto(form(quantized, cuts=each).ir).SerializeToString(), options).run(
            None, {"x": x}
        )[0]
        for each in ([], cuts)
    ]
    np.testing.assert_array_equal(*map(np.asarray, found))


def test_what_is_computed_as_data_is_what_is_formed(quantized: Model) -> None:
    whole = next(
        region for region in regions(form(quantized)) if {"Conv", "Swish"} <= {op.op_type for op in region.ops}
    )
    (node, *_) = find_cuts([whole], [make("vta")])
    head, tail = pieces(whole, node)
    formed = [region for region in regions(form(quantized, cuts=[node])) if region.name[:4] == whole.name[:4]]
    for planned, real in zip((head, tail), formed, strict=True):
        assert {op.name for op in planned.ops} == {op.name for op in real.ops}
        assert (set(planned.inputs), set(planned.outputs)) == (set(real.inputs), set(real.outputs))
        assert planned.anchor == real.anchor


def test_nothing_is_cut_for_a_device_that_takes_the_whole(quantized: Model) -> None:
    assert find_cuts(regions(form(quantized)), [make("cpu")]) == []


def test_one_target_gets_its_pieces_without_asking_what_they_cost(quantized: Model) -> None:
    plan = nestc.compile(quantized, ["vta"], threads=1).plan
    assert [(region.device, region.ops[-1]) for region in plan.regions if region.name[4] in "ab"] == [
        ("vta", "QuantizeLinear"),
        ("cpu", "QuantizeLinear"),
        ("vta", "QuantizeLinear"),
        ("cpu", "DequantizeLinear"),
    ]
    assert len(plan.cuts) == 2
    again = nestc.compile(quantized, ["vta"], threads=1, plan=plan)
    assert [region.device for region in again.plan.regions] == [region.device for region in plan.regions]


def test_powers_of_two_leave_curves_to_those_who_have_tables() -> None:
    rng = np.random.default_rng(1)
    weights = {f"w{index}": rng.standard_normal((16, 16, 3, 3)).astype(np.float32) * 0.1 for index in range(2)}
    nodes = [
        oh.make_node("Conv", ["x", "w0"], ["c0"], "conv0", pads=[1] * 4),
        oh.make_node("Sigmoid", ["c0"], ["s0"], "sigmoid0"),
        oh.make_node("Mul", ["c0", "s0"], ["m0"], "mul0"),
        oh.make_node("Conv", ["m0", "w1"], ["y"], "conv1", pads=[1] * 4),
    ]
    graph = oh.make_graph(
        nodes,
        "silu",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 16, 8, 8])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 16, 8, 8])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
    model = nestc.load(proto.SerializeToString())
    x = rng.standard_normal((1, 16, 8, 8)).astype(np.float32)
    profile = nestc.calibrate(model, [{"x": x}])
    powers, plain = (nestc.quantize(model, profile, scheme) for scheme in ("int8-pow2", "int8"))
    ops = [
        [node.op_type for node in each.ir.graph if node.op_type in ("Conv", "Swish", "QuantizeLinear")]
        for each in (powers, plain)
    ]
    assert ops[0] == ["QuantizeLinear", "Conv", "QuantizeLinear", "Swish", "QuantizeLinear", "Conv"]
    assert ops[1] == ["QuantizeLinear", "Conv", "Swish", "QuantizeLinear", "Conv"]
    assert "vta" in {region.device for region in nestc.compile(powers, ["vta"], threads=1).plan.regions}
    reference = nestc.compile(model, threads=1)(x)
    error = nestc.compile(powers, ["vta"], threads=1)(x) - reference
    assert np.sqrt((error**2).mean() / (reference**2).mean()) < 0.1


class Picky:
    """A target that takes a region if all its operators are among those it knows."""

    name = "picky"
    machine = Machine("picky", (), ("float32",))

    def __init__(self, *ops: str) -> None:
        self.offers = (Offer("some", frozenset(ops)),)

    def compile(self, partition: Partition, emit: object = None) -> Artifact:
        raise NotImplementedError

    def open(self) -> Device:
        raise NotImplementedError


def in_a_row(anchor: str | None, *ops: str) -> Region:
    """A region of operators one after the other."""
    names = ["x", *(f"v{number}" for number in range(len(ops)))]
    made = tuple(Op(op, (names[n],), (names[n + 1],), name=f"n{n}") for n, op in enumerate(ops))
    types = dict.fromkeys(names, TensorType("float32", (4,)))
    return Region("r000_row", anchor, made, ("x",), (names[-1],), types, {})


@pytest.mark.parametrize(
    ("anchor", "ops", "known", "cuts"),
    [
        ("Conv", ("Conv", "Relu", "Erf"), ("Conv", "Relu"), ["n1"]),  # the product and what follows it
        ("Conv", ("Abs", "Conv", "Erf"), ("Conv", "Erf"), ["n0"]),  # the product is in the tail
        ("Conv", ("Abs", "Conv", "Relu", "Erf"), ("Abs",), []),  # what is before the product is not worth a border
        ("Conv", ("Conv", "Relu", "Erf"), ("Relu", "Erf"), []),  # nor is what is behind it
        (None, ("Abs", "Relu", "Erf"), ("Abs", "Relu"), ["n1"]),  # where there is no product every piece is
        (None, ("Abs", "Relu", "Erf"), ("Erf",), ["n1"]),
        ("view", ("Reshape", "Abs"), ("Reshape",), []),  # and a view moves nothing
    ],
)
def test_a_piece_is_worth_a_border_if_the_product_is_in_it(
    anchor: str | None, ops: tuple[str, ...], known: tuple[str, ...], cuts: list[str]
) -> None:
    assert find_cuts([in_a_row(anchor, *ops)], [Picky(*known)]) == cuts
