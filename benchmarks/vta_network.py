"""One quantized network on simulated VTA: what each layer takes, what it would take at least, and whether it is exact.

The first convolution and the classifier run on the CPU, as where the cycles of VTA hardware were published.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import numpy as np
import onnx_ir as ir

import nestc
from exact_integers import ExactGraph
from nestc.driver import Compilation, build, with_fallbacks
from nestc.graph.region import Op, Region
from nestc.partition.plan import Plan
from nestc.quant.observe import with_outputs
from nestc.runtime.executable import Executable
from nestc.targets import resolve
from nestc.targets.api import Target

DEVICE = "vta"


@dataclass(frozen=True)
class LayerRow:
    """Simulated cycles of a layer. ``ideal``: cycles if every one multiplied a block by a block, padding included."""

    name: str
    what: str
    cycles: int
    ideal: int
    exact: bool | None
    pooling: bool = False


@dataclass(frozen=True)
class NetworkResult:
    """A network's layers on VTA, and figures of the whole; all but the seconds of this machine are simulated.

    ``comparable``: cycles without poolings in front of all convolutions and behind them. Those ran on the CPU where
    cycles of hardware were published: TVM's flow for VTA (``deploy_classification.py``) offloads from behind
    ``nn.max_pool2d`` to before ``nn.global_avg_pool2d``.
    """

    layers: Sequence[LayerRow]
    cycles: int
    comparable: int
    ideal: int
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    on_cpu: Sequence[str] = ()


def run_network(
    model: nestc.Model, inputs: Mapping[str, np.ndarray], target: str, threads: int | None, check: bool
) -> NetworkResult:
    """Compile a quantized model for VTA and the CPU, run it, and compare each layer with exact arithmetic."""
    begun = time.perf_counter()
    targets = with_fallbacks(resolve([target], {"threads": threads}), threads)
    done, plan = _compiled(model, targets, threads)
    compiled = time.perf_counter() - begun
    assert done.bundle is not None
    executable = Executable(done.bundle, threads=threads)
    begun = time.perf_counter()
    outputs = executable.run(inputs)
    ran = time.perf_counter() - begun

    exact = _exactness(model, done, inputs, outputs, targets, threads) if check else {}
    regions = {region.name: region for partition in done.partitions for region in partition.regions}
    timings = [done.artifacts[p.name].metadata["timing"] for p in done.partitions if p.device == DEVICE]
    machine = targets[0].machine.facts
    rows = [_row(entry, regions, machine, exact) for timing in timings for entry in timing["layers"]]
    facts = _facts(timings, int(machine["count"]))
    facts |= {"compile_seconds": round(compiled, 2), "simulation_seconds": round(ran, 2)}
    cycles = sum(timing["cycles"] for timing in timings)
    places = [index for index, row in enumerate(rows) if not row.pooling]
    outside = [row for index, row in enumerate(rows) if places and not places[0] <= index <= places[-1]]
    comparable = cycles - sum(row.cycles for row in outside)
    return NetworkResult(rows, cycles, comparable, sum(row.ideal for row in rows), facts, on_cpu(plan))


def on_cpu(plan: Plan) -> list[str]:
    """What runs elsewhere than on VTA, and why VTA did not take it."""
    found: list[str] = []
    for region in plan.regions:
        if region.device != DEVICE:
            reason = region.refusals.get(DEVICE, "so asked for")
            found.append(f"{region.name}: {reason}")
    return found


def _compiled(model: nestc.Model, targets: Sequence[Target], threads: int | None) -> tuple[Compilation, Plan]:
    """The model with its first convolution and its classifier on the CPU, the rest on VTA as far as it takes it.

    Also the plan that was asked for, which has VTA's refusals.
    """
    ready = build(model, targets, threads=threads, stop_after="plan")
    assert ready.plan is not None
    plan = _ends_on_cpu(ready.plan, ready)
    return build(model, targets, threads=threads, plan=plan), plan


def _ends_on_cpu(plan: Plan, ready: Compilation) -> Plan:
    """The plan with everything up to the first convolution, and from the last product on, moved to the CPU."""
    regions = {region.name: region for partition in ready.partitions for region in partition.regions}
    ordered = [regions[each.name] for each in plan.regions]
    convolutions = [i for i, region in enumerate(ordered) if any(_is_dense(op, region) for op in region.ops)]
    products = [i for i, region in enumerate(ordered) if region.anchor in ("Gemm", "MatMul")]
    first = convolutions[0] if convolutions else -1
    last = products[-1] if products else len(ordered)
    moved = tuple(
        dataclasses.replace(each, device="cpu", refusals={}) if each.device == DEVICE and not first < i < last else each
        for i, each in enumerate(plan.regions)
    )
    return dataclasses.replace(plan, regions=moved)


def _is_dense(op: Op, region: Region) -> bool:
    """Whether the operator is a convolution that does more than scale and shift each channel."""
    return op.op_type == "Conv" and not _only_scales(op, region)


def _only_scales(op: Op, region: Region) -> bool:
    weight = region.types[op.inputs[1]].shape
    return prod(weight[1:]) == 1 and op.attributes.get("group", 1) == weight[0]


def _exactness(
    model: nestc.Model,
    done: Compilation,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    targets: Sequence[Target],
    threads: int | None,
) -> dict[str, bool]:
    """For each region whether what it makes equals exact arithmetic, from what the CPU has rounded.

    A second compilation gives out every rounded value; its results have to equal those of the first, too.
    """
    produced = {
        name: region.name for partition in done.partitions for region in partition.regions for name in region.outputs
    }
    names = {value.name for node in model.ir.graph for value in node.outputs}
    probes = [name for name in produced if name in names and name not in outputs]
    probed, _ = _compiled(with_outputs(model, probes), targets, threads)
    assert probed.bundle is not None
    found = Executable(probed.bundle, threads=threads).run(inputs)
    same = all(np.array_equal(array, found[name]) for name, array in outputs.items())
    # The CPU rounds halves to even: what it has rounded is taken as it is.
    rounding = {
        region.name
        for partition in done.partitions
        for region in partition.regions
        if partition.device != DEVICE and any(op.op_type == "QuantizeLinear" for op in region.ops)
    }
    integers = [name for name in probes if found[name].dtype.kind in "iu"]
    given = {name: found[name] for name in integers if produced[name] in rounding}
    wanted = [name for name in integers if name not in given]
    reference = ExactGraph(ir.to_proto(model.ir)).run(wanted, given | dict(inputs))
    exact: dict[str, bool] = {}
    for name in wanted:
        equal = same and np.array_equal(reference[name], found[name])
        region = produced[name]
        exact[region] = exact.get(region, True) and equal
    # Values that only the compiler names (of a pooling moved onto integers, say) are judged by who computes on them.
    for partition in reversed(done.partitions):
        for region in reversed(partition.regions):
            if region.name in exact:
                continue
            readers = [
                exact[each.name]
                for other in done.partitions
                for each in other.regions
                if each.name in exact and set(each.inputs) & set(region.outputs)
            ]
            if readers:
                exact[region.name] = all(readers)
    return exact


def _row(
    entry: Mapping[str, Any], regions: Mapping[str, Region], machine: Mapping[str, Any], exact: Mapping[str, bool]
) -> LayerRow:
    region = regions[entry["name"]]
    batch, block = int(machine["batch"]), int(machine["block"])
    products = [op for op in region.ops if op.op_type in ("Conv", "Gemm", "MatMul")]
    ideal = sum(ideal_cycles(op, region, batch, block) for op in products)
    lead = next((op for op in region.ops if op.op_type not in ("DequantizeLinear", "QuantizeLinear")), region.ops[0])
    pooling = "Pool" in lead.op_type or lead.op_type == "ReduceMean"
    return LayerRow(lead.name, _what(lead, region), int(entry["cycles"]), ideal, exact.get(region.name), pooling)


def ideal_cycles(op: Op, region: Region, batch: int, block: int) -> int:
    """Cycles of a product if each multiplies a block of inputs by a block of weights, taps on padding included.

    Blocks of a grouped convolution that hold no weight count nothing. Scales and shifts a channel, which are batch
    normalizations, count nothing either: what is published of ideal cycles has only the network's convolutions.
    """
    weight, out = region.types[op.inputs[1]].shape, region.types[op.outputs[0]].shape
    if op.op_type != "Conv":
        transposed = bool(op.attributes.get("transB", 0))
        depth, width = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
        return ceil(prod(out[:-1]) / batch) * ceil(depth / block) * ceil(width / block)
    if _only_scales(op, region):
        return 0
    group = op.attributes.get("group", 1)
    assert isinstance(group, int)
    pairs = {
        (channel // block, (channel // (weight[0] // group) * weight[1] + i) // block)
        for channel in range(weight[0])
        for i in range(weight[1])
    }
    return ceil(out[0] / batch) * len(pairs) * prod(weight[2:]) * prod(out[2:])


def _what(op: Op, region: Region) -> str:
    """A layer in a few words: ``Conv 3x3/2 64>128 28x28``."""
    out = region.types[op.outputs[0]].shape
    size = "x".join(map(str, out[2:]))
    if op.op_type != "Conv":
        return f"{op.op_type} {out[1] if len(out) > 1 else ''} {size}".rstrip()
    weight, source = region.types[op.inputs[1]].shape, region.types[op.inputs[0]].shape
    group = op.attributes.get("group", 1)
    strides = op.attributes.get("strides") or (1,)
    assert isinstance(strides, tuple)
    kind = "scale" if _only_scales(op, region) else "depthwise" if weight[1] == 1 and group == source[1] else "Conv"
    kernel = "x".join(map(str, weight[2:])) + (f"/{strides[0]}" if max(map(int, strides)) > 1 else "")
    return f"{kind} {kernel} {source[1]}>{out[1]} {size}"


def _facts(timings: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """Sums over the partitions; utilization is the part of all cycles."""
    cycles = max(sum(timing["cycles"] for timing in timings), 1)
    engines = sorted({name for timing in timings for name in timing["engines"]})
    busy = {name: sum(timing["engines"].get(name, {}).get("busy", 0) for timing in timings) for name in engines}
    return {
        "seconds": sum(timing["seconds"] for timing in timings),
        "energy_joules": sum(timing["energy_joules"] for timing in timings),
        "dram_bytes_read": sum(timing["bytes_read"] for timing in timings),
        "dram_bytes_written": sum(timing["bytes_written"] for timing in timings),
        "utilization": {name: round(amount / (cycles * count), 4) for name, amount in busy.items()},
        "gemm_utilization": sum(timing["gemm_utilization"] * timing["cycles"] for timing in timings) / cycles,
        "partitions": len(timings),
    }
