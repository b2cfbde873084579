"""nestc against the runtimes people use on CPUs, on the models of the zoo, in one table.

    python benchmarks/peers.py --models resnet50,magika --threads 1,2

Each (model, threads) is measured in a process of its own: there, all engines run in turns (see nestc.measure.timing),
pinned to the same cores with as many threads. Times are medians of whole calls, in milliseconds; differences are
relative to the scale of the outputs, against onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zoo
from decisions import same_decision
from isolated import Lost, run_isolated
from nestc.errors import Error
from nestc.measure import (
    PEERS,
    Engine,
    NestcEngine,
    context,
    difference,
    interleave,
    open_peer,
    peak_rss_mb,
    pinned,
    usable_cores,
)
from peak import fp32_peak

Task = tuple[str, int, int, tuple[str, ...], bool]


def measure(task: Task) -> dict[str, Any]:
    """One row: (model, threads, rounds, peers, with nestc). An engine that fails is named under "errors"."""
    name, threads, rounds, peers, with_nestc = task
    model = zoo.get(name)
    row: dict[str, Any] = {"model": name, "precision": model.precision, "threads": threads, "errors": {}}
    try:
        path, inputs = zoo.path(name), zoo.inputs(name)
        row["gflop"] = zoo.gflops(name)
    except Error as error:
        return row | {"errors": {"zoo": str(error)}}
    engines: dict[str, Engine] = {}
    with pinned(threads):
        if with_nestc:
            try:
                engines["nestc"] = _open_nestc(path, inputs, threads, row)
            except Exception as error:  # noqa: BLE001 - the table shows what failed and goes on
                row["errors"]["nestc"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        for peer in peers:
            try:
                engines[peer] = open_peer(peer, path, inputs, threads)
            except Error as error:
                row["errors"][peer] = str(error)
        outputs = {key: engine.outputs() for key, engine in engines.items()}
        timings = interleave({key: engine.run for key, engine in engines.items()}, rounds) if engines else {}
    row["nestc_ms"] = timings["nestc"].median_ms if "nestc" in timings else None
    row["peers"] = {peer: timings[peer].median_ms for peer in peers if peer in timings}
    row["versions"] = {key: engine.version for key, engine in engines.items()}
    reference = outputs.get("onnxruntime")
    for key, values in outputs.items():
        if reference is None or key == "onnxruntime":
            continue
        found = difference(reference, values)
        row.setdefault("differences", {})[key] = found.max_rel
        row.setdefault("decisions", {})[key] = same_decision(model.decision, reference, values)
    row["max_rel_diff"] = row.get("differences", {}).get("nestc")
    row["same_decision"] = row.get("decisions", {}).get("nestc")
    best = min(row["peers"].values(), default=None)
    row["ratio_to_best"] = best / row["nestc_ms"] if best and row["nestc_ms"] else None
    return row


def _open_nestc(path: Path, inputs: Mapping[str, Any], threads: int, row: dict[str, Any]) -> NestcEngine:
    """Compile and check that the first run works; notes seconds, fallbacks and memory in the row."""
    import nestc

    start = time.perf_counter()
    shapes = {key: list(array.shape) for key, array in inputs.items()}
    executable = nestc.compile(path, targets=["cpu"], threads=threads, shapes=shapes)
    executable.run(inputs)
    row["compile_s"] = time.perf_counter() - start
    row["fallback_ops"] = dict(executable.fallback_ops)
    row["peak_rss_mb"] = peak_rss_mb()
    return NestcEngine(executable, inputs)


def geomean(values: Sequence[float]) -> float | None:
    """Geometric mean; None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def finish(rows: Sequence[dict[str, Any]], peaks: Mapping[int, float]) -> dict[str, Any]:
    """The JSON object of the contract; `peaks` is the measured fp32 peak by thread count, in GFLOP/s."""
    for row in rows:
        peak, done, took = peaks.get(row["threads"]), row.get("gflop"), row.get("nestc_ms")
        row["percent_of_peak"] = 100 * done / (took / 1e3) / peak if peak and done and took else None
    ratios = {
        precision: geomean([r["ratio_to_best"] for r in rows if r["precision"] == precision and r.get("ratio_to_best")])
        for precision in ("fp32", "bf16", "int8")
    }
    versions = {key: version for row in rows for key, version in row.get("versions", {}).items()}
    facts = context(data="seeded synthetic inputs of benchmarks/zoo.py", seed=0)
    return {"rows": list(rows), "geomean": ratios, "versions": versions, "context": facts}


