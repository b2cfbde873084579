"""The virtual clock: schedules worked out by hand, and the same times as the partitioner's own rules give."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import bundle, part, scripted, spans, x

from nestc.bundle.bundle import Bundle, DeviceSpec
from nestc.partition.evaluate import evaluate, pipelined
from nestc.partition.problem import HOST, Cost, Crossing, Edge, Problem, Stage, Task, Unit
from nestc.runtime import Executable

pytestmark = pytest.mark.usefixtures("scripted")

__all__ = ["scripted"]

BRANCHES = [
    part("A", "a", "x", "t", 3.0),
    part("B", "a", "t", "u", 2.0),
    part("C", "b", "t", "v", 4.0),
    part("D", "a", "u v", "y", 1.0),
]


def test_branches_run_at_once():
    with Executable(bundle(BRANCHES, "y")) as executable:
        y = executable(x(1))
        # t = 3, u = 9, v = 9, y = 54
        assert y.tolist() == [54, 54]
        assert spans(executable.timeline()) == [("A", 0, 0, 3), ("B", 0, 3, 5), ("C", 0, 3, 7), ("D", 0, 7, 8)]
        assert {row["kind"] for row in executable.timeline()} == {"modelled"}
        assert executable.throughput() == {"requests": 1, "seconds": 8.0, "per_second": 0.125, "kind": "modelled"}


def test_devices_of_one_resource_take_turns():
    known = [DeviceSpec("a", "r"), DeviceSpec("b", "r")]
    with Executable(bundle(BRANCHES, "y", known)) as executable:
        executable(x())
        assert spans(executable.timeline()) == [("A", 0, 0, 3), ("B", 0, 3, 5), ("C", 0, 5, 9), ("D", 0, 9, 10)]


def test_a_later_stage_of_a_resource_does_not_overtake():
    parts = [
        part("A", "a", "x", "t", 5.0),
        part("B", "b", "t", "u", 1.0),
        part("C", "b", "x", "v", 1.0),  # could run at 0, but comes after B
    ]
    with Executable(bundle(parts, "u v")) as executable:
        executable(x())
        assert spans(executable.timeline()) == [("A", 0, 0, 5), ("B", 0, 5, 6), ("C", 0, 6, 7)]


def test_links_and_launches_take_their_time():
    # 16 bytes take 0.25 + 16 / 64 = 0.5 s to or from a, and 1 s to or from b; the cpu is in the host's memory
    known = [
        DeviceSpec("a", "a", 0.125, 0.25, 64.0, 2.0, "estimated"),
        DeviceSpec("b", "b", 0.0, 1.0, 0.0, 0.0, "modelled"),
    ]
    parts = [
        part("A", "a", "x", "t", 1.0, joules=7.0),
        part("B", "b", "t", "u", 2.0),
        part("C", "a", "t", "v", 1.0, joules=5.0),
        part("D", "host-like", "u v x", "y", 3.0),
    ]
    with Executable(bundle(parts, "y v", known)) as executable:
        executable(x())
        rows = [
            (row["device"], *span)
            for row, span in zip(executable.timeline(), spans(executable.timeline()), strict=True)
        ]
        assert rows == [
            ("host memory->a", "x", 0, 0, 0.5),
            ("a", "A", 0, 0.5, 1.625),
            ("a->b", "t", 0, 1.625, 3.125),
            ("a", "C", 0, 1.625, 2.75),
            ("a->host-like", "v", 0, 2.75, 3.25),
            ("a->host memory", "v", 0, 2.75, 3.25),
            ("b", "B", 0, 3.125, 5.125),
            ("b->host-like", "u", 0, 5.125, 6.125),
            ("host-like", "D", 0, 6.125, 9.125),
        ]
        crossings = [row for row in executable.timeline() if "bytes" in row]
        assert {row["bytes"] for row in crossings} == {16}
        assert [row["kind"] for row in crossings] == ["estimated", "estimated", "estimated", "estimated", "modelled"]
        assert executable.energy() == [
            {"device": "host memory->a", "joules": 32.0, "kind": "estimated"},
            {"device": "a", "joules": 12.0, "kind": "modelled"},
            {"device": "a->b", "joules": 32.0, "kind": "estimated"},
            {"device": "a->host-like", "joules": 32.0, "kind": "estimated"},
            {"device": "a->host memory", "joules": 32.0, "kind": "estimated"},
            {"device": "b", "joules": None, "kind": None},
            {"device": "b->host-like", "joules": None, "kind": None},
            {"device": "host-like", "joules": None, "kind": None},
        ]


def test_one_partition_behind_a_link():
    with Executable(bundle([part("A", "a", "x", "y", 1.0)], "y", [DeviceSpec("a", "a", 0.5, 0.25)])) as executable:
        assert executable(x(2)).tolist() == [6, 6]
        assert spans(executable.timeline()) == [("x", 0, 0, 0.25), ("A", 0, 0.25, 1.75), ("y", 0, 1.75, 2.0)]


def test_a_device_of_another_package_tells_when_it_runs(monkeypatch: pytest.MonkeyPatch):
    """Until it has run its times might be modelled; then it gets a worker."""
    monkeypatch.setattr("nestc.runtime.stages._MEASURED", frozenset())
    with Executable(bundle([part("A", "a", "x", "t"), part("B", "b", "t", "y")], "y")) as executable:
        assert executable(x(1)).tolist() == [9, 9]
        first, second = executable.timeline()
        assert first["end_us"] == second["start_us"]  # virtual time has no gaps
        assert executable.throughput()["kind"] == "measured"
        assert executable.submit(x(2)).result(20).tolist() == [18, 18]
        assert {thread.name for thread in threading.enumerate()} >= {"nestc-a", "nestc-b"}


def test_submitted_requests_share_a_clock_while_one_is_in_flight():
    gate = threading.Event()
    parts = [part("A", "a", "x", "t", 1.0, do=lambda: gate.wait(20) and None), part("B", "b", "t", "y", 3.0)]
    with Executable(bundle(parts, "y")) as executable:
        futures = [executable.submit(x(number)) for number in range(3)]
        gate.set()
        assert [int(future.result(20)[0]) for future in futures] == [0, 9, 18]
        # the two that came while A of the first one ran come at 0, where it began
        assert sorted(spans(executable.timeline())) == [
            ("A", 0, 0, 1),
            ("A", 1, 1, 2),
            ("A", 2, 2, 3),
            ("B", 0, 1, 4),
            ("B", 1, 4, 7),
            ("B", 2, 7, 10),
        ]
        assert executable.throughput()["requests"] == 3


def pipeline() -> Bundle:
    return bundle([part("A", "a", "x", "t", 2.0), part("B", "b", "t", "u", 3.0), part("C", "a", "u", "y", 1.0)], "y")


def test_a_pipeline_of_requests():
    """Of two stages of a that could begin the one that can first does; b is the slowest: 3 s a request."""
    with Executable(pipeline()) as executable:
        found = list(executable.map([x(1), x(2), x(3), x(4)], in_flight=4))
        assert [int(y[0]) for y in found] == [27, 54, 81, 108]
        assert sorted(spans(executable.timeline())) == [
            ("A", 0, 0, 2),
            ("A", 1, 2, 4),
            ("A", 2, 4, 6),
            ("A", 3, 7, 9),  # at 6 both it and C of request 0 could begin, which is the older request
            ("B", 0, 2, 5),
            ("B", 1, 5, 8),
            ("B", 2, 8, 11),
            ("B", 3, 11, 14),
            ("C", 0, 6, 7),  # at 5 a is busy with A of request 2, which could begin before it
            ("C", 1, 9, 10),
            ("C", 2, 11, 12),
            ("C", 3, 14, 15),
        ]
        assert executable.throughput()["requests"] == 4


def test_requests_wait_for_their_turn():
    """With one in flight the next request comes when the one before has ended."""
    with Executable(pipeline()) as executable:
        list(executable.map([x(1), x(2)], in_flight=1))
        assert spans(executable.timeline()) == [
            ("A", 0, 0, 2),
            ("B", 0, 2, 5),
            ("C", 0, 5, 6),
            ("A", 1, 6, 8),
            ("B", 1, 8, 11),
            ("C", 1, 11, 12),
        ]
        assert executable.throughput() == {
            "requests": 2,
            "seconds": 12.0,
            "per_second": pytest.approx(1 / 6),
            "kind": "modelled",
        }


@st.composite
def flows(draw: st.DrawFn) -> tuple[Bundle, Problem, list[Stage]]:
    """A random bundle of modelled stages, and the same as a placement problem; times are eighths, so ties are exact.

    Its inputs are taken by a first stage in the host's memory, since the problem has them everywhere at time 0.
    """
    eighths = st.integers(0, 24).map(lambda number: number / 8)
    names = [f"d{number}" for number in range(draw(st.integers(1, 4)))]
    known = [
        DeviceSpec(
            name,
            draw(st.sampled_from(["r", "s", name])),
            draw(eighths),
            draw(eighths),
            draw(st.sampled_from([0.0, 64.0])),
        )
        for name in names
    ]
    known.append(DeviceSpec("host", "host"))
    specs = {spec.name: spec for spec in known}
    maker = {"v": "p0"}
    sizes = {"v": 2}
    takers: dict[str, list[str]] = {"v": []}
    parts = [part("p0", "host", "x z", "v", 0.5)]
    tasks = [Task("p0", {"host": Cost(0.5)})]
    for number in range(1, draw(st.integers(2, 9))):
        unit = draw(st.sampled_from(["host", *names]))
        inputs = draw(st.lists(st.sampled_from(sorted(maker)), min_size=1, max_size=3, unique=True))
        outputs = [f"v{number}_{each}" for each in range(draw(st.integers(1, 2)))]
        lengths = [draw(st.sampled_from([1, 2, 8])) for _ in outputs]
        seconds = draw(eighths)
        for name in inputs:
            takers[name].append(f"p{number}")
        maker |= dict.fromkeys(outputs, f"p{number}")
        takers |= {name: [] for name in outputs}
        sizes |= dict(zip(outputs, lengths, strict=True))
        parts.append(part(f"p{number}", unit, " ".join(inputs), " ".join(outputs), seconds, sizes=lengths))
        tasks.append(Task(f"p{number}", {unit: Cost(seconds)}))
    outputs = [name for name in maker if not takers[name] or draw(st.booleans())]
    pairs = [(first, second) for first in (HOST, *specs) for second in (HOST, *specs) if first != second]

    def edge(name: str, destination: str | None) -> Edge:
        size = 8 * sizes[name]
        crossings = {
            pair: Crossing(wire_seconds=sum(specs[end].seconds(size) for end in pair if end != HOST)) for pair in pairs
        }
        return Edge(name, maker[name], destination, size, crossings)

    edges = [edge(name, taker) for name, found in takers.items() for taker in found]
    edges += [edge(name, None) for name in outputs]
    units = tuple(Unit(spec.name, spec.resource, spec.launch_seconds) for spec in known)
    placed = [Stage(each.device, (each.name,)) for each in parts]
    return bundle(parts, " ".join(outputs), known, "x z"), Problem(units, tuple(tasks), tuple(edges)), placed


@given(flow=flows(), requests=st.integers(1, 6), in_flight=st.integers(1, 4))
@settings(deadline=None, max_examples=80)
def test_the_clock_keeps_to_the_rules_of_the_partitioner(flow: tuple, requests: int, in_flight: int):
    made, problem, placed = flow
    with Executable(made) as executable:
        single = executable(x(1), x(2))
        wanted = evaluate(problem, placed)
        timeline = executable.timeline()
        assert executable.throughput()["seconds"] == pytest.approx(wanted.latency, abs=1e-9)
        own = {row[0]: row[2:] for row in spans([row for row in timeline if "bytes" not in row])}
        for timed in wanted.times:
            assert own[f"p{timed.stage}"] == pytest.approx((timed.begin, timed.end), abs=1e-9)

        found = list(executable.map(((x(1 + i), x(2)) for i in range(requests)), in_flight=in_flight))
        for one, other in zip(as_tuple(single), as_tuple(found[0]), strict=True):
            np.testing.assert_array_equal(one, other)
        many = pipelined(problem, placed, requests, in_flight)
        assert executable.throughput()["seconds"] == pytest.approx(many.makespan, abs=1e-9)
        rows = [row for row in executable.timeline() if "bytes" not in row]
        own = {(row["region"], row["request"]): (row["start_us"] / 1e6, row["end_us"] / 1e6) for row in rows}
        assert own == {
            (f"p{timed.stage}", timed.request): pytest.approx((timed.begin, timed.end), abs=1e-9)
            for timed in many.times
        }


def as_tuple(found: object) -> tuple[np.ndarray, ...]:
    return found if isinstance(found, tuple) else (found,)
