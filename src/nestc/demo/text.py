"""The demo's report as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report of `nestc.demo.run` as lines of text."""
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
    return [*lines, "", *table(report["rows"]), *([f"page: {report['page']}"] if report["page"] else [])]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each placement, and what the kinds of figures mean."""
    cells = [("on", "format", "accuracy", "latency", "throughput", "energy an image", "regions"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    simulated = any(row["latency_kind"] == "modelled" for row in rows)
    notes = ["Times are those of the devices: measured here, or modelled by a simulator where one takes part."]
    if simulated:
        notes.append(
            "`X + cpu`: all that X takes runs there; `for ...`: placed by cost, so that a slow device may get nothing."
        )
    notes.append("Energy of a simulated device is modelled; that of the CPU is estimated from its power.")
    return [*lines, *notes]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = row["name"] if row["objective"] is None else f"{row['name']}, for {row['objective']}"
    regions = ", ".join(f"{device} {count}" for device, count in row["regions"].items())
    energy = "not stated"
    if row["millijoules"] is not None:
        energy = f"{row['millijoules']:.3f} mJ {row['energy_kind']}"
    return (
        name,
        row["scheme"],
        f"{100 * row['accuracy']:.1f} % of {row['images']}",
        f"{row['latency_ms']:.3f} ms {row['latency_kind']}",
        f"{row['images_per_second']:.0f} /s {row['throughput_kind']}",
        energy,
        regions,
    )
