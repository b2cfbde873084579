"""Send a stream of requests through a network that is spread over devices, and watch who works when.

python examples/watch_pipeline.py                # writes pipeline.json, for ui.perfetto.dev or chrome://tracing
"""

from __future__ import annotations

import sys
from collections import Counter

import nestc
from nestc.demo import CLASSES, INPUT, labelled_images, model_path

REQUESTS = 12


def main() -> None:
    """Quantize for the devices, pipeline, print a timeline, write a trace."""
    images, _ = labelled_images()
    model = nestc.load(model_path(), shapes={INPUT: [1, *images.shape[1:]]})
    samples = [{INPUT: image[None]} for image in images[:50]]
    profile = nestc.calibrate(model, samples)
    quantized = nestc.quantize(model, profile, "devices", data=samples, targets=["vta", "aim", "cpu"])

    # In the order of the targets: vta takes what it can, aim of the rest, so that all of them have work.
    network = nestc.compile(quantized, ["vta", "aim", "cpu"], placement="order")

    # Results come in the order of the requests, with up to four of them at work at once, on different devices.
    requests = (image[None] for image in images[100 : 100 + REQUESTS])
    said = Counter(CLASSES[int(logits.argmax())] for logits in network.map(requests, in_flight=4))
    print(", ".join(f"{count} x {what}" for what, count in said.most_common()))

    # Simulated devices run in modelled time, the CPU in measured time, all on one clock.
    for row in network.timeline():
        if row["request"] < 2:
            where = f"request {row['request']}  {row['device']:9} {row['region']} ({row['kind']})"
            print(f"{row['start_us']:9.1f} to {row['end_us']:9.1f} us  {where}")
    found = network.throughput()
    print(f"{found['per_second']:.0f} requests a second ({found['kind']})")
    for part in network.energy():
        if part["joules"] is not None:
            print(f"{part['device']:9} {part['joules'] * 1e3 / REQUESTS:.3f} mJ a request ({part['kind']})")

    trace = sys.argv[1] if len(sys.argv) > 1 else "pipeline.json"
    network.trace(trace)
    print(f"trace in {trace}")


if __name__ == "__main__":
    main()
