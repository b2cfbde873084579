"""nestc against the runtimes people use on CPUs, on the models of the zoo, in one table.

    python benchmarks/peers.py --models resnet50,magika --threads 1,2
    python benchmarks/peers.py --precision int8

The peers are onnxruntime, openvino, ncnn and MNN in float32 (nestc.measure.engines and nestc.measure.mobile say how
each is set up), onnxruntime and openvino in int8, openvino in bf16. What a peer cannot run, or computes wrongly, is
named in the row. Each (model, precision, threads) is measured in a process of its own: there, all engines run in turns
(see nestc.measure.timing), pinned to the same cores with as many threads. Times are medians of whole calls, in
milliseconds; differences are relative to the scale of the outputs, against onnxruntime on the same model. In int8 each
engine runs the model that its own quantizer made (onnxruntime: static QDQ, u8 activations, s8 weights per channel;
openvino: NNCF), and nestc's float32 runs beside them. bf16 (nestc's own quantizer; openvino computes in it by itself)
is left out where the processor has no instruction for it: both would imitate it, and the time would say nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantized_zoo
import zoo
from decisions import same_decision
from isolated import Lost, run_isolated
from nestc.errors import Error
from nestc.measure import (
    PEERS,
    Engine,
    NestcEngine,
    OnnxRuntimeEngine,
    OpenVinoEngine,
    context,
    difference,
    interleave,
    open_peer,
    peak_rss_mb,
    pinned,
    usable_cores,
)
from nestc.measure.peak import peaks

FLOAT = "nestc fp32"
"""Our float32 among the engines of an int8 row."""

NARROW = "nestc-7"
"""Ours with weights of 7 bits (`int8:weight-bits=7`), which x86 without VNNI multiplies faster: told beside `int8`."""

EXACT = "onnxruntime exact"
"""onnxruntime on its int8 model with sums that do not saturate, as ours do not: told, but not among the peers."""


COSINE = {"fp32": 0.9999, "bf16": 0.999, "int8": 0.999}
"""How alike embeddings must be. In int8 a value at a tie may round to either side, in every layer."""

WRONG = 0.05
"""A float32 peer whose outputs are further from onnxruntime's, relative to their scale, has not computed the model."""

PEERS_OF = {"fp32": tuple(PEERS), "bf16": ("openvino",), "int8": ("onnxruntime", "openvino")}
"""Who is compared with in which precision."""

NO_BF16 = "this processor multiplies no bfloat16 (neither VDPBF16PS nor BFMMLA)"

FRAGILE = ("ncnn", "mnn")
"""Their converters and they themselves may die of a model, so a process of its own tries them before they are timed."""

SMALL = ("mnist_conv", "ds_cnn", "silero_vad_16k", "magika")
"""Of these the overhead of a call decides; their means are taken apart, and against onnxruntime."""

MODELS = (
    "resnet18", "resnet50", "resnet50_b8", "mobilenetv2", "squeezenet11", "shufflenetv2", "efficientnet_b0", "vgg16",
    "googlenet", "inception_v3", "nudenet_320n", "ppocr_det", "ppocr_rec", "minilm", "bert_base", "vit_s16",
    "silero_vad_16k", "mnist_conv", "ds_cnn", "magika",
)  # fmt: skip
"""What is measured in float32 where no models are named."""


@dataclass(frozen=True)
class Task:
    """What a row measures. `files`: the model of each engine, by its name."""

    model: str
    precision: str
    threads: int
    rounds: int
    files: Mapping[str, Path]


