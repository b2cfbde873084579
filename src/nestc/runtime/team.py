"""The workers of a native program: threads that stay in native code, asleep between runs, and stop without fail."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.arrays import address, aligned_empty
from nestc.runtime.objects import NativeFunctions

_STOP_SECONDS = 10.0

# Threads of all teams of this process that run now. More of them than processors would only put each other aside in the
# middle of a chunk that others wait for, so whoever comes when there is no room left does without help.
_gate = threading.Lock()
_running = 0

# How often a worker looks before it sleeps. One look takes 10 to 45 ns on x86; in a run others are busy on its behalf,
# so it looks longer (about 100 us) than between runs (about 50 us), where its core should soon be free for other work.
_RUN_SPINS, _IDLE_SPINS = 4000, 2000


class ContextLayout(NamedTuple):
    """Sizes and places in the context that all workers share, in bytes, as `codegen.main` has put them down."""

    bytes: int
    thread_bytes: int
    threads: int
    trace: int
    spins: int


class Team:
    """`threads` workers, of which the caller of `run` is the first; the others are started by the first run.

    The threads refer to the code and the context but not to the team, so a team that nobody refers to any more is
    stopped by its finalizer, as it is when the interpreter exits.
    """

    def __init__(self, functions: NativeFunctions, layout: ContextLayout, threads: int) -> None:
        self._lock = threading.Lock()
        self._functions = functions
        self._layout = layout
        self._threads = threads
        self._process = 0
        self._closed = False
        self._context = np.empty(0, np.uint8)
        self._cpus = usable_cpus()
        self._workers: list[threading.Thread] = []
        self._caller_cpu = -1
        self._stop: weakref.finalize[[NativeFunctions, np.ndarray, list[threading.Thread]], Team] | None = None

    def run(self, table: int) -> None:
        """Run the program once with the pointer table at address `table`.

        The caller's thread does it alone while another call has the workers, or where programs that run now leave
        them no processor. May be called from several threads at once.
        """
        global _running
        if self._closed:
            raise TargetError("this executable is closed")
        with _gate:
            together = _running == 0 or _running + self._threads <= self._cpus
            together = together and self._lock.acquire(blocking=False)
            mine = self._threads if together else 1
            _running += mine
        try:
            if together:
                self._ready()
                self._apart()
                self._functions.run(address(self._context), table)
            else:
                self._functions.main(table, 0, 0, 1)
        finally:
            if together:
                self._lock.release()
            with _gate:
                _running -= mine

    def trace(self, table: int, steps: int) -> np.ndarray:
        """Run once and return nanoseconds [threads, steps, 2]: begin and end of each worker's share of each step."""
        with self._lock:
            return self._traced(table, steps)

    def _traced(self, table: int, steps: int) -> np.ndarray:
        self._ready()
        self._apart()
        times = np.zeros((self._threads, steps, 2), np.int64)
        pointer = self._context[self._layout.trace : self._layout.trace + 8].view(np.uintp)
        pointer[0] = address(times)
        try:
            self._functions.run(address(self._context), table)
        finally:
            pointer[0] = 0
        return times

    def close(self) -> None:
        """Stop the workers and wait for them, after the run in progress; the team may not run again."""
        with self._lock:
            self._closed = True
            if self._stop is not None:
                self._stop()

    def _ready(self) -> None:
        """Start the workers for the first run, and for the first in a forked child, where no thread has followed."""
        if self._closed:
            raise TargetError("this executable is closed")
        if self._process == os.getpid():
            return
        if self._stop is not None:
            self._stop.detach()
        self._context = aligned_empty(
            [self._layout.bytes + self._threads * self._layout.thread_bytes], np.dtype(np.uint8)
        )
        self._context[:] = 0
        self._context[self._layout.threads : self._layout.threads + 8].view(np.int64)[0] = self._threads
        if self._threads <= usable_cpus():  # else whoever spins keeps the one that it waits for from running
            spins = self._context[self._layout.spins : self._layout.spins + 16].view(np.int64)
            spins[:] = _RUN_SPINS, _IDLE_SPINS
        workers = [
            threading.Thread(target=_work, args=(self._functions, self._context, tid), name=f"nestc-{tid}", daemon=True)
            for tid in range(1, self._threads)
        ]
        self._stop = weakref.finalize(self, _stop, self._functions, self._context, workers)
        for worker in workers:
            worker.start()
        self._workers = workers
        self._caller_cpu = -1
        self._process = os.getpid()

    def _apart(self) -> None:
        """Keep the workers off the processor that the caller is on.

        A system that packs threads wakes them where they were woken from; there they wait until the caller is put
        aside, which the caller's work makes late.
        """
        if _current_cpu is None or self._threads > self._cpus:
            return
        cpu = _current_cpu()
        if cpu == self._caller_cpu:
            return
        others = os.sched_getaffinity(0) - {cpu}
        if len(others) < self._threads - 1:  # the caller is held where it is, and has left them no room
            return
        for worker in self._workers:
            if worker.native_id is not None:
                with suppress(OSError):  # where that is not allowed, they are only slower
                    os.sched_setaffinity(worker.native_id, others)
        self._caller_cpu = cpu


def _sched_getcpu() -> Callable[[], int] | None:
    """The system's function that says on which processor a thread runs, where threads can be placed (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    try:
        return ctypes.CDLL(None).sched_getcpu
    except AttributeError:  # a C library without it
        return None


_current_cpu = _sched_getcpu()


def usable_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _work(functions: NativeFunctions, context: np.ndarray, tid: int) -> None:
    functions.worker(address(context), tid)


def _stop(functions: NativeFunctions, context: np.ndarray, workers: list[threading.Thread]) -> None:
    functions.stop(address(context))
    for worker in workers:
        if worker is not threading.current_thread():
            worker.join(_STOP_SECONDS)
