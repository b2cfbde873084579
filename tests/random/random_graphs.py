"""Random small models of common operators, as ONNX; the shapes are inferred by onnx as the model grows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LARGEST = 6000
"""Elements of a value at the most: what is larger gets no further operators that grow it."""


class Builder:
    """Grows one model from a random generator: every operator takes values that are there already."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, tuple[int, ...]] = {}

    def pick(self, *choices: int) -> int:
        """One of some numbers."""
        return int(self.random.choice(choices))

    def some(self, want: Callable[[tuple[int, ...]], bool]) -> str | None:
        """A value of a shape that fits, rather a late one; None if there is none."""
        names = [name for name, shape in self.values.items() if want(shape)]
        if not names:
            return None
        return names[-1 - min(int(self.random.exponential(1.2)), len(names) - 1)]

    def weight(self, array: np.ndarray) -> str:
        """A new constant."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        """A new constant of normally distributed values."""
        return self.weight((self.random.standard_normal(shape) * scale).astype(np.float32))

    def integers(self, *values: int) -> str:
        """A new constant of one axis of int64."""
        return self.weight(np.array(values, np.int64))

    def add(self, op: str, inputs: list[str], outputs: int = 1, **attributes: object) -> None:
        """A node, if its results are of a modest size; shapes are inferred."""
        names = [f"v{len(self.values)}_{i}" for i in range(outputs)]
        node = helper.make_node(op, inputs, names, name=f"{op}_{len(self.nodes)}", **attributes)
        known = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, self.values[n]) for n in inputs if n in self.values
        ]
        weights = [w for w in self.weights if w.name in inputs]
        results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names]
        graph = helper.make_graph([node], "g", known, results, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        shapes = [tuple(d.dim_value for d in info.type.tensor_type.shape.dim) for info in inferred.graph.output]
        if all(0 < np.prod(shape) <= LARGEST for shape in shapes):
            self.nodes.append(node)
            self.values.update(zip(names, shapes, strict=True))

    def model(self) -> onnx.ModelProto:
        """What nobody reads, and one value more, are the outputs."""
        read = {name for node in self.nodes for name in node.input}
        given = [name for name in self.values if name not in read]
        inner = [name for name in self.values if name in read and name not in self.inputs]
        given += [inner[len(inner) // 2]] if inner else []
        used = [weight for weight in self.weights if weight.name in read]
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in self.inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, self.values[name]) for name in given],
            used,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def _image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4


def _conv(b: Builder) -> None:
    x = b.some(_image)
    if x is None:
        return
    _, c, h, w = b.values[x]
    groups = b.pick(1, 1, 1, c)
    kernel = [b.pick(1, 3, 3, 5), b.pick(1, 3, 3)]
    dilation = b.pick(1, 1, 2)
    pad = [b.pick(0, 1, 2), b.pick(0, 1)] * 2
    if any(n + 2 * p < dilation * (k - 1) + 1 for n, p, k in zip((h, w), pad, kernel)):
        return
    out = groups * b.pick(1, 1, 2) if groups > 1 else b.pick(1, 3, 8, 12, 16, 20)
    weight = b.normal(out, c // groups, *kernel, scale=(c // groups * kernel[0] * kernel[1]) ** -0.5)
    bias = [b.normal(out)] if b.pick(0, 1) else []
    b.add(
        "Conv",
        [x, weight, *bias],
        group=groups,
        kernel_shape=kernel,
        pads=pad,
        strides=[b.pick(1, 1, 2), b.pick(1, 1, 2)],
        dilations=[dilation, dilation],
    )


def _conv_transpose(b: Builder) -> None:
    x = b.some(_image)
    if x is None:
        return
    c = b.values[x][1]
    out, k = b.pick(1, 4, 7, 8), b.pick(2, 3, 4)
    b.add(
        "ConvTranspose", [x, b.normal(c, out, k, k, scale=c**-0.5)], strides=[b.pick(1, 2)] * 2, pads=[b.pick(0, 1)] * 4
    )


def _pool(b: Builder) -> None:
    x = b.some(_image)
    if x is None or min(b.values[x][2:]) < 3:
        return
    op = ["MaxPool", "AveragePool"][b.pick(0, 1)]
    more = {} if op == "MaxPool" else {"count_include_pad": b.pick(0, 1)}
    pad, stride = b.pick(0, 1), b.pick(1, 2, 2)
    b.add(
        op,
        [x],
        kernel_shape=[b.pick(2, 3), b.pick(2, 3)],
        strides=[stride] * 2,
        pads=[pad] * 4,
        ceil_mode=b.pick(0, 0, 1),
        **more,
    )


def _global_pool(b: Builder) -> None:
    x = b.some(_image)
    if x is not None:
        b.add("GlobalAveragePool", [x])


def _batch_norm(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) in (3, 4))
    if x is not None:
        c = b.values[x][1]
        variance = b.weight(b.random.uniform(0.5, 2, c).astype(np.float32))
        b.add("BatchNormalization", [x, b.normal(c), b.normal(c), b.normal(c), variance])


def _unary(b: Builder) -> None:
    op = ["Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSwish", "Neg", "Abs", "Softplus", "Erf", "Identity"][
        b.pick(*range(10))
    ]
    b.add(op, [b.some(lambda shape: True) or ""])


def _binary(b: Builder) -> None:
    x = b.some(lambda shape: True)
    shape = b.values[x or ""]
    if b.pick(0, 1):
        other = b.some(lambda s: _broadcasts(s, shape)) or x
    else:
        # A constant that broadcasts along some axes, perhaps with fewer of them.
        kept = [n if b.pick(0, 1) else 1 for n in shape][b.pick(*range(len(shape) + 1)) :]
        other = b.normal(*kept)
    pair = [x, other] if b.pick(0, 1) else [other, x]
    b.add(["Add", "Mul", "Sub", "Max"][b.pick(0, 0, 1, 2, 3)], [name or "" for name in pair])


def _broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b)))


def _concat(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) > 0)
    if x is None:
        return
    shape = b.values[x]
    axis = b.pick(*range(len(shape)), *[1] * (len(shape) > 1))
    rest = lambda s: len(s) == len(shape) and all(m == n for d, (m, n) in enumerate(zip(s, shape)) if d != axis)  # noqa: E731
    names = [x, b.some(rest) or x, b.some(rest) or x][: b.pick(2, 2, 3)]
    b.add("Concat", names, axis=axis)


def _slice(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) > 0)
    if x is None:
        return
    shape = b.values[x]
    axis = b.pick(*range(len(shape)))
    n = shape[axis]
    if b.pick(0, 0, 1):
        starts, ends, step = n - 1, -n - 1, b.pick(-1, -2)
    else:
        start = int(b.random.integers(0, n))
        starts, ends, step = start, int(b.random.integers(start + 1, n + 1)), b.pick(1, 1, 2)
    b.add("Slice", [x, b.integers(starts), b.integers(ends), b.integers(axis), b.integers(step)])


def _split(b: Builder) -> None:
    x = b.some(lambda shape: any(n > 1 for n in shape))
    if x is None:
        return
    shape = b.values[x]
    axis = b.pick(*(d for d, n in enumerate(shape) if n > 1))
    first = int(b.random.integers(1, shape[axis]))
    b.add("Split", [x, b.integers(first, shape[axis] - first)], 2, axis=axis)


def _gather(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) > 0)
    if x is None:
        return
    axis = b.pick(*range(len(b.values[x])))
    n = b.values[x][axis]
    size = [(), (3,), (2, 2)][b.pick(0, 1, 2)]
    b.add("Gather", [x, b.weight(b.random.integers(-n, n, size).astype(np.int64))], axis=axis)


def _transpose(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) > 1)
    if x is not None:
        b.add("Transpose", [x], perm=[int(d) for d in b.random.permutation(len(b.values[x]))])


def _reshape(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) > 1)
    if x is None:
        return
    shape = list(b.values[x])
    d = b.pick(*range(len(shape) - 1))
    if b.pick(0, 1):
        shape[d : d + 2] = [shape[d] * shape[d + 1]]
    else:
        divisor = max(k for k in (1, 2, 3) if shape[d] % k == 0)
        shape[d : d + 1] = [shape[d] // divisor, divisor]
    if len(shape) <= 5:
        b.add("Reshape", [x, b.integers(*shape)])


def _matmul(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) > 1)
    if x is None:
        return
    shape = b.values[x]
    other = (
        b.some(lambda s: len(s) == len(shape) and s[:-2] == shape[:-2] and s[-2] == shape[-1]) if b.pick(0, 1) else None
    )
    b.add("MatMul", [x, other or b.normal(shape[-1], b.pick(1, 5, 8, 13, 16), scale=shape[-1] ** -0.5)])


def _gemm(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) == 2)
    if x is None:
        return
    m, k = b.values[x]
    t, n = b.pick(0, 1), b.pick(1, 6, 16)
    weight = b.normal(*((n, k) if t else (k, n)), scale=k**-0.5)
    bias = [b.normal(*[(n,), (m, 1), (1,)][b.pick(0, 1, 2)])]
    b.add("Gemm", [x, weight, *bias], transB=t, alpha=0.5)


def _softmax(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) > 0)
    if x is not None:
        b.add("Softmax", [x], axis=b.pick(-1, -1, *range(len(b.values[x]))))


def _layer_norm(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) > 1 and shape[-1] > 1)
    if x is not None:
        n = b.values[x][-1]
        b.add("LayerNormalization", [x, b.normal(n), b.normal(n)], axis=-1, epsilon=1e-3)


def _reduce(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) > 0)
    if x is None:
        return
    rank = len(b.values[x])
    axes = sorted({b.pick(*range(rank)) for _ in range(b.pick(1, 2))})
    op = ["ReduceMean", "ReduceSum", "ReduceMax"][b.pick(0, 1, 2)]
    if op == "ReduceSum" or op == "ReduceMean":
        b.add("ReduceMean", [x, b.integers(*axes)], keepdims=b.pick(0, 1))
    else:
        b.add(op, [x, b.integers(*axes)], keepdims=b.pick(0, 1))


def _resize(b: Builder) -> None:
    x = b.some(_image)
    if x is None:
        return
    mode = b.pick(0, 1)
    scales = b.weight(np.array([1, 1, b.pick(1, 2, 3), b.pick(1, 2)], np.float32))
    b.add(
        "Resize",
        [x, "", scales],
        mode=["nearest", "linear"][mode],
        coordinate_transformation_mode=["asymmetric", "half_pixel"][mode],
        nearest_mode="floor",
    )


def _pad(b: Builder) -> None:
    x = b.some(lambda shape: len(shape) > 0)
    if x is None:
        return
    rank = len(b.values[x])
    b.add(
        "Pad", [x, b.integers(*(b.pick(0, 0, 1, 2) for _ in range(2 * rank)))], mode=["constant", "edge"][b.pick(0, 1)]
    )


OPERATORS: tuple[Callable[[Builder], None], ...] = (
    *[_conv] * 4, _conv_transpose, *[_pool] * 2, _global_pool, *[_batch_norm] * 2, *[_unary] * 5, *[_binary] * 5,
    *[_concat] * 2, *[_slice] * 2, _split, _gather, *[_transpose] * 2, *[_reshape] * 2, *[_matmul] * 2, _gemm, _softmax,
    _layer_norm, _reduce, _resize, _pad,
)  # fmt: skip


def random_model(seed: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of 3 to 14 operators and inputs for it, the same for the same seed."""
    random = np.random.default_rng(seed)
    b = Builder(random)
    batch = b.pick(1, 1, 2, 3)
    b.inputs["x0"] = (batch, b.pick(1, 3, 8, 10, 16), b.pick(4, 7, 8), b.pick(5, 8, 9))
    if b.pick(0, 1):
        b.inputs["x1"] = [(batch, 6, 12), (5, 16), b.inputs["x0"]][b.pick(0, 1, 2)]
    b.values.update(b.inputs)
    for _ in range(b.pick(*range(4, 18))):
        OPERATORS[int(random.integers(len(OPERATORS)))](b)
    if not b.nodes:
        b.add("Relu", ["x0"])
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in b.inputs.items()}
    return b.model(), feeds
