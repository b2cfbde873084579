"""Layers of a network become others that compute the same values in fewer cycles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.layer import Add, Clip, FeatureMap, Init, Layer, Maximum, Product, Shift, Step
from nestc.targets.vta.layers_steps import add_constant
from nestc.targets.vta.shape import block_count, stored_weights

_MOST_DOUBLINGS = 6  # 64 is the largest power of two in int8


def rewritten(layers: Sequence[Layer], kept: Collection[str], config: VtaConfig) -> list[Layer]:
    """Layers in an order in which they can run; maps named in `kept` are still made, and mean the same."""
    return sort_channels(add_to_finer(layers, kept), kept, config)


# --- sums of two layers


def add_to_finer(layers: Sequence[Layer], kept: Collection[str]) -> list[Layer]:
    """Where a layer doubles its own result before it adds another's, let the other one add the first's.

    clip(u) * 2**k + v, with v from memory, takes a shift and often a constant more than v + 2**k * clip(u) with
    clip(u) from memory: powers of two are weights of the product that adds, and constants go into the bias of v.
    """
    result = list(layers)
    for after in layers:
        made = {layer.output.name: layer for layer in result}
        users = _users(result)
        found = _doubled_sum(after)
        if found is None:
            continue
        head, doublings, term, tail = found
        before = made.get(term.source)
        if before is None or before.output.name in kept or users[term.source] != 1 or not _alike(before, after):
            continue
        constant, tail = _leading_constant(tail)
        steps = add_constant(before.steps, constant)
        if steps is None or not _fits(steps, before.output.channels):
            continue
        addend = replace(after.output, name=f"{after.output.name}/addend")
        first = _layer(after, addend, head, after.sources)
        scaled = replace(term, source=addend.name, weights=(term.weights.astype(np.int64) << doublings).astype(np.int8))
        sources = {**before.sources, addend.name: addend}
        second = _layer(before, after.output, (*steps, scaled, *tail), sources)  # type: ignore[arg-type]
        result.remove(before)
        place = result.index(after)
        result[place : place + 1] = [first, second]
    return result


def _doubled_sum(layer: Layer) -> tuple[tuple[Step, ...], int, Product, tuple[Step, ...]] | None:
    """Steps before a doubling of int8 values, how often they are doubled, the identity that adds a map, the rest."""
    for place, (step, term) in enumerate(pairwise(layer.steps)):
        if not isinstance(step, Shift) or step.amounts.ndim or not isinstance(term, Product):
            continue
        doublings, head = -int(step.amounts), layer.steps[:place]
        if not 1 <= doublings <= _MOST_DOUBLINGS or not head or not _is_int8(head[-1]) or not _is_identity(term):
            continue
        others = [other for other in layer.steps if isinstance(other, Product | Maximum) and other is not term]
        inside = all(any(other is each for each in head) for other in others)
        if inside and all(other.source != term.source for other in others):
            return head, doublings, term, layer.steps[place + 2 :]
    return None


def _fits(steps: Sequence[object], channels: int) -> bool:
    """Whether sums up to the first shift, to which a constant was moved, surely stay within 32 bits."""
    largest = np.zeros(channels, np.int64)
    for step in steps:
        if isinstance(step, Init):
            largest = largest + np.abs(step.values)
        elif isinstance(step, Product):
            pairs, _, block, _ = step.weights.shape
            reach = np.zeros((-(-channels // block), block), np.int64)
            sums = np.abs(step.weights.astype(np.int16)).sum(axis=(1, 3), dtype=np.int64)
            np.add.at(reach, [o for o, _ in step.pairs], sums.reshape(pairs, block) * 128)
            largest = largest + reach.reshape(-1)[:channels]
        else:
            break
    return bool((largest < 1 << 31).all())


def _is_int8(step: Step) -> bool:
    return (
        isinstance(step, Clip)
        and step.low is not None
        and step.high is not None
        and -128 <= step.low <= step.high <= 127
    )


def _is_identity(step: Product) -> bool:
    """Whether a product adds a map as it is."""
    weights = stored_weights(step)
    return (
        step.strides == (1, 1)
        and step.taps == ((0, 0),)
        and all(o == i for o, i in step.pairs)
        and weights.shape[:2] == (1, 1)
        and np.array_equal(weights[0, 0], np.eye(weights.shape[2], dtype=np.int8))
    )


def _leading_constant(steps: tuple[Step, ...]) -> tuple[int, tuple[Step, ...]]:
    if steps and isinstance(steps[0], Add):
        return steps[0].value, steps[1:]
    return 0, steps


def _alike(a: Layer, b: Layer) -> bool:
    return replace(a.output, name="") == replace(b.output, name="")


# --- channels in another order


def sort_channels(layers: Sequence[Layer], kept: Collection[str], config: VtaConfig) -> list[Layer]:
    """Order the channels of maps by what they are shifted, where no one else can tell.

    A block whose channels are shifted alike takes an immediate, one cycle an accumulator, others a vector, two. The
    order is free where dense products make a map and dense products alone use it: their weights are ordered with it.
    """
    result = list(layers)
    for place, layer in enumerate(layers):
        uses = [(at, step) for at, other in enumerate(layers) for step in _reads(other, layer.output.name)]
        if layer.output.name in kept or not uses or layer.output.channels % config.block:
            continue
        if not all(isinstance(step, Product) and _is_dense(layers[at], step, config) for at, step in uses):
            continue
        order = _order(layer, config)
        if order is None:
            continue
        result[place] = replace(result[place], steps=tuple(_outputs(step, order) for step in result[place].steps))
        for at in dict.fromkeys(at for at, _ in uses):
            steps = tuple(_inputs(step, layer.output.name, order) for step in result[at].steps)
            result[at] = replace(result[at], steps=steps)
    return result


def _order(layer: Layer, config: VtaConfig) -> np.ndarray | None:
    """An order of a layer's channels in which fewer blocks are mixed; None if there is none, or it is not free."""
    if not all(_is_dense(layer, step, config) for step in layer.steps if isinstance(step, Product)):
        return None
    if any(isinstance(step, Maximum) for step in layer.steps):
        return None
    amounts = [step.amounts for step in layer.steps if isinstance(step, Shift) and step.amounts.ndim]
    if not amounts:
        return None
    order = np.lexsort(amounts[::-1])
    mixed = [sum(_mixed(each[o], config.block) for each in amounts) for o in (np.arange(len(order)), order)]
    return order if mixed[1] < mixed[0] else None


