"""A loaded bundle: runs its partitions in order, by worker threads or by a virtual clock, as its devices need."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from nestc.bundle.artifact import Elapsed, Program
from nestc.bundle.bundle import Bundle
from nestc.bundle.schema import Kind, TensorSpec
from nestc.errors import TargetError
from nestc.runtime.native import NativeProgram, Quick
from nestc.runtime.stages import (
    CLOSED,
    CPU,
    Answer,
    Flow,
    Mark,
    Stage,
    Values,
    checked,
    failure,
    load,
    stage_mark,
    warn,
)

if TYPE_CHECKING:
    # Imported where a bundle needs them, which most do not.
    from nestc.runtime.clock import Conductor
    from nestc.runtime.workers import Results, Workers

OnFailure: TypeAlias = 'Literal["cpu"] | None'


class Run(Protocol):
    """One call or several requests on one timeline: what ran when, by which kind of clock."""

    @property
    def kind(self) -> Kind: ...

    @property
    def marks(self) -> Sequence[Mark]: ...

    @property
    def requests(self) -> int: ...


class Batch(Run, Protocol):
    """A run that takes more requests: `clock.Clock` and `workers.Wall`."""

    def add(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None], answer: Answer | None = None
    ) -> Results: ...

    def wait(self, future: Results) -> Any: ...

    def cancel(self) -> None: ...


class Direct:
    """A call that ran in its caller's thread, one stage after the other."""

    requests = 1

    def __init__(self, marks: Sequence[Mark], kind: Kind = "measured") -> None:
        self.marks = marks
        self.kind: Kind = kind


Last: TypeAlias = "Run | tuple[Stage, float, Elapsed | None]"
"""What is kept of the last run; of one partition only what takes no time to keep: when it ended, and how long it took
(None: all of that). `run_of` tells the rest."""


class Session:
    """Runs the partitions of a bundle. May be used from several threads at once.

    A bundle of one partition, and one whose partitions all share a resource and are measured, runs in the thread of
    the caller. As soon as a time is modelled a `Clock` decides; else there are `Workers`, one a resource.
    `on_failure` "cpu": where a device fails its partition's fallback runs. Raises BundleError if partitions do not fit
    together, TargetError if a device is not here or a fallback is missing.
    """

    def __init__(self, bundle: Bundle, threads: int, on_failure: OnFailure = None) -> None:
        if on_failure not in (None, CPU):
            raise TargetError(f'on_failure is "cpu" or None, not {on_failure!r}')
        self._flow = load(bundle, threads, on_failure)
        self._closed = threading.Event()
        self._starting = threading.Lock()
        self._one_at_a_time = threading.Lock()  # stages, where a clock is virtual
        self._conductor: Conductor | None = None
        self._workers: Workers | None = None
        # Most bundles are one partition whose border is the graph's: nothing to pass on then.
        self._only = _only(self._flow)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The loaded partitions, in order."""
        return self._flow.stages

    def run(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Last]:
        """Run once. Where an output is given it is written, else it is allocated."""
        only = self._only
        if only is None or only.program is None:
            return self._run_all(inputs, outputs)
        stage, program, takes, gives = only.stage, only.program, only.takes, only.gives
        begin = time.perf_counter()
        try:
            if takes is None:
                results, elapsed = program(inputs, outputs)
            else:
                results, elapsed = program([inputs[n] for n in takes], [outputs[n] for n in gives])
            if not stage.trusted:
                results = list(checked(stage, results).values())
            if takes is not None:
                results = [result for _, result in sorted(zip(gives, results, strict=True), key=itemgetter(0))]
        except Exception as error:  # a device may raise anything
            failed = TargetError(CLOSED) if self._closed.is_set() else failure(stage, error)
            if stage.fallback is None or self._closed.is_set():
                raise failed from error
        else:
            return results, (stage, time.perf_counter() - begin, elapsed)
        return self._fallen(stage, failed, inputs, outputs)

    def quick(self, inputs: Sequence[TensorSpec]) -> tuple[Quick, Stage] | None:
        """The shortest way of a call with `inputs`, and the stage that it runs, if that is one of our own native code
        compiled for just these; None where there is no such way."""
        only = self._only
        if only is None or not isinstance(only.program, NativeProgram):
            return None
        takes = only.takes or tuple(range(len(inputs)))
        fixed = all(spec.shape is not None and None not in spec.shape for spec in inputs)
        if not fixed or any(
            (inputs[number].dtype, inputs[number].shape) != (spec.dtype, spec.shape)
            for number, spec in zip(takes, only.program.inputs, strict=True)
        ):
            return None
        return only.program.quick(inputs, takes, only.gives), only.stage

    def batch(self) -> Batch:
        """A timeline for several requests."""
        return (self._start_conductor() if self._virtual else self._start_workers()).batch()

    def submit(self, inputs: Sequence[np.ndarray], answer: Answer) -> tuple[Results, Run]:
        """Run in the background: the future of the answer, and the timeline, shared with what is in flight."""
        executor = self._start_conductor() if self._virtual else self._start_workers()
        return executor.submit(inputs, [None] * len(self._flow.outputs), answer)

    def close(self) -> None:
        """Close every program; what runs is finished, what waits raises TargetError."""
        self._closed.set()
        with self._starting:
            started = [executor.lanes for executor in (self._conductor, self._workers) if executor is not None]
        for lanes in started:
            if lanes.process == os.getpid():
                lanes.stop()
        self._flow.close()

    def sources(self, inputs: Sequence[np.ndarray]) -> list[tuple[Stage, list[np.ndarray]]]:
        """Every stage with the inputs it gets in a run (for profiles)."""
        values: dict[str, np.ndarray] = dict(zip(self._flow.inputs, inputs, strict=True))
        found: list[tuple[Stage, list[np.ndarray]]] = []
        for stage in self.stages:
            arguments = [values[name] for name in stage.partition.inputs]
            found.append((stage, arguments))
            results, _ = stage.runnable(arguments, [None] * len(stage.outputs))
            values.update(checked(stage, results))
        return found

    @property
    def _virtual(self) -> bool:
        """Whether a time is modelled, or might be: devices of other packages tell only when they run."""
        return any(modelled is not False for modelled in self._flow.modelled)

    def _run_all(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Run]:
        self._require_open()
        batch: Batch
        if self._virtual:
            from nestc.runtime.clock import Clock

            batch = Clock(self._flow, self._one_at_a_time, self._closed)
        elif len(self._flow.queues) > 1:
            workers = self._start_workers()
            if workers.lanes.inside():  # a worker that waits for itself would wait for ever
                return self._run_in_order(inputs, outputs)
            batch = workers.batch()
        else:
            return self._run_in_order(inputs, outputs)
        return batch.wait(batch.add(inputs, outputs)), batch

    def _run_in_order(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Run]:
        """Run the stages one after the other in the caller's thread."""
        start = time.perf_counter()
        values = Values(self._flow, inputs, outputs)
        marks: list[Mark] = []
        for stage in self.stages:
            begin = time.perf_counter() - start
            on_cpu = stage.program is None
            try:
                seconds, kind = values.run(stage, on_cpu)
            except TargetError as error:
                if stage.fallback is None or on_cpu:
                    raise
                warn(self._flow, stage, error)
                on_cpu, begin = True, time.perf_counter() - start
                seconds, kind = values.run(stage, on_cpu)
            device = self._flow.cpu if on_cpu else None
            marks.append(stage_mark(stage, begin, begin + seconds, kind, 0, device))
            values.release(stage)
        return values.results(), Direct(marks)

    def _fallen(
        self, stage: Stage, error: TargetError, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Run]:
        """Have the CPU run the only stage, whose device failed."""
        warn(self._flow, stage, error)
        values = Values(self._flow, inputs, outputs)
        seconds, kind = values.run(stage, on_cpu=True)
        return values.results(), Direct((stage_mark(stage, 0.0, seconds, kind, 0, self._flow.cpu),))

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise TargetError(CLOSED)

    def _start_conductor(self) -> Conductor:
        with self._starting:
            self._require_open()
            from nestc.runtime.clock import Conductor

            if self._conductor is None or not _ours(self._conductor):
                self._conductor = Conductor(self._flow, self._one_at_a_time, self._closed)
            return self._conductor

    def _start_workers(self) -> Workers:
        with self._starting:
            self._require_open()
            from nestc.runtime.workers import Workers

            if self._workers is None or not _ours(self._workers):
                self._workers = Workers(self._flow, self._closed)
            return self._workers


