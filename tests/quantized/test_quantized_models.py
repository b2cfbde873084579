"""Whole networks that ONNX Runtime has quantized: every quantized tensor is what ONNX Runtime makes of it.

Compared with ONNX Runtime as it runs by default (with integer kernels), or operator by operator where that computes
something else: its softmax of bytes goes by a table of rounded exponentials, and for 16 bits it has no integer kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from quantized_nets import cut, exported, exposed, feeds, quantized, reference

import nestc
from nestc.graph import pipeline
from nestc.graph.regions import form, regions

STATIC: dict[str, dict[str, Any]] = {
    "u8s8": {"kind": "QDQ"},
    "u8s8 per tensor": {"kind": "QDQ", "per_channel": False},
    "u8u8": {"kind": "QDQ", "weights": "QUInt8", "per_channel": False},
    "s8s8": {"kind": "QDQ", "activations": "QInt8"},
    "s8s8 symmetric": {"kind": "QDQ", "activations": "QInt8", "symmetric": True},
    "u16s8": {"kind": "QDQ", "activations": "QUInt16"},
    "u8s4": {"kind": "QDQ", "weights": "QInt4"},
    "operators u8s8": {"kind": "QOperator"},
    "operators u8u8": {"kind": "QOperator", "weights": "QUInt8", "per_channel": False},
}
WIDE = {"u16s8"}


TEXT = ("u8s8", "s8s8 symmetric", "u16s8", "operators u8s8")


@pytest.mark.parametrize(("net", "name"), [*(("vision", name) for name in STATIC), *(("text", name) for name in TEXT)])
def test_quantized_tensors(net: str, name: str, tmp_path: Path) -> None:
    proto = quantized(net, tmp_path, **STATIC[name])
    inputs = feeds(proto, 0)
    literal = name in WIDE or (net == "text" and STATIC[name]["kind"] == "QDQ")
    model, given = cut(proto, reference(exposed(proto), inputs, literal))
    expected = reference(model, {**inputs, **given}, literal)
    found = nestc.compile(model).run({**inputs, **given})
    check(expected, found, at_least=12, equal=0.9 if name in WIDE else 0.99)


def check(expected: dict[str, np.ndarray], found: dict[str, np.ndarray], at_least: int, equal: float = 0.99) -> None:
    """Integers at most one apart, and this share of them equal; 16 bits are as fine as the rounding of float32."""
    integers = [key for key, value in expected.items() if value.dtype.kind in "iu"]
    assert len(integers) >= at_least
    for key in integers:
        assert (found[key].dtype, found[key].shape) == (expected[key].dtype, expected[key].shape)
        apart = np.abs(expected[key].astype(np.int64) - found[key].astype(np.int64))
        assert apart.max() <= 1, key
        assert (apart == 0).mean() >= equal, key


def test_a_graph_that_quantizes_its_float_weights() -> None:
    proto = exported()
    inputs = feeds(proto, 0)
    expected = reference(exposed(proto), inputs, literal=True)
    check(expected, nestc.compile(exposed(proto)).run(inputs), at_least=5)
    compiled = nestc.compile(proto)
    for seed in range(4):
        inputs = feeds(proto, seed)
        wanted, found = reference(proto, inputs, literal=True)["y"], compiled.run(inputs)["y"]
        np.testing.assert_allclose(found, wanted, atol=0.01 * np.abs(wanted).max())
        assert found.argmax() == wanted.argmax()
    all_integers(proto)


@pytest.mark.parametrize("name", ["u8s8", "operators u8u8"])
def test_decisions(name: str, tmp_path: Path) -> None:
    proto = quantized("vision", tmp_path, **STATIC[name])
    compiled = nestc.compile(proto)
    for seed in range(4):
        inputs = feeds(proto, seed)
        expected, found = reference(proto, inputs)["y"], compiled.run(inputs)["y"]
        assert expected.argmax() == found.argmax()
        np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("net", ["vision", "text"])
@pytest.mark.parametrize("name", ["u8s8", "s8s8", "operators u8s8"])
def test_between_integers_nothing_is_float(net: str, name: str, tmp_path: Path) -> None:
    all_integers(quantized(net, tmp_path, **STATIC[name]))


def all_integers(proto: onnx.ModelProto) -> None:
    """No region reads or writes floats, but the first and the last."""
    model = form(pipeline.optimize(nestc.load(proto)))
    inputs, outputs = set(model.inputs), set(model.outputs)
    for region in regions(model):
        for value in (*region.inputs, *region.outputs):
            assert region.types[value].dtype in ("int8", "uint8") or value in inputs | outputs, region.name


@pytest.mark.parametrize("net", ["vision", "text"])
@pytest.mark.parametrize("weights", ["QUInt8", "QInt8"])
def test_dynamic_quantization(net: str, weights: str, tmp_path: Path) -> None:
    proto = quantized(net, tmp_path, "dynamic", weights=weights, per_channel=weights == "QInt8")
    inputs = feeds(proto, 0)
    # ONNX's own evaluator: ONNX Runtime's products of uint8 and int8 saturate here.
    expected = np.asarray(onnx.reference.ReferenceEvaluator(proto).run(["y"], inputs)[0])
    found = nestc.compile(proto).run(inputs)["y"]
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
