"""nestc's quantizer beside onnxruntime's and NNCF's: same float model, same calibration data, same images.

    python benchmarks/quantization.py                                   (the network that nestc ships, Fashion-MNIST)
    python benchmarks/quantization.py --models efficientnet_lite0 --data imagenet --labels imagenet/labels.csv

All quantize the float model that `nestc.quant.prepare` makes (batch norms folded). Every quantized model is run by ONNX
Runtime with exact arithmetic, and nestc's also by nestc. top1 is a fraction; agreement is the fraction of images that
are decided as by the float model; sqnr is of all scores, in dB. Each row is made in a process of its own.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import nestc
import quantizers
import zoo
from isolated import Lost, run_isolated
from nestc.datasets import Dataset
from nestc.demo import INPUT, labelled_images, model_path
from nestc.errors import Error
from nestc.evaluation import Distance, wilson, within_top
from nestc.measure import context
from nestc.quant.prepare import prepare
from nestc.quant.profile import METHODS
from nestc.quant.scheme import SCHEMES
from nestc.quant.toolbox import TOOLS

DEMO = "demo"

PREPROCESS = {"efficientnet_lite0": "mean=127,std=128"}
"""What each model of the zoo was trained with; others are as `imagenet`."""

CALIBRATION_SAMPLES = 100


@dataclass(frozen=True)
class Way:
    """One way to quantize: a scheme, a tool of a family, and what the family is asked for."""

    scheme: str
    family: str
    tool: str
    options: tuple[tuple[str, Any], ...] = ()


PEER_WAYS = (
    *(Way("int8", "onnxruntime", f"onnxruntime {method}", (("method", method),)) for method in quantizers.ORT_METHODS),
    Way("int8-symmetric", "onnxruntime", "onnxruntime MinMax", (("method", "MinMax"), ("symmetric", True))),
    Way("int8", "nncf", "nncf mixed", (("preset", "mixed"),)),
    Way("int8-symmetric", "nncf", "nncf performance", (("preset", "performance"),)),
)

NARROW = "int8:weight-bits=7"
"""What x86 without VNNI multiplies fastest."""

SINGLE_TOOL_SCHEMES = ("int8", "int8-pow2")
"""Schemes of which every accuracy tool, and every way to choose thresholds, is shown alone."""


def our_ways() -> tuple[Way, ...]:
    """Every scheme as it comes; of some without any tool, with each tool alone, and with each calibration method."""
    ways = [Way(scheme, "nestc", "nestc") for scheme in (*SCHEMES, NARROW, "auto")]
    for scheme in SINGLE_TOOL_SCHEMES:
        ways.append(Way(scheme, "nestc", "nestc plain", (("tools", ()),)))
        ways.append(Way(scheme, "nestc", "nestc plain, no bn-fold", (("tools", ()), ("unfolded", True))))
        ways += [Way(scheme, "nestc", f"nestc {tool}", (("tools", (tool,)),)) for tool in TOOLS if tool != "bn-fold"]
        for option in ("method", "weight-method"):
            for method in METHODS:
                options = (("tools", ()), ("scheme", f"{scheme}:{option}={method}"))
                ways.append(Way(scheme, "nestc", f"nestc {option}={method}", options))
    return tuple(ways)


@dataclass(frozen=True)
class Task:
    """What a worker process gets: files that hold the model and the data, and what to do with them."""

    way: Way
    model: str
    prepared: str
    folder: str
    input: str
    threads: int


def batches(folder: str, kind: str, name: str) -> Iterator[dict[str, np.ndarray]]:
    """The samples that `store` has written, one at a time."""
    samples = np.load(Path(folder) / f"{kind}.npy", mmap_mode="r")
    for index in range(len(samples)):
        yield {name: np.ascontiguousarray(samples[index : index + 1])}


def store(data: Dataset, folder: Path, kind: str, name: str) -> None:
    """Decode a data set once, for all workers."""
    shape = (data.samples, *next(iter(data))[name].shape[1:])
    samples = np.lib.format.open_memmap(folder / f"{kind}.npy", "w+", np.float32, shape)
    for index, batch in enumerate(data):
        samples[index] = batch[name][0]
    samples.flush()


def run_onnxruntime(path: str, task: Task, exact: bool = True) -> np.ndarray:
    """Scores of all images to evaluate on, float32 [images, classes].

    `exact`: products of bytes are summed as they are. By default the kernels for x86 processors that have AVX2 but not
    VNNI add pairs of them in 16 bits, where sums may saturate: an error of that machine, not of the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = [session.run(None, batch)[0] for batch in batches(task.folder, "evaluate", task.input)]
    return np.concatenate(found).reshape(len(found), -1)


