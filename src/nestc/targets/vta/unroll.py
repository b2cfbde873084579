"""Inputs of few channels are unrolled along their rows on the way in, so that a convolution fills VTA's blocks.

An image has 3 channels and a block 16: a 7x7 convolution would multiply 49 times by blocks that are mostly padding.
With the 7 pixels of a row of the window as 21 channels, it multiplies 14 times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.layout import Columns
from nestc.targets.vta.layer import FeatureMap, Layer, Maximum, Product


def unroll_inputs(
    layers: Sequence[Layer], inputs: Mapping[str, tuple[int, ...]], fixed: Sequence[str], config: VtaConfig
) -> tuple[tuple[Layer, ...], dict[str, Columns]]:
    """The layers with unrolled sources, and how each input that is unrolled comes to lie in memory.

    An input stays as it is where that multiplies less, where something else reads it too, or if it is in `fixed`.
    """
    found: dict[str, Columns] = {}
    for name, shape in inputs.items():
        readers = [layer for layer in layers if name in layer.sources]
        ways = {_columns(layer, name, config) for layer in readers}
        way = ways.pop() if len(ways) == 1 else None
        if way is not None and len(shape) == 4 and name not in fixed:
            found[name] = way
    changed = list(layers)
    for number, layer in enumerate(changed):
        for name in layer.sources:
            if name in found:
                changed[number] = layer = _unrolled(layer, name, found[name], config)
    return tuple(changed), found


def _columns(layer: Layer, name: str, config: VtaConfig) -> Columns | None:
    """How a layer would have its source unrolled; None if it does not read it by one convolution, or would not gain."""
    source = layer.sources[name]
    steps = [step for step in layer.steps if isinstance(step, Product | Maximum) and step.source == name]
    step = steps[0]
    if len(steps) > 1 or not isinstance(step, Product) or source.channels > config.block:
        return None
    down, across = (sorted({tap[axis] for tap in step.taps}) for axis in (0, 1))
    grid = sorted(step.taps) == [(dy, dx) for dy in down for dx in across]
    if not grid or -(-source.channels * len(across) // config.block) >= len(across):
        return None
    return Columns(tuple(across), step.strides[1], layer.output.width)


def _unrolled(layer: Layer, name: str, columns: Columns, config: VtaConfig) -> Layer:
    source = layer.sources[name]
    _, channels, height, width = columns.shape((source.batch, source.channels, source.height, source.width))
    made = FeatureMap(name, source.batch, channels, height, width)
    steps = tuple(
        _product(step, source, columns, config) if isinstance(step, Product) and step.source == name else step
        for step in layer.steps
    )
    return replace(layer, sources={**layer.sources, name: made}, steps=steps)


def _product(step: Product, source: FeatureMap, columns: Columns, config: VtaConfig) -> Product:
    """The same product of an unrolled source: channel c under the tap at offset k is channel k * channels + c."""
    block, channels = config.block, source.channels
    down = sorted({dy for dy, _ in step.taps})
    blocks = -(-channels * len(columns.offsets) // block)
    outputs = sorted({o for o, _ in step.pairs})
    weights = np.zeros((len(outputs), len(down), block, blocks * block), np.int8)
    for tap, (dy, dx) in enumerate(step.taps):
        first = columns.offsets.index(dx) * channels
        weights[:, down.index(dy), :, first : first + channels] = step.weights[:, tap, :, :channels]
    parts = weights.reshape(len(outputs), len(down), block, blocks, block).transpose(0, 3, 1, 2, 4)
    return Product(
        step.source,
        (step.strides[0], 1),
        tuple((dy, 0) for dy in down),
        tuple((o, i) for o in outputs for i in range(blocks)),
        np.ascontiguousarray(parts).reshape(-1, len(down), block, block),
    )
