"""Loops of known length become plain nodes with the same results; others stay."""

from __future__ import annotations

import numpy as np
import pytest
from graph_support import assert_same, feeds, parse, run

from nestc.graph import pipeline

UNROLLED = {
    "a Loop with a state and scan outputs": """
        g (float[2,3] x) => (float[2,3] y, float[4,2,3] all) {
            n = Constant<value_int = 4>()  w = Constant<value_float = 0.5>()
            y, all = Loop (n, , x) <body = b (int64 i, bool c, float[2,3] a) => (bool go, float[2,3] d, float[2,3] e) {
                f = Cast<to = 1>(i)  d = Mul(a, w)  e = Add(a, f)  go = Identity(c) }> }""",
    "a Loop in a Loop": """
        g (float[3] x) => (float[3] y) {
            n = Constant<value_int = 3>()  m = Constant<value_int = 2>()
            y = Loop (n, , x) <body = b (int64 i, bool c, float[3] a) => (bool go, float[3] d) {
                d = Loop (m, , a) <body = b2 (int64 j, bool c2, float[3] a2) => (bool go2, float[3] d2) {
                    k = Add(i, j)  f = Cast<to = 1>(k)  d2 = Add(a2, f)  go2 = Identity(c2) }>
                go = Identity(c) }> }""",
    "a Scan along other axes, backwards": """
        g (float[3] s, float[3,4] x) => (float[3] y, float[3,4] all) {
            y, all = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1],
                scan_output_axes = [1], scan_output_directions = [1],
                body = b (float[3] a, float[3] r) => (float[3] d, float[3] e) { d = Add(a, r)  e = Mul(a, r) }> (s, x) }""",
}
LOOPS = {
    "a condition computed in the body": """
        g (float x) => (float y) {
            n = Constant<value_int = 9>()
            y = Loop (n, , x) <body = b (int64 i, bool c, float a) => (bool go, float d) {
                d = Add(a, a)  most = Constant<value_float = 4.5>()  go = Less(d, most) }> }""",
    "too many steps": """
        g (float x) => (float y) {
            n = Constant<value_int = 100000>()
            y = Loop (n, , x) <body = b (int64 i, bool c, float a) => (bool go, float d) {
                d = Neg(a)  go = Identity(c) }> }""",
}


@pytest.mark.parametrize("what", UNROLLED)
def test_unrolled(what: str) -> None:
    model = parse(UNROLLED[what])
    unrolled = pipeline.optimize(model)
    assert not {"Loop", "Scan"} & {node.op_type for node in unrolled.ir.graph}
    assert all(
        value.shape is not None and value.shape.is_static() for node in unrolled.ir.graph for value in node.outputs
    )
    assert_same(run(model, inputs := feeds(model)), run(unrolled, inputs))


@pytest.mark.parametrize("what", LOOPS)
def test_left_alone(what: str) -> None:
    model = parse(LOOPS[what])
    optimized = pipeline.optimize(model)
    assert [node.op_type for node in optimized.ir.graph].count("Loop") == 1
    inputs = {"x": np.array(0.5, np.float32)}
    assert_same(run(model, inputs), run(optimized, inputs))
