"""``nestc explain``: which target takes which region of a model, and each refusal in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestc.commands import common


def explain(
    model: Annotated[Path, typer.Argument(metavar="MODEL|BUNDLE", help="An ONNX file or a bundle (.nest).")],
    target: common.Targets = None,
    shape: common.Shapes = None,
    dim: common.Dims = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Say which target takes which region, and why others refuse; nothing is compiled.

    Example: `nestc explain resnet50.onnx --dim batch=1`
    """
    common.require_file(model)
    if common.is_bundle(model):
        plan = common.open_or_compile(model, target or [], shape or [], dim or [], None).plan
        notes: list[str] = []
    else:
        from nestc.driver import explain as explain_model

        shapes, dims = common.bindings(shape or [], dim or [])
        plan, notes = explain_model(model, targets=target or ["cpu"], shapes=shapes, dims=dims)
    if json:
        common.print_json({**plan.to_json(), "fallback_ops": plan.fallback_ops, "passes": notes})
        return
    for note in notes:
        print(note)
    if notes:
        print()
    print(plan.explain())
