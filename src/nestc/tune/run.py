"""Tuning the regions of a partition: the ones that take the most time first, for as long as there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nestc.errors import TargetError
from nestc.evict import evicting
from nestc.graph.region import Region
from nestc.kernels.families import alternatives
from nestc.partition.draw import CannotDraw, draw
from nestc.partition.measure import PROFILE_RUNS, attribute
from nestc.partition.sizes import constant_bytes
from nestc.runtime.native import NativeProgram
from nestc.targets.api import Partition
from nestc.targets.cpu.cost import flops
from nestc.targets.cpu.cost import seconds as modelled
from nestc.targets.cpu.target import CpuTarget
from nestc.tune.key import code_version, machine_key
from nestc.tune.search import Found, search, unknown
from nestc.tune.store import ChoiceStore, Times, export, fastest
from nestc.tune.task import Task, distinct, portable

Progress = Callable[[str, float], None]
"""Is told what is measured now, and which part of the time or the work is done."""

Runner = Callable[[Sequence[Task], float], Iterator[Found]]
"""Searches tasks, in their order, for so many seconds, and gives each result as soon as it is there."""


@dataclass(frozen=True)
class Row:
    """One region of the network, or several of one geometry.

    ``default`` is the way that is taken without measurements, ``best`` the one that is taken now, ``before`` the one
    that was taken when the tuning began; ``network_seconds`` is what all such regions took in the network then.
    ``default_seconds`` and ``best_seconds`` are of one such region alone, measured side by side; of the network where
    nothing was measured. ``done``: whether all that seems worth it was.
    """

    key: str
    region: str
    shape: str
    count: int
    default: str
    best: str
    before: str
    network_seconds: float
    default_seconds: float
    best_seconds: float
    times: Times
    done: bool

    def predicted(self, way: str) -> float:
        """Seconds that all such regions take in the network if they are computed in that way."""
        if way not in self.times or self.before not in self.times:
            return self.network_seconds
        return self.network_seconds * (self.times[way] / self.times[self.before])


@dataclass(frozen=True)
class Report:
    """What is known of a network's regions after tuning, those that take longest first.

    ``network_seconds``: the sum of its kernels' times, measured as it was compiled before this tuning. ``left``: names
    of regions that the time was too short for.
    """

    machine: str
    threads: int
    network_seconds: float
    rows: Sequence[Row]
    left: Sequence[str] = field(default=())

    @property
    def default_seconds(self) -> float:
        """What the network takes without any tuning: predicted, if it had been tuned before."""
        return self.network_seconds + sum(row.predicted(row.default) - row.network_seconds for row in self.rows)

    @property
    def predicted_seconds(self) -> float:
        """What the network takes with what is known now."""
        return self.network_seconds + sum(row.predicted(row.best) - row.network_seconds for row in self.rows)


def tune(
    target: CpuTarget,
    partitions: Sequence[Partition],
    seconds: float,
    *,
    store: ChoiceStore | None = None,
    runner: Runner | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure the ways to compute what is in some partitions of one network, and keep the results in the store.

    It takes about so many ``seconds``, and what is known by then is kept. Regions of which everything is known are not
    measured, unless `again`. Raises TargetError where the target's code does not run on this machine.
    """
    begin = time.monotonic()
    kept, tell = store or ChoiceStore(), progress or _silent
    tell("time the network", 0.0)
    tasks, total = network_tasks(target, partitions)
    known = {task.key: kept.get(task.key, target.cpu, target.threads) for task in tasks}
    waiting = [task for task in tasks if again or unknown(task, target.cpu, known[task.key])]
    names = {task.key: task.region.name for task in tasks}
    finished: set[str] = set()
    for number, found in enumerate((runner or one_by_one)(waiting, seconds - (time.monotonic() - begin))):
        if found.times:
            kept.put(found.key, target.cpu, target.threads, found.times)
        if found.done:
            finished.add(found.key)
        part = max((number + 1) / len(waiting), (time.monotonic() - begin) / seconds)
        tell(f"measured {names[found.key]}", min(1.0, part))
    tell("done", 1.0)
    left = {task.key: task.region.name for task in waiting if task.key not in finished}
    now = {task.key: kept.get(task.key, target.cpu, target.threads) for task in tasks}
    rows = [_row(task, target, now[task.key], task.key not in left) for task in tasks]
    return Report(machine_key(target.cpu), target.threads, total, rows, tuple(left.values()))


