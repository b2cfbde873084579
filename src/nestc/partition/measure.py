"""The meter: what regions take on devices, from the profile store or else measured, modelled or estimated now."""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import numpy as np
import onnx_ir as ir

from nestc.errors import TargetError, UnsupportedOp
from nestc.evict import evict, evicting
from nestc.graph.region import Op, Region, TensorType
from nestc.partition.costs import Chain
from nestc.partition.draw import CannotDraw, draw
from nestc.partition.fingerprint import chain_hash, device_fingerprint, is_modelled, region_hash
from nestc.partition.group import partitions
from nestc.partition.match import ask, takes
from nestc.partition.repeat import LEAST_SECONDS, Effort, Timed, together
from nestc.partition.sizes import constant_bytes
from nestc.partition.store import ALONE, CHAIN, COMPARED, LAUNCH, Entry, Key, ProfileStore, stamped
from nestc.targets.api import Artifact, Elapsed, Modelled, Offer, Partition, Program, Target

Submodel = Callable[[Sequence[str]], ir.Model]

UNKNOWN_SECONDS = 1e-4
"""Assumed for an operator of ``host`` that cannot be run on made up values."""

_WITH_GRAPHS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""The standard's operators that have graphs as attributes."""

_one_at_a_time = threading.Lock()


PROFILE_RUNS = 9
"""Runs of which the median is the time of a chain's step."""

_ABSENT = "the device is not here"

CHAIN_ROUNDS = 3
"""A chain is measured so often: there are few, and all shares are scaled to it."""


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
class _Work:
    """Regions to be measured as one partition of a target; ``outputs`` are what leaves it.

    ``beside``: bytes of other data that the device reads between two runs (`evict`).
    """

    target: Target
    regions: tuple[Region, ...]
    outputs: tuple[str, ...]
    beside: int = 0


@dataclass(frozen=True)
class _Loaded:
    """A partition that is ready to run; ``first``: what its first run took; ``bytes`` of its constants."""

    program: Program
    inputs: Sequence[np.ndarray]
    outputs: int
    bytes: int
    first: Elapsed
    beside: int

    def run(self) -> float:
        """Run once, after other data; the seconds by the program's own clock."""
        evict(self.beside)
        return self.program(self.inputs, [None] * self.outputs)[1].seconds

    def outside(self) -> float:
        """Run once, after other data; the seconds that the call took beside what the program counts."""
        evict(self.beside)
        begin = time.perf_counter()
        elapsed = self.program(self.inputs, [None] * self.outputs)[1]
        return max(0.0, time.perf_counter() - begin - elapsed.seconds)


@dataclass(frozen=True)
class _Whole:
    """What a partition takes and, where its program can tell, the seconds of each of its regions."""

    entry: Entry
    regions: tuple[float, ...] | None = None


@dataclass(frozen=True)
class _Chain:
    """A chain that is to be measured: what, and under which keys the whole and the regions (by name) are kept."""

    work: _Work
    total: Key
    keys: Mapping[str, Key]


