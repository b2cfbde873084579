"""A loaded bundle: its programs in order, and the values that pass between them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nestc.bundle.artifact import Program
from nestc.bundle.bundle import Bundle, BundlePartition
from nestc.bundle.dtypes import numpy_dtype
from nestc.errors import BundleError, TargetError
from nestc.runtime.arrays import ready
from nestc.runtime.devices import device_for


@dataclass(frozen=True)
class _Stage:
    partition: BundlePartition
    program: Program
    outputs: tuple[str, ...]
    dead: tuple[str, ...]  # values that no later partition needs


Mark = tuple[str, str, float, float, str]
"""Device, partition, begin and end (seconds since the call began), measured or modelled.

Where a partition runs on a simulator, its end is modelled and what follows begins there: the time that the simulator
itself takes is left out.
"""


class Session:
    """Runs partitions one after another. Raises BundleError if their borders do not fit together."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._inputs = tuple(spec.name for spec in bundle.inputs)
        self._outputs = tuple(spec.name for spec in bundle.outputs)
        dead = _last_uses(bundle)
        programs: list[Program] = []
        try:
            for partition in bundle.partitions:
                programs.append(device_for(partition.artifact.kind).load(partition.artifact, threads))
        except BaseException:
            for program in programs:
                program.close()
            raise
        self.stages = tuple(
            _Stage(partition, program, tuple(spec.name for spec in partition.outputs), gone)
            for partition, program, gone in zip(bundle.partitions, programs, dead, strict=True)
        )
        whole = len(self.stages) == 1 and self.stages[0].outputs == self._outputs
        # Most bundles are one partition whose border is the graph's: nothing to pass on then.
        self._only = self.stages[0] if whole and bundle.partitions[0].inputs == self._inputs else None

    def run(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], tuple[Mark, ...]]:
        """Run once. Where an output is given it is written, else it is allocated."""
        only = self._only
        if only is not None:
            begin = time.perf_counter()
            results, elapsed = only.program(inputs, outputs)
            end = time.perf_counter() - begin
            begin = max(0.0, end - elapsed.seconds) if elapsed.kind == "measured" else 0.0
            mark = (only.partition.device, only.partition.name, begin, begin + elapsed.seconds, elapsed.kind)
            return results, (mark,)
        return self._run_all(inputs, outputs)

    def close(self) -> None:
        """Close every program."""
        for stage in self.stages:
            stage.program.close()

    def _run_all(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], tuple[Mark, ...]]:
        start = time.perf_counter()
        simulating = 0.0  # seconds that simulators took beyond what they modelled; they are no part of the timeline
        values: dict[str, np.ndarray] = dict(zip(self._inputs, inputs, strict=True))
        wanted: Mapping[str, np.ndarray | None] = dict(zip(self._outputs, outputs, strict=True))
        marks: list[Mark] = []
        for stage in self.stages:
            begin = time.perf_counter() - start - simulating
            results, elapsed = stage.program(
                [values[name] for name in stage.partition.inputs], [wanted.get(name) for name in stage.outputs]
            )
            end = begin + elapsed.seconds
            marks.append((stage.partition.device, stage.partition.name, begin, end, elapsed.kind))
            if elapsed.kind == "modelled":
                simulating = time.perf_counter() - start - end
            values.update(_checked(stage, results))
            for name in stage.dead:
                del values[name]
        return [self._output(name, values[name], given) for name, given in wanted.items()], tuple(marks)

    def _output(self, name: str, value: np.ndarray, given: np.ndarray | None) -> np.ndarray:
        if given is None:
            # What is an input of the graph too is copied: the caller owns every output that he gets.
            return value.copy() if name in self._inputs else value
        if given is not value:
            given[...] = value
        return given

    def sources(self, inputs: Sequence[np.ndarray]) -> list[tuple[_Stage, list[np.ndarray]]]:
        """Every stage with the inputs it gets in a run (for profiles)."""
        values: dict[str, np.ndarray] = dict(zip(self._inputs, inputs, strict=True))
        found: list[tuple[_Stage, list[np.ndarray]]] = []
        for stage in self.stages:
            arguments = [values[name] for name in stage.partition.inputs]
            found.append((stage, arguments))
            results, _ = stage.program(arguments, [None] * len(stage.outputs))
            values.update(_checked(stage, results))
        return found


def _checked(stage: _Stage, results: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Results by name, as native code may read them. Raises TargetError if they are not what the bundle promises.

    The next partition trusts shapes and types, and would read beyond an array that is too small.
    """
    values: dict[str, np.ndarray] = {}
    for spec, result in zip(stage.partition.outputs, results, strict=True):
        array = ready(np.asarray(result))
        fits = spec.shape is None or (
            len(spec.shape) == array.ndim
            and all(size is None or size == found for size, found in zip(spec.shape, array.shape, strict=True))
        )
        if array.dtype != numpy_dtype(spec.dtype) or not fits:
            raise TargetError(
                f"partition {stage.partition.name} on {stage.partition.device} gave {spec.name!r} as "
                f"{array.dtype}{list(array.shape)}, not {spec.dtype}{list(spec.shape or ())}"
            )
        values[spec.name] = array
    return values


def _last_uses(bundle: Bundle) -> list[tuple[str, ...]]:
    """For each partition the values that are dead after it. Raises BundleError if a value is used before it exists."""
    known = {spec.name for spec in bundle.inputs}
    last: dict[str, int] = {}
    for number, partition in enumerate(bundle.partitions):
        for name in partition.inputs:
            if name not in known:
                raise BundleError(f"partition {partition.name} needs {name!r}, which no earlier partition computes")
            last[name] = number
        for spec in partition.outputs:
            known.add(spec.name)
            last[spec.name] = number
    kept = {spec.name for spec in bundle.outputs}
    missing = next((name for name in sorted(kept) if name not in known), None)
    if missing is not None:
        raise BundleError(f"output {missing!r} is computed by no partition")
    return [
        tuple(name for name, use in last.items() if use == number and name not in kept)
        for number in range(len(bundle.partitions))
    ]


def modelled_ms(timeline: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of a timeline that are modelled, by device; empty where everything was measured."""
    found: dict[str, float] = {}
    for mark in timeline:
        if mark["kind"] == "modelled":
            found[mark["device"]] = found.get(mark["device"], 0.0) + (mark["end_us"] - mark["start_us"]) / 1e3
    return found


def marks_to_timeline(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """The contract's timeline: times in microseconds since the call began."""
    return [
        {"device": device, "region": region, "start_us": begin * 1e6, "end_us": end * 1e6, "kind": kind}
        for device, region, begin, end, kind in marks
    ]
