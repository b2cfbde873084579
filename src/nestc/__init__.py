"""nestc compiles trained networks to native code: the public face, whose parts are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nestc.errors import BundleError, DataError, Error, ModelError, PlanError, ShapeError, TargetError, UnsupportedOp

if TYPE_CHECKING:
    from nestc.datasets import Dataset, open_data
    from nestc.driver import compile
    from nestc.evaluation import Evaluation, evaluate
    from nestc.importers.onnx import Model, load
    from nestc.partition.plan import Plan
    from nestc.quant.profile import Profile
    from nestc.quantization import calibrate, quantize
    from nestc.runtime import Executable, open
    from nestc.targets import installed as targets

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "DataError",
    "Dataset",
    "Error",
    "Evaluation",
    "Executable",
    "Model",
    "ModelError",
    "Plan",
    "PlanError",
    "Profile",
    "ShapeError",
    "TargetError",
    "UnsupportedOp",
    "__version__",
    "calibrate",
    "compile",
    "evaluate",
    "load",
    "open",
    "open_data",
    "quantize",
    "targets",
]

# Where each name lives. `open` must not import a compiler stage, so nothing here is imported until it is asked for.
_HOMES = {
    "Dataset": "nestc.datasets",
    "Evaluation": "nestc.evaluation",
    "Executable": "nestc.runtime",
    "Model": "nestc.importers.onnx",
    "Plan": "nestc.partition.plan",
    "Profile": "nestc.quant.profile",
    "calibrate": "nestc.quantization",
    "compile": "nestc.driver",
    "evaluate": "nestc.evaluation",
    "load": "nestc.importers.onnx",
    "open": "nestc.runtime",
    "quantize": "nestc.quantization",
    "open_data": "nestc.datasets",
}


def __getattr__(name: str) -> Any:
    if name == "targets":
        return importlib.import_module("nestc.targets")
    if name not in _HOMES:
        raise AttributeError(f"module 'nestc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
