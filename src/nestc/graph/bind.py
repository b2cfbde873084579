"""Give the inputs of a model their sizes: by shape, by the name of a dimension, or by a constant value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from nestc.errors import ShapeError
from nestc.graph.model import Model, element_name, shape_of, unbound_dims


def bind(
    model: Model,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    values: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """A copy of `model` for other input shapes; the weights are shared.

    `shapes` sets whole shapes of inputs, `dims` the size of symbolic dimensions by name, and `values` turns inputs
    into constants. What the file says of shapes inside the graph is forgotten wherever it may no longer hold.
    Raises `ShapeError` for a name that the model does not have, and for a rank or dtype that does not fit.
    """
    bound = model.clone()
    graph = bound.ir.graph
    inputs = {value.name or "": value for value in graph.inputs}
    sizes = dict(dims or {})
    _check_dims(model, sizes)
    for name, array in (values or {}).items():
        _make_constant(graph, _named(inputs, name), np.asarray(array))
    replaced = False
    for name, shape in (shapes or {}).items():
        replaced |= _set_shape(_named(inputs, name), tuple(shape), sizes)
    for value in graph.inputs:
        _substitute(value, sizes)
    for node in graph.all_nodes():
        for value in node.outputs:
            if replaced or values:
                value.shape = None  # computed for other sizes, or before a shape operand was known
            else:
                _substitute(value, sizes)
    return bound


def bind_batch(model: Model) -> tuple[Model, str]:
    """The model with the first axes that are open bound to 1, and in words what was bound (``"N = 1"``, or empty).

    A model with another open dimension comes back as it is: no size would be right for that by itself.
    """
    found = unbound_dims(model)
    if not found or any(axis != 0 for _, axis, _ in found):
        return model, ""
    shapes = {name: [1, *(int(size) for size in model.inputs[name][1][1:])] for name, _, _ in found}
    names = dict.fromkeys(dim if dim not in ("", "?") else f"the first axis of {name!r}" for name, _, dim in found)
    return bind(model, shapes), ", ".join(f"{each} = 1" for each in names)


def _named(inputs: Mapping[str, ir.Value], name: str) -> ir.Value:
    if name not in inputs:
        raise ShapeError(f"the model has no input {name!r}; its inputs are {', '.join(map(repr, inputs)) or 'none'}")
    return inputs[name]


def _check_dims(model: Model, sizes: Mapping[str, int]) -> None:
    known = {dim for _, shape in model.inputs.values() for dim in shape if isinstance(dim, str)}
    for name, size in sizes.items():
        if name not in known:
            names = ", ".join(map(repr, sorted(known - {"?"}))) or "none"
            raise ShapeError(f"the model's inputs have no symbolic dimension {name!r}; they have {names}")
        if size < 0:
            raise ShapeError(f"dimension {name!r} cannot have the size {size}")


def _set_shape(value: ir.Value, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Set the shape of an input, noting sizes of named dimensions; True if a size that was fixed has changed."""
    if any(size < 0 for size in shape):
        raise ShapeError(f"input {value.name!r} cannot have the shape {list(shape)}: sizes are not negative")
    if value.shape is not None and len(value.shape) != len(shape):
        known = list(shape_of(value))
        raise ShapeError(f"input {value.name!r} has rank {len(known)}, {known}; the shape {list(shape)} does not fit")
    changed = value.shape is None
    for dim, size in zip(value.shape or (), shape, strict=False):
        if isinstance(dim, int):
            changed |= dim != size
        elif dim.value and dim.value != "?" and sizes.setdefault(dim.value, size) != size:
            both = f"{sizes[dim.value]} and {size}"
            raise ShapeError(f"dimension {dim.value!r} would be both {both} (input {value.name!r})")
    value.shape = ir.Shape(shape)
    return changed


def _substitute(value: ir.Value, sizes: Mapping[str, int]) -> None:
    """Put sizes for named dimensions in a value's shape."""
    if value.shape is None or not sizes:
        return
    value.shape = ir.Shape(dim if isinstance(dim, int) else sizes.get(dim.value or "", dim) for dim in value.shape)


def _make_constant(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    tensor = ir.tensor(array, name=value.name)
    if value.dtype is not None and tensor.dtype != value.dtype:
        given = element_name(tensor.dtype)
        raise ShapeError(f"input {value.name!r} has dtype {element_name(value.dtype)}, but the value given has {given}")
    if value.shape is not None and len(value.shape) != array.ndim:
        raise ShapeError(f"input {value.name!r} has rank {len(value.shape)}, but the value given has rank {array.ndim}")
    graph.inputs.remove(value)
    value.shape = ir.Shape(array.shape)
    value.const_value = tensor
    graph.register_initializer(value)
