"""The public face: names, shapes, dtypes, out=, several partitions, the host device, devices of other packages."""

import importlib.metadata
import re
import time
from dataclasses import replace

import numpy as np
import onnx
import pytest
from handmade import OBJECTS, chain, chain_result, f32, native_bundle, specs
from onnx import TensorProto, helper

from nestc.bundle.artifact import Artifact, Elapsed
from nestc.bundle.bundle import Bundle, BundlePartition, TensorSpec
from nestc.codegen.main import Step
from nestc.errors import BundleError, ShapeError, TargetError
from nestc.runtime import Executable, arrays, open
from nestc.runtime.devices import device_for
from nestc.runtime.session import modelled_ms

WRITES = (False, False, True)
X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)


def two_in_two_out() -> Bundle:
    """``total = a + b``, ``product = a * b`` over [2, 3, 4]."""
    steps = [Step("add", ("a", "b", "total"), WRITES, 24), Step("mul", ("a", "b", "product"), WRITES, 24)]
    types = {"a": f32(2, 3, 4), "b": f32(2, 3, 4)}
    return native_bundle(steps, types, {"total": f32(2, 3, 4), "product": f32(2, 3, 4)}, {})


@pytest.fixture
def executable():
    with Executable(two_in_two_out()) as made:
        yield made


def test_positional_calls_and_calls_by_name(executable: Executable):
    total, product = executable(X, X + 1)
    np.testing.assert_array_equal(total, X + (X + 1))
    np.testing.assert_array_equal(product, X * (X + 1))
    found = executable.run({"b": X + 1, "a": X})
    assert list(found) == ["total", "product"]
    np.testing.assert_array_equal(found["product"], product)
    assert executable.inputs == {"a": ("float32", (2, 3, 4)), "b": ("float32", (2, 3, 4))}
    assert list(executable.outputs) == ["total", "product"]


@pytest.mark.parametrize("elements", [24, 4096])
def test_one_output_is_an_array_and_outputs_are_new_and_large_ones_aligned(elements: int):
    x = np.linspace(-1, 1, elements, dtype=np.float32)
    with Executable(chain(2, elements, 1)) as executable:
        one, two = executable(x), executable(x)
        assert not np.shares_memory(one, two)
        assert elements == 24 or one.ctypes.data % 64 == two.ctypes.data % 64 == 0
        one[:] = 7
        np.testing.assert_allclose(executable(x), two)


def test_outputs_are_written_where_the_caller_wants(executable: Executable):
    total, product = np.empty_like(X), np.empty_like(X)
    assert executable(X, X, out=(total, product))[0] is total
    np.testing.assert_array_equal(total, X + X)
    found = executable.run({"a": X, "b": X}, out={"product": product, "total": total})
    assert found["product"] is product
    np.testing.assert_array_equal(product, X * X)


def test_an_output_that_is_not_contiguous_or_overlaps_an_input(executable: Executable):
    wide = np.zeros((2, 3, 8), np.float32)
    place = X.copy()
    executable(place, X, out=[place, wide[:, :, ::2]])
    np.testing.assert_array_equal(place, X + X)
    np.testing.assert_array_equal(wide[:, :, ::2], X * X)
    np.testing.assert_array_equal(wide[:, :, 1::2], 0)


