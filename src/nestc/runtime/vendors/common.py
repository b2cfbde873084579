"""What devices of vendors' runtimes share: their packages, and artifacts that hold an ONNX model."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nestc.bundle.artifact import Artifact
from nestc.bundle.dtypes import numpy_dtype
from nestc.errors import BundleError, TargetError
from nestc.runtime.arrays import aligned_empty
from nestc.runtime.cpu import host_features

MODEL = "model.onnx"


def package(name: str) -> Any:
    """The package `name`, which is also the name of its extra and its target. Raises TargetError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TargetError(f"{name} is not installed: pip install 'nestc[{name}]'") from error


@dataclass(frozen=True)
class Port:
    """A value at the border of a partition; ``shape`` is None where a size of it is known only at run time."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...] | None

    def place(self, given: np.ndarray | None) -> np.ndarray:
        """The array given for this output, or a new one."""
        assert self.shape is not None
        return aligned_empty(self.shape, self.dtype) if given is None else given


@dataclass(frozen=True)
class Carried:
    """What an artifact carries: the partition's name, its border in order, its ONNX model, and the device's options."""

    partition: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    model: bytes
    options: dict[str, Any]


def carried(artifact: Artifact) -> Carried:
    """Read an artifact that holds an ONNX model. Raises BundleError if something of it is missing."""
    try:
        data = artifact.metadata
        return Carried(
            data["partition"],
            _ports(data["inputs"]),
            _ports(data["outputs"]),
            artifact.files[MODEL],
            dict(data["options"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"a partition of kind {artifact.kind} is not complete: {error!r}") from error


def byte_sums_saturate() -> bool:
    """Whether runtimes sum pairs of byte products in 16 bits here: x86 without VNNI (see docs/quantization.md)."""
    features = host_features()
    return "avx2" in features and not (features.get("avx512vnni") or features.get("avxvnni"))


def _ports(rows: Sequence[Sequence[Any]]) -> tuple[Port, ...]:
    return tuple(
        Port(str(name), numpy_dtype(dtype), None if shape is None else tuple(map(int, shape)))
        for name, dtype, shape in rows
    )


def failed(what: str, runtime: str, partition: str, error: Exception) -> TargetError:
    """The TargetError for an error of a runtime, whatever type it has, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return TargetError(f"{runtime} cannot {what} partition {partition}: {reason[:400]}")
