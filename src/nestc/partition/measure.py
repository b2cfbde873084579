"""The meter: what regions take on devices, from the profile store or else measured, modelled or estimated now."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import numpy as np
import onnx_ir as ir

from nestc.errors import TargetError, UnsupportedOp
from nestc.graph.region import Op, Region, TensorType
from nestc.partition.draw import CannotDraw, draw
from nestc.partition.fingerprint import MODELLED, chain_hash, device_fingerprint, region_hash
from nestc.partition.group import partitions
from nestc.partition.match import ask, takes
from nestc.partition.sizes import nbytes
from nestc.partition.store import ALONE, CHAIN, LAUNCH, Entry, Key, ProfileStore, stamped
from nestc.targets.api import Artifact, Offer, Partition, Program, Target

if TYPE_CHECKING:
    from nestc.bundle.artifact import Elapsed

Submodel = Callable[[Sequence[str]], ir.Model]

UNSTEADY = 0.3
"""A spread above this part of the median is measured again."""

TRIES = 3
"""Measurements of one thing at most; the steadiest is kept."""

SETTLE_SECONDS = 0.02
"""Idle time when the device changes: thread pools of vendors' runtimes spin for a while after a run on shared cores."""

LEAST_SECONDS = 1e-9
"""A measured time is never zero, though the clock may not see it (a value that only gets another shape)."""

UNKNOWN_SECONDS = 1e-4
"""Assumed for an operator of ``host`` that cannot be run on made up values."""

_WITH_GRAPHS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""The standard's operators that have graphs as attributes."""

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Effort:
    """A measurement is of at least ``runs`` runs and ``seconds``, but ends, with three, once it took ``longest``.

    If the first run alone takes that long it is the only one.
    """

    runs: int = 15
    seconds: float = 0.03
    longest: float = 1.0


class _Step(Protocol):
    """One kernel call of a profile (`runtime.native.StepTime`); microseconds on one thread and on all of them."""

    @property
    def origin(self) -> tuple[str, ...]: ...
    @property
    def us(self) -> float: ...
    @property
    def team_us(self) -> float | None: ...


@runtime_checkable
class _Profiled(Protocol):
    """A program that can tell what each of its steps takes."""

    def profile(self, inputs: Sequence[np.ndarray], runs: int) -> Sequence[_Step]: ...


@dataclass(frozen=True)
class _Refused:
    """Why a device does not take a partition; ``absent``: because it is not here."""

    words: str
    absent: bool = False


@dataclass(frozen=True)
class _Whole:
    """What a partition takes and, where its program can tell, the seconds of each of its regions."""

    entry: Entry
    regions: tuple[float, ...] | None = None


