"""A network in the compiler: a small class over `onnx_ir.Model`, which is valid ONNX at every moment."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from pathlib import Path

import onnx
import onnx_ir as ir

from nestc.errors import Error, ShapeError

EXTERNAL_ABOVE = 1 << 30
"""Weights of more bytes than this are written beside the model: a protobuf file holds 2 GiB at the most."""

ValueType = tuple[str, tuple[int | str, ...]]


class Model:
    """An ONNX model of one canonical opset, as `onnx_ir` holds it.

    ``notes`` lists, in order and in words, what each pass did to it; `nestc explain` shows them.
    """

    def __init__(self, model: ir.Model, notes: list[str] | None = None) -> None:
        self.ir = model
        self.notes: list[str] = [] if notes is None else notes

    @property
    def inputs(self) -> OrderedDict[str, ValueType]:
        """Name -> (dtype, shape) of every graph input, in order; a dimension that is not bound is its name."""
        return OrderedDict((value.name or "", value_type(value)) for value in self.ir.graph.inputs)

    @property
    def outputs(self) -> OrderedDict[str, ValueType]:
        """Name -> (dtype, shape) of every graph output, in order; a dimension that is not known is a name or ``?``."""
        return OrderedDict((value.name or "", value_type(value)) for value in self.ir.graph.outputs)

    @property
    def hash(self) -> str:
        """SHA-256 over the graph and every weight; equal for equal networks, whatever file they came from."""
        digest = hashlib.sha256(skeleton(self.ir).SerializeToString(deterministic=True))
        for name, value in sorted(self.ir.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None:
                continue
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            digest.update(tensor.tobytes())
        return digest.hexdigest()

    @property
    def weights_bytes(self) -> int:
        """Bytes of all initializers of the main graph."""
        return sum(value.const_value.nbytes for value in self.ir.graph.initializers.values() if value.const_value)

    def clone(self) -> Model:
        """A copy that passes may change; the weights are shared, not copied."""
        return Model(self.ir.clone(), list(self.notes))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as ONNX; weights of more than a gigabyte go to ``<path>.data`` beside it.

        The file appears under its name only when it is complete. Raises `nestc.Error` if it cannot be written.
        """
        target = Path(path)
        try:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
                temporary = Path(folder) / target.name
                large = self.weights_bytes > EXTERNAL_ABOVE
                data = f"{target.name}.data" if large else None
                ir.save(self.ir if large else embedded(self.ir), temporary, external_data=data)
                if data:
                    os.replace(Path(folder) / data, target.parent / data)
                os.replace(temporary, target)
        except OSError as error:
            raise Error(f"cannot write the model to {target}: {error.strerror or error}") from error


def value_type(value: ir.Value) -> ValueType:
    """The dtype (ONNX name in lower case) and shape of a value; ``?`` stands for a dimension with no name."""
    return dtype_name(value), shape_of(value)


def dtype_name(value: ir.Value) -> str:
    """ONNX element type in lower case, e.g. ``float32``; ``sequence(float32)`` and the like for non-tensors."""
    kind = value.type
    if kind is None:
        return "undefined"
    if isinstance(kind, ir.SequenceType):
        return f"sequence({element_name(kind.dtype)})"
    if isinstance(kind, ir.OptionalType):
        return f"optional({element_name(kind.dtype)})"
    return element_name(ir.DataType(kind.dtype))


def element_name(dtype: ir.DataType) -> str:
    """Name of an element type: numpy's where numpy has one (``float32``, ``float64``), else ONNX's in lower case."""
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def shape_of(value: ir.Value) -> tuple[int | str, ...]:
    """The dimensions of a value, ``()`` if even the rank is unknown (see `has_rank`)."""
    if value.shape is None:
        return ()
    return tuple(dim if isinstance(dim, int) else (dim.value or "?") for dim in value.shape)


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape if it is fully known, else None."""
    if value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(dim) for dim in value.shape)  # pyright: ignore[reportArgumentType]


def unbound_dims(model: Model) -> list[tuple[str, int, str]]:
    """Every dimension of a graph input that has no size: (input, axis, name); the name is ``""`` if it has none."""
    found: list[tuple[str, int, str]] = []
    for value in model.ir.graph.inputs:
        if value.shape is None:
            found.append((value.name or "", -1, ""))
            continue
        for axis, dim in enumerate(value.shape):
            if not isinstance(dim, int):
                found.append((value.name or "", axis, dim.value or ""))
    return found


def require_static(model: Model) -> None:
    """Raise `ShapeError` if an input has a dimension of no known size, saying how to bind it."""
    for name, axis, dim in unbound_dims(model):
        if axis < 0:
            raise ShapeError(f"input {name!r} has no shape in the model; give one with --shape {name}=D0,D1,...")
        if dim not in ("", "?"):  # some exporters write ? for a size that has no name
            raise ShapeError(
                f"input {name!r} has the symbolic dimension {dim!r} at axis {axis}; bind it with --dim {dim}=SIZE"
            )
        example = ",".join(str(d) if isinstance(d, int) else "SIZE" for d in model.inputs[name][1])
        raise ShapeError(
            f"input {name!r} has a dimension of unknown size at axis {axis}; bind it with --shape {name}={example}"
        )


def parse_dim(text: str) -> tuple[str, int]:
    """Read ``NAME=4`` (the value of ``--dim``). Raises `ShapeError`."""
    name, equals, size = text.rpartition("=")
    if not equals or not name or not size.strip().isdigit() or int(size) < 1:
        raise ShapeError(f"--dim {text!r} is not of the form NAME=SIZE with a positive size, e.g. --dim batch=1")
    return name.strip(), int(size)


def parse_shape(text: str) -> tuple[str, list[int]]:
    """Read ``NAME=1,3,224,224`` (the value of ``--shape``; ``NAME=`` is a scalar). Raises `ShapeError`."""
    name, equals, dims = text.rpartition("=")
    sizes = [size.strip() for size in dims.replace("x", ",").split(",")] if dims.strip() else []
    if not equals or not name or not all(size.isdigit() for size in sizes):
        raise ShapeError(f"--shape {text!r} is not of the form NAME=D0,D1,..., e.g. --shape input=1,3,224,224")
    return name.strip(), [int(size) for size in sizes]


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model as protobuf with its weights left out (they become inputs of the graph), for tools of `onnx`.

    Initializers of up to 1 KiB stay, since shape inference reads them (a Reshape's shape, axes, ...).
    """
    graph = model.graph
    kept = dict(graph.initializers)
    inputs = list(graph.inputs)
    try:
        for name, value in kept.items():
            if value.const_value is not None and value.const_value.nbytes > 1024:
                del graph.initializers[name]
                if value not in inputs:
                    graph.inputs.append(value)
        return ir.to_proto(model)
    finally:
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        for value in kept.values():
            graph.initializers.add(value)


def embedded(model: ir.Model) -> ir.Model:
    """A copy of the model whose weights are all inside it (mapped, not copied)."""
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name)
    return copy
