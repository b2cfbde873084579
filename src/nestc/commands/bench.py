"""``nestc bench``: latency of a bundle or a model, alone or in turns with other runtimes."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestc.commands import common

if TYPE_CHECKING:
    from nestc.report.kernels import Kernel, Roofline


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle (.nest) or an ONNX file.")],
    threads: common.Threads = None,
    runs: Annotated[
        int, typer.Option("--runs", min=1, metavar="N", help="Blocks of runs; medians are over these.")
    ] = 30,
    vs: Annotated[
        list[str] | None,
        typer.Option("--vs", metavar="PEER", help="Compare with `onnxruntime`, `openvino`, `ncnn`, `mnn`; repeatable."),
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
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Also compare each kernel with what this processor does at most, worst first."),
    ] = False,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Time a bundle (or a model, compiled on the spot), and other runtimes in turns with it on the same cores.

    Example: `nestc bench resnet50.onnx --dim batch=1 --threads 2 --vs onnxruntime --vs openvino`

    With --kernels: the roof of a kernel is the time that its operations take at the measured arithmetic peak, or its
    bytes at the measured bandwidth of the smallest cache that holds them (weights: all of the model's), whichever is
    longer. Operations are those of the definition, of which a Winograd convolution does a part: it may lie above.

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
    found: Roofline | None = None
    if kernels:
        from nestc.measure import pinned
        from nestc.report.kernels import roofline

        with pinned(report["threads"]):
            found = roofline(executable, [arrays[name] for name in executable.inputs], runs)
        about = found.as_json(report["nestc"]["median_ms"])
        report |= {"kernels": about["kernels"], "roofs": about["roofs"], "total": about["total"]}
    if json:
        common.print_json(report)
        return
    show(report)
    if found is not None:
        show_kernels(found, report["nestc"]["median_ms"])


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


def show_kernels(found: Roofline, latency_ms: float) -> None:
    """Print a line a kernel; kernels of the same code and shapes share one, with the sums of their times."""
    from rich.console import Console
    from rich.table import Table

    total = found.as_json(latency_ms)["total"]
    table = Table(title=f"{len(found.kernels)} kernels, most time above its roof first")
    for heading in ("kernel", "nodes", "shape"):
        table.add_column(heading, overflow="fold")
    for heading in ("times", "ms", "GFLOP/s", "GB/s", "roof", "% of roof", "ms above"):
        table.add_column(heading, justify="right", no_wrap=True)
    for same in _merged(found.kernels):
        one, count = same[0], len(same)
        ms = sum(kernel.ms for kernel in same)
        roofs = [kernel.roof_ms for kernel in same if kernel.roof_ms is not None]
        above = [kernel.above_ms for kernel in same if kernel.above_ms is not None]
        table.add_row(
            " + ".join(_short(call.symbol) for call in one.calls),
            one.nodes[0] + (f" and {len(one.nodes) - 1} more" if len(one.nodes) > 1 else "") if one.nodes else "-",
            one.shape or "-",
            str(count),
            f"{ms:.3f}" + (" modelled" if one.modelled else ""),
            "-" if not one.operations else f"{count * one.operations / ms / 1e6:.1f}",
            "-" if one.gbytes is None else f"{count * one.bytes / ms / 1e6:.1f}",
            one.roof or "-",
            f"{100 * sum(roofs) / ms:.0f}" if roofs and ms else "-",
            f"{sum(above):.3f}" if above else "-",
        )
    # In a pipe no width is known, and nothing should be cut.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    percent = total["percent_of_peak"]
    peak = found.limits.per_second(found.numbers) / 1e9
    print(
        f"all kernels {total['ms']:.3f} ms, {total['above_roof_ms']:.3f} ms above their roofs; "
        f"a run {latency_ms:.3f} ms"
        + ("" if percent is None else f": {percent:.1f} % of the {found.numbers} peak, {peak:.1f} GFLOP/s")
    )


def _merged(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """Kernels of the same kind and shapes together, those that lose most first."""

    def same(kernel: Kernel) -> tuple[str, ...]:
        kinds = [node.partition(":")[0] for node in kernel.nodes]
        return (kernel.device, kernel.shape, *kinds, *(_short(call.symbol) for call in kernel.calls))

    def worth(group: Sequence[Kernel]) -> tuple[float, float]:
        return sum(each.above_ms or 0.0 for each in group), sum(each.ms for each in group)

    groups = [list(group) for _, group in groupby(sorted(kernels, key=same), same)]
    return sorted(groups, key=worth, reverse=True)


def _short(symbol: str) -> str:
    """A symbol without what makes it unique: the number of a region before it, a hash behind it."""
    return re.sub(r"^r\d+_|(_\d+)?_[0-9a-f]{16}$", "", symbol) or symbol
