"""Operations and bytes of single nodes, by definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nestc.graph.region import Op, Region, TensorType
from nestc.report.work import numbers, operations, work


def node(kind: str, *shapes: tuple[int, ...], out: tuple[int, ...], **attributes: Any) -> int | None:
    """Operations of a node with inputs of these shapes."""
    names = tuple(f"i{number}" for number in range(len(shapes)))
    types = {name: TensorType("float32", shape) for name, shape in zip(names, shapes, strict=True)}
    types["o"] = TensorType("float32", out)
    return operations(Op(kind, names, ("o",), attributes), types)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (node("Conv", (1, 3, 8, 8), (4, 3, 3, 3), out=(1, 4, 6, 6)), 2 * 4 * 36 * 27),
        (node("Conv", (1, 8, 8, 8), (8, 1, 3, 3), out=(1, 8, 6, 6), group=8), 2 * 8 * 36 * 9),
        (node("ConvTranspose", (1, 3, 4, 4), (3, 2, 2, 2), out=(1, 2, 8, 8)), 2 * 3 * 16 * 8),
        (node("Gemm", (2, 4), (4, 3), out=(2, 3)), 2 * 6 * 4),
        (node("Gemm", (4, 2), (4, 3), out=(2, 3), transA=1), 2 * 6 * 4),
        (node("MatMul", (5, 2, 4), (4, 3), out=(5, 2, 3)), 2 * 30 * 4),
        (node("QLinearConv", (1, 3, 8, 8), (), (), (4, 3, 1, 1), (), (), (), (), out=(1, 4, 8, 8)), 2 * 4 * 64 * 3),
        (node("LSTM", (7, 1, 10), (1, 20, 10), (1, 20, 5), out=(7, 1, 1, 5)), 2 * 7 * (200 + 100)),
        (node("Attention", (2, 6, 8), (2, 9, 8), (2, 9, 8), out=(2, 6, 8)), 2 * 2 * 6 * 9 * 16),
        (node("Attention", (2, 4, 6, 8), (2, 4, 9, 8), (2, 4, 9, 5), out=(2, 4, 6, 5)), 2 * 2 * 4 * 6 * 9 * 13),
        (node("MaxPool", (1, 2, 4, 4), out=(1, 2, 2, 2), kernel_shape=(2, 2)), 8 * 4),
        (node("ReduceMean", (2, 8), out=(2,)), 16),
        (node("Softmax", (2, 8), out=(2, 8)), 80),
        (node("Add", (2, 8), (8,), out=(2, 8)), 16),
        (node("Sum", (2, 8), (8,), (8,), out=(2, 8)), 32),
        (node("Transpose", (2, 8), out=(8, 2)), 0),
        (node("QuantizeLinear", (2, 8), (), out=(2, 8)), 0),
        (node("Relu", (2, -1), out=(2, -1)), None),
        (node("NonMaxSuppression", (1, 4, 4), out=(3, 3)), None),
    ],
)  # fmt: skip
def test_operations(found: int | None, wanted: int | None) -> None:
    assert found == wanted


def test_an_operator_of_another_domain_is_not_counted() -> None:
    types = {"x": TensorType("float32", (2,)), "y": TensorType("float32", (2,))}
    assert operations(Op("Relu", ("x",), ("y",), domain="com.example"), types) is None


def quantized(dtype: str = "int8") -> Region:
    """A Gemm of quantized operands, as regions hold them."""
    types = {
        "x": TensorType(dtype, (2, 4)), "s": TensorType("float32", ()), "xf": TensorType("float32", (2, 4)),
        "w": TensorType("int8", (4, 3)), "wf": TensorType("float32", (4, 3)), "y": TensorType("float32", (2, 3)),
    }  # fmt: skip
    ops = (
        Op("DequantizeLinear", ("x", "s"), ("xf",)),
        Op("DequantizeLinear", ("w", "s"), ("wf",)),
        Op("Gemm", ("xf", "wf"), ("y",)),
    )
    return Region("r", "Gemm", ops, ("x", "w"), ("y",), types, {"s": lambda: np.float32(1)})


def test_a_region_computes_with_the_numbers_before_they_are_widened() -> None:
    assert numbers(quantized()) == numbers(quantized("uint8")) == "int8"


def test_an_input_may_be_a_weight_that_the_stored_graph_leaves_out() -> None:
    found = work(quantized(), weights={"w"})
    assert (found.operations, found.bytes_in, found.bytes_out, found.weights) == (48, 8, 24, 12 + 4)
    assert found.bytes == 48
    assert work(quantized()).bytes_in == 8 + 12


def test_a_value_that_is_no_tensor_has_no_bytes() -> None:
    region = quantized("string")
    assert work(region).bytes_in is None and work(region).bytes is None