class Meter:
    """Asks the store, and where it has nothing measures. Measurements of one process never run at the same time.

    `threads` is what programs are loaded with; `progress` is told in words what is measured now.

    `network`, where it is asked for, is the bytes of the constants of all that runs on the same resource, what is
    measured among it: between two of its runs the rest has gone through the caches.
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
        self._chain_effort = replace(self.effort, rounds=CHAIN_ROUNDS)
        self._tell = progress
        self._known: dict[Key, Entry] = {}
        self._fingerprints: dict[int, tuple[Target, str]] = {}
        self._present: dict[int, bool] = {}
        self._hashes: dict[int, tuple[Region, str]] = {}

    def region(self, target: Target, region: Region, submodel: Submodel, network: int = 0) -> Entry:
        """What a region takes on a target as a partition of its own.

        A `refusal` in the entry says that the device does not take it after all. If the device is not here the entry
        is what the offer estimates; such entries are not kept in the store. `submodel` makes the ONNX model of regions.
        """
        return self.regions([target], region, submodel, network)[target.name]

    def regions(
        self, targets: Sequence[Target], region: Region, submodel: Submodel, network: int = 0
    ) -> dict[str, Entry]:
        """What a region takes on each of some targets, by their names; see `region`.

        Those that are measured now take turns, so that their times can be compared.
        """
        text = self._hash(region, submodel)
        beside = {target.name: _beside(target, (region,), network) for target in targets}
        keys = {
            target.name: Key(text, self._fingerprint(target), _context(ALONE, beside[target.name]))
            for target in targets
        }
        found = {name: self._recall(key) for name, key in keys.items()}
        missing = {keys[target.name]: target for target in targets if found[target.name] is None}
        if missing:
            self._say(f"measure {region.name} on {', '.join(target.name for target in missing.values())}")
            works = [_Work(target, (region,), region.outputs, beside[target.name]) for target in missing.values()]
            wholes = self._wholes(works, [submodel] * len(works), self.effort)
            self._keep({key: whole.entry for key, whole in zip(missing, wholes, strict=True)})
        return {target.name: _powered(target, self._known[keys[target.name]]) for target in targets}

    def chain(
        self, target: Target, regions: Sequence[Region], submodel: Submodel, network: int = 0
    ) -> dict[str, Entry]:
        """What each of some regions takes where all of them run as one partition, in that order, by their names.

        Where the program can tell what its steps take, each region gets those of its nodes, and a conversion between
        layouts goes to the region that asked for it; else the time is shared as the regions' times alone are. Either
        way the entries sum to the median of the whole. If the device does not take the chain every entry is a refusal;
        if it is not here, each is the region's estimate.
        """
        return self.chains([(target, regions)], submodel, network)[0]

    def chains(
        self, given: Sequence[tuple[Target, Sequence[Region]]], submodel: Submodel, network: int = 0
    ) -> list[dict[str, Entry]]:
        """What the regions of several chains take, on one target or different ones; see `chain`.

        Those that are measured now take turns, so that their times can be compared.
        """
        chains = [self._chain(target, regions, submodel, network) for target, regions in given]
        missing = {
            chain.total: chain
            for chain in chains
            if len(chain.keys) > 1 and any(self._recall(key) is None for key in chain.keys.values())
        }
        for chain in missing.values():
            first, *_, last = chain.keys
            self._say(f"measure {first} to {last} on {chain.work.target.name}")
        works = [chain.work for chain in missing.values()]
        wholes = self._wholes(works, [submodel] * len(works), self._chain_effort)
        for (total, chain), whole in zip(missing.items(), wholes, strict=True):
            shares = self._shared(chain.work, whole, submodel, network)
            self._keep({total: whole.entry, **{chain.keys[name]: entry for name, entry in shares.items()}})
        return [self._entries(chain, submodel, network) for chain in chains]

    def _chain(self, target: Target, regions: Sequence[Region], submodel: Submodel, network: int) -> _Chain:
        names = [region.name for region in regions]
        outputs = tuple(value.name or "" for value in submodel(names).graph.outputs)
        hashes = [self._hash(region, submodel) for region in regions]
        text, device = chain_hash(hashes, regions, outputs), self._fingerprint(target)
        beside = _beside(target, regions, network)
        keys = {
            name: Key(own, device, _context(f"{CHAIN}:{text}:{index}", beside))
            for index, (name, own) in enumerate(zip(names, hashes, strict=True))
        }
        work = _Work(target, tuple(regions), outputs, beside)
        return _Chain(work, Key(text, device, _context(CHAIN, beside)), keys)

    def _entries(self, chain: _Chain, submodel: Submodel, network: int) -> dict[str, Entry]:
        target, regions = chain.work.target, chain.work.regions
        if len(regions) == 1:
            return {regions[0].name: self.region(target, regions[0], submodel, network)}
        return {name: _powered(target, self._known[key]) for name, key in chain.keys.items()}

    def compare(self, chains: Sequence[Chain]) -> list[Entry]:
        """What each of some chains takes as a whole, all measured in turns, so that the times can be compared.

        Only what is measured at all: what a simulator tells is what `chain` says.
        """
        parts = [self._chain(each.target, each.regions, each.submodel, each.network) for each in chains]
        every = "\n".join(sorted({str(part.total) for part in parts}))
        turn = hashlib.sha256(every.encode()).hexdigest()[:16]
        keys = [part.total._replace(context=f"{part.total.context}:{COMPARED}:{turn}") for part in parts]
        missing = {key: n for n, key in enumerate(keys) if self._recall(key) is None}
        if missing:
            works = [parts[n].work for n in missing.values()]
            models = [chains[n].submodel for n in missing.values()]
            self._say(f"measure {len(works)} partitions of different plans in turns")
            wholes = self._wholes(works, models, self._chain_effort, shares=False)
            self._keep({key: whole.entry for key, whole in zip(missing, wholes, strict=True)})
        return [_powered(each.target, self._known[key]) for each, key in zip(chains, keys, strict=True)]

    def launch(self, target: Target, network: int = 0) -> Entry:
        """What starting a partition takes beyond what its program counts as its own time: the call from Python.

        It is measured around the smallest partition. Of a target whose times are modelled, or that does not take it or
        is not here, it is what its link says.
        """
        link = target.machine.link
        stated = Entry(link.launch_seconds, "estimated" if link.kind == "measured" else link.kind)
        region, submodel = _smallest()
        if is_modelled(target) or not takes(target, region):
            return stated
        beside = _beside(target, (region,), network)
        key = Key(region_hash(region), self._fingerprint(target), _context(LAUNCH, beside))
        if self._recall(key) is None:
            self._say(f"measure a launch on {target.name}")
            with _one_at_a_time:
                loaded = self._load(_Work(target, (region,), region.outputs, beside), submodel)
                if isinstance(loaded, Entry):
                    return stated
                with closing(loaded.program):
                    if loaded.first.kind == "modelled":
                        return stated
                    (timed,) = together([loaded.outside], self.effort)
            self._keep({key: Entry(timed.seconds, spread=timed.spread, runs=timed.runs)})
        return _powered(target, self._known[key])

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

    def _wholes(
        self, works: Sequence[_Work], submodels: Sequence[Submodel], effort: Effort, shares: bool = True
    ) -> list[_Whole]:
        """Compile each as a partition, and find out what they take, one beside the other; `shares`: of each region."""
        with _one_at_a_time, ExitStack() as loaded_programs:
            opened: list[_Loaded | Entry] = []
            for work, submodel in zip(works, submodels, strict=True):
                opened.append(self._load(work, submodel))
                if isinstance(loaded := opened[-1], _Loaded):
                    loaded_programs.callback(loaded.program.close)
            varying = [
                loaded
                for loaded in opened
                if isinstance(loaded, _Loaded)
                and loaded.first.kind == "measured"
                and loaded.first.seconds <= effort.longest
            ]
            timed = dict(zip(map(id, varying), together([loaded.run for loaded in varying], effort), strict=True))
            return [
                _Whole(each) if isinstance(each, Entry) else _told(work, each, timed.get(id(each)), shares)
                for work, each in zip(works, opened, strict=True)
            ]

    def _load(self, work: _Work, submodel: Submodel) -> _Loaded | Entry:
        """A partition that has run once; or an entry, if nothing has to run, or nothing does."""
        target, regions = work.target, work.regions
        partition = _partition(target, regions, work.outputs, submodel)
        try:
            if len(regions) > 1 and isinstance(target, Modelled):
                artifact = target.compile_unproven(partition)  # each region of it was proven alone
            else:
                artifact = target.compile(partition)
        except (TargetError, UnsupportedOp) as error:
            return Entry(0.0, refusal=str(error))
        # A vendor's runtime has its constants inside a file.
        size = sum(array.nbytes for array in artifact.weights.values()) or constant_bytes(regions)
        modelled = _modelled(artifact, size)
        if modelled is not None:
            return modelled
        try:
            program = target.open().load(artifact, self.threads)
        except (TargetError, UnsupportedOp) as error:
            if self._is_here(target):
                return Entry(0.0, refusal=str(error))
            return _estimate(target, regions, f"{_ABSENT}: {error}")
        try:
            inputs, sure = draw(partition)
        except CannotDraw as error:
            program.close()
            return _estimate(target, regions, f"it cannot be run alone: {error}")
        try:
            first = program(inputs, [None] * len(partition.outputs))[1]
        except (TargetError, UnsupportedOp) as error:
            program.close()
            if sure:
                return Entry(0.0, refusal=str(error))
            return _estimate(target, regions, f"it does not run on made up values: {error}")
        return _Loaded(program, inputs, len(partition.outputs), size, first, work.beside)

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

    def _shared(self, work: _Work, whole: _Whole, submodel: Submodel, network: int) -> dict[str, Entry]:
        """The whole's entry in shares, one a region, that sum to it; of an estimate those of the regions."""
        entry, target, regions = whole.entry, work.target, work.regions
        if entry.refusal is not None:
            return {region.name: entry for region in regions}
        parts = whole.regions
        if parts is None or sum(parts) <= 0:
            alone = [self.region(target, region, submodel, network) for region in regions]
            if entry.kind == "estimated":
                return {region.name: each for region, each in zip(regions, alone, strict=True)}
            usual = statistics.median([each.seconds for each in alone if each.refusal is None] or [1.0])
            parts = tuple(usual if each.refusal is not None else each.seconds for each in alone)
        parts = tuple(max(part, LEAST_SECONDS) for part in parts)
        sizes = [constant_bytes((region,)) for region in regions]
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


