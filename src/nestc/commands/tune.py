"""``nestc tune``: measure which kernels are fastest for a model on this machine, or on workers of a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nestc.commands import common
from nestc.errors import Error

if TYPE_CHECKING:
    from nestc.tune.run import Report

Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="ADDRESS",
        help="Measure on the workers of this Dask scheduler (`tcp://host:8786`), which must be machines of this kind.",
    ),
]


_PIPE_WIDTH = 160  # characters of a table where no terminal says how many there are


def tune(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.")],
    target: common.Targets = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, metavar="S", help="About how long; what is known by then is kept.")
    ] = 60.0,
    cluster: Cluster = None,
    threads: common.Threads = None,
    shape: common.Shapes = None,
    dim: common.Dims = None,
    again: Annotated[bool, typer.Option("--again", help="Also measure what is known already.")] = False,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Add the choices that pay to a file like the one nestc ships."),
    ] = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Find the fastest way to compute each region of a model on the CPU, by measurements; compiling uses what it finds.

    Example: `nestc tune resnet50.onnx --dim batch=1 --threads 2 --seconds 120`, then `nestc compile resnet50.onnx ...`

    Results are kept for the kind of machine and the number of threads. Regions that take the most time come first; run
    it again to go on where it stopped.
    """
    common.require_file(model)
    if common.is_bundle(model):
        raise Error(f"{model} is a bundle, which is compiled already; tune takes a model (.onnx)")
    if export is not None and (export.is_dir() or not export.parent.is_dir()):
        reason = "is a folder" if export.is_dir() else "is in a folder that does not exist"
        raise Error(f"cannot write {export}: it {reason}")
    from nestc.targets import resolve
    from nestc.tune.run import as_json, exported
    from nestc.tuning import cpu_for, tune_model

    shapes, dims = common.bindings(shape or [], dim or [])
    chosen = cpu_for(resolve(target or ["cpu"], {"threads": threads}))
    with common.progress() as step:
        report = tune_model(
            model, chosen, seconds=seconds, shapes=shapes, dims=dims, cluster=cluster, again=again, progress=step
        )
    count = None if export is None else exported(report, chosen, export)
    if json:
        common.print_json({"model": str(model), **as_json(report)})
        return
    show(report, model.name)
    if count is not None:
        print(f"  {count} choices that differ from the usual ones are in {export}")


def show(report: Report, name: str) -> None:
    """Print what is known of each region as a table, and what the network is to gain."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    table = Table(title=f"{name}, {report.threads} threads, {report.machine}", title_justify="left")
    for heading in ("region", "shape", "default way", "best way"):
        table.add_column(heading, overflow="fold")
    for heading in ("default ms", "best ms", "gain"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        times = f" x{row.count}" if row.count > 1 else ""
        gain = f"{row.default_seconds / row.best_seconds - 1:.0%}" if row.times else "not measured"
        table.add_row(
            f"{row.region}{times}",
            row.shape,
            row.default,
            row.best if row.best != row.default else "the same",
            f"{row.default_seconds * 1e3:.3f}",
            f"{row.best_seconds * 1e3:.3f}",
            gain if row.done or not row.times else f"{gain}, so far",
        )
    console.print(table)
    before, after = report.default_seconds * 1e3, report.predicted_seconds * 1e3
    print(f"  kernels of the network: {before:.3f} ms by default, {after:.3f} ms predicted ({before / after - 1:+.1%})")
    if report.left:
        print(f"  the time was too short for {len(report.left)} of {len(report.rows)} regions; run it again to go on")
