"""What targets for vendors' runtimes share: a partition as an ONNX model that they read, and rules about regions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import onnx.defs

from nestc.bundle.artifact import Artifact, Device
from nestc.errors import TargetError
from nestc.graph.region import Op, Region, TensorType
from nestc.runtime.vendors.common import MODEL
from nestc.targets.api import Constraint, Partition, constraint

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST_MODEL = 2**31 - 1
"""Bytes of one protocol buffer; what is larger would have to be several files, which no runtime reads from memory."""

IR_VERSION = 10
"""The ONNX file format of all runtimes since 2024; later ones only add element types that no offer here takes."""


OPSET = 24
"""The version of ONNX's operators that models have after import, unless they need a newer one."""

_NEWEST = 2**31 - 1  # of other domains than ONNX's main one, whatever is known
_RENAMED = {"float32": "float", "float64": "double", "float8_e4m3fn": "float8e4m3fn"}

_BODIES = frozenset(("If", "Loop", "Scan", "SequenceMap"))


@constraint
def no_bodies(region: Region) -> bool:
    """what the graphs inside a control flow operator need is not known before it is loaded"""
    return not any(op.op_type in _BODIES for op in region.ops)


def known_forms(opset: int) -> Constraint:
    """The rule that all of a region can be said in operator set `opset`, which its model is then marked with.

    From set 21 to 28 operators gained element types and attributes, and new ones came; no meaning changed.
    """

    def holds(region: Region) -> bool:
        return all(_known(op, region.types, opset) for op in region.ops)

    return Constraint(holds, f"an operator, an attribute or an element type is newer than ONNX's operator set {opset}")


def schema_of(op: Op, opset: int) -> Any:
    """The ``onnx.defs.OpSchema`` of a node's operator in set `opset`; None if it has none there."""
    try:
        return onnx.defs.get_schema(op.op_type, _NEWEST if op.domain else opset, op.domain)
    except onnx.defs.SchemaError:
        return None


def operands(op: Op, schema: Any, types: Mapping[str, TensorType]) -> Iterator[tuple[Any, str]]:
    """Each operand and result of a node: the schema's FormalParameter for it, and its type as ONNX writes it."""
    for names, formal in ((op.inputs, schema.inputs), (op.outputs, schema.outputs)):
        for number, name in enumerate(names):
            if name and formal:
                kind = types[name].dtype
                yield formal[min(number, len(formal) - 1)], f"tensor({_RENAMED.get(kind, kind)})"


def _known(op: Op, types: Mapping[str, TensorType], opset: int) -> bool:
    schema = schema_of(op, opset)
    if schema is None or not set(op.attributes) <= set(schema.attributes):
        return False
    if len(op.inputs) > schema.max_input or len(op.outputs) > schema.max_output:
        return False
    return all(kind in formal.types for formal, kind in operands(op, schema, types))


def artifact(
    kind: str, partition: Partition, options: Mapping[str, str], device: Device, threads: int, opset: int = OPSET
) -> Artifact:
    """The partition's ONNX model with its border and the device's options, loaded once to see that it can be.

    Raises TargetError if the model is over 2 GB or the runtime refuses it.
    """
    content = _serialized(partition.model(), opset)
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


def _serialized(model: ir.Model, opset: int) -> bytes | None:
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
    model.graph.opset_imports[""] = opset
    _own_zero_points(model)
    proto = ir.serde.serialize_model(model)
    return None if proto.ByteSize() > LARGEST_MODEL else proto.SerializeToString(deterministic=True)


def _own_zero_points(model: ir.Model) -> None:
    """Give each operator that widens a constant a zero point of its own.

    ONNX Runtime 1.32 turns int8 weights into uint8 with its option for exact sums of bytes, zero points with them, and
    fails at the second operator that reads one ("Attempt to replace the existing tensor").
    """
    import onnx_ir as ir

    seen: set[ir.Value] = set()
    for number, node in enumerate(model.graph):
        zero = node.inputs[2] if node.op_type == "DequantizeLinear" and len(node.inputs) > 2 else None
        data = node.inputs[0] if node.inputs else None
        if zero is None or zero.const_value is None or data is None or data.const_value is None:
            continue
        if zero in seen:
            name = f"{zero.name}.{number}"
            copy = ir.tensor(zero.const_value.numpy(), dtype=zero.const_value.dtype, name=name)
            own = ir.Value(name=name, type=zero.type, shape=zero.shape, const_value=copy)
            model.graph.register_initializer(own)
            node.replace_input_with(2, own)
        seen.add(zero)


def _port(name: str, type_: TensorType) -> list[object]:
    """A value at the border as `runtime.vendors.common` reads it."""
    return [name, type_.dtype, None if any(size < 0 for size in type_.shape) else list(type_.shape)]
