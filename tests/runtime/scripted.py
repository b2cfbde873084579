"""Devices that do what a test tells them: bundles of stages with given times, so that schedules can be worked out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from nestc.bundle.artifact import Artifact, Elapsed
from nestc.bundle.bundle import Bundle, BundlePartition, DeviceSpec, TensorSpec
from nestc.runtime import devices, stages

MODELLED, MEASURED = "scripted-modelled", "scripted-measured"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the scripted devices known."""
    for kind in (MODELLED, MEASURED):
        monkeypatch.setitem(devices._OWN, kind, ("scripted", "ScriptedDevice"))  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(stages, "_MEASURED", stages._MEASURED | {MEASURED})  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(stages, "_IN_PLACE", stages._IN_PLACE | {MEASURED})  # pyright: ignore[reportPrivateUsage]


class ScriptedDevice:
    """Runs artifacts of the scripted kinds."""

    name = "scripted"

    def load(self, artifact: Artifact, threads: int) -> ScriptedProgram:
        return ScriptedProgram(artifact)


class ScriptedProgram:
    """Each output is three times the sum of the inputs' first elements, plus its own number; a hook comes before."""

    def __init__(self, artifact: Artifact) -> None:
        self.about = artifact.metadata
        self.closed = False
        if self.about.get("missing"):
            raise self.about["missing"]

    def __call__(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Elapsed]:
        assert not self.closed
        if self.about["do"] is not None:
            self.about["do"]()
        total = 3 * sum(int(array.flat[0]) for array in inputs)
        results = [np.full(size, total + number, np.int64) for number, size in enumerate(self.about["sizes"])]
        for number, given in enumerate(outputs):
            if given is not None:
                given[...] = results[number]
                results[number] = given
        timing = self.about.get("timing")
        if timing is None:
            return results, Elapsed(0.0, "measured")
        return results, Elapsed(timing["seconds"], "modelled")

    def close(self) -> None:
        self.closed = True


def part(
    name: str,
    device: str,
    inputs: str,
    outputs: str,
    seconds: float | None = None,
    *,
    do: Callable[[], None] | None = None,
    joules: float | None = None,
    sizes: Sequence[int] | None = None,
    spare: Artifact | None = None,
    **about: Any,
) -> BundlePartition:
    """A partition with the values of these names (apart by blanks), int64 of `sizes` elements (2 unless told).

    With `seconds` its times are modelled, else measured.
    """
    names = outputs.split()
    lengths = tuple(sizes or [2] * len(names))
    metadata: dict[str, Any] = {"do": do, "sizes": lengths, **about}
    if seconds is not None:
        metadata["timing"] = {"seconds": seconds} | ({} if joules is None else {"energy_joules": joules})
    artifact = Artifact(MEASURED if seconds is None else MODELLED, {}, {}, metadata)
    specs = tuple(TensorSpec(each, "int64", (size,)) for each, size in zip(names, lengths, strict=True))
    return BundlePartition(name, device, tuple(inputs.split()), specs, artifact, (), spare)


def bundle(
    parts: Sequence[BundlePartition], outputs: str, known: Sequence[DeviceSpec] = (), inputs: str = "x"
) -> Bundle:
    """A bundle of partitions; graph inputs are int64 of 2 elements."""
    given = tuple(TensorSpec(name, "int64", (2,)) for name in inputs.split())
    specs = {spec.name: spec for spec in (*given, *(spec for each in parts for spec in each.outputs))}
    return Bundle(
        "scripted",
        given,
        tuple(specs[name] for name in outputs.split()),
        tuple(parts),
        devices=tuple(known),
    )


def x(value: int = 1) -> np.ndarray:
    """A graph input."""
    return np.full(2, value, np.int64)


def sleeping(seconds: float) -> Callable[[], None]:
    """A hook that takes that long."""
    return lambda: time.sleep(seconds)


def spans(timeline: Sequence[dict[str, Any]]) -> list[tuple[str, int, float, float]]:
    """Region, request, begin and end in seconds of each row."""
    return [(row["region"], row["request"], row["start_us"] / 1e6, row["end_us"] / 1e6) for row in timeline]
