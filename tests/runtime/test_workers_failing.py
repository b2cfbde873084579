"""Worker threads where something fails or is dropped: where fallbacks are queued, what still runs, what is waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from scripted import bundle, part, scripted, x

from nestc.bundle.artifact import Artifact
from nestc.bundle.bundle import BundlePartition
from nestc.errors import TargetError
from nestc.runtime.stages import Flow, load
from nestc.runtime.workers import CANCELLED, CLOSED, Lanes, Wall

pytestmark = pytest.mark.usefixtures("scripted")

__all__ = ["scripted"]

SECONDS = 20
"""Long enough for anything here; a deadlock would take longer."""


class Running:
    """Partitions on workers of their own, without a session around them."""

    def __init__(self, parts: list[BundlePartition], outputs: str) -> None:
        self.closed = threading.Event()
        self.flow: Flow = load(bundle(parts, outputs), 1, "cpu")
        self.lanes = Lanes(self.flow.queues, self.closed)
        self.wall = Wall(self.flow, self.lanes, self.closed)

    def __enter__(self) -> Wall:
        return self.wall

    def __exit__(self, *_: object) -> None:
        self.lanes.stop()
        self.flow.close()


def note(seen: list[str], name: str, then: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """A hook that writes down what runs in which thread, and does something."""

    def hook() -> None:
        seen.append(f"{name} in {threading.current_thread().name}")
        then()

    return hook


def stuck() -> None:
    raise RuntimeError("the bus is stuck")


def spare(outputs: str, inputs: str, do: Callable[[], None] | None = None) -> Artifact:
    return part("spare", "cpu", inputs, outputs, do=do).artifact


def test_a_fallback_waits_behind_what_the_cpu_has_queued() -> None:
    """B fails while the CPU computes A, behind which C waits: the CPU runs A, C, then B in the order they were queued."""
    seen: list[str] = []
    begun, opened = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert opened.wait(SECONDS)

    def fail() -> None:
        assert begun.wait(SECONDS)
        stuck()

    parts = [
        part("A", "cpu", "x", "t", do=note(seen, "A", hold), spare=spare("t", "x")),
        part("C", "cpu", "x", "u", do=note(seen, "C"), spare=spare("u", "x")),
        part("B", "b", "x", "v", do=note(seen, "B", fail), spare=spare("v", "x", note(seen, "spare B"))),
        part("D", "b", "t u v", "y", do=note(seen, "D"), spare=spare("y", "t u v")),
    ]
    with Running(parts, "y") as wall:
        future = wall.add([x(1)], [None])
        assert begun.wait(SECONDS)
        while "B in nestc-b" not in seen:
            time.sleep(0.001)
        opened.set()
        (y,) = wall.wait(future)
    assert y.tolist() == [27, 27]
    assert [each for each in seen if each.endswith("nestc-cpu")] == [
        "A in nestc-cpu",
        "C in nestc-cpu",
        "spare B in nestc-cpu",
    ]
    assert seen[-1] == "D in nestc-b"
    assert [mark.instead_of for mark in wall.marks] == ["", "", "b", ""]


def test_what_failed_beyond_help_queues_nothing_more() -> None:
    """A cannot be helped; B fails after it, and has a fallback, which does not run any more."""
    seen: list[str] = []
    failed = threading.Event()

    def fail_late() -> None:
        assert failed.wait(SECONDS)
        stuck()

    def fail_twice() -> None:
        failed.set()
        stuck()

    parts = [
        part("B", "b", "x", "t", do=fail_late, spare=spare("t", "x", note(seen, "spare B"))),
        part("A", "a", "x", "u", do=stuck, spare=spare("u", "x", note(seen, "spare A", fail_twice))),
        part("C", "a", "t u", "y", do=note(seen, "C"), spare=spare("y", "t u")),
    ]
    with Running(parts, "y") as wall:
        future = wall.add([x(1)], [None])
        with pytest.raises(TargetError, match="partition A failed on the CPU, its fallback: RuntimeError: the bus"):
            wall.wait(future)
        assert wall.idle and wall.requests == 0 and wall.marks == []
    assert seen == ["spare A in nestc-cpu"]


def test_a_fallback_that_finds_the_workers_stopped_is_an_error() -> None:
    running = Running(
        [part("A", "a", "x", "y", do=lambda: (running.closed.set(), stuck())[1], spare=spare("y", "x"))], "y"
    )
    with running as wall:
        with pytest.raises(TargetError, match=CLOSED):
            wall.wait(wall.add([x(1)], [None]))
        assert wall.idle


def test_cancelling_waits_for_what_runs_and_drops_the_rest() -> None:
    """A of the first request runs when all are cancelled: it ends, and nothing else begins."""
    begun, opened = threading.Event(), threading.Event()
    seen: list[str] = []

    def hold() -> None:
        begun.set()
        assert opened.wait(SECONDS)

    parts = [
        part("A", "a", "x", "t", do=note(seen, "A", hold), spare=spare("t", "x")),
        part("B", "b", "t", "y", do=note(seen, "B"), spare=spare("y", "t")),
    ]
    with Running(parts, "y") as wall:
        futures = [wall.add([x(number)], [None]) for number in range(3)]
        assert begun.wait(SECONDS)
        dropping = threading.Thread(target=wall.cancel)
        dropping.start()
        dropping.join(0.05)
        assert dropping.is_alive() and not wall.idle  # A still runs
        opened.set()
        dropping.join(SECONDS)
        assert not dropping.is_alive() and wall.idle
        for future in futures:
            with pytest.raises(TargetError, match=CANCELLED):
                future.result(SECONDS)
        assert seen == ["A in nestc-a"] and wall.requests == 0
        wall.cancel()  # nothing is in flight
        assert wall.wait(wall.add([x(1)], [None]))[0].tolist() == [9, 9]
