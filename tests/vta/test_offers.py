"""What VTA offers and the reasons that users read."""

from __future__ import annotations

import numpy as np
from layer_nets import PYNQ, Graph, regions
from onnx import TensorProto

from nestc.kernels.generic import SUPPORTED_OPS
from nestc.targets.vta.offers import offers


def test_the_offer_names_scheme_operators_and_cost() -> None:
    (offer,) = offers(PYNQ, lambda region: 1e-3)
    assert offer.quant is not None and offer.quant.scheme == "int8-pow2"
    assert offer.cost is not None
    assert {"Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "Concat", "Flatten"} <= offer.ops
    assert all(rule.reason for rule in offer.where)


def test_a_quantized_region_is_taken() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 8, 4, 4)), -5)
    y = graph.quantize(graph.node("Conv", x, graph.weight((8, 8, 1, 1), -9)), -4)
    (region,) = regions(graph.model(y))
    (offer,) = offers(PYNQ)
    assert offer.refusal(region) is None and all(rule.holds(region) for rule in offer.where)


def test_float_regions_are_told_how_to_get_onto_vta() -> None:
    graph = Graph()
    x = graph.input((1, 8, 4, 4), TensorProto.FLOAT)
    y = graph.node("Conv", x, graph.constant(np.ones((8, 8, 1, 1), np.float32)))
    (region,) = regions(graph.model(y, dtype=TensorProto.FLOAT))
    (offer,) = offers(PYNQ)
    reason = offer.refusal(region)
    assert reason == "its values are float32, and VTA computes on int8: quantize with scheme int8-pow2"
    assert not offer.where[0].holds(region)


def test_values_that_are_not_quantized_are_named() -> None:
    graph = Graph()
    x = graph.real(graph.input((1, 8, 4, 4)), -5)
    y = graph.node("Conv", x, graph.weight((8, 8, 1, 1), -9))
    (region,) = regions(graph.model(y, dtype=TensorProto.FLOAT))
    (offer,) = offers(PYNQ)
    assert f"its result {y!r} is float32, not quantized" in str(offer.refusal(region))

    graph = Graph()
    y = graph.quantize(graph.input((1, 8, 4, 4), TensorProto.FLOAT), -4)
    (region,) = regions(graph.model(y))
    assert "value 'x0' is float32, not quantized" in str(offer.refusal(region))


def test_every_operator_of_the_offer_is_one_the_compiler_knows() -> None:
    (offer,) = offers(PYNQ)
    anchors = {"Conv", "Gemm", "MatMul", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}
    assert offer.ops - anchors <= SUPPORTED_OPS
