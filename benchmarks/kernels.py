"""The kernels of well-known networks, compiled by nestc one at a time, as a share of what one core can do at most.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --models conv1x1,conv3x3 --threads 1
    python benchmarks/kernels.py --precision int8
    python benchmarks/kernels.py --models conv3x3 --precision fp32 --ways conv,winograd2,winograd4,winograd6

The peak is measured on the spot (`nestc.measure.peak`): once for the record, and again beside every reading, since
shared machines change their speed from second to second; the share is the median of the readings' own. A layer is
compiled between two max-pools, which compute on the layout that the convolution wants, so that its figure holds no
conversion of the model's inputs and outputs. The work counted is that of the direct algorithm; Winograd needs less,
which is how a figure can exceed 100 %. In int8 a layer stands between QuantizeLinear and DequantizeLinear, its weights
are symmetric with a scale a channel, and the peak is that of the int8 instruction (see there); on AVX2 a convolution
may exceed it, since it multiplies bytes directly where the weights are small enough for that to be exact.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nestc.errors import Error
from nestc.graph.region import Region
from nestc.kernels.api import Family
from nestc.kernels.families import alternatives
from nestc.measure import context, pinned, usable_cores
from nestc.measure.peak import Meter, meter_of, peaks
from nestc.targets.api import Target
from nestc.targets.cpu.target import CpuTarget
from netbuilder import NetBuilder, Value, save

_RUNS_A_READING = 5
_PRECISIONS = ("fp32", "int8")


@dataclass(frozen=True)
class Layer:
    """One layer: `family` groups layers on the command line, `shape` is (channels, height, width) or (rows, inputs)."""

    family: str
    shape: tuple[int, ...]
    channels: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    note: str = ""
    precision: str = "fp32"

    @property
    def label(self) -> str:
        """Name of the row."""
        kind = "" if self.precision == "fp32" else f"{self.precision} "
        return f"{kind}{self.family} {self.note}".strip()

    @property
    def text(self) -> str:
        """Sizes in one word."""
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return "x".join(map(str, self.shape)) + f" -> {self.channels}{stride}"

    def flops(self) -> int:
        """Operations of the direct algorithm, two for each multiply-add."""
        if len(self.shape) == 2:
            return 2 * self.shape[0] * self.shape[1] * self.channels
        inputs, height, width = self.shape
        outputs = self.channels * (height // self.stride) * (width // self.stride)
        return 2 * outputs * (inputs // self.groups) * self.kernel**2


LAYERS = (
    *(
        Layer("conv1x1", (inputs, size, size), outputs, note=f"resnet50 {size}x{size}")
        for inputs, outputs, size in (
            (64, 64, 56), (64, 256, 56), (256, 64, 56), (256, 128, 56), (128, 512, 28), (512, 128, 28),
            (512, 256, 28), (256, 1024, 14), (1024, 256, 14), (1024, 512, 14), (512, 2048, 7), (2048, 512, 7),
        )
    ),
    *(
        Layer("conv3x3", (width, size, size), width, 3, note=f"resnet50 {size}x{size}")
        for width, size in ((64, 56), (128, 28), (256, 14), (512, 7))
    ),
    *(
        Layer("conv3x3", (inputs, size, size), outputs, 3, note=f"{model} {size}x{size}")
        for inputs, outputs, size, model in (
            (64, 64, 224, "vgg16"), (128, 128, 112, "vgg16"), (256, 256, 56, "vgg16"), (512, 512, 28, "vgg16"),
            (512, 512, 14, "vgg16"), (64, 192, 56, "googlenet"), (160, 320, 14, "googlenet"),
            (16, 64, 55, "squeezenet"), (64, 256, 13, "squeezenet"), (64, 64, 80, "nudenet"), (128, 128, 10, "nudenet"),
        )
    ),
    *(
        Layer("conv3x3s2", (width, size, size), width, 3, 2, note=f"resnet50 {size}x{size}")
        for width, size in ((128, 56), (256, 28), (512, 14))
    ),
    Layer("conv7x7", (3, 224, 224), 64, 7, 2, note="resnet50 stem"),
    *(
        Layer("depthwise", (width, size, size), width, 3, 1, width, note=f"mobilenetv2 {size}x{size}")
        for width, size in ((144, 56), (192, 28), (384, 14), (960, 7))
    ),
    *(
        Layer("matmul", (rows, inputs), outputs, note=f"{model}")
        for rows, inputs, outputs, model in (
            (128, 768, 768, "bert"), (128, 768, 3072, "bert"), (128, 3072, 768, "bert"), (128, 384, 1536, "minilm"),
            (197, 384, 1536, "vit"),
        )
    ),
    Layer("gemv", (1, 2048), 1000, note="resnet50 classifier"),
)  # fmt: skip


def build(layer: Layer, path: Path) -> None:
    """Write the layer (between two pools, if it is a convolution) as an ONNX model."""
    net = NetBuilder("layer")
    x = net.input("x", layer.shape if len(layer.shape) == 2 else (1, *layer.shape))

    def pool(value: Value) -> Value:
        return net.pool(value, "max", 3, 1, 1)

    if layer.precision == "int8":
        y = quantized_layer(net, layer, x, pool)
    elif len(layer.shape) == 2:
        y = net.op("MatMul", [x, net.normal((layer.shape[1], layer.channels), 0.05)], (layer.shape[0], layer.channels))
        net.nodes[-1].name = "measured"
    else:
        # Networks never have their first convolution behind a pool; its input is as the caller gave it.
        y = x if layer.shape[0] == 3 else pool(x)
        y = net.conv(y, layer.channels, layer.kernel, layer.stride, groups=layer.groups)
        net.nodes[-1].name = "measured"
        y = pool(y)
    net.output(y, "y")
    save(net.model(), path)


def quantized_layer(net: NetBuilder, layer: Layer, x: Value, pool: Callable[[Value], Value]) -> Value:
    """The layer on uint8 maps and int8 weights, as QuantizeLinear and DequantizeLinear around it say."""
    scale, zero = net.scalar(4 / 128), net.constant(np.array(128, np.uint8))

    def rounded(value: Value) -> Value:
        q = net.op("QuantizeLinear", [value, scale, zero], value.shape)
        return net.op("DequantizeLinear", [q, scale, zero], value.shape)

    def weights(shape: tuple[int, ...], fan_in: int, axis: int) -> Value:
        real = net.random.standard_normal(shape, dtype=np.float32) / math.sqrt(fan_in)
        others = tuple(d for d in range(len(shape)) if d != axis)
        scales = np.abs(real).max(others, keepdims=True) / 127
        codes = net.constant(np.rint(real / scales).astype(np.int8))
        zeros = net.constant(np.zeros(shape[axis], np.int8))
        return net.op("DequantizeLinear", [codes, net.constant(scales.reshape(-1)), zeros], shape, axis=axis)

    if len(layer.shape) == 2:
        rows, inputs = layer.shape
        w = weights((inputs, layer.channels), inputs, 1)
        y = net.op("MatMul", [rounded(x), w], (rows, layer.channels))
        net.nodes[-1].name = "measured"
        return rounded(y)
    inputs, height, width = layer.shape
    shape = (layer.channels, inputs // layer.groups, layer.kernel, layer.kernel)
    w = weights(shape, shape[1] * layer.kernel**2, 0)
    x = rounded(x) if inputs == 3 else rounded(pool(rounded(x)))
    out = (1, layer.channels, -(-height // layer.stride), -(-width // layer.stride))
    pads = [layer.kernel // 2] * 4
    y = net.op("Conv", [x, w], out, strides=[layer.stride] * 2, pads=pads, group=layer.groups)
    net.nodes[-1].name = "measured"
    return rounded(pool(rounded(y)))


class WayTarget(CpuTarget):
    """The CPU, computing every region in the way called `wanted` (see `nestc.kernels.families.alternatives`) if there
    is one, else as ever."""

    def __init__(self, wanted: str, threads: int) -> None:
        super().__init__(threads=threads)
        self.wanted = wanted

    def way(self, region: Region) -> Family | None:
        """The family that computes a region."""
        found = (family for family in alternatives(region, self.cpu) if family.name == self.wanted)
        return next(found, None) or super().way(region)


def has_way(layer: Layer, way: str) -> bool:
    """Whether a layer may be computed in a way; of products and other kernels only the default is shown."""
    return way == "default" or (layer.precision == "fp32" and layer.family == "conv3x3")


def measure(layer: Layer, threads: int, runs: int, meter: Meter | None, target: str | Target = "cpu") -> dict[str, Any]:
    """One row of the table. Raises nestc.Error where the layer does not compile to native code."""
    import nestc

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        build(layer, path)
        executable = nestc.compile(path, targets=[target], threads=threads)
    if executable.fallback_ops:
        raise Error(f"{layer.label} {layer.text} is interpreted: {dict(executable.fallback_ops)}")
    readings: list[float] = []
    shares: list[float] = []
    steps: list[dict[str, Any]] = []
    for _ in range(max(1, runs // _RUNS_A_READING)):
        peak = math.nan if meter is None else meter.once()
        steps = [step for step in executable.profile(runs=_RUNS_A_READING) if is_measured(step)]
        if not steps:
            raise Error(f"{layer.label} {layer.text} has no kernel that names its node")
        readings.append(sum(step["us"] if threads == 1 else step["team_us"] for step in steps) / 1e6)
        after = math.nan if meter is None else meter.once()
        shares.append(100 * layer.flops() / readings[-1] / 1e9 / ((peak + after) / 2))
    took = statistics.median(readings)
    return {
        "name": layer.label,
        "precision": layer.precision,
        "shape": layer.text,
        "ms": took * 1e3,
        "gflops": layer.flops() / took / 1e9,
        "percent_of_peak": None if meter is None else statistics.median(shares),
        "kernels": [step["symbol"] for step in steps],
    }


def is_measured(step: dict[str, Any]) -> bool:
    """True for kernel calls that compute the layer itself (a step's origin lists ``op_type:node``)."""
    return any(entry.split(":", 1)[-1] == "measured" for entry in step.get("origin", ()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the peak and the layers asked for."""
    parser = argparse.ArgumentParser(
        description="Single kernels as a share of the measured peak.",
        epilog="example: python benchmarks/kernels.py --models conv1x1,conv3x3",
    )
    families = tuple(dict.fromkeys(layer.family for layer in LAYERS))
    parser.add_argument("--models", help=f"comma-separated families of {', '.join(families)}; default: all")
    parser.add_argument("--precision", default=",".join(_PRECISIONS), help="number formats (default fp32,int8)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--runs", type=int, default=30, help="runs, of which the median counts (default 30)")
    parser.add_argument("--target", default="cpu", help="target with options, e.g. cpu:option=value (default cpu)")
    parser.add_argument(
        "--ways",
        default="default",
        help="ways to compute 3x3 layers, e.g. conv,winograd4 (default: default)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    wanted = [name.strip() for name in options.models.split(",")] if options.models else list(families)
    unknown = [name for name in wanted if name not in families]
    if unknown:
        print(f"error: no kernel family {unknown[0]!r}; there are {', '.join(families)}", file=sys.stderr)
        return 2
    precisions = [name.strip() for name in options.precision.split(",")]
    unknown = [name for name in precisions if name not in _PRECISIONS]
    if unknown:
        print(f"error: no precision {unknown[0]!r}; there are {', '.join(_PRECISIONS)}", file=sys.stderr)
        return 2
    if not 1 <= options.threads <= len(usable_cores()):
        print(f"error: --threads must be between 1 and {len(usable_cores())} here", file=sys.stderr)
        return 2
    with pinned(options.threads):
        peak = peaks(options.threads)
        rows: list[dict[str, Any]] = []
        for precision in precisions:
            meter = meter_of(precision, options.threads)
            for layer in LAYERS:
                if layer.family not in wanted:
                    continue
                layer = replace(layer, precision=precision)
                for way in (way.strip() for way in options.ways.split(",")):
                    if not has_way(layer, way):
                        continue
                    target = options.target if way == "default" else WayTarget(way, options.threads)
                    try:
                        row = measure(layer, options.threads, options.runs, meter, target)
                    except Error as error:
                        print(f"error: {error}", file=sys.stderr)
                        continue
                    rows.append({**row, "way": way})
    result = {
        "peak_gflops": peak,
        "kernels": rows,
        "threads": options.threads,
        "context": context(data="normal inputs", seed=0),
    }
    if options.json:
        print(json.dumps(result))
        return 0
    print("peak: " + ", ".join(f"{kind} {'-' if v is None else f'{v:.1f}'}" for kind, v in peak.items()) + " GFLOP/s")
    print(f"{'kernel':28}{'shape':26}{'way':12}{'ms':>9}{'GFLOP/s':>10}{'% of peak':>11}")
    for row in rows:
        share = "-" if row["percent_of_peak"] is None else f"{row['percent_of_peak']:.1f}"
        figures = f"{row['ms']:>9.4f}{row['gflops']:>10.1f}{share:>11}"
        print(f"{row['name']:28}{row['shape']:26}{row['way']:12}{figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
