"""Fully connected layers with one row of input: how fast their weights stream from memory, in each number format.

    python benchmarks/streams.py
    python benchmarks/streams.py --layers 4096x4096,4096x11008 --threads 1

Such a layer uses each weight once, so memory limits it. Each reading is of one layer in each format, in turns with a
plain sum of as many bytes of float32 (numpy, one thread a share), which is what memory gives to simple code at that
moment; all layers together are larger than the caches. GB/s counts weights as they are stored, scales included.
onnxruntime runs the float32 layer beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, save

import nestc
from nestc.measure.machine import pinned

FORMATS = {"fp32": None, "bf16": "bf16", "int8": "weight-int8", "int4": "weight-int4"}


def layer(folder: Path, inputs: int, outputs: int) -> str:
    """A model of one MatMul of a vector with constant weights."""
    weights = np.random.default_rng(0).standard_normal((inputs, outputs)).astype(np.float32) / np.float32(inputs**0.5)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs])],
        [numpy_helper.from_array(weights, "w")],
    )
    path = folder / f"{inputs}x{outputs}.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


def summing(array: np.ndarray, threads: int) -> Callable[[], object]:
    """A sum of `array`, cut in as many shares as threads."""
    shares = np.array_split(array, threads)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.sum, shares))


def main() -> None:
    """Parse the options and print a line a layer and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4096x4096,4096x11008,25088x4096", help="INPUTSxOUTPUTS, by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--json", action="store_true", help="print one JSON object (GB/s) instead of the lines")
    options = parser.parse_args()
    told: dict[str, dict[str, float]] = {}
    with pinned(options.threads), tempfile.TemporaryDirectory() as folder:
        for text in options.layers.split(","):
            inputs, outputs = (int(part) for part in text.split("x"))
            path = layer(Path(folder), inputs, outputs)
            x = np.random.default_rng(1).standard_normal((1, inputs)).astype(np.float32)
            calls: dict[str, tuple[Callable[[], object], int]] = {}
            for name, scheme in FORMATS.items():
                model = nestc.load(path) if scheme is None else nestc.quantize(path, None, scheme)
                made = nestc.compile(model, targets=["cpu"], threads=options.threads)
                calls[name] = (lambda made=made, x=x: made(x)), made.stats()["weights_bytes"]
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = options.threads
            session = onnxruntime.InferenceSession(path, settings)
            calls["onnxruntime fp32"] = (lambda x=x, run=session.run: run(None, {"x": x})), 4 * inputs * outputs
            bytes_ = max(4 * inputs * outputs, 1 << 27)
            calls["sum"] = summing(np.ones(bytes_ // 4, np.float32), options.threads), bytes_
            rates: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(options.runs + 1):
                for name, (call, nbytes) in calls.items():
                    begin = time.perf_counter()
                    call()
                    if turn:
                        rates[name].append(nbytes / (time.perf_counter() - begin) / 1e9)
            medians = told[text] = {name: statistics.median(rates[name]) for name in calls}
            if options.json:
                continue
            sums = medians["sum"]
            print(f"{text}, {options.threads} thread(s): plain sum {sums:.1f} GB/s")
            for name, (_, nbytes) in calls.items():
                rate = medians[name]
                ms, of_sum = nbytes / rate / 1e6, rate / sums
                print(f"  {name:18} {nbytes / 1e6:8.1f} MB {ms:9.3f} ms {rate:6.1f} GB/s {of_sum:5.2f} of the sum")
    if options.json:
        print(json.dumps(told))


if __name__ == "__main__":
    main()
