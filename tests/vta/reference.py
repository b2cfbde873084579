"""An independent integer reference of quantized graphs: ONNX's own definitions in float64, rounded as one is told.

It shares no code with the target: every operator of a region is computed by itself, on real numbers. Those are exact:
integers times powers of two stay far below 2**53, and the quotient of a mean is correctly rounded, which keeps it on
the right side of every half. Only QuantizeLinear has a choice: VTA rounds half up, ONNX half to even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

import nestc
from nestc.driver import build, with_fallbacks
from nestc.graph.region import Op, Region
from nestc.targets import resolve

Values = dict[str, np.ndarray]
_LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


def regions_of(model: nestc.Model) -> list[Region]:
    """The regions that a model is cut into, in order."""
    done = build(model, with_fallbacks(resolve(["cpu"]), 1), stop_after="regions")
    return [claim.region for claim in done.claims]


def run_qdq(
    model: nestc.Model | Iterable[Region],
    inputs: Mapping[str, np.ndarray],
    half_up: Callable[[Region], bool] = lambda region: True,
) -> Values:
    """All values of a model: those between regions and those inside. ``half_up`` chooses the rounding of each region."""
    values: Values = dict(inputs)
    for region in regions_of(model) if isinstance(model, nestc.Model) else model:
        run_region(region, values, half_up(region))
    return values


def run_region(region: Region, values: Values, half_up: bool = True) -> None:
    """Add the values that a region computes; integers keep their type, real numbers are float64."""
    for name in region.constants:
        constant = region.constant(name)
        assert constant is not None
        values.setdefault(name, constant)
    for op in region.ops:
        arguments = [values[name] if name else None for name in op.inputs]
        results = _apply(op, arguments, region, half_up)
        for name, result in zip(op.outputs, results, strict=False):
            assert result.shape == region.types[name].shape, (op, result.shape)
            values[name] = result


def _apply(op: Op, x: list[np.ndarray | None], region: Region, half_up: bool) -> list[np.ndarray]:
    a = x[0]
    assert a is not None
    attributes = dict(op.attributes)
    others = [each for each in x[1:] if each is not None]
    kind = op.op_type
    if kind == "QuantizeLinear":
        return [_quantize(a, others, region.types[op.outputs[0]].dtype, attributes.get("axis", 1), half_up)]
    if kind == "DequantizeLinear":
        scale, zero = _parameters(others, attributes.get("axis", 1), a.ndim)
        return [(a.astype(np.float64) - zero) * scale]
    a = a if a.dtype.kind == "i" else a.astype(np.float64)
    if kind in ("Conv", "MatMul", "Gemm"):
        return [_product(kind, a, others, attributes)]
    if kind in ("MaxPool", "AveragePool"):
        return [_pool(kind, a, attributes, region.types[op.outputs[0]].shape)]
    if kind in ("GlobalAveragePool", "GlobalMaxPool"):
        spatial = tuple(range(2, a.ndim))
        if kind == "GlobalMaxPool":
            return [a.max(axis=spatial, keepdims=True)]
        return [a.sum(axis=spatial, keepdims=True) / np.prod(a.shape[2:])]
    if kind == "ReduceMean":
        axes = tuple(int(i) for i in (others[0] if others else attributes["axes"]))
        count = np.prod([a.shape[i] for i in axes])
        return [a.sum(axis=axes, keepdims=bool(attributes.get("keepdims", 1))) / count]
    if kind == "Clip":
        low, high = ([*x, None, None])[1:3]
        clipped = a if low is None else np.maximum(a, low)
        return [clipped if high is None else np.minimum(clipped, high)]
    if kind in ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity"):
        return [a.reshape(region.types[op.outputs[0]].shape)]
    if kind == "Split":
        sizes = [region.types[name].shape[attributes.get("axis", 0)] for name in op.outputs]
        return np.split(a, np.cumsum(sizes)[:-1], axis=attributes.get("axis", 0))
    if kind == "Slice":
        starts, ends = others[:2]
        axes = others[2] if len(others) > 2 else range(len(starts))
        steps = others[3] if len(others) > 3 else [1] * len(starts)
        cut = [slice(None)] * a.ndim
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            cut[int(axis)] = slice(int(start), int(end), int(step))
        return [a[tuple(cut)]]
    if kind == "Pad":
        pads = others[0].reshape(2, -1)
        return [np.pad(a, [(int(p), int(q)) for p, q in pads.T])]
    if kind == "Transpose":
        return [a.transpose(attributes["perm"])]
    if kind == "Concat":
        return [np.concatenate([a, *others], axis=attributes["axis"])]
    simple = {
        "Add": lambda: a + others[0],
        "Sub": lambda: a - others[0],
        "Mul": lambda: a * others[0],
        "Relu": lambda: np.maximum(a, 0),
        "Max": lambda: np.maximum(a, others[0]),
        "Min": lambda: np.minimum(a, others[0]),
    }
    return [simple[kind]()]


def _parameters(given: list[np.ndarray], axis: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point, which broadcast."""
    scale = given[0].astype(np.float64)
    zero = given[1].astype(np.float64) if len(given) > 1 else np.zeros(())
    if scale.size == 1:
        return scale.reshape(()), zero.reshape(-1)[0]
    form = [-1 if i == axis % rank else 1 for i in range(rank)]
    return scale.reshape(form), zero.reshape(form)


