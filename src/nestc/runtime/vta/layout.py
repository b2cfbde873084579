"""Feature maps as VTA keeps them in DRAM, [N / B][C / 16][H][W][B][16] int8, and back (B and 16: batch and block)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig


@dataclass(frozen=True)
class Columns:
    """How an image is unrolled along its rows (im2col of one dimension) before it is packed.

    Channel k * C + c of column x is channel c of the image's column x * `stride` + `offsets`[k], or 0 outside of it;
    there are `width` columns.
    """

    offsets: tuple[int, ...]
    stride: int
    width: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `columns_from_json` reads them back."""
        return {"offsets": list(self.offsets), "stride": self.stride, "width": self.width}

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of an unrolled image of `shape` (N, C, H, W)."""
        return (shape[0], shape[1] * len(self.offsets), shape[2], self.width)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """The unrolled image, of (N, C, H, W)."""
        right = max(0, (self.width - 1) * self.stride + max(self.offsets) + 1 - image.shape[3])
        left = max(0, -min(self.offsets))
        padded = np.pad(image, ((0, 0), (0, 0), (0, 0), (left, right)))
        end = (self.width - 1) * self.stride + 1
        return np.concatenate([padded[..., left + k : left + k + end : self.stride] for k in self.offsets], axis=1)


def columns_from_json(data: Mapping[str, Any] | None) -> Columns | None:
    """What `Columns.to_json` wrote. Raises KeyError, TypeError or ValueError if it is something else."""
    if data is None:
        return None
    columns = Columns(tuple(int(k) for k in data["offsets"]), int(data["stride"]), int(data["width"]))
    if not columns.offsets or columns.stride < 1 or columns.width < 1:
        raise ValueError(f"columns {dict(data)}")
    return columns


def map_bytes(sizes: Sequence[int], config: VtaConfig) -> int:
    """Bytes of a map of `sizes` (N, C, H, W) in DRAM."""
    return math.prod(_blocked(sizes, config))


def pack(array: np.ndarray, sizes: Sequence[int], config: VtaConfig, rows: bool = False) -> np.ndarray:
    """The bytes of a map in DRAM, flat uint8, with zeros in lanes beyond the last channel and batch.

    `array`: int8, an ONNX value of any shape that `channels_first` tells how to read as (N, C, H, W) `sizes`; with
    `rows` its last axis is the channels, whatever else it could be.
    """
    count, channels, height, width = sizes
    outer, blocks, _, _, batch, block = _blocked(sizes, config)
    if channels_first(array.shape, sizes) and not rows:
        values = array.reshape(count, channels, height, width)
    else:
        values = array.reshape(height * width, channels).T.reshape(count, channels, height, width)
    padded = np.zeros((outer * batch, blocks * block, height, width), np.int8)
    padded[:count, :channels] = values
    # batch and block go to the end
    parts = padded.reshape(outer, batch, blocks, block, height, width)
    return np.ascontiguousarray(parts.transpose(0, 2, 4, 5, 1, 3)).view(np.uint8).ravel()


def unpack(
    data: np.ndarray, sizes: Sequence[int], shape: Sequence[int], config: VtaConfig, rows: bool = False
) -> np.ndarray:
    """The ONNX value of `shape`, int8, in `data`, the bytes of a map of (N, C, H, W) `sizes`; a new array."""
    count, channels, height, width = sizes
    outer, blocks, _, _, batch, block = blocked = _blocked(sizes, config)
    parts = data.view(np.int8).reshape(blocked).transpose(0, 4, 1, 5, 2, 3)
    values = parts.reshape(outer * batch, blocks * block, height, width)[:count, :channels]
    if rows or not channels_first(shape, sizes):
        values = values.reshape(channels, height * width).T
    return np.array(values, order="C").reshape(shape)


def channels_first(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether an ONNX value of `shape` is a map of (N, C, H, W) `sizes` as it lies; else it is a matrix [..., C].

    The rows of a matrix are the map's pixels, of one image. A value that can be read as both is a map if it has three
    axes or more, as a convolution sees it. Raises TargetError if it is neither.
    """
    count, channels, height, width = sizes
    image = tuple(shape[:2]) == (count, channels) and math.prod(shape[2:]) == height * width
    matrix = count == 1 and tuple(shape[-1:]) == (channels,) and math.prod(shape[:-1]) == height * width
    if not (matrix or image):
        raise TargetError(f"a value of shape {list(shape)} is no map of {list(sizes)} (batch, channels, height, width)")
    return image


def _blocked(sizes: Sequence[int], config: VtaConfig) -> tuple[int, int, int, int, int, int]:
    count, channels, height, width = sizes
    return -(-count // config.batch), -(-channels // config.block), height, width, config.batch, config.block
