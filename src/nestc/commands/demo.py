"""``nestc demo``: a small trained classifier that ships with the package, on a CPU and on simulated accelerators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestc.commands import common
from nestc.errors import Error

PAGE = Path("report.html")


def demo(
    target: common.Targets = None,
    threads: common.Threads = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE.html", help="Where to write the page. [default: report.html]"),
    ] = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Calibrate, quantize, place, compile and run a small trained network (Fashion-MNIST), and compare devices.

    Example: `nestc demo --threads 1`

    It runs on the CPU alone, on each other target with the CPU, and on all together, placed for latency, throughput and
    energy; by default on cpu, vta and aim, of which the latter two are simulated. A page (see nestc report) shows the
    placement that uses most devices; with --json it is written only with `-o`.
    """
    from nestc.demo import DEVICES, describe, run

    page = output or (None if json else PAGE)
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        reason = "is a folder" if page.is_dir() else "is in a folder that does not exist"
        raise Error(f"cannot write {page}: it {reason}")
    with common.progress() as step:
        report = run(target or DEVICES, threads, step, page)
    if json:
        common.print_json(report)
        return
    for line in describe(report):
        print(line)