class Meter:
    """Asks the store, and where it has nothing measures. Measurements of one process never run at the same time.

    `threads` is what programs are loaded with; `progress` is told in words what is measured now.
    """

    def __init__(
        self,
        store: ProfileStore | None = None,
        threads: int = 1,
        progress: Callable[[str], None] | None = None,
        effort: Effort | None = None,
    ) -> None:
        self.store = store or ProfileStore()
        self.threads = threads
        self.effort = effort or Effort()
        self._tell = progress
        self._known: dict[Key, Entry] = {}
        self._fingerprints: dict[int, tuple[Target, str]] = {}
        self._present: dict[int, bool] = {}
        self._hashes: dict[int, tuple[Region, str]] = {}
        self._last: str | None = None  # the device measured last

    def region(self, target: Target, region: Region, submodel: Submodel) -> Entry:
        """What a region takes on a target as a partition of its own.

        A `refusal` in the entry says that the device does not take it after all. If the device is not here the entry
        is what the offer estimates; such entries are not kept in the store. `submodel` makes the ONNX model of regions.
        """
        key = Key(self._hash(region, submodel), self._fingerprint(target), ALONE)
        found = self._recall(key)
        if found is None:
            self._say(f"measure {region.name} on {target.name}")
            found = self._whole(target, (region,), region.outputs, submodel).entry
            self._keep({key: found})
        return _powered(target, found)

    def chain(self, target: Target, regions: Sequence[Region], submodel: Submodel) -> dict[str, Entry]:
        """What each of some regions takes where all of them run as one partition, in that order.

        Where the program can tell what its steps take, each region gets those of its nodes, and a conversion between
        layouts goes to the region that asked for it; else the time is shared as the regions' times alone are. Either
        way the entries sum to the median of the whole. If the device does not take the chain every entry is a refusal;
        if it is not here, each is the region's estimate.
        """
        if len(regions) == 1:
            return {regions[0].name: self.region(target, regions[0], submodel)}
        names = [region.name for region in regions]
        outputs = [value.name or "" for value in submodel(names).graph.outputs]
        hashes = [self._hash(region, submodel) for region in regions]
        whole = chain_hash(hashes, regions, outputs)
        device = self._fingerprint(target)
        total = Key(whole, device, CHAIN)
        keys = {
            name: Key(text, device, f"{CHAIN}:{whole}:{index}")
            for index, (name, text) in enumerate(zip(names, hashes, strict=True))
        }
        known = {name: entry for name, key in keys.items() if (entry := self._recall(key)) is not None}
        if len(known) == len(regions):
            return {name: _powered(target, entry) for name, entry in known.items()}
        self._say(f"measure {names[0]} to {names[-1]} on {target.name}")
        found = self._whole(target, regions, outputs, submodel)
        if found.entry.refusal is None and found.entry.kind == "estimated":
            shares = {region.name: self.region(target, region, submodel) for region in regions}
        else:
            shares = self._shared(target, regions, found, submodel)
        self._keep({total: found.entry, **{keys[name]: entry for name, entry in shares.items()}})
        return {name: _powered(target, entry) for name, entry in shares.items()}

    def launch(self, target: Target) -> Entry:
        """What starting a partition takes beyond what its program counts as its own time: the call from Python.

        It is measured around the smallest partition. Of a target whose times are modelled, or that does not take it or
        is not here, it is what its link says.
        """
        link = target.machine.link
        stated = Entry(link.launch_seconds, "estimated" if link.kind == "measured" else link.kind)
        region, submodel = _smallest()
        if target.machine.facts.get(MODELLED) == "modelled" or not takes(target, region):
            return stated
        key = Key(region_hash(region), self._fingerprint(target), LAUNCH)
        found = self._recall(key)
        if found is None:
            self._say(f"measure a launch on {target.name}")
            opened = self._open(target, _partition(target, (region,), region.outputs, submodel))
            if isinstance(opened, _Refused | Entry):
                return stated
            program, partition, _ = opened
            try:
                found = self._timed(target, program, partition, outside=True)
            except (TargetError, UnsupportedOp):
                return stated
            finally:
                program.close()
            if found.kind == "modelled":
                return stated
            self._keep({key: found})
        return _powered(target, found)

    def _hash(self, region: Region, submodel: Submodel) -> str:
        known = self._hashes.get(id(region))
        if known is None:
            known = region, region_hash(region, _body(region, submodel))
            self._hashes[id(region)] = known
        return known[1]

    def _fingerprint(self, target: Target) -> str:
        known = self._fingerprints.get(id(target))
        if known is None:
            known = target, device_fingerprint(target, self.threads)
            self._fingerprints[id(target)] = known
        return known[1]

    def _recall(self, key: Key) -> Entry | None:
        found = self._known.get(key)
        if found is None:
            found = self.store.get(key)
            if found is not None:
                self._known[key] = found
        return found

    def _keep(self, entries: Mapping[Key, Entry]) -> None:
        """Remember entries; what was only estimated is not stored, for next time the device may be here."""
        self._known |= entries
        lasting = {key: stamped(entry) for key, entry in entries.items() if entry.kind != "estimated"}
        if lasting:
            self.store.put_all(lasting)

    def _say(self, what: str) -> None:
        if self._tell is not None:
            self._tell(what)

    def _whole(self, target: Target, regions: Sequence[Region], outputs: Sequence[str], submodel: Submodel) -> _Whole:
        """Compile regions as one partition and find out what it takes."""
        opened = self._open(target, _partition(target, regions, outputs, submodel))
        if isinstance(opened, Entry):
            return _Whole(opened)
        if isinstance(opened, _Refused):
            if opened.absent:
                return _Whole(_estimate(target, regions, f"the device is not here: {opened.words}"))
            return _Whole(Entry(0.0, refusal=opened.words))
        program, partition, size = opened
        try:
            entry = self._timed(target, program, partition)
            steps = None
            if len(regions) > 1 and entry.kind == "measured" and isinstance(program, _Profiled):
                with _one_at_a_time:
                    rows = program.profile(draw(partition)[0], max(3, min(entry.runs, self.effort.runs)))
                steps = attribute(rows, regions)
        except CannotDraw as error:
            return _Whole(_estimate(target, regions, f"it cannot be run alone: {error}"))
        except (TargetError, UnsupportedOp) as error:
            if draw(partition)[1]:
                return _Whole(Entry(0.0, refusal=str(error)))
            return _Whole(_estimate(target, regions, f"it does not run on made up values: {error}"))
        finally:
            program.close()
        return _Whole(replace(entry, bytes=size), steps)

    def _open(self, target: Target, partition: Partition) -> tuple[Program, Partition, int] | Entry | _Refused:
        """A loaded partition and the bytes of its constants; an entry if the artifact says it all; or a refusal."""
        try:
            artifact = target.compile(partition)
        except (TargetError, UnsupportedOp) as error:
            return _Refused(str(error))
        # A vendor's runtime has its constants inside a file.
        size = sum(array.nbytes for array in artifact.weights.values()) or _constant_bytes(partition.regions)
        modelled = _modelled(artifact, size)
        if modelled is not None:
            return modelled
        try:
            return target.open().load(artifact, self.threads), partition, size
        except (TargetError, UnsupportedOp) as error:
            return _Refused(str(error), absent=not self._is_here(target))

    def _is_here(self, target: Target) -> bool:
        """Whether a device runs anything at all here: then what it does not load is its own limit."""
        known = self._present.get(id(target))
        if known is None:
            region, submodel = _smallest()
            try:
                device = target.open()
                if takes(target, region):
                    artifact = target.compile(_partition(target, (region,), region.outputs, submodel))
                    device.load(artifact, self.threads).close()
                known = True
            except (TargetError, UnsupportedOp):
                known = False
            self._present[id(target)] = known
        return known

    def _timed(self, target: Target, program: Program, partition: Partition, outside: bool = False) -> Entry:
        """Run a program until its time is known; `outside`: the time of the call less what the program counts."""
        inputs = draw(partition)[0]
        count = len(partition.outputs)
        with _one_at_a_time:
            if self._last not in (None, target.name):
                time.sleep(SETTLE_SECONDS)
            self._last = target.name
            tried: list[Entry] = []
            for _ in range(TRIES):
                entry = _measure(lambda: program(inputs, [None] * count), self.effort, outside)
                tried.append(entry)
                if entry.spread <= UNSTEADY * entry.seconds or entry.runs == 1:
                    break
        return min(tried, key=lambda entry: entry.spread / entry.seconds)

    def _shared(self, target: Target, regions: Sequence[Region], whole: _Whole, submodel: Submodel) -> dict[str, Entry]:
        """The whole's entry in shares, one a region, that sum to it."""
        entry = whole.entry
        if entry.refusal is not None:
            return {region.name: entry for region in regions}
        parts = whole.regions
        if parts is None or sum(parts) <= 0:
            alone = [self.region(target, region, submodel) for region in regions]
            usual = statistics.median([each.seconds for each in alone if each.refusal is None] or [1.0])
            parts = tuple(usual if each.refusal is not None else each.seconds for each in alone)
        parts = tuple(max(part, LEAST_SECONDS) for part in parts)
        sizes = [_constant_bytes((region,)) for region in regions]
        total, constants = sum(parts), max(1, sum(sizes))
        return {
            region.name: replace(
                entry,
                seconds=entry.seconds * part / total,
                spread=entry.spread * part / total,
                joules=None if entry.joules is None else entry.joules * part / total,
                bytes=round(entry.bytes * size / constants),
            )
            for region, part, size in zip(regions, parts, sizes, strict=True)
        }


