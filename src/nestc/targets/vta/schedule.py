"""Schedule search: tilings of a layer, ranked by the model, the best of them verified by the timing simulator."""

from __future__ import annotations

import hashlib
import json
from bisect import insort
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources

import numpy as np

from nestc.cache import TuningStore
from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.timing import RTL, UOP_BYTES, Timing, simulate_timing
from nestc.targets.vta.emit import emit
from nestc.targets.vta.geometry import geometry
from nestc.targets.vta.layer import Layer
from nestc.targets.vta.link import link
from nestc.targets.vta.lower import lower
from nestc.targets.vta.memory import Dram
from nestc.targets.vta.model import Costs, Estimate, Walk
from nestc.targets.vta.tiling import Share, Tiling

_WALKS = 60  # tilings that the model walks a layer, in the order of their bounds
_TRUST = 0.01  # difference to the simulator within which the order of the model is believed
_BEST = 4  # tilings that have to be better than what is not walked
_SIZES = 10  # sizes tried of a dimension; more of them differ too little to matter
_SOURCES = {
    "nestc.targets.vta": (
        "schedule",
        "model",
        "geometry",
        "tiling",
        "lower",
        "shape",
        "sram",
        "constants",
        "emit",
        "link",
    ),
    "nestc.runtime.vta": ("config", "isa", "timing"),
}
_found: dict[str, Choice] = {}


@dataclass(frozen=True)
class Choice:
    """A tiling, the cycles that the model expects, and those of the timing simulator if it was verified there.

    ``edges`` as in `Estimate`, modelled.
    """

    tiling: Tiling
    modelled: int
    edges: int = 0
    simulated: int | None = None

    @property
    def cycles(self) -> int:
        """The better known of the two."""
        return self.modelled if self.simulated is None else self.simulated

    @property
    def order(self) -> tuple[int, tuple[int, int, int, int, bool]]:
        """What the best has least of: cycles, of which layers before and after in the stream hide half of the edges."""
        return self.cycles - self.edges // 2, _values(self.tiling)


def choose(
    layer: Layer, share: Share, config: VtaConfig, timing: Timing = RTL, *, search: bool = True, budget: int = 4
) -> Tiling:
    """The tiling of `share` of `layer` that takes the fewest cycles of those tried; see `search_tiling`."""
    return search_tiling(layer, share, config, timing, search=search, budget=budget).tiling


def search_tiling(
    layer: Layer,
    share: Share,
    config: VtaConfig,
    timing: Timing = RTL,
    *,
    search: bool = True,
    budget: int = 4,
    store: TuningStore | None = None,
) -> Choice:
    """The best tiling of a share and its cycles: up to `budget` that the model likes best are lowered and timed.

    Without ``search`` the model alone decides. Layers of equal geometry are searched once a process, and verified
    results are kept in `store` (the user's tuning store if None). Raises TargetError if no tiling fits the SRAMs.
    """
    sizes = geometry(layer, config)
    key = _key(sizes.key, share, config, timing, budget if search else 0)
    if key in _found:
        return _found[key]
    store = store or TuningStore()
    kept = _read(store.get(key)) if search else None
    walk = Walk(sizes, share, config, Costs.of(timing, config))
    if kept is None or walk.slots(kept.tiling) is None:
        ranked = rank(walk)
        if not ranked:
            raise TargetError(f"layer {layer.name}: not even the smallest tile fits the buffers of {config.name}")
        kept = _verified(layer, share, config, timing, ranked, budget) if search else ranked[0]
        if search:
            store.put(key, json.dumps(asdict(kept)))
    _found[key] = kept
    return kept


def estimated(layer: Layer, share: Share, config: VtaConfig, timing: Timing = RTL) -> Estimate:
    """What the model expects of the tiling that it likes best."""
    best = search_tiling(layer, share, config, timing, search=False).tiling
    return Walk(geometry(layer, config), share, config, Costs.of(timing, config)).estimate(best)


