"""One network over several devices: our plans beside those of other ways to place, predicted and run.

    python benchmarks/partition.py --models resnet18,squeezenet11 --devices cpu+vta,cpu+vta+vta
    python benchmarks/partition.py --models resnet18,squeezenet11 --devices cpu+vta,cpu+vta+vta --observe

Networks are quantized, placed and compiled, and kept in a folder (--work); with --observe they are then run, in turns.
Times of cpu, onnxruntime and openvino are measured; those of vta and aim are modelled by simulators, and a sum of both
is by the runtime's virtual clock. Baselines choose devices with the same costs as ours: each device alone (and the CPU
for what it refuses), the best device for each type of operator, the first device that supports an operator,
PartitionTuner's Viterbi search of each branch, and HEFT. A gain is 100 * (baseline / ours - 1).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isolated import Lost, run_isolated
from nestc.errors import Error
from nestc.measure import context, usable_cores
from partition_cases import MODELS, OPTIONS, SETS, cases, work_folder
from partition_rows import Job, Row, known, prepare, run

OBJECTIVES = ("latency", "throughput", "energy")


def rows_of(jobs: Sequence[Job], observe: bool, timeout: float, fresh: bool) -> list[Row]:
    """The row of every job: what is kept is not made again, what fails says why."""
    rows: list[Row] = []
    for job in jobs:
        row = None if fresh else known(job)
        if row is None:
            row = _answer(prepare, job, timeout)
        if observe and "error" not in row:
            row |= _answer(run, job, timeout)
        rows.append(row)
        if sys.stderr.isatty():
            print(f"{job.case.slug}: done", file=sys.stderr)
    return rows


def _answer(step: Callable[[Job], Row], job: Job, timeout: float) -> Row:
    """What a step gives in a process of its own, or under "error" why it gives nothing."""
    ((_, answer),) = run_isolated(step, [job], 1, timeout)
    if not isinstance(answer, Lost):
        return answer
    return {"model": job.case.model, "devices": job.case.label, "objective": job.case.objective, "error": answer.reason}


def summary(rows: Sequence[Row]) -> Row:
    """Over all rows: how many are proven the best, the largest gap, where a single device was faster, and gains."""
    made = [row for row in rows if "gap_percent" in row]
    gaps = [row["gap_percent"] for row in made if row["gap_percent"] is not None]
    return {
        "rows": len(made),
        "optimal": sum(row["optimal"] for row in made),
        "largest_gap_percent": max(gaps, default=None),
        "slower_than_a_single_device_when_run": [
            f"{row['model']} {row['devices']} {row['objective']}"
            for row in made
            if row.get("seen", {}).get("times_best_single") is not None and row["seen"]["times_best_single"] < 1
        ],
        "largest_prediction_error_percent": max(
            (abs(row["error_percent"]) for row in made if "error_percent" in row), default=None
        ),
    }


def print_row(row: Row) -> None:
    """A few lines a row."""
    print(f"\n{row['model']}, {row['devices']}, {row['objective']}", end="")
    if "predicted" not in row:
        print(f": {row.get('error')}")
        return
    unit, shown = ("mj", "mJ") if row["objective"] == "energy" else ("ms", "ms")
    modelled = f"; modelled: {', '.join(row['modelled'])}" if row["modelled"] else "; all measured"
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    print(f" ({row['scheme']}, {threads}{modelled}): {row['regions']} regions, {row['partitions']} partitions", end="")
    print(f" on {', '.join(row['used'])}")
    proof = "optimal" if row["optimal"] else f"gap {row['gap_percent']:.2f} %"
    line = f"  predicted {row[f'predicted_{unit}']:.3f} {shown}, bound {row[f'lower_bound_{unit}']:.3f}, {proof}"
    if f"observed_{unit}" in row:
        ours = row["observed"]["nestc"]
        line += f"; observed {ours['median']:.3f} {shown} (+-{ours['spread_percent']:.1f} %"
        line += f", {ours['modelled']:.3f} modelled" if ours["modelled"] else ""
        line += f"), prediction {row['error_percent']:+.1f} %"
    print(line)
    names = list(row["baselines"])
    print(f"  {'':12}" + "".join(f"{name:>20}" for name in names))
    print(f"  {'predicted':12}" + "".join(f"{row['baselines'][name]:20.3f}" for name in names))
    if "observed" in row:
        print(f"  {'observed':12}" + "".join(f"{row['observed'][name]['median']:20.3f}" for name in names))
    _print_gains("gain, %", row["predicted"], names)
    if "seen" in row:
        _print_gains("  as run, %", row["seen"], names)
    for name, published in row["predicted"]["published_percent"].items():
        print(f"  published over what {name} stands for: {published} %")
    if row["objective"] == "throughput":
        ratio = row.get("seen", row["predicted"])["times_best_single"]
        print(f"  {ratio:.2f} times the requests a second of the best single device")
    if "fastest_alone" in row:
        best = row["fastest_alone"]
        low, high = best["quartiles"]
        print(
            f"  fastest alone: {best['name']}, {best['ms']:.3f} ms, ratio {best['ratio']:.3f} ({low:.3f} to {high:.3f})"
        )
        for name, each in row["observed"].items():
            if name.endswith("itself"):
                print(f"    {name}: {each['median']:.3f} ms (+-{each['spread_percent']:.1f} %)")
    for name, reason in row["refused"].items():
        print(f"  {name} has no plan: {reason}")
    if "error" in row:
        print(f"  not run: {row['error']}")


def _print_gains(title: str, compared: Mapping[str, Any], names: Sequence[str]) -> None:
    gains = compared["gains_percent"]
    print(f"  {title:12}" + "".join(f"{gains[name]:+20.2f}" if name in gains else f"{'-':>20}" for name in names))


def main(arguments: Sequence[str] | None = None) -> int:
    """Place, and with --observe run, the models asked for."""
    parser = argparse.ArgumentParser(
        description="Our plans beside those of other ways to place a network over several devices.",
        epilog="example: python benchmarks/partition.py --models squeezenet11 --devices cpu+vta --objective latency",
    )
    parser.add_argument("--models", default=MODELS, help=f"comma-separated names of zoo.py; default: {MODELS}")
    parser.add_argument("--devices", default=SETS, help=f"comma-separated sets, joined by +; default: {SETS}")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="DEVICE:OPTIONS",
        help="options of a device, repeatable; default: "
        + " ".join(f"{key}:{value}" for key, value in OPTIONS.items()),
    )
    parser.add_argument("--objective", default="latency", help=f"comma-separated: {', '.join(OBJECTIVES)} (latency)")
    parser.add_argument("--threads", default="1", help="comma-separated thread counts of the CPU (default 1)")
    parser.add_argument("--work", type=Path, default=work_folder(), help="folder of models and bundles that are kept")
    parser.add_argument("--fresh", action="store_true", help="place and compile again what is kept")
    parser.add_argument("--observe", action="store_true", help="run what was placed and compiled")
    parser.add_argument("--rounds", type=int, help="runs of each plan (default 3 with simulated devices, else 15)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one row (default 3600)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    objectives = options.objective.split(",")
    given = dict(each.partition(":")[::2] for each in options.option)
    try:
        counts = [int(count) for count in options.threads.split(",")]
        unknown = next((each for each in objectives if each not in OBJECTIVES), None)
        if unknown is not None:
            raise Error(f"there is no objective {unknown!r}; choose {', '.join(OBJECTIVES)}")
        if not 1 <= min(counts) <= max(counts) <= len(usable_cores()):
            raise Error(f"--threads must be between 1 and {len(usable_cores())} here")
        chosen = [each for count in counts for each in cases(options.models, options.devices, objectives, count, given)]
    except (Error, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    work = options.work.resolve()
    jobs = [Job(case, work, options.rounds) for case in chosen]
    rows = rows_of(jobs, options.observe, options.timeout, options.fresh)
    if options.json:
        about = context(
            "seeded random inputs; calibrated on 8 others; trained: ppocr_rec, all others random weights", 0
        )
        print(json.dumps({"rows": rows, "summary": summary(rows), "context": about}))
        return 0
    for row in rows:
        print_row(row)
    print("\n" + ", ".join(f"{key}: {value}" for key, value in summary(rows).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
