"""Devices that fail: what is said, who is not concerned, and the CPU that steps in where that was asked for."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
from handmade import f32, native_bundle, specs
from scripted import MEASURED, bundle, part, scripted, spans, x

from nestc.bundle.artifact import Artifact
from nestc.bundle.bundle import Bundle, BundlePartition, DeviceSpec
from nestc.bundle.read import read
from nestc.bundle.write import write
from nestc.codegen.main import Step
from nestc.errors import TargetError
from nestc.runtime import Executable
from nestc.runtime import open as open_bundle

pytestmark = pytest.mark.usefixtures("scripted")

__all__ = ["scripted"]

MODES = pytest.mark.parametrize("seconds", [None, 1.0], ids=["workers", "clock"])
CPU_MODES = pytest.mark.parametrize("seconds", [None, 2.0], ids=["workers", "clock"])


def broken(*times: int) -> Callable[[], None]:
    """A hook that raises at these calls, counted from 0; at all of them if none is given."""
    calls = iter(range(1000))

    def fail() -> None:
        if next(calls) in times or not times:
            raise RuntimeError("the bus is stuck")

    return fail


def spare(outputs: str, inputs: str = "t", do: Callable[[], None] | None = None) -> Artifact:
    """The artifact of a fallback."""
    return part("spare", "cpu", inputs, outputs, do=do).artifact


@MODES
def test_a_device_that_fails_is_named_and_others_go_on(seconds: float | None):
    parts = [part("A", "a", "x", "t", seconds), part("B", "b", "t", "y", seconds, do=broken(1, 4))]
    with Executable(bundle(parts, "y")) as executable:
        assert executable(x(1)).tolist() == [9, 9]
        with pytest.raises(TargetError, match=r"^partition B failed on b: RuntimeError: the bus is stuck$") as caught:
            executable(x(2))
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert executable(x(3)).tolist() == [27, 27]
        futures = [executable.submit(x(number)) for number in range(4)]  # the second of them is call 4 of B
        assert [future.exception(20) is None for future in futures] == [True, False, True, True]
        assert [int(future.result()[0]) for future in (futures[0], *futures[2:])] == [0, 18, 27]
        assert executable(x(4)).tolist() == [36, 36]


@MODES
def test_a_failure_in_a_map_comes_at_its_place(seconds: float | None):
    parts = [part("A", "a", "x", "t", seconds), part("B", "b", "t", "y", seconds, do=broken(2))]
    with Executable(bundle(parts, "y")) as executable:
        results = executable.map(map(x, range(9)), in_flight=4)
        assert [int(next(results)[0]), int(next(results)[0])] == [0, 9]
        with pytest.raises(TargetError, match="partition B failed on b: RuntimeError: the bus is stuck"):
            next(results)
        assert list(results) == []
        assert [int(y[0]) for y in executable.map(map(x, range(9)))] == [9 * number for number in range(9)]


def test_the_only_partition_and_those_of_one_resource_fail_alike():
    only = bundle([part("A", "a", "x", "y", do=broken(0))], "y")
    in_order = bundle([part("A", "a", "x", "t"), part("B", "a", "t", "y", do=broken(0))], "y")
    for made, name in ((only, "A"), (in_order, "B")):
        with Executable(made) as executable:
            with pytest.raises(TargetError, match=f"^partition {name} failed on a: RuntimeError: the bus is stuck$"):
                executable(x())
            executable(x())


@MODES
def test_a_result_that_was_not_promised_is_a_failure(seconds: float | None):
    lying = part("B", "b", "t", "y", seconds)
    lying = BundlePartition("B", "b", ("t",), lying.outputs, part("B", "b", "t", "y", seconds, sizes=[3]).artifact)
    with Executable(bundle([part("A", "a", "x", "t", seconds), lying], "y")) as executable:
        with pytest.raises(TargetError, match=r"partition B failed on b: it gave 'y' as int64\[3\], not int64\[2\]"):
            executable(x())


@CPU_MODES
def test_the_cpu_steps_in(seconds: float | None, caplog: pytest.LogCaptureFixture):
    parts = [
        part("A", "a", "x", "t", seconds, spare=spare("t", "x")),
        part("B", "b", "t", "u", seconds, do=broken(1, 2), spare=spare("u")),
        part("C", "a", "u", "y", seconds, spare=spare("y", "u")),
    ]
    with Executable(bundle(parts, "y", [DeviceSpec("cpu", "cpu", watts=5.0)]), on_failure="cpu") as executable:
        assert executable(x(1)).tolist() == [27, 27]
        assert [row["device"] for row in executable.timeline()] == ["a", "b", "a"] and not caplog.records
        for _ in range(2):
            assert executable(x(2)).tolist() == [54, 54]
            row = executable.timeline()[1]
            assert (row["device"], row["region"], row["kind"], row["instead_of"]) == ("cpu", "B", "measured", "b")
            (joules,) = [each for each in executable.energy() if each["device"] == "cpu"]
            assert joules["kind"] == "estimated" and joules["joules"] > 0
        (record,) = caplog.records
        assert (record.levelno, record.getMessage()) == (
            logging.WARNING,
            "partition B failed on b: RuntimeError: the bus is stuck; the CPU runs it instead",
        )
        assert executable(x(3)).tolist() == [81, 81]
        assert [row["device"] for row in executable.timeline()] == ["a", "b", "a"]
        found = list(executable.map(map(x, range(8))))
        assert [int(y[0]) for y in found] == [27 * number for number in range(8)]


def test_what_the_cpu_needs_comes_back_over_the_links():
    """B fails when it would begin, at 1.5; t goes from a to the host's memory, and from there to c."""
    known = [DeviceSpec("a", "a", 0.0, 0.25), DeviceSpec("b", "b", 0.0, 0.25), DeviceSpec("c", "c", 0.0, 1.0)]
    parts = [
        part("A", "a", "x", "t", 0.75, spare=spare("t", "x")),
        part("B", "b", "t", "u", 1.0, do=broken(), spare=spare("u")),
        part("C", "c", "u", "y", 1.0, spare=spare("y", "u")),
    ]
    with Executable(bundle(parts, "y", known), on_failure="cpu") as executable:
        assert executable(x(1)).tolist() == [27, 27]
        rows = executable.timeline()
        assert [row["device"] for row in rows] == [
            "host memory->a",
            "a",
            "a->b",
            "a->cpu",
            "cpu",
            "cpu->c",
            "c",
            "c->host memory",
        ]
        begins = [span[2] for span in spans(rows)]
        took = (rows[4]["end_us"] - rows[4]["start_us"]) / 1e6
        assert begins == pytest.approx([0, 0.25, 1.0, 1.5, 1.75, 1.75 + took, 2.75 + took, 3.75 + took])


