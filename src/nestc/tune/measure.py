"""Measuring ways to compute a region: compiled as programs of their own, run in turns, as cold as in the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nestc.bundle.artifact import Artifact, Program
from nestc.bundle.dtypes import numpy_dtype
from nestc.errors import Error, TargetError
from nestc.evict import evict
from nestc.host import available_cpus
from nestc.kernels.api import PLAIN, Family, to_layout
from nestc.partition.draw import draw
from nestc.runtime.arrays import aligned, aligned_empty
from nestc.targets.api import Partition
from nestc.targets.cpu.target import CpuTarget, no_model
from nestc.tune.key import code_version, machine_key
from nestc.tune.task import Task, ways

LEAST_SECONDS = 1e-9
"""A measured time is never zero, though the clock may not see it."""

LOOK, SLOW = 4, 1.4
"""After so many rounds, ways that take so many times what the fastest one takes are not run again."""


@dataclass
class _Ready:
    """A compiled way with its inputs (what it reads, and what is copied there before every run) and outputs."""

    name: str
    program: Program
    inputs: list[np.ndarray]
    sources: list[np.ndarray]
    outputs: list[np.ndarray]

    def run(self, evicted: int) -> float:
        """Run once after other data; the inputs are as fresh in the caches as the kernel before has left them, and so
        is the memory of the outputs, which the network uses over and over."""
        evict(evicted)
        for place in self.outputs:
            place.fill(0)
        for place, source in zip(self.inputs, self.sources, strict=True):
            np.copyto(place, source)
        return max(LEAST_SECONDS, self.program(self.inputs, self.outputs)[1].seconds)


def time_ways(task: Task, names: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of so many runs of each way, taken in turns; of slow ones only the first `LOOK`.

    A way that cannot be compiled is left out. Raises TargetError where this machine is none of the task's kind.
    """
    target = _target(task)
    with ExitStack() as stack:
        ready = [_load(task, target, *each, stack) for each in _compiled(task, target, names)]
        for each in ready:
            each.run(0)
        times: dict[str, list[float]] = {each.name: [] for each in ready}
        turn = list(ready)
        for number in range(rounds):
            if number == LOOK:
                turn = _promising(turn, times, keep=names[0])
            for each in turn:
                times[each.name].append(each.run(task.evicted))
            turn = turn[1:] + turn[:1]  # nobody always follows the same one
    return times


def fingerprint() -> tuple[str, str]:
    """What two machines must have in common to measure for each other: their kind, and the code of nestc."""
    return machine_key(_here("native", 1, False).cpu), code_version()


def _promising(turn: list[_Ready], times: Mapping[str, Sequence[float]], keep: str) -> list[_Ready]:
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    limit = SLOW * min(medians.values())
    return [each for each in turn if each.name == keep or medians[each.name] <= limit]


@lru_cache(maxsize=8)
def _here(arch: str, threads: int, exact: bool) -> CpuTarget:
    return CpuTarget(arch, threads, exact=exact)


def _target(task: Task) -> CpuTarget:
    target = _here(task.arch, task.threads, task.exact)
    here = (machine_key(target.cpu), code_version())
    if here != (task.machine, task.code):
        raise TargetError(f"this machine ({', '.join(here)}) cannot measure for {task.machine}, {task.code}")
    return target


def _compiled(task: Task, target: CpuTarget, names: Sequence[str]) -> list[tuple[str, Artifact]]:
    """The programs of the ways that lower the region, compiled on all cores."""

    def compile_one(item: tuple[str, Family]) -> tuple[str, Artifact] | None:
        try:
            return item[0], target.compile_alone(task.region, item[1], task.borders)
        except Error:
            return None  # a way that does not work here after all is no candidate

    with ThreadPoolExecutor(available_cpus()) as pool:
        done = pool.map(compile_one, ways(task.region, target.cpu, task.exact, names).items())
        return [each for each in done if each is not None]


def _load(task: Task, target: CpuTarget, name: str, artifact: Artifact, stack: ExitStack) -> _Ready:
    program = target.open().load(artifact, task.threads)
    stack.callback(program.close)
    region = task.region
    plain = Partition("alone", target.name, (region,), region.inputs, region.outputs, region.types, no_model)
    layouts = [task.borders.get(value, PLAIN) for value in region.inputs]
    sources = [aligned(to_layout(array, layout)) for array, layout in zip(draw(plain)[0], layouts, strict=True)]
    inputs = [aligned_empty(array.shape, array.dtype) for array in sources]
    outputs = [aligned_empty(item["shape"], numpy_dtype(item["dtype"])) for item in artifact.metadata["outputs"]]
    return _Ready(name, program, inputs, sources, outputs)
