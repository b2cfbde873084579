"""A layer for VTA: what is computed, in blocks of channels and exact integers, before anything is tiled.

Every linear operator (dense, grouped and depthwise convolution, matrix product, sum, average, concatenation, copy) is
a `Product`: a sparse list of weight blocks applied at taps. VTA's GEMM executes it with no other instruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np


@dataclass(frozen=True)
class FeatureMap:
    """A value in VTA's layout [batch / B][channels / 16][height][width][B][16], int8, channels padded with anything.

    A matrix [m, k] is a map of k channels, height 1 and width m, batch 1. Sizes are those of the ONNX value, unpadded.
    """

    name: str
    batch: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Init:
    """Accumulators start as ``values`` (int64, one a channel, or one for all: shape () )."""

    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Product:
    """acc[o, y, x] += sum over pairs (o, i) and taps of weights[pair, tap] @ source[i, y * sy + dy, x * sx + dx].

    Outside the source counts as 0. ``pairs``: (output block, input block), sorted; ``weights``: int8
    (pairs, taps, block, block) [out, in]. Input channels beyond the source's own have weight 0.
    """

    source: str
    strides: tuple[int, int]
    taps: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int], ...]
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Maximum:
    """acc[c, y, x] = max(acc[c, y, x], source[c, y * sy + dy, x * sx + dx] for taps inside the source)."""

    source: str
    strides: tuple[int, int]
    taps: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Shift:
    """acc >>= amount (arithmetic, rounding towards minus infinity); a negative amount shifts left.

    ``amounts``: int64, one a channel, or one for all: shape (). Rounding constants are added before, by other steps.
    """

    amounts: np.ndarray


@dataclass(frozen=True)
class Add:
    """acc += value (fits in 16 bits)."""

    value: int


@dataclass(frozen=True)
class Clip:
    """acc = min(max(acc, low), high); None: no such bound."""

    low: int | None
    high: int | None


Step: TypeAlias = Init | Product | Maximum | Shift | Add | Clip


@dataclass(frozen=True, eq=False)
class Layer:
    """One region: steps on int32 accumulators of the output's shape, in order; the first is `Init`.

    After the last step every accumulator fits in int8 and is stored. ``sources`` are the maps that steps read.
    ``origin`` names the ONNX nodes.
    """

    name: str
    output: FeatureMap
    sources: Mapping[str, FeatureMap]
    steps: tuple[Step, ...]
    origin: tuple[str, ...] = ()