def _quantize(a: np.ndarray, given: list[np.ndarray], dtype: str, axis: int, half_up: bool) -> np.ndarray:
    scale, zero = _parameters(given, axis, a.ndim)
    quotient = a.astype(np.float64) / scale
    rounded = np.floor(quotient + 0.5) if half_up else np.rint(quotient)
    return np.clip(rounded + zero, *_LIMITS[dtype]).astype(dtype)


def _product(kind: str, a: np.ndarray, others: list[np.ndarray], attributes: dict) -> np.ndarray:
    weights = others[0]
    if kind == "MatMul":
        return a @ weights
    if kind == "Gemm":
        a = a.T if attributes.get("transA") else a
        result = a @ (weights.T if attributes.get("transB") else weights) * attributes.get("alpha", 1.0)
        return result + others[1] * attributes.get("beta", 1.0) if len(others) > 1 else result
    windows = _windows(a, weights.shape[2:], attributes, 0.0)  # n, c, *out, *kernel
    group = attributes.get("group", 1)
    axes = weights.ndim - 2
    each = weights.shape[0] // group
    parts = []
    for g in range(group):
        x = windows[:, g * weights.shape[1] : (g + 1) * weights.shape[1]]
        kernel = weights[g * each : (g + 1) * each]
        over = [1, *range(2 + axes, 2 + 2 * axes)]
        parts.append(np.moveaxis(np.tensordot(x, kernel, axes=(over, list(range(1, 2 + axes)))), -1, 1))
    result = np.concatenate(parts, axis=1)
    return result if len(others) < 2 else result + others[1].reshape(1, -1, *[1] * axes)


def _windows(
    a: np.ndarray, kernel: tuple[int, ...], attributes: dict, fill: float, out: tuple[int, ...] | None = None
) -> np.ndarray:
    """Views (n, c, *places, *kernel) of the padded map."""
    axes = len(kernel)
    strides, dilations = (attributes.get(key) or (1,) * axes for key in ("strides", "dilations"))
    pads = attributes.get("pads") or (0,) * (2 * axes)
    sizes = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    after = list(pads[axes:])
    if out is not None:  # ceil_mode looks beyond the padding
        for i in range(axes):
            after[i] = max(after[i], (out[i] - 1) * strides[i] + sizes[i] - a.shape[2 + i] - pads[i])
    whole = np.pad(a, [(0, 0), (0, 0), *zip(pads[:axes], after, strict=True)], constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(whole, sizes, tuple(range(2, 2 + axes)))
    view = view[(..., *[slice(None, None, d) for d in dilations])]
    return view[(slice(None), slice(None), *[slice(None, None, s) for s in strides])]


def _pool(kind: str, a: np.ndarray, attributes: dict, shape: tuple[int, ...]) -> np.ndarray:
    kernel, axes = attributes["kernel_shape"], len(attributes["kernel_shape"])
    over = tuple(range(2 + axes, 2 + 2 * axes))
    places = tuple(slice(0, size) for size in shape[2:])
    if kind == "MaxPool":
        low = -128 if a.dtype.kind == "i" else -np.inf
        return _windows(a, kernel, attributes, low, shape[2:])[(..., *places, *[slice(None)] * axes)].max(axis=over)
    ones = np.ones_like(a, np.float64)
    if attributes.get("count_include_pad"):
        pads = attributes.get("pads") or (0,) * (2 * axes)
        spread = [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)]
        ones, a = np.pad(ones, spread, constant_values=1.0), np.pad(a, spread)
        attributes = {**attributes, "pads": None}
    totals, counts = (
        _windows(each, kernel, attributes, 0.0, shape[2:])[(..., *places, *[slice(None)] * axes)].sum(axis=over)
        for each in (a, ones)
    )
    return totals / counts