def run_of(last: Last) -> Run:
    """What is kept of a run, with its marks."""
    if not isinstance(last, tuple):
        return last
    stage, end, elapsed = last
    if elapsed is None:
        return Direct((stage_mark(stage, 0.0, end, "measured", 0),))
    if elapsed.kind == "modelled":
        return Direct((stage_mark(stage, 0.0, elapsed.seconds, "modelled", 0),), "modelled")
    begin = max(0.0, end - elapsed.seconds)
    return Direct((stage_mark(stage, begin, begin + elapsed.seconds, "measured", 0),))


def modelled_ms(timeline: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of a timeline that are not measured, by device and link; empty where everything was measured."""
    found: dict[str, float] = {}
    for mark in timeline:
        if mark["kind"] != "measured":
            found[mark["device"]] = found.get(mark["device"], 0.0) + (mark["end_us"] - mark["start_us"]) / 1e3
    return found


def marks_to_timeline(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """The contract's timeline, in the order in which things began: times in microseconds since the run began."""
    return [_row(mark) for mark in sorted(marks, key=lambda mark: (mark.begin, mark.request))]


def _row(mark: Mark) -> dict[str, Any]:
    row: dict[str, Any] = {
        "device": mark.device,
        "region": mark.region,
        "start_us": mark.begin * 1e6,
        "end_us": mark.end * 1e6,
        "kind": mark.kind,
        "request": mark.request,
    }
    if mark.bytes is not None:
        row["bytes"] = mark.bytes
    if mark.instead_of:
        row["instead_of"] = mark.instead_of
    return row


class _Only(NamedTuple):
    """The one stage of a flow: which of the graph's inputs it takes, and which outputs it gives, in its own order.

    ``takes`` is None where both are in the order of the graph.
    """

    stage: Stage
    program: Program | None
    takes: tuple[int, ...] | None
    gives: tuple[int, ...]


def _only(flow: Flow) -> _Only | None:
    """The one stage of a flow that is nothing else: no value to pass on, nothing to wait for."""
    if len(flow.stages) != 1:
        return None
    (stage,) = flow.stages
    device = stage.device
    free = not (device.launch_seconds or device.latency_seconds or device.bytes_per_second)
    inputs, outputs = stage.partition.inputs, stage.outputs
    whole = set(inputs) <= set(flow.inputs) and sorted(outputs) == sorted(flow.outputs)
    if not whole or not (free or flow.modelled == [False]):
        return None
    gives = tuple(flow.outputs.index(name) for name in outputs)
    if inputs == flow.inputs and outputs == flow.outputs:
        return _Only(stage, stage.program, None, gives)
    return _Only(stage, stage.program, tuple(flow.inputs.index(name) for name in inputs), gives)


def _ours(executor: Conductor | Workers) -> bool:
    """Whether an executor's threads are in this process; a fork leaves them behind."""
    if executor.lanes.process == os.getpid():
        return True
    executor.lanes.forget()
    return False
