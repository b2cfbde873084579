import numpy as np
import onnx
import onnxruntime as ort

from nestc.demo import CLASSES, INPUT, describe, labelled_images, model_path


def test_the_network_is_small_and_classifies_the_shipped_images() -> None:
    assert model_path().stat().st_size < 1_000_000
    images, labels = labelled_images()
    assert images.shape == (500, 1, 28, 28) and labels.shape == (500,) and set(labels) == set(range(len(CLASSES)))
    assert images.dtype == np.float32 and images.min() == 0 and images.max() == 1
    session = ort.InferenceSession(str(model_path()), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {INPUT: images})
    assert (logits.argmax(1) == labels).mean() == 0.94


def test_the_network_has_what_bigger_ones_have() -> None:
    kinds = {node.op_type for node in onnx.load(str(model_path())).graph.node}
    assert {"Conv", "BatchNormalization", "Relu", "Clip", "Add", "GlobalAveragePool", "Gemm"} <= kinds


def test_the_report_reads_as_text() -> None:
    report = {
        "images": 500, "accuracy": 0.94, "latency_ms": 0.25, "images_per_second": 4000.0, "compile_seconds": 1.5,
        "bundle_bytes": 4096, "load_ms": 3.0,
        "threads": 1, "regions": 12, "kernels": 9, "kernel_calls": 12, "instruction_set": "AVX2 + FMA (x86_64, znver3)",
        "code_bytes": 20480, "weights_bytes": 1024, "arena_bytes": 2048, "fallback_ops": {},
        "partitions": [{"device": "cpu", "regions": 12, "ops": {"Conv": 10}}],
        "examples": [{"image": 0, "said": "coat", "is": "shirt"}],
        "int8": {"accuracy": 0.935, "float_accuracy": 0.9375, "images": 400, "disagreements": 3, "calibrated_on": 100,
                 "quantize_seconds": 4.2, "latency_ms": 0.125, "weights_bytes": 512, "arena_bytes": 1024},
    }  # fmt: skip
    text = "\n".join(describe(report))
    for part in (
        "94.0 %",
        "0.250 ms",
        "9 kernels for 12 regions",
        "AVX2 + FMA",
        "Conv 10",
        "coat (it is: shirt)",
        "93.5 % of 400",
        "3 decided differently",
        "0.125 ms",
    ):
        assert part in text
