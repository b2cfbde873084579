"""Worker threads, one a resource, for bundles all of whose times are measured: the wall clock says what ran when."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np

from nestc.bundle.schema import Kind
from nestc.errors import TargetError
from nestc.runtime.stages import CLOSED, Answer, Flow, Mark, Stage, Values, stage_mark, warn

Results: TypeAlias = "Future[Any]"
"""The graph's outputs as a list, or what the request's `Answer` makes of them."""

Task: TypeAlias = Callable[[], None]

CANCELLED = "the request was cancelled"

_STOP_SECONDS = 10.0


class Lanes:
    """Named daemon threads, each with a queue of tasks that it runs in order; they end with the object or by `stop`.

    A queued task keeps alive what it needs; an idle thread keeps nothing alive.
    """

    def __init__(self, names: Iterable[str], closed: threading.Event) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._stopped = False
        self._queues: dict[str, SimpleQueue[Task | None]] = {name: SimpleQueue() for name in names}
        self._threads = [
            threading.Thread(target=_work, args=(queue,), name=f"nestc-{name}", daemon=True)
            for name, queue in self._queues.items()
        ]
        self._finalizer = weakref.finalize(self, _abandon, closed, list(self._queues.values()), self._threads)
        for thread in self._threads:
            thread.start()

    def put(self, name: str, task: Task) -> bool:
        """Queue a task; False if the threads were stopped."""
        with self._lock:
            if not self._stopped:
                self._queues[name].put(task)
            return not self._stopped

    def forget(self) -> None:
        """Leave the threads alone, which are the parent's in a forked process."""
        self._finalizer.detach()

    def inside(self) -> bool:
        """Whether the caller is one of these threads."""
        return threading.current_thread() in self._threads

    def stop(self) -> None:
        """Let the threads end after what is queued, and wait for them."""
        with self._lock:
            self._stopped = True
            self._finalizer.detach()
            for queue in self._queues.values():
                queue.put(None)
        _join(self._threads, None)


class _Request:
    """A request in flight; ``queued`` counts its tasks that are in queues or run now."""

    def __init__(self, flow: Flow, number: int, values: Values, future: Results) -> None:
        self.number = number
        self.values = values
        self.future = future
        self.here = set(flow.inputs)
        self.next = dict.fromkeys(flow.queues, 0)
        self.left = len(flow.stages)
        self.queued = 0
        self.begun = False
        self.error: Exception | None = None


