"""Simulated cycles of networks on VTA, layer by layer, beside the cycles published for its hardware and the ideal ones.

    python benchmarks/vta.py --models resnet18,resnet34
    python benchmarks/vta.py --models resnet18 --config 1x32x32 --granularity tensor --layers 'Conv*'

Networks have random weights, which cycles do not depend on (but for scales, which decide how sums are shifted), and
are quantized in scheme int8-pow2. The first convolution and the classifier run on the CPU, as where hardware was
measured. Everything in cycles, joules and bytes is simulated; seconds to compile and to simulate are measured.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nestc
import quantized_zoo
import vta_bus
import vta_tvm
import zoo
from nestc.errors import Error
from nestc.measure import context
from nestc.runtime.vta.config import PRESETS
from nestc.targets import resolve
from vta_network import LayerRow, NetworkResult, run_network

MODELS = "resnet18,resnet34,resnet50_v2,mobilenetv2,efficientnet_lite0,resnet50"

PUBLISHED: Mapping[str, int] = {
    "resnet18": 7_729_601,
    "resnet34": 15_736_441,
    "resnet18_v2": 7_608_808,
    "resnet34_v2": 15_534_528,
    "resnet50_v2": 22_012_906,
    "resnet101_v2": 39_182_158,
}
"""Cycles of the RTL at 1x16x16 with pipelined GEMM (apache/tvm-vta pull request 30); of single layers none are."""

PUBLISHED_FOR = "pynq_1x16x16"

ENGINES = {"channel": "nestc-pow2", "tensor": "nestc-pow2-tensor"}
"""Names in quantized_zoo.py by what shares a scale of weights; TVM's flow for VTA has one for each tensor."""

HEADER = (
    f"{'layer':24}{'':34}{'cycles':>12}{'published':>12}{'ideal':>12}{'ideal/cycles':>14}  bits\n"
    f"{'':58}{'simulated':>12}{'':>12}"
)

Tell = Callable[[str], None]


def benchmark(name: str, options: argparse.Namespace, tell: Tell) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a model's layers, and its totals."""
    file = quantized_zoo.path(name, ENGINES[options.granularity])
    target = f"vta:config={options.config}" + (f",count={options.count}" if options.count > 1 else "")
    result = run_network(nestc.load(file), zoo.inputs(name), target, options.threads, not options.no_check)
    published = PUBLISHED.get(name) if options.config == PUBLISHED_FOR and options.count == 1 else None
    tell(f"\n{name}, {target}, scales of weights a {options.granularity}")
    for row in result.layers:
        if options.layers is None or any(fnmatch.fnmatchcase(row.name, each) for each in options.layers.split(",")):
            tell(_line(row, options.count))
    for line in _summary(result, published, options.count):
        tell(line)
    rows = [
        {
            "model": name,
            "layer": row.name,
            "what": row.what,
            "cycles": row.cycles,
            "ideal_cycles": row.ideal,
            "published_cycles": None,
            "bit_exact": row.exact,
        }
        for row in result.layers
    ]
    totals = {"cycles": result.cycles, "ideal_cycles": result.ideal, "published_cycles": published}
    checked = [row.exact for row in result.layers if row.exact is not None]
    totals["comparable_cycles"] = result.comparable
    return rows, {**totals, "bit_exact": all(checked) if checked else None, **result.facts, "on_cpu": result.on_cpu}


def _line(row: LayerRow, count: int) -> str:
    bits = {True: "exact", False: "DIFFER", None: "-"}[row.exact]
    part = f"{row.ideal / (row.cycles * count):.1%}" if row.ideal and row.cycles else "-"
    return f"{row.name[:23]:24}{row.what[:33]:34}{row.cycles:12,}{'-':>12}{_count(row.ideal)}{part:>14}  {bits}"


def _count(number: int | None) -> str:
    return f"{number:12,}" if number else f"{'-':>12}"


