"""`nestc demo`: compiles the shipped network, as it is and quantized, and runs both on the shipped test images."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestc.demo.data import CLASSES, INPUT, labelled_images, model_path

if TYPE_CHECKING:
    from nestc.bundle.bundle import BundlePartition
    from nestc.graph.model import Model
    from nestc.runtime import Executable
    from nestc.targets.api import Target

TIMED_RUNS = 200
CALIBRATED = 100
"""The first images calibrate the quantized network; it is judged on the rest, beside the float one."""

# Names worth telling, widest first: LLVM feature, what people call it.
INSTRUCTION_SETS = (
    ("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("sse4.2", "SSE4.2"), ("sse2", "SSE2"), ("sve", "SVE"),
    ("neon", "NEON"),
)  # fmt: skip
EXTENSIONS = (("fma", "FMA"), ("f16c", "F16C"), ("avx512vnni", "VNNI"), ("avx512bf16", "BF16"), ("dotprod", "DotProd"))


def run(
    targets: Sequence[str | Target] = ("cpu",),
    threads: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Compile for `targets`, save, open again, classify the test images one by one; returns the report as JSON values.

    Keys: those of `_run` for the float network, ``int8`` with those for the quantized one, and how it came about.
    `describe` makes text of it.
    """
    from nestc.quantization import calibrate, quantize

    images, labels = labelled_images()
    shapes = {INPUT: [1, *images.shape[1:]]}
    report = _run(model_path(), shapes, targets, threads, progress, images, labels)
    begin = time.perf_counter()
    samples = [{INPUT: image[None]} for image in images[:CALIBRATED]]
    profile = calibrate(model_path(), samples, "mse", shapes=shapes, threads=threads)
    model = quantize(model_path(), profile, "int8", data=samples, shapes=shapes, threads=threads)
    seconds = time.perf_counter() - begin
    rest = (images[CALIBRATED:], labels[CALIBRATED:])
    quantized = _run(model, None, targets, threads, progress, *rest)
    classes, right = report.pop("classes"), report.pop("right")
    differs = classes[CALIBRATED:] != quantized.pop("classes")
    return {
        **report,
        "int8": {
            "calibrated_on": CALIBRATED,
            "quantize_seconds": seconds,
            "float_accuracy": float(right[CALIBRATED:].mean()),
            "disagreements": int(differs.sum()),
            **{key: value for key, value in quantized.items() if key not in ("right", "examples")},
        },
    }


def _run(
    model: Path | Model,
    shapes: Mapping[str, Sequence[int]] | None,
    targets: Sequence[str | Target],
    threads: int | None,
    progress: Callable[[str, float], None] | None,
    images: np.ndarray,
    labels: np.ndarray,
) -> dict[str, Any]:
    """Compile, save, open again, classify. Keys: ``compile_seconds``, ``bundle_bytes``, ``load_ms``, and of `_measure`
    (``latency_ms`` is the median of calls on one image) and of `_generated` (``kernels`` are distinct ones)."""
    from nestc.driver import compile as compile_model
    from nestc.runtime import open as open_bundle

    begin = time.perf_counter()
    compiled = compile_model(model, targets, threads=threads, shapes=shapes, progress=progress)
    compile_seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.nest"
        compiled.save(path)
        compiled.close()
        bundle_bytes = path.stat().st_size
        begin = time.perf_counter()
        executable = open_bundle(path, threads=threads)
        load_ms = (time.perf_counter() - begin) * 1e3
        with executable:
            return {
                "compile_seconds": compile_seconds,
                "bundle_bytes": bundle_bytes,
                "load_ms": load_ms,
                **_measure(executable, images, labels),
                **_generated(executable),
            }


