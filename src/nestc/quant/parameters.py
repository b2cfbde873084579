"""What quantization has decided about each tensor, in numbers: scales, zero points and the integers of weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nestc.quant.scheme import Format


@dataclass(frozen=True)
class Activation:
    """Scale (float32) and zero point of an activation in one format; bfloat16 has neither (1 and 0)."""

    tensor: str
    format: Format
    scale: np.float32
    zero_point: int


@dataclass
class Weight:
    """A constant operand in integers: ``values * scale``, element by element along ``axis``.

    ``node`` and ``index`` say whose operand it is, ``tensor`` which initializer of the prepared model. ``scale`` is
    float32 of shape () for a scale a tensor, (n,) for one a slice along ``axis``, or the tensor's shape with ``axis``
    divided by ``format.block``. ``values`` has the tensor's shape and the format's element type (int4 in int8); it is
    what tools that round otherwise than to the nearest replace. bfloat16 has scale 1 and float32 ``values``.
    """

    node: str
    index: int
    tensor: str
    format: Format
    axis: int
    scale: NDArray[np.float32]
    values: NDArray[np.generic]
    zero_point: int = 0

    def expanded(self) -> NDArray[np.float32]:
        """The scale, broadcastable against ``values``."""
        if self.scale.ndim == 0:
            return self.scale
        if self.format.block:
            repeated = np.repeat(self.scale, self.format.block, self.axis)
            return np.take(repeated, range(self.values.shape[self.axis]), self.axis)
        shape = [1] * self.values.ndim
        shape[self.axis] = -1
        return self.scale.reshape(shape)

    def real(self) -> NDArray[np.float32]:
        """The float32 weights that the integers stand for."""
        return (self.values.astype(np.float32) - np.float32(self.zero_point)) * self.expanded()


@dataclass
class Parameters:
    """All of it: activations by (tensor, format), weights by (node, input index), biases by node.

    ``biases`` are float32 and still to be rounded to int32 with scale = input scale x weight scale, so that tools can
    correct them; a node whose bias is absent has no entry, and gets one if a tool adds it. ``stored``: the formats of
    tensors that exist only as integers, from which every other format of theirs is made.
    """

    activations: dict[tuple[str, Format], Activation] = field(default_factory=dict[tuple[str, Format], Activation])
    weights: dict[tuple[str, int], Weight] = field(default_factory=dict[tuple[str, int], Weight])
    biases: dict[str, NDArray[np.float32]] = field(default_factory=dict[str, NDArray[np.float32]])
    stored: dict[str, Format] = field(default_factory=dict[str, Format])
