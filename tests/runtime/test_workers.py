"""Worker threads: what runs at once and in which order, many threads, random graphs, cancelling and closing."""

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import bundle, part, scripted, x

from nestc.bundle.bundle import Bundle, BundlePartition, DeviceSpec
from nestc.errors import ShapeError, TargetError
from nestc.runtime import Executable

pytestmark = pytest.mark.usefixtures("scripted")

__all__ = ["scripted"]

SECONDS = 20
"""Long enough for anything here; a deadlock would take longer."""


class Gate:
    """A hook at which a stage waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self.opened = threading.Semaphore(0)

    def __call__(self) -> None:
        self.reached.release()
        assert self.opened.acquire(timeout=SECONDS)

    def wait(self) -> None:
        assert self.reached.acquire(timeout=SECONDS)

    def open(self, times: int = 1) -> None:
        self.opened.release(times)


def together(count: int) -> Callable[[], None]:
    """A hook that needs `count` stages to be in it at once."""
    barrier = threading.Barrier(count)
    return lambda: (barrier.wait(SECONDS), None)[1]


def test_branches_run_at_once_on_devices_of_their_own():
    meet = together(2)
    parts = [
        part("A", "a", "x", "t"),
        part("B", "a", "t", "u", do=meet),
        part("C", "b", "t", "v", do=meet),
        part("D", "a", "u v", "y"),
    ]
    with Executable(bundle(parts, "y")) as executable:
        for _ in range(3):
            assert executable(x(1)).tolist() == [54, 54]
        rows = executable.timeline()
        assert {row["kind"] for row in rows} == {"measured"} and {row["request"] for row in rows} == {0}
        spans = {row["region"]: (row["start_us"], row["end_us"]) for row in rows}
        assert spans["A"][1] <= min(spans["B"][0], spans["C"][0]) and max(spans["B"][1], spans["C"][1]) <= spans["D"][0]
        assert spans["B"][0] < spans["C"][1] and spans["C"][0] < spans["B"][1]
        assert executable.throughput()["kind"] == "measured"


def test_requests_overlap_in_a_pipeline():
    """B of one request and A of the next meet; so do they for each pair."""
    meet = together(2)
    first = iter([True])
    parts = [
        part("A", "a", "x", "t", do=lambda: None if next(first, False) else meet()),
        part("B", "b", "t", "y", do=lambda: None if finished() else meet()),
    ]
    count = iter(range(100))

    def finished() -> bool:
        return next(count) == 4  # nobody follows the last one

    with Executable(bundle(parts, "y")) as executable:
        assert [int(y[0]) for y in executable.map(map(x, range(5)))] == [9 * number for number in range(5)]
        throughput = executable.throughput()
        assert (throughput["requests"], throughput["kind"]) == (5, "measured")
        assert throughput["per_second"] == pytest.approx(5 / throughput["seconds"])
        rows = executable.timeline()
        assert [row["request"] for row in rows if row["region"] == "A"] == [0, 1, 2, 3, 4]


def test_one_resource_is_one_worker():
    inside = threading.Lock()

    def alone() -> None:
        assert inside.acquire(blocking=False)
        time.sleep(0.001)
        inside.release()

    known = [DeviceSpec("a", "cores"), DeviceSpec("b", "cores")]
    parts = [
        part("A", "a", "x", "t", do=alone),
        part("B", "b", "x", "u", do=alone),
        part("C", "c", "x", "v"),
        part("D", "a", "t u v", "y", do=alone),
    ]
    with Executable(bundle(parts, "y", known)) as executable:
        assert [int(y[0]) for y in executable.map(map(x, range(20)), in_flight=8)] == [27 * n for n in range(20)]


def test_plain_calls_of_one_resource_stay_in_their_thread():
    seen: list[str] = []
    known = [DeviceSpec("a", "cores", watts=10.0), DeviceSpec("b", "cores")]
    note = lambda: seen.append(threading.current_thread().name)  # noqa: E731
    parts = [part("A", "a", "x", "t", do=note), part("B", "b", "t", "y", do=note)]
    with Executable(bundle(parts, "y", known)) as executable:
        assert executable(x(2)).tolist() == [18, 18]
        assert seen == [threading.current_thread().name] * 2
        first, second = executable.timeline()
        assert first["end_us"] <= second["start_us"]
        energy = {row["device"]: row for row in executable.energy()}
        assert energy["a"] == {
            "device": "a",
            "joules": pytest.approx(10.0 * (first["end_us"] - first["start_us"]) / 1e6),
            "kind": "estimated",
        }
        assert energy["b"] == {"device": "b", "joules": None, "kind": None}
        assert executable.submit(x(2)).result(SECONDS).tolist() == [18, 18]
        assert seen[2:] == ["nestc-cores"] * 2


@pytest.mark.parametrize("seconds", [None, 0.25])
def test_submit_from_many_threads(seconds: float | None):
    parts = [part("A", "a", "x", "t", seconds), part("B", "b", "t z", "y w", seconds)]
    with Executable(bundle(parts, "y w", inputs="x z")) as executable, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> None:
            y, w = executable.submit(x(number), x(1)).result(SECONDS)
            assert (y[0], w[0]) == (9 * number + 3, 9 * number + 4)
            found = executable.submit({"z": x(2), "x": x(number)}).result(SECONDS)
            assert {name: int(array[0]) for name, array in found.items()} == {"y": 9 * number + 6, "w": 9 * number + 7}
            assert executable(x(number), x(0))[0][0] == 9 * number

        for done in [pool.submit(ask, number) for number in range(40)]:
            done.result()
        assert executable.timeline()


def test_outputs_are_new_arrays_and_inputs_are_left_alone():
    parts = [part("A", "a", "x", "t"), part("B", "b", "t", "y")]
    with Executable(bundle(parts, "y t x")) as executable:
        given = x(1)
        found = list(executable.map([given] * 6, in_flight=3))
        arrays = [array for one in found for array in one]
        assert [array.tolist() for array in found[0]] == [[9, 9], [3, 3], [1, 1]]
        assert not any(np.shares_memory(one, two) for n, one in enumerate(arrays) for two in (*arrays[:n], given))
        for array in arrays:
            array[...] = -1
        assert executable(given)[0].tolist() == [9, 9] and given.tolist() == [1, 1]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[BundlePartition], str]:
    """Partitions on up to four devices, measured or (if drawn) modelled, and the names of the outputs."""
    modelled = draw(st.booleans())
    made, taken, parts = ["x"], set[str](), []
    for number in range(draw(st.integers(1, 8))):
        inputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
        outputs = [f"v{number}_{each}" for each in range(draw(st.integers(1, 2)))]
        seconds = draw(st.sampled_from([None, 0.5, 1.0])) if modelled else None
        taken |= set(inputs)
        parts.append(part(f"p{number}", draw(st.sampled_from("abcd")), " ".join(inputs), " ".join(outputs), seconds))
        made += outputs
    return parts, " ".join(name for name in made[1:] if name not in taken or draw(st.booleans()))


@given(graph=graphs(), in_flight=st.integers(1, 5), shared=st.booleans())
@settings(deadline=None, max_examples=60)
def test_random_graphs_end_and_give_what_one_resource_gives(
    graph: tuple[list[BundlePartition], str], in_flight: int, shared: bool
):
    """All on one resource runs in order in one thread: that is what the others are compared to."""
    parts, outputs = graph
    known = [DeviceSpec("a", "r"), DeviceSpec("b", "r")] if shared else []
    in_order = bundle([part_measured(each) for each in parts], outputs, [DeviceSpec(name, "r") for name in "abcd"])
    with Executable(in_order) as plain, Executable(bundle(parts, outputs, known)) as executable:
        wanted = [np.array(plain(x(number))) for number in range(6)]
        futures = [executable.submit(x(number)) for number in range(6)]
        np.testing.assert_array_equal(list(executable.map(map(x, range(6)), in_flight)), wanted)
        np.testing.assert_array_equal([future.result(SECONDS) for future in futures], wanted)
        np.testing.assert_array_equal(executable(x(5)), wanted[5])


def part_measured(given: BundlePartition) -> BundlePartition:
    names = " ".join(spec.name for spec in given.outputs)
    return part(given.name, given.device, " ".join(given.inputs), names)


def two_devices(do: Callable[[], None] | None = None, seconds: float | None = None) -> Bundle:
    return bundle([part("A", "a", "x", "t", seconds, do=do), part("B", "b", "t", "y", seconds)], "y")


@pytest.mark.parametrize("seconds", [None, 1.0])
def test_what_waits_can_be_cancelled(seconds: float | None):
    gate = Gate()
    with Executable(two_devices(gate, seconds)) as executable:
        first, second, third = (executable.submit(x(number)) for number in range(3))
        gate.wait()
        assert not first.cancel() and second.cancel()
        gate.open(2)
        assert first.result(SECONDS)[0] == 0 and third.result(SECONDS)[0] == 18
        with pytest.raises(CancelledError):
            second.result(SECONDS)
        assert {row["request"] for row in executable.timeline()} == {0, 2}
        assert executable.throughput()["requests"] == 2


@pytest.mark.parametrize("seconds", [None, 1.0])
def test_closing_ends_what_waits_and_finishes_what_runs(seconds: float | None):
    gate = Gate()
    executable = Executable(two_devices(gate, seconds))
    futures = [executable.submit(x(number)) for number in range(4)]
    gate.wait()
    session = executable._session  # pyright: ignore[reportPrivateUsage]
    assert session is not None
    closing = threading.Thread(target=executable.close)
    closing.start()
    assert session._closed.wait(SECONDS)  # pyright: ignore[reportPrivateUsage]
    gate.open(4)
    closing.join(SECONDS)
    assert not closing.is_alive()
    for future in futures:
        with pytest.raises(TargetError, match="this executable is closed"):
            future.result(SECONDS)
    for use in (executable, executable.submit, lambda given: next(executable.map([given]))):
        with pytest.raises(TargetError, match="this executable is closed"):
            use(x())


@pytest.mark.parametrize("seconds", [None, 1.0])
def test_a_map_whose_executable_closes(seconds: float | None):
    executable = Executable(two_devices(seconds=seconds))
    results = executable.map(map(x, range(10)), in_flight=2)
    assert next(results).tolist() == [0, 0]
    executable.close()
    with pytest.raises(TargetError, match="this executable is closed"):
        list(results)
    assert executable.timeline()


@pytest.mark.parametrize("seconds", [None, 1.0])
def test_map_is_lazy_and_stops_when_closed(seconds: float | None):
    taken: list[int] = []

    def items():
        for number in range(100):
            taken.append(number)
            yield x(number)

    with Executable(two_devices(seconds=seconds)) as executable:
        results = executable.map(items(), in_flight=3)
        assert taken == []
        assert next(results).tolist() == [0, 0] and taken == [0, 1, 2]
        assert next(results).tolist() == [9, 9] and taken == [0, 1, 2, 3]
        results.close()
        assert taken == [0, 1, 2, 3]
        assert executable(x(3)).tolist() == [27, 27]
        assert list(executable.map([])) == []
        assert executable.throughput()["requests"] == 0
        with pytest.raises(TargetError, match="at least one request is in flight, not 0"):
            executable.map([x()], in_flight=0)


@pytest.mark.parametrize("seconds", [None, 1.0])
def test_what_goes_wrong_in_a_map_comes_at_its_place(seconds: float | None):
    def items():
        yield x(0)
        yield x(1)
        raise OSError("the camera is gone")

    with Executable(two_devices(seconds=seconds)) as executable:
        results = executable.map(items(), in_flight=8)
        assert [int(next(results)[0]), int(next(results)[0])] == [0, 9]
        with pytest.raises(OSError, match="the camera is gone"):
            next(results)
        results = executable.map([x(0), x(1), np.zeros(3), x(3)], in_flight=8)
        assert [int(next(results)[0]), int(next(results)[0])] == [0, 9]
        with pytest.raises(ShapeError, match=r"input 'x' must be int64\[2\], but is float64\[3\]"):
            next(results)
        with pytest.raises(ShapeError, match="there is no input 'z'"):
            executable.submit({"z": x()})
        with pytest.raises(ShapeError, match=r"has 1 inputs \(x\), but 2 were given"):
            executable.submit(x(), x())


def test_a_call_from_a_workers_own_thread_does_not_wait_for_itself():
    with Executable(two_devices()) as executable:
        found: Future[np.ndarray] = Future()
        executable.submit(x(1)).add_done_callback(lambda _: found.set_result(executable(x(2))))
        assert found.result(SECONDS).tolist() == [18, 18]


@pytest.mark.parametrize("seconds", [None, 1.0])
def test_threads_end_with_the_executable(seconds: float | None):
    before = set(threading.enumerate())
    executable = Executable(two_devices(seconds=seconds))
    future = executable.submit(x(1))
    wait([future], SECONDS)
    started = set(threading.enumerate()) - before
    assert {thread.name for thread in started} == ({"nestc-a", "nestc-b"} if seconds is None else {"nestc-clock"})
    gone = weakref.ref(executable)
    del executable
    gc.collect()
    assert gone() is None
    for thread in started:
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_a_future_outlives_its_executable():
    gate = Gate()
    future = Executable(two_devices(gate)).submit(x(4))
    gc.collect()
    gate.wait()
    gate.open()
    assert future.result(SECONDS).tolist() == [36, 36]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_has_workers_of_its_own():
    with Executable(two_devices()) as executable:
        executable.submit(x(1)).result(SECONDS)
        child = os.fork()
        if child == 0:
            good = executable.submit(x(2)).result(SECONDS).tolist() == [18, 18]
            executable.close()
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert executable.submit(x(3)).result(SECONDS).tolist() == [27, 27]
