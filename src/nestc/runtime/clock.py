"""The virtual clock: runs stages one at a time, in the order in which they would begin on real devices.

Used as soon as a time is modelled. Measured stages are then not disturbed by simulators, and what simulators themselves
take is in no time shown. The rules are those of `nestc.partition.problem`:

- A modelled stage takes its device's ``launch_seconds`` and the modelled seconds, a measured one the wall time of its
  call: the median of some calls after one that warms the caches, which simulators have emptied.
- A stage begins when its resource is free, the stages before it on that resource (same request) have begun, and each of
  its tensors has arrived: the end of the stage that made it and the time on the links, which carry any number at once.
- Of all stages that could be next, the one that can begin first is run (ties: by request, then by order in the bundle).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from nestc.bundle.bundle import DeviceSpec
from nestc.bundle.schema import Kind
from nestc.errors import TargetError
from nestc.runtime.stages import CLOSED, Answer, Flow, Mark, Stage, Values, crossing, stage_mark, warn
from nestc.runtime.workers import CANCELLED, Lanes, Results

LANE = "clock"

_Waiting: TypeAlias = "tuple[Sequence[np.ndarray], Sequence[np.ndarray | None], Answer | None, Results]"


class _Request:
    """A request in flight: its values, where each has arrived and when, and which stage of each resource is next."""

    def __init__(self, flow: Flow, number: int, values: Values, future: Results, arrival: float) -> None:
        self.number = number
        self.values = values
        self.future = future
        self.begun = False
        self.left = len(flow.stages)
        self.next = dict.fromkeys(flow.queues, 0)
        self.fallen: dict[int, float] = {}  # stages whose device failed, and when they can begin on the CPU
        self.made: dict[str, tuple[float, DeviceSpec | None]] = {}  # when and where a value came to be
        self.here: dict[tuple[str, str], float] = {}  # when a value has arrived on a device
        self.end = arrival


class Clock:
    """Requests that share the devices of one virtual time, which begins at 0.

    ``marks`` is the timeline so far; ``now`` the time at which requests are added: when the last one waited for was
    done, so that as many are in flight as were added without a wait. Stages run in the thread that waits; `lock` is
    held meanwhile, since no two of a process should disturb each other.
    """

    def __init__(self, flow: Flow, lock: threading.Lock, closed: threading.Event) -> None:
        self.marks: list[Mark] = []
        self.requests = 0
        self.now = 0.0
        self._flow = flow
        self._lock = lock
        self._closed = closed
        self._active: list[_Request] = []
        self._free = dict.fromkeys(flow.queues, 0.0)
        self._count = 0
        self._ends: dict[Results, float] = {}

    def add(
        self,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray | None],
        answer: Answer | None = None,
        future: Results | None = None,
    ) -> Results:
        """A request more, whose inputs exist now. Its future is done when somebody has waited or stepped enough."""
        values = Values(self._flow, inputs, outputs, answer)
        request = _Request(self._flow, self._count, values, future or Future(), self.now)
        self._count += 1
        for name in self._flow.inputs:
            self._make(request, name, self.now, None)
        self._active.append(request)
        return request.future

    def wait(self, future: Results) -> Any:
        """Run until a request is done; its results, or what it raised."""
        while not future.done():
            self.step()
        self.now = max(self.now, self._ends.pop(future, self.now))
        return future.result()

    @property
    def kind(self) -> Kind:
        """ "modelled" as soon as a part of the timeline is."""
        return "measured" if all(mark.kind == "measured" for mark in self.marks) else "modelled"

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._active

    def step(self) -> None:
        """Run the stage that begins next, if there is one."""
        for request in [each for each in self._active if not each.begun and each.future.cancelled()]:
            self._active.remove(request)
        for request in [each for each in self._active if not each.left]:  # a bundle without partitions
            self._finish(request, None)
        if self.idle:
            return
        begin, _, number, request, on_cpu = min(
            (candidate for request in self._active for candidate in self._candidates(request)),
            key=lambda candidate: candidate[:3],
        )
        if not request.begun and not request.future.set_running_or_notify_cancel():
            self._active.remove(request)
            return
        request.begun = True
        self.now = max(self.now, begin)
        stage = self._flow.stages[number]
        try:
            self._run(request, stage, begin, on_cpu)
        except TargetError as error:
            if stage.fallback is None or on_cpu or self._closed.is_set():
                self._finish(request, error)
                return
            warn(self._flow, stage, error)
            self._fall(request, stage, begin)
            return
        if not request.left:
            self._finish(request, None)

    def cancel(self) -> None:
        """Drop what is in flight."""
        while self._active:
            request = self._active.pop()
            if not request.future.cancel():
                request.future.set_exception(TargetError(CANCELLED))

    def _candidates(self, request: _Request) -> list[tuple[float, int, int, _Request, bool]]:
        """What can be next of a request: when, request, stage; whether on the CPU instead of its device."""
        found: list[tuple[float, int, int, _Request, bool]] = []
        for resource, place in request.next.items():
            queue = self._flow.queues[resource]
            if place == len(queue):
                continue
            stage = self._flow.stages[queue[place]]
            arrivals = [request.here.get((name, stage.device.name)) for name in stage.partition.inputs]
            if None not in arrivals:
                begin = max((self._free[resource], *(arrival or 0.0 for arrival in arrivals)))
                found.append((begin, request.number, stage.number, request, False))
        for number, ready in request.fallen.items():
            found.append((max(ready, self._free[self._flow.cpu.resource]), request.number, number, request, True))
        return found

    def _run(self, request: _Request, stage: Stage, begin: float, on_cpu: bool) -> None:
        if not on_cpu:
            request.next[stage.device.resource] += 1
        else:
            del request.fallen[stage.number]
        if stage.program is None and not on_cpu:
            raise TargetError(f"{stage.partition.device} could not be opened")
        with self._lock:
            if self._closed.is_set():
                raise TargetError(CLOSED)
            seconds, kind = request.values.run(stage, on_cpu, steady=True)
        device = self._flow.cpu if on_cpu else stage.device
        end = begin + seconds + (device.launch_seconds if kind == "modelled" else 0.0)
        self._free[device.resource] = end
        self.marks.append(stage_mark(stage, begin, end, kind, request.number, device if on_cpu else None))
        for name in stage.outputs:
            self._make(request, name, end, device)
        request.values.release(stage)
        request.left -= 1
        request.end = max(request.end, end)

    def _make(self, request: _Request, name: str, time: float, device: DeviceSpec | None) -> None:
        """A value exists from `time` on where `device` is, and sets out for whoever needs it."""
        request.made[name] = time, device
        for destination in self._flow.destinations.get(name, ()):
            request.here[name, destination.name] = self._send(request, name, time, device, destination)
        if name in self._flow.outputs and device is not None:
            request.end = max(request.end, self._send(request, name, time, device, None))

    def _send(
        self, request: _Request, name: str, begin: float, source: DeviceSpec | None, destination: DeviceSpec | None
    ) -> float:
        """When a value that sets out at `begin` arrives."""
        mark = crossing(name, request.values[name].nbytes, (source, destination), begin, request.number)
        if mark is None:
            return begin
        self.marks.append(mark)
        return mark.end

    def _fall(self, request: _Request, stage: Stage, failed: float) -> None:
        """Have the CPU run a stage whose device failed: its inputs come to the host's memory first."""
        ready = failed
        for name in stage.partition.inputs:
            made, device = request.made[name]
            if (name, self._flow.cpu.name) not in request.here:
                request.here[name, self._flow.cpu.name] = self._send(
                    request, name, max(made, failed), device, self._flow.cpu
                )
            ready = max(ready, request.here[name, self._flow.cpu.name])
        request.fallen[stage.number] = ready

    def _finish(self, request: _Request, error: Exception | None) -> None:
        self._active.remove(request)
        self._ends[request.future] = request.end
        if error is not None:
            request.future.set_exception(error)
            return
        try:
            results = request.values.results()
        except ValueError as mismatch:  # an array given for an output does not take the value
            request.future.set_exception(mismatch)
            return
        self.requests += 1
        request.future.set_result(results)


