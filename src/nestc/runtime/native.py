"""The device "cpu": runs artifacts of kind ``cpu-native``, made by `codegen.main`, in this process."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nestc.bundle.artifact import Artifact, Elapsed
from nestc.bundle.dtypes import numpy_dtype
from nestc.bundle.schema import TensorSpec
from nestc.errors import BundleError, TargetError
from nestc.runtime import cpu, objects
from nestc.runtime.arrays import address, aligned, aligned_empty
from nestc.runtime.team import ContextLayout, Team

KIND = "cpu-native"
LAYOUT_VERSION = 1
"""The one version of table, context and metadata that this runtime reads (`codegen.main` writes it)."""

SMALL_BYTES = 4096
"""Outputs up to here need not be aligned: what vectors across cache lines cost is less than a microsecond."""


@dataclass(frozen=True)
class StepTime:
    """Measured time of one kernel call, medians over some runs, in microseconds.

    ``us`` is on one thread; ``team_us`` is from the first worker's begin to the last one's end with all threads
    (None with one thread). ``origin`` names the ONNX nodes.
    """

    step: int
    symbol: str
    origin: tuple[str, ...]
    extent: int
    grain: int
    parallel: bool
    barrier: bool
    cost_us: float
    us: float
    team_us: float | None


class CpuDevice:
    """Loads native code for the CPU that this process runs on."""

    name = "cpu"

    def load(self, artifact: Artifact, threads: int) -> NativeProgram:
        """Link an artifact. Raises TargetError if this CPU cannot run it, BundleError if it is not well formed."""
        return NativeProgram(artifact, threads)


class NativeProgram:
    """A linked partition. May be called from several threads: each call has an arena of its own, and one of them at a
    time has the workers (see `Team.run`)."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        metadata = artifact.metadata
        try:
            if metadata["layout"] != LAYOUT_VERSION:
                raise BundleError(f"native code of layout {metadata['layout']} needs another nestc than this one")
            cpu.check(metadata["triple"], metadata["cpu"], metadata["features"])
            self.inputs = tuple(_spec(item) for item in metadata["inputs"])
            self.outputs = tuple(_spec(item) for item in metadata["outputs"])
            self._outputs = [
                (tuple(item["shape"]), numpy_dtype(item["dtype"]), _maker(_nbytes(item)))
                for item in metadata["outputs"]
            ]
            self._border_bytes = [_nbytes(item) for item in (*metadata["inputs"], *metadata["outputs"])]
            constants = [np.asarray(artifact.weights[name]) for name in metadata["constants"]]
            self._arena_bytes: int = metadata["arena_bytes"]
            self._scratch_bytes: int = metadata["scratch_bytes"]
            self._steps: Sequence[Mapping[str, Any]] = metadata["steps"]
            layout = ContextLayout(**metadata["context"])
            prefix: str = metadata["prefix"]
            wanted = threads if metadata["worth_threads"] else 1
        except (KeyError, TypeError) as error:
            raise BundleError(f"the metadata of native code is not complete: {error}") from error
        self.threads = max(1, wanted)
        # Kernels may rely on aligned constants. Those of a bundle are, so nothing is copied.
        self._constants = [aligned(array) for array in constants]
        code = [blob for name, blob in artifact.files.items() if name.endswith(".o")]
        self._functions: objects.NativeFunctions | None = objects.load(code, prefix)
        self._team = Team(self._functions, layout, self.threads) if self.threads > 1 else None
        self._frames: list[_Frame] = []

    def __call__(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Elapsed]:
        functions = self._functions
        if functions is None:
            raise TargetError("this executable is closed")
        results = [
            make(shape, dtype) if array is None else array
            for array, (shape, dtype, make) in zip(outputs, self._outputs, strict=True)
        ]
        frame = self._take()
        table = frame.table
        for slot, array in enumerate((*inputs, *results)):
            # Kernels trust their shapes. A value whose shape only a run tells comes here unchecked.
            if array.nbytes != self._border_bytes[slot]:
                self._frames.append(frame)
                raise self._wrong_size(slot, array)
            table[slot] = address(array)
        team = self._team
        if team is None:
            begin = time.perf_counter()
            functions.main(frame.address, 0, 0, 1)
            seconds = time.perf_counter() - begin
        else:
            begin = time.perf_counter()
            team.run(frame.address)
            seconds = time.perf_counter() - begin
        self._frames.append(frame)
        return results, Elapsed(seconds, "measured")

    def profile(self, inputs: Sequence[np.ndarray], runs: int) -> list[StepTime]:
        """Run `runs` times each way and return the median time of every kernel call."""
        functions = self._functions
        if functions is None:
            raise TargetError("this executable is closed")
        results = [make(shape, dtype) for shape, dtype, make in self._outputs]
        frame = self._take()
        for slot, array in enumerate((*inputs, *results)):
            frame.table[slot] = address(array)
        alone = np.zeros((runs, len(self._steps)), np.int64)
        for row in alone:
            functions.profile(frame.address, address(row))
        together: np.ndarray | None = None
        if self._team is not None:
            traces = [self._team.trace(frame.address, len(self._steps)) for _ in range(runs)]
            # A serial step is run by one worker; the others pass it in no time, before or after.
            together = np.median([_span(trace) for trace in traces], axis=0) / 1e3
        self._frames.append(frame)
        medians = np.median(alone, axis=0) / 1e3
        return [
            StepTime(
                step=number,
                symbol=step["symbol"],
                origin=tuple(step["origin"]),
                extent=step["extent"],
                grain=step["grain"],
                parallel=step["parallel"],
                barrier=step["barrier"],
                cost_us=step["cost"] * 1e6,
                us=float(medians[number]),
                team_us=None if together is None else float(together[number]),
            )
            for number, step in enumerate(self._steps)
        ]

    def close(self) -> None:
        """Stop the workers and let go of the code and memory; calls that still run finish first."""
        team, self._team, self._functions = self._team, None, None
        if team is not None:
            team.close()
        self._frames.clear()

    def _wrong_size(self, slot: int, array: np.ndarray) -> TargetError:
        spec = (*self.inputs, *self.outputs)[slot]
        wanted, found = list(spec.shape or ()), list(array.shape)
        return TargetError(
            f"native code was compiled for {spec.name!r} as {spec.dtype}{wanted}, not {array.dtype}{found}"
        )

    def _take(self) -> _Frame:
        """A frame that no other call uses now."""
        try:
            return self._frames.pop()
        except IndexError:
            slots = len(self.inputs) + len(self.outputs)
            return _Frame(slots, self._constants, self._arena_bytes, self._scratch_bytes * self.threads)