@CPU_MODES
def test_a_fallback_that_fails_too(seconds: float | None):
    parts = [
        part("A", "a", "x", "t", seconds, spare=spare("t", "x")),
        part("B", "b", "t", "y", seconds, do=broken(), spare=spare("y", do=broken(0))),
    ]
    with Executable(bundle(parts, "y"), on_failure="cpu") as executable:
        with pytest.raises(TargetError, match="partition B failed on the CPU, its fallback: RuntimeError: the bus"):
            executable(x())
        assert executable(x(1)).tolist() == [9, 9]


def test_without_a_fallback_it_cannot_be_asked_for():
    parts = [part("A", "a", "x", "t", spare=spare("t", "x")), part("B", "b", "t", "y")]
    with pytest.raises(TargetError, match=r"partition B on b has no code for the CPU to fall back on; compile .* with"):
        Executable(bundle(parts, "y"), on_failure="cpu")
    with pytest.raises(TargetError, match="on_failure is \"cpu\" or None, not 'gpu'"):
        Executable(bundle(parts, "y"), on_failure="gpu")  # type: ignore[arg-type]


@CPU_MODES
def test_a_device_that_is_not_here(seconds: float | None, caplog: pytest.LogCaptureFixture):
    absent = {"missing": TargetError("no board is attached")}
    one = [part("A", "a", "x", "y", seconds, spare=spare("y", "x"), **absent)]
    two = [
        part("A", "a", "x", "t", seconds, spare=spare("t", "x")),
        part("B", "b", "t", "y", spare=spare("y"), **absent),
    ]
    with pytest.raises(TargetError, match="no board is attached"):
        Executable(bundle(one, "y"))
    for parts, factor in ((one, 3), (two, 9)):
        caplog.clear()
        with Executable(bundle(parts, "y"), on_failure="cpu") as executable:
            assert executable(x(1)).tolist() == [factor] * 2
            assert executable.submit(x(2)).result(20).tolist() == [2 * factor] * 2
            last = executable.timeline()[-1]
            assert (last["device"], last["instead_of"]) == ("cpu", parts[-1].device)
            assert executable.profile(x(1), runs=2)[-1]["symbol"] == parts[-1].artifact.kind
        (record,) = caplog.records
        assert record.getMessage().endswith(": no board is attached; the CPU runs it")


def native_fallback() -> Bundle:
    """``y = x + x`` on a device that always fails, with native code to fall back on."""
    step = Step("add", ("x", "x", "y"), (False, False, True), 24)
    native = native_bundle([step], {"x": f32(24)}, {"y": f32(24)}, {})
    artifact = Artifact(MEASURED, {}, {}, {"do": None, "sizes": (23,)})
    partition = BundlePartition("p0", "npu", ("x",), specs({"y": f32(24)}), artifact, (), native.partitions[0].artifact)
    return Bundle("spare", native.inputs, native.outputs, (partition,))


def test_a_saved_fallback_runs(tmp_path, caplog: pytest.LogCaptureFixture):
    write(tmp_path / "m.nest", native_fallback())
    assert read(tmp_path / "m.nest").partitions[0].fallback is not None
    values = np.arange(24, dtype=np.float32)
    with open_bundle(tmp_path / "m.nest") as executable:
        with pytest.raises(TargetError, match="partition p0 failed on npu: it gave 'y' as int64"):
            executable.submit(values).result(20)
    with open_bundle(tmp_path / "m.nest", on_failure="cpu") as executable:
        out = np.empty(24, np.float32)
        np.testing.assert_array_equal(executable.submit(values).result(20), 2 * values)
        np.testing.assert_array_equal(executable(values), 2 * values)
        assert executable(values, out=out) is out
        np.testing.assert_array_equal(out, 2 * values)
    assert len(caplog.records) == 1