def attribute(steps: Sequence[_Step], regions: Sequence[Region]) -> tuple[float, ...]:
    """Seconds of each region, of what the steps of a program take that computes all of them.

    A step belongs to the region whose nodes its origin lists. One that belongs to none (a conversion between layouts)
    goes to the region of the next step that does, which asked for it, or at the end to the last one.
    """
    owners: dict[str, int] = {}
    shared: set[str] = set()
    for index, region in enumerate(regions):
        for node in region.origin:
            if owners.setdefault(node, index) != index:
                shared.add(node)  # two regions have nodes of one name
    found = [0.0] * len(regions)
    waiting = 0.0
    last: int | None = None
    for step in steps:
        seconds = (step.us if step.team_us is None else step.team_us) * 1e-6
        owner = next((owners[node] for node in step.origin if node in owners and node not in shared), None)
        if owner is None:
            waiting += seconds
            continue
        found[owner] += seconds + waiting
        waiting, last = 0.0, owner
    if last is not None:
        found[last] += waiting
    return tuple(found)


def _measure(run: Callable[[], tuple[object, Elapsed]], effort: Effort, outside: bool) -> Entry:
    """The median of repeated runs after two that warm up; of a simulator one run, whose time never varies."""
    begin = time.perf_counter()

    def once() -> tuple[float, Elapsed]:
        start = time.perf_counter()
        elapsed = run()[1]
        wall = time.perf_counter() - start
        return (max(0.0, wall - elapsed.seconds) if outside else elapsed.seconds), elapsed

    first, elapsed = once()
    if elapsed.kind == "modelled":
        return Entry(max(elapsed.seconds, LEAST_SECONDS), "modelled", runs=1)
    if time.perf_counter() - begin > effort.longest:
        return Entry(max(first, LEAST_SECONDS), runs=1)
    once()
    times: list[float] = []
    start = time.perf_counter()
    while True:
        times.append(once()[0])
        spent = time.perf_counter() - start
        if (len(times) >= effort.runs and spent >= effort.seconds) or (len(times) >= 3 and spent >= effort.longest):
            break
    low, middle, high = (float(value) for value in np.percentile(times, (25, 50, 75)))
    return Entry(max(middle, LEAST_SECONDS), spread=high - low, runs=len(times))


