"""Steps while they are put together: bounds of the accumulators, constants moved to where they cost nothing, blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from nestc.targets.vta.layer import Add, Clip, Init, Maximum, Product, Shift, Step
from nestc.targets.vta.layers_values import Refused, Term

Draft: TypeAlias = Step | Term
"""A step; a `Term` stands for the `Product` that it becomes."""

Bounds: TypeAlias = tuple[np.ndarray, np.ndarray]

_INT32 = (1 << 31) - 1
_IMMEDIATE = (1 << 15) - 1
MAX_PIECES = 16
"""Weights wider than 8 bits become so many equal taps at most."""


def bounds_of(steps: Sequence[Draft], channels: int) -> Bounds:
    """Smallest and largest accumulator of each channel after the steps, for any int8 sources.

    Raises Refused if an accumulator may leave int32 at any step.
    """
    low, high = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for step in steps:
        if isinstance(step, Init):
            low = high = np.broadcast_to(step.values, (channels,)).astype(np.int64)
        elif isinstance(step, Term):
            least, most = step.reach(channels)
            low, high = low + least, high + most
        elif isinstance(step, Maximum):
            low, high = np.maximum(low, -128), np.maximum(high, 127)
        elif isinstance(step, Shift):
            low, high = _shifted(low, step.amounts), _shifted(high, step.amounts)
        elif isinstance(step, Add):
            low, high = low + step.value, high + step.value
        elif isinstance(step, Clip):
            low, high = _clipped(low, step), _clipped(high, step)
        if max(int(-low.min(initial=0)) - 1, int(high.max(initial=0))) > _INT32:
            raise Refused("its sums may need more than the 32 bits of VTA's accumulators")
    return low, high


def _shifted(values: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    return np.where(amounts >= 0, values >> np.maximum(amounts, 0), values << np.maximum(-amounts, 0))


def _clipped(values: np.ndarray, clip: Clip) -> np.ndarray:
    low = values if clip.low is None else np.maximum(values, clip.low)
    return low if clip.high is None else np.minimum(low, clip.high)


def clip_within(bounds: Bounds, low: int, high: int) -> tuple[Clip, ...]:
    """The Clip to low .. high, without the bounds that accumulators within `bounds` keep anyway."""
    below, above = bool((bounds[0] < low).any()), bool((bounds[1] > high).any())
    return (Clip(low if below else None, high if above else None),) if below or above else ()


def add_constant(steps: Sequence[Draft], value: int) -> tuple[Draft, ...] | None:
    """The steps, after which `value` more stands in every accumulator; None if no step can do it.

    The constant is moved towards the beginning: (x >> s) + c = (x + (c << s)) >> s, and clip(x, a, b) + c =
    clip(x + c, a + c, b + c), until it disappears in the first step. Only where it cannot, a step adds it.
    """
    if value == 0:
        return tuple(steps)
    moved = _moved(list(steps), value)
    if moved is not None:
        return moved
    return (*steps, Add(value)) if abs(value) <= _IMMEDIATE else None


def _moved(steps: list[Draft], value: int) -> tuple[Draft, ...] | None:
    amount = np.asarray(value, np.int64)
    for place in range(len(steps) - 1, -1, -1):
        step = steps[place]
        if isinstance(step, Init):
            steps[place] = Init(step.values + amount)
            return tuple(steps)
        if isinstance(step, Clip):
            if amount.ndim and (amount != amount[0]).any():
                return None
            more = int(amount.reshape(-1)[0])
            limits = [None if bound is None else bound + more for bound in (step.low, step.high)]
            if any(bound is not None and abs(bound) > _IMMEDIATE for bound in limits):
                return None
            steps[place] = Clip(*limits)
        elif isinstance(step, Shift):
            if (amount % (1 << np.maximum(-step.amounts, 0))).any():
                return None
            amount = _shifted(amount, -step.amounts)
            if (np.abs(amount) > _INT32).any():
                return None
        elif isinstance(step, Maximum):
            return None
        elif isinstance(step, Add):
            if amount.ndim == 0 and abs(step.value + int(amount)) <= _IMMEDIATE:
                steps[place] = Add(step.value + int(amount))
                return tuple(steps)
    return None


def packed(term: Term, channels: int, block: int) -> Product:
    """The weight blocks of a term. Only pairs of blocks that share a connection are made.

    Weights beyond int8 are split among several taps at the same place. Raises Refused if there are too many.
    """
    pieces = _pieces(term.weights)
    outputs, inputs = -(-channels // block), -(-term.source.channels // block)
    if term.ins is None:
        pairs, weights = _dense(pieces, outputs, inputs, block)
    else:
        pairs, weights = _sparse(term, pieces, inputs, block)
    taps = tuple(tap for tap in term.taps for _ in range(pieces.shape[3])) if pieces.shape[3] > 1 else term.taps
    return Product(term.source.name, term.strides, taps, pairs, weights)


def _pieces(weights: np.ndarray) -> np.ndarray:
    """int8 (n, j, taps, pieces) whose sum over the pieces are the weights."""
    if weights.dtype == np.int8 or (int(weights.max(initial=0)) <= 127 and int(weights.min(initial=0)) >= -128):
        return weights.astype(np.int8, copy=False)[..., None]
    largest = int(np.abs(weights).max())
    count = -(-largest // 127)
    if count > MAX_PIECES:
        raise Refused("its scales are so far apart that 8-bit weights cannot align them")
    rest, found = weights.astype(np.int64), np.zeros((*weights.shape, count), np.int8)
    for piece in range(count):
        part = np.clip(rest, -127, 127)
        found[..., piece] = part
        rest = rest - part
    return found


Pairs: TypeAlias = tuple[tuple[int, int], ...]


def _dense(pieces: np.ndarray, outputs: int, inputs: int, block: int) -> tuple[Pairs, np.ndarray]:
    n, j = pieces.shape[:2]
    taps = pieces.shape[2] * pieces.shape[3]
    full = np.zeros((outputs * block, inputs * block, taps), np.int8)
    full[:n, :j] = pieces.reshape(n, j, taps)
    blocks = full.reshape(outputs, block, inputs, block, taps).transpose(0, 2, 4, 1, 3)
    pairs = tuple((o, i) for o in range(outputs) for i in range(inputs))
    return pairs, np.ascontiguousarray(blocks).reshape(len(pairs), taps, block, block)


def _sparse(term: Term, pieces: np.ndarray, inputs: int, block: int) -> tuple[Pairs, np.ndarray]:
    assert term.ins is not None
    n, j = pieces.shape[:2]
    taps = pieces.shape[2] * pieces.shape[3]
    outs = np.broadcast_to(term.outs[:, None], (n, j))
    keys = (outs // block) * inputs + term.ins // block
    found, places = np.unique(keys, return_inverse=True)
    weights = np.zeros((len(found), taps, block, block), np.int8)
    weights[places.reshape(n, j), :, outs % block, term.ins % block] = pieces.reshape(n, j, taps)
    return tuple((int(key) // inputs, int(key) % inputs) for key in found), weights
