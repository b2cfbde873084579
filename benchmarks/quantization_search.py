"""How many ways of quantizing have to be tried to find the best: Optuna against random and grid search.

    python benchmarks/quantization_search.py                       (the network that nestc ships, Fashion-MNIST)
    python benchmarks/quantization_search.py --models efficientnet_lite0 --data imagenet --labels imagenet/labels.csv

Every way of the space (scheme x calibration method x clipping x granularity) is quantized and run once; then each
sampler searches this table, with many seeds. For each seed the axes and values that a grid goes through are shuffled. A
trial is a way that a sampler asks for and has not asked for before. `to_best` counts trials until the best way,
`to_near` until one of the best twentieth. A way is better if it loses less top-1 on the images judged, or as much with
less noise (a dB counts as 0.01 points).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import nestc
import zoo
from nestc.autoscheme import sample_ways
from nestc.demo import INPUT, labelled_images, model_path
from nestc.errors import Error
from nestc.measure import context
from nestc.quant.sample import SPACE, Choice, Sampler, Trial, sample
from nestc.quant.score import Score

DEMO = "demo"
SAMPLERS: tuple[Sampler, ...] = ("optuna", "random", "grid")
CALIBRATION_SAMPLES = 100
BATCH = 100
PREPROCESS = {"efficientnet_lite0": "mean=127,std=128"}
"""What each model of the zoo was trained with; others are as `imagenet`."""


def key(choice: Choice) -> tuple[str, ...]:
    """A way as a key of the table."""
    return tuple(choice[axis] for axis in SPACE)


def tabulate(name: str, options: argparse.Namespace, tell: Callable[[str], None]) -> dict[tuple[str, ...], Trial]:
    """Every way of the space, quantized and run."""
    model, calibration, judged, labels = load(name, options)
    profile = nestc.calibrate(model, calibration, threads=options.threads)
    trials = sample_ways(
        model, profile, judged, sys.maxsize, sampler="grid", labels=labels, threads=options.threads,
        progress=lambda what, fraction: tell(f"{name}: {what}"),
    )  # fmt: skip
    return {key(trial.choice): trial for trial in trials}


def load(
    name: str, options: argparse.Namespace
) -> tuple[nestc.Model, Iterable[Mapping[str, np.ndarray]], Iterable[Mapping[str, np.ndarray]], np.ndarray]:
    """The float model, batches to calibrate on, batches to judge on and their labels."""
    if name == DEMO:
        images, labels = labelled_images()
        images, labels = images[: options.limit], labels[: options.limit]
        batches = [{INPUT: images[start : start + BATCH]} for start in range(0, len(images), BATCH)]
        first = -(-CALIBRATION_SAMPLES // BATCH)
        if len(batches) <= first:
            raise Error(f"--limit must leave more than the {CALIBRATION_SAMPLES} images that calibrate")
        return nestc.load(model_path()), batches[:first], batches[first:], labels[first * BATCH :]
    if options.data is None or options.labels is None:
        raise Error(f"model {name} needs --data DIR and --labels FILE (with the splits calibrate and evaluate)")
    path = Path(name) if name.endswith(".onnx") else zoo.path(name)
    shapes = None if name.endswith(".onnx") else {key: list(shape) for key, shape in zoo.get(name).shapes.items()}
    model = nestc.load(path, shapes=shapes)
    how = options.preprocess or PREPROCESS.get(name, "imagenet")
    calibration, judged = (
        nestc.open_data(
            options.data, model.inputs, labels=options.labels, split=part, preprocess=how, limit=options.limit
        )
        for part in ("calibrate", "evaluate")
    )
    assert judged.labels is not None
    return model, calibration, judged, judged.labels


def shuffled(seed: int) -> dict[str, tuple[str, ...]]:
    """The space with its axes, and the values of each, in an order drawn by the seed; a grid's luck is its order."""
    generator = np.random.default_rng(seed)
    axes = [list(SPACE)[index] for index in generator.permutation(len(SPACE))]
    return {axis: tuple(SPACE[axis][index] for index in generator.permutation(len(SPACE[axis]))) for axis in axes}


