from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from nestc.demo import CLASSES, INPUT, describe, labelled_images, model_path
from nestc.demo.rows import Row, energy_of
from nestc.demo.text import table


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


ROW = Row(
    name="vta + cpu", scheme="devices", objective=None, images=100, accuracy=0.96, agreement=0.99, latency_ms=0.98,
    latency_kind="modelled", images_per_second=1123.0, throughput_kind="modelled", millijoules=1.5,
    energy_kind="estimated", regions={"cpu": 2, "vta": 12}, predicted_ms=None, lower_bound_ms=None, optimal=None,
    compile_seconds=1.0,
)  # fmt: skip


def test_a_table_aligns_its_columns_and_names_the_kind_of_every_figure() -> None:
    other = replace(ROW, name="cpu", scheme="float", latency_kind="measured", latency_ms=12.5)
    lines = table([other.to_json(), replace(ROW, objective="energy", millijoules=None).to_json()])
    assert lines[1].split("  ")[0] == "cpu" and lines[2].startswith("vta + cpu, for energy  devices")
    assert "12.500 ms measured" in lines[1] and "1123 /s modelled" in lines[1] and "1.500 mJ estimated" in lines[1]
    assert "0.980 ms modelled" in lines[2] and "not stated" in lines[2] and lines[2].endswith("cpu 2, vta 12")
    for title in ("format", "accuracy", "latency", "throughput", "energy an image", "regions"):
        column = lines[0].index(title)
        assert all(line[column - 1] == " " and line[column] != " " for line in lines[1:3])
    assert not any("placed by cost" in line for line in table([other.to_json()]))


def test_a_sum_of_energies_is_as_certain_as_its_least_certain_part() -> None:
    cpu = {"device": "cpu", "joules": 2e-3, "kind": "estimated"}
    vta = {"device": "vta", "joules": 1e-3, "kind": "modelled"}
    link = {"device": "cpu->vta", "joules": None, "kind": None}
    assert energy_of([cpu, vta, link]) == (pytest.approx(3e-3), "estimated")
    assert energy_of([vta, link]) == (pytest.approx(1e-3), "modelled")
    assert energy_of([vta, {"device": "cpu", "joules": None, "kind": None}]) == (None, None)
    assert energy_of([link]) == (None, None)


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
        "rows": [ROW.to_json(), replace(ROW, objective="energy", millijoules=None, energy_kind=None).to_json()],
        "page": "report.html",
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
