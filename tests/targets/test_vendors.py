"""Vendors' runtimes compute what ONNX says, in partitions of their own or beside others, and refuse the rest."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator

import nestc
from nestc.bundle.artifact import Artifact
from nestc.demo.data import INPUT, labelled_images, model_path
from nestc.driver import explain
from nestc.errors import BundleError, TargetError
from nestc.graph import pipeline, regions
from nestc.runtime.devices import device_for
from nestc.targets import make, vendors
from nestc.targets.api import Partition

VENDORS = ("onnxruntime", "openvino")
RNG = np.random.default_rng(6)


def net(text: str, opset: int = 21, **constants: np.ndarray) -> onnx.ModelProto:
    """A model of ONNX's text form, with these initializers."""
    model = parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return model


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def refusal(model: onnx.ModelProto, vendor: str) -> str | None:
    """The first refusal of a region of `model`, None if the target takes all of it."""
    target = make(vendor)
    formed = regions.form(pipeline.optimize(nestc.load(model)))
    return next(filter(None, (target.offers[0].refusal(region) for region in regions.regions(formed))), None)


def run_alone(model: onnx.ModelProto, vendor: str, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Outputs of a model that the target takes as one partition."""
    with nestc.compile(model, [vendor], threads=2) as executable:
        assert [part.device for part in executable.plan.partitions] == [vendor]
        found = executable(*inputs)
    return found if isinstance(found, tuple) else (found,)


CONV = net(
    """g (float[1,3,16,16] x) => (float[1,8,8,8] y) {
        c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w)
        n = BatchNormalization(c, scale, bias, mean, variance)
        y = Relu(n)
    }""",
    w=normal(8, 3, 3, 3), scale=normal(8), bias=normal(8), mean=normal(8), variance=np.abs(normal(8)) + 0.5,
)  # fmt: skip
ATTENTION = net(
    """g (float[2,6,8] q, float[2,6,8] k) => (float[2,6,6] p, float[2,6,8] y) {
        t = Transpose<perm=[0,2,1]>(k)
        s = MatMul(q, t)
        p = Softmax<axis=-1>(s)
        y = MatMul(p, w)
    }""",
    w=normal(6, 8),
)
TOTAL = net("g (float[3,5] x) => (float s, float[3,5] y) { s = ReduceSum<keepdims=0>(x) y = Exp(x) }")
LOOKUP = net(
    "g (int64[2,4] i) => (float[2,4,8] y) { e = Gather(table, i) y = LayerNormalization(e, scale, bias) }",
    table=normal(32, 8), scale=normal(8), bias=normal(8),
)  # fmt: skip
HALF = net("g (float16[4,6] x) => (float16[4,5] y) { m = MatMul(x, w) y = Relu(m) }", w=normal(6, 5).astype(np.float16))
POOL = net(
    "g (float[1,2,7,7] x) => (float[1,2,4,4] y) { y = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(x) }"
)
MASK = net(
    "g (int64[2,5] m, float[2,5] x) => (float[2,5] y) { c = Cast<to=1>(m) d = Mul(c, big) y = Add(x, d) }",
    big=np.float32(-1e4),
)

NETS = {
    "convolution": (CONV, [normal(1, 3, 16, 16)], 1e-4),
    "attention": (ATTENTION, [normal(2, 6, 8), normal(2, 6, 8)], 1e-4),
    "number": (TOTAL, [normal(3, 5)], 1e-4),
    "indices": (LOOKUP, [RNG.integers(0, 32, (2, 4))], 1e-4),
    "pool": (POOL, [normal(1, 2, 7, 7)], 0),
    "mask": (MASK, [RNG.integers(0, 2, (2, 5)), normal(2, 5)], 1e-5),
    "float16": (HALF, [normal(4, 6).astype(np.float16)], 1e-2),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("vendor", VENDORS)
def test_small_nets_are_computed_as_onnx_says(vendor: str, name: str) -> None:
    model, inputs, tolerance = NETS[name]
    names = [value.name for value in model.graph.input]
    expected = ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))
    for got, wanted in zip(run_alone(model, vendor, inputs), expected, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def quantized() -> onnx.ModelProto:
    """A convolution between QuantizeLinear and DequantizeLinear whose sums of byte pairs do not fit 16 bits."""
    return net(
        """g (uint8[1,64,6,6] x) => (uint8[1,8,6,6] y) {
            a = DequantizeLinear(x, sx, zx)
            b = DequantizeLinear(w, sw, zw)
            c = Conv<pads=[1,1,1,1]>(a, b)
            y = QuantizeLinear(c, sy, zy)
        }""",
        w=np.full((8, 64, 3, 3), 127, np.int8),
        sx=np.float32(0.5), zx=np.uint8(0), sw=np.float32(0.25), zw=np.int8(0), sy=np.float32(8192), zy=np.uint8(0),
    )  # fmt: skip


@pytest.mark.parametrize("vendor", VENDORS)
def test_sums_of_bytes_do_not_saturate(vendor: str) -> None:
    model, x = quantized(), np.full((1, 64, 6, 6), 255, np.uint8)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    (got,) = run_alone(model, vendor, [x])
    assert np.abs(got.astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.parametrize("vendor", VENDORS)
def test_layers_may_share_a_zero_point(vendor: str) -> None:
    """Equal constants are one after optimisation, which ONNX Runtime does not load where sums of bytes saturate."""
    text = """g (float[1,8,6,6] x) => (float[1,16] y) {
        a = Conv<pads=[1,1,1,1]>(x, w)
        b = GlobalAveragePool(a)
        f = Flatten(b)
        h = MatMul(f, v)
        i = Relu(h)
        y = MatMul(i, u)
    }"""
    proto = net(text, w=normal(16, 8, 3, 3), v=normal(16, 16), u=normal(16, 16))
    model = nestc.load(proto.SerializeToString())
    x = normal(1, 8, 6, 6)
    quantized = nestc.quantize(model, nestc.calibrate(model, [{"x": x}], threads=1), "int8", threads=1)
    with nestc.compile(quantized, [vendor], threads=1) as executable, nestc.compile(quantized, threads=1) as own:
        assert vendor in {part.device for part in executable.plan.partitions}
        wanted = own(x)
        np.testing.assert_allclose(executable(x), wanted, rtol=0, atol=0.02 * float(np.abs(wanted).max()))


def test_strings_pass_through_onnxruntime_and_not_openvino() -> None:
    model = net("g (string[3] x) => (string[2] y) { y = Gather(x, i) }", i=np.array([2, 0]))
    (got,) = run_alone(model, "onnxruntime", [np.array(["a", "b", "ä"], object)])
    assert got.tolist() == ["ä", "a"]
    assert refusal(model, "openvino") is not None


def test_sizes_known_only_at_run_time_run_in_onnxruntime() -> None:
    model = net("g (float[2,4] x) => (int64[2,n] y) { y = NonZero(x) }")
    (got,) = run_alone(model, "onnxruntime", [np.array([[0, 1, 0, 2], [3, 0, 0, 0]], np.float32)])
    assert got.tolist() == [[0, 0, 1], [1, 3, 0]]


def test_openvino_leaves_sizes_known_only_at_run_time_to_others() -> None:
    model = net("g (float[2,4] x) => (int64[2,n] y) { y = NonZero(x) }")
    with nestc.compile(model, ["openvino"]) as executable:
        assert [part.device for part in executable.plan.partitions] == ["host"]
        assert "known only at run time" in executable.plan.regions[0].refusals["openvino"]


@pytest.mark.parametrize(
    ("vendor", "text", "said"),
    [
        ("onnxruntime", "g (double[2,2] x) => (double y) { y = Det(x) }", "no kernel"),
        ("onnxruntime", "g (bfloat16[4] x) => (bfloat16[4] y) { y = Mul(x, x) }", "no kernel"),
        ("onnxruntime", "g (float[0] x) => (float[0] y) { y = Exp(x) }", "otherwise than ONNX says"),
        ("openvino", "g (double[4] x) => (double[4] y) { y = Exp(x) }", "float64"),
        ("openvino", "g (int64[4] x) => (int64[4] y) { y = Mul(x, x) }", "integers"),
        ("openvino", "g (float[2,2] x) => (float y) { y = Det(x) }", "is not offered"),
    ],
)  # fmt: skip
def test_what_a_runtime_cannot_do_is_refused_in_words(vendor: str, text: str, said: str) -> None:
    found = refusal(net(text), vendor)
    assert found is not None and said in found


@pytest.mark.parametrize("vendor", VENDORS)
def test_what_is_newer_than_the_operator_set_is_refused(vendor: str) -> None:
    found = refusal(net("g (float16[4] x) => (float16[4] y) { y = Celu(x) }", opset=28), vendor)
    assert found == "an operator, an attribute or an element type is newer than ONNX's operator set 24"


POOLS = {
    # The last window would begin in the padding: ONNX leaves it out, OpenVINO does not.
    "in the padding": ("float[1,1,2,2] x", "float[1,1,1,1] y", "kernel_shape=[1,1], strides=[2,2], pads=[0,0,1,1]"),
    "in the picture": ("float[1,1,4,4] x", "float[1,1,2,2] y", "kernel_shape=[3,3], strides=[2,2]"),
}


@pytest.mark.parametrize("name", POOLS)
def test_openvino_takes_pools_whose_windows_begin_in_the_picture(name: str) -> None:
    source, result, attributes = POOLS[name]
    found = refusal(net(f"g ({source}) => ({result}) {{ y = MaxPool<{attributes}, ceil_mode=1>(x) }}"), "openvino")
    assert (found is None) == (name == "in the picture")


@pytest.mark.parametrize(
    ("source", "target", "taken"),
    [("int64", "float", True), ("float", "uint8", True), ("int32", "int8", False), ("uint8", "int32", True)],
)
def test_openvino_casts_where_nothing_saturates(source: str, target: str, taken: bool) -> None:
    kind = onnx.TensorProto.DataType.Value(target.upper())
    model = net(f"g ({source}[4] x) => ({target}[4] y) {{ y = Cast<to={kind}>(x) }}")
    assert (refusal(model, "openvino") is None) == taken


def chain() -> onnx.ModelProto:
    return net(
        """g (float[4,16] x) => (float[4,16] y) {
            a = MatMul(x, w)
            b = Softmax<axis=-1>(a)
            c = MatMul(b, v)
            y = Softmax<axis=-1>(c)
        }""",
        w=normal(16, 16), v=normal(16, 16),
    )  # fmt: skip


def test_devices_are_mixed_by_a_plan() -> None:
    model, x = chain(), normal(4, 16)
    targets = ["cpu", *VENDORS]
    plan, _ = explain(model, targets, placement="order")
    assert len(plan.regions) == 4
    cycle = ("onnxruntime", "cpu", "openvino", "onnxruntime")
    moved = [dataclasses.replace(region, device=device) for region, device in zip(plan.regions, cycle, strict=True)]
    plan = dataclasses.replace(plan, regions=tuple(moved))
    with nestc.compile(model, targets, plan=plan) as executable:
        assert [part.device for part in executable.bundle.partitions] == list(cycle)
        mixed = executable(x)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_saved_bundle_runs_elsewhere_without_the_compiler(vendor: str, tmp_path: Path) -> None:
    x = normal(1, 3, 16, 16)
    with nestc.compile(CONV, [vendor], threads=1) as executable:
        expected = executable(x)
        executable.save(tmp_path / "m.nest")
    np.save(tmp_path / "x.npy", x)
    script = """
