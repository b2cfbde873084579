"""Loaded partitions as stages: on which device each runs, how one is run, and the values that pass between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from nestc.bundle.artifact import Elapsed, Program
from nestc.bundle.bundle import Bundle, BundlePartition, DeviceSpec
from nestc.bundle.dtypes import numpy_dtype
from nestc.bundle.schema import Kind, TensorSpec
from nestc.errors import BundleError, TargetError
from nestc.evict import evict, evicting
from nestc.runtime.arrays import aligned_empty, ready
from nestc.runtime.devices import device_for

if TYPE_CHECKING:
    import logging

CALLS = 7
"""Calls of a measured stage beside simulators: these run long, and meanwhile the caches fill with other things and the
system finds that it is somebody else's turn, which no real device would bring about."""

LONG_SECONDS = 0.05
"""Calls that have taken so long together are enough."""

HOST = "host memory"
"""Stands for the place of graph inputs and outputs where a tensor crosses to or from it."""

CPU = "cpu"
"""The device, and the resource, of fallbacks."""

CLOSED = "this executable is closed"
"""What a call of it is told."""

CPU_KINDS = frozenset(("cpu-native", "host-onnx"))
"""Kinds of artifacts that need nothing but the CPU and nestc."""

_MEASURED = CPU_KINDS | {"onnxruntime", "openvino"}
_MODELLED = frozenset(("aim", "vta"))

# These compute straight into an array that they are given; others would have to copy what they have computed.
_IN_PLACE = frozenset(("cpu-native", "onnxruntime", "openvino"))

_CERTAINTY: tuple[Kind, ...] = ("measured", "modelled", "estimated")


Answer: TypeAlias = Callable[[list[np.ndarray]], Any]
"""Makes of the graph's outputs, in order, what whoever made the request gets."""


class Mark(NamedTuple):
    """Something on the timeline: a partition on its device, or a tensor (``bytes`` is not None) on a link.

    ``begin`` and ``end`` are seconds since the run began. ``joules`` is None where nothing is known of them.
    ``instead_of`` names the device that failed, where a fallback ran.
    """

    device: str
    region: str
    begin: float
    end: float
    kind: Kind
    request: int = 0
    bytes: int | None = None
    joules: float | None = None
    joules_kind: Kind | None = None
    instead_of: str = ""


@dataclass(frozen=True, eq=False)
class Stage:
    """A loaded partition. ``program`` is None where the device cannot be opened, so that `fallback` always runs."""

    number: int
    partition: BundlePartition
    device: DeviceSpec
    program: Program | None
    fallback: Program | None
    outputs: tuple[str, ...]
    joules: float | None
    """Modelled energy of a run; None if the artifact does not tell."""
    trusted: bool
    """Our own native code: results are in the arrays given or in new ones, of the types that it was compiled for."""
    beside: int = 0
    """Bytes of constants that other stages of the same resource read between two runs of this one."""

    @property
    def runnable(self) -> Program:
        """What runs it: its device, or the fallback where that cannot be opened."""
        program = self.program or self.fallback
        assert program is not None
        return program

    def close(self) -> None:
        """Close its programs."""
        for program in (self.program, self.fallback):
            if program is not None:
                program.close()


