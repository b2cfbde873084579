"""``nestc partition``: place a model on devices by what its regions cost there, and say how good that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestc.commands import common, quantize
from nestc.commands.compile import Objective, planned_source
from nestc.errors import Error

if TYPE_CHECKING:
    from nestc.partition.plan import Plan


def partition(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.")],
    target: common.Targets = None,
    objective: Annotated[Objective, typer.Option(help="What the placement minimises.")] = Objective.latency,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PLAN.yaml", help="Where the plan is written.")
    ] = None,
    shape: common.Shapes = None,
    dim: common.Dims = None,
    threads: common.Threads = None,
    calibrate: quantize.Calibrate = None,
    scheme: quantize.Scheme = None,
    accuracy_budget: quantize.Budget = None,
    overrides: quantize.Overrides = None,
    tools: quantize.Tools = None,
    labels: common.Labels = None,
    split: common.Split = None,
    preprocess: common.Preprocess = None,
    limit: common.Limit = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Place a model on several devices by cost. What the profile store does not know yet is measured, or simulated.

    Example: `nestc partition m.onnx --target cpu --target vta -o plan.yaml`, then `nestc compile m.onnx --target cpu
    --target vta --plan plan.yaml`
    """
    common.require_file(model)
    if common.is_bundle(model):
        raise Error(f"{model} is a bundle, which is placed already: nestc explain {model} shows how")
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        reason = "is a folder" if output.is_dir() else "is in a folder that does not exist"
        raise Error(f"cannot write {output}: it {reason}")
    from nestc.driver import partition as partition_model

    source, shapes, dims, _ = planned_source(
        model, target, shape, dim, calibrate, scheme, accuracy_budget, overrides, tools, labels, split, preprocess,
        limit, threads,
    )  # fmt: skip
    with common.progress() as step:
        placement = partition_model(
            source,
            target or ["cpu"],
            shapes=shapes,
            dims=dims,
            objective=objective.value,
            threads=threads,
            progress=step,
        )
    plan = placement.placed.plan
    if output is not None:
        plan.save(output)
    if json:
        common.print_json(summary(plan))
        return
    show(plan)
    if output is not None:
        print(f"  written to {output}; nestc compile {model} --plan {output} follows it")


def summary(plan: Plan) -> dict[str, Any]:
    """The JSON object of ``nestc partition --json``."""
    return {
        "objective": plan.objective,
        "predicted_ms": plan.predicted_ms,
        "predicted_mj": plan.predicted_mj,
        "lower_bound_ms": plan.lower_bound_ms,
        "promised_ms": plan.promised_ms,
        "optimal": plan.optimal,
        "method": plan.method,
        "single_device_ms": dict(plan.single_device_ms),
        "assignment": {region.name: region.device for region in plan.regions},
        "transfers": [
            {
                "tensor": each.tensor,
                "from": each.source,
                "to": each.destination,
                "bytes": each.bytes,
                "us": each.us,
                "conversion_us": each.conversion_us,
                "kind": each.kind,
            }
            for each in plan.transfers
        ],
    }


def show(plan: Plan) -> None:
    """Print the plan for people: predictions, then the partitions in order."""
    print(f"{plan.model}: {len(plan.regions)} regions in {len(plan.partitions)} partitions, for {plan.objective}")
    for line in plan.predictions():
        print(f"  {line}")
    by_name = {region.name: region for region in plan.regions}
    for each in plan.partitions:
        ops = ", ".join(f"{op} {count}" for op, count in plan.ops(each).items())
        kinds = {by_name[name].kind for name in each.regions}
        when = "" if each.begin_ms is None or each.end_ms is None else f" {each.begin_ms:8.3f} .. {each.end_ms:8.3f} ms"
        print(f"  {each.name:12}{when} {'/'.join(sorted(kinds))}: {len(each.regions)} regions ({ops})")
    taking = {each.device for each in plan.partitions}
    for device in plan.devices:
        if device not in taking and device != "host":
            print(f"  {device} takes nothing: nestc explain says why")
    if plan.transfers:
        moved = sum(each.bytes for each in plan.transfers)
        took = sum(each.us for each in plan.transfers)
        kinds = "/".join(sorted({each.kind for each in plan.transfers if each.us}))
        words = f"{len(plan.transfers)} transfers, {moved / 1e3:.1f} kB, {took:.1f} us on links {kinds}".rstrip()
        conversions = sum(each.conversion_us for each in plan.transfers)
        print(f"  {words}" + (f", {conversions:.1f} us of conversions in partitions" if conversions else ""))
