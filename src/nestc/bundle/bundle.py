"""A compiled model in memory: what `bundle.write` stores, `bundle.read` gives back, and the runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nestc.bundle.artifact import Artifact
from nestc.bundle.schema import DeviceSpec, TensorSpec

__all__ = ["Bundle", "BundlePartition", "DeviceSpec", "TensorSpec"]


@dataclass(frozen=True)
class BundlePartition:
    """One compiled partition. ``inputs`` are names of graph inputs or of outputs of earlier partitions.

    ``fallback`` is the same partition compiled for the CPU, which runs where the device fails and that is asked for.
    """

    name: str
    device: str
    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    artifact: Artifact
    regions: tuple[str, ...] = ()
    fallback: Artifact | None = None


@dataclass(frozen=True)
class Bundle:
    """A whole model: partitions in execution order, the partitioned L1 graph as ONNX bytes, and the preferred threads.

    ``info`` (JSON values) is carried along: the plan, predictions, fallback operators, whatever a report needs.
    ``devices``: how devices are reached. One that is not listed works in the host's memory and has a resource of its
    own, or "cpu" where its artifacts are of the kinds that `nestc` itself runs on the CPU.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    partitions: tuple[BundlePartition, ...]
    graph: bytes = b""
    threads: int = 1
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])
    devices: tuple[DeviceSpec, ...] = ()
