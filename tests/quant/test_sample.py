"""Sampling of ways to quantize: each way once, the same for the same seed, and guided by what has been seen."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from quant_nets import batches, chain

import nestc
from nestc.autoscheme import sample_ways
from nestc.quant.sample import SPACE, Trial, best_of, sample, scheme_of
from nestc.quant.score import Score

AXES = {"scheme": ("int8", "int16"), "method": ("minmax", "mse", "entropy"), "granularity": ("tensor", "channel")}
PENALTY = {"int8": 0.1, "mse": 0.0, "minmax": 0.02, "entropy": 0.04, "tensor": 0.3}


def made_up(choice) -> Score:
    """A loss that is a sum over the axes."""
    return Score(10, 1.0 - sum(PENALTY.get(value, 0.0) for value in choice.values()), 1.0, 20.0)


@pytest.mark.parametrize("sampler", ["optuna", "random", "grid"])
def test_every_way_is_tried_once_and_the_best_is_found(sampler: str) -> None:
    trials = sample(made_up, 100, sampler, AXES)
    assert len(trials) == 12 == len({tuple(trial.choice.values()) for trial in trials})
    assert best_of(trials).choice == {"scheme": "int16", "method": "mse", "granularity": "channel"}


@pytest.mark.parametrize("sampler", ["optuna", "random"])
def test_a_seed_settles_the_order(sampler: str) -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        return [tuple(trial.choice.values()) for trial in sample(made_up, 9, sampler, AXES, seed)]

    assert order(1) == order(1) and order(1) != order(2)


def test_the_grid_goes_in_the_order_of_the_space() -> None:
    trials = sample(made_up, 3, "grid", AXES)
    assert [tuple(trial.choice.values()) for trial in trials] == [
        ("int8", "minmax", "tensor"), ("int8", "minmax", "channel"), ("int8", "mse", "tensor"),
    ]  # fmt: skip


def test_optuna_needs_fewer_trials_than_chance_where_axes_add_up() -> None:
    wide = {"scheme": ("int8", "int16"), "method": tuple("abcdefgh"), "granularity": tuple("ijkl")}
    penalty = (
        {"int8": 0.1} | {name: 0.02 * i for i, name in enumerate("abcdefgh")} | dict(zip("ijkl", (0.3, 0, 0.1, 0.2)))
    )

    def loss(choice) -> Score:
        return Score(10, 1.0 - sum(penalty.get(value, 0.0) for value in choice.values()), 1.0, 20.0)

    def needed(sampler: str) -> float:
        found: list[int] = []
        for seed in range(6):
            trials = sample(loss, 64, sampler, wide, seed)
            found.append(trials.index(best_of(trials)) + 1)
        return float(np.mean(found))

    assert needed("optuna") < 28 < 32.5  # 32.5 is what chance needs on average


def test_ties_are_decided_by_the_noise() -> None:
    trials = [Trial({}, Score(1, 0.9, 1.0, noise)) for noise in (10.0, math.inf, 30.0)]
    assert best_of(trials) is trials[1]
    assert trials[0].value == pytest.approx(0.1 - 1e-3)
    assert Trial({}, Score(1, 0.8, 1.0, math.inf)).value > trials[0].value


def test_the_space_is_of_schemes_that_exist() -> None:
    for axis, values in SPACE.items():
        for value in values:
            choice = {name: options[0] for name, options in SPACE.items()} | {axis: value}
            scheme = scheme_of(choice)
            assert scheme.method == choice["method"]
            assert scheme.weight.per_channel == (choice["granularity"] == "channel")
            assert scheme.weight_method == choice["weight-method"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sampler": "optona"}, "did you mean 'optuna'"),
        ({"trials": 0}, "one trial"),
        ({"space": {"scheme": ()}}, "at least one way"),
        ({"space": {"scheme": ("int9",)}}, "no scheme 'int9'"),
        ({"space": {"scheme": ("int8",), "method": ("guess",)}}, "no calibration method 'guess'"),
    ],
)
def test_bad_searches(arguments: dict, said: str) -> None:
    def objective(choice) -> Score:
        scheme_of(choice)
        return made_up(choice)

    with pytest.raises(nestc.Error, match=said) as caught:
        sample(objective, **({"trials": 2, "space": AXES} | arguments))
    assert "\n" not in str(caught.value)


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(nestc.Error, match=r"pip install 'nestc\[search\]'"):
        sample(made_up, 3, "optuna", AXES)


def test_ways_are_quantized_and_run() -> None:
    data = batches(2, size=8)
    space = {"scheme": ("int8", "int8-pow2"), "method": ("mse", "percentile:99")}
    trials = sample_ways(chain(), nestc.calibrate(chain(), data), data, 3, sampler="grid", space=space)
    assert [trial.choice["method"] for trial in trials] == ["mse", "percentile:99", "mse"]
    noise = [trial.score.sqnr_db for trial in trials]
    assert noise[0] > noise[1] and noise[0] > noise[2] > 10
    assert all(trial.score.samples == 16 for trial in trials)
