"""Image files as input arrays: decoded by Pillow, brought to the input's size, and put into the range a model wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nestc.bundle.dtypes import numpy_dtype
from nestc.errors import DataError, ShapeError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})

Fit = Literal["crop", "stretch"]

CROP_RATIO = 256 / 224
"""The short side before a centre crop, over the crop (torchvision's ImageNet classifiers, and those before them)."""

# Means and deviations of the channels of ImageNet's training images in 0..1, as torchvision and timm publish them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes an input: (pixel - mean) / std, with pixels in 0..255, after it was brought to size.

    `mean` and `std` have one number, or one a channel. `crop`: the short side is resized to CROP_RATIO of the input's
    and the centre cut out; `stretch`: the whole picture is resized, whatever its aspect.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    fit: Fit = "stretch"


RAW = Preprocess()
ZERO_TO_ONE = Preprocess(std=(255.0,))
IMAGENET = Preprocess(tuple(255.0 * x for x in IMAGENET_MEAN), tuple(255.0 * x for x in IMAGENET_STD), "crop")

_NAMED = {"raw": RAW, "0to1": ZERO_TO_ONE, "imagenet": IMAGENET}


def parse_preprocess(text: str) -> Preprocess:
    """Read what ``--preprocess`` takes. Raises DataError.

    ``imagenet``; ``mean=..,std=..`` of pixel values in 0..255, one number or one a channel (EfficientNet-Lite:
    ``mean=127,std=128``), cropped in the same way; ``0to1`` and ``raw`` (0..255), which squeeze the whole picture into
    the input's size. ``fit=crop`` or ``fit=stretch`` behind any of them changes that.
    """
    start: Preprocess | None = None
    values: dict[str, list[str]] = {}
    key = ""
    for part in (part.strip() for part in text.split(",")):
        name, equals, value = part.partition("=")
        if equals:
            key = name.strip()
            if key not in ("mean", "std", "fit") or key in values:
                raise DataError(f"--preprocess {text!r}: {key!r} is not one of mean, std and fit, or is there twice")
            values[key] = [value.strip()]
        elif key in ("mean", "std"):
            values[key].append(part)
        elif part in _NAMED and start is None:
            start = _NAMED[part]
        else:
            raise DataError(f"--preprocess {text!r}: {part!r} is none of imagenet, 0to1, raw, mean=.., std=.., fit=..")
    if start is None and not {"mean", "std"} <= set(values):
        raise DataError(f"--preprocess {text!r} says neither imagenet, 0to1 nor raw, nor both mean=.. and std=..")
    if start is not None and {"mean", "std"} & set(values):
        raise DataError(f"--preprocess {text!r} names a way and gives mean or std besides; leave one of them out")
    fit = values.get("fit", [start.fit if start else "crop"])[0]
    if fit not in ("crop", "stretch"):
        raise DataError(f"--preprocess {text!r}: fit is crop or stretch, not {fit!r}")
    if start is not None:
        return Preprocess(start.mean, start.std, fit)
    mean, std = _numbers(text, "mean", values["mean"]), _numbers(text, "std", values["std"])
    if not all(std):
        raise DataError(f"--preprocess {text!r}: std is divided by, it cannot be 0")
    return Preprocess(mean, std, fit)


def _numbers(text: str, key: str, parts: Sequence[str]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        raise DataError(f"--preprocess {text!r}: {key} takes numbers, as in {key}=127 or {key}=124,116,104") from None
    if len(numbers) not in (1, 3) or not np.isfinite(numbers).all():
        raise DataError(f"--preprocess {text!r}: {key} takes one finite number, or one for each of three channels")
    return numbers


@dataclass(frozen=True)
class ImageInput:
    """An input that takes images: its sizes, where its channels stand, and its element type.

    NCHW, or NHWC where only the last axis is 1 or 3; channels are 1 (grey) or 3 (red, green, blue).
    """

    name: str
    dtype: str
    height: int
    width: int
    channels: int
    channels_last: bool

    @classmethod
    def of(cls, name: str, dtype: str, shape: Sequence[int | str]) -> ImageInput:
        """Raises ShapeError where an input of this shape or type takes no images, or its size is open."""
        channels_last = len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3)
        sizes = tuple(shape[1:]) if channels_last or len(shape) != 4 else (*shape[2:], shape[1])
        listed = ",".join(str(size) for size in shape)
        unbound = next((size for size in sizes if not isinstance(size, int)), None) if len(sizes) == 3 else None
        if unbound is not None:
            raise ShapeError(f"input {name!r} of shape ({listed}) has no fixed image size; bind {unbound!r} (--shape)")
        if len(sizes) != 3 or sizes[2] not in (1, 3):
            raise ShapeError(f"input {name!r} of shape ({listed}) takes no images; give .npy or .npz files")
        if dtype != "uint8" and not dtype.startswith(("float", "bfloat")):
            raise ShapeError(f"input {name!r} is of type {dtype}, which takes no images; give .npy or .npz files")
        height, width, channels = (int(size) for size in sizes)
        return cls(name, dtype, height, width, channels, channels_last)

    @property
    def usual(self) -> Preprocess:
        """What is taken where nothing else is said: 0..255 for bytes, 0..1 for floats, the whole image."""
        return RAW if self.dtype == "uint8" else ZERO_TO_ONE

    def check(self, preprocess: Preprocess) -> None:
        """Raise DataError if the input cannot hold what this preprocessing makes."""
        if max(len(preprocess.mean), len(preprocess.std)) > self.channels:
            raise DataError(f"input {self.name!r} has one channel, but the preprocessing is for three")
        if self.dtype == "uint8" and (preprocess.mean, preprocess.std) != (RAW.mean, RAW.std):
            raise DataError(f"input {self.name!r} takes bytes; only `raw` preprocessing makes these")


def read_image(path: Path, image: ImageInput, preprocess: Preprocess) -> np.ndarray:
    """The picture in a file as one sample, [1, C, H, W] or [1, H, W, C]. Raises DataError if it cannot be read.

    An orientation noted beside the pixels (Exif) is not applied, as the usual evaluation pipelines do not either.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(f"reading {path.name} needs Pillow: pip install 'nestc[image]'") from None
    try:
        with Image.open(path) as opened:
            picture = opened.convert("L" if image.channels == 1 else "RGB")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not an image that can be read: {error}") from error
    size, box = _geometry(picture.width, picture.height, image, preprocess.fit)
    pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR).crop(box), np.float32)
    pixels = pixels.reshape(image.height, image.width, image.channels)
    if preprocess.mean != RAW.mean or preprocess.std != RAW.std:
        pixels = (pixels - np.array(preprocess.mean, np.float32)) / np.array(preprocess.std, np.float32)
    array = pixels.astype(numpy_dtype(image.dtype))
    return np.ascontiguousarray(array[None] if image.channels_last else np.moveaxis(array, 2, 0)[None])


def _geometry(
    width: int, height: int, image: ImageInput, fit: Fit
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Size (width, height) to resize to, and the box (left, top, right, bottom) to keep of it."""
    if fit == "stretch":
        return (image.width, image.height), (0, 0, image.width, image.height)
    # As torchvision resizes and crops: the long side rounds down, the crop's offset to the nearest.
    least_width, least_height = round(image.width * CROP_RATIO), round(image.height * CROP_RATIO)
    if least_width * height >= least_height * width:
        size = (least_width, max(least_height, least_width * height // width))
    else:
        size = (max(least_width, least_height * width // height), least_height)
    left, top = round((size[0] - image.width) / 2), round((size[1] - image.height) / 2)
    return size, (left, top, left + image.width, top + image.height)