def rank(walk: Walk) -> list[Choice]:
    """Tilings that fit, by modelled cycles; those that start too many instructions are not walked."""
    bounds = sorted((walk.bound(tiling), _values(tiling)) for tiling in candidates(walk))
    choices: dict[Estimate, Choice] = {}
    scores: list[int] = []
    work = 0
    for bound, values in bounds[:_WALKS]:
        if scores and bound + work > scores[min(len(scores), _BEST) - 1]:
            break
        estimate = walk.estimate(Tiling(*values))
        choice = Choice(Tiling(*values), estimate.cycles, estimate.edges)
        if estimate in choices:
            continue  # the orders of loops do not differ here
        choices[estimate] = choice
        insort(scores, choice.order[0])
        work = min(work or estimate.compute - bound, estimate.compute - bound)
    return sorted(choices.values(), key=lambda choice: choice.order)


def candidates(walk: Walk) -> Iterator[Tiling]:
    """Tilings that fit: whole rows if they can, dimensions cut into nearly equal parts, both orders."""
    share, sizes = walk.share, walk.sizes
    height, blocks = share.rows[1] - share.rows[0], share.blocks[1] - share.blocks[0]
    found = False
    for columns in parts(sizes.width):
        if found and 2 * columns < sizes.width:
            return
        for rows in parts(height):
            for count in parts(blocks):
                for inputs in parts(walk.most_inputs(count)):
                    tiling = Tiling(rows, columns, count, inputs)
                    if walk.slots(tiling) is None or not walk.encodes(tiling):
                        continue
                    found = True
                    yield tiling
                    if count < blocks and (rows < height or columns < sizes.width):
                        yield replace(tiling, blocks_outer=True)


def parts(size: int) -> list[int]:
    """Sizes that cut `size` into 1, 2, 3 ... nearly equal parts, from the largest on; at most `_SIZES` of them."""
    sizes = sorted({-(-size // count) for count in range(1, size + 1)}, reverse=True)
    if len(sizes) <= _SIZES:
        return sizes
    kept = {sizes[round(at * (len(sizes) - 1) / (_SIZES - 1))] for at in range(_SIZES)}
    return sorted(kept, reverse=True)


def simulated(layer: Layer, share: Share, tiling: Tiling, config: VtaConfig, timing: Timing = RTL) -> int:
    """Cycles that the timing simulator counts for one tiling, from an idle machine to the last store."""
    kernel, _ = lower(layer, share, tiling, config)
    dram = Dram(config)
    for parameter in kernel.params:
        dram.place(parameter.name, parameter.size * np.dtype(parameter.dtype).itemsize)
    stream = link(emit(kernel, dram.addresses, config), config, dram.end // UOP_BYTES)
    return simulate_timing(stream.instructions, config, timing).cycles


def _verified(
    layer: Layer, share: Share, config: VtaConfig, timing: Timing, ranked: list[Choice], budget: int
) -> Choice:
    """The best of tilings in the order of the model, timed one after the other until model and simulator agree.

    A tiling that becomes no instructions is passed over; raises its TargetError if none does.
    """
    timed: list[Choice] = []
    problem: TargetError | None = None
    for each in ranked:
        try:
            timed.append(replace(each, simulated=simulated(layer, share, each.tiling, config, timing)))
        except TargetError as refusal:
            problem = problem or refusal
            continue
        # The model is right here, so the next ones are no better.
        if len(timed) == budget or abs(timed[-1].cycles - each.modelled) <= _TRUST * each.modelled:
            break
    if not timed:
        assert problem is not None
        raise problem
    return min(timed, key=lambda choice: choice.order)


def _values(tiling: Tiling) -> tuple[int, int, int, int, bool]:
    """The fields of a tiling, to order and to make them by."""
    return tiling.rows, tiling.columns, tiling.blocks, tiling.inputs, tiling.blocks_outer


def _key(sizes: str, share: Share, config: VtaConfig, timing: Timing, budget: int) -> str:
    text = repr((_version(), sizes, share, config, timing, budget))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _version() -> str:
    """A hash of the code that results depend on, so that a change of it makes older results unknown."""
    digest = hashlib.sha256()
    for package, modules in _SOURCES.items():
        for module in modules:
            digest.update(resources.files(package).joinpath(f"{module}.py").read_bytes())
    return digest.hexdigest()


def _read(text: str | None) -> Choice | None:
    """A choice as the store keeps it; None if it is not one."""
    try:
        fields = json.loads(text or "")
        return Choice(Tiling(**fields.pop("tiling")), **{name: int(number) for name, number in fields.items()})
    except (ValueError, TypeError, KeyError):
        return None
