"""What targets for vendors' runtimes share: a partition as an ONNX model that they read, and rules about regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx.defs

from nestc.bundle.artifact import Artifact, Device
from nestc.errors import TargetError
from nestc.graph.region import Op, Region, TensorType
from nestc.runtime.vendors.common import MODEL
from nestc.targets.api import Partition, constraint

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST_MODEL = 2**31 - 1
"""Bytes of one protocol buffer; what is larger would have to be several files, which no runtime reads from memory."""

IR_VERSION = 10
"""The ONNX file format of all runtimes since 2024; later ones only add element types that no offer here takes."""


OPSET = 24
"""The version of ONNX's operators that models have after import, unless they need a newer one."""

NEWEST = 2**31 - 1
"""Any version up to the newest."""

_BODIES = frozenset(("If", "Loop", "Scan", "SequenceMap"))


@constraint
def no_bodies(region: Region) -> bool:
    """what the graphs inside a control flow operator need is not known before it is loaded"""
    return not any(op.op_type in _BODIES for op in region.ops)


@constraint
def known_forms(region: Region) -> bool:
    """an operator has an attribute that is newer than ONNX's operator set 24, or is not ONNX's"""
    return all(_known(op) for op in region.ops)


def _known(op: Op) -> bool:
    try:
        schema = onnx.defs.get_schema(op.op_type, NEWEST if op.domain else OPSET, op.domain)
    except onnx.defs.SchemaError:
        return False
    return set(op.attributes) <= set(schema.attributes)


def artifact(kind: str, partition: Partition, options: Mapping[str, str], device: Device, threads: int) -> Artifact:
    """The partition's ONNX model with its border and the device's options, loaded once to see that it can be.

    Raises TargetError if the model is over 2 GB or the runtime refuses it.
    """
    content = _serialized(partition.model())
    if content is None:
        raise TargetError(
            f"partition {partition.name} is over 2 GB, more than {kind} can be handed; give it fewer regions"
        )
    metadata = {
        "partition": partition.name,
        "inputs": [_port(name, partition.types[name]) for name in partition.inputs],
        "outputs": [_port(name, partition.types[name]) for name in partition.outputs],
        "options": dict(options),
    }
    made = Artifact(kind, {MODEL: content}, {}, metadata)
    device.load(made, threads).close()
    return made


def _serialized(model: ir.Model) -> bytes | None:
    """A model with its weights inside, the same bytes for the same model; None if it is larger than `LARGEST_MODEL`."""
    import onnx_ir as ir

    weights = (value.const_value for value in model.graph.initializers.values())
    if sum(0 if weight is None else weight.nbytes for weight in weights) > LARGEST_MODEL:
        return None
    ir.external_data.load_to_model(model)
    model.ir_version = IR_VERSION
    used = {node.domain for node in model.graph.all_nodes()} | {""}
    for domain in set(model.graph.opset_imports) - used:
        del model.graph.opset_imports[domain]
    proto = ir.serde.serialize_model(model)
    return None if proto.ByteSize() > LARGEST_MODEL else proto.SerializeToString(deterministic=True)


def _port(name: str, type_: TensorType) -> list[object]:
    """A value at the border as `runtime.vendors.common` reads it."""
    return [name, type_.dtype, None if any(size < 0 for size in type_.shape) else list(type_.shape)]
