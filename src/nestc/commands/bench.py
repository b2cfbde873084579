"""``nestc bench``: latency of a bundle or a model, alone or in turns with other runtimes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nestc.commands import common


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle (.nest) or an ONNX file.")],
    threads: common.Threads = None,
    runs: Annotated[
        int, typer.Option("--runs", min=1, metavar="N", help="Blocks of runs; medians are over these.")
    ] = 30,
    vs: Annotated[
        list[str] | None,
        typer.Option("--vs", metavar="PEER", help="Compare with `onnxruntime` or `openvino`; repeatable."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="MODEL", help="The ONNX file that a bundle was made of, for --vs."),
    ] = None,
    input: common.Inputs = None,
    target: common.Targets = None,
    shape: common.Shapes = None,
    dim: common.Dims = None,
    exact: common.Exact = False,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Time a bundle (or a model, compiled on the spot), and other runtimes in turns with it on the same cores.

    Example: `nestc bench resnet50.onnx --dim batch=1 --threads 2 --vs onnxruntime --vs openvino`

    What a simulated device runs counts with its modelled time, and is named; no ratio to a measured time is given then.
    """
    if model is not None:
        common.require_file(model)
    started = time.perf_counter()
    # Inputs that are given say how large open dimensions are.
    executable = common.open_or_compile(
        bundle, target or [], shape or [], dim or [], threads, bound=not input, exact=exact
    )
    elapsed_ms = (time.perf_counter() - started) * 1e3
    arrays = common.read_inputs(input or [], executable.inputs) or common.random_inputs(executable.inputs)
    executable.run(arrays)
    # A model is compiled first; what its bundle would take to load is known apart from that.
    load_ms = elapsed_ms if common.is_bundle(bundle) else executable.stats()["load_seconds"] * 1e3

    from nestc.measure import bench as measure

    report = measure(
        executable,
        arrays,
        model or (None if common.is_bundle(bundle) else bundle),
        vs=vs or [],
        threads=threads or executable.stats()["threads"],
        runs=runs,
        load_ms=round(load_ms, 3),
        name=bundle.name,
    )
    if json:
        common.print_json(report)
        return
    show(report)


def show(report: dict[str, Any]) -> None:
    """Print the measurements as a table for people."""
    own = report["nestc"]
    print(f"{report['model']}, {report['threads']} threads, medians over {own['runs']} blocks")
    print(f"  nestc        {own['median_ms']:10.4f} ms   fastest {own['min_ms']:.4f} ms")
    for device, took in own.get("modelled_ms", {}).items():
        how = "estimated for the link" if "->" in device else "modelled by its simulator"
        print(f"    of which {took:.4f} ms on {device} are {how}, not measured")
    for peer, measured in report["vs"].items():
        ratio = measured["ratio"]
        beside = "measured, which compares with no modelled time" if ratio is None else f"{ratio:.2f} x nestc's time"
        print(f"  {peer:12s} {measured['median_ms']:10.4f} ms   {beside}   {measured['version']}")
    if report["vs"]:
        print(f"  outputs differ by {report['max_abs_diff']:.3g}, relative to their scale {report['max_rel_diff']:.3g}")
    print(f"  loaded in {report['load_ms']:.1f} ms, peak memory {report['peak_rss_mb']:.0f} MiB")