def measure(task: Task) -> dict[str, Any]:
    """One row. An engine that fails is named under "errors"."""
    model, threads = zoo.get(task.model), task.threads
    row: dict[str, Any] = {"model": task.model, "precision": task.precision, "threads": threads, "errors": {}}
    peers = [engine for engine in task.files if engine in PEERS]
    inputs = zoo.inputs(task.model)
    row["gflop"] = zoo.gflops(task.model)
    engines: dict[str, Engine] = {}
    with pinned(threads):
        for engine, path in task.files.items():
            try:
                engines[engine] = _open(engine, path, inputs, task, row)
            except Exception as error:  # noqa: BLE001 - the table shows what failed and goes on
                row["errors"][engine] = f"fails: {_words(error)}"
        outputs = {key: engine.outputs() for key, engine in engines.items()}
        timings = interleave({key: engine.run for key, engine in engines.items()}, task.rounds) if engines else {}
        if task.precision == "int8":
            # Other quantizers' models compute other numbers; right is what onnxruntime computes on ours.
            outputs = {key: values for key, values in outputs.items() if key == "nestc"}
            if "nestc" in outputs:
                outputs["onnxruntime"] = exact_outputs(task.files["nestc"], inputs)
        if task.precision == "bf16":
            outputs["onnxruntime"] = exact_outputs(task.files[FLOAT], inputs)
    row["nestc_ms"] = timings["nestc"].median_ms if "nestc" in timings else None
    row["peers"] = {peer: timings[peer].median_ms for peer in peers if peer in timings}
    row["versions"] = {key: engine.version for key, engine in engines.items()}
    reference = outputs.get("onnxruntime")
    for key, values in outputs.items():
        if reference is None or key == "onnxruntime":
            continue
        found = difference(reference, values)
        if key in peers and task.precision == "fp32" and not found.max_rel <= WRONG:
            took = row["peers"].pop(key)
            row["errors"][key] = (
                f"fails: its outputs differ from onnxruntime's by {found.max_rel:.2g} of their scale ({took:.3f} ms)"
            )
        row.setdefault("differences", {})[key] = found.max_rel
        row.setdefault("decisions", {})[key] = same_decision(model.decision, reference, values, COSINE[task.precision])
    row["max_rel_diff"] = row.get("differences", {}).get("nestc")
    row["same_decision"] = row.get("decisions", {}).get("nestc")
    best = min(row["peers"].values(), default=None)
    row["ratio_to_best"] = best / row["nestc_ms"] if best and row["nestc_ms"] else None
    if NARROW in timings:
        row["nestc_weight_bits_7_ms"] = timings[NARROW].median_ms
        row["ratio_of_weight_bits_7"] = best / row["nestc_weight_bits_7_ms"] if best else None
    if EXACT in timings:
        row["onnxruntime_exact_ms"] = timings[EXACT].median_ms
    if FLOAT in timings:
        row["nestc_fp32_ms"] = timings[FLOAT].median_ms
        row["speedup_over_fp32"] = row["nestc_fp32_ms"] / row["nestc_ms"] if row["nestc_ms"] else None
    return row


def _open(engine: str, path: Path, inputs: Mapping[str, Any], task: Task, row: dict[str, Any]) -> Engine:
    """An engine ready to run; what is known of ours is noted in the row."""
    if engine == "openvino" and task.precision == "bf16":
        return OpenVinoEngine(path, inputs, task.threads, "bf16")
    if engine in PEERS:
        return open_peer(engine, path, inputs, task.threads)
    if engine == EXACT:
        return OnnxRuntimeEngine(path, inputs, task.threads, exact=True)
    return _open_nestc(path, inputs, task.threads, row if engine == "nestc" else {})


def try_peer(task: tuple[str, str, int]) -> str:
    """A worker's task: convert, load and run a model once with a peer. Gives what failed, or nothing."""
    peer, name, threads = task
    try:
        with pinned(threads):
            open_peer(peer, zoo.path(name), zoo.inputs(name), threads).outputs()
    except Exception as error:  # noqa: BLE001 - the table shows what failed and goes on
        return f"fails: {_words(error)}"
    return ""


def usable_peers(name: str, peers: Sequence[str], threads: int, timeout: float) -> tuple[list[str], dict[str, str]]:
    """The peers that run a model in float32, and why the others do not."""
    errors: dict[str, str] = {}
    for peer in peers:
        if peer not in FRAGILE:
            continue
        for _, answer in run_isolated(try_peer, [(peer, name, threads)], 1, timeout):
            failure = f"fails: {answer.reason}" if isinstance(answer, Lost) else answer
            if failure:
                errors[peer] = failure
    return [peer for peer in peers if peer not in errors], errors


def _words(error: Exception) -> str:
    kind = "" if isinstance(error, Error) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:300]}"


def exact_outputs(path: Path, inputs: Mapping[str, Any]) -> list[Any]:
    """onnxruntime's outputs with sums of bytes that do not saturate."""
    return OnnxRuntimeEngine(path, inputs, 1, exact=True).outputs()


