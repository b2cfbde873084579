"""Each pass on a small graph: what it becomes, and that ONNX Runtime computes the same before and after."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from graph_support import assert_same, feeds, parse, run, text

from nestc.graph.infer_shapes import InferShapes
from nestc.graph.passes.affine_convolutions import AffineToConvolution, ConvolutionToAffine
from nestc.graph.passes.cancel import Cancel
from nestc.graph.passes.fold_affine import FoldAffine, LowerBatchNormalization
from nestc.graph.passes.fold_constants import FoldConstants, LiftConstants
from nestc.graph.passes.fuse_activation import FuseActivation
from nestc.graph.passes.fuse_attention import FuseAttention
from nestc.graph.passes.fuse_normalization import FuseNormalization
from nestc.graph.passes.fuse_pad import FusePad
from nestc.graph.passes.own_outputs import OwnOutputs
from nestc.graph.passes.rewrite import Rewrite
from nestc.graph.passes.simplify import Simplify
from nestc.graph.passes.sink import Sink

RANDOM = np.random.default_rng(7)


def weight(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


@dataclass
class Case:
    """A graph, the pass, and the text of the graph after it (`same`: the pass must leave it alone)."""

    name: str
    step: type[Rewrite]
    graph: str
    after: str = ""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    same: bool = False


NORM = {name: np.array([value], np.float32) for name, value in (("s", 2.0), ("b", 1.0), ("m", 0.5), ("v", 3.0))}
CHANNEL = {"w": np.ones((1, 1, 1, 1), np.float32), **NORM}

PAIR = np.array([1, 3], np.float32)
PAIRS = {
    "p": PAIR,
    "q": PAIR[::-1].copy(),
    "other": np.array([2, 1], np.float32)[:, None, None],
    "t": np.float32([2.0]),
    "column": PAIR[:, None, None],
    "w": PAIR[:, None, None, None],
}
"""Constants that differ between two channels, and one that does not."""

CASES = [
    Case(
        "no-ops go",
        Simplify,
        """g (float[2,3] x) => (float[2,3] y) {
            a = Identity(x)  c = Cast<to=1>(a)  t = Transpose<perm=[0,1]>(c)  d = Dropout(t)
            one = Constant<value_float=1.0>()
            m = Mul(d, one)  k = Concat<axis=0>(m)  y = Relu(k) }""",
        "y = Relu(x)",
    ),
    Case(
        "a transpose that moves only an axis of size one is a view",
        Simplify,
        "g (float[1,3,1,5] x) => (float[3,1,1,5] y) { t = Transpose<perm=[1,0,2,3]>(x)  y = Relu(t) }",
        "t.Reshape = Reshape(x, [3.0, 1.0, 1.0, 5.0])\ny = Relu(t.Reshape)",
    ),
    Case(
        "padding of nothing goes, but padding that cuts stays",
        Simplify,
        """g (float[4] x) => (float[4] y) {
            p = Constant<value=int64[2] {0,0}>()  q = Constant<value=int64[2] {1,-1}>()
            a = Pad(x, p)  y = Pad(a, q) }""",
        "y = Pad(x, [1.0, -1.0])",
    ),
    Case(
        "a sum of two is Add",
        Simplify,
        "g (float[4] x) => (float[4] y) { y = Sum(x, x) }",
        "y = Add(x, x)",
    ),
    Case(
        "a softmax between views",
        Simplify,
        """g (float[2,3,4] x) => (float[2,3,4] y) {
            a = Flatten<axis=2>(x)  b = Softmax(a)  s = Constant<value=int64[3] {2,3,4}>()  y = Reshape(b, s) }""",
        "y = Softmax(x) {axis=-1}",
    ),
    Case(
        "transposes that undo each other go",
        Cancel,
        """g (float[2,3,4] x) => (float[2,3,4] y) {
            a = Transpose<perm=[2,0,1]>(x)  b = Transpose<perm=[1,2,0]>(a)  y = Relu(b) }""",
        "y = Relu(x)",
    ),
    Case(
        "transposes merge",
        Cancel,
        """g (float[2,3,4] x) => (float[4,3,2] y) {
            a = Transpose<perm=[2,0,1]>(x)  y = Transpose<perm=[0,2,1]>(a) }""",
        "y = Transpose(x) {perm=(2, 1, 0)}",
    ),
    Case(
        "views merge",
        Cancel,
        """g (float[2,3,4] x) => (float[6,4] y) {
            a = Flatten(x)  s = Constant<value=int64[2] {6,4}>()  y = Reshape(a, s) }""",
        "y = Reshape(x, [6.0, 4.0])",
    ),
    Case(
        "a lossless cast is skipped, a lossy one is not",
        Cancel,
        """g (float16[3] x, float[3] z) => (double[3] y, float[3] u) {
            a = Cast<to=1>(x)  y = Cast<to=11>(a)  b = Cast<to=10>(z)  u = Cast<to=1>(b) }""",
        "y = Cast(x) {to=11}\nb = Cast(z) {to=10}\nu = Cast(b) {to=1}",
    ),
    Case(
        "Relu and Clip become one Clip",
        Cancel,
        """g (float[3] x) => (float[3] y) {
            l = Constant<value_float=-1.0>()  h = Constant<value_float=6.0>()  a = Relu(x)  y = Clip(a, l, h) }""",
        "y = Clip(x, 0.0, 6.0)",
    ),
    Case(
        "a transpose sinks below a bias and an activation",
        Sink,
        """g (float[1,2,3,4] x) => (float[1,3,4,2] y) {
            t = Transpose<perm=[0,2,3,1]>(x)  a = Add(t, b)  y = Relu(a) }""",
        "a.Add = Add(x, [[[[1.0]], [[2.0]]]])\ny.Relu = Relu(a.Add)\ny = Transpose(y.Relu) {perm=(0, 2, 3, 1)}",
        {"b": np.array([1, 2], np.float32)},
    ),
    Case(
        "transposes sink below a residual sum and a concatenation",
        Sink,
        """g (float[1,2,3] x, float[1,2,3] z) => (float[1,3,4] y) {
            a = Transpose<perm=[0,2,1]>(x)  b = Transpose<perm=[0,2,1]>(z)  s = Add(a, b)
            c = Transpose<perm=[0,2,1]>(z)  y = Concat<axis=2>(s, c) }""",
        "s.Add = Add(x, z)\ny.Concat = Concat(s.Add, z) {axis=1}\ny = Transpose(y.Concat) {perm=(0, 2, 1)}",
    ),
    Case(
        "a transpose sinks below a mean over space",
        Sink,
        """g (float[1,2,3,4] x) => (float[1,2] y) {
            k = Constant<value=int64[2] {1,2}>()  t = Transpose<perm=[0,2,3,1]>(x)
            y = ReduceMean<keepdims=0>(t, k) }""",
        "y = ReduceMean(x, [2.0, 3.0]) {keepdims=0}",
    ),
    Case(
        "a view sinks below an activation",
        Sink,
        "g (float[2,3,4] x) => (float[2,12] y) { a = Flatten(x)  y = Relu(a) }",
        "y.Relu = Relu(x)\ny = Reshape(y.Relu, [2.0, 12.0])",
    ),
    Case(
        "a batch normalization goes into the convolution before it",
        FoldAffine,
        """g (float[1,1,2,2] x) => (float[1,1,2,2] y) {
            c = Conv(x, w)  y = BatchNormalization<epsilon=1.0>(c, s, b, m, v) }""",
        "y = Conv(x, [[[[1.0]]]], [0.5])",
        CHANNEL,
    ),
    Case(
        "a batch normalization goes into an unpadded convolution after it",
        FoldAffine,
        """g (float[1,1,2,2] x) => (float[1,1,2,2] y) {
            c = BatchNormalization<epsilon=1.0>(x, s, b, m, v)  y = Conv(c, w) }""",
        "y = Conv(x, [[[[1.0]]]], [0.5])",
        CHANNEL,
    ),
    Case(
        "a shift does not go into a padded convolution",
        FoldAffine,
        """g (float[1,1,2,2] x) => (float[1,1,4,4] y) {
            c = BatchNormalization<epsilon=1.0>(x, s, b, m, v)  y = Conv<pads=[1,1,1,1]>(c, w) }""",
        weights=CHANNEL,
        same=True,
    ),
    Case(
        "a value that others use is not folded away",
        FoldAffine,
        """g (float[1,1,2,2] x) => (float[1,1,2,2] y, float[1,1,2,2] z) {
            c = Conv(x, w)  y = BatchNormalization(c, s, b, m, v)  z = Relu(c) }""",
        weights=CHANNEL,
        same=True,
    ),
    Case(
        "a bias goes into a transposed convolution, factor and divisor too",
        FoldAffine,
        """g (float[1,1,2,2] x) => (float[1,1,2,2] y) {
            two = Constant<value_float=2.0>()  c = ConvTranspose(x, w)  d = Add(c, two)  e = Mul(two, d)
            f = Div(e, two)  y = Sub(f, two) }""",
        "y = ConvTranspose(x, [[[[1.0]]]], [0.0])",
        CHANNEL,
    ),
    Case(
        "a scale goes into Gemm, with its beta",
        FoldAffine,
        "g (float[2,2] x) => (float[2,2] y) { a = Gemm<beta=2.0, transB=1>(x, w, c)  y = Mul(a, t) }",
        "y = Gemm(x, [[1.0, 1.0], [3.0, 3.0]], [2.0, 12.0]) {transB=1}",
        {
            "w": np.ones((2, 2), np.float32),
            "c": np.array([1, 2], np.float32),
            "t": np.array([1, 3], np.float32),
        },
    ),
    Case(
        "a batch normalization left over becomes Mul and Add",
        LowerBatchNormalization,
        "g (float[1,1,2,2] x) => (float[1,1,2,2] y) { y = BatchNormalization<epsilon=1.0>(x, s, b, m, v) }",
        "y.Mul = Mul(x, [[[1.0]]])\ny = Add(y.Mul, [[[0.5]]])",
        NORM,
    ),
    Case(
        "a scale and a shift a channel become a depthwise convolution",
        AffineToConvolution,
        """g (float[1,2,2,2] x) => (float[1,2,2,2] y) {
            r = Relu(x)  a = Sub(r, column)  b = Div(a, other)  c = BatchNormalization<epsilon=1.0>(b, p, q, q, p)
            d = Add(t, c)  y = Relu(d) }""",
        "r = Relu(x)\nd.Conv = Conv(r, [[[[0.3536]]], [[[1.5]]]], [2.5251, -3.0]) {group=2}\ny = Relu(d.Conv)",
        PAIRS,
    ),
    Case(
        "a scale without a shift has no bias, and what is read twice stays",
        AffineToConvolution,
        """g (float[1,2,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z) {
            r = Relu(x)  m = Mul(column, r)  y = Add(m, column)  z = Mul(m, x) }""",
        """r = Relu(x)
m.Conv = Conv(r, [[[[1.0]]], [[[3.0]]]]) {group=2}
y = Add(m.Conv, [[[1.0]], [[3.0]]])
z = Mul(m.Conv, x)""",
        PAIRS,
    ),
    Case(
        "plain numbers, shifts alone, matrices, inputs and what does not start with the data stay elementwise",
        AffineToConvolution,
        """g (float[1,2,2,2] x, float[3,2] u) => (float[1,2,2,2] y, float[1,2,2,2] z, float[3,2] v, float[1,2,2,2] k) {
            r = Relu(x)  m = Mul(r, t)  y = Add(m, column)  z = Sub(column, r)  w1 = Relu(u)  v = Mul(w1, p)
            k = Mul(x, column) }""",
        weights=PAIRS,
        same=True,
    ),
    Case(
        "a depthwise convolution of one pixel becomes Mul and Add",
        ConvolutionToAffine,
        """g (float[1,2,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z) {
            y = Conv<group=2>(x, w, p)  z = Conv<group=2, strides=[1,1]>(x, w) }""",
        "y.Mul = Mul(x, [[[1.0]], [[3.0]]])\ny = Add(y.Mul, [[[1.0]], [[3.0]]])\nz = Mul(x, [[[1.0]], [[3.0]]])",
        PAIRS,
    ),
    Case(
        "one with padding, with strides, or that widens, stays",
        ConvolutionToAffine,
        """g (float[1,2,2,2] x, float[1,1,2,2] t) => (float[1,2,4,4] y, float[1,2,1,1] z, float[1,2,2,2] v) {
            y = Conv<group=2, pads=[1,1,1,1]>(x, w)  z = Conv<group=2, strides=[2,2]>(x, w)  v = Conv(t, w) }""",
        weights={"w": np.ones((2, 1, 1, 1), np.float32)},
        same=True,
    ),
    Case(
        "zero padding goes into a convolution",
        FusePad,
        """g (float[1,1,3,3] x) => (float[1,1,6,7] y) {
            p = Constant<value=int64[8] {0,0,1,1,0,0,2,3}>()  a = Pad(x, p)  y = Conv(a, w) }""",
        "y = Conv(x, [[[[1.0]]]]) {pads=(1, 1, 2, 3)}",
        CHANNEL,
    ),
    Case(
        "padding with ones does not",
        FusePad,
        """g (float[1,1,3,3] x) => (float[1,1,5,5] y) {
            one = Constant<value_float=1.0>()  p = Constant<value=int64[8] {0,0,1,1,0,0,1,1}>()
            a = Pad(x, p, one)  y = Conv(a, w) }""",
        weights=CHANNEL,
        same=True,
    ),
    Case(
        "zero padding goes into a mean that counts it",
        FusePad,
        """g (float[1,1,3,3] x) => (float[1,1,4,4] y) {
            p = Constant<value=int64[8] {0,0,1,1,0,0,1,1}>()  a = Pad(x, p)
            y = AveragePool<kernel_shape=[2,2]>(a) }""",
        "y = AveragePool(x) {count_include_pad=1, kernel_shape=(2, 2), pads=(1, 1, 1, 1)}",
    ),
    Case(
        "zero padding goes into a maximum of what is not negative",
        FusePad,
        """g (float[1,1,3,3] x) => (float[1,1,4,4] y) {
            p = Constant<value=int64[8] {0,0,1,1,0,0,1,1}>()  r = Relu(x)  a = Pad(r, p)
            y = MaxPool<kernel_shape=[2,2]>(a) }""",
        "r = Relu(x)\ny = MaxPool(r) {kernel_shape=(2, 2), pads=(1, 1, 1, 1)}",
    ),
    Case(
        "but not into a maximum of anything",
        FusePad,
        """g (float[1,1,3,3] x) => (float[1,1,4,4] y) {
            p = Constant<value=int64[8] {0,0,1,1,0,0,1,1}>()  a = Pad(x, p)  y = MaxPool<kernel_shape=[2,2]>(a) }""",
        same=True,
    ),
    Case(
        "Gelu with erf",
        FuseActivation,
        """g (float[2,64] x) => (float[2,64] y) {
            r = Constant<value_float=1.4142135>()  one = Constant<value_float=1.0>()  h = Constant<value_float=0.5>()
            a = Div(x, r)  e = Erf(a)  p = Add(e, one)  q = Mul(x, h)  y = Mul(q, p) }""",
        "y = Gelu(x)",
    ),
    Case(
        "Gelu with tanh",
        FuseActivation,
        """g (float[2,64] x) => (float[2,64] y) {
            k = Constant<value_float=0.044715>()  s = Constant<value_float=0.7978846>()
            three = Constant<value_float=3.0>()
            one = Constant<value_float=1.0>()  h = Constant<value_float=0.5>()
            c = Pow(x, three)  d = Mul(k, c)  e = Add(x, d)  f = Mul(s, e)  t = Tanh(f)  u = Add(one, t)  v = Mul(x, u)
            y = Mul(h, v) }""",
        "y = Gelu(x) {approximate=tanh}",
    ),
    Case(
        "HardSwish and HardSigmoid",
        FuseActivation,
        """g (float[2,64] x) => (float[2,64] y, float[2,64] z) {
            three = Constant<value_float=3.0>()  zero = Constant<value_float=0.0>()  six = Constant<value_float=6.0>()
            a = Add(x, three)  c = Clip(a, zero, six)  z = Div(c, six)  m = Mul(x, z)  y = Identity(m) }""",
        "z = HardSigmoid(x) {alpha=0.16666666666666666, beta=0.5}\nm = Mul(x, z)\ny = Identity(m)",
    ),
    Case(
        "Mish, Swish and a clamp",
        FuseActivation,
        """g (float[2,64] x) => (float[2,64] y) {
            zero = Constant<value_float=0.0>()  six = Constant<value_float=6.0>()
            a = Softplus(x)  b = Tanh(a)  c = Mul(x, b)  d = Sigmoid(c)  e = Mul(d, c)  f = Max(e, zero)
            y = Min(six, f) }""",
        "c.Mish = Mish(x)\ne.Swish = Swish(c.Mish)\ny = Clip(e.Swish, 0.0, 6.0)",
    ),
    Case(
        "something that looks like Gelu but is not stays",
        FuseActivation,
        """g (float[2,64] x) => (float[2,64] y) {
            r = Constant<value_float=1.5>()  one = Constant<value_float=1.0>()  h = Constant<value_float=0.5>()
            a = Div(x, r)  e = Erf(a)  p = Add(e, one)  q = Mul(x, h)  y = Mul(q, p) }""",
        same=True,
    ),
    Case(
        "layer normalization",
        FuseNormalization,
        """g (float[2,3,4] x) => (float[2,3,4] y) {
            k = Constant<value=int64[1] {-1}>()  e = Constant<value_float=0.001>()  two = Constant<value_float=2.0>()
            m = ReduceMean(x, k)  d = Sub(x, m)  q = Pow(d, two)  v = ReduceMean(q, k)  w = Add(v, e)  r = Sqrt(w)
            n = Div(d, r)  u = Mul(n, s)  y = Add(b, u) }""",
        "y = LayerNormalization(x, [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0])"
        " {axis=-1, epsilon=0.0010000000474974513}",
        {"s": np.array([1, 2, 3, 4], np.float32), "b": np.array([4, 3, 2, 1], np.float32)},
    ),
    Case(
        "RMS normalization without a scale, over two axes",
        FuseNormalization,
        """g (float[2,3,2] x) => (float[2,3,2] y) {
            k = Constant<value=int64[2] {1,2}>()  e = Constant<value_float=0.5>()
            q = Mul(x, x)  v = ReduceMean(q, k)  w = Add(e, v)  r = Sqrt(w)  i = Reciprocal(r)  y = Mul(i, x) }""",
        "y = RMSNormalization(x, [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]) {axis=-2, epsilon=0.5}",
    ),
    Case(
        "a mean over other axes is no layer normalization",
        FuseNormalization,
        """g (float[2,3,4] x) => (float[2,3,4] y) {
            k = Constant<value=int64[1] {1}>()  e = Constant<value_float=0.001>()
            m = ReduceMean(x, k)  d = Sub(x, m)  q = Mul(d, d)  v = ReduceMean(q, k)  w = Add(v, e)  r = Sqrt(w)
            y = Div(d, r) }""",
        same=True,
    ),
    Case(
        "attention with a mask",
        FuseAttention,
        """g (float[1,2,3,4] q, float[1,2,5,4] k, float[1,2,5,6] v, float[3,5] m) => (float[1,2,3,6] y) {
            c = Constant<value_float=0.25>()  t = Transpose<perm=[0,1,3,2]>(k)  a = MatMul(q, t)  s = Mul(a, c)
            b = Add(s, m)  p = Softmax<axis=-1>(b)  y = MatMul(p, v) }""",
        "m.Reshape = Reshape(m, [1.0, 1.0, 3.0, 5.0])\ny = Attention(q, k, v, m.Reshape) {scale=0.25}",
    ),
    Case(
        "attention with one row of mask for all queries",
        FuseAttention,
        """g (float[1,2,3,4] q, float[1,2,4,5] k, float[1,2,5,6] v, float[1,1,1,5] m) => (float[1,2,3,6] y) {
            a = MatMul(q, k)  b = Add(m, a)  p = Softmax<axis=3>(b)  y = MatMul(p, v) }""",
        "k.Transpose = Transpose(k) {perm=(0, 1, 3, 2)}\n"
        "m.Expand = Expand(m, [1.0, 1.0, 3.0, 5.0])\n"
        "y = Attention(q, k.Transpose, v, m.Expand) {scale=1.0}",
    ),
    Case(
        "attention over three axes, scaled on both sides",
        FuseAttention,
        """g (float[2,3,4] q, float[2,4,5] k, float[2,5,6] v) => (float[2,3,6] y) {
            c = Constant<value_float=0.5>()  e = Mul(q, c)  f = Mul(k, c)  a = MatMul(e, f)
            p = Softmax<axis=-1>(a)  y = MatMul(p, v) }""",
        "k.Transpose = Transpose(k) {perm=(0, 2, 1)}\n"
        "q.Reshape = Reshape(q, [1.0, 2.0, 3.0, 4.0])\n"
        "k.Transpose.Reshape = Reshape(k.Transpose, [1.0, 2.0, 5.0, 4.0])\n"
        "v.Reshape = Reshape(v, [1.0, 2.0, 5.0, 6.0])\n"
        "y.Attention = Attention(q.Reshape, k.Transpose.Reshape, v.Reshape) {scale=0.25}\n"
        "y = Reshape(y.Attention, [2.0, 3.0, 6.0])",
    ),
    Case(
        "scores that are given out are not fused away",
        FuseAttention,
        """g (float[1,2,3,4] q, float[1,2,4,5] k, float[1,2,5,6] v) => (float[1,2,3,6] y, float[1,2,3,5] a) {
            a = MatMul(q, k)  p = Softmax<axis=-1>(a)  y = MatMul(p, v) }""",
        same=True,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pass(case: Case) -> None:
    model = parse(case.graph, **case.weights)
    LiftConstants()(model.ir)
    before, shown = run(model, inputs := feeds(model)), text(model)
    notes: list[str] = []
    modified = case.step(notes)(model.ir).modified
    assert text(model) == (shown if case.same else case.after)
    assert modified is not case.same
    assert bool(notes) is modified
    assert_same(before, run(model, inputs))
    assert not case.step()(model.ir).modified  # once is enough


def apply(step: ir.passes.PassBase, graph: str, **weights: np.ndarray) -> str:
    model = parse(graph, **weights)
    before = run(model, inputs := feeds(model))
    step(model.ir)
    assert_same(before, run(model, inputs))
    return text(model)


def test_constants_are_folded_and_a_decided_if_is_replaced_by_its_branch() -> None:
    graph = """g (float[2,3] x) => (float[3,2] y) {
        s = Shape(x)  one = Constant<value=int64[1] {1}>()  n = Gather(s, one)  i = Sub(n, one)
        z = Constant<value=int64[1] {2}>()
        c = Equal(i, z)  k = Squeeze(c)  t = If (k) <
            then_branch = a () => (float[2,3] p) { p = Neg(x) }, else_branch = b () => (float[2,3] q) { q = Abs(x) }>
        to = Concat<axis=0>(n, z)  y = Reshape(t, to) }"""
    assert apply(FoldConstants(), graph) == "t = Neg(x)\ny = Reshape(t, [3.0, 2.0])"


def test_repeated_constants_take_no_memory() -> None:
    model = parse(
        """g (float[1000,1000] x) => (float[1000,1000] y) {
            s = Constant<value=int64[2] {1000,1000}>()  c = ConstantOfShape<value=float[1] {2.5}>(s)  y = Add(x, c) }"""
    )
    LiftConstants()(model.ir)
    FoldConstants()(model.ir)
    (node,) = model.ir.graph
    constant = node.inputs[1]
    assert constant is not None and constant.const_value is not None
    assert constant.const_value.numpy().strides == (0, 0)
    inputs = feeds(model)
    assert_same([inputs["x"] + np.float32(2.5)], run(model, inputs))


def test_folding_does_not_blow_up_the_weights() -> None:
    graph = """g (float[300,300,2] x) => (float[300,300,2] y) {
        s = Constant<value=int64[3] {300,300,1}>()  t = Tile(w, s)  y = Add(x, t) }"""
    model = parse(graph, w=weight(1, 1, 2))
    LiftConstants()(model.ir)
    FoldConstants()(model.ir)
    assert [node.op_type for node in model.ir.graph] == ["Tile", "Add"]


def test_narrow_weights_of_products_stay_narrow() -> None:
    graph = """g (float[2,3] x) => (float[2,3] y, float[3,3] z) {
        u = Cast<to=1>(w)  y = MatMul(x, u)  v = Cast<to=1>(w)  z = Abs(v) }"""
    model = parse(graph, w=weight(3, 3).astype(ml_dtypes.bfloat16))
    FoldConstants()(model.ir)
    assert text(model) == "u = Cast(w) {to=1}\ny = MatMul(x, u)"


def test_common_subexpressions() -> None:
    graph = "g (float[3] x) => (float[3] y) { a = Exp(x)  b = Exp(x)  y = Add(a, b) }"
    assert apply(common.CommonSubexpressionEliminationPass(), graph) == "a = Exp(x)\ny = Add(a, a)"


def test_dead_code() -> None:
    graph = "g (float[3] x) => (float[3] y) { a = Exp(x)  y = Abs(x) }"
    assert apply(common.RemoveUnusedNodesPass(), graph) == "y = Abs(x)"


def test_shapes_are_inferred_through_computed_shapes() -> None:
    graph = """g (float[2,3,4] x) => (float y) {
        s = Shape<end=2>(x)  m = Constant<value=int64[1] {-1}>()  t = Concat<axis=0>(s, m)  a = Reshape(x, t)
        r = MatMul(a, w)  y = Relu(r) }"""
    model = parse(graph, w=weight(4, 70))
    for node in model.ir.graph:
        node.outputs[0].shape = None
    InferShapes()(model.ir)
    shapes = {node.op_type: node.outputs[0].shape for node in model.ir.graph}
    assert shapes["Reshape"] == ir.Shape([2, 3, 4])
    assert shapes["Relu"] == ir.Shape([2, 3, 70])


def test_outputs_that_nothing_computes_get_a_node() -> None:
    model = parse("g (float[2] x) => (float[2] w, float[2] y) { y = Relu(x) }", w=np.array([1, 2], np.float32))
    OwnOutputs()(model.ir)
    assert text(model) == "y = Relu(x)\nw = Identity([1.0, 2.0])"
    assert_same([np.array([1, 2], np.float32)], run(model, feeds(model))[:1])
    assert [value.name for value in model.ir.graph.outputs] == ["w", "y"]