def run_nestc(path: str, task: Task) -> np.ndarray:
    """The same by nestc's compiled code."""
    shape = next(batches(task.folder, "evaluate", task.input))[task.input].shape
    with nestc.compile(path, threads=task.threads, shapes={task.input: shape}) as executable:
        found = [executable(batch[task.input]) for batch in batches(task.folder, "evaluate", task.input)]
    return np.concatenate(found).reshape(len(found), -1)


def measure(task: Task) -> dict[str, Any]:
    """A worker's task: what `quantize_and_run` gives, or what failed under "error"."""
    try:
        return quantize_and_run(task)
    except Exception as error:  # noqa: BLE001 - the table shows what failed and goes on
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def quantize_and_run(task: Task) -> dict[str, Any]:
    """Quantize and run: scores by who ran it, and the seconds that quantizing took (calibration included)."""
    target = str(Path(task.folder) / "quantized.onnx")
    calibration = list(batches(task.folder, "calibrate", task.input))
    begin = time.perf_counter()
    options = dict(task.way.options)
    seconds: float | None = None
    if task.way.family == "float":
        target = task.prepared
    elif task.way.family == "onnxruntime":
        quantizers.onnxruntime_static(Path(task.prepared), calibration, Path(target), **options)
    elif task.way.family == "nncf":
        quantizers.nncf_onnx(Path(task.prepared), calibration, Path(target), **options)
    else:
        seconds = _quantize(task, calibration, Path(target))
    if seconds is None:
        seconds = time.perf_counter() - begin
    scores = {"onnxruntime": run_onnxruntime(target, task)}
    # Rows of one tool or method are about accuracy; how models run elsewhere is told by the others.
    if task.way.family != "nestc" or not task.way.options:
        scores["saturating"] = run_onnxruntime(target, task, exact=False)
    if task.way.family in ("float", "nestc") and not task.way.options:
        scores["nestc"] = run_nestc(target, task)
    return {"seconds": seconds, "scores": scores}


def _quantize(task: Task, calibration: list[dict[str, np.ndarray]], target: Path) -> float:
    """By nestc, from the float model, as a user would; gives the seconds that calibrating and quantizing took."""
    options: dict[str, Any] = {"scheme": task.way.scheme, **dict(task.way.options)}
    begin = time.perf_counter()
    model = Path(task.model)
    if options.pop("unfolded", False):
        model = model.with_name("unfolded.onnx")
        unfold(Path(task.model), model)
    kept, took = model.with_suffix(".profile.json"), model.with_suffix(".seconds.txt")
    if not kept.exists():
        # The first row calibrates for all: a profile has what every method needs.
        nestc.calibrate(model, calibration, threads=task.threads).save(kept)
        took.write_text(str(time.perf_counter() - begin))
    begin = time.perf_counter()
    nestc.quantize(model, kept, data=calibration, threads=task.threads, **options).save(target)
    return float(took.read_text()) + time.perf_counter() - begin


def unfold(model: Path, target: Path) -> None:
    """Write the model with its batch norms as depthwise 1x1 convolutions, which no pass folds: the same results.

    This is what a quantizer that does not fold them sees: one more rounding, and weights of another spread. Error if
    there are none.
    """
    proto = onnx.load(str(model))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    count = 0
    for node in proto.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        gamma, beta, mean, variance = (constants[name].astype(np.float64) for name in node.input[1:])
        epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
        scale = gamma / np.sqrt(variance + epsilon)
        weight = scale.astype(np.float32).reshape(-1, 1, 1, 1)
        bias = (beta - mean * scale).astype(np.float32)
        names = [f"unfolded_{count}_weight", f"unfolded_{count}_bias"]
        proto.graph.initializer.extend(map(numpy_helper.from_array, (weight, bias), names))
        conv = helper.make_node("Conv", [node.input[0], *names], node.output[:1], node.name, group=len(scale))
        node.CopyFrom(conv)
        count += 1
    if not count:
        raise Error("the model has no batch normalizations to leave unfolded")
    onnx.save(proto, str(target))