class _Frame:
    """What one call needs for itself: the pointer table, the arena and the scratch memory of all workers."""

    def __init__(self, border: int, constants: Sequence[np.ndarray], arena_bytes: int, scratch_bytes: int) -> None:
        byte = np.dtype(np.uint8)
        self._arena = aligned_empty([arena_bytes], byte)
        self._scratch = aligned_empty([scratch_bytes], byte)
        pointers = [0] * border + [address(array) for array in (*constants, self._arena, self._scratch)]
        self.table = (ctypes.c_void_p * len(pointers))(*pointers)
        self.address = ctypes.addressof(self.table)


def _span(trace: np.ndarray) -> np.ndarray:
    """Nanoseconds from the earliest begin to the latest end of each step, over the workers that took a real share."""
    begin, end = trace[:, :, 0], trace[:, :, 1]
    busy = end - begin
    real = busy * 20 >= busy.max(axis=0, keepdims=True)
    return np.where(real, end, 0).max(axis=0) - np.where(real, begin, np.iinfo(np.int64).max).min(axis=0)


def _maker(nbytes: int) -> Callable[[Sequence[int], np.dtype[Any]], np.ndarray]:
    """Makes an output; of a small one nobody notices that it is not aligned, but the time that takes."""
    return np.empty if nbytes <= SMALL_BYTES else aligned_empty


def _nbytes(item: Mapping[str, Any]) -> int:
    return math.prod(item["shape"]) * numpy_dtype(item["dtype"]).itemsize


def _spec(item: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(item["name"], item["dtype"], tuple(item["shape"]))
