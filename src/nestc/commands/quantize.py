"""``nestc quantize``: a float model and its profile into a standard quantized (QDQ) ONNX model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestc.commands import common
from nestc.errors import Error, QuantizationError, ShapeError

if TYPE_CHECKING:
    import numpy as np

    from nestc.datasets import Dataset
    from nestc.graph.model import Model
    from nestc.quant.profile import Profile

SQNR_SAMPLES = 32
"""So many samples of --data, at most, are run through both models for the report."""

Tools = Annotated[
    list[str] | None,
    typer.Option(
        "--tools",
        metavar="NAME,...",
        help="Accuracy tools, in order; `none` for none. [default: those of the scheme]",
    ),
]
Overrides = Annotated[
    Path | None,
    typer.Option(
        "--overrides",
        metavar="FILE",
        help='Nodes of another scheme: lines `node: scheme` or `"pattern*": float` (YAML).',
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="SCHEME",
        help="Quantize first: `int8`, `int8-symmetric`, `int8-pow2`, `int16`, `bf16`, `weight-int8`, `weight-int4`, "
        "`auto` or `devices` (what the targets compute in). [default: the model as it is]",
    ),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--calibrate", metavar="DATA", help="Samples to calibrate on for --quantize, as `nestc calibrate` takes."
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--accuracy-budget",
        min=0.0,
        max=1.0,
        metavar="X",
        help="The fraction of samples that may be lost against the float model: of top-1 with --labels, else decisions "
        "that differ. Checked on --data.",
    ),
]


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file of a float model.")],
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="PROFILE.json",
            help="What `nestc calibrate` has written; bf16 and the weight-only schemes need none.",
        ),
    ] = None,
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            metavar="SCHEME",
            help="`int8`, `int8-symmetric`, `int8-pow2`, `int16`, `bf16`, `weight-int8`, `weight-int4`, `auto` or "
            "`devices`, perhaps with options (`int8:granularity=tensor`).",
        ),
    ] = "int8",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.onnx", help="[default: MODEL.SCHEME.onnx]")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="T", help="For `devices` and `auto`: what the model is for; repeat for more."),
    ] = None,
    overrides: Overrides = None,
    tools: Tools = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Samples for tools that need them, for the budget, and for the report (else a random input, seed 0): "
            "an .npz, a folder of .npy or .npz files, or a folder of images.",
        ),
    ] = None,
    labels: common.Labels = None,
    split: common.Split = None,
    preprocess: common.Preprocess = None,
    limit: common.Limit = None,
    batch: common.Batch = 1,
    accuracy_budget: Budget = None,
    shape: common.Shapes = None,
    dim: common.Dims = None,
    threads: common.Threads = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Quantize a model; the result is standard ONNX with QuantizeLinear and DequantizeLinear.

    Example: `nestc quantize m.onnx --profile profile.json --scheme int8 -o m.int8.onnx`

    --json prints {"scheme", "quantized_ops", "kept_float", "sqnr_db", "sqnr_data", "model", "reasons", "notes",
    "seconds"}: how many nodes of each operator are computed in the scheme's format, the names of those that stay
    float, the signal-to-noise ratio of each output against the float model in dB (null: equal) and on what it was
    taken, and the reason for each node.
    """
    common.require_file(model)
    if common.is_bundle(model):
        raise Error(f"{model} is a bundle, which is compiled already; quantize takes a model (.onnx)")
    destination = output or model.with_name(f"{model.stem}.{scheme.partition(':')[0]}.onnx")
    if destination.is_dir() or not destination.parent.is_dir():
        reason = "is a folder" if destination.is_dir() else "is in a folder that does not exist"
        raise Error(f"cannot write {destination}: it {reason}")
    if accuracy_budget is not None and data is None:
        raise QuantizationError("--accuracy-budget is checked on data; give --data")

    from nestc.datasets import open_data
    from nestc.graph.bind import bind
    from nestc.importers.onnx import load
    from nestc.quant.profile import Profile
    from nestc.quantization import quantize as quantize_model

    started = time.perf_counter()
    searched = scheme.partition(":")[0] == "auto"
    shapes, dims = common.bindings(shape or [], dim or [])
    source = bind(load(model), shapes, dims)
    seen = None if profile is None else Profile.load(profile)
    found: Dataset | None = None
    if data is not None:
        found = open_data(
            data, source.inputs, preprocess=preprocess, labels=labels, split=split, limit=limit, batch=batch
        )
    with common.progress() as step:
        quantized = quantize_model(
            source, seen, scheme,
            overrides=overrides, tools=tool_names(tools), data=found, threads=threads,
            labels=found.labels if searched and found is not None else None,
            accuracy_budget=accuracy_budget if searched else None, targets=target, progress=step,
        )  # fmt: skip
        report = summary(quantized, scheme, destination)
        report["sqnr_db"], report["sqnr_data"] = sqnr(source, quantized, seen, found, data, threads, step)
        if accuracy_budget is not None and found is not None:
            report["loss"] = require_budget(source, quantized, found, scheme, accuracy_budget, threads, step)
        quantized.save(destination)
    report["seconds"] = round(time.perf_counter() - started, 3)
    if json:
        common.print_json(report)
        return
    show(report)


