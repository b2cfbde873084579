"""Scheme ``devices``: each node in the number format that an offer of the given targets asks for, found by trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nestc.errors import QuantizationError, ShapeError
from nestc.graph import pipeline, regions
from nestc.graph.bind import bind_batch
from nestc.graph.model import Model, unbound_dims
from nestc.graph.passes.rewrite import operand
from nestc.graph.region import Region
from nestc.quant.apply import apply
from nestc.quant.choose import Assignment, Wishes, choose, data_inputs, overridden
from nestc.quant.derive import derive
from nestc.quant.profile import Profile
from nestc.quant.saturate import drop_saturated
from nestc.quant.scheme import FLOAT, Scheme, scheme_named
from nestc.targets.api import Offer, Target

Overrides = Mapping[str, Scheme | None]

Cutter = Callable[[Sequence[Region], Sequence[Target]], Sequence[str]]
"""Tells after which nodes regions are to be cut so that targets take pieces of them (`nestc.partition.cut`)."""

ELSEWHERE = "int8"
"""The scheme of what no target asks a format for."""


@dataclass(frozen=True)
class Taken:
    """A region that a target takes once its nodes are in `scheme`; ``seconds`` of it are modelled, None: not known.

    ``stores``: its results are integers, so that nothing else of it exists outside.
    """

    target: str
    scheme: Scheme
    nodes: tuple[str, ...]
    seconds: float | None
    stores: bool

    def __str__(self) -> str:
        return self.target if self.seconds is None else f"{self.target}, {self.seconds * 1e6:.1f} us modelled"


@dataclass(frozen=True)
class Formats:
    """The scheme of the most of a network, what single nodes get instead of it, and for whom."""

    scheme: Scheme
    wishes: Wishes
    taken: Mapping[str, Taken] = field(default_factory=dict[str, Taken])


def by_devices(
    prepared: Model,
    profile: Profile | None,
    targets: Sequence[Target],
    elsewhere: str | Scheme = ELSEWHERE,
    overrides: Overrides | None = None,
    cut: Cutter | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Formats:
    """The formats in which most of a prepared model is taken by targets whose offers ask for one (`QuantSpec`).

    For each scheme asked for the whole model is written in it, formed into regions, cut, and offered; what is taken
    gets that scheme. Where several targets would take a node, the one that models the least time for its region has it
    (launches and transfers are not counted, since its neighbours may be on the same device); of equal ones the first
    given. What nobody takes gets the scheme `elsewhere` (``float``: none), or that of the integers beside it. The mix
    is offered again, and what is refused there falls back to its next best.

    ``seconds`` says what each node takes elsewhere in that scheme: devices then get only regions that they compute
    faster. Where no device gets anything, all gets the scheme `elsewhere`. Without a profile only schemes without
    ranges are tried, and float elsewhere. `overrides` stand. Raises QuantizationError if nothing is left to quantize,
    ShapeError for open sizes other than the batch.
    """
    asked = formats_asked(targets)
    if profile is None:
        asked = {name: who for name, who in asked.items() if not scheme_named(name).integer}
    other = None if elsewhere == FLOAT else scheme_named(elsewhere) if isinstance(elsewhere, str) else elsewhere
    if profile is None and other is not None and other.integer:
        other = None
    if not asked:
        return Formats(_required(other, targets), Wishes())
    return _Trials(prepared, profile, asked, other, overrides or {}, cut, seconds).run()


def _required(scheme: Scheme | None, targets: Sequence[Target]) -> Scheme:
    """The scheme that is left for everything. Raises QuantizationError if there is none."""
    if scheme is None:
        listed = ", ".join(target.name for target in targets) or "none"
        raise QuantizationError(
            f"scheme devices has nothing to change: none of the targets ({listed}) asks for a format, or what they ask "
            "for needs a profile (nestc calibrate)"
        )
    return scheme


def formats_asked(targets: Sequence[Target]) -> dict[str, list[tuple[Target, tuple[Offer, ...]]]]:
    """The schemes that offers ask for, in the targets' order, each with the targets and those of their offers."""
    found: dict[str, list[tuple[Target, tuple[Offer, ...]]]] = {}
    for target in targets:
        for name in dict.fromkeys(offer.quant.scheme for offer in target.offers if offer.quant is not None):
            offers = tuple(offer for offer in target.offers if offer.quant is not None and offer.quant.scheme == name)
            found.setdefault(name, []).append((target, offers))
    return found


