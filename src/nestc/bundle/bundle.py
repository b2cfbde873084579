"""A compiled model in memory: what `bundle.write` stores, `bundle.read` gives back, and the runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nestc.bundle.artifact import Artifact
from nestc.bundle.schema import TensorSpec

__all__ = ["Bundle", "BundlePartition", "TensorSpec"]


@dataclass(frozen=True)
class BundlePartition:
    """One compiled partition. ``inputs`` are names of graph inputs or of outputs of earlier partitions."""

    name: str
    device: str
    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    artifact: Artifact
    regions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """A whole model: partitions in execution order, the partitioned L1 graph as ONNX bytes, and the preferred threads.

    ``info`` (JSON values) is carried along: the plan, predictions, fallback operators, whatever a report needs.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    partitions: tuple[BundlePartition, ...]
    graph: bytes = b""
    threads: int = 1
    info: Mapping[str, Any] = field(default_factory=dict)