class Conductor:
    """Runs submitted requests by a virtual clock, in a thread of its own.

    Requests that are in flight together share one clock; when none is left the next one begins a new one.
    """

    def __init__(self, flow: Flow, lock: threading.Lock, closed: threading.Event) -> None:
        self.lanes = Lanes((LANE,), closed)
        self._flow = flow
        self._stage_lock = lock
        self._closed = closed
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._clock: Clock | None = None

    def batch(self) -> Clock:
        """A clock of its own for requests to come."""
        return Clock(self._flow, self._stage_lock, self._closed)

    def submit(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None], answer: Answer | None = None
    ) -> tuple[Results, Clock]:
        """A request, by the clock of those that are in flight, or by a new one if there are none."""
        future: Results = Future()
        with self._lock:
            clock = self._clock
            if clock is None:
                clock = self.batch()
                if not self.lanes.put(LANE, partial(self._drive, clock)):
                    raise TargetError(CLOSED)
                self._clock = clock
            self._waiting.append((inputs, outputs, answer, future))
        return future, clock

    def _drive(self, clock: Clock) -> None:
        """Run until nothing is in flight, taking up what comes meanwhile."""
        while True:
            with self._lock:
                waiting = self._waiting[:]
                self._waiting.clear()
                if not waiting and clock.idle:
                    self._clock = None
                    return
            for request in waiting:
                clock.add(*request)
            clock.step()
