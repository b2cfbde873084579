"""Round weights so that their errors cancel: in sum over each kernel, then over each output channel (SQuant)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nestc.graph.model import Model
from nestc.graph.passes.rewrite import array, operand
from nestc.quant.derive import contraction_axis
from nestc.quant.parameters import Weight
from nestc.quant.profile import Profile
from nestc.quant.tools import Context, Tool

Floats = NDArray[np.float32]


def squant(prepared: Model, profile: Profile, context: Context) -> Profile:
    """Replace rounding to the nearest in the weights of integer products; needs no data and takes seconds.

    Guo et al., "SQuant: on-the-fly data-free quantization via diagonal Hessian approximation", ICLR 2022: neighbouring
    inputs are alike, and inputs behind a Relu have a mean, so errors of one sign add up; a weight whose rounding error
    is near one half is rounded to the other side instead where that takes the sum below one half.
    """
    parameters = context.parameters
    assert parameters is not None
    moved = total = 0
    for node in prepared.ir.graph:
        weight = parameters.weights.get((node.name or "", 1))
        scheme = context.assignment.of(node).scheme
        values = array(operand(node, 1))
        if weight is None or scheme is None or not scheme.integer or values is None or values.ndim < 2:
            continue
        if context.assignment.of(node).role != "product":
            continue
        before = weight.values
        weight.values = _rounded(values.astype(np.float32), weight, node)
        moved += int((weight.values != before).sum())
        total += before.size
    context.notes.append(f"squant: {moved} of {total} weights rounded to the other side, so that errors cancel")
    return profile


SQUANT = Tool("squant", "weights", squant)


def balanced(real: Floats, low: int, high: int) -> Floats:
    """Integers near `real`, of shape (channels, kernels, elements), whose errors nearly cancel in each sum."""
    rounded = np.clip(np.rint(real), low, high)
    error = real - rounded
    error[(real > high) | (real < low)] = 0.0
    _, kernels, elements = real.shape
    if elements > 1:
        moves = _moves(error.reshape(-1, elements), rounded.reshape(-1, elements), low, high).reshape(real.shape)
        error -= moves
        rounded += moves
    if kernels > 1:
        # One element of each kernel may move: that whose error is largest in the direction of the channel's sum, where
        # the kernel's own sum has that direction too, so that it stays below one.
        own = error.sum(axis=2)
        sums = own.sum(axis=1)
        sign = np.sign(sums)[:, None]
        best = (error * sign[..., None]).argmax(axis=2)[..., None]
        errors, integers = (np.take_along_axis(each, best, 2)[..., 0] for each in (error, rounded))
        errors = np.where(own * sign > 0, errors, np.float32(0))
        moves = _moves(errors, integers, low, high, sums)
        np.put_along_axis(rounded, best, (integers + moves)[..., None], 2)
    return rounded


def _moves(error: Floats, integers: Floats, low: int, high: int, sums: Floats | None = None) -> Floats:
    """-1, 0 or 1 for each element of each row: as many move as the row's sum of errors is off, the largest first."""
    excess = np.rint(error.sum(axis=1) if sums is None else sums)[:, None]
    sign = np.sign(excess)
    gain = error * sign
    order = np.argsort(-gain, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(error.shape[1]), order.shape), 1)
    moved = integers + sign
    moves = (rank < np.abs(excess)) & (gain > 0) & (moved >= low) & (moved <= high)
    return np.where(moves, sign, np.float32(0))


def _rounded(values: Floats, weight: Weight, node: ir.Node) -> NDArray[np.generic]:
    """A weight's integers, with its axes brought to (output channel, summed channel, position) and back."""
    real = values / weight.expanded()
    if node.op_type in ("Gemm", "MatMul"):
        axis = contraction_axis(node, real.ndim)
        moved = np.moveaxis(real, axis, -1)
        integers = balanced(moved.reshape(-1, moved.shape[-1], 1), weight.format.low, weight.format.high)
        integers = np.moveaxis(integers.reshape(moved.shape), -1, axis)
    elif node.op_type == "ConvTranspose":
        # Its weights are (summed, output channel of the group, ...): kernels only, sums over channels are left alone.
        flat = real.reshape(real.shape[0] * real.shape[1], 1, -1)
        integers = balanced(flat, weight.format.low, weight.format.high).reshape(real.shape)
    else:
        flat = real.reshape(real.shape[0], real.shape[1], -1)
        integers = balanced(flat, weight.format.low, weight.format.high).reshape(real.shape)
    return np.ascontiguousarray(integers).astype(weight.values.dtype)