def print_table(result: Mapping[str, Any], peers: Sequence[str]) -> None:
    """One line a model and thread count."""
    print("  ".join(f"{key} {version}" for key, version in sorted(result["versions"].items())))
    print(
        f"{'model':20}{'threads':>8}{'nestc ms':>11}"
        + "".join(f"{peer + ' ms':>16}" for peer in peers)
        + f"{'ratio':>8}{'% peak':>8}{'rel diff':>10}{'decision':>10}{'compile s':>11}"
    )
    for row in result["rows"]:
        cells = [_number(row.get("nestc_ms"), 11, 3)]
        cells += [_number(row.get("peers", {}).get(peer), 16, 3) for peer in peers]
        cells += [_number(row.get("ratio_to_best"), 8, 2), _number(row.get("percent_of_peak"), 8, 1)]
        wrong = row.get("max_rel_diff")
        cells.append(f"{'-' if wrong is None else format(wrong, '.1e'):>10}")
        same = row.get("same_decision")
        cells.append(f"{'-' if same is None else 'same' if same else 'DIFFERS':>10}")
        cells.append(_number(row.get("compile_s"), 11, 2))
        print(f"{row['model']:20}{row['threads']:>8}" + "".join(cells))
        for engine, error in row["errors"].items():
            print(f"    {engine}: {error}")
        if row.get("fallback_ops"):
            print(f"    interpreted operators: {row['fallback_ops']}")
    means = {key: value for key, value in result["geomean"].items() if value}
    print("geometric mean of best peer / nestc: " + (", ".join(f"{k} {v:.3f}" for k, v in means.items()) or "-"))


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the models asked for."""
    parser = argparse.ArgumentParser(
        description="nestc against onnxruntime and openvino.",
        epilog="example: python benchmarks/peers.py --models mobilenetv2,squeezenet11 --threads 1,2",
    )
    parser.add_argument("--models", help="comma-separated names of benchmarks/zoo.py; default: all")
    parser.add_argument("--threads", default="1,2", help="comma-separated thread counts (default 1,2)")
    parser.add_argument("--runs", type=int, default=15, help="rounds of timing (default 15)")
    parser.add_argument("--vs", action="append", choices=tuple(PEERS), help="peer, repeatable; default: all")
    parser.add_argument("--without-nestc", action="store_true", help="time the peers alone")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one row (default 600)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    peers = tuple(options.vs or PEERS)
    try:
        counts = [int(count) for count in options.threads.split(",")]
        names = [model.name for model in zoo.select(options.models)]
    except (Error, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if max(counts) > len(usable_cores()) or min(counts) < 1:
        print(f"error: --threads must be between 1 and {len(usable_cores())} here", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for name in names:
        for count in counts:
            task: Task = (name, count, options.runs, peers, not options.without_nestc)
            for _, answer in run_isolated(measure, [task], 1, options.timeout):
                lost = {"model": name, "precision": "fp32", "threads": count, "errors": {}}
                rows.append(lost | {"errors": {"process": answer.reason}} if isinstance(answer, Lost) else answer)
            if sys.stderr.isatty():
                print(f"{name}, {count} threads: done", file=sys.stderr)
    result = finish(rows, {count: fp32_peak(count) for count in counts})
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result, peers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
