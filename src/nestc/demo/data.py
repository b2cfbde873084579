"""The trained network and the labelled test images that ship with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np

INPUT = "image"

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def model_path() -> Path:
    """The ONNX file: [N, 1, 28, 28] float32 in 0..1 to [N, 10] logits; 82 thousand weights."""
    return Path(str(resources.files("nestc.demo") / "model.onnx"))


def labelled_images() -> tuple[np.ndarray, np.ndarray]:
    """First 500 test images of Fashion-MNIST as the network takes them, [500, 1, 28, 28], and labels [500]."""
    with np.load(str(resources.files("nestc.demo") / "images.npz"), allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    return images[:, None].astype(np.float32) / np.float32(255), labels.astype(np.int64)