@dataclass(frozen=True, eq=False)
class Flow:
    """All stages in execution order, and how values flow between them.

    ``uses``: how many stages take a value, and one more for a graph output, which is never dead. ``queues``: the
    stages of each resource in order. ``destinations``: by value, the devices whose stages take it. ``buffered``: shapes
    and types of values that only pass between stages, whose memory is used again. ``own``: values that are views of
    nothing. ``modelled``: by stage, whether its times are modelled; None: only a run tells.
    """

    stages: tuple[Stage, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    uses: Mapping[str, int]
    queues: Mapping[str, tuple[int, ...]]
    destinations: Mapping[str, tuple[DeviceSpec, ...]]
    cpu: DeviceSpec
    modelled: list[bool | None]
    buffered: Mapping[str, TensorSpec]
    own: frozenset[str]
    spare: dict[str, list[np.ndarray]] = field(default_factory=dict[str, list[np.ndarray]])
    warned: set[int] = field(default_factory=set[int])

    def close(self) -> None:
        """Close every program."""
        for stage in self.stages:
            stage.close()
        self.spare.clear()


class Values:
    """The values of one request, each kept until its last user has run."""

    def __init__(
        self,
        flow: Flow,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray | None],
        answer: Answer | None = None,
    ) -> None:
        self._flow = flow
        self._answer = answer
        self._arrays: dict[str, np.ndarray] = dict(zip(flow.inputs, inputs, strict=True))
        self._wanted: Mapping[str, np.ndarray | None] = dict(zip(flow.outputs, outputs, strict=True))
        self._left = dict(flow.uses)
        self._lent: dict[str, np.ndarray] = {}  # memory of the flow that nothing but the value itself uses

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def run(self, stage: Stage, on_cpu: bool = False, steady: bool = False) -> tuple[float, Kind]:
        """Run a stage, or its fallback, whose inputs are all here; returns its seconds and how they are known.

        Measured seconds are those of the whole call; `steady`: the median of `CALLS` after one that warms up (of fewer
        where these take long). Raises TargetError if the device fails, whatever it raised.
        """
        program = stage.fallback if on_cpu else stage.program
        assert program is not None
        try:
            inputs = [self._arrays[name] for name in stage.partition.inputs]
            places = [self._place(stage, name) for name in stage.outputs]
            again = CALLS if steady and (on_cpu or self._flow.modelled[stage.number] is False) else 0
            results, elapsed, seconds = _timed(program, inputs, places)
            if again:
                results, elapsed, seconds = _steady(program, inputs, places, again, stage.beside)
            if stage.trusted:
                self._arrays.update(zip(stage.outputs, results, strict=True))
                return seconds, "measured"
            found = checked(stage, results)
        except Exception as error:  # a device may raise anything
            raise failure(stage, error, on_cpu) from error
        self._keep_apart(stage, found, places)
        self._arrays.update(found)
        if not on_cpu:
            self._flow.modelled[stage.number] = elapsed.kind == "modelled"
        return (elapsed.seconds if elapsed.kind == "modelled" else seconds), elapsed.kind

    def release(self, stage: Stage) -> None:
        """Let go of what no later stage needs, now that `stage` has run. One thread at a time."""
        for name in (*stage.partition.inputs, *stage.outputs):
            self._left[name] -= 1
            if self._left[name] > 0:
                continue
            self._arrays.pop(name, None)
            lent = self._lent.pop(name, None)
            if lent is not None:
                self._flow.spare.setdefault(name, []).append(lent)

    def results(self) -> Any:
        """The graph's outputs, in the arrays given for them where there are any; or what `answer` makes of them."""
        found = [self._output(name, given) for name, given in self._wanted.items()]
        return found if self._answer is None else self._answer(found)

    def _place(self, stage: Stage, name: str) -> np.ndarray | None:
        """The array given for a graph output, memory used before for a value in between, or None."""
        spec = self._flow.buffered.get(name)
        if spec is None or stage.partition.artifact.kind not in _IN_PLACE:
            return self._wanted.get(name)
        if name not in self._lent:
            try:
                self._lent[name] = self._flow.spare[name].pop()
            except (KeyError, IndexError):
                shape = tuple(size for size in spec.shape or () if size is not None)
                self._lent[name] = aligned_empty(shape, numpy_dtype(spec.dtype))
        return self._lent[name]

    def _keep_apart(self, stage: Stage, found: Mapping[str, np.ndarray], places: Sequence[np.ndarray | None]) -> None:
        """Memory that a result shares (it may be a view of an input) lives as long as the result, so it is not lent."""
        for (name, result), place in zip(found.items(), places, strict=True):
            if result is place:
                continue
            self._lent.pop(name, None)
            for other in stage.partition.inputs:
                lent = self._lent.get(other)
                if lent is not None and np.may_share_memory(lent, result):
                    self._lent.pop(other, None)

    def _output(self, name: str, given: np.ndarray | None) -> np.ndarray:
        value = self._arrays[name]
        if given is None:
            # What is an input of the graph, or a view of one, is copied: the caller owns every output that he gets.
            own = name in self._flow.own
            shared = not own and any(np.may_share_memory(value, self._arrays[each]) for each in self._flow.inputs)
            return value.copy() if shared else value
        if given is not value:
            given[...] = value
        return given


