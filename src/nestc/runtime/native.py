"""The device "cpu": runs artifacts of kind ``cpu-native``, made by `codegen.main`, in this process."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from nestc.bundle.artifact import Artifact, Elapsed
from nestc.bundle.dtypes import numpy_dtype
from nestc.bundle.schema import TensorSpec
from nestc.errors import BundleError, TargetError
from nestc.runtime import cpu, objects
from nestc.runtime.arrays import ALIGNMENT, address, aligned, aligned_empty
from nestc.runtime.team import ContextLayout, Team

KIND = "cpu-native"
LAYOUT_VERSION = 1
"""The one version of table, context and metadata that this runtime reads (`codegen.main` writes it)."""

Quick: TypeAlias = "Callable[[Sequence[np.ndarray]], tuple[list[np.ndarray], float] | None]"
"""Runs a program on its inputs: the outputs, in new arrays, and the seconds that it took; None: `NativeProgram` has to
look at the inputs more closely."""

_READABLE = 0x0001 | 0x0100
"""NPY_ARRAY_C_CONTIGUOUS and NPY_ARRAY_ALIGNED of numpy's C API: native code can read the array as it is."""

SMALL_BYTES = 4096
"""Outputs up to here need not be aligned: what vectors across cache lines cost is less than a microsecond."""


class StepTime(NamedTuple):
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
            self._makers = [_maker(tuple(item["shape"]), numpy_dtype(item["dtype"])) for item in metadata["outputs"]]
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
        results = [make() if array is None else array for array, make in zip(outputs, self._makers, strict=True)]
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
            functions.main(*frame.arguments)
            seconds = time.perf_counter() - begin
        else:
            begin = time.perf_counter()
            team.run(frame.address)
            seconds = time.perf_counter() - begin
        self._frames.append(frame)
        return results, Elapsed(seconds, "measured")

    def quick(self, inputs: Sequence[TensorSpec], takes: Sequence[int], gives: Sequence[int]) -> Quick:
        """What a call does where nothing is unusual, with as little Python as that takes.

        It gets arrays for `inputs`, of fixed shapes, all of which it checks; the program takes those numbered `takes`,
        in its order, and its outputs are those numbered `gives` among the results. The code stays in memory as long as
        the function.
        """
        functions, team = self._functions, self._team
        if functions is None:
            raise TargetError("this executable is closed")
        # What the program does not take goes to the spare place at the end of the table.
        slots = [takes.index(number) if number in takes else -1 for number in range(len(inputs))]
        wanted = [(slot, numpy_dtype(spec.dtype), spec.shape) for slot, spec in zip(slots, inputs, strict=True)]
        order = [gives.index(number) for number in range(len(self.outputs))]
        makers, places = [self._makers[number] for number in order], [len(self.inputs) + number for number in order]
        take, put, main = self._take, self._frames.append, functions.main
        ndarray, now = np.ndarray, time.perf_counter

        def call(arrays: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float] | None:
            frame = take()
            table = frame.table
            for (slot, dtype, shape), array in zip(wanted, arrays, strict=True):
                if type(array) is not ndarray or array.dtype is not dtype or array.shape != shape:
                    put(frame)
                    return None
                if array.flags.num & _READABLE != _READABLE:
                    put(frame)
                    return None
                table[slot] = address(array)
            try:
                results = [make() for make in makers]
            except MemoryError:  # the other way says so in words
                put(frame)
                return None
            for slot, array in zip(places, results, strict=True):
                table[slot] = address(array)
            begin = now()
            if team is None:
                main(*frame.arguments)
            else:
                team.run(frame.address)
            seconds = now() - begin
            put(frame)
            return results, seconds

        return call

    def profile(self, inputs: Sequence[np.ndarray], runs: int) -> list[StepTime]:
        """Run `runs` times each way and return the median time of every kernel call."""
        functions = self._functions
        if functions is None:
            raise TargetError("this executable is closed")
        results = [make() for make in self._makers]
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
        # The last place is spare: nobody reads it.
        pointers = [0] * border + [address(array) for array in (*constants, self._arena, self._scratch)] + [0]
        self.table = (ctypes.c_void_p * len(pointers))(*pointers)
        self.address = ctypes.addressof(self.table)
        # Of `main` with one worker; made here, since ctypes takes longer to make them of numbers than to call.
        self.arguments = ctypes.c_void_p(self.address), ctypes.c_void_p(0), ctypes.c_int64(0), ctypes.c_int64(1)


def _span(trace: np.ndarray) -> np.ndarray:
    """Nanoseconds from the earliest begin to the latest end of each step, over the workers that took a real share."""
    begin, end = trace[:, :, 0], trace[:, :, 1]
    busy = end - begin
    real = busy * 20 >= busy.max(axis=0, keepdims=True)
    return np.where(real, end, 0).max(axis=0) - np.where(real, begin, np.iinfo(np.int64).max).min(axis=0)


def _maker(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Callable[[], np.ndarray]:
    """Makes an output; of a small one nobody notices that it is not aligned, but the time that takes."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes <= SMALL_BYTES:
        return partial(np.empty, shape, dtype)

    def make() -> np.ndarray:  # as `aligned_empty`, with what it works out at hand
        block = np.empty(nbytes + ALIGNMENT, np.uint8)
        return np.ndarray(shape, dtype, block, -address(block) % ALIGNMENT)

    return make


def _nbytes(item: Mapping[str, Any]) -> int:
    return math.prod(item["shape"]) * numpy_dtype(item["dtype"]).itemsize


def _spec(item: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(item["name"], item["dtype"], tuple(item["shape"]))
