"""Read the text in an image with two networks: one finds lines, the other reads them (PP-OCRv4, Apache-2.0).

pip install rapidocr-onnxruntime==1.4.4          # only for the two ONNX files in it; needs nestc[image], too
python examples/read_text.py picture.png [FOLDER OF THE NETWORKS]
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import nestc


def tensor(picture: Image.Image) -> np.ndarray:
    """[1, 3, height, width] in -1..1, blue first, as both networks take it."""
    pixels = np.asarray(picture, np.float32)[..., ::-1] / 127.5 - 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def lines(text: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) of the detector's map, bool [height, width]; one line beside another is one."""
    edges = np.flatnonzero(np.diff(text.any(1).astype(int), prepend=0, append=0)).reshape(-1, 2)
    found = [(top, bottom, np.flatnonzero(text[top:bottom].any(0))) for top, bottom in edges.tolist()]
    # The map shows the core of each line: it grows by half of its height to all sides.
    cores = [(int(x[0]), top, int(x[-1]), bottom, (bottom - top) // 2) for top, bottom, x in found]
    return [(max(x - by, 0), max(top - by, 0), to + by, bottom + by) for x, top, to, bottom, by in cores]


def main() -> None:
    """Find lines, read each, print them from top to bottom."""
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    places = [*sys.argv[2:], *(f"{where}/models" for where in (package and package.submodule_search_locations) or ())]
    if len(sys.argv) < 2 or not places:
        raise SystemExit(__doc__)
    picture, folder = Image.open(sys.argv[1]).convert("RGB"), Path(places[0])

    # The detector halves its input five times.
    picture = picture.resize((max(32, picture.width // 32 * 32), max(32, picture.height // 32 * 32)))
    image = tensor(picture)
    found = nestc.compile(folder / "ch_PP-OCRv4_det_infer.onnx", shapes={"x": image.shape})(image)
    model = nestc.load(folder / "ch_PP-OCRv4_rec_infer.onnx", shapes={"x": [1, 3, 48, 320]})
    letters = ["", *model.ir.metadata_props["character"].splitlines(), " "]  # the first stands for "no letter"
    read = nestc.compile(model)
    for box in lines(found[0, 0] > 0.3):
        line = picture.crop(box)
        strip = Image.new("RGB", (320, 48), (127, 127, 127))
        strip.paste(line.resize((min(320, line.width * 48 // line.height), 48)), (0, 0))
        best = read(tensor(strip))[0].argmax(1)
        # The same letter at neighbouring places is one letter.
        print("".join(letters[index] for index in best[np.insert(best[1:] != best[:-1], 0, True)]))


if __name__ == "__main__":
    main()