def _mixed(amounts: np.ndarray, block: int) -> int:
    blocks = amounts.reshape(-1, block)
    return int((blocks != blocks[:, :1]).any(axis=1).sum())


def _is_dense(layer: Layer, step: Product, config: VtaConfig) -> bool:
    source = layer.sources[step.source]
    return len(step.pairs) == block_count(layer.output, config) * block_count(source, config)


def _outputs(step: Step, order: np.ndarray) -> Step:
    """A step whose channels come in another order."""
    if isinstance(step, Init):
        return Init(step.values[order]) if step.values.ndim else step
    if isinstance(step, Shift):
        return Shift(step.amounts[order]) if step.amounts.ndim else step
    if not isinstance(step, Product):
        return step
    pairs, taps, block = step.weights.shape[:3]
    outputs = len(order) // block
    rows = step.weights.reshape(outputs, pairs // outputs, taps, block, block).transpose(0, 3, 1, 2, 4)
    moved = rows.reshape(len(order), -1)[order].reshape(rows.shape).transpose(0, 2, 3, 1, 4)
    return replace(step, weights=np.ascontiguousarray(moved).reshape(step.weights.shape))


def _inputs(step: Step, source: str, order: np.ndarray) -> Step:
    """A step that reads `source`, whose channels come in another order."""
    if not isinstance(step, Product) or step.source != source:
        return step
    pairs, taps, block = step.weights.shape[:3]
    inputs = len(order) // block
    columns = step.weights.reshape(pairs // inputs, inputs, taps, block, block).transpose(1, 4, 0, 2, 3)
    moved = columns.reshape(len(order), -1)[order].reshape(columns.shape).transpose(2, 0, 3, 4, 1)
    return replace(step, weights=np.ascontiguousarray(moved).reshape(step.weights.shape))


# --- parts of layers


def _layer(like: Layer, output: FeatureMap, steps: tuple[Step, ...], sources: Mapping[str, FeatureMap]) -> Layer:
    """A layer of some steps, with the sources that they read; named as `like`."""
    read = {step.source for step in steps if isinstance(step, Product | Maximum)}
    return Layer(like.name, output, {name: map_ for name, map_ in sources.items() if name in read}, steps, like.origin)


def _reads(layer: Layer, name: str) -> Iterator[Product | Maximum]:
    """The steps that read a map."""
    return (step for step in layer.steps if isinstance(step, Product | Maximum) and step.source == name)


def _users(layers: Sequence[Layer]) -> Counter[str]:
    """How often maps are read."""
    return Counter(step.source for layer in layers for step in layer.steps if isinstance(step, Product | Maximum))
