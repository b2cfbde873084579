"""Reading pictures: geometry, ranges and layouts, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestc.errors import DataError, ShapeError
from nestc.images import IMAGENET, RAW, ZERO_TO_ONE, ImageInput, Preprocess, parse_preprocess, read_image

NCHW = ImageInput("x", "float32", 28, 28, 3, channels_last=False)


def picture(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Write a smooth picture and give its pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    image.save(path)
    return np.asarray(image)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("imagenet", IMAGENET),
        ("0to1", ZERO_TO_ONE),
        ("raw", RAW),
        ("0to1,fit=crop", Preprocess(std=(255.0,), fit="crop")),
        ("mean=127,std=128", Preprocess((127.0,), (128.0,), "crop")),
        ("mean=1,2,3,std=4", Preprocess((1.0, 2.0, 3.0), (4.0,), "crop")),
        ("std=4, 5, 6, mean=0, fit=stretch", Preprocess((0.0,), (4.0, 5.0, 6.0), "stretch")),
    ],
)
def test_preprocess_is_read(text: str, expected: Preprocess) -> None:
    assert parse_preprocess(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "imagnet", "mean=1", "std=1", "mean=1,std=0", "mean=1,2,std=1", "mean=a,std=1", "raw,mean=1,std=1",
     "raw,fit=pad", "mean=1,mean=2,std=1", "raw,imagenet", "mean=nan,std=1", "gamma=2"],
)  # fmt: skip
def test_bad_preprocess_is_a_sentence(text: str) -> None:
    with pytest.raises(DataError, match="preprocess"):
        parse_preprocess(text)


def test_stretch_and_ranges(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png", 28, 28)
    raw = read_image(tmp_path / "a.png", NCHW, RAW)
    assert raw.shape == (1, 3, 28, 28) and raw.dtype == np.float32
    np.testing.assert_array_equal(raw[0], pixels.transpose(2, 0, 1))
    np.testing.assert_allclose(read_image(tmp_path / "a.png", NCHW, ZERO_TO_ONE), raw / 255, rtol=1e-6)
    scaled = read_image(tmp_path / "a.png", NCHW, parse_preprocess("mean=127,std=128,fit=stretch"))
    np.testing.assert_array_equal(scaled, (raw - 127) / 128)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (33, 31), (20, 24)])
def test_crop_is_the_centre_of_the_resized_picture(tmp_path: Path, height: int, width: int) -> None:
    picture(tmp_path / "a.png", height, width)
    found = read_image(tmp_path / "a.png", NCHW, Preprocess(fit="crop"))
    with Image.open(tmp_path / "a.png") as image:
        short = min(height, width)
        size = (32 * width // short, 32 * height // short)  # 28 * 256 / 224 is 32
        resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
    left, top = round((size[0] - 28) / 2), round((size[1] - 28) / 2)
    np.testing.assert_array_equal(found[0], resized[top : top + 28, left : left + 28].transpose(2, 0, 1))


def test_imagenet_range(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (255, 0, 128)).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", NCHW, IMAGENET)[0, :, 5, 5]
    np.testing.assert_allclose(found, [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225], rtol=1e-5)


def test_layouts_and_types(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 8, 6)
    grey = read_image(tmp_path / "a.png", ImageInput.of("x", "uint8", (1, 8, 6, 1)), RAW)
    assert grey.shape == (1, 8, 6, 1) and grey.dtype == np.uint8
    last = read_image(tmp_path / "a.png", ImageInput.of("x", "float32", ("N", 8, 6, 3)), RAW)
    first = read_image(tmp_path / "a.png", ImageInput.of("x", "float16", (1, 3, 8, 6)), RAW)
    assert first.dtype == np.float16
    np.testing.assert_array_equal(last.transpose(0, 3, 1, 2), first)


@pytest.mark.parametrize(
    ("dtype", "shape", "said"),
    [
        ("float32", (1, 4), "takes no images"),
        ("float32", (1, 5, 8, 8), "takes no images"),
        ("int64", (1, 3, 8, 8), "of type int64"),
        ("float32", (1, 3, "height", 8), "'height'"),
    ],
)
def test_other_inputs_take_no_images(dtype: str, shape: tuple[int | str, ...], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        ImageInput.of("x", dtype, shape)


def test_preprocessing_that_the_input_cannot_hold() -> None:
    with pytest.raises(DataError, match="one channel"):
        ImageInput.of("x", "float32", (1, 1, 8, 8)).check(IMAGENET)
    with pytest.raises(DataError, match="bytes"):
        ImageInput.of("x", "uint8", (1, 3, 8, 8)).check(ZERO_TO_ONE)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0not really")
    with pytest.raises(DataError, match=r"a\.jpg"):
        read_image(tmp_path / "a.jpg", NCHW, RAW)
    with pytest.raises(DataError, match="there is no file"):
        read_image(tmp_path / "b.jpg", NCHW, RAW)
