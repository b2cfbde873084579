"""``nestc explain``: which target takes which region of a model, and each refusal in words."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from nestc.commands import common, quantize
from nestc.commands.compile import Objective, PlaceBy, Placements, ways_of
from nestc.errors import Error


def explain(
    model: Annotated[Path, typer.Argument(metavar="MODEL|BUNDLE", help="An ONNX file or a bundle (.nest).")],
    target: common.Targets = None,
    objective: Annotated[Objective, typer.Option(help="What the placement minimises.")] = Objective.latency,
    placement: Placements = PlaceBy.auto,
    shape: common.Shapes = None,
    dim: common.Dims = None,
    threads: common.Threads = None,
    calibrate: quantize.Calibrate = None,
    scheme: quantize.Scheme = None,
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
    """Say which target takes which region, and why others refuse; of a quantized model also which node is and why.

    Example: `nestc explain resnet50.onnx --dim batch=1`

    With several targets it says what each region costs on each, and measures what the profile store does not know. A
    batch that the model leaves open is taken as 1. A float model is quantized first with `--quantize SCHEME
    --calibrate DATA`; nothing else is compiled.
    """
    common.require_file(model)
    words: list[str] = []
    told: dict[str, Any] = {}
    ways: dict[str, str] = {}
    layouts: dict[str, dict[str, Any]] = {}
    sliced: dict[str, list[dict[str, Any]]] = {}
    if common.is_bundle(model):
        if scheme is not None:
            raise Error(f"{model} is a bundle, which is compiled already; --quantize takes a model (.onnx)")
        opened = common.open_or_compile(model, target or [], shape or [], dim or [], None)
        plan, notes = opened.plan, list[str]()
        for part in opened.bundle.partitions:
            ways |= ways_of(part.artifact)
            layouts |= {part.name: part.artifact.metadata["layouts"]} if "layouts" in part.artifact.metadata else {}
            sliced |= {part.name: part.artifact.metadata["sliced"]} if "sliced" in part.artifact.metadata else {}
    else:
        from nestc.driver import explain as explain_model
        from nestc.graph.bind import bind, bind_batch
        from nestc.importers.onnx import load
        from nestc.quant.explain import in_words, reasons

        shapes, dims = common.bindings(shape or [], dim or [])
        source = bind(load(model), shapes, dims)
        if scheme is not None:
            source, _ = quantize.calibrated(
                source, scheme, calibrate,
                overrides=overrides, tools=tools, labels=labels, split=split, preprocess=preprocess, limit=limit,
                targets=target or ["cpu"],
            )  # fmt: skip
        found = reasons(source)
        words = in_words(found)
        told = {each.node: {"op": each.op, "scheme": each.scheme, "reason": each.reason} for each in found}
        one, sizes = bind_batch(source)
        with common.progress() as step:
            plan, notes = explain_model(
                one,
                target or ["cpu"],
                objective=objective.value,
                placement=placement.value,
                threads=threads,
                progress=step,
            )
        if sizes:
            notes = [f"for one sample a call: {sizes}; --dim NAME=SIZE (or --shape) explains another size", *notes]
    if json:
        report = {**plan.to_json(), "fallback_ops": plan.fallback_ops, "passes": notes}
        report |= {"quantized": told} if told else {}
        report |= {"ways": ways} if ways else {}
        report |= {"layouts": layouts} if layouts else {}
        common.print_json({**report, "sliced": sliced} if sliced else report)
        return
    for line in words:
        print(line)
    if words:
        print()
    for note in notes:
        print(note)
    if notes:
        print()
    print(plan.explain())
    if ways:
        print("\nkernels of the CPU: " + ", ".join(f"{way} {count}" for way, count in Counter(ways.values()).items()))
    for name, found in layouts.items():
        print(f"layouts of {name}: {_layouts_text(found)}")
    for name, runs in sliced.items():
        for run in runs:
            print(f"slices of {name}: {_slices_text(run)}")


def _slices_text(run: dict[str, Any]) -> str:
    """Which regions compute the batch slice by slice, in words."""
    images = "one image" if run["images"] == 1 else f"{run['images']} images"
    gain = f"modelled to save {run['modelled_gain_seconds'] * 1e3:.2g} ms"
    return f"{run['regions']} regions from {run['first']} to {run['last']}, {images} at a time ({gain})"


def _layouts_text(found: dict[str, Any]) -> str:
    """What choosing layouts over the whole partition has done, in words."""
    text = f"{found['conversions']} conversions, modelled {found['modelled_seconds'] * 1e3:.3g} ms on one core"
    if found["conversions"] != found["greedy_conversions"]:
        greedy = found["greedy_modelled_seconds"] * 1e3
        text += f" (chosen one by one: {found['greedy_conversions']} conversions, {greedy:.3g} ms)"
    if found.get("other_ways"):
        text += f", {found['other_ways']} regions computed in another way than alone to spare conversions"
    return text + (", proven best by this model" if found["optimal"] else "")
