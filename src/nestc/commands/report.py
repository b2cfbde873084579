"""``nestc report``: a page that shows where a bundle's regions run, what they cost and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nestc.commands import common
from nestc.errors import DataError, ModelError

if TYPE_CHECKING:
    from nestc.report import AccuracyData
    from nestc.runtime import Executable

PAGE = Path("report.html")


def report(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle (.nest).")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE.html", help="Where to write the page. [default: report.html]"),
    ] = None,
    input: common.Inputs = None,
    runs: Annotated[int, typer.Option("--runs", min=1, metavar="N", help="Runs that the times are medians of.")] = 10,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            min=1,
            metavar="N",
            help="Also a timeline of N requests in flight. [default: 4 if placed for throughput, else 1]",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DATA", help="Judge it on this data, as nestc evaluate does."),
    ] = None,
    labels: common.Labels = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="MODEL", help="A reference, usually the float model; a file or a bundle."),
    ] = None,
    split: common.Split = None,
    preprocess: common.Preprocess = None,
    limit: common.Limit = None,
    threads: common.Threads = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Run a bundle and write a page about it: graph by device, timeline, roofline, costs, energy, accuracy.

    Example: `nestc report resnet50.nest -o report.html`

    The page is one file that loads nothing. Every figure says whether it is measured, modelled or estimated. With
    `--data` (and `--labels`, `--against`) it also shows how good the model is. --json prints the data of the page (see
    docs/report.md); a page is then written only with `-o`.
    """
    from nestc.report import collect
    from nestc.report.page import save

    common.require_file(bundle)
    if not common.is_bundle(bundle):
        raise ModelError(f"{bundle} is no bundle; compile it first: nestc compile {bundle} -o {bundle.stem}.nest")
    if data is None and (labels is not None or against is not None):
        raise DataError(
            f"{'--labels' if labels is not None else '--against'} judges the model on data; give --data DATA"
        )
    if data is not None and labels is None and against is None:
        raise DataError("--data needs labels to judge by (--labels) or a model to compare with (--against)")
    from nestc.runtime import open as open_bundle

    executable = open_bundle(bundle, threads=threads)
    inputs = common.read_inputs(input or [], executable.inputs) or common.random_inputs(executable.inputs)
    judged = [] if data is None else _judge(executable, data, labels, against, split, preprocess, limit, threads)
    flying = requests or (4 if executable.plan.objective == "throughput" else 1)
    found = collect(executable, runs, inputs, judged, flying)
    page = output or (None if json else PAGE)
    if page is not None:
        save(found, page)
    if json:
        common.print_json(found.to_json())
        return
    devices = ", ".join(f"{device.name} {device.regions}" for device in found.devices)
    print(f"{found.model}: {found.latency.value:.3f} ms ({found.latency.kind}); regions: {devices}")
    print(f"report in {page}")


def _judge(
    executable: Executable,
    data: Path,
    labels: Path | None,
    against: Path | None,
    split: str | None,
    preprocess: str | None,
    limit: int | None,
    threads: int | None,
) -> list[AccuracyData]:
    """Right classes where there are labels, nearness of the outputs where there is a reference."""
    from nestc.evaluation import evaluate
    from nestc.report import AccuracyData

    reference = None if against is None else common.open_or_compile(against, (), (), (), threads, bound=False)
    metrics = [*(["top1"] if labels is not None else []), *(["sqnr"] if against is not None else [])]
    judged: list[AccuracyData] = []
    for metric in metrics:
        with common.progress() as step:
            found = evaluate(
                executable, data, labels, metric, reference,
                preprocess=preprocess, split=split, limit=limit, progress=step,
            )  # fmt: skip
        judged.append(
            AccuracyData(
                metric=metric,
                value=found.value,
                samples=found.samples,
                data=str(data.name),
                against=None if against is None else against.name,
                reference=None if found.reference is None else found.reference.value,
                interval=None if found.accuracy is None else found.accuracy.interval,
                reference_interval=None if found.reference is None else found.reference.interval,
                disagreements=found.disagreements,
                outputs=found.outputs,
            )
        )
    return judged
