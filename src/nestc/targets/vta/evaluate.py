"""What a layer means, in numpy: every step on all accumulators at once, in int64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nestc.targets.vta.layer import Add, Clip, FeatureMap, Init, Layer, Maximum, Product, Shift

_INT32 = 1 << 31


def evaluate(layer: Layer, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The output of a layer, int8, in the shape (batch, channels, height, width).

    `values` are the sources by name: int8 [n, c, h, w], [n, c, w] or matrices [m, k]. Accumulators are checked to stay
    in int32 after each step (asserts).
    """
    maps = {name: unpacked(map_, values[name]) for name, map_ in layer.sources.items()}
    out = layer.output
    acc = np.zeros((out.batch, out.channels, out.height, out.width), np.int64)
    for step in layer.steps:
        if isinstance(step, Init):
            acc[:] = _along(step.values)
        elif isinstance(step, Product):
            acc = acc + _products(step, maps[step.source], acc.shape)
        elif isinstance(step, Maximum):
            for tap in step.taps:
                places, taken = _overlap(step.strides, tap, maps[step.source].shape, acc.shape)
                acc[places] = np.maximum(acc[places], maps[step.source][taken])
        elif isinstance(step, Shift):
            amounts = _along(step.amounts)
            acc = np.where(amounts >= 0, acc >> np.maximum(amounts, 0), acc << np.maximum(-amounts, 0))
        elif isinstance(step, Add):
            acc = acc + step.value
        else:
            acc = _clipped(acc, step)
        assert acc.min(initial=0) >= -_INT32 and acc.max(initial=0) < _INT32, f"{layer.name}: {step}"
    assert acc.min(initial=0) >= -128 and acc.max(initial=0) < 128, f"{layer.name}: not int8"
    return acc.astype(np.int8)


def _clipped(acc: np.ndarray, clip: Clip) -> np.ndarray:
    raised = acc if clip.low is None else np.maximum(acc, clip.low)
    return raised if clip.high is None else np.minimum(raised, clip.high)


def unpacked(map_: FeatureMap, value: np.ndarray) -> np.ndarray:
    """A value of ONNX's shape as (batch, channels, height, width); a matrix [m, k] has its rows as the width."""
    array = value.T if value.ndim == 2 else value
    return array.reshape(map_.batch, map_.channels, map_.height, map_.width)


def packed(map_: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(batch, channels, height, width) as a value of an ONNX shape."""
    if len(shape) == 2:
        return np.ascontiguousarray(map_.reshape(shape[1], shape[0]).T)
    return map_.reshape(shape)


def _along(values: np.ndarray) -> np.ndarray:
    """One number a channel, or one for all, in a form that broadcasts over accumulators."""
    return values.reshape(1, -1, 1, 1)


def _overlap(
    strides: tuple[int, int], tap: tuple[int, int], source: tuple[int, ...], output: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The outputs whose element at a tap lies inside the source, and those elements."""
    places, taken = [slice(None), slice(None)], [slice(None), slice(None)]
    for stride, offset, size, count in zip(strides, tap, source[2:], output[2:], strict=True):
        first = max(0, -(offset // stride))  # ceil(-offset / stride)
        last = min(count, (size - 1 - offset) // stride + 1)
        last = max(first, last)
        places.append(slice(first, last))
        start = first * stride + offset
        taken.append(slice(start, start + max(0, (last - first - 1) * stride + 1) if last > first else start, stride))
    return tuple(places), tuple(taken)


def _products(step: Product, source: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums of a Product for every accumulator, int64. Products are summed in float64, which is exact below 2**53."""
    block = step.weights.shape[-1]
    batch, channels = shape[:2]
    outputs, inputs = -(-channels // block), -(-source.shape[1] // block)
    padded = np.zeros((batch, inputs * block, *source.shape[2:]))
    padded[:, : source.shape[1]] = source
    total = np.zeros((batch, outputs * block, *shape[2:]))
    pairs = np.array(step.pairs, np.int64).reshape(-1, 2)
    dense = len(pairs) == outputs * inputs
    for tap, place in enumerate(step.taps):
        places, taken = _overlap(step.strides, place, padded.shape, shape)
        pixels = padded[taken]
        size = pixels.shape[2:]
        if 0 in size:
            continue
        weights = step.weights[:, tap].astype(np.float64)
        for n in range(batch):
            x = np.ascontiguousarray(pixels[n]).reshape(inputs, block, -1)
            if dense:
                matrix = weights.reshape(outputs, inputs, block, block).transpose(0, 2, 1, 3)
                found = matrix.reshape(outputs * block, -1) @ x.reshape(inputs * block, -1)
            else:
                found = np.zeros((outputs, block, x.shape[-1]))
                np.add.at(found, pairs[:, 0], weights @ x[pairs[:, 1]])
            total[(n, slice(None), *places[2:])] += found.reshape(outputs * block, *size)
    return total[:, :channels].astype(np.int64)
