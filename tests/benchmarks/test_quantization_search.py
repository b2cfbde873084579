"""The benchmark of the search: trials are counted on a table of ways that are quantized and run once."""

from __future__ import annotations

import itertools
import json

import pytest

import nestc
from nestc.quant.sample import SPACE, Trial
from nestc.quant.score import Score


def table() -> dict[tuple[str, ...], Trial]:
    made: dict[tuple[str, ...], Trial] = {}
    for number, values in enumerate(itertools.product(*SPACE.values())):
        choice = dict(zip(SPACE, values, strict=True))
        made[values] = Trial(choice, Score(10, 1.0 - abs(number - 30) / 100, 1.0, 20.0))
    return made


def grid(space: dict[str, tuple[str, ...]]) -> list[dict[str, str]]:
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def test_trials_are_counted_to_the_best_and_to_the_best_twentieth() -> None:
    import quantization_search

    ways = table()
    order = [tuple(way[axis] for axis in SPACE) for way in grid(quantization_search.shuffled(3))]
    best, near = quantization_search.search(ways, "grid", 3)
    scores = [ways[way].value for way in order]
    assert best == scores.index(min(scores)) + 1
    assert near == min(order.index(way) for way in list(ways)[29:32]) + 1
    for sampler in ("random", "optuna"):
        best, near = quantization_search.search(ways, sampler, 1)
        assert 1 <= near <= best <= len(ways) == 72


def test_rows_and_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import quantization_search

    monkeypatch.setattr(quantization_search, "tabulate", lambda name, options, tell: table())
    assert quantization_search.main(["--seeds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["sampler"] for row in found["rows"]] == ["optuna", "random", "grid"]
    assert all(row["seeds"] == 1 and 1 <= row["to_near"]["mean"] <= row["to_best"]["mean"] for row in found["rows"])
    assert found["models"][0]["best"]["loss"] == 0.0 and "date" in found["context"]
    assert quantization_search.main(["--seeds", "1"]) == 0
    assert "demo: 72 ways, 10 samples each" in capsys.readouterr().out


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    import quantization_search

    assert quantization_search.main(["--models", "efficientnet_lite0"]) == 2
    assert "needs --data DIR" in capsys.readouterr().err
    assert quantization_search.main(["--limit", "100"]) == 2
    assert "must leave more" in capsys.readouterr().err


def test_the_demo_is_split() -> None:
    import quantization_search

    class Options:
        limit = 250

    model, calibration, judged, labels = quantization_search.load("demo", Options())
    assert isinstance(model, nestc.Model) and len(list(calibration)) == 1
    assert [len(batch["image"]) for batch in judged] == [100, 50] and len(labels) == 150