def one_by_one(tasks: Sequence[Task], seconds: float) -> Iterator[Found]:
    """Search in this process."""
    end = time.monotonic() + seconds
    for task in tasks:
        if time.monotonic() >= end:
            return
        yield search(task, lambda: end - time.monotonic())


def network_tasks(target: CpuTarget, partitions: Sequence[Partition]) -> tuple[list[Task], float]:
    """A task for each geometry that can be computed in several ways, those that take most time first; and the seconds
    that all kernels of the network take."""
    kernels = [each for partition in partitions for each in target.kernels(partition)]
    regions, turns = [action.region for action, _ in kernels], {action.region.name: count for action, count in kernels}
    weights: dict[str, float] = {}
    for partition in partitions:
        weights |= _region_seconds(target, partition)
    borders = {action.region.name: action.layouts for action, _ in kernels}
    network = constant_bytes([region for partition in partitions for region in partition.regions])
    tasks = [
        Task(
            key=key,
            region=portable(same[0]),
            borders=borders[same[0].name],
            arch=target.arch,
            machine=machine_key(target.cpu),
            code=code_version(),
            threads=target.threads,
            exact=target.exact,
            evicted=evicting(network - constant_bytes(same[:1])),
            count=sum(turns[region.name] for region in same),
            weight=sum(weights[region.name] for region in same),
        )
        for key, same in distinct(regions, target.cpu, target.exact).items()
    ]
    return sorted(tasks, key=lambda task: -task.weight), sum(weights.values())


def _region_seconds(target: CpuTarget, partition: Partition) -> dict[str, float]:
    """What each region takes in its partition, with all threads; modelled where the partition cannot be run alone."""
    program = target.open().load(target.compile(partition), target.threads)
    try:
        inputs, _ = draw(partition)
        assert isinstance(program, NativeProgram)
        shares = attribute(program.profile(inputs, PROFILE_RUNS), partition.regions)
    except (CannotDraw, TargetError):
        shares = tuple(modelled(region) for region in partition.regions)
    finally:
        program.close()
    return {region.name: share for region, share in zip(partition.regions, shares, strict=True)}


def _row(task: Task, target: CpuTarget, times: Times, done: bool) -> Row:
    names = [family.name for family in alternatives(task.region, target.cpu, task.exact)]
    names += [name for name in times if name not in names]
    default, best = names[0], names[fastest(names, times)]
    alone = task.weight / task.count
    taken = target.way(task.region)
    assert taken is not None
    return Row(
        key=task.key,
        region=task.region.name,
        shape=shape_text(task.region),
        count=task.count,
        default=default,
        best=best,
        before=taken.name,
        network_seconds=task.weight,
        default_seconds=times.get(default, alone),
        best_seconds=times.get(best, alone),
        times=times,
        done=done,
    )


def shape_text(region: Region) -> str:
    """The shapes of the first two operands of a region's heaviest operator: ``1x64x56x56 * 64x64x3x3``."""
    op = max(region.ops, key=lambda op: flops(op, region))
    return " * ".join("x".join(map(str, region.types[name].shape)) for name in op.inputs[:2] if name in region.types)


def _silent(what: str, fraction: float) -> None:
    """Progress that nobody watches."""


def as_json(report: Report) -> Mapping[str, object]:
    """The report as JSON has it; times in milliseconds."""
    return {
        "machine": report.machine,
        "threads": report.threads,
        "network_ms": 1e3 * report.network_seconds,
        "default_ms": 1e3 * report.default_seconds,
        "predicted_ms": 1e3 * report.predicted_seconds,
        "regions": [
            {
                "region": row.region,
                "shape": row.shape,
                "count": row.count,
                "network_ms": 1e3 * row.network_seconds,
                "default": row.default,
                "best": row.best,
                "default_ms": 1e3 * row.default_seconds,
                "best_ms": 1e3 * row.best_seconds,
                "ways_ms": {name: 1e3 * value for name, value in row.times.items()},
                "done": row.done,
            }
            for row in report.rows
        ],
        "left": list(report.left),
    }


def exported(report: Report, target: CpuTarget, path: Path) -> int:
    """Add the choices of a report that pay to a file of defaults; how many they are. Raises Error (see `export`)."""
    return export(path, {row.key: row.times for row in report.rows}, target.cpu, target.threads)
