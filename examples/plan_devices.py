"""Place a network on several devices, see why each part is where it is, change the plan by hand, and run that.

python examples/plan_devices.py                  # cpu, and the simulated accelerators vta and aim
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nestc
from nestc.demo import INPUT, labelled_images, model_path

DEVICES = ["vta", "aim", "cpu"]


def main() -> None:
    """Quantize for the devices, place for each objective, then move one region by hand."""
    images, labels = labelled_images()
    model = nestc.load(model_path(), shapes={INPUT: [1, *images.shape[1:]]})
    samples = [{INPUT: image[None]} for image in images[:50]]

    # Each node gets the number format of a device that would take it: int8 for vta, bfloat16 for aim.
    profile = nestc.calibrate(model, samples)
    quantized = nestc.quantize(model, profile, "devices", data=samples, targets=DEVICES)

    # Times on the CPU are measured (once: they are kept), those of simulated devices modelled.
    for objective in ("latency", "energy"):
        network = nestc.compile(quantized, DEVICES, objective=objective)
        plan = network.plan
        print(f"for {objective}: {plan.predicted_ms:.3f} ms, {plan.predicted_mj:.3f} mJ predicted")
        for part in plan.partitions:
            print(f"  {part.name} on {part.device}: {len(part.regions)} regions")

    with tempfile.TemporaryDirectory() as folder:
        # A plan is a text that can be read and edited: here a convolution moves back from vta to the CPU.
        path = Path(folder) / "plan.yaml"
        plan.save(path)
        moved = next(region for region in plan.regions if region.device == "vta")
        text = path.read_text(encoding="utf-8").splitlines()
        where = next(number for number, line in enumerate(text) if moved.name in line)
        device = next(number for number in range(where, len(text)) if "device: vta" in text[number])
        text[device] = text[device].replace("vta", "cpu")
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        print(f"{moved.name}: {moved.reason}; moved to the CPU by hand")
        network = nestc.compile(quantized, DEVICES, plan=path)

    right = sum(int(network(image[None]).argmax()) == label for image, label in zip(images[50:70], labels[50:70]))
    print(f"{right} of 20 images right")


if __name__ == "__main__":
    main()