def _told(work: _Work, loaded: _Loaded, timed: Timed | None, shares: bool) -> _Whole:
    """What repeated runs (None: there was only the first) and the program's profile tell of a partition."""
    if timed is None:
        seconds, kind = max(loaded.first.seconds, LEAST_SECONDS), loaded.first.kind
        return _Whole(Entry(seconds, kind, runs=1, bytes=loaded.bytes))
    entry = Entry(timed.seconds, spread=timed.spread, runs=timed.runs, bytes=loaded.bytes)
    if not shares or len(work.regions) == 1 or not isinstance(loaded.program, _Profiled):
        return _Whole(entry)
    return _Whole(entry, attribute(loaded.program.profile(loaded.inputs, PROFILE_RUNS), work.regions))


def attribute(steps: Sequence[_Step], regions: Sequence[Region]) -> tuple[float, ...]:
    """Seconds of each region, of what the steps of a program take that computes all of them.

    A step belongs to the region whose nodes its origin lists; of several, each has a part of it by the bytes of its
    constants, which tell of the multiplications of a layer. One that belongs to none (a conversion between layouts)
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
        mine = sorted({owners[node] for node in step.origin if node in owners and node not in shared})
        if not mine:
            waiting += seconds
            continue
        weights = [constant_bytes([regions[owner]]) for owner in mine]
        for owner, weight in zip(mine, weights, strict=True):
            found[owner] += (seconds + waiting) * (weight / sum(weights) if any(weights) else 1 / len(mine))
        waiting, last = 0.0, mine[-1]
    if last is not None:
        found[last] += waiting
    return tuple(found)


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
        if cost is None and note.startswith(_ABSENT):
            return Entry(0.0, "estimated", refusal=f"{note}; and the offer states no cost to go by")
        seconds += UNKNOWN_SECONDS * len(region.ops) if cost is None else cost(region)
    return Entry(max(seconds, LEAST_SECONDS), "estimated", bytes=constant_bytes(regions), note=note)


def _powered(target: Target, entry: Entry) -> Entry:
    """The entry with the energy that the device's stated power makes of its time, where no simulator has counted it."""
    watts = target.machine.watts
    if not watts or entry.joules is not None or entry.refusal is not None:
        return entry
    return replace(entry, joules=watts * entry.seconds)


def _beside(target: Target, regions: Sequence[Region], network: int) -> int:
    """Bytes that the rest of a network drives through the caches between two runs; a simulator's time has none."""
    if is_modelled(target):
        return 0
    return evicting(network - constant_bytes(regions))


def _context(where: str, beside: int) -> str:
    return f"{where}+{beside >> 10}K" if beside else where


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
