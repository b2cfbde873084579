"""The host target: operators that nobody generates code for, run by ``onnx.reference`` and always reported."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import onnx.defs
from onnx.reference.ops import load_op as load_standard
from onnx.reference.ops.aionnx_preview import load_op as load_preview
from onnx.reference.ops.aionnx_preview_training import load_op as load_training
from onnx.reference.ops.aionnxml import load_op as load_ml

from nestc.errors import ModelError
from nestc.targets.api import Artifact, Device, Machine, Memory, Offer, Partition
from nestc.targets.power import cpu_watts

# From 2 GB on a protocol buffer cannot be written; the host's submodels travel as one.
LARGEST_MODEL = 2**31 - 1

FACTS = {"dynamic_shapes": True}
"""Sizes known only at run time, and sequences of tensors, are no obstacle to an interpreter."""

_LOADERS = {
    "": load_standard,
    "ai.onnx.ml": load_ml,
    "ai.onnx.preview": load_preview,
    "ai.onnx.preview.training": load_training,
}


class HostTarget:
    """Runs a partition as an ONNX model in ``onnx.reference``: any dense tensor operator, control flow included.

    It is offered everything last, so that what it runs is what no other target takes (``fallback_ops``). Option:
    ``watts``, what the processor draws meanwhile (assumed for one thread if not given).
    """

    def __init__(self, watts: float | None = None) -> None:
        self.name = "host"
        self.machine = Machine(
            name="host",
            memories=(Memory("ram", 0),),
            dtypes=tuple(_dtypes()),
            facts=FACTS,
            resource="cpu",
            watts=cpu_watts(watts, 1, self.name),
        )
        self.offers = (Offer("onnx.reference", ops=implemented()),)

    def compile(self, partition: Partition, emit: Callable[[str, str, str], None] | None = None) -> Artifact:
        """The partition as a serialized ONNX model; nothing is generated, so `emit` receives nothing.

        Raises ModelError if the model is too large (2 GB) for one protocol buffer.
        """
        import onnx_ir as ir

        proto = ir.serde.serialize_model(partition.model())
        if proto.ByteSize() > LARGEST_MODEL:
            raise ModelError(f"partition {partition.name} is over 2 GB, more than the host target can carry")
        metadata = {"inputs": list(partition.inputs), "outputs": list(partition.outputs)}
        return Artifact("host-onnx", {"model.onnx": proto.SerializeToString()}, {}, metadata)

    def open(self) -> Device:
        """The device that runs host artifacts, in this process."""
        from nestc.runtime.host import HostDevice

        return HostDevice()


@lru_cache(maxsize=1)
def implemented() -> frozenset[str]:
    """Operators that ``onnx.reference`` implements, other domains as ``domain::Op``."""
    names: set[str] = set()
    for schema in onnx.defs.get_all_schemas():
        if not schema.deprecated and _runs(schema):
            names.add(schema.name if not schema.domain else f"{schema.domain}::{schema.name}")
    return frozenset(names)


def _runs(schema: Any) -> bool:
    """Whether the reference evaluator implements an operator, directly or by its function body.

    `schema` is an ``onnx.defs.OpSchema``, whose stubs leave out both attributes read here.
    """
    if schema.has_function or schema.has_context_dependent_function:
        return True
    load = _LOADERS.get(schema.domain)
    if load is None:
        return False
    try:
        load(schema.domain, schema.name, None)
    except NotImplementedError:
        return False
    return True


def _dtypes() -> list[str]:
    """Every element type of ONNX, by the names that regions use."""
    import onnx_ir as ir

    renamed = {"float": "float32", "double": "float64"}
    names = [str(kind.name).lower() for kind in ir.DataType if kind is not ir.DataType.UNDEFINED]
    return [renamed.get(name, name) for name in names]
