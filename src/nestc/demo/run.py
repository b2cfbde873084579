"""`nestc demo`: the shipped network calibrated, quantized, placed on devices, compiled, and run on the test images."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestc.demo.data import CLASSES, INPUT, labelled_images, model_path
from nestc.demo.rows import Program, Row, measure

if TYPE_CHECKING:
    from nestc.bundle.bundle import BundlePartition
    from nestc.graph.model import Model
    from nestc.partition.plan import Plan
    from nestc.quant.profile import Profile
    from nestc.runtime import Executable
    from nestc.targets.api import Target

DEVICES = ("cpu", "vta", "aim")
"""What the network is placed on unless other targets are named."""

OBJECTIVES = ("latency", "throughput", "energy")

FORMATS = ("auto", "devices")
"""Schemes that all devices together are planned with, of which the better is taken: the formats that are fastest on any
device, inside a budget, and those that the accelerators compute in, so that work can be moved to them."""

BUDGET = 0.02
"""The fraction of the calibration images that the formats of ``auto`` may lose."""

TIMED_RUNS = 200
CALIBRATED = 100
"""The first images calibrate the quantized networks; they are judged on others, beside the float one."""

SIMULATED = 100
"""Images that networks on several devices are judged on, since a simulator takes 30 ms for one."""

# Names worth telling, widest first: LLVM feature, what people call it.
INSTRUCTION_SETS = (
    ("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("sse4.2", "SSE4.2"), ("sse2", "SSE2"), ("sve", "SVE"),
    ("neon", "NEON"),
)  # fmt: skip
EXTENSIONS = (("fma", "FMA"), ("f16c", "F16C"), ("avx512vnni", "VNNI"), ("avx512bf16", "BF16"), ("dotprod", "DotProd"))

Progress = Callable[[str, float], None]


def run(
    targets: Sequence[str | Target] = DEVICES,
    threads: int | None = None,
    progress: Progress | None = None,
    page: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The whole way from the trained network to devices; returns the report as JSON values.

    Keys: those of `_alone` for the float network on the CPU, ``int8`` with those for the quantized one and how it came
    about; ``rows``, each a `nestc.demo.rows.Row`: the CPU alone, each other target with it, and all together, placed
    for each objective; ``page``: where the page about the placement on most devices was written, None without `page`.
    """
    from nestc.quantization import calibrate
    from nestc.targets import resolve

    tell = progress or _silent
    chosen = resolve(targets, {"threads": threads})
    cpu = [target for target in chosen if target.name == "cpu"] or [*resolve(["cpu"], {"threads": threads})]
    others = [target for target in chosen if target.name not in ("cpu", "host")]
    images, labels = labelled_images()
    shapes = {INPUT: [1, *images.shape[1:]]}

    tell("the float network on the CPU", 0.0)
    report, program = _alone(model_path(), cpu, "float", shapes, threads, images, labels, None)
    programs = [program]
    classes, right = report.pop("classes"), report.pop("right")

    tell("calibrate", 0.1)
    begin = time.perf_counter()
    samples = [{INPUT: image[None]} for image in images[:CALIBRATED]]
    profile = calibrate(model_path(), samples, "mse", shapes=shapes, threads=threads)
    work = _Work(profile, samples, shapes, threads, [*others, *cpu])
    tell("quantize to int8", 0.15)
    model = work.quantized("int8")
    seconds = time.perf_counter() - begin
    rest = (images[CALIBRATED:], labels[CALIBRATED:], classes[CALIBRATED:])
    small, program = _alone(model, cpu, "int8", None, threads, *rest)
    programs.append(program)
    differs = rest[2] != small.pop("classes")
    report["int8"] = {
        "calibrated_on": CALIBRATED,
        "quantize_seconds": seconds,
        "float_accuracy": float(right[CALIBRATED:].mean()),
        "disagreements": int(differs.sum()),
        **{key: value for key, value in small.items() if key not in ("right", "examples")},
    }

    # Each accelerator takes all that it can; all together are placed by cost, once for each objective.
    ways: list[tuple[list[Target], str | None]] = [([target, *cpu], None) for target in others]
    ways += [([*others, *cpu], objective) for objective in OBJECTIVES] if others else []
    some = (rest[0][:SIMULATED], rest[1][:SIMULATED], rest[2][:SIMULATED])
    for number, (devices, objective) in enumerate(ways):
        name = " + ".join(device.name for device in devices)
        tell(name if objective is None else f"{name}, for {objective}", 0.3 + 0.4 * number / len(ways))
        scheme, compiled, seconds = work.compiled(devices, objective)
        programs.append(Program(name, scheme, objective, compiled, *some, seconds))
    tell("run on the test images", 0.7)
    rows = measure(programs)

    report["page"] = None
    placed = [(row, program) for row, program in zip(rows, programs, strict=True) if row.objective is not None]
    if page is not None and placed:
        tell("page", 0.95)
        _page(*max(placed, key=lambda each: len(each[0].regions)), page)
        report["page"] = os.fspath(page)
    for program in programs:
        program.executable.close()
    report["rows"] = [row.to_json() for row in rows]
    tell("done", 1.0)
    return report


