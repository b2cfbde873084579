"""Measuring on the workers of a Dask cluster: machines of the same kind; each result is sent back when it is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nestc.errors import TargetError
from nestc.tune.measure import fingerprint
from nestc.tune.run import Runner
from nestc.tune.search import Found, search
from nestc.tune.task import Task

CONNECT_SECONDS = 10.0
"""How long a scheduler may take to answer."""

GRACE_SECONDS = 5.0
"""After the time is up, so long is waited for what workers have measured by then."""

AHEAD = 1
"""Tasks that wait at the scheduler, so that no worker waits for one."""

RETRIES = 3
"""How often a task is tried on another worker after one has failed; Dask itself hands on what a lost worker had."""

_one_at_a_time = threading.Lock()


@contextmanager
def connected(address: str) -> Iterator[Runner]:
    """A runner that searches on the workers of the scheduler at `address`, of which there may be more or fewer later.

    Raises TargetError if Dask is not installed, nobody answers, or a worker's machine or nestc is of another kind than
    here, since what it measures would say nothing of this one.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise TargetError("--cluster needs Dask, which is not installed: pip install 'nestc[cluster]'") from error
    try:
        client: Any = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise TargetError(f"no Dask scheduler answers at {address}; start one with `dask scheduler`") from error
    with client:
        require_same_kind(_ask(client, address), address)
        yield lambda tasks, seconds: on_workers(client, tasks, seconds)


def _ask(client: Any, address: str) -> Mapping[str, tuple[str, str]]:
    """The fingerprints of all workers, by their addresses."""
    try:
        return client.run(fingerprint)
    except (ImportError, AttributeError) as error:
        raise TargetError(
            f"a worker of {address} does not have this nestc ({error}); install the same there"
        ) from error


def require_same_kind(workers: Mapping[str, tuple[str, str]], address: str) -> None:
    """Raise TargetError unless there are workers and all their fingerprints are that of this machine."""
    if not workers:
        raise TargetError(f"the scheduler at {address} has no workers; start some with `dask worker {address}`")
    machine, code = fingerprint()
    for worker, (other, its_code) in sorted(workers.items()):
        if other != machine:
            raise TargetError(
                f"worker {worker} is a machine of another kind ({other}) than this one ({machine}): what it measures "
                "says nothing of this one; leave it out of the cluster"
            )
        if its_code != code:
            raise TargetError(
                f"worker {worker} has another nestc ({its_code}) than is here ({code}); install the same there"
            )


def on_workers(client: Any, tasks: Sequence[Task], seconds: float) -> Iterator[Found]:
    """Search on all workers at once; those that come to join take part, and those that are lost cost what they had not
    sent yet, which others do again. What cannot be done at all is left out."""
    from distributed import as_completed

    end = time.monotonic() + seconds
    waiting = list(tasks)
    done: Any = as_completed(loop=client.loop, timeout=seconds + GRACE_SECONDS, raise_errors=False)
    futures: list[Any] = []

    def submit() -> None:
        """Hand out as much as keeps every worker busy; what starts late has to end early."""
        left = end - time.monotonic()
        busy = sum(1 for future in futures if future.status == "pending")
        for _ in range(len(client.scheduler_info()["workers"]) + AHEAD - busy):
            if waiting and left > 0:
                futures.append(client.submit(search_here, waiting.pop(0), left, pure=False, retries=RETRIES))
                done.add(futures[-1])

    submit()
    try:
        for future in done:
            if future.status == "finished":
                yield future.result()
            submit()
    except TimeoutError:
        return
    finally:
        client.cancel(futures)


def search_here(task: Task, seconds: float) -> Found:
    """What a worker runs: one search at a time, however many threads it has."""
    with _one_at_a_time:
        end = time.monotonic() + seconds
        return search(task, lambda: end - time.monotonic())