def calibrated(
    source: Model,
    scheme: str,
    data: Path | None,
    *,
    overrides: Path | None = None,
    tools: Sequence[str] | None = None,
    labels: Path | None = None,
    split: str | None = None,
    preprocess: str | None = None,
    limit: int | None = None,
    budget: float | None = None,
    threads: int | None = None,
    targets: Sequence[str] = ("cpu",),
) -> tuple[Model, dict[str, Any]]:
    """Calibrate and quantize in one go, for ``--calibrate`` and ``--quantize`` of other commands; with the report.

    `targets` tell the scheme ``devices`` which formats to use, and ``auto`` what is fast.

    Raises QuantizationError where the scheme needs data and there are none.
    """
    from nestc.datasets import open_data
    from nestc.quant.scheme import AUTO, DEVICES, FLOAT, scheme_named
    from nestc.quantization import calibrate, quantize

    if budget is not None and data is None:
        raise QuantizationError("--accuracy-budget is checked on data; give --calibrate DATA")
    kind, _, rest = (part.strip() for part in scheme.partition(":"))
    searched, by_device = kind == AUTO, kind == DEVICES
    # Before the data are read: calibrating may take minutes.
    wanted = None if rest == FLOAT else scheme_named(rest or "int8" if searched or by_device else scheme)
    if data is None and (searched or (wanted is not None and wanted.integer and not by_device)):
        raise QuantizationError(f"scheme {scheme} needs data to calibrate on; give --calibrate DATA")
    found: Dataset | None = None
    if data is not None:
        found = open_data(data, source.inputs, preprocess=preprocess, labels=labels, split=split, limit=limit)
    with common.progress() as step:
        profile = None if found is None else calibrate(source, found, threads=threads, progress=step)
        quantized = quantize(
            source, profile, scheme,
            overrides=overrides, tools=tool_names(tools), data=found, threads=threads,
            labels=found.labels if searched and found is not None else None,
            accuracy_budget=budget if searched else None,
            targets=targets if searched or by_device else None, progress=step,
        )  # fmt: skip
        report = summary(quantized, scheme, None)
        if budget is not None and found is not None:
            report["loss"] = require_budget(source, quantized, found, scheme, budget, threads, step)
    return quantized, report


def tool_names(given: Sequence[str] | None) -> list[str] | None:
    """The names in the values of ``--tools``; None if there are none."""
    if not given:
        return None
    return [name.strip() for text in given for name in text.split(",") if name.strip() not in ("", "none")]


def summary(quantized: Model, scheme: str, destination: Path | None) -> dict[str, Any]:
    """The part of the JSON object that the quantized model itself tells."""
    from nestc.quant.explain import kept_float, quantized_ops, reasons

    found = reasons(quantized)
    report: dict[str, Any] = {
        "scheme": scheme,
        "quantized_ops": quantized_ops(found),
        "kept_float": kept_float(found),
        "reasons": {each.node: {"op": each.op, "scheme": each.scheme, "reason": each.reason} for each in found},
        "notes": quantized.notes,
    }
    return report if destination is None else {**report, "model": str(destination)}


