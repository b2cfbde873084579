"""Whether the smallest tile of a layer, one output pixel of one block, fits the buffers of a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.layer import FeatureMap, Maximum
from nestc.targets.vta.layers_steps import Draft
from nestc.targets.vta.layers_values import Refused, Term

_KEPT = 8  # of a buffer, the part that biases or vectors of channels may take for a whole layer (`lower`)
_FEWEST = 4  # elements that they take at least


def require_room(steps: Sequence[Draft], maps: Mapping[str, FeatureMap], config: VtaConfig) -> None:
    """Raise Refused if a window of source pixels, or the weights of its taps, are more than a buffer holds."""
    for step in steps:
        if not isinstance(step, Term | Maximum):
            continue
        source = step.source if isinstance(step, Term) else maps[step.source]
        extents = tuple(
            min(size, max(offsets) - min(offsets) + 1)
            for size, offsets in zip((source.height, source.width), zip(*step.taps, strict=True), strict=True)
        )
        window, shown = extents[0] * extents[1], f"a window of {extents[0]} x {extents[1]} pixels"
        if window > config.inp_reach - 1:
            raise Refused(f"{shown} does not fit VTA's input buffer of {config.inp_reach} elements")
        if isinstance(step, Maximum):
            room = config.acc_depth - max(config.acc_depth // _KEPT, _FEWEST)
            if window + 1 > room:
                raise Refused(f"{shown} does not fit VTA's accumulators, {config.acc_depth} elements")
            continue
        weights = _taps(step.weights)
        room = config.wgt_depth - 1 - max(config.wgt_depth // _KEPT, _FEWEST)
        if weights > room:
            raise Refused(f"{weights} taps do not fit VTA's weight buffer, which has {room} blocks beside its biases")


def _taps(weights: np.ndarray) -> int:
    """Weight blocks of a pair: one a tap, more where weights have several 8-bit pieces, one if all taps are alike."""
    if weights.shape[-1] > 1 and bool((weights == weights[..., :1]).all()):
        return 1
    if weights.dtype == np.int8:
        return weights.shape[-1]
    return weights.shape[-1] * max(1, -(-int(np.abs(weights).max(initial=0)) // 127))