import sys, numpy, nestc
with nestc.open("m.nest") as executable:
    numpy.save("y.npy", executable(numpy.load("x.npy")))
print([name for name in sys.modules if name == "onnx" or name.startswith(("nestc.targets", "nestc.graph.regions"))])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)


@pytest.fixture(scope="module")
def demo() -> tuple[nestc.Model, nestc.Model, np.ndarray]:
    """The demo's trained network, the same quantized to int8, and 20 images."""
    images, _ = labelled_images()
    model = nestc.load(model_path(), shapes={INPUT: [20, 1, 28, 28]})
    profile = nestc.calibrate(model, [{INPUT: images[:20]}], method="minmax")
    return model, nestc.quantize(model, profile, scheme="int8"), images[:20]


@pytest.mark.parametrize("targets", [["onnxruntime"], ["openvino"]], ids=str)
def test_a_trained_network_decides_alike_everywhere(
    demo: tuple[nestc.Model, nestc.Model, np.ndarray], targets: list[str]
) -> None:
    for model, tolerance in zip(demo[:2], (1e-3, 0.5), strict=True):
        with nestc.compile(model, ["cpu"]) as native, nestc.compile(model, targets) as executable:
            assert [part.device for part in executable.bundle.partitions] == targets
            expected, got = native(demo[2]), executable(demo[2])
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
        assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.95


