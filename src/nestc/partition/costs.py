"""What every region costs on every device, and every border between two devices, as a problem for the solver.

A region costs what it takes inside a chain of its device, since there nothing is converted between regions. What it
takes alone beyond that is the price of its borders (values turned into the device's own layout and back), shared among
the values that cross by their bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from nestc.errors import UnsupportedOp
from nestc.graph.region import Region, TensorType
from nestc.partition.group import order, runs
from nestc.partition.match import Claim, ask, refused, unknown_at_compile_time
from nestc.partition.problem import HOST, Cost, Crossing, Edge, Kind, Problem, Task, Unit
from nestc.partition.sizes import constant_bytes, nbytes
from nestc.targets.api import Link, Machine, Offer, Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from nestc.partition.store import Entry

Submodel = Callable[[Sequence[str]], "ir.Model"]


@dataclass(frozen=True)
class Chain:
    """Regions to be measured as one partition; ``network``: bytes of the constants of all on the same resource."""

    target: Target
    regions: Sequence[Region]
    submodel: Submodel
    network: int


class Meter(Protocol):
    """What measures (`measure.Meter`)."""

    def regions(
        self, targets: Sequence[Target], region: Region, submodel: Submodel, network: int = 0
    ) -> Mapping[str, Entry]: ...

    def chains(
        self, given: Sequence[tuple[Target, Sequence[Region]]], submodel: Submodel, network: int = 0
    ) -> Sequence[Mapping[str, Entry]]: ...

    def chain(
        self, target: Target, regions: Sequence[Region], submodel: Submodel, network: int = 0
    ) -> Mapping[str, Entry]: ...

    def compare(self, chains: Sequence[Chain]) -> Sequence[Entry]: ...

    def launch(self, target: Target, network: int = 0) -> Entry: ...


@dataclass(frozen=True)
class Costed:
    """The problem, and what it was made of: by region the refusals in words, and the offers taken up."""

    problem: Problem
    regions: tuple[Region, ...]
    refusals: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """By number of a region that was cut: the devices that take it uncut."""


UNSIZED = Cost(1e-4, kind="estimated")
"""Taken, since it cannot be measured, for a region whose sizes only a run tells; nobody but ``host`` takes one."""


@dataclass
class _Measured:
    """What is known of the regions of one model, whose constants have ``network`` bytes, on the targets."""

    network: int = 0
    alone: dict[tuple[str, str], Cost] = field(default_factory=dict[tuple[str, str], Cost])
    inside: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])
    refusals: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])

    def takers(self, region: str) -> list[str]:
        """Names of the targets that take a region."""
        return [target for name, target in self.alone if name == region]

    def seconds(self, region: str, target: str) -> float:
        """Inside a chain if that was measured, else alone."""
        return self.inside.get((region, target), self.alone[region, target].seconds)


def number_of(name: str) -> str:
    """The number of a region, which the pieces of one that was cut share (they have a letter more)."""
    found = re.match(r"r(\d+)", name)
    return found.group(1) if found else name


def measure_costs(
    whole: Sequence[Region],
    cut: Sequence[Region],
    targets: Sequence[Target],
    outputs: Sequence[str],
    meter: Meter,
    submodels: tuple[Submodel, Submodel],
    progress: Callable[[str, float], None],
) -> Costed:
    """The problem of placing the regions of `cut`, which are those of `whole`, some of them in pieces.

    `submodels` make ONNX models of regions of `whole` and of `cut`, by name. Raises UnsupportedOp if nobody takes a
    region.
    """
    measured = _Measured(constant_bytes(whole))
    names = {region.name for region in cut}
    uncut = [region for region in whole if region.name not in names]
    every = [*((region, submodels[1]) for region in cut), *((region, submodels[0]) for region in uncut)]
    for index, (region, submodel) in enumerate(every):
        progress(f"measure {region.name}", index / len(every))
        _measure_region(region, targets, meter, submodel, measured, required=region.name in names)
    _measure_chains(targets, whole, meter, submodels[0], measured)
    _share_pieces(cut, uncut, measured)
    used = [target for target in targets if _used(target, measured)]
    units = tuple(_unit(target, meter, measured) for target in used)
    reached = {target.name: _Reached(target.machine, unit.launch) for target, unit in zip(used, units, strict=True)}
    return Costed(
        problem=Problem(
            units=units,
            tasks=tuple(_task(region, measured) for region in cut),
            edges=_edges(cut, uncut, reached, outputs, measured),
        ),
        regions=tuple(cut),
        refusals=measured.refusals,
        whole={number_of(region.name): frozenset(measured.takers(region.name)) for region in uncut},
    )


def _measure_region(
    region: Region, targets: Sequence[Target], meter: Meter, submodel: Submodel, measured: _Measured, required: bool
) -> None:
    """Ask every target, and have measured what takes it; ``host`` only where nobody else does."""
    refusals = measured.refusals.setdefault(region.name, {})
    answers = {target.name: ask(region, target) for target in targets if target.name != "host"}
    takers = [target for target in targets if isinstance(answers.get(target.name), Offer)]
    _measure_on(takers, region, meter, submodel, measured, refusals)
    refusals |= {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    host = next((target for target in targets if target.name == "host"), None)
    if host is not None and not measured.takers(region.name):
        answer = ask(region, host)
        if isinstance(answer, Offer):
            _measure_on([host], region, meter, submodel, measured, refusals)
        else:
            refusals["host"] = answer
    if required and not measured.takers(region.name):
        raise UnsupportedOp(refused(Claim(region, None, None, tuple(refusals.items()))))


def _measure_on(
    targets: Sequence[Target],
    region: Region,
    meter: Meter,
    submodel: Submodel,
    measured: _Measured,
    refusals: dict[str, str],
) -> None:
    if unknown_at_compile_time(region) is not None:
        measured.alone |= {(region.name, target.name): UNSIZED for target in targets}
        return
    for name, entry in meter.regions(targets, region, submodel, measured.network).items():
        if entry.refusal is not None:
            refusals[name] = entry.refusal
        else:
            measured.alone[region.name, name] = Cost(entry.seconds, entry.joules or 0.0, entry.kind, entry.bytes)


def _measure_chains(
    targets: Sequence[Target], whole: Sequence[Region], meter: Meter, submodel: Submodel, measured: _Measured
) -> None:
    """Measure the runs of all regions that each target takes; simulators need none, their times do add up."""
    chains: list[tuple[Target, Sequence[Region]]] = []
    for target in targets:
        taken = {name for name, taker in measured.alone if taker == target.name}
        sized = {region.name for region in whole if region.name in taken and unknown_at_compile_time(region) is None}
        if any(measured.alone[name, target.name].kind == "measured" for name in sized):
            device = {region.name: target.name if region.name in sized else "" for region in whole}
            found = runs(order(whole, device), device)
            chains += [(target, run) for run in found if device[run[0].name] and len(run) > 1]
    for (target, _), entries in zip(chains, meter.chains(chains, submodel, measured.network), strict=True):
        if all(entry.refusal is None for entry in entries.values()):
            for name, entry in entries.items():
                measured.inside[name, target.name] = entry.seconds


def _share_pieces(cut: Sequence[Region], uncut: Sequence[Region], measured: _Measured) -> None:
    """Pieces were not in a chain: they take of their time alone what the whole took of its."""
    for region in uncut:
        for target in measured.takers(region.name):
            inside = measured.inside.get((region.name, target))
            if inside is None:
                continue
            ratio = min(1.0, inside / measured.alone[region.name, target].seconds)
            for piece in _pieces(cut, region):
                if (piece.name, target) in measured.alone:
                    measured.inside[piece.name, target] = measured.alone[piece.name, target].seconds * ratio


def _pieces(cut: Sequence[Region], whole: Region) -> list[Region]:
    return [piece for piece in cut if number_of(piece.name) == number_of(whole.name)]


def _used(target: Target, measured: _Measured) -> bool:
    return any(taker == target.name for _, taker in measured.alone)


def _unit(target: Target, meter: Meter, measured: _Measured) -> Unit:
    machine = target.machine
    kinds = {entry.kind for (_, taker), entry in measured.alone.items() if taker == target.name}
    launch = meter.launch(target, measured.network).seconds if "measured" in kinds else machine.link.launch_seconds
    return Unit(target.name, machine.resource or target.name, launch, machine.capacity_bytes)


def _task(region: Region, measured: _Measured) -> Task:
    costs: dict[str, Cost] = {}
    for target in measured.takers(region.name):
        alone = measured.alone[region.name, target]
        seconds = measured.seconds(region.name, target)
        # The energy of a measured time is an estimate in proportion to it.
        share = seconds / alone.seconds if alone.kind == "measured" and alone.seconds else 1.0
        costs[target] = replace(alone, seconds=seconds, joules=alone.joules * share)
    return Task(region.name, costs)


@dataclass(frozen=True)
class _Reached:
    """How a device is reached; ``launch`` seconds begin each of its partitions."""

    machine: Machine
    launch: float

    @property
    def launch_joules(self) -> float:
        """Energy of a launch, estimated; put on what enters the device, since a tensor that does begins a partition."""
        return self.machine.watts * self.launch


def _edges(
    cut: Sequence[Region],
    uncut: Sequence[Region],
    links: Mapping[str, _Reached],
    outputs: Sequence[str],
    measured: _Measured,
) -> tuple[Edge, ...]:
    maker = {value: region for region in cut for value in region.outputs}
    borders = _borders(cut, outputs, maker, measured)
    edges: list[Edge] = []
    for region in cut:
        saved = _gains(region, cut, uncut, measured)
        sources = [maker.get(value) for value in dict.fromkeys(region.inputs)]
        # A piece is joined to the one before it; over other edges between pieces nothing more is saved.
        before = [each for each in cut if each in sources and number_of(each.name) == number_of(region.name)][-1:]
        for value, source in zip(dict.fromkeys(region.inputs), sources, strict=True):
            gains = saved if source in before else {}
            before = [] if source in before else before
            edges.append(_edge(value, source, region, links, borders, measured, gains))
    edges += [_edge(value, maker[value], None, links, borders, measured, {}) for value in outputs if value in maker]
    return tuple(edges)


def _borders(
    cut: Sequence[Region], outputs: Sequence[str], maker: Mapping[str, Region], measured: _Measured
) -> dict[tuple[str, str, str], float]:
    """By region, target and value: seconds that the value costs more if it crosses a border of the target there.

    Graph inputs and outputs cross it in any case, so they have cost it inside the chain too.
    """
    found: dict[tuple[str, str, str], float] = {}
    for region in cut:
        crossing = [value for value in region.inputs if value in maker]
        crossing += [value for value in region.outputs if value not in outputs]
        sizes = {value: max(1, nbytes(region.types.get(value))) for value in crossing}
        for target in measured.takers(region.name):
            more = measured.alone[region.name, target].seconds - measured.seconds(region.name, target)
            if more > 0:
                total = sum(sizes.values())
                found |= {(region.name, target, value): more * size / total for value, size in sizes.items()}
    return found


def _gains(region: Region, cut: Sequence[Region], uncut: Sequence[Region], measured: _Measured) -> dict[str, float]:
    """Seconds saved, by target, where a piece is computed together with those before it.

    Of what all pieces of a region take beyond the whole each but the first has its share, by its time and at most that.
    """
    whole = next((each for each in uncut if number_of(each.name) == number_of(region.name)), None)
    if whole is None:
        return {}
    pieces = [piece.name for piece in _pieces(cut, whole)]
    gains: dict[str, float] = {}
    for target in measured.takers(whole.name):
        if all((name, target) in measured.alone for name in pieces):
            apart = [measured.seconds(name, target) for name in pieces]
            more = max(0.0, sum(apart) - measured.seconds(whole.name, target))
            behind = sum(apart[1:])
            if region.name != pieces[0] and behind > 0:
                own = measured.seconds(region.name, target)
                gains[target] = min(more * own / behind, own)
    return gains


def _edge(
    value: str,
    source: Region | None,
    destination: Region | None,
    links: Mapping[str, _Reached],
    borders: Mapping[tuple[str, str, str], float],
    measured: _Measured,
    gains: Mapping[str, float],
) -> Edge:
    type_: TensorType | None = next(
        (region.types[value] for region in (source, destination) if region is not None and value in region.types), None
    )
    size = nbytes(type_)
    crossings: dict[tuple[str, str], Crossing] = {}
    for first in [HOST] if source is None else measured.takers(source.name):
        for second in [HOST] if destination is None else measured.takers(destination.name):
            if first == second:
                continue
            ends = [links[name].machine.link for name in (first, second) if name != HOST]
            out = 0.0 if source is None else borders.get((source.name, first, value), 0.0)
            into = 0.0 if destination is None else borders.get((destination.name, second, value), 0.0)
            wire = sum(link.seconds(size) for link in ends)
            joules = sum(link.joules_per_byte for link in ends) * size
            joules += links[second].launch_joules if second != HOST else 0.0
            if out or into or wire or joules:
                crossings[first, second] = Crossing(out, wire, into, joules, _kind(ends, out or into))
    name = None if source is None else source.name
    return Edge(value, name, None if destination is None else destination.name, size, crossings, gains)


def _kind(ends: Sequence[Link], converted: float) -> Kind:
    """How the time of a crossing is known: as its least certain part is."""
    kinds = {link.kind for link in ends if link.latency_seconds or link.bytes_per_second}
    if "estimated" in kinds:
        return "estimated"
    return "modelled" if "modelled" in kinds or not converted else "measured"