def judge(answer: Mapping[str, Any], reference: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The fields of a row that compare a model's scores with the float model's and with the labels."""
    scores = answer["scores"]["onnxruntime"]
    distance = Distance()
    distance.add(reference, scores)
    decided = scores.argmax(1)
    expected = reference.argmax(1)
    right = int(within_top(scores, labels, 1).sum())
    row = {
        "top1": right / len(labels),
        "top1_interval": wilson(right, len(labels)),
        "top1_float": float(within_top(reference, labels, 1).mean()),
        "agreement": float((decided == expected).mean()),
        "disagreements": int((decided != expected).sum()),
        "sqnr_db": distance.sqnr_db if np.isfinite(distance.sqnr_db) else None,
        "seconds": answer["seconds"],
    }
    saturating = answer["scores"].get("saturating")
    if saturating is not None:
        row["top1_saturating"] = float(within_top(saturating, labels, 1).mean())
    own = answer["scores"].get("nestc")
    if own is not None:
        row["top1_nestc"] = float(within_top(own, labels, 1).mean())
        row["nestc_decides_as_onnxruntime"] = float((own.argmax(1) == decided).mean())
    return row


def benchmark(
    name: str, options: argparse.Namespace, ways: Sequence[Way], tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All rows of one model."""
    with tempfile.TemporaryDirectory(prefix="nestc-quantization-") as temporary:
        folder = Path(temporary)
        model, calibrate, evaluate = _load(name, options)
        model.save(folder / "float.onnx")
        prepare(model).save(folder / "prepared.onnx")
        (key,) = model.inputs
        store(calibrate, folder, "calibrate", key)
        store(evaluate, folder, "evaluate", key)
        assert evaluate.labels is not None
        rows: list[dict[str, Any]] = []
        reference: np.ndarray | None = None
        for way in (Way("float", "float", "float"), *ways):
            task = Task(way, str(folder / "float.onnx"), str(folder / "prepared.onnx"), temporary, key, options.threads)
            row: dict[str, Any] = {"model": name, "scheme": way.scheme, "tool": way.tool}
            ((_, answer),) = run_isolated(measure, [task], 1, options.timeout)
            if isinstance(answer, Lost) or "error" in answer:
                row["error"] = answer.reason if isinstance(answer, Lost) else answer["error"]
            else:
                reference = answer["scores"]["onnxruntime"] if reference is None else reference
                row |= judge(answer, reference, evaluate.labels)
            rows.append(row)
            tell(line(row))
            if reference is None:
                break
        return rows


def _load(name: str, options: argparse.Namespace) -> tuple[nestc.Model, Dataset, Dataset]:
    """The float model with static shapes, and the data to calibrate and to evaluate on."""
    if name == DEMO:
        images, labels = labelled_images()
        model = nestc.load(model_path(), shapes={INPUT: [1, *images.shape[1:]]})
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "images.npz"
            np.savez(archive, **{INPUT: images})
            split = ["calibrate" if index < CALIBRATION_SAMPLES else "evaluate" for index in range(len(labels))]
            rows = [f"{index},{label},{split[index]}" for index, label in enumerate(labels)]
            table = Path(folder) / "labels.csv"
            table.write_text("\n".join(["file,label,split", *rows]))
            parts = [
                nestc.open_data(archive, model.inputs, labels=table, split=part) for part in ("calibrate", "evaluate")
            ]
        return model, parts[0], parts[1]
    if options.data is None or options.labels is None:
        raise Error(f"model {name} needs --data DIR and --labels FILE (with the splits calibrate and evaluate)")
    path = Path(name) if name.endswith(".onnx") else zoo.path(name)
    shapes = None if name.endswith(".onnx") else {key: list(shape) for key, shape in zoo.get(name).shapes.items()}
    model = nestc.load(path, shapes=shapes)
    if len(model.inputs) != 1:
        raise Error(f"model {name} has the inputs {', '.join(model.inputs)}; this benchmark is for models of one input")
    how = options.preprocess or PREPROCESS.get(name, "imagenet")
    parts = [
        nestc.open_data(
            options.data, model.inputs, labels=options.labels, split=part, preprocess=how, limit=options.limit
        )
        for part in ("calibrate", "evaluate")
    ]
    return model, parts[0], parts[1]


HEADER = (
    f"{'model':20}{'scheme':16}{'tool':34}{'top1 %':>8}{'float %':>8}{'agree %':>9}{'differ':>7}{'sqnr dB':>9}"
    f"{'nestc %':>9}{'satur. %':>9}{'seconds':>9}"
)


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    begin = f"{row['model']:20}{row['scheme']:16}{row['tool']:34}"
    if "error" in row:
        return f"{begin}  {row['error']}"
    sqnr = "-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
    own, saturating = ("-" if key not in row else f"{100 * row[key]:.2f}" for key in ("top1_nestc", "top1_saturating"))
    return (
        f"{begin}{100 * row['top1']:>8.2f}{100 * row['top1_float']:>8.2f}{100 * row['agreement']:>9.2f}"
        f"{row['disagreements']:>7}{sqnr:>9}{own:>9}{saturating:>9}{row['seconds']:>9.1f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantize and judge the models asked for."""
    parser = argparse.ArgumentParser(
        description="Accuracy of nestc's quantizer beside onnxruntime's and NNCF's.",
        epilog="example: python benchmarks/quantization.py --models efficientnet_lite0 --data imagenet "
        "--labels imagenet/labels.csv --tools 'nestc,onnxruntime*'",
    )
    parser.add_argument("--models", default=DEMO, help=f"comma-separated: {DEMO}, names of zoo.py, or .onnx files")
    parser.add_argument("--data", type=Path, help="folder of images, or what nestc.open_data takes")
    parser.add_argument("--labels", type=Path, help="CSV file,label,split with the splits calibrate and evaluate")
    parser.add_argument("--preprocess", help="as nestc evaluate takes it; default: what the model was trained with")
    parser.add_argument("--limit", type=int, help="samples of each split; default: all")
    parser.add_argument("--schemes", help="comma-separated; default: all")
    parser.add_argument("--tools", help="comma-separated names or patterns of tools, as 'nncf*'; default: all")
    parser.add_argument("--threads", type=int, default=1, help="threads to evaluate with (default 1)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one row (default 3600)")
    parser.add_argument("--list", action="store_true", help="print schemes and tools")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    try:
        ways = select(options.schemes, options.tools)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{way.scheme:16}{way.tool}" for way in ways))
        return 0

    def tell(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    rows: list[dict[str, Any]] = []
    try:
        tell(HEADER)
        for name in options.models.split(","):
            rows += benchmark(name, options, ways, tell)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        data = f"{options.data or 'images of the demo'}: split calibrate to calibrate, evaluate to judge"
        print(json.dumps({"rows": rows, "context": context(data, None)}))
    return 0


def select(schemes: str | None, tools: str | None) -> list[Way]:
    """The ways whose scheme and tool match one of the patterns each; all where None. Error if a pattern fits none."""
    ways = [*our_ways(), *PEER_WAYS]
    for given, name in ((schemes, lambda way: way.scheme), (tools, lambda way: way.tool)):
        if given is None:
            continue
        patterns = given.split(",")
        known = list(dict.fromkeys(map(name, ways)))
        unknown = next((pattern for pattern in patterns if not fnmatch.filter(known, pattern)), None)
        if unknown is not None:
            raise Error(f"nothing is called {unknown!r}; there are {', '.join(known)}")
        ways = [way for way in ways if any(fnmatch.fnmatchcase(name(way), pattern) for pattern in patterns)]
    return ways


if __name__ == "__main__":
    sys.exit(main())