def _measure(executable: Executable, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What it computes, and how fast."""
    classes = np.array([int(executable(image[None]).argmax()) for image in images])
    latency_ms = _latency_ms(executable, images)
    return {
        "classes": classes,
        "right": classes == labels,
        "images": len(images),
        "accuracy": float((classes == labels).mean()),
        "latency_ms": latency_ms,
        "images_per_second": 1e3 / latency_ms,
        "examples": [
            {"image": index, "said": CLASSES[classes[index]], "is": CLASSES[labels[index]]} for index in range(5)
        ],
    }


def _generated(executable: Executable) -> dict[str, Any]:
    """What was generated, and how large it is."""
    stats = executable.stats()
    return {
        "threads": stats["threads"],
        "regions": len(executable.plan.regions),
        "partitions": [
            {"device": part.device, "regions": len(part.regions), "ops": executable.plan.ops(part)}
            for part in executable.plan.partitions
        ],
        "kernels": len({row["symbol"] for row in executable.profile(runs=1)}),
        "kernel_calls": stats["kernel_calls"],
        "instruction_set": instruction_set(executable.bundle.partitions),
        "code_bytes": stats["code_bytes"],
        "weights_bytes": stats["weights_bytes"],
        "arena_bytes": stats["arena_bytes"],
        "fallback_ops": executable.fallback_ops,
    }


def _latency_ms(executable: Executable, images: np.ndarray) -> float:
    """Median milliseconds of a call on one image, after the classification pass has warmed everything."""
    times: list[float] = []
    for number in range(TIMED_RUNS):
        image = images[number % len(images)][None]
        begin = time.perf_counter_ns()
        executable(image)
        times.append((time.perf_counter_ns() - begin) / 1e6)
    return statistics.median(times)


def instruction_set(partitions: Sequence[BundlePartition]) -> str:
    """What native code of these partitions may use, in words, and the CPU it is tuned for; "none" without such code."""
    for partition in partitions:
        metadata = partition.artifact.metadata
        if "triple" not in metadata:
            continue
        features = set(metadata["features"])
        base = next((name for feature, name in INSTRUCTION_SETS if feature in features), "baseline")
        extra = [name for feature, name in EXTENSIONS if feature in features]
        return " + ".join([base, *extra]) + f" ({metadata['triple'].partition('-')[0]}, {metadata['cpu']})"
    return "none"


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text."""
    lines = [
        f"Fashion-MNIST classifier, {report['images']} test images, {report['threads']} thread(s)",
        f"  accuracy      {100 * report['accuracy']:.1f} %",
        f"  latency       {report['latency_ms']:.3f} ms an image ({report['images_per_second']:.0f} images a second)",
        f"  compiled in   {report['compile_seconds']:.2f} s to a bundle of {report['bundle_bytes'] / 1024:.0f} KiB,"
        f" which loads in {report['load_ms']:.1f} ms without the compiler",
        f"  generated     {report['kernels']} kernels for {report['regions']} regions, called"
        f" {report['kernel_calls']} times an image, {report['code_bytes'] / 1024:.0f} KiB of machine code",
        f"  code for      {report['instruction_set']}",
        f"  memory        {report['weights_bytes'] / 1024:.0f} KiB of packed weights,"
        f" {report['arena_bytes'] / 1024:.0f} KiB of working memory",
    ]
    for part in report["partitions"]:
        ops = ", ".join(f"{op} {count}" for op, count in part["ops"].items())
        lines.append(f"  on {part['device']:11}{part['regions']} regions: {ops}")
    if report["fallback_ops"]:
        lines.append(f"  interpreted   {report['fallback_ops']}")
    small = report["int8"]
    lines += [
        f"  in int8       {100 * small['accuracy']:.1f} % of {small['images']} images (float"
        f" {100 * small['float_accuracy']:.1f} %), {small['disagreements']} decided differently;"
        f" calibrated on the other {small['calibrated_on']}, quantized in {small['quantize_seconds']:.1f} s",
        f"                {small['latency_ms']:.3f} ms an image, {small['weights_bytes'] / 1024:.0f} KiB of packed"
        f" weights, {small['arena_bytes'] / 1024:.0f} KiB of working memory",
    ]
    for example in report["examples"]:
        lines.append(f"  image {example['image']}: {example['said']} (it is: {example['is']})")
    return lines
