"""Sample ways to quantize (scheme x calibration method x clipping x granularity): by Optuna, at random, all in turn."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from nestc.errors import QuantizationError
from nestc.quant.run import Progress
from nestc.quant.scheme import Scheme, nearest, scheme_named
from nestc.quant.score import Score
from nestc.quant.threshold import parse_method

Sampler = Literal["optuna", "random", "grid"]
Choice = Mapping[str, str]
"""One value of each axis of the space, by the axis's name."""

SPACE: Mapping[str, tuple[str, ...]] = {
    "scheme": ("int8", "int8-symmetric", "int8-pow2"),
    "method": ("minmax", "percentile:99.9", "percentile:99.99", "percentile:99.999", "mse", "entropy"),
    "granularity": ("tensor", "channel"),
    "weight-method": ("minmax", "mse"),
}
"""What is sampled: the scheme, how ranges of activations are chosen (and how much is clipped), what of a weight shares
a scale, and how ranges of weights are chosen: the kinds of choice of Quantune (Lee et al., 2022, arXiv 2202.05048)."""

TIE = 1e-4
"""Loss that a dB of signal-to-noise ratio is worth: it decides between ways that lose the same."""

STARTUP = 8
"""Ways that Optuna draws at random before its estimator has something to go by."""

REPEATS = 20
"""So many times in a row Optuna may propose what has been tried before a way not tried yet is drawn at random."""


@dataclass(frozen=True)
class Trial:
    """One way that was tried and what it scored; trials are compared by ``value``, of which less is better."""

    choice: Choice
    score: Score

    @property
    def value(self) -> float:
        """The loss, less a little for a good signal-to-noise ratio."""
        return self.score.loss - TIE * min(max(self.score.sqnr_db, -100.0), 100.0)


def scheme_of(choice: Choice) -> Scheme:
    """The scheme of a choice, with its method of choosing ranges. Raises QuantizationError for what does not exist."""
    options = ",".join(f"{key}={choice[key]}" for key in ("granularity", "weight-method") if key in choice)
    scheme = scheme_named(choice["scheme"] + (f":{options}" if options else ""))
    if "method" in choice:
        parse_method(choice["method"])
        scheme = dataclasses.replace(scheme, method=choice["method"])
    return scheme


def sample(
    objective: Callable[[Choice], Score],
    trials: int,
    sampler: Sampler = "optuna",
    space: Mapping[str, Sequence[str]] = SPACE,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Trial]:
    """Try `trials` different ways (all, if the space has no more) and return them in order.

    ``optuna``: its tree-structured Parzen estimator, which proposes what resembles the good ones so far. ``random``:
    without repetition. ``grid``: in the order of the space, the last axis fastest. Raises QuantizationError for an
    unknown sampler or an empty space, or if Optuna is not installed.
    """
    if sampler not in get_args(Sampler):
        raise QuantizationError(f"there is no sampler {sampler!r}{nearest(sampler, get_args(Sampler))}")
    ways = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    if not ways or trials < 1:
        raise QuantizationError("a search needs at least one way to quantize and one trial")
    wanted = min(trials, len(ways))
    done: list[Trial] = []
    proposals = {"optuna": _optuna, "random": _random, "grid": _grid}[sampler](ways, space, seed, done)
    for number, choice in enumerate(itertools.islice(proposals, wanted)):
        if progress is not None:
            progress(f"trial {number + 1} of {wanted}: " + ", ".join(choice.values()), number / wanted)
        done.append(Trial(choice, objective(choice)))
    return done


def best_of(trials: Sequence[Trial]) -> Trial:
    """The best trial, the earliest of equals."""
    return min(trials, key=lambda trial: trial.value)


def _grid(
    ways: Sequence[Choice], space: Mapping[str, Sequence[str]], seed: int, done: Sequence[Trial]
) -> Iterator[Choice]:
    yield from ways


def _random(
    ways: Sequence[Choice], space: Mapping[str, Sequence[str]], seed: int, done: Sequence[Trial]
) -> Iterator[Choice]:
    for index in np.random.default_rng(seed).permutation(len(ways)).tolist():
        yield ways[index]


def _optuna(
    ways: Sequence[Choice], space: Mapping[str, Sequence[str]], seed: int, done: Sequence[Trial]
) -> Iterator[Choice]:
    """Proposals of Optuna; what it proposes again is answered from `done`, which has every way yielded so far."""
    try:
        import optuna
    except ImportError:
        raise QuantizationError("the sampler optuna needs Optuna: pip install 'nestc[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP))
    spread: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(list(values)) for name, values in space.items()
    }
    generator = np.random.default_rng(seed)
    while len(done) < len(ways):
        known = {tuple(trial.choice.values()): trial.value for trial in done}
        for _ in range(REPEATS):
            asked = study.ask(spread)
            choice = {name: str(asked.params[name]) for name in space}
            if tuple(choice.values()) not in known:
                break
            study.tell(asked, known[tuple(choice.values())])
        else:
            left = [way for way in ways if tuple(way.values()) not in known]
            choice = dict(left[int(generator.integers(len(left)))])
            study.enqueue_trial(choice)
            asked = study.ask(spread)
        yield choice
        study.tell(asked, done[-1].value)
