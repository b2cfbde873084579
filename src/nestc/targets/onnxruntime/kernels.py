"""Which regions ONNX Runtime has kernels for, asked of itself: operator, version and element types must fit."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import onnx.defs

from nestc.errors import TargetError
from nestc.graph.region import Op, Region, TensorType
from nestc.runtime.vendors.onnxruntime import CPU, runtime
from nestc.targets.api import Constraint, constraint
from nestc.targets.vendors import OPSET, operands, schema_of

BORDER = tuple("bool float16 float32 float64 int16 int32 int64 int8 string uint16 uint32 uint64 uint8".split())
"""Element types that go in and out of a session as numpy arrays."""

_OPEN = 2**31 - 1
"""Last version of a kernel that is not known to end."""

Kernels = Mapping[tuple[str, str], list[Any]]


def known_ops(provider: str) -> frozenset[str]:
    """ONNX's operators with a kernel, or a definition by simpler ones, as offers name them."""
    kernels = kernels_of(provider)
    return frozenset(
        schema.name if not schema.domain else f"{schema.domain}::{schema.name}"
        for schema in onnx.defs.get_all_schemas()
        if not schema.deprecated
        and schema.domain in ("", "ai.onnx.ml")
        and ((schema.domain, schema.name) in kernels or _has_body(schema))
    )


def opset_of(provider: str) -> int:
    """The newest of ONNX's operator sets that this version of the runtime has kernels for, at most `OPSET`."""
    kernels = kernels_of(provider)
    return min(
        OPSET, max(each.version_range[0] for (domain, _), group in kernels.items() if not domain for each in group)
    )


def offered(provider: str) -> Constraint:
    """The rule that a region's borders are arrays and each of its operators has a kernel for its element types."""
    kernels, opset = kernels_of(provider), opset_of(provider)

    def holds(region: Region) -> bool:
        border = all(region.types[name].dtype in BORDER for name in (*region.inputs, *region.outputs))
        return border and all(_runs(op, region.types, kernels, opset) for op in region.ops)

    return Constraint(holds, "onnxruntime has no kernel for an operator with these element types")


@constraint
def sound(region: Region) -> bool:
    """onnxruntime computes an operator in this form otherwise than ONNX says, or not at all"""
    empty = any(0 in type_.shape for type_ in region.types.values())
    return not empty and not any(_FAULTS.get(op.op_type, _never)(op) for op in region.ops)


def _never(_: Op) -> bool:
    return False


def _batch_first(op: Op) -> bool:
    return op.attributes.get("layout") == 1


_FAULTS: Mapping[str, Callable[[Op], bool]] = {
    "Attention": lambda op: bool(op.input(6) or op.output(3)),
    "Bernoulli": lambda _: True,
    "ConvInteger": lambda op: bool(op.input(3)),
    "GRU": _batch_first,
    "LSTM": _batch_first,
    "MaxUnpool": lambda op: bool(op.input(2)),
    "RNN": _batch_first,
    "Resize": lambda op: op.attributes.get("coordinate_transformation_mode") == "align_corners" and bool(op.input(2)),
    "StringNormalizer": lambda _: True,
}
"""Forms in which version 1.32 fails node tests of the package onnx 1.23."""


@lru_cache
def kernels_of(provider: str) -> Kernels:
    """The kernels of a provider by (domain, operator); of the CPU's where it compiles graphs and lists none.

    Raises TargetError if this build of onnxruntime does not say what kernels it has.
    """
    runtime()
    state: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    if not hasattr(state, "get_all_opkernel_def"):
        raise TargetError("this build of onnxruntime does not list its kernels; install the package from PyPI")
    listed = state.get_all_opkernel_def()
    found: dict[tuple[str, str], list[Any]] = {}
    owner = provider if any(kernel.provider == provider for kernel in listed) else CPU
    for kernel in listed:
        if kernel.provider == owner:
            found.setdefault((kernel.domain, kernel.op_name), []).append(kernel)
    return found


def _runs(op: Op, types: Mapping[str, TensorType], kernels: Kernels, opset: int) -> bool:
    """Whether a kernel fits, or the operator has a definition by others."""
    schema = schema_of(op, opset)
    if schema is None:
        return False
    own = kernels.get((op.domain, op.op_type), [])
    bound = {formal.type_str: kind for formal, kind in operands(op, schema, types)}
    # A float16 operator without a kernel gets casts around the float32 one.
    widened = {key: "tensor(float)" if kind == "tensor(float16)" else kind for key, kind in bound.items()}
    if any(_fits(kernel, schema.since_version, given) for kernel in own for given in (bound, widened)):
        return True
    return _has_body(schema) and all(kind in _PLAIN for kind in bound.values())


_PLAIN = frozenset(f"tensor({name})" for name in ("float", "bool", "int32", "int64"))
"""Element types that the operators of any definition have kernels for."""


def _fits(kernel: Any, since: int, bound: Mapping[str, str]) -> bool:
    """ONNX Runtime's own rule (KernelRegistry::VerifyKernelDef): an open range is for its first version only."""
    first, last = kernel.version_range
    if first != since and not (first < since <= last < _OPEN):
        return False
    return all(kind in kernel.type_constraints.get(key, (kind,)) for key, kind in bound.items())


def _has_body(schema: Any) -> bool:
    """Whether the operator is defined by others, which the runtime then runs (the stubs leave both fields out)."""
    return bool(schema.has_function or schema.has_context_dependent_function)
