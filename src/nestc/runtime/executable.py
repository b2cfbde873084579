"""The public face of a compiled model: call it, save it, ask it where its time goes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from nestc.bundle.bundle import Bundle, TensorSpec
from nestc.bundle.dtypes import numpy_dtype
from nestc.errors import ShapeError, TargetError
from nestc.runtime.arrays import ready
from nestc.runtime.native import NativeProgram, Quick
from nestc.runtime.session import Batch, Direct, Last, OnFailure, Session, marks_to_timeline, run_of
from nestc.runtime.stages import Answer, Stage, total

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nestc.partition.plan import Plan

Shape = tuple[int, ...]
Respecialise = Callable[[Mapping[str, Shape]], "Executable"]

Item: TypeAlias = "np.ndarray | Sequence[np.ndarray] | Mapping[str, np.ndarray]"
"""A request: the only input, all inputs in graph order, or by name (outputs then come by name, too)."""


class Executable:
    """A compiled model, loaded. May be called from several threads at once.

    ``threads`` is the number of workers a native partition uses (default: what the bundle was compiled for).
    ``respecialise``, if given, is asked for another executable when a call comes with other shapes of the same rank.
    Code for another machine raises TargetError; with ``foreign`` it is kept, to be saved, and a call raises that error.
    Where a device fails a call raises TargetError; with ``on_failure`` "cpu" the CPU runs what the device should have,
    for which the bundle must have been compiled.

    `submit` and `map` keep several requests in flight, each on whatever device it needs next. Their arrays must not be
    changed before the results are there.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        respecialise: Respecialise | None = None,
        foreign: bool = False,
        on_failure: OnFailure = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise TargetError(f"a model runs on at least one thread, not {threads}")
        self.bundle = bundle
        self.threads = threads or max(1, bundle.threads)
        self._respecialise = respecialise
        begin = time.perf_counter()
        self._session: Session | None = None
        self._refusal: str | None = None  # why this machine cannot run the code
        try:
            self._session = Session(bundle, self.threads, on_failure)
        except TargetError as error:
            if not foreign:
                raise
            self._refusal = str(error)
        self._load_seconds = time.perf_counter() - begin
        self._specs = [_Wanted(spec) for spec in bundle.inputs]
        self._by_name = {spec.name: spec for spec in self._specs}
        self._outputs = [_Wanted(spec) for spec in bundle.outputs]
        self._none = [None] * len(self._outputs)
        self._single = len(self._outputs) == 1
        self._last: Last = Direct(())
        self._input_names = tuple(spec.name for spec in self._specs)
        self._output_names = tuple(spec.name for spec in self._outputs)
        self._quick, self._stage = self._shortcut()

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.bundle.name

    @property
    def inputs(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Element type and shape of every input, by name, in graph order."""
        return {spec.name: (spec.spec.dtype, _public(spec.spec.shape)) for spec in self._specs}

    @property
    def outputs(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Element type and shape of every output, by name; ``"?"`` stands for a size that only a run tells."""
        return {spec.name: (spec.spec.dtype, _public(spec.spec.shape)) for spec in self._outputs}

    @property
    def info(self) -> Mapping[str, Any]:
        """What the compiler noted: the plan, predictions, fallback operators."""
        return self.bundle.info

    @property
    def plan(self) -> Plan:
        """Regions, the device of each and why, transfers. Raises PlanError if the bundle was made without one."""
        from nestc.partition.plan import Plan

        return Plan.from_json(self.bundle.info.get("plan", {}))

    @property
    def fallback_ops(self) -> dict[str, int]:
        """Operators that run in an interpreter instead of generated code, and how many of each."""
        return dict(self.bundle.info.get("fallback_ops", {}))

    def __call__(
        self, *arrays: np.ndarray, out: np.ndarray | Sequence[np.ndarray] | Mapping[str, np.ndarray] | None = None
    ) -> Any:
        """Run on inputs in graph order; returns a new array, or a tuple of them if the model has several outputs.

        With `out` (an array, a sequence in graph order, or a dict by name) outputs are written there and returned.
        Raises ShapeError if an array does not fit.
        """
        if len(arrays) != len(self._specs):
            self._check_count(arrays)
        quick = self._quick
        if quick is not None and out is None:
            done = quick(arrays)
            if done is not None:
                results, seconds = done
                self._last = self._stage, seconds, None
                return results[0] if self._single else tuple(results)
        try:
            checked = [spec.input(array) for spec, array in zip(self._specs, arrays, strict=True)]
        except _OtherShape:
            return self._other([np.asarray(array) for array in arrays])(*arrays, out=out)
        results = self._run(checked, self._none if out is None else self._given(out))
        return results[0] if self._single else tuple(results)

    def run(
        self, inputs: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Run on inputs by name; returns the outputs by name. Raises ShapeError if a name or an array does not fit."""
        quick = self._quick
        if quick is not None and out is None and type(inputs) is dict and len(inputs) == len(self._input_names):
            try:
                done = quick([inputs[name] for name in self._input_names])
            except KeyError:
                done = None
            if done is not None:
                results, seconds = done
                self._last = self._stage, seconds, None
                return dict(zip(self._output_names, results, strict=True))
        results = self(*self._ordered(inputs), out=out)
        return dict(zip(self._output_names, (results,) if self._single else results, strict=True))

    def submit(self, *arrays: np.ndarray | Mapping[str, np.ndarray]) -> Future[Any]:
        """Run in the background: a future of what a call with these arrays returns.

        Instead of arrays one mapping by name may be given; its outputs come by name, as from `run`. Raises ShapeError
        at once if an array does not fit.
        """
        by_name = len(arrays) == 1 and isinstance(arrays[0], Mapping)
        given = arrays[0] if by_name else cast("tuple[np.ndarray, ...]", arrays)
        inputs, answer = self._request(given)
        try:
            checked = [spec.input(array) for spec, array in zip(self._specs, inputs, strict=True)]
        except _OtherShape:
            return self._other([np.asarray(array) for array in inputs]).submit(*arrays)
        future, self._last = self._open().submit(checked, answer)
        return future

    def map(self, iterable: Iterable[Item], in_flight: int = 4) -> Generator[Any, None, None]:
        """What a call returns for each item (the only input, or all inputs, in order or by name), in their order.

        Up to `in_flight` items are taken ahead of the results that have been asked for, and are at work at once. What a
        request raises is raised at its place, and ends it all; so does closing the generator.
        """
        if in_flight < 1:
            raise TargetError(f"at least one request is in flight, not {in_flight}")
        return self._map(iterable, in_flight)

    def timeline(self) -> list[dict[str, Any]]:
        """The last run: device, region (partition), start_us, end_us, kind (measured, modelled ...) and request.

        A run is a call, a `map`, or what was submitted from when nothing was in flight until nothing is any more. A
        tensor on its way is a row, too: its device is ``source->destination``, its region the tensor, with ``bytes``.
        Where the CPU ran what a failed device should have, ``instead_of`` names that.
        """
        return marks_to_timeline(list(run_of(self._last).marks))

    def throughput(self) -> dict[str, Any]:
        """Requests of the last run that are done, its seconds until the end of the timeline, and requests a second.

        ``kind`` is "modelled" as soon as a part of the timeline is not measured.
        """
        run = run_of(self._last)
        marks = list(run.marks)
        seconds = total(marks)
        return {
            "requests": run.requests,
            "seconds": seconds,
            "per_second": run.requests / seconds if seconds else 0.0,
            "kind": run.kind,
        }

    def energy(self) -> list[dict[str, Any]]:
        """The energy of the last run: for each device and link the joules and how they are known, or None.

        "modelled" is what the device's simulator says; "estimated" are the device's watts times its seconds; those of a
        link are of the kind that its figures are. Where no watts are stated ``joules`` and ``kind`` are None.
        """
        found: dict[tuple[str, str | None], float] = {}
        for mark in run_of(self._last).marks:
            key = mark.device, mark.joules_kind
            found[key] = found.get(key, 0.0) + (mark.joules or 0.0)
        return [
            {"device": device, "joules": None if kind is None else joules, "kind": kind}
            for (device, kind), joules in found.items()
        ]

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write the timeline as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing.

        Raises Error if the file cannot be written.
        """
        from nestc.runtime.trace import write_trace

        write_trace(self.timeline(), path, self.name)

    def profile(self, *arrays: np.ndarray, runs: int = 20) -> list[dict[str, Any]]:
        """Median time of every kernel call (see `runtime.native.StepTime`), and of other partitions as a whole.

        Where a time is modelled, the row says so (``kind``); a simulated device is run only once, since its time never
        varies. Without arguments inputs are drawn at random (floats normally distributed, integers 0).
        """
        session = self._open()
        drawn = list(arrays) or [spec.random(number) for number, spec in enumerate(self._specs)]
        checked = [spec.input(array) for spec, array in zip(self._specs, drawn, strict=True)]
        rows: list[dict[str, Any]] = []
        for stage, values in session.sources(checked):
            about = {"partition": stage.partition.name, "device": stage.partition.device}
            if isinstance(stage.runnable, NativeProgram):
                rows.extend({**about, **step._asdict()} for step in stage.runnable.profile(values, runs))
                continue
            about["symbol"] = stage.partition.artifact.kind
            elapsed = stage.runnable(values, [None] * len(stage.outputs))[1]
            if elapsed.kind == "modelled":
                rows.append({**about, "us": elapsed.seconds * 1e6, "kind": elapsed.kind})
                continue
            again = [stage.runnable(values, [None] * len(stage.outputs))[1].seconds for _ in range(runs - 1)]
            rows.append({**about, "us": float(np.median([elapsed.seconds, *again])) * 1e6})
        return rows

    def stats(self) -> dict[str, Any]:
        """Sizes in bytes, threads, number of partitions and kernel calls, and the seconds that loading took.

        ``code_bytes``: machine code, and instructions of other devices; ``device_bytes``: memory of other devices, with
        the weights that lie there.
        """
        if self._refusal is None:
            self._open()
        parts = [part.artifact for part in self.bundle.partitions]
        native = [part.metadata for part in parts if part.kind == "cpu-native"]
        code = [blob for part in parts for name, blob in part.files.items() if name.endswith((".o", ".bin"))]
        return {
            "threads": self.threads,
            "partitions": len(self.bundle.partitions),
            "kernel_calls": sum(len(part["steps"]) for part in native),
            "barriers": sum(bool(step["barrier"]) for part in native for step in part["steps"]),
            "arena_bytes": sum(part["arena_bytes"] for part in native),
            "code_bytes": sum(map(len, code)),
            "device_bytes": sum(part.metadata.get("dram_bytes", 0) for part in parts),
            "weights_bytes": sum(array.nbytes for part in parts for array in part.weights.values()),
            "load_seconds": self._load_seconds,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as a bundle. Raises BundleError if it cannot be written."""
        from nestc.bundle.write import write

        write(path, self.bundle)

    def close(self) -> None:
        """Stop the workers and free code and memory; later calls raise TargetError. Closing twice is fine."""
        session, self._session, self._refusal, self._quick = self._session, None, None, None
        if session is not None:
            session.close()

    def __enter__(self) -> Executable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._session is None else f"{len(self.bundle.partitions)} partitions"
        state = "not for this machine" if self._refusal else state
        return f"<nestc.Executable {self.name!r}, {state}, {self.threads} threads>"

    def _shortcut(self) -> tuple[Quick | None, Stage]:
        """How a call is made where nothing is unusual, and the stage that then runs; None if there is no such way."""
        found = None if self._session is None else self._session.quick(self.bundle.inputs)
        return found or (None, cast("Stage", None))

    def _open(self) -> Session:
        if self._session is None:
            raise TargetError(self._refusal or "this executable is closed")
        return self._session

    def _run(self, inputs: list[np.ndarray], outputs: Sequence[np.ndarray | None]) -> Sequence[np.ndarray]:
        session = self._open()
        if outputs is self._none:
            results, self._last = session.run(inputs, outputs)
            return results
        given = cast("Sequence[np.ndarray]", outputs)
        # Kernels need contiguous outputs that no input overlaps; anything else gets its values from a copy.
        direct = [_writable_in_place(array, inputs) for array in given]
        results, self._last = session.run(
            inputs, [array if fits else None for array, fits in zip(given, direct, strict=True)]
        )
        for array, fits, result in zip(given, direct, results, strict=True):
            if not fits:
                array[...] = result
        return given

    def _map(self, iterable: Iterable[Item], in_flight: int) -> Generator[Any, None, None]:
        batch = self._open().batch()
        self._last = batch
        waiting: deque[Callable[[], Any]] = deque()
        items = iter(iterable)
        more = True
        try:
            while more or waiting:
                try:
                    while more and len(waiting) < in_flight:
                        waiting.append(self._admitted(batch, next(items)))
                except StopIteration:
                    more = False
                except Exception:  # of the items, or since one does not fit: those before it come first
                    while waiting:
                        yield waiting.popleft()()
                    raise
                if waiting:
                    yield waiting.popleft()()
        finally:
            batch.cancel()

    def _admitted(self, batch: Batch, item: Item) -> Callable[[], Any]:
        """Begin a request of `map`; calling the result waits for it."""
        inputs, answer = self._request(item)
        try:
            checked = [spec.input(array) for spec, array in zip(self._specs, inputs, strict=True)]
        except _OtherShape:  # such as the last, smaller batch of samples; it runs on a timeline of its own
            other = self._other([np.asarray(array) for array in inputs])
            return lambda: next(other.map([item], 1))
        future = batch.add(checked, self._none, answer)
        return lambda: batch.wait(future)

    def _request(self, item: Item) -> tuple[list[np.ndarray], Answer]:
        """The inputs of a request in graph order, and what makes of the outputs the answer in the item's form."""
        if isinstance(item, Mapping):
            return self._ordered(item), self._by_output
        inputs = list(item) if isinstance(item, list | tuple) else [np.asarray(item)]
        self._check_count(inputs)
        return inputs, self._plain

    def _by_output(self, results: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return {spec.name: result for spec, result in zip(self._outputs, results, strict=True)}

    def _plain(self, results: Sequence[np.ndarray]) -> Any:
        return results[0] if self._single else tuple(results)

    def _ordered(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Inputs given by name in graph order. Raises ShapeError if a name does not fit."""
        unknown = next((name for name in inputs if name not in self._by_name), None)
        missing = next((name for name in self._by_name if name not in inputs), None)
        if unknown is not None or missing is not None:
            problem = f"there is no input {unknown!r}" if unknown is not None else f"input {missing!r} is missing"
            raise ShapeError(f"{problem}; the inputs are {', '.join(self._by_name) or 'none'}")
        return [inputs[spec.name] for spec in self._specs]

    def _check_count(self, arrays: Sequence[np.ndarray]) -> None:
        for array in arrays:
            if isinstance(array, Mapping):
                raise _by_name(array)
        if len(arrays) != len(self._specs):
            wanted = ", ".join(spec.name for spec in self._specs) or "none"
            raise ShapeError(f"the model has {len(self._specs)} inputs ({wanted}), but {len(arrays)} were given")

    def _given(self, out: np.ndarray | Sequence[np.ndarray] | Mapping[str, np.ndarray]) -> list[np.ndarray]:
        names = [spec.name for spec in self._outputs]
        if isinstance(out, Mapping):
            if set(out) != set(names):
                raise ShapeError(f"out= has {', '.join(out) or 'nothing'}, but the outputs are {', '.join(names)}")
            arrays = [out[name] for name in names]
        else:
            arrays = [out] if isinstance(out, np.ndarray) else list(out)
        if len(arrays) != len(names):
            raise ShapeError(f"out= has {len(arrays)} arrays, but the outputs are {', '.join(names)}")
        return [spec.output(array) for spec, array in zip(self._outputs, arrays, strict=True)]

    def _other(self, arrays: Sequence[np.ndarray]) -> Executable:
        """The executable for other shapes; raises ShapeError if that is not possible."""
        wrong = next(
            (spec, array) for spec, array in zip(self._specs, arrays, strict=True) if not spec.fits(array.shape)
        )
        for spec, array in zip(self._specs, arrays, strict=True):
            if array.dtype != spec.dtype or array.ndim != len(spec.shape):
                raise spec.error(array)
        if self._respecialise is None:
            raise wrong[0].error(wrong[1])
        return self._respecialise({spec.name: array.shape for spec, array in zip(self._specs, arrays, strict=True)})


class _OtherShape(Exception):
    """An input has another shape than the model was compiled for; decided by the caller."""


class _Wanted:
    """What an input or output must be."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.dtype = numpy_dtype(spec.dtype)
        self.shape = spec.shape or ()
        self.fixed = spec.shape is not None and None not in spec.shape

    def input(self, array: np.ndarray) -> np.ndarray:
        """`array`, or a copy that native code can read. Raises ShapeError, or _OtherShape if only the shape differs."""
        if type(array) is not np.ndarray:
            if isinstance(array, Mapping):
                raise _by_name(array)
            array = np.asarray(array)
        if array.shape != self.shape and not self.fits(array.shape):
            raise _OtherShape
        if array.dtype is not self.dtype and array.dtype != self.dtype:
            raise self.error(array)
        return ready(array)

    def output(self, array: object) -> np.ndarray:
        """`array` if it can take this output. Raises ShapeError."""
        if not isinstance(array, np.ndarray):
            raise ShapeError(f"out= for {self.name!r} must be an array, not {type(array).__name__}")
        if array.dtype != self.dtype or not self.fits(array.shape):
            raise self.error(array, "output")
        if not array.flags.writeable:
            raise ShapeError(f"out= for {self.name!r} is read-only")
        return array

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an array of `shape` is what is wanted, as far as that is known."""
        if self.spec.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            wanted is None or wanted == size for wanted, size in zip(self.shape, shape, strict=True)
        )

    def error(self, array: np.ndarray, what: str = "input") -> ShapeError:
        """The sentence that says what was wanted and what came."""
        return ShapeError(
            f"{what} {self.name!r} must be {self.spec.dtype}{_shown(self.spec.shape)}, "
            f"but is {array.dtype}{_shown(array.shape)}"
        )

    def random(self, seed: int) -> np.ndarray:
        """Random values for a profile."""
        if not self.fixed:
            raise ShapeError(f"input {self.name!r} has no fixed shape; give profile() the inputs")
        if self.dtype.kind in "fV":
            return np.random.default_rng(seed).standard_normal(cast(Shape, self.shape)).astype(self.dtype)
        return np.zeros(cast(Shape, self.shape), self.dtype)


def _by_name(inputs: Mapping[Any, Any]) -> ShapeError:
    """What a call answers that gets inputs by name."""
    names = ", ".join(f"{name!r}: array" for name in inputs) or "name: array"
    return ShapeError(f"a call takes arrays in graph order; inputs by name go to exe.run({{{names}}})")


def _writable_in_place(array: np.ndarray, inputs: Sequence[np.ndarray]) -> bool:
    flags = array.flags
    return bool(flags.c_contiguous and flags.aligned) and not any(np.may_share_memory(array, item) for item in inputs)


def _public(shape: tuple[int | None, ...] | None) -> tuple[int | str, ...]:
    return ("?",) if shape is None else tuple("?" if size is None else size for size in shape)


def _shown(shape: Sequence[int | None] | None) -> str:
    if shape is None:
        return ""
    return "[" + ",".join("?" if size is None else str(size) for size in shape) + "]"