def sqnr(
    source: Model,
    quantized: Model,
    profile: Profile | None,
    data: Dataset | None,
    path: Path | None,
    threads: int | None,
    progress: Callable[[str, float], None],
) -> tuple[dict[str, float | None], str]:
    """dB of each output against the float model, and on what: samples of the data, else one random input, seed 0.

    A batch that is left open is 1 then. Random numbers are spread as the profile has seen each input's, without one
    normally.
    """
    from itertools import islice

    from nestc.driver import compile as compile_model
    from nestc.evaluation import evaluate
    from nestc.graph.bind import bind_batch

    batches: Iterable[Any]
    if data is not None:
        used = -(-SQNR_SAMPLES // data.batch)
        batches, what = list(islice(data, used)), f"{min(SQNR_SAMPLES, data.samples)} samples of {path}"
    else:
        try:
            one, bound = bind_batch(source)
            drawn = common.random_inputs(one.inputs)
            if profile is not None:
                drawn |= _as_seen(drawn, profile)
            batches, what = [drawn], f"a random input, seed 0{f' ({bound})' if bound else ''}"
        except ShapeError as error:
            return {}, f"nothing: {error}"
    before = compile_model(source, threads=threads)
    after = compile_model(quantized, threads=threads)
    judged = evaluate(after, batches, None, "sqnr", before, progress=progress).to_json()
    return {name: None if value is None else round(value, 2) for name, value in judged["outputs"].items()}, what


def _as_seen(inputs: dict[str, np.ndarray], profile: Profile) -> dict[str, np.ndarray]:
    """Random inputs of the same shapes whose numbers are spread as in the profile's histograms; seed 0."""
    import numpy as np

    random = np.random.default_rng(0)
    drawn: dict[str, np.ndarray] = {}
    for name, like in inputs.items():
        stats = profile.tensors.get(name)
        if stats is None or stats.histogram.total == 0 or like.dtype.kind != "f":
            continue
        histogram = stats.histogram
        bins = random.choice(len(histogram.counts), like.shape, p=histogram.counts / histogram.total)
        values = histogram.edges[bins] + random.random(like.shape) * histogram.width
        drawn[name] = np.clip(values, stats.min, stats.max).astype(like.dtype)
    return drawn


def require_budget(
    source: Model,
    quantized: Model,
    data: Dataset,
    scheme: str,
    budget: float,
    threads: int | None,
    progress: Callable[[str, float], None],
) -> float:
    """The fraction of samples lost against the float model: of top-1 if there are labels, else decisions that differ.

    Raises QuantizationError if it is more than the budget.
    """
    from nestc.evaluation import evaluate

    metric = "sqnr" if data.labels is None else "top1"
    judged = evaluate(quantized, data, None, metric, source, threads=threads, progress=progress)
    if judged.accuracy is not None and judged.reference is not None:
        loss, of = judged.reference.value - judged.accuracy.value, "top-1"
    elif judged.disagreements is not None:
        loss, of = judged.disagreements / judged.samples, "the float model's decisions"
    else:
        raise QuantizationError("--accuracy-budget needs a model whose first output is scores of classes")
    if round(loss, 9) > budget:  # 1 - 0.95 is not above a budget of 0.05
        raise QuantizationError(
            f"scheme {scheme} loses {loss:.4f} of {of} on {judged.samples} samples, more than the budget of "
            f"{budget:g}; give --scheme auto, a finer scheme, or --overrides"
        )
    return round(loss, 6)


def show(report: dict[str, Any]) -> None:
    """Print the summary for people."""
    ops = ", ".join(f"{op} {count}" for op, count in report["quantized_ops"].items()) or "nothing"
    print(f"{report['model']}: {report['scheme']} in {report['seconds']:.1f} s: {ops}")
    kept = report["kept_float"]
    if kept:
        print(f"  float: {', '.join(kept[:12])}{f' and {len(kept) - 12} more' if len(kept) > 12 else ''}")
    for name, value in report["sqnr_db"].items():
        shown = "equal" if value is None else f"{value:.1f} dB"
        print(f"  {name}: {shown} against float, on {report['sqnr_data']}")
    if not report["sqnr_db"]:
        print(f"  signal to noise: {report['sqnr_data']}")
    if "loss" in report:
        print(f"  loss {report['loss']:.4f} of the samples, within the budget")
    print(f"  nestc explain {report['model']} says why of each node")
