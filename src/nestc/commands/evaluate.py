"""``nestc evaluate``: how good a bundle or a model is on labelled data, or how near a reference model."""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nestc.commands import common

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nestc.evaluation import Evaluation
    from nestc.runtime import Executable
    from nestc.specialise import Specialised


class Metric(str, enum.Enum):
    """What is judged."""

    top1 = "top1"
    top5 = "top5"
    cosine = "cosine"
    sqnr = "sqnr"


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL|BUNDLE", help="An ONNX file or a bundle (.nest).")],
    data: common.Data,
    labels: common.Labels = None,
    metric: Annotated[
        Metric,
        typer.Option("--metric", help="`top1` and `top5` need --labels; `cosine` and `sqnr` (dB) need --against."),
    ] = Metric.top1,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="MODEL", help="A reference, usually the float model; a file or a bundle."),
    ] = None,
    split: common.Split = None,
    preprocess: common.Preprocess = None,
    limit: common.Limit = None,
    batch: common.Batch = 1,
    target: common.Targets = None,
    shape: common.Shapes = None,
    dim: common.Dims = None,
    threads: common.Threads = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Judge a model, compiled on the spot, or a bundle on data: right classes, or nearness to a reference.

    Example: `nestc evaluate int8.onnx --data images --labels labels.csv --split evaluate --preprocess imagenet
    --against float.onnx`

    --json prints {"model", "against", "data", "metric", "value", "samples", "seconds"}. `value` is a fraction of the
    samples (top1, top5), the mean over them (cosine) or dB (sqnr; null if nothing differs), of the worst output.
    top1 and top5 add `correct` and `interval` (Wilson, 95 %), and with --against `reference` (value, correct, interval)
    and `loss` (the reference's value less this one's); cosine and sqnr add `outputs`, the value by output. With
    --against, `disagreements` counts the samples whose class of the highest score is another than the reference's.
    """
    from nestc.evaluation import evaluate as judge

    executable = common.open_or_compile(model, target or [], shape or [], dim or [], threads, bound=False)
    reference = None if against is None else _open(against, target or [], shape or [], dim or [], threads)
    with common.progress() as step:
        found = judge(
            executable,
            data,
            labels,
            metric.value,
            reference,
            preprocess=preprocess,
            split=split,
            limit=limit,
            batch=batch,
            progress=step,
        )
    names = {"model": model.name, "against": None if against is None else against.name, "data": str(data)}
    if json:
        common.print_json({**names, **found.to_json()})
        return
    show(found, model.name, "" if against is None else against.name)


def _open(
    path: Path, targets: Sequence[str], shapes: Sequence[str], dims: Sequence[str], threads: int | None
) -> Executable | Specialised:
    """The reference as an executable; what is meant for compiling does not concern it if it is a bundle."""
    if common.is_bundle(path):
        return common.open_or_compile(path, (), (), (), threads)
    return common.open_or_compile(path, targets, shapes, dims, threads, bound=False)


def show(found: Evaluation, model: str, against: str) -> None:
    """Print what was found for people."""
    rate = found.samples / found.seconds if found.seconds else 0.0
    print(f"{found.metric} on {found.samples} samples, {found.seconds:.1f} s ({rate:.1f} a second)")
    for name, accuracy in ((model, found.accuracy), (against, found.reference)):
        if accuracy is not None:
            low, high = accuracy.interval
            right = f"{accuracy.correct} of {accuracy.samples}"
            print(
                f"  {name}: {100 * accuracy.value:.2f} % ({right}; 95 % interval {100 * low:.2f} to {100 * high:.2f} %)"
            )
    if found.accuracy is not None and found.reference is not None:
        print(f"  loss: {100 * (found.reference.value - found.accuracy.value):.2f} points")
    for name, value in (found.outputs or {}).items():
        decibels = "equal" if value == math.inf else f"{value:.2f} dB"
        print(f"  {name}: {decibels if found.metric == 'sqnr' else f'{value:.6f}'}")
    if found.disagreements is not None:
        print(f"  {found.disagreements} samples are decided otherwise than by {against}")
