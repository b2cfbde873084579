"""Tilings: the model follows the lowering, searches are repeatable and kept, shares cover a layer once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.cache import TuningStore
from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.timing import RTL
from nestc.targets.vta import schedule
from nestc.targets.vta.geometry import geometry
from nestc.targets.vta.layer import Clip, FeatureMap, Init, Layer, Maximum, Product, Shift, Step
from nestc.targets.vta.lower import lower
from nestc.targets.vta.model import Costs, Walk, estimate, fits, whole
from nestc.targets.vta.schedule import candidates, choose, parts, rank, search_tiling, simulated
from nestc.targets.vta.split import choose_split, seconds, shares
from nestc.targets.vta.tiling import Share, Tiling

CONFIG = VtaConfig()
SMALL = VtaConfig(name="small", log_inp_buff_size=12, log_wgt_buff_size=15, log_acc_buff_size=14, log_uop_buff_size=13)


def convolution(
    channels: tuple[int, int] = (64, 64),
    size: tuple[int, int] = (14, 14),
    kernel: int = 3,
    stride: int = 1,
    *,
    depthwise: bool = False,
    residual: bool = False,
    vector: bool = False,
    seed: int = 0,
) -> Layer:
    """A convolution with bias, shift and ReLU, perhaps a residual sum."""
    pad, random = kernel // 2, np.random.default_rng(seed)
    height, width = ((extent + 2 * pad - kernel) // stride + 1 for extent in size)
    into, out = (-(-count // 16) for count in channels)
    pairs = tuple((o, i) for o in range(out) for i in range(into) if not depthwise or o == i)
    taps = tuple((y - pad, x - pad) for y in range(kernel) for x in range(kernel))
    weights = random.integers(-128, 128, (len(pairs), len(taps), 16, 16)).astype(np.int8)
    sources = {"x": FeatureMap("x", 1, channels[0], *size)}
    steps: list[Step] = [
        Init(random.integers(-999, 999, channels[1])),
        Product("x", (stride, stride), taps, pairs, weights),
    ]
    if residual:
        sources["r"] = FeatureMap("r", 1, channels[1], height, width)
        eye = np.broadcast_to(np.eye(16, dtype=np.int8), (out, 1, 16, 16)).copy()
        steps.append(Product("r", (1, 1), ((0, 0),), tuple((o, o) for o in range(out)), eye))
    amounts = random.integers(7, 9, channels[1]) if vector else np.array(8)
    steps += [Shift(amounts), Clip(0, 127)]
    return Layer("conv", FeatureMap("y", 1, channels[1], height, width), sources, tuple(steps))


def pooling(channels: int = 64, size: int = 28) -> Layer:
    """Maximum over 3 x 3, stride 2."""
    taps = tuple((y - 1, x - 1) for y in range(3) for x in range(3))
    source, out = FeatureMap("x", 1, channels, size, size), FeatureMap("y", 1, channels, size // 2, size // 2)
    return Layer("pool", out, {"x": source}, (Init(np.array(-128)), Maximum("x", (2, 2), taps)))


LAYERS = [
    convolution(),
    convolution((64, 128), (28, 28), stride=2, vector=True),
    convolution((128, 128), (7, 7), residual=True),
    convolution((96, 96), (14, 14), depthwise=True),
    convolution((40, 24), (9, 11), kernel=1),
    convolution((16, 16), (30, 30), kernel=5, stride=2),
    pooling(),
]
IDS = [f"{number}-{layer.name}" for number, layer in enumerate(LAYERS)]

tilings = st.builds(Tiling, st.integers(3, 16), st.integers(5, 30), st.integers(1, 9), st.integers(1, 9), st.booleans())


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(LAYERS), tilings, st.sampled_from([CONFIG, SMALL]))
def test_fits_exactly_what_lowers_and_counts_its_instructions(layer: Layer, tiling: Tiling, config: VtaConfig) -> None:
    share = whole(layer, config)
    if not fits(layer, share, tiling, config):
        with pytest.raises(TargetError):
            lower(layer, share, tiling, config)
        return
    kernel, _ = lower(layer, share, tiling, config)
    expected = estimate(layer, share, tiling, config)
    if layer.name == "pool":
        return  # windows count as whole in the model, also at borders
    # The model leaves out what is loaded once a layer: the constant input element or the identity.
    assert abs(expected.instructions - len(kernel.body)) <= 0.02 * len(kernel.body) + 2


@pytest.mark.parametrize("layer", LAYERS, ids=IDS)
def test_the_model_is_close_to_the_simulator(layer: Layer) -> None:
    share = whole(layer, CONFIG)
    for choice in rank(Walk(geometry(layer, CONFIG), share, CONFIG, Costs.of(RTL, CONFIG)))[:2]:
        assert choice.modelled == pytest.approx(simulated(layer, share, choice.tiling, CONFIG), rel=0.1)


@pytest.mark.parametrize("config", [CONFIG, SMALL], ids=lambda config: config.name)
def test_every_candidate_fits(config: VtaConfig) -> None:
    layer = convolution((64, 128), (28, 28), stride=2, vector=True)
    found = list(candidates(Walk(geometry(layer, config), whole(layer, config), config, Costs.of(RTL, config))))
    assert found and len(set(found)) == len(found)
    assert all(fits(layer, whole(layer, config), tiling, config) for tiling in found)


@pytest.mark.parametrize("layer", LAYERS, ids=IDS)
def test_few_micro_ops_are_enough(layer: Layer) -> None:
    few = replace(CONFIG, name="few", log_uop_buff_size=6)
    tiling = choose(layer, whole(layer, few), few, search=False)
    assert simulated(layer, whole(layer, few), tiling, few) > 0


def test_parts_cover_from_the_whole_down() -> None:
    assert parts(7) == [7, 4, 3, 2, 1]
    assert parts(1) == [1]
    many = parts(2048)
    assert many[0] == 2048 and many[-1] == 1 and len(many) <= 10


def test_a_search_is_repeatable_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, store = convolution((32, 32)), TuningStore(tmp_path / "tuning.sqlite")
    share = whole(layer, CONFIG)
    monkeypatch.setattr(schedule, "_found", {})
    first = search_tiling(layer, share, CONFIG, budget=2, store=store)
    assert first.simulated == simulated(layer, share, first.tiling, CONFIG)
    monkeypatch.setattr(schedule, "_found", {})
    assert search_tiling(layer, share, CONFIG, budget=2, store=TuningStore(tmp_path / "other.sqlite")) == first
    monkeypatch.setattr(schedule, "_found", {})
    monkeypatch.setattr(schedule, "simulated", lambda *_: pytest.fail("the store was not asked"))
    other = convolution((32, 32), seed=1)  # other numbers, the same geometry
    assert search_tiling(other, share, CONFIG, budget=2, store=store) == first


def test_a_tiling_that_becomes_no_instructions_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, store = convolution((32, 16)), TuningStore(tmp_path / "tuning.sqlite")
    share = whole(layer, CONFIG)
    order = rank(Walk(geometry(layer, CONFIG), share, CONFIG, Costs.of(RTL, CONFIG)))
    real = schedule.simulated

    def only_others(*given: object) -> int:
        if given[2] == order[0].tiling:
            raise TargetError("too long")
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(schedule, "_found", {})
    monkeypatch.setattr(schedule, "simulated", only_others)
    assert search_tiling(layer, share, CONFIG, store=store).tiling in [each.tiling for each in order[1:]]
    monkeypatch.setattr(schedule, "_found", {})
    monkeypatch.setattr(schedule, "simulated", lambda *_: (_ for _ in ()).throw(TargetError("too long")))
    with pytest.raises(TargetError, match="too long"):
        search_tiling(layer, share, CONFIG, store=TuningStore(tmp_path / "other.sqlite"))


def test_results_of_other_code_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, store = convolution((16, 16)), TuningStore(tmp_path / "tuning.sqlite")
    share = whole(layer, CONFIG)
    monkeypatch.setattr(schedule, "_found", {})
    search_tiling(layer, share, CONFIG, budget=1, store=store)
    monkeypatch.setattr(schedule, "_version", lambda: "another")
    asked: list[Tiling] = []
    monkeypatch.setattr(schedule, "simulated", lambda *given: asked.append(given[2]) or 1)
    assert search_tiling(layer, share, CONFIG, budget=1, store=store).simulated == 1
    assert len(asked) == 1


def test_geometry_knows_what_matters() -> None:
    keys = [geometry(layer, CONFIG).key for layer in LAYERS]
    assert len(set(keys)) == len(keys)
    assert geometry(convolution(seed=3), CONFIG).key == keys[0]


def test_the_model_alone_decides_without_search() -> None:
    layer = convolution((48, 32), (10, 10))
    share = whole(layer, CONFIG)
    best = rank(Walk(geometry(layer, CONFIG), share, CONFIG, Costs.of(RTL, CONFIG)))[0]
    assert choose(layer, share, CONFIG, search=False) == best.tiling


def test_a_layer_that_fits_nowhere_is_refused() -> None:
    tiny = VtaConfig(name="tiny", log_inp_buff_size=7, log_wgt_buff_size=12, log_acc_buff_size=8, log_uop_buff_size=10)
    with pytest.raises(TargetError, match="not even the smallest tile fits the buffers of tiny"):
        choose(convolution(), whole(convolution(), tiny), tiny)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 9))
def test_shares_cover_the_output_once(channels: int, rows: int, count: int) -> None:
    layer = convolution((16, channels), (rows, 5))
    for way in shares(layer, count, CONFIG):
        covered = np.zeros((-(-channels // 16), rows), np.int64)
        for share in way:
            covered[slice(*share.blocks), slice(*share.rows)] += 1
        assert (covered == 1).all() and 1 <= len(way) <= count


def test_a_split_is_chosen_where_it_pays() -> None:
    large = convolution((128, 128), (14, 14))
    way = choose_split(large, 4, CONFIG)
    assert len(way) == 4
    times = [estimate(large, share, choose(large, share, CONFIG, search=False), CONFIG).cycles for share in way]
    assert max(times) < 0.4 * seconds(large, CONFIG) * CONFIG.clock_hz
    assert choose_split(large, 1, CONFIG) == [whole(large, CONFIG)]
    assert Share((0, 1), (0, 1)) in choose_split(convolution((16, 16), (1, 1), kernel=1), 4, CONFIG)