def _summary(result: NetworkResult, published: int | None, count: int) -> list[str]:
    facts = result.facts
    part = result.ideal / max(result.cycles * count, 1)
    judged = [row.exact for row in result.layers if row.exact is not None]
    bits = f"  {sum(judged)} of {len(judged)} exact" if judged else ""
    whole = f"{result.cycles:12,}{_count(published)}{_count(result.ideal)}{part:14.1%}{bits}"
    busy = ", ".join(f"{name} {part:.0%}" for name, part in facts["utilization"].items())
    moved = f"{facts['dram_bytes_read'] / 1e6:.1f} MB read, {facts['dram_bytes_written'] / 1e6:.1f} MB written"
    lines = [
        f"{'total':58}{whole}",
        f"  simulated: {facts['seconds'] * 1e3:.2f} ms, {facts['energy_joules'] * 1e3:.2f} mJ, {moved}; busy: {busy}, "
        f"GEMM {facts['gemm_utilization']:.0%}",
        f"  measured: compiled in {facts['compile_seconds']:.1f} s, simulated in {facts['simulation_seconds']:.1f} s",
    ]
    if result.comparable != result.cycles:
        lines.append(f"{'  without first and last pooling':58}{result.comparable:12,}")
    if published:
        lines.append(f"  over published cycles, which are without these poolings: {result.comparable / published:.3f}")
    return lines + [f"  not on vta: {each}" for each in result.on_cpu]


def bus_table(tell: Tell) -> list[dict[str, Any]]:
    """Layer C2 of ResNet-18 with wider and wider buses."""
    tell(
        "\nResNet-18's layer C2 (3x3, 64>64, 56x56) by bits of the bus, in million cycles, simulated but for those\n"
        "published (tvm-vta pull request 32). Same schedule: five runs of theirs, as far as the figures tell; ours: one"
    )
    tell(f"{'bits':>6}{'published':>12}{'same schedule':>16}{'ratio':>8}{'ours':>10}")
    rows: list[dict[str, Any]] = []
    for row in vta_bus.bus_widths():
        ratio = row.same / row.published
        tell(f"{row.bits:6}{row.published / 1e6:12.1f}{row.same / 1e6:16.1f}{ratio:8.3f}{row.ours / 1e6:10.3f}")
        rows.append(
            {"bits": row.bits, "published_cycles": row.published, "cycles": row.same, "our_schedule_cycles": row.ours}
        )
    return rows


def tvm_table(tell: Tell) -> list[dict[str, Any]]:
    """Whole networks in the schedules that TVM has for VTA: a check of the timing model, not of our compiler."""
    tell("\nconvolutions in TVM's schedules (vta_tvm.py) on pynq_1x16x16: cycles simulated, published, and their ratio")
    rows: list[dict[str, Any]] = []
    for row in vta_tvm.networks():
        tell(f"{row.network:24}{row.simulated:12,}{row.published:12,}{row.simulated / row.published:8.3f}")
        rows.append({"model": row.network, "cycles": row.simulated, "published_cycles": row.published})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the networks asked for."""
    parser = argparse.ArgumentParser(
        description="Simulated cycles of networks on VTA, beside published and ideal ones.",
        epilog="example: python benchmarks/vta.py --models resnet18 --config 1x32x32 --json",
    )
    parser.add_argument("--models", default=MODELS, help=f"comma-separated names of zoo.py; default: {MODELS}")
    parser.add_argument(
        "--config", default=PUBLISHED_FOR, help=f"a preset ({', '.join(PRESETS)}) or a JSON file in VTA's own keys"
    )
    parser.add_argument("--count", type=int, default=1, help="devices that share each layer (default 1)")
    parser.add_argument(
        "--granularity", choices=list(ENGINES), default="channel", help="what has a scale of its own in weights"
    )
    parser.add_argument("--layers", help="comma-separated names or patterns of layers to print; default: all")
    parser.add_argument("--no-check", action="store_true", help="do not compare layers with exact arithmetic")
    parser.add_argument("--bus-widths", action="store_true", help="also the cycles of one layer by width of the bus")
    parser.add_argument(
        "--tvm", action="store_true", help="also networks in TVM's schedules, to check the timing model"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of what runs on the CPU (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)

    def tell(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    rows: list[dict[str, Any]] = []
    totals: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    answer: dict[str, Any] = {"rows": rows, "totals": totals}
    try:
        resolve([f"vta:config={options.config},count={options.count}"])
        models = [model.name for model in zoo.select(options.models)]
        tell(HEADER)
        for name in models:
            try:
                zoo.path(name)
            except Error as error:
                if zoo.get(name).file is None:
                    raise
                skipped[name] = str(error)
                tell(f"\n{name}: left out, since its file is not to be had: {error}")
                continue
            more, totals[name] = benchmark(name, options, tell)
            rows += more
        if options.bus_widths:
            answer["bus_widths"] = bus_table(tell)
        if options.tvm:
            answer["tvm_schedules"] = tvm_table(tell)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        about = context("random inputs and weights, but for trained models; cycles, bytes and energy simulated", 0)
        extra = {"kind": "simulated", "config": options.config, "granularity": options.granularity, "skipped": skipped}
        print(json.dumps({**answer, "context": {**about, **extra}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