def artifact(vendor: str, model: onnx.ModelProto) -> tuple[Artifact, Partition]:
    """A model as one partition of a vendor's target."""
    formed = regions.form(pipeline.optimize(nestc.load(model)))
    found = tuple(regions.regions(formed))
    types = {name: type_ for region in found for name, type_ in region.types.items()}
    partition = Partition(
        "part", vendor, found, tuple(formed.inputs), tuple(formed.outputs), types,
        lambda: regions.submodel(formed, [region.name for region in found]),
    )  # fmt: skip
    return make(vendor).compile(partition), partition


@pytest.mark.parametrize("vendor", VENDORS)
def test_outputs_are_the_callers_and_go_where_they_are_told(vendor: str) -> None:
    made, _ = artifact(vendor, TOTAL)
    program = device_for(made.kind).load(made, 1)
    x = normal(3, 5)
    x.flags.writeable = False
    first, elapsed = program([x], [None, None])
    kept = [array.copy() for array in first]
    program([x * 2], [None, None])
    assert elapsed.kind == "measured"
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))
    given = [np.empty((), np.float32), np.empty((3, 5), np.float32)]
    second, _ = program([x], given)
    assert all(a is b for a, b in zip(second, given, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(given, kept, strict=True))
    program.close()


def test_large_outputs_are_written_in_place() -> None:
    model = net("g (float[400,400] x) => (float[400,400] y) { y = Exp(x) }")
    made, _ = artifact("onnxruntime", model)
    program = device_for(made.kind).load(made, 2)
    x, y = normal(400, 400), np.zeros((400, 400), np.float32)
    (found,), _ = program([x], [y])
    assert found is y
    np.testing.assert_allclose(y, np.exp(x), rtol=1e-5)


@pytest.mark.parametrize("vendor", VENDORS)
def test_several_threads_may_call_at_once(vendor: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with nestc.compile(CONV, [vendor], threads=1) as executable:
        inputs = [normal(1, 3, 16, 16) for _ in range(12)]
        expected = [executable(x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            for got, wanted in zip(pool.map(executable, inputs), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_same_model_gives_the_same_bytes(vendor: str) -> None:
    first, second = artifact(vendor, CONV)[0], artifact(vendor, CONV)[0]
    assert first == second
    proto = onnx.load_model_from_string(first.files["model.onnx"])
    assert not proto.functions and [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 24)]
    assert sum(numpy_helper.to_array(tensor).size for tensor in proto.graph.initializer) >= 8 * 27


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_model_that_is_too_large_is_an_error(vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendors, "LARGEST_MODEL", 100)
    with pytest.raises(TargetError, match=f"partition part is over 2 GB, more than {vendor} can be handed"):
        artifact(vendor, CONV)


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_failure_in_a_run_names_the_partition(vendor: str) -> None:
    made, _ = artifact(vendor, net("g (float[2] x) => (float[2] y) { y = Exp(x) }"))
    program = device_for(made.kind).load(made, 1)
    with pytest.raises(TargetError, match=f"{vendor} cannot run partition part: "):
        program([np.zeros((3, 7), np.float32)], [None])
    (again,), _ = program([np.zeros(2, np.float32)], [None])
    assert again.tolist() == [1, 1]


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_model_that_the_runtime_refuses_names_the_partition(vendor: str) -> None:
    made, _ = artifact(vendor, TOTAL)
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nowhere")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]), helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])  # fmt: skip
    broken = helper.make_model(helper.make_graph([node], "g", [value[0]], [value[1]]))
    files = {"model.onnx": broken.SerializeToString()}
    with pytest.raises(TargetError, match=f"{vendor} cannot load partition part: "):
        device_for(made.kind).load(Artifact(made.kind, files, {}, made.metadata), 1)
    with pytest.raises(BundleError, match="is not complete"):
        device_for(made.kind).load(Artifact(made.kind, {}, {}, made.metadata), 1)


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_missing_package_is_named_with_its_extra(vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = artifact(vendor, TOTAL)
    run_side = importlib.import_module(f"nestc.runtime.vendors.{vendor}")
    cached = run_side.runtime if vendor == "onnxruntime" else run_side.core
    cached.cache_clear()
    monkeypatch.setitem(sys.modules, vendor, None)
    try:
        for attempt in (lambda: make(vendor), lambda: device_for(vendor).load(made, 1)):
            with pytest.raises(TargetError) as caught:
                attempt()
            assert str(caught.value) == f"{vendor} is not installed: pip install 'nestc[{vendor}]'"
        assert vendor not in nestc.targets()
    finally:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("onnxruntime:CUDDA", "onnxruntime has no provider 'CUDDA' here; it has CPU"),
        ("onnxruntime:provider=NoneExecutionProvider", "no provider 'NoneExecutionProvider' here"),
        ("openvino:FPGA", "openvino has no device 'FPGA' here; it has CPU"),
        ("openvino:CPU,precision=f13", "openvino computes in f32, f16, bf16, not in 'f13'"),
        ("openvino:CPU,watts=-2", "it must be 0 or more"),
    ],
)
def test_mistakes_in_options_are_explained(text: str, said: str) -> None:
    with pytest.raises(TargetError) as caught:
        make(text)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["onnxruntime", "onnxruntime:cpu", "onnxruntime:provider=CPUExecutionProvider"])
def test_a_provider_may_be_written_short_or_in_full(text: str) -> None:
    machine = make(text).machine
    assert (machine.name, machine.resource, machine.facts["provider"]) == ("onnxruntime CPU", "cpu", "CPU")


def test_a_device_may_be_written_in_any_case() -> None:
    machine = make("openvino:cpu,precision=f32,threads=2,watts=30").machine
    assert (machine.name, machine.resource, machine.watts) == ("openvino CPU", "cpu", 30.0)


def test_versions_are_facts() -> None:
    for vendor in VENDORS:
        assert make(vendor).machine.facts["version"] == importlib.import_module(vendor).__version__
