"""Quantize a network to int8 with your own data, see what it loses, and keep what must stay exact in float.

    python examples/quantize_your_data.py            # with the test images that ship with nestc

Your data may be an .npz (arrays named after the inputs, first axis = samples), a folder of .npy or .npz files, or a
folder of images; labels are a CSV file (file,label[,split]) or an array.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import nestc
from nestc.demo import INPUT, labelled_images, model_path
from nestc.quant.explain import quantized_ops, reasons


def main() -> None:
    """Write data, calibrate on a part, quantize, judge on the rest."""
    images, labels = labelled_images()
    model = nestc.load(model_path(), shapes={INPUT: [1, *images.shape[1:]]})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "calibrate.npz", image=images[:100])
        np.savez(folder / "judge.npz", image=images[100:])

        # Which values each tensor takes, on data like those the network will see. A profile is a small JSON file.
        data = nestc.open_data(folder / "calibrate.npz", model.inputs)
        profile = nestc.calibrate(model, data)
        profile.save(folder / "profile.json")

        # The result is standard ONNX. Overrides name nodes, or patterns of names, that get another format.
        first = next(node.name or "" for node in model.ir.graph if node.op_type == "Conv")
        quantized = nestc.quantize(model, profile, "int8", data=data, overrides={first: "float"})
        quantized.save(folder / "clothes.int8.onnx")
        for op, count in quantized_ops(reasons(quantized)).items():
            print(f"{count:3} {op} on integers")

        found = nestc.evaluate(quantized, folder / "judge.npz", labels[100:], against=model)
        assert found.reference is not None
        print(f"top-1 {found.value:.2%}, in float {found.reference.value:.2%}, on {found.samples} images")
        print(f"{found.disagreements} images are decided otherwise")
        sizes = {
            what: nestc.compile(each).stats()["weights_bytes"] for what, each in (("float", model), ("int8", quantized))
        }
        print(", ".join(f"{what}: {size / 1024:.0f} KiB of packed weights" for what, size in sizes.items()))


if __name__ == "__main__":
    main()