class Wall:
    """Requests that run at once on the workers; time 0 is when this was made. Safe to use from several threads."""

    kind: Kind = "measured"

    def __init__(self, flow: Flow, lanes: Lanes, closed: threading.Event) -> None:
        self.marks: list[Mark] = []
        self.requests = 0
        self._flow = flow
        self._lanes = lanes
        self._closed = closed
        self._start = time.perf_counter()
        self._lock = threading.Lock()
        self._active: set[_Request] = set()
        self._count = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._active

    def add(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None], answer: Answer | None = None
    ) -> Results:
        """A request more; its stages are queued as soon as what they need is there."""
        with self._lock:
            request = _Request(self._flow, self._count, Values(self._flow, inputs, outputs, answer), Future())
            self._count += 1
            self._active.add(request)
            self._queue_ready(request)
            ended = not request.queued
        if ended:
            self._resolve(request)
        return request.future

    def wait(self, future: Results) -> Any:
        """The results of a request, or what it raised."""
        return future.result()

    def cancel(self) -> None:
        """Drop what is in flight, and wait for the stages that run now."""
        with self._lock:
            requests = list(self._active)
            for request in requests:
                request.error = request.error or TargetError(CANCELLED)
        wait([request.future for request in requests])

    def _queue_ready(self, request: _Request) -> None:
        """Queue what can run now: in the order of the bundle on each resource. The lock is held."""
        for resource, queue in self._flow.queues.items():
            while request.error is None and request.next[resource] < len(queue):
                stage = self._flow.stages[queue[request.next[resource]]]
                if not request.here.issuperset(stage.partition.inputs):
                    break
                request.next[resource] += 1
                self._queue(request, stage, resource, on_cpu=False)

    def _queue(self, request: _Request, stage: Stage, resource: str, on_cpu: bool) -> None:
        request.queued += 1
        if self._closed.is_set() or not self._lanes.put(resource, partial(self._task, request, stage, on_cpu)):
            request.queued -= 1
            request.error = TargetError(CLOSED)

    def _task(self, request: _Request, stage: Stage, on_cpu: bool) -> None:
        """What a worker does with a stage."""
        if self._may_run(request):
            try:
                self._run(request, stage, on_cpu)
            except TargetError as error:
                self._failed(request, stage, error, on_cpu)
        with self._lock:
            request.queued -= 1
            self._queue_ready(request)
            ended = not request.queued
        if ended:
            self._resolve(request)

    def _may_run(self, request: _Request) -> bool:
        with self._lock:
            if self._closed.is_set():
                request.error = request.error or TargetError(CLOSED)
            if request.error is None and not request.begun:
                request.begun = True
                if not request.future.set_running_or_notify_cancel():
                    request.error = TargetError(CANCELLED)
            return request.error is None

    def _run(self, request: _Request, stage: Stage, on_cpu: bool) -> None:
        if stage.program is None and not on_cpu:
            raise TargetError(f"{stage.partition.device} could not be opened")
        begin = time.perf_counter() - self._start
        seconds, kind = request.values.run(stage, on_cpu)
        mark = stage_mark(stage, begin, begin + seconds, kind, request.number, self._flow.cpu if on_cpu else None)
        with self._lock:
            self.marks.append(mark)
            request.here.update(stage.outputs)
            request.left -= 1
            request.values.release(stage)

    def _failed(self, request: _Request, stage: Stage, error: Exception, on_cpu: bool) -> None:
        with self._lock:
            if stage.fallback is None or on_cpu or request.error is not None:
                request.error = request.error or error
                return
            self._queue(request, stage, self._flow.cpu.resource, on_cpu=True)
        warn(self._flow, stage, error)

    def _resolve(self, request: _Request) -> None:
        """Give the future what it waits for, once nothing of the request runs any more."""
        if request.error is None:
            try:
                results = request.values.results()
            except ValueError as error:  # an array given for an output does not take the value
                request.error = error
            else:
                with self._lock:
                    self._active.discard(request)
                    self.requests += 1
                request.future.set_result(results)
                return
        with self._lock:
            self._active.discard(request)
        if request.begun or request.future.set_running_or_notify_cancel():
            if not request.future.cancelled():
                request.future.set_exception(request.error)


class Workers:
    """One worker a resource, shared by all that is in flight."""

    def __init__(self, flow: Flow, closed: threading.Event) -> None:
        self.lanes = Lanes(flow.queues, closed)
        self._flow = flow
        self._closed = closed
        self._lock = threading.Lock()
        self._burst: Wall | None = None

    def batch(self) -> Wall:
        """A timeline of its own for requests to come."""
        return Wall(self._flow, self.lanes, self._closed)

    def submit(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None], answer: Answer | None = None
    ) -> tuple[Results, Wall]:
        """A request, on the timeline of those that are in flight, or on a new one if there are none."""
        with self._lock:
            if self._burst is None or self._burst.idle:
                self._burst = self.batch()
            return self._burst.add(inputs, outputs, answer), self._burst


def _work(queue: SimpleQueue[Task | None]) -> None:
    while True:
        task = queue.get()
        if task is None:
            return
        task()
        del task  # else an idle thread would keep alive what it last worked for


def _abandon(
    closed: threading.Event, queues: Sequence[SimpleQueue[Task | None]], threads: Sequence[threading.Thread]
) -> None:
    """End threads that nobody refers to any more, or when the interpreter exits."""
    closed.set()
    for queue in queues:
        queue.put(None)
    _join(threads, _STOP_SECONDS)


def _join(threads: Sequence[threading.Thread], seconds: float | None) -> None:
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(seconds)
