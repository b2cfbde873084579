"""Measurements on workers of a Dask cluster: the same search, machines of one kind, and a lost worker loses nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nestc.errors import TargetError
from nestc.targets.api import Partition
from nestc.targets.cpu.target import CpuTarget
from nestc.tune import cluster as clusters
from nestc.tune.cluster import connected, require_same_kind
from nestc.tune.measure import fingerprint
from nestc.tune.run import network_tasks
from nestc.tune.search import Found
from nestc.tune.store import ChoiceStore

Parts = Callable[[Path, CpuTarget], Sequence[Partition]]


@pytest.fixture
def local(cache: Path) -> Iterator[Any]:
    """A cluster of two worker processes of one thread each, which share the test's cache folder."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster


def test_a_killed_worker_loses_no_result(local: Any, net: Path, partitions: Parts) -> None:
    target = CpuTarget(threads=1)
    tasks, _ = network_tasks(target, partitions(net, target))
    found: list[Found] = []
    with connected(local.scheduler_address) as runner:
        assert list(runner(tasks, 0.0)) == [] and list(runner([], 10.0)) == []  # nothing to do, or no time for it
        for each in runner(tasks * 2, 120.0):
            found.append(each)
            if len(found) == 1:
                os.kill(next(iter(local.workers.values())).pid, signal.SIGKILL)
    assert sorted(each.key for each in found) == sorted(task.key for task in tasks * 2)
    assert all(each.done and len(each.times) > 2 for each in found)


def test_the_command_measures_on_a_cluster(local: Any, net: Path, nestc: Callable[..., Any]) -> None:
    result = nestc("tune", net, "--threads", 1, "--seconds", 60, "--cluster", local.scheduler_address, "--json")
    assert result.status == 0, result.err
    kept = ChoiceStore().own(CpuTarget(threads=1).cpu, 1)
    assert len(kept) == 2 and all(len(times) > 2 for times in kept.values())


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(clusters, "CONNECT_SECONDS", 0.3)
    with (
        pytest.raises(TargetError, match="no Dask scheduler answers at tcp://127.0.0.1:1"),
        connected("tcp://127.0.0.1:1"),
    ):
        pass
    with pytest.raises(TargetError, match="no Dask scheduler answers at nonsense"), connected("nonsense"):
        pass


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(TargetError, match=r"pip install 'nestc\[cluster\]'"), connected("tcp://127.0.0.1:1"):
        pass


def test_workers_have_to_be_of_this_kind() -> None:
    machine, code = fingerprint()
    require_same_kind({"a": (machine, code), "b": (machine, code)}, "tcp://s")
    with pytest.raises(TargetError, match="worker b is a machine of another kind"):
        require_same_kind({"a": (machine, code), "b": ("other", code)}, "tcp://s")
    with pytest.raises(TargetError, match="worker a has another nestc"):
        require_same_kind({"a": (machine, "0.0")}, "tcp://s")
    with pytest.raises(TargetError, match="has no workers"):
        require_same_kind({}, "tcp://s")