def files_of(
    name: str, precision: str, peers: Sequence[str], with_nestc: bool
) -> tuple[dict[str, Path], dict[str, str]]:
    """The file that each engine runs, made where there is none yet, and what could not be made."""
    engines = [*(["nestc"] if with_nestc else []), *peers]
    if precision == "fp32":
        return dict.fromkeys(engines, zoo.path(name)), {}
    if precision == "bf16":
        files = dict.fromkeys([*peers, FLOAT], zoo.path(name))
        return files | ({"nestc": quantized_zoo.path(name, "nestc-bf16")} if with_nestc else {}), {}
    files = {}
    errors: dict[str, str] = {}
    for engine in (*engines, *([NARROW] if with_nestc else [])):
        try:
            files[engine] = quantized_zoo.path(name, engine)
        except Error as error:
            errors[engine] = str(error)
    if "onnxruntime" in files:
        files[EXACT] = files["onnxruntime"]
    return files | ({FLOAT: zoo.path(name)} if with_nestc else {}), errors


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


def finish(rows: Sequence[dict[str, Any]], most: Mapping[int, Mapping[str, float | None]]) -> dict[str, Any]:
    """The JSON object of the contract; `most` is the measured peak by thread count and precision, in GFLOP/s."""
    for row in rows:
        peak = most.get(row["threads"], {}).get(row["precision"])
        done, took = row.get("gflop"), row.get("nestc_ms")
        row["percent_of_peak"] = 100 * done / (took / 1e3) / peak if peak and done and took else None
    for row in rows:
        other, own = row.get("peers", {}).get("onnxruntime"), row.get("nestc_ms")
        row["ratio_to_onnxruntime"] = other / own if other and own else None
    ratios = {precision: geomean(_ratios(rows, precision, "ratio_to_best", False)) for precision in PEERS_OF}
    small = geomean(_ratios(rows, "fp32", "ratio_to_onnxruntime", True))
    versions = {key: version for row in rows for key, version in row.get("versions", {}).items()}
    facts = context(data="seeded synthetic inputs of benchmarks/zoo.py", seed=0)
    return {
        "rows": list(rows),
        "geomean": ratios,
        "geomean_small_to_onnxruntime": small,
        "versions": versions,
        "context": facts,
    }


def _ratios(rows: Sequence[Mapping[str, Any]], precision: str, key: str, small: bool) -> list[float]:
    """Ratios of the rows of a precision: of small models alone, or of all that count in the mean (SMALL says which)."""
    counted = [row for row in rows if row["precision"] == precision and row.get(key)]
    return [row[key] for row in counted if (row["model"] in SMALL if small else _counts(row["model"]))]


def _counts(model: str) -> bool:
    """Whether a model counts in the mean of all: silero does, the other small ones do not."""
    return model == "silero_vad_16k" or model not in SMALL


