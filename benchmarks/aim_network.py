"""Networks for benchmarks/aim.py: compiled for AiM and the CPU together, simulated and measured, and compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

import nestc
import nets_attention
import zoo
from nestc.measure import interleave, pinned
from netbuilder import NetBuilder

ROUNDS = 5
"""Blocks of each engine's runs; times are medians over these."""


@dataclass(frozen=True)
class NetModel:
    """A network by name: its file or model, and its seeded inputs. ``rounded``: by the target, not by the scheme."""

    name: str
    note: str
    source: Callable[[], nestc.Model]
    inputs: Callable[[], dict[str, np.ndarray]]
    rounded: bool = False


def vgg16_classifier() -> onnx.ModelProto:
    """The fully connected layers of VGG-16 (Simonyan and Zisserman 2015, arXiv:1409.1556), random weights."""
    net = NetBuilder("vgg16_classifier")
    x = net.gemm(net.input("features", (1, 25088)), 4096, "relu")
    net.output(net.gemm(net.gemm(x, 4096, "relu"), 1000), "output")
    return net.model()


def _normal(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def _zoo(name: str) -> nestc.Model:
    model = zoo.get(name)
    return nestc.load(zoo.path(model.name), shapes={name: list(shape) for name, shape in model.shapes.items()})


def _gpt2_inputs() -> dict[str, np.ndarray]:
    cache = _normal(past_keys=(12, 12, 127, 64), past_values=(12, 12, 127, 64))
    return {"token": np.array([1234]), "position": np.array([127]), **cache}


NETS = (
    NetModel(
        "vgg16_classifier",
        "25,088x4,096, 4,096x4,096 and 4,096x1,000, random weights",
        lambda: nestc.load(vgg16_classifier()),
        lambda: {"features": np.maximum(_normal(features=(1, 25088))["features"], 0)},
    ),
    NetModel(
        "silero_vad_16k", "trained: convolutions and an LSTM cell, one frame", lambda: _zoo("silero_vad_16k"),
        lambda: zoo.inputs("silero_vad_16k"),
    ),
    NetModel(
        "silero_sequence", "trained: 16 frames through an LSTM node, float32 rounded by the target",
        lambda: _zoo("silero_sequence"), lambda: zoo.inputs("silero_sequence"), rounded=True,
    ),
    NetModel(
        "lstm", "two layers of 512, eight steps, random weights", lambda: nestc.load(nets_attention.lstm()),
        lambda: _normal(x=(8, 256)),
    ),
    NetModel(
        "gpt2_step", "GPT-2 small, one token after 127, random weights",
        lambda: nestc.load(nets_attention.gpt2_step()), _gpt2_inputs,
    ),
)  # fmt: skip


def run(net: NetModel, target: str, threads: int) -> dict[str, Any]:
    """Compile, simulate and measure a network; the row of the benchmark's JSON object."""
    model, inputs = net.source(), net.inputs()
    quantized = nestc.quantize(model, None, scheme="bf16")
    begun = time.perf_counter()
    if net.rounded:
        mixed = nestc.compile(model, targets=[f"{target},round=true"], threads=threads)
    else:
        mixed = nestc.compile(quantized, targets=[target], threads=threads)
    compiled = time.perf_counter() - begun
    begun = time.perf_counter()
    outputs = mixed.run(inputs)
    simulated = time.perf_counter() - begun
    rest = [_measured_ms(mixed, inputs) for _ in range(ROUNDS if simulated < 2 else 2)]

    with pinned(threads):
        engines = {
            "fp32": nestc.compile(model, targets=["cpu"], threads=threads),
            "bf16": nestc.compile(quantized, targets=["cpu"], threads=threads),
        }
        answers = {name: engine.run(inputs) for name, engine in engines.items()}
        timings = interleave({name: _runner(engine, inputs) for name, engine in engines.items()}, ROUNDS)
    timing = [p.artifact.metadata["timing"] for p in mixed.bundle.partitions if p.device == "aim"]
    ticks = sum(each["ticks"] for each in timing)
    useful = sum(each["bandwidth_fraction"] * each["ticks"] for each in timing)
    aim_ms = sum(each["seconds"] for each in timing) * 1e3
    cpu_rest = statistics.median(rest)
    return {
        "model": net.name,
        "note": net.note,
        "layers_on_aim": sum(len(each["layers"]) for each in timing),
        "partitions_on_aim": len(timing),
        "ticks": ticks,
        "aim_ms": aim_ms,
        "of_which_host_ms": sum(each["host_seconds"] for each in timing) * 1e3,
        "rest_on_cpu_ms": cpu_rest,
        "total_ms": aim_ms + cpu_rest,
        "bandwidth_fraction": useful / max(ticks, 1),
        "energy_mj": sum(each["energy_joules"] for each in timing) * 1e3,
        "cpu_ms": {name: each.median_ms for name, each in timings.items()},
        "relative_error": {"aim": worst(outputs, answers["fp32"]), "cpu_bf16": worst(answers["bf16"], answers["fp32"])},
        "kinds": {
            "simulated": ["ticks", "aim_ms", "of_which_host_ms", "bandwidth_fraction", "energy_mj"],
            "measured": ["rest_on_cpu_ms", "cpu_ms", "relative_error", "compile_seconds", "simulation_seconds"],
            "both": ["total_ms"],
        },
        "compile_seconds": round(compiled, 2),
        "simulation_seconds": round(simulated, 2),
        "layers": [layer for each in timing for layer in each["layers"]],
    }


def _measured_ms(executable: nestc.Executable, inputs: Mapping[str, np.ndarray]) -> float:
    """Milliseconds of a run that were measured: what the CPU did."""
    executable.run(inputs)
    marks = [mark for mark in executable.timeline() if mark["kind"] == "measured"]
    return sum(mark["end_us"] - mark["start_us"] for mark in marks) / 1e3


def _runner(executable: nestc.Executable, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
    return lambda: executable.run(inputs)


def worst(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest over all outputs of the norm of the difference over that of the expected output."""
    errors = [
        np.linalg.norm(found[name].astype(np.float64) - wanted) / max(np.linalg.norm(wanted.astype(np.float64)), 1e-30)
        for name, wanted in expected.items()
    ]
    return float(max(errors, default=0.0))