def search(table: Mapping[tuple[str, ...], Trial], sampler: Sampler, seed: int) -> tuple[int, int]:
    """Trials until the best way of the table and until one of its best twentieth, counted from 1."""
    values = sorted(trial.value for trial in table.values())
    near = values[max(len(values) // 20, 1) - 1]

    def objective(choice: Choice) -> Score:
        return table[key(choice)].score

    tried = [trial.value for trial in sample(objective, len(table), sampler, shuffled(seed), seed)]
    return tried.index(values[0]) + 1, next(i for i, value in enumerate(tried) if value <= near) + 1


def rows_of(
    name: str, options: argparse.Namespace, tell: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each sampler, and what the space of one model holds."""
    begun = time.perf_counter()
    table = tabulate(name, options, tell)
    seconds = time.perf_counter() - begun
    ordered = sorted(table.values(), key=lambda trial: trial.value)
    about = {
        "model": name,
        "ways": len(table),
        "seconds": seconds,
        "best": {"choice": dict(ordered[0].choice), **_plain(ordered[0].score)},
        "worst": {"choice": dict(ordered[-1].choice), **_plain(ordered[-1].score)},
        "samples": ordered[0].score.samples,
    }
    rows: list[dict[str, Any]] = []
    for sampler in SAMPLERS:
        found = [search(table, sampler, seed) for seed in range(options.seeds)]
        best, near = zip(*found, strict=True)
        rows.append(
            {"model": name, "sampler": sampler, "seeds": len(found), "ways": len(table)}
            | {"to_best": _spread(best), "to_near": _spread(near)}
        )
    return rows, about


def _plain(score: Score) -> dict[str, Any]:
    """A score for JSON, which has no infinity."""
    return {**asdict(score), "sqnr_db": score.sqnr_db if np.isfinite(score.sqnr_db) else None, "loss": score.loss}


def _spread(trials: Sequence[int]) -> dict[str, float]:
    return {"mean": float(np.mean(trials)), "median": float(np.median(trials)), "worst": float(max(trials))}


HEADER = (
    f"{'model':20}{'sampler':10}{'seeds':>6}{'ways':>6}{'to best: mean':>15}{'median':>8}{'worst':>7}"
    f"{'to near: mean':>15}{'median':>8}{'worst':>7}"
)


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    best, near = row["to_best"], row["to_near"]
    return (
        f"{row['model']:20}{row['sampler']:10}{row['seeds']:>6}{row['ways']:>6}{best['mean']:>15.1f}"
        f"{best['median']:>8.1f}{best['worst']:>7.0f}{near['mean']:>15.1f}{near['median']:>8.1f}{near['worst']:>7.0f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Tabulate the models asked for and let every sampler search."""
    parser = argparse.ArgumentParser(
        description="Trials to the best way of quantizing: Optuna against random and grid search.",
        epilog="example: python benchmarks/quantization_search.py --models demo --seeds 50",
    )
    parser.add_argument("--models", default=DEMO, help=f"comma-separated: {DEMO}, names of zoo.py, or .onnx files")
    parser.add_argument("--data", type=Path, help="folder of images, or what nestc.open_data takes")
    parser.add_argument("--labels", type=Path, help="CSV file,label,split with the splits calibrate and evaluate")
    parser.add_argument("--preprocess", help="as nestc evaluate takes it; default: what the model was trained with")
    parser.add_argument("--limit", type=int, help="samples of each split (demo: of both together); default: all")
    parser.add_argument("--threads", type=int, default=1, help="threads to run with (default 1)")
    parser.add_argument("--seeds", type=int, default=30, help="searches of each sampler (default 30)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)

    def tell(text: str) -> None:
        if sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)

    rows: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    try:
        for name in options.models.split(","):
            found, about = rows_of(name, options, tell)
            rows += found
            models.append(about)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        data = "Fashion-MNIST test images of the package" if options.models == DEMO else str(options.data)
        print(json.dumps({"rows": rows, "models": models, "context": context(data, options.seeds)}))
        return 0
    print(HEADER)
    for row in rows:
        print(line(row))
    for about in models:
        print(f"{about['model']}: {about['ways']} ways, {about['samples']} samples each, in {about['seconds']:.0f} s")
        for which in ("best", "worst"):
            found = about[which]
            way = ", ".join(found["choice"].values())
            print(f"  {which}: {way}: loss {100 * found['loss']:.2f} points, {found['sqnr_db']:.1f} dB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