def test_inputs_that_native_code_cannot_read_are_copied(executable: Executable):
    fortran = np.asfortranarray(X)
    loose = np.zeros(X.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(X.shape)
    loose[...] = X
    total, _ = executable(fortran, loose)
    np.testing.assert_array_equal(total, X + X)
    read_only = X.copy()
    read_only.setflags(write=False)
    np.testing.assert_array_equal(executable(read_only, X)[0], X + X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e(X), "has 2 inputs (a, b), but 1 were given"),
        (lambda e: e(X, X[0]), "input 'b' must be float32[2,3,4], but is float32[3,4]"),
        (lambda e: e(X, X[:1]), "input 'b' must be float32[2,3,4], but is float32[1,3,4]"),
        (lambda e: e(X.astype(np.float64), X), "input 'a' must be float32[2,3,4], but is float64[2,3,4]"),
        (lambda e: e(X.astype(">f4"), X), "input 'a' must be float32[2,3,4], but is >f4[2,3,4]"),
        (lambda e: e(X, 1.0), "input 'b' must be float32[2,3,4], but is float64[]"),
        (
            lambda e: e({"a": X, "b": X}),
            "a call takes arrays in graph order; inputs by name go to exe.run({'a': array, 'b': array})",
        ),
        (lambda e: e(X, {"b": X}), "inputs by name go to exe.run({'b': array})"),
        (lambda e: e.submit(X, {}), "inputs by name go to exe.run({name: array})"),
        (lambda e: e.run({"a": X}), "input 'b' is missing; the inputs are a, b"),
        (lambda e: e.run({"a": X, "c": X, "b": X}), "there is no input 'c'; the inputs are a, b"),
        (lambda e: e(X, X, out=X.copy()), "out= has 1 arrays, but the outputs are total, product"),
        (lambda e: e(X, X, out={"total": X}), "out= has total, but the outputs are total, product"),
        (lambda e: e(X, X, out=[X.copy(), X[0]]), "output 'product' must be float32[2,3,4], but is float32[3,4]"),
        (lambda e: e(X, X, out=[X.copy(), [1]]), "out= for 'product' must be an array, not list"),
        (lambda e: e(X, X, out=[X.copy(), np.broadcast_to(X[0], X.shape)]), "out= for 'product' is read-only"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(executable: Executable, call, message):
    with pytest.raises(ShapeError, match=re.escape(message)):
        call(executable)


def test_other_shapes_go_to_the_specialisation():
    asked: list[object] = []

    def respecialise(shapes):
        asked.append(shapes)
        return Executable(chain(2, 12, 1))

    x = np.ones(12, np.float32)
    with Executable(chain(2, 24, 1), respecialise=respecialise) as executable:
        np.testing.assert_allclose(executable(x), chain_result(2, x), rtol=1e-5)
        np.testing.assert_allclose(executable.run({"x": x})["y"], chain_result(2, x), rtol=1e-5)
        with pytest.raises(ShapeError, match=r"must be float32\[24\], but is float64\[12\]"):
            executable(x.astype(np.float64))
        with pytest.raises(ShapeError, match=r"but is float32\[12,1\]"):
            executable(x[:, None])
    assert asked == [{"x": (12,)}] * 2


def test_scalars_and_empty_arrays():
    scalar = native_bundle([Step("add", ("x", "w", "y"), WRITES)], {"x": f32()}, {"y": f32()}, {}, {"w": np.float32(2)})
    with Executable(scalar) as executable:
        found = executable(np.array(1, np.float32))
        assert (found.shape, float(found)) == ((), 3.0)
        assert float(executable(np.float32(1))) == 3.0
    nothing = native_bundle([], {"x": f32(0, 3)}, {"y": f32(0, 3)}, {})
    with Executable(nothing) as executable:
        assert executable(np.zeros((0, 3), np.float32)).shape == (0, 3)


def test_timeline_and_stats(executable: Executable):
    assert executable.timeline() == []
    executable(X, X)
    (span,) = executable.timeline()
    assert (span["device"], span["region"], span["kind"]) == ("cpu", "p0", "measured")
    assert 0 <= span["start_us"] <= span["end_us"]
    stats = executable.stats()
    assert (stats["partitions"], stats["kernel_calls"], stats["weights_bytes"]) == (1, 2, 0)
    assert "2 threads" in repr(Executable(two_in_two_out(), threads=2))


def test_at_least_one_thread():
    with pytest.raises(TargetError, match="not 0"):
        Executable(two_in_two_out(), threads=0)


def host_artifact() -> Artifact:
    """``kept, places = x[x > 0], nonzero(x)``: shapes that only a run tells."""
    nodes = [
        helper.make_node("Greater", ["t", "zero"], ["mask"]),
        helper.make_node("Compress", ["t", "mask"], ["kept"]),
        helper.make_node("NonZero", ["t"], ["places"]),
    ]
    graph = helper.make_graph(
        nodes,
        "host",
        [
            helper.make_tensor_value_info("t", TensorProto.FLOAT, [24]),
            helper.make_tensor_value_info("zero", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("kept", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("places", TensorProto.INT64, None),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    metadata = {"inputs": ["t"], "outputs": ["kept", "places"]}
    return Artifact(
        "host-onnx", {"model.onnx": model.SerializeToString()}, {"zero": np.zeros((), np.float32)}, metadata
    )


def mixed_bundle() -> Bundle:
    """cpu: t = x + x; host: kept, places; outputs also x itself, and t, which the host reads too."""
    native = native_bundle([Step("add", ("x", "x", "t"), WRITES, 24)], {"x": f32(24)}, {"t": f32(24)}, {})
    loose = (TensorSpec("kept", "float32", (None,)), TensorSpec("places", "int64", None))
    host = BundlePartition("h", "host", ("t",), loose, host_artifact())
    return Bundle("mixed", native.inputs, (*loose, *specs({"x": f32(24), "t": f32(24)})), (*native.partitions, host))


def test_partitions_of_several_devices(tmp_path):
    x = X.reshape(-1)
    with Executable(mixed_bundle()) as executable:
        executable.save(tmp_path / "m.nest")
    with open(tmp_path / "m.nest") as executable:
        for _ in range(3):
            kept, places, same, doubled = executable(x)
            np.testing.assert_array_equal(kept, (x + x)[x > 0])
            np.testing.assert_array_equal(places, np.array(np.nonzero(x)))
            np.testing.assert_array_equal(same, x)
            np.testing.assert_array_equal(doubled, x + x)
        assert not np.shares_memory(same, x)
        assert [span["device"] for span in executable.timeline()] == ["cpu", "host"]
        assert executable.outputs["places"] == ("int64", ("?",))
        out = {"kept": np.empty(12, np.float32), "places": np.empty((1, 24), np.int64), "x": x.copy(), "t": x.copy()}
        found = executable.run({"x": x}, out=out)
        assert found["t"] is out["t"]
        np.testing.assert_array_equal(out["t"], x + x)
        np.testing.assert_array_equal(out["kept"], kept)
        assert [row["device"] for row in executable.profile(runs=2)] == ["cpu", "host"]


def test_what_the_reference_cannot_run_is_a_target_error():
    bad = helper.make_graph(
        [helper.make_node("Reshape", ["t", "shape"], ["kept"])],
        "bad",
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, [24])],
        [helper.make_tensor_value_info("kept", TensorProto.FLOAT, None)],
        [helper.make_tensor("shape", TensorProto.INT64, [1], [7])],
    )
    model = helper.make_model(bad, opset_imports=[helper.make_opsetid("", 21)])
    artifact = Artifact("host-onnx", {"model.onnx": model.SerializeToString()}, {}, {})
    output = TensorSpec("kept", "float32", (7,))
    partition = BundlePartition("h", "host", ("t",), (output,), artifact)
    bundle = Bundle("bad", specs({"t": f32(24)}), (output,), (partition,))
    with Executable(bundle) as executable, pytest.raises(TargetError, match="cannot run a host partition"):
        executable(X.reshape(-1))
    broken = replace(partition, artifact=replace(artifact, files={"model.onnx": b"\xff" * 10}))
    with pytest.raises(BundleError, match=r"no readable model\.onnx"):
        Executable(replace(bundle, partitions=(broken,)))
    assert onnx.__version__


def test_native_code_refuses_a_value_of_another_size():
    """A shape that the bundle leaves open reaches native code unchecked: reading beyond the array must not happen."""
    bundle = native_bundle([Step("add", ("x", "x", "t"), WRITES, 24)], {"x": f32(24)}, {"t": f32(24)}, {})
    loose = replace(bundle, inputs=(TensorSpec("x", "float32", (None,)),))
    with Executable(loose) as executable:
        assert executable(np.ones(24, np.float32)).tolist() == [2.0] * 24
        with pytest.raises(TargetError, match=r"compiled for 'x' as float32\[24\], not float32\[23\]"):
            executable(np.ones(23, np.float32))


def test_borders_that_do_not_fit_are_refused():
    bundle = mixed_bundle()
    with pytest.raises(BundleError, match="partition h needs 't', which no earlier partition computes"):
        Executable(replace(bundle, partitions=bundle.partitions[1:]))
    with pytest.raises(BundleError, match="output 'kept' is computed by no partition"):
        Executable(replace(bundle, partitions=bundle.partitions[:1]))


class _Doubling:
    """A device of another package."""

    name = "doubling"

    def load(self, artifact: Artifact, threads: int) -> "_Doubling":
        return self

    def __call__(self, inputs, outputs):
        return [inputs[0] * 2], Elapsed(1e-3, "modelled")

    def close(self) -> None:
        pass


def test_devices_of_other_packages_are_found(monkeypatch: pytest.MonkeyPatch):
    partition = BundlePartition("d", "npu", ("x",), specs({"y": f32(24)}), Artifact("doubling", {}, {}, {}))
    bundle = Bundle("other", specs({"x": f32(24)}), specs({"y": f32(24)}), (partition,))
    with pytest.raises(TargetError, match="no installed device runs artifacts of kind 'doubling'"):
        Executable(bundle)

    class Point:
        def load(self) -> type[_Doubling]:
            return _Doubling

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, name: [Point()] if name == "doubling" else [])
    with Executable(bundle) as executable:
        np.testing.assert_array_equal(executable(X.reshape(-1)), X.reshape(-1) * 2)
        (span,) = executable.timeline()
        assert (span["device"], span["kind"], span["end_us"] - span["start_us"]) == (
            "npu",
            "modelled",
            pytest.approx(1e3),
        )


class _Slow(_Doubling):
    """A simulator that takes far longer than what it models."""

    def __call__(self, inputs, outputs):
        time.sleep(0.05)
        return super().__call__(inputs, outputs)


def test_the_time_of_a_simulator_is_in_no_timeline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "nestc.runtime.stages.device_for", lambda kind: _Slow() if kind == "doubling" else device_for(kind)
    )
    artifact = Artifact("doubling", {}, {}, {})
    parts = (
        BundlePartition("d", "npu", ("x",), specs({"y": f32(24)}), artifact),
        BundlePartition("e", "npu", ("y",), specs({"t": f32(24)}), artifact),
        mixed_bundle().partitions[1],
    )
    outputs = (TensorSpec("kept", "float32", (None,)),)
    with Executable(Bundle("three", specs({"x": f32(24)}), outputs, parts)) as executable:
        executable(X.reshape(-1))
        first, second, third = executable.timeline()
        assert [mark["kind"] for mark in (first, second, third)] == ["modelled", "modelled", "measured"]
        assert first["end_us"] <= second["start_us"] and second["end_us"] <= third["start_us"]
        assert third["start_us"] < 40e3  # two runs of the simulator take 100e3
        assert modelled_ms(executable.timeline()) == {"npu": pytest.approx(2.0)}
        rows = executable.profile(X.reshape(-1), runs=2)
        assert [row.get("kind") for row in rows] == ["modelled", "modelled", None]
        assert rows[0]["us"] == pytest.approx(1e3)


def test_addresses_and_alignment():
    probe = np.arange(10, dtype=np.int16)[3:]
    assert arrays.address(probe) == probe.ctypes.data
    assert arrays.aligned_empty((3, 5), np.dtype(np.float32)).ctypes.data % 64 == 0
    assert arrays.aligned(probe).ctypes.data % 64 == 0
    np.testing.assert_array_equal(arrays.aligned(probe[::2]), probe[::2])
    assert set(OBJECTS) == {"add", "sub", "mul"}


@pytest.mark.parametrize("given", [False, True])
def test_a_partition_whose_inputs_and_outputs_are_in_another_order_than_the_graphs(given: bool):
    steps = [
        Step("sub", ("b", "a", "less"), (False, False, True), 4, 8, 1e-4, ("Sub:s",)),
        Step("add", ("a", "b", "more"), (False, False, True), 4, 8, 1e-4, ("Add:a",)),
    ]
    inner = native_bundle(steps, {"b": f32(4), "a": f32(4)}, {"less": f32(4), "more": f32(4)}, {})
    unused = TensorSpec("unused", "float32", (1,))
    named = {spec.name: spec for spec in (*inner.inputs, *inner.outputs, unused)}
    whole = replace(
        inner,
        inputs=tuple(named[name] for name in ("a", "unused", "b")),
        outputs=tuple(named[name] for name in ("more", "less")),
    )
    a, b = np.arange(4, dtype=np.float32), np.full(4, 10, np.float32)
    with Executable(whole) as executable:
        out = [np.empty(4, np.float32) for _ in range(2)] if given else None
        more, less = executable(a, np.zeros(1, np.float32), b, out=out)
        assert (more.tolist(), less.tolist()) == ((a + b).tolist(), (b - a).tolist())
        assert out is None or (more is out[0] and less is out[1])
        assert [row["region"] for row in executable.timeline()] == ["p0"]


@pytest.mark.parametrize("by_name", [False, True])
def test_the_short_way_checks_what_the_long_one_does(by_name: bool):
    """Every input, also one that the program does not take, whatever the call before was."""
    inner = native_bundle([Step("add", ("a", "b", "y"), WRITES, 24)], {"a": f32(24), "b": f32(24)}, {"y": f32(24)}, {})
    whole = replace(inner, inputs=(*inner.inputs, TensorSpec("unused", "int64", (2,))))
    a, b, unused = X.ravel(), X.ravel() + 1, np.zeros(2, np.int64)

    def call(*given: object) -> np.ndarray:
        if not by_name:
            return executable(*given)
        return executable.run(dict(zip(("a", "b", "unused"), given, strict=True)))["y"]

    class Other(np.ndarray):
        """A subclass, whose memory may be something else."""

    strange = np.zeros((24, 2), np.float32)[:, 0]
    strange[:] = b
    unaligned = np.zeros(24 * 4 + 1, np.uint8)[1:].view(np.float32)
    unaligned[:] = b
    with Executable(whole) as executable:
        expected = a + b
        for same in (b, strange, unaligned, b.view(Other), b.astype(np.dtype("<f4").newbyteorder("=")), b.tolist()):
            given = np.asarray(same, np.float32) if isinstance(same, list) else same
            np.testing.assert_array_equal(call(a, given, unused), expected)
            (row,) = executable.timeline()
            assert row["region"] == "p0"
            assert row["end_us"] > row["start_us"] >= 0
        for wrong in (a.astype(np.float64), a[:23], a.reshape(2, 12), a.astype(">f4")):
            with pytest.raises(ShapeError, match="input 'a' must be float32"):
                call(wrong, b, unused)
        for wrong in (unused[:1], unused.astype(np.int32)):
            with pytest.raises(ShapeError, match="input 'unused' must be int64"):
                call(a, b, wrong)
        with pytest.raises(ShapeError, match="no input 'c'"):
            executable.run({"a": a, "b": b, "c": unused})
        with pytest.raises(ShapeError, match="missing"):
            executable.run({"a": a, "b": b})
        # An array may change between two calls.
        changing = np.array(a)
        np.testing.assert_array_equal(call(changing, b, unused), expected)
        changing.shape = (24, 1)
        with pytest.raises(ShapeError, match="input 'a' must be float32"):
            call(changing, b, unused)
    with pytest.raises(TargetError, match="closed"):
        call(a, b, unused)