def _modelled(artifact: Artifact, size: int) -> Entry | None:
    """What the compiler's simulator said of an artifact, if it did."""
    timing: object = artifact.metadata.get("timing")
    if not isinstance(timing, Mapping) or "seconds" not in timing:
        return None
    stated = cast("Mapping[str, float]", timing)
    joules = stated.get("energy_joules")
    seconds = max(float(stated["seconds"]), LEAST_SECONDS)
    return Entry(seconds, "modelled", joules=joules, energy_kind="modelled", bytes=size, runs=1)


def _estimate(target: Target, regions: Sequence[Region], note: str) -> Entry:
    """What the offers say that regions take; a refusal if a device that is not here says nothing."""
    seconds = 0.0
    for region in regions:
        offer = ask(region, target)
        cost = offer.cost if isinstance(offer, Offer) else None
        if cost is None and note.startswith("the device is not here"):
            return Entry(0.0, "estimated", refusal=f"{note}; and the offer states no cost to go by")
        seconds += UNKNOWN_SECONDS * len(region.ops) if cost is None else cost(region)
    return Entry(max(seconds, LEAST_SECONDS), "estimated", bytes=_constant_bytes(regions), note=note)


def _powered(target: Target, entry: Entry) -> Entry:
    """The entry with the energy that the device's stated power makes of its time, where no simulator has counted it."""
    watts = target.machine.watts
    if not watts or entry.joules is not None or entry.refusal is not None:
        return entry
    return replace(entry, joules=watts * entry.seconds)


def _constant_bytes(regions: Sequence[Region]) -> int:
    """Plain size of all constants."""
    return sum(nbytes(region.types[name]) for region in regions for name in region.constants)


def _partition(target: Target, regions: Sequence[Region], outputs: Sequence[str], submodel: Submodel) -> Partition:
    device = {region.name: target.name for region in regions}
    return partitions([list(regions)], device, outputs, submodel)[0]


def _body(region: Region, submodel: Submodel) -> bytes:
    """The graphs inside a control flow operator, which a Region does not hold."""
    if all(op.op_type not in _WITH_GRAPHS for op in region.ops):
        return b""
    return ir.serde.serialize_model(submodel([region.name])).SerializeToString(deterministic=True)


def _smallest() -> tuple[Region, Submodel]:
    """The smallest partition that there is: sixteen floats through Relu."""
    type_ = TensorType("float32", (1, 16))
    op = Op("Relu", ("x",), ("y",), name="relu")
    region = Region("smallest", None, (op,), ("x",), ("y",), {"x": type_, "y": type_}, {})
    return region, _smallest_model


def _smallest_model(names: Sequence[str]) -> ir.Model:
    x, y = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, 16))) for name in "xy")
    node = ir.Node("", "Relu", [x], outputs=[y], name="relu")
    return ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 24}, name="smallest"), ir_version=10)
