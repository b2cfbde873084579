"""Concatenation as addressing: what is joined is written where the joined value lies, and no layer copies it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.layer import FeatureMap, Init, Layer, Product
from nestc.targets.vta.shape import block_count


@dataclass(frozen=True)
class Part:
    """A value that lies inside another, `bytes` behind its beginning."""

    whole: str
    bytes: int


def join(layers: Sequence[Layer], fixed: Iterable[str], config: VtaConfig) -> tuple[tuple[Layer, ...], dict[str, Part]]:
    """The layers without those that only concatenate, and where their sources lie instead.

    A source must be made by one of the layers, not be in `fixed` (inputs and views), lie in one whole only, and begin
    at a block of channels; images must lie in one piece. Other concatenations stay layers that copy.
    """
    made = {layer.output.name for layer in layers}.difference(fixed)
    kept: list[Layer] = []
    parts: dict[str, Part] = {}
    for layer in layers:
        found = _copied(layer, config)
        if found is None or any(name not in made or name in parts for name in found):
            kept.append(layer)
            continue
        plane = layer.output.height * layer.output.width * config.inp_bytes
        parts.update({name: Part(layer.output.name, first * plane) for name, first in found.items()})
    return tuple(kept), parts


def _copied(layer: Layer, config: VtaConfig) -> Mapping[str, int] | None:
    """The first output block of each source, if the layer copies sources one behind the other and does nothing else."""
    out = layer.output
    start, *products = layer.steps
    if out.batch > config.batch or not isinstance(start, Init) or start.values.any() or not products:
        return None
    found: dict[str, int] = {}
    covered = 0
    for step in products:
        if not isinstance(step, Product) or step.source in found:
            return None
        source = layer.sources[step.source]
        blocks = block_count(source, config)
        alike = (source.batch, source.height, source.width) == (out.batch, out.height, out.width)
        places = tuple((covered + block, block) for block in range(blocks))
        if not alike or step.strides != (1, 1) or step.taps != ((0, 0),) or step.pairs != places:
            return None
        if not np.array_equal(step.weights[:, 0], _ones(source, config)):
            return None
        found[step.source] = covered
        covered += blocks
    return found if covered == block_count(out, config) else None


def _ones(source: FeatureMap, config: VtaConfig) -> np.ndarray:
    """Weight blocks that copy the channels of a map."""
    blocks = np.repeat(np.eye(config.block, dtype=np.int8)[None], block_count(source, config), axis=0)
    blocks[-1] *= np.arange(config.block) < config.block - (-source.channels % config.block)
    return blocks
