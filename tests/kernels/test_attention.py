"""Attention against the reference evaluator in float64: heads, masks, causality, long and short sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.kernels.attention import ATTENTION
from nestc.kernels.testing import Array, evaluate, host_machine, region_of, run_lowered

MACHINE = host_machine()
Shape = tuple[int, ...]


def sample(shape: Shape, dtype: str = "float32") -> Array:
    return np.random.default_rng([3, *shape]).standard_normal(shape).astype(dtype)


def check(
    q: Shape,
    k: Shape,
    v: Shape,
    mask: Array | None = None,
    *,
    dtype: str = "float32",
    jit: bool = True,
    relu: bool = False,
    tolerance: float = 3e-6,
    **attributes: Any,
) -> None:
    """Compare the lowered node with the reference evaluator."""
    feeds = {"q": sample(q, dtype), "k": sample(k, dtype), "v": sample(v, dtype)}
    if mask is not None:
        feeds["m"] = mask if mask.dtype == bool else mask.astype(dtype)
    nodes = [helper.make_node("Attention", list(feeds), ["y"], "attention", **attributes)]
    if relu:
        nodes.append(helper.make_node("Relu", ["y"], ["z"], "relu"))
    precise = np.float32 if dtype == "float16" else np.float64
    exact = evaluate(nodes, {n: a if a.dtype == bool else a.astype(precise) for n, a in feeds.items()})
    out = nodes[-1].output[0]
    region = region_of(nodes, {n: a if a.dtype == bool else a.astype(dtype) for n, a in exact.items()}, [out])
    assert ATTENTION.refusal(region) is None
    lowered = ATTENTION.lower(region, MACHINE, ATTENTION.layouts(region, MACHINE, {}))
    got = run_lowered(region, lowered, feeds, MACHINE, jit=jit)[out]
    np.testing.assert_allclose(got.astype(np.float64), exact[out], rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=12)
@given(
    length=st.integers(1, 20),
    keys=st.integers(1, 40),
    size=st.integers(1, 20),
    v_size=st.integers(1, 20),
    causal=st.booleans(),
)
def test_any_size(length: int, keys: int, size: int, v_size: int, causal: bool) -> None:
    check((1, 2, length, size), (1, 2, keys, size), (1, 2, keys, v_size), is_causal=int(causal))


@pytest.mark.parametrize("length", [2, 7])
def test_in_the_interpreter(length: int) -> None:
    check((1, 2, length, 5), (1, 2, 9, 5), (1, 2, 9, 6), jit=False)
    check((1, length, 6), (1, 9, 6), (1, 9, 6), jit=False, q_num_heads=2, kv_num_heads=2, is_causal=1, softcap=1.5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_heads_in_one_axis_and_shared_keys(heads: tuple[int, int]) -> None:
    many, few = heads
    attributes: dict[str, Any] = {"q_num_heads": many, "kv_num_heads": few, "scale": 0.3}
    check((2, 5, many * 6), (2, 11, few * 6), (2, 11, few * 10), **attributes)
    check((2, many, 5, 6), (2, few, 11, 6), (2, few, 11, 10), softcap=2.0)


@pytest.mark.parametrize("shape", [(7, 9), (1, 9), (2, 1, 7, 9), (1, 3, 7, 9), (2, 1, 1, 9)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(shape: Shape, kind: str) -> None:
    mask = sample(shape) > -0.5 if kind == "bool" else sample(shape)
    check((2, 3, 7, 5), (2, 3, 9, 5), (2, 3, 9, 6), mask, relu=True)
    if shape[-2:] == (7, 9):  # for masks of one row the reference evaluator forgets which query it is at
        check((2, 3, 7, 5), (2, 3, 9, 5), (2, 3, 9, 6), mask, is_causal=1)


@pytest.mark.parametrize("length", [3, 7])
def test_queries_without_any_key_give_zero(length: int) -> None:
    mask = np.ones((length, 9), bool)
    mask[1] = False
    check((1, 1, length, 5), (1, 1, 9, 5), (1, 1, 9, 6), mask)
    check((1, 1, length, 5), (1, 1, 9, 5), (1, 1, 9, 6), np.where(mask, 0.0, -np.inf))


@pytest.mark.parametrize("causal", [0, 1])
def test_more_keys_than_a_block(causal: int) -> None:
    check((1, 1, 47, 8), (1, 1, 1100, 8), (1, 1, 1100, 12), is_causal=causal)


def test_scores_that_grow_from_block_to_block() -> None:
    mask = np.linspace(-200, 200, 1100)[None, :]
    check((1, 1, 9, 8), (1, 1, 1100, 8), (1, 1, 1100, 8), mask, tolerance=2e-5)
    check((1, 1, 2, 8), (1, 1, 1100, 8), (1, 1, 1100, 8), mask[:, ::-1].copy(), tolerance=2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float16", 2e-3)])
def test_other_dtypes(dtype: str, tolerance: float) -> None:
    check((1, 2, 7, 5), (1, 2, 9, 5), (1, 2, 9, 6), sample((7, 9)), dtype=dtype, tolerance=tolerance)
    check((1, 2, 2, 5), (1, 2, 9, 5), (1, 2, 9, 6), dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize(
    ("inputs", "outputs", "attributes", "reason"),
    [
        (["q", "k", "v", "", "k", "v"], ["y"], {}, "past keys"),
        (["q", "k", "v"], ["y", "", "", "k2"], {}, "also gives the scores"),
        (["q", "k", "v"], ["y"], {"left_window_size": 2}, "sliding window"),
        (["q", "k", "v", "short"], ["y"], {}, "does not broadcast"),
        (["q", "k", "v", "column"], ["y"], {}, "covers 1 of 7 keys"),
        (["q", "k", "odd"], ["y"], {}, "axes"),
    ],
)
def test_refusals(inputs: list[str], outputs: list[str], attributes: dict[str, Any], reason: str) -> None:
    values = {n: sample((1, 2, 7, 5)) for n in ("q", "k", "v", "y", "k2")}
    values |= {"short": sample((7, 3)), "odd": sample((1, 7, 5)), "column": sample((7, 1))}
    node = helper.make_node("Attention", inputs, outputs, "attention", **attributes)
    assert reason in str(ATTENTION.refusal(region_of([node], values, ["y"])))