def print_table(result: Mapping[str, Any], peers: Sequence[str]) -> None:
    """One line a model and thread count."""
    print("  ".join(f"{key} {version}" for key, version in sorted(result["versions"].items())))
    print(
        f"{'model':20}{'':6}{'threads':>8}{'nestc ms':>11}"
        + "".join(f"{peer + ' ms':>16}" for peer in peers)
        + f"{'ratio':>8}{'to ort':>8}{'% peak':>8}{'rel diff':>10}{'decision':>10}{'compile s':>11}"
    )
    for row in result["rows"]:
        cells = [_number(row.get("nestc_ms"), 11, 3)]
        cells += [_number(row.get("peers", {}).get(peer), 16, 3) for peer in peers]
        cells += [_number(row.get(key), 8, 2) for key in ("ratio_to_best", "ratio_to_onnxruntime")]
        cells.append(_number(row.get("percent_of_peak"), 8, 1))
        wrong = row.get("max_rel_diff")
        cells.append(f"{'-' if wrong is None else format(wrong, '.1e'):>10}")
        same = row.get("same_decision")
        cells.append(f"{'-' if same is None else 'same' if same else 'DIFFERS':>10}")
        cells.append(_number(row.get("compile_s"), 11, 2))
        print(f"{row['model']:20}{row['precision']:6}{row['threads']:>8}" + "".join(cells))
        if row.get("onnxruntime_exact_ms"):
            print(f"    onnxruntime, sums that do not saturate: {row['onnxruntime_exact_ms']:.3f} ms")
        if row.get("nestc_weight_bits_7_ms"):
            narrow, fp32 = row["nestc_weight_bits_7_ms"], row.get("nestc_fp32_ms")
            print(
                f"    nestc, weights of 7 bits: {narrow:.3f} ms, ratio {_number(row['ratio_of_weight_bits_7'], 0, 2)}"
                + (f", {fp32 / narrow:.2f} times as fast as fp32" if fp32 else "")
            )
        if row.get("speedup_over_fp32"):
            print(f"    nestc fp32 {row['nestc_fp32_ms']:.3f} ms: int8 is {row['speedup_over_fp32']:.2f} times as fast")
        for engine, error in row["errors"].items():
            print(f"    {engine}: {error}")
        if row.get("fallback_ops"):
            print(f"    interpreted operators: {row['fallback_ops']}")
    means = {key: value for key, value in result["geomean"].items() if value}
    print("geometric mean of best peer / nestc: " + (", ".join(f"{k} {v:.3f}" for k, v in means.items()) or "-"))
    for precision, reason in result["skipped"].items():
        print(f"{precision} is skipped: {reason}")
    if result["geomean_small_to_onnxruntime"]:
        print(f"small networks, onnxruntime / nestc: {result['geomean_small_to_onnxruntime']:.3f}")


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def plan(models: str | None, precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Model and precision of each row. A model of the zoo that is quantized as it comes has its own precision."""
    unknown = next((each for each in precisions if each not in PEERS_OF), None)
    if unknown is not None:
        raise Error(f"there is no precision {unknown!r}; choose from {', '.join(PEERS_OF)}")
    chosen = {"fp32": MODELS, "bf16": MODELS, "int8": quantized_zoo.MODELS}
    work: list[tuple[str, str]] = []
    for precision in PEERS_OF:
        if precision in precisions:
            named = zoo.select(models or ",".join(chosen[precision]))
            work += [(model.name, model.precision if precision == "fp32" else precision) for model in named]
    return work


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the models asked for."""
    parser = argparse.ArgumentParser(
        description="nestc against onnxruntime, openvino, ncnn and MNN.",
        epilog="example: python benchmarks/peers.py --models mobilenetv2,squeezenet11 --threads 1,2",
    )
    parser.add_argument(
        "--models",
        help=f"comma-separated names of benchmarks/zoo.py; default: {', '.join(MODELS)}; in int8 "
        + ", ".join(quantized_zoo.MODELS),
    )
    parser.add_argument("--precision", default="fp32,bf16,int8", help="comma-separated (default fp32,bf16,int8)")
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
        work = plan(options.models, options.precision.split(","))
    except (Error, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if max(counts) > len(usable_cores()) or min(counts) < 1:
        print(f"error: --threads must be between 1 and {len(usable_cores())} here", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    skipped = {"bf16": NO_BF16} if "bf16" in options.precision.split(",") and peaks(1)["bf16"] is None else {}
    for name, precision in work:
        if precision in skipped:
            continue
        start: dict[str, Any] = {"model": name, "precision": precision}
        here = [peer for peer in peers if peer in PEERS_OF[precision]]
        try:
            zoo.gflops(name)
            broken: dict[str, str] = {}
            if precision == "fp32":
                here, broken = usable_peers(name, here, max(counts), options.timeout)
            files, missing = files_of(name, precision, here, not options.without_nestc)
            missing |= broken
        except Error as error:
            rows += [start | {"threads": count, "errors": {"zoo": str(error)}} for count in counts]
            continue
        for count in counts:
            task = Task(name, precision, count, options.runs, files)
            for _, answer in run_isolated(measure, [task], 1, options.timeout):
                row = (
                    start | {"threads": count, "errors": {"process": answer.reason}}
                    if isinstance(answer, Lost)
                    else answer
                )
                rows.append(row | {"errors": {**missing, **row["errors"]}})
            if sys.stderr.isatty():
                print(f"{name}, {precision}, {count} threads: done", file=sys.stderr)
    result = finish(rows, {count: peaks(count) for count in counts}) | {"skipped": skipped}
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result, peers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
