"""``nestc calibrate``: run a model over calibration data and write what its tensors held."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestc.commands import common
from nestc.errors import Error

if TYPE_CHECKING:
    from nestc.quant.profile import Profile


def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file of a float model.")],
    data: common.Data,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PROFILE.json", help="Where the profile is written.")
    ] = Path("profile.json"),
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="How ranges are chosen: `minmax`, `percentile` (`percentile:99.9` gives the percentage), `mse` or "
            "`entropy`.",
        ),
    ] = "mse",
    labels: common.Labels = None,
    split: common.Split = None,
    preprocess: common.Preprocess = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, metavar="N", help="Only the first N samples. [default: all]")
    ] = None,
    batch: common.Batch = 1,
    shape: common.Shapes = None,
    dim: common.Dims = None,
    threads: common.Threads = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Run a float model over data and keep the ranges and histograms of its tensors, for `nestc quantize`.

    Example: `nestc calibrate m.onnx --data images --preprocess imagenet --samples 100 -o profile.json`

    Labels are needed only to pick the samples of a `--split`. --json prints {"profile", "method", "samples", "tensors",
    "nonfinite", "seconds", "samples_per_second"}; `nonfinite` lists the nodes that made NaN or infinite values.
    """
    common.require_file(model)
    if common.is_bundle(model):
        raise Error(f"{model} is a bundle, which is compiled already; calibrate takes a model (.onnx)")
    if output.is_dir() or not output.parent.is_dir():
        reason = "is a folder" if output.is_dir() else "is in a folder that does not exist"
        raise Error(f"cannot write {output}: it {reason}")

    from nestc.datasets import open_data
    from nestc.graph.bind import bind
    from nestc.importers.onnx import load
    from nestc.quantization import calibrate as calibrate_model

    shapes, dims = common.bindings(shape or [], dim or [])
    bound = bind(load(model), shapes, dims)
    found = open_data(data, bound.inputs, preprocess=preprocess, labels=labels, split=split, limit=samples, batch=batch)
    started = time.perf_counter()
    with common.progress() as step:
        profile = calibrate_model(bound, found, method, threads=threads, progress=step)
    profile.save(output)
    report = summary(profile, output, time.perf_counter() - started)
    if json:
        common.print_json(report)
        return
    rate = f"{report['samples_per_second']:.1f} a second"
    print(f"{output}: {report['tensors']} tensors over {profile.samples} samples, {report['seconds']:.1f} s ({rate})")
    for each in profile.nonfinite:
        print(f"  warning: {each}", file=sys.stderr)


def summary(profile: Profile, output: Path, seconds: float) -> dict[str, Any]:
    """The JSON object of ``nestc calibrate --json``."""
    return {
        "profile": str(output),
        "method": profile.method,
        "samples": profile.samples,
        "tensors": len(profile.tensors),
        "nonfinite": [vars(each) for each in profile.nonfinite],
        "seconds": round(seconds, 3),
        "samples_per_second": round(profile.samples / seconds, 2),
    }