def load(bundle: Bundle, threads: int, on_failure: str | None) -> Flow:
    """Load every partition. Raises BundleError if their borders do not fit together.

    Raises TargetError if a device is not here, unless `on_failure` is "cpu" and there is a fallback, which it demands.
    """
    uses = _uses(bundle)
    devices = {spec.name: spec for spec in bundle.devices}
    stages: list[Stage] = []
    flow_cpu = devices.get(CPU, DeviceSpec(CPU, CPU))
    try:
        for number, partition in enumerate(bundle.partitions):
            program, fallback = _programs(partition, threads, on_failure)
            device = devices.get(partition.device) or _default_device(partition)
            timing: Mapping[str, Any] = partition.artifact.metadata.get("timing") or {}
            stages.append(
                Stage(
                    number=number,
                    partition=partition,
                    device=device,
                    program=program,
                    fallback=fallback,
                    outputs=tuple(spec.name for spec in partition.outputs),
                    joules=timing.get("energy_joules"),
                    trusted=partition.artifact.kind == "cpu-native",
                )
            )
    except BaseException:
        for stage in stages:
            stage.close()
        raise
    stages = _beside_each_other(stages)
    kept = {spec.name for spec in bundle.outputs}
    queues: dict[str, tuple[int, ...]] = {}
    destinations: dict[str, dict[str, DeviceSpec]] = {}
    for stage in stages:
        queues[stage.device.resource] = (*queues.get(stage.device.resource, ()), stage.number)
        for name in stage.partition.inputs:
            destinations.setdefault(name, {})[stage.device.name] = stage.device
    if any(stage.fallback is not None for stage in stages):
        queues.setdefault(flow_cpu.resource, ())
    return Flow(
        stages=tuple(stages),
        inputs=tuple(spec.name for spec in bundle.inputs),
        outputs=tuple(spec.name for spec in bundle.outputs),
        uses=uses,
        queues=queues,
        destinations={name: tuple(specs.values()) for name, specs in destinations.items()},
        cpu=flow_cpu,
        modelled=[_known(stage.partition) for stage in stages],
        buffered={
            spec.name: spec
            for stage in stages
            for spec in stage.partition.outputs
            if spec.name not in kept and spec.shape is not None and None not in spec.shape
        },
        own=frozenset(name for stage in stages if stage.trusted for name in stage.outputs),
        warned={stage.number for stage in stages if stage.program is None},  # by `_programs`
    )


def failure(stage: Stage, error: Exception, on_cpu: bool = False) -> TargetError:
    """The error of a partition, in a sentence that names it and its device."""
    where = "the CPU, its fallback" if on_cpu else stage.partition.device
    what = str(error) if isinstance(error, TargetError) else f"{type(error).__name__}: {error}"
    return TargetError(f"partition {stage.partition.name} failed on {where}: {what}")


def warn(flow: Flow, stage: Stage, error: Exception) -> None:
    """Say once for each partition that its fallback runs."""
    if stage.number not in flow.warned:
        flow.warned.add(stage.number)
        _log().warning("%s; the CPU runs it instead", error)


def _log() -> logging.Logger:
    import logging  # most bundles never have anything to say

    return logging.getLogger("nestc")


def _timed(
    program: Program, inputs: Sequence[np.ndarray], places: Sequence[np.ndarray | None]
) -> tuple[Sequence[np.ndarray], Elapsed, float]:
    """What a program gives, and the seconds of the call."""
    begin = time.perf_counter()
    results, elapsed = program(inputs, places)
    return results, elapsed, time.perf_counter() - begin


def _steady(
    program: Program, inputs: Sequence[np.ndarray], places: Sequence[np.ndarray | None], calls: int, beside: int
) -> tuple[Sequence[np.ndarray], Elapsed, float]:
    """The same of the last of some calls, each after so many bytes of other data, with the median of their seconds."""
    times: list[float] = []
    while True:
        evict(beside)
        results, elapsed, seconds = _timed(program, inputs, places)
        times.append(seconds)
        if len(times) == calls or sum(times) > LONG_SECONDS:
            return results, elapsed, float(np.median(times))


def checked(stage: Stage, results: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
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
                f"it gave {spec.name!r} as {array.dtype}{list(array.shape)}, not {spec.dtype}{list(spec.shape or ())}"
            )
        values[spec.name] = array
    return values