@dataclasses.dataclass
class _Work:
    """What the networks for devices are made of."""

    profile: Profile
    samples: Sequence[Mapping[str, np.ndarray]]
    shapes: Mapping[str, Sequence[int]]
    threads: int | None
    targets: Sequence[Target]
    made: dict[str, Model] = dataclasses.field(default_factory=dict[str, "Model"])

    def quantized(self, scheme: str) -> Model:
        """The network in a scheme, made once; schemes that depend on targets are for all of them."""
        from nestc.quantization import quantize

        if scheme not in self.made:
            self.made[scheme] = quantize(
                model_path(), self.profile, scheme,
                data=self.samples, shapes=self.shapes, threads=self.threads,
                targets=self.targets if scheme in FORMATS else None,
                accuracy_budget=BUDGET if scheme == "auto" else None,
            )  # fmt: skip
        return self.made[scheme]

    def compiled(self, targets: Sequence[Target], objective: str | None) -> tuple[str, Executable, float]:
        """The network compiled for targets, by cost or (without an objective) in their order; its scheme, and seconds.

        By cost, it is planned in each of `FORMATS`, and the plan that promises most is compiled.
        """
        from nestc.driver import compile as compile_model
        from nestc.driver import explain
        from nestc.runtime import Executable

        begin = time.perf_counter()
        scheme, plan = "devices", None
        if objective is not None:
            plans = {
                each: explain(
                    self.quantized(each), targets, objective=objective, placement="cost", threads=self.threads
                )[0]
                for each in FORMATS
            }
            scheme = min(plans, key=lambda each: _promised(plans[each], objective))
            plan = plans[scheme]
        found = compile_model(
            self.quantized(scheme), targets, threads=self.threads,
            objective=objective or "latency", placement="order", plan=plan,
        )  # fmt: skip
        assert isinstance(found, Executable)
        return scheme, found, time.perf_counter() - begin


def _promised(plan: Plan, objective: str) -> float:
    """What a plan by cost predicts of its objective: milliseconds, milliseconds a request, or millijoules."""
    value = plan.predicted_mj if objective == "energy" else plan.predicted_ms
    assert value is not None
    return value


def _page(row: Row, program: Program, page: str | os.PathLike[str]) -> None:
    """Write the page about a program, with what it gets right beside the float network on the same images."""
    from nestc.report import AccuracyData, write

    accuracy = AccuracyData(
        "top1", row.accuracy, row.images, "Fashion-MNIST test images", "the float network",
        float((program.decided == program.labels).mean()), disagreements=round((1 - row.agreement) * row.images),
    )  # fmt: skip
    write(program.executable, page, inputs={INPUT: program.images[:1]}, accuracy=[accuracy], requests=4)


def _alone(
    model: Path | Model,
    cpu: Sequence[Target],
    scheme: str,
    shapes: Mapping[str, Sequence[int]] | None,
    threads: int | None,
    images: np.ndarray,
    labels: np.ndarray,
    decided: np.ndarray | None,
) -> tuple[dict[str, Any], Program]:
    """Compile for the CPU, save, open again, classify. Keys: ``compile_seconds``, ``bundle_bytes``, ``load_ms``, and
    of `_measure` (``latency_ms`` is the median of calls on one image) and `_generated` (``kernels`` are distinct ones).
    """
    from nestc.driver import compile as compile_model
    from nestc.runtime import open as open_bundle

    begin = time.perf_counter()
    compiled = compile_model(model, cpu, threads=threads, shapes=shapes)
    compile_seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.nest"
        compiled.save(path)
        compiled.close()
        bundle_bytes = path.stat().st_size
        begin = time.perf_counter()
        executable = open_bundle(path, threads=threads)
        load_ms = (time.perf_counter() - begin) * 1e3
        found = _measure(executable, images, labels)
        report = {
            "compile_seconds": compile_seconds,
            "bundle_bytes": bundle_bytes,
            "load_ms": load_ms,
            **found,
            **_generated(executable),
        }
    classes = found["classes"] if decided is None else decided
    return report, Program("cpu", scheme, None, executable, images, labels, classes, compile_seconds)


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


def _silent(what: str, fraction: float) -> None:
    """Progress that nobody watches."""
