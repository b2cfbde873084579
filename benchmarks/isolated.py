"""Runs many small tasks in worker processes that may die or hang: each such task gets a verdict, the others go on."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

Task = TypeVar("Task")
Answer = TypeVar("Answer")

_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Lost:
    """A task whose worker died or was stopped; `reason` says which."""

    reason: str


class _Worker(Generic[Task, Answer]):
    """One process and what it is doing."""

    def __init__(self, function: Callable[[Task], Answer]) -> None:
        ours, theirs = _SPAWN.Pipe()
        self.pipe: Connection = ours
        self.process: BaseProcess = _SPAWN.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.deadline = 0.0

    def give(self, task: Task, seconds: float) -> None:
        self.task = task
        self.deadline = time.monotonic() + seconds
        self.pipe.send(task)

    def stop(self) -> int | None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def _serve(pipe: Connection, function: Callable[[Task], Answer]) -> None:
    """Answer tasks until the pipe closes. What native code prints is not part of the answer."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(function(task))


def run_isolated(
    function: Callable[[Task], Answer], tasks: Sequence[Task], jobs: int, timeout: float
) -> Iterator[tuple[Task, Answer | Lost]]:
    """Yield (task, answer) as tasks finish; a task whose worker dies or needs over `timeout` seconds gives Lost.

    `function` must be importable and turn its own exceptions into answers.
    """
    waiting = list(reversed(tasks))
    workers: list[_Worker[Task, Answer]] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                worker: _Worker[Task, Answer] = _Worker(function)
                worker.give(waiting.pop(), timeout + 30.0)  # the first task also pays for the worker's imports
                workers.append(worker)
            soonest = min(worker.deadline for worker in workers)
            ready = wait([worker.pipe for worker in workers], max(0.0, soonest - time.monotonic()))
            now = time.monotonic()
            for worker in list(workers):
                task = worker.task
                assert task is not None
                if worker.pipe in ready:
                    try:
                        answer = worker.pipe.recv()
                    except EOFError:
                        workers.remove(worker)
                        worker.process.join()
                        yield task, Lost(f"the process died with status {worker.stop()}")
                        continue
                    if waiting:
                        worker.give(waiting.pop(), timeout)
                    else:
                        workers.remove(worker)
                        worker.stop()
                    yield task, answer
                elif now >= worker.deadline:
                    workers.remove(worker)
                    worker.stop()
                    yield task, Lost(f"no answer within {timeout:g} s")
    finally:
        for worker in workers:
            worker.stop()
