"""Classify an image: compile a trained network, save it as a bundle, open that without the compiler, and run it.

python examples/classify_image.py                # the first of the test images that ship with nestc
python examples/classify_image.py shoe.png       # an article of clothing, light on black (needs nestc[image])
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import nestc
from nestc.demo import CLASSES, INPUT, labelled_images, model_path


def read(path: str) -> np.ndarray:
    """A picture as the network takes it: [1, 1, 28, 28], float32 in 0..1."""
    from PIL import Image

    picture = Image.open(path).convert("L").resize((28, 28))
    return np.asarray(picture, np.float32)[None, None] / 255


def main() -> None:
    """Compile, save, open, classify."""
    image = read(sys.argv[1]) if len(sys.argv) > 1 else labelled_images()[0][:1]

    # The file leaves the batch open; a bundle has fixed sizes.
    compiled = nestc.compile(model_path(), shapes={INPUT: image.shape})

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "clothes.nest"
        compiled.save(bundle)
        # From here on only numpy and nestc's runtime are needed; onnx and the compiler are not imported.
        with nestc.open(bundle) as network:
            network(image)  # the first call warms up
            begin = time.perf_counter()
            logits = network(image)[0]
            milliseconds = (time.perf_counter() - begin) * 1e3

    odds = np.exp(logits - logits.max())
    odds /= odds.sum()
    for index in odds.argsort()[::-1][:3]:
        print(f"{odds[index]:6.1%}  {CLASSES[index]}")
    print(f"in {milliseconds:.2f} ms")


if __name__ == "__main__":
    main()