def formed_regions(
    model: Model, profile: Profile, assignment: Assignment, targets: Sequence[Target], cut: Cutter | None
) -> list[Region]:
    """The regions of a prepared model of known sizes as an assignment writes it; no accuracy tool has run."""
    written = apply(model, assignment, derive(model, profile, assignment))
    drop_saturated(written)
    optimised = pipeline.optimize(written)
    whole = regions.regions(regions.form(optimised))
    cuts = [] if cut is None else cut(whole, targets)
    return regions.regions(regions.form(optimised, cuts=cuts)) if cuts else whole


class _Trials:
    """A prepared model of known sizes, and who takes which of its nodes in which scheme, as far as tried."""

    def __init__(
        self,
        prepared: Model,
        profile: Profile | None,
        asked: Mapping[str, Sequence[tuple[Target, tuple[Offer, ...]]]],
        elsewhere: Scheme | None,
        overrides: Overrides,
        cut: Cutter | None,
        seconds: Mapping[str, float] | None,
    ) -> None:
        self.model, _ = bind_batch(prepared)
        if unbound_dims(self.model):
            raise ShapeError("scheme devices offers regions of known sizes; bind the others (--shape, --dim)")
        self.profile = profile or Profile(prepared.hash, "minmax", 0, {})
        self.asked = {scheme_named(name): who for name, who in asked.items()}
        integer = next((scheme for scheme in self.asked if scheme.integer), None)
        # Most nodes have it, so that tools for a whole network (equalization) fit it.
        self.main = integer or elsewhere or next(iter(self.asked))
        self.elsewhere, self.overrides, self.cut, self.seconds = elsewhere, overrides, cut, seconds
        self.targets = list(dict.fromkeys(target for who in asked.values() for target, _ in who))
        self.given = overridden(self.model, overrides)
        self.candidates: dict[str, list[Taken]] = {}
        self.roles: dict[str, str] = {}
        self.results: dict[str, str] = {}
        self.refusals: dict[str, list[str]] = {}
        self.readers: dict[str, list[str]] = {}
        for node in self.model.ir.graph:
            for value in node.inputs:
                if value is not None:
                    self.readers.setdefault(value.name or "", []).append(node.name or "")

    def run(self) -> Formats:
        """Offer the model in each scheme, then mixes, until all of a mix is taken as it was meant."""
        for scheme in self.asked:
            assignment = choose(self.model, scheme, self.overrides, self.profile)
            self.note(assignment)
            for taken in self.offered(assignment, {scheme}, self.refusals):
                for name in taken.nodes if self.worth(taken) else ():
                    if name not in self.given and self.roles.get(name) not in ("tail", None):
                        self.candidates.setdefault(name, []).append(taken)
        for name, found in self.candidates.items():
            found.sort(key=lambda taken: math.inf if taken.seconds is None else taken.seconds)
            schemes = [taken.scheme for taken in found]  # two devices of one kind ask for the same
            self.candidates[name] = [taken for n, taken in enumerate(found) if taken.scheme not in schemes[:n]]
        while True:
            wanted = {name: each[0] for name, each in self.candidates.items() if each}
            wishes = self.wishes(wanted)
            assignment = choose(self.model, self.main, self.overrides, self.profile, wishes)
            held = {(name, taken.scheme) for taken in self.offered(assignment, set(self.asked)) for name in taken.nodes}
            refused = [name for name, taken in wanted.items() if (name, taken.scheme) not in held]
            if not refused:
                if not wanted and self.elsewhere is not None:
                    return Formats(self.elsewhere, Wishes())
                return Formats(self.main, wishes, wanted)
            for name in refused:  # each time fewer are left, so that this ends
                del self.candidates[name][0]

    def worth(self, taken: Taken) -> bool:
        """Whether a device computes a region faster than its nodes are computed elsewhere, as far as both are known."""
        if self.seconds is None or taken.seconds is None:
            return True
        return taken.seconds < sum(self.seconds.get(name, 0.0) for name in taken.nodes)

    def note(self, assignment: Assignment) -> None:
        """Remember the roles of nodes and the names of their results; integers tell more than other formats."""
        for node in self.model.ir.graph:
            decision, name = assignment.of(node), node.name or ""
            if decision.role != "float" and (name not in self.roles or assignment.scheme.integer):
                self.roles[name] = decision.role
                self.results[name] = assignment.result(node).name or ""

    def offered(
        self, assignment: Assignment, schemes: set[Scheme], refusals: dict[str, list[str]] | None = None
    ) -> list[Taken]:
        """The regions of the model in these formats that a target takes whose offers ask for one of `schemes`."""
        found: list[Taken] = []
        for region in formed_regions(self.model, self.profile, assignment, self.targets, self.cut):
            nodes = dict.fromkeys(op.name for op in region.ops)
            decided = {name: assignment.decisions[name] for name in nodes if name in assignment.decisions}
            for scheme in schemes & {each.scheme for each in decided.values() if each.scheme is not None}:
                inside = tuple(name for name, each in decided.items() if each.scheme == scheme)
                for target, offers in self.asked[scheme]:
                    taken = _taken(target.name, offers, region, scheme, inside)
                    if isinstance(taken, Taken):
                        found.append(taken)
                    elif refusals is not None:
                        for name in inside:
                            refusals.setdefault(name, []).append(f"not {scheme.name} for {target.name}: {taken}")
        return found

    def wishes(self, wanted: Mapping[str, Taken]) -> Wishes:
        """What each node is to be computed in, given who is to take it."""
        stored = {name for name, taken in wanted.items() if taken.stores and self.roles[name] != "moving"}
        schemes: dict[str, Scheme | None] = {name: taken.scheme for name, taken in wanted.items()}
        because = {name: self.in_words(name, taken) for name, taken in wanted.items()}
        self.join(schemes, because, {self.results[name]: wanted[name].scheme for name in stored})
        for node in self.model.ir.graph:
            name = node.name or ""
            if name not in schemes and self.roles.get(name) != "tail":
                schemes[name] = self.elsewhere
            if name not in wanted and self.roles.get(name) == "product" and self.refusals.get(name):
                because[name] = "; ".join([*([because[name]] if name in because else []), *self.refusals[name]])
        forced = frozenset(name for name in wanted if self.roles[name] in ("active", "moving"))
        return Wishes(schemes, forced, frozenset(stored), because)

    def join(self, schemes: dict[str, Scheme | None], because: dict[str, str], kept: dict[str, Scheme]) -> None:
        """Let nodes that nobody takes have the integers beside them, so that no tensor has two forms.

        A node has those that a device stores what it reads in (`kept`, by tensor), moved or not; one that is no product
        also those of who reads what it makes.
        """
        if self.elsewhere is None or not self.elsewhere.integer:
            return
        free = [node for node in self.model.ir.graph if (node.name or "") not in schemes]
        free = [node for node in free if self.roles.get(node.name or "") in ("product", "active", "moving")]
        made = dict(kept)
        changed = True
        while changed:
            changed = False
            for node in free:
                name = node.name or ""
                if name in schemes:
                    continue
                reads = [value for index in data_inputs(node) if (value := operand(node, index)) is not None]
                beside = [made.get(value.name or "") for value in reads]
                if self.roles[name] != "product":
                    beside += [schemes.get(user) for user in self.readers.get(self.results[name], ())]
                like = next((each for each in beside if each is not None and each.integer), None)
                if like is None:
                    continue
                schemes[name], because[name], changed = like, f"{like.name} as what stands beside it", True
                if self.roles[name] == "moving":
                    made[self.results[name]] = like

    def in_words(self, name: str, taken: Taken) -> str:
        """Who takes a node, and who would have taken it otherwise."""
        others = [f"{each.scheme.name} for {each}" for each in self.candidates[name][1:]]
        return f"for {taken}" + (f", rather than {' or '.join(others)}" if others else "")


def _taken(target: str, offers: Sequence[Offer], region: Region, scheme: Scheme, nodes: tuple[str, ...]) -> Taken | str:
    """How the first of the offers that takes a region does so, or the reason why none does."""
    reasons: list[str] = []
    for offer in offers:
        reason = offer.refusal(region)
        if reason is None:
            seconds = None if offer.cost is None else offer.cost(region)
            integers = all("int" in region.types[name].dtype for name in region.outputs)
            return Taken(target, scheme, nodes, seconds, integers and scheme.integer)
        reasons.append(reason)
    return next((each for each in reasons if not each.startswith("offer ")), reasons[0])