def stage_mark(stage: Stage, begin: float, end: float, kind: Kind, request: int, cpu: DeviceSpec | None = None) -> Mark:
    """The mark of a stage that has run, with its energy; `cpu` is given where its fallback ran there."""
    device, region, seconds = cpu or stage.device, stage.partition.name, end - begin
    instead_of = "" if cpu is None else stage.partition.device
    if kind == "modelled" and stage.joules is not None:
        return Mark(device.name, region, begin, end, kind, request, None, stage.joules, "modelled", instead_of)
    joules = device.watts * seconds if device.watts else None
    known: Kind | None = None if joules is None else "estimated"
    return Mark(device.name, region, begin, end, kind, request, None, joules, known, instead_of)


def crossing(
    tensor: str, nbytes: int, ends: tuple[DeviceSpec | None, DeviceSpec | None], begin: float, request: int
) -> Mark | None:
    """A tensor's way from one device to another (None: the host's memory); None if it takes neither time nor energy."""
    first, second = ends
    if first is not None and second is not None and first.name == second.name:
        return None
    links = [end for end in ends if end is not None and (end.seconds(nbytes) > 0 or end.joules_per_byte > 0)]
    if not links:
        return None
    seconds = sum(link.seconds(nbytes) for link in links)
    kinds: list[Kind] = [link.kind for link in links]
    kind = max(kinds, key=_CERTAINTY.index)
    joules = sum(link.joules_per_byte for link in links) * nbytes or None
    name = "->".join(HOST if end is None else end.name for end in ends)
    return Mark(name, tensor, begin, begin + seconds, kind, request, nbytes, joules, None if joules is None else kind)


def _beside_each_other(stages: Sequence[Stage]) -> list[Stage]:
    """The stages, each with what the others of its resource read."""
    shared: dict[str, int] = {}
    for stage in stages:
        shared[stage.device.resource] = shared.get(stage.device.resource, 0) + _constant_bytes(stage)
    return [replace(stage, beside=evicting(shared[stage.device.resource] - _constant_bytes(stage))) for stage in stages]


def _constant_bytes(stage: Stage) -> int:
    """Bytes of a stage's constants; a vendor's runtime has them inside a file."""
    artifact = stage.partition.artifact
    return sum(array.nbytes for array in artifact.weights.values()) or sum(map(len, artifact.files.values()))


def _programs(
    partition: BundlePartition, threads: int, on_failure: str | None
) -> tuple[Program | None, Program | None]:
    """The partition on its device, and on the CPU if that is asked for; never None both."""
    artifact = partition.artifact
    if on_failure != CPU or artifact.kind in CPU_KINDS:
        return device_for(artifact.kind).load(artifact, threads), None
    if partition.fallback is None:
        raise TargetError(
            f"partition {partition.name} on {partition.device} has no code for the CPU to fall back on; compile the "
            'model with on_failure="cpu" to have it'
        )
    fallback = device_for(partition.fallback.kind).load(partition.fallback, threads)
    try:
        return device_for(artifact.kind).load(artifact, threads), fallback
    except TargetError as error:
        _log().warning("partition %s cannot run on %s: %s; the CPU runs it", partition.name, partition.device, error)
        return None, fallback
    except BaseException:
        fallback.close()
        raise


def _default_device(partition: BundlePartition) -> DeviceSpec:
    """A device that the bundle does not describe."""
    resource = CPU if partition.artifact.kind in CPU_KINDS else partition.device
    return DeviceSpec(partition.device, resource)


def _known(partition: BundlePartition) -> bool | None:
    """Whether a partition's times are modelled, as far as that can be said before it has run."""
    if partition.artifact.kind in _MODELLED or "timing" in partition.artifact.metadata:
        return True
    return False if partition.artifact.kind in _MEASURED else None


def _uses(bundle: Bundle) -> dict[str, int]:
    """How often each value is taken. Raises BundleError if one is used before it exists, or an output never does."""
    uses = {spec.name: 1 for spec in bundle.inputs}  # a caller's array is never ours to let go
    for partition in bundle.partitions:
        for name in partition.inputs:
            if name not in uses:
                raise BundleError(f"partition {partition.name} needs {name!r}, which no earlier partition computes")
            uses[name] += 1
        for spec in partition.outputs:
            uses[spec.name] = 1  # the stage itself, so that a value that nobody takes is let go as well
    for spec in bundle.outputs:
        if spec.name not in uses:
            raise BundleError(f"output {spec.name!r} is computed by no partition")
        uses[spec.name] += 1
    return uses


def total(marks: Iterable[Mark]) -> float:
    """Seconds from the begin of a run to the end of its last mark."""
    return max((mark.end for mark in marks), default=0.0)
