"""``nestc demo``: a small trained classifier that ships with the package, compiled and run on its test images."""

from __future__ import annotations

import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

from nestc.commands import common

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""Fashion-MNIST's ten classes, in the order of its labels."""


def demo(
    threads: common.Threads = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Compile a small trained network (Fashion-MNIST), run it on 500 test images, and show what was generated.

    Example: `nestc demo --threads 1`
    """
    report = measure(threads)
    if json:
        common.print_json(report)
        return
    show(report)


def measure(threads: int | None) -> dict[str, Any]:
    """Compile, save, open again, classify every image; the figures as JSON values."""
    import numpy as np

    from nestc.driver import compile as compile_model
    from nestc.runtime import open as open_bundle

    folder = resources.files("nestc") / "demo"
    with resources.as_file(folder / "images.npz") as path, np.load(path, allow_pickle=False) as data:
        images, labels = data["images"], data["labels"]
    started = time.perf_counter()
    with common.progress() as step:
        compiled = compile_model(
            (folder / "model.onnx").read_bytes(), threads=threads, dims={"N": 1}, bound=True, progress=step
        )
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "demo.nest"
        compiled.save(bundle)
        size = bundle.stat().st_size
        started = time.perf_counter()
        executable = open_bundle(bundle, threads=threads)
        load_ms = (time.perf_counter() - started) * 1e3
        times: list[float] = []
        guesses: list[int] = []
        for image in images:
            x = (image[None, None] / np.float32(255)).astype(np.float32)
            started = time.perf_counter()
            logits = executable(x)
            times.append((time.perf_counter() - started) * 1e3)
            guesses.append(int(logits.argmax()))
        stats, plan = executable.stats(), executable.plan
        executable.close()
    right = int((np.array(guesses) == labels).sum())
    return {
        "images": len(images),
        "accuracy": right / len(images),
        "latency_ms": statistics.median(times),
        "compile_seconds": seconds,
        "load_ms": load_ms,
        "bundle_bytes": size,
        "regions": [{"name": region.name, "device": region.device, "ops": list(region.ops)} for region in plan.regions],
        "fallback_ops": plan.fallback_ops,
        **stats,
        "first": [
            {"image": index, "label": CLASSES[int(label)], "guess": CLASSES[guess]}
            for index, (label, guess) in enumerate(zip(labels[:8], guesses[:8], strict=True))
        ],
    }


def show(report: dict[str, Any]) -> None:
    """Print the figures for people."""
    print("Fashion-MNIST classifier: 3x3, 1x1 and depthwise convolutions, residual blocks, trained in float32")
    print(f"  compiled in {report['compile_seconds']:.2f} s to one bundle of {report['bundle_bytes'] / 1e3:.0f} kB")
    calls, threads = report["kernel_calls"], report["threads"]
    print(
        f"  {len(report['regions'])} regions, {calls} kernel calls, {report['code_bytes'] / 1e3:.0f} kB of machine code"
    )
    print(f"  weights {report['weights_bytes'] / 1e3:.0f} kB, working memory {report['arena_bytes'] / 1e3:.0f} kB")
    for region in report["regions"]:
        print(f"    {region['device']:5s} {region['name']}: {', '.join(region['ops'])}")
    if report["fallback_ops"]:
        print(f"  interpreted, not compiled: {report['fallback_ops']}")
    print(f"  loaded in {report['load_ms']:.1f} ms without the compiler")
    for row in report["first"]:
        print(
            f"    image {row['image']}: {row['guess']}"
            + ("" if row["guess"] == row["label"] else f", not {row['label']}")
        )
    print(f"  accuracy {report['accuracy']:.1%} on {report['images']} test images")
    print(f"  latency {report['latency_ms']:.4f} ms an image ({threads} threads, median)")
