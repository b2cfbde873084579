"""One kernel text for every machine: SSE2, AVX2 and the shape of AVX-512 compared with references on this one, and code
for machines that are not here inspected."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import nestc
from nestc.codegen.llvm import print_kernel
from nestc.codegen.objects import compile_ir
from nestc.errors import TargetError
from nestc.kernels.api import PLAIN, Layout
from nestc.kernels.conv_shape import kept_weights, register_tile
from nestc.kernels.families import choose
from nestc.kernels.testing import evaluate, host_machine, region_of, run_lowered
from nestc.targets.cpu.machine import machine
from nestc.tensor.math import expand

HOST = host_machine()
X86 = HOST.triple.startswith("x86_64")
# The vectors and registers of AVX-512, which LLVM splits for the instructions that this machine has.
WIDE = dataclasses.replace(HOST, name="wide", vector_bytes=64, vector_registers=32)
MACHINES = {"wide": WIDE, "avx2": machine("avx2"), "sse2": machine("sse2")} if X86 else {"host": HOST, "wide": WIDE}
if X86 and not (HOST.fma and HOST.f16c):
    del MACHINES["avx2"]
BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
node = helper.make_node


def reference(nodes, feeds):
    """Every value of `nodes` by ONNX Runtime, or by the onnx package's evaluator for bfloat16, which it lacks."""
    if any(array.dtype == BFLOAT16 for array in feeds.values()):
        return evaluate(nodes, feeds, 22)
    made = [name for n in nodes for name in n.output if name]
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in feeds.items()],
        [helper.make_empty_tensor_value_info(name) for name in made],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(made, session.run(made, feeds)))


def noise(*shape, dtype="float32", scale=1.0):
    """Seeded normal numbers."""
    return (np.random.default_rng([7, *shape]).standard_normal(shape) * scale).astype(dtype)


def conv(x, w, *, tail=False, **attributes):
    """A convolution with bias, weights scaled to unit variance; with a residual and Relu if `tail`."""
    feeds = {"x": noise(*x), "w": noise(*w, scale=1 / np.sqrt(np.prod(w[1:]))), "b": noise(w[0])}
    nodes = [node("Conv", ["x", "w", "b"], ["y"], **attributes)]
    if tail:
        nodes += [node("Mul", ["y", "y"], ["s"]), node("Relu", ["s"], ["z"])]
    return nodes, feeds, ["w", "b"]


def lstm(length, size, hidden):
    """A forward LSTM."""
    shapes = {"x": (length, 2, size), "w": (1, 4 * hidden, size), "r": (1, 4 * hidden, hidden), "b": (1, 8 * hidden)}
    feeds = {name: noise(*shape, scale=0.3) for name, shape in shapes.items()}
    return [node("LSTM", list(feeds), ["y"], hidden_size=hidden)], feeds, ["w", "r", "b"]


def product(m, k, n, *tail, op="MatMul", **attributes):
    """A product with constant `b`, and unary operators after it."""
    names = ["y", *(f"t{i}" for i in range(len(tail)))]
    shape = (n, k) if attributes.get("transB") else (k, n)
    nodes = [node(op, ["x", "w"], ["y"], **attributes)]
    nodes += [node(kind, [a], [b]) for kind, a, b in zip(tail, names, names[1:], strict=False)]
    return nodes, {"x": noise(m, k), "w": noise(*shape, scale=k**-0.5)}, ["w"]


def resize():
    feeds = {"x": noise(1, 19, 9, 7), "roi": np.empty(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    return [node("Resize", list(feeds), ["y"], mode="linear")], feeds, []


def mixed():
    """Integers, booleans and floats in one region."""
    feeds = {"x": noise(5, 37), "n": np.arange(37, dtype=np.int64) - 18, "u": np.arange(37, dtype=np.uint8)}
    nodes = [
        node("Cast", ["n"], ["nf"], to=TensorProto.FLOAT),
        node("Cast", ["u"], ["uf"], to=TensorProto.FLOAT),
        node("Less", ["x", "nf"], ["c"]),
        node("Where", ["c", "x", "uf"], ["s"]),
        node("Floor", ["s"], ["f"]),
        node("Cast", ["f"], ["z"], to=TensorProto.INT8),
    ]
    return nodes, feeds, []


def halves(dtype):
    """Arithmetic on 16-bit floats."""
    feeds = {"x": noise(7, 33, dtype=dtype), "b": noise(33, dtype=dtype)}
    return [node("Add", ["x", "b"], ["s"]), node("Mul", ["s", "x"], ["p"])], feeds, []


CASES = {
    "conv 3x3": conv((1, 19, 11, 13), (37, 19, 3, 3), tail=True, pads=[1] * 4),
    "conv 3x3, stride 2": conv((2, 32, 13, 14), (40, 32, 3, 3), pads=[1] * 4, strides=[2, 2]),
    "conv, one channel block of weights in two": conv((1, 130, 5, 6), (130, 130, 3, 3), pads=[1] * 4),
    "conv 1x1": conv((1, 70, 9, 7), (50, 70, 1, 1), tail=True),
    "conv, first layer": conv((1, 3, 31, 30), (24, 3, 7, 7), pads=[3] * 4, strides=[2, 2]),
    "conv, depthwise": conv((1, 35, 14, 15), (35, 1, 3, 3), pads=[1] * 4, group=35),
    "conv, depthwise 5x5, stride 2": conv((1, 20, 17, 16), (20, 1, 5, 5), pads=[2] * 4, strides=[2, 2], group=20),
    "conv, grouped": conv((1, 64, 9, 9), (64, 16, 3, 3), pads=[1] * 4, group=4),
    "conv, small groups": conv((1, 12, 9, 9), (18, 4, 3, 3), pads=[1] * 4, group=3),
    "conv transposed": (
        [node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], pads=[1] * 4)],
        {"x": noise(1, 24, 7, 6), "w": noise(24, 18, 4, 4, scale=0.1)},
        ["w"],
    ),
    "product": product(33, 77, 101),
    "product with a tail": product(64, 48, 96, "Tanh", "Relu"),
    "Gemm": product(29, 40, 70, "Sigmoid", op="Gemm", transB=1, alpha=0.5),
    "product of few rows": product(3, 130, 65),
    "product of one row": product(1, 300, 130),
    "product with a column": product(130, 77, 1),
    "softmax": ([node("Softmax", ["x"], ["y"])], {"x": noise(7, 101)}, []),
    "softmax, axis 1": ([node("Softmax", ["x"], ["y"], axis=1)], {"x": noise(2, 9, 35)}, []),
    "layer norm": (
        [node("LayerNormalization", ["x", "g", "b"], ["y"])],
        {"x": noise(9, 75), "g": noise(75), "b": noise(1, 75)[0]},
        ["g", "b"],
    ),
    "max pool": ([node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2])], {"x": noise(1, 21, 15, 14)}, []),
    "average pool": (
        [node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1] * 4)],
        {"x": noise(1, 21, 9, 8)},
        [],
    ),
    "global pool": ([node("GlobalAveragePool", ["x"], ["y"])], {"x": noise(2, 21, 9, 8)}, []),
    "LSTM": lstm(5, 21, 19),
    "resize": resize(),
    "mixed types": mixed(),
    "functions": (
        [node("Exp", ["x"], ["e"]), node("Erf", ["e"], ["r"]), node("Tanh", ["r"], ["y"])],
        {"x": noise(5, 37)},
        [],
    ),
    "rounding": (
        [
            *(node(op, ["x"], [op]) for op in ("Floor", "Ceil", "Round")),
            node("Sum", ["Floor", "Ceil", "Round"], ["y"]),
        ],
        {"x": noise(3, 29, scale=5)},
        [],
    ),
    "transpose": ([node("Transpose", ["x"], ["y"], perm=[0, 2, 1])], {"x": noise(3, 21, 34)}, []),
    "transpose of bytes": (
        [node("Transpose", ["x"], ["y"], perm=[2, 0, 1])],
        {"x": np.arange(3 * 21 * 34).reshape(3, 21, 34).astype(np.int8)},
        [],
    ),
    "sum of rows": ([node("ReduceSum", ["x"], ["y"], keepdims=0)], {"x": noise(21, 34)}, []),
    "maximum along axis 0": (
        [node("ReduceMax", ["x", "a"], ["y"])],
        {"x": noise(21, 34), "a": np.array([0])},
        [],
    ),
    "int64": ([node("Mul", ["x", "x"], ["p"]), node("Mod", ["p", "m"], ["y"])], {
        "x": np.arange(-20, 21), "m": np.array([7])
    }, []),
    "float16": halves("float16"),
    "bfloat16": halves(BFLOAT16),
    "float16 product": ([node("MatMul", ["x", "w"], ["y"])], {
        "x": noise(5, 33, dtype="float16"), "w": noise(33, 20, dtype="float16", scale=0.2)
    }, ["w"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    """The values of every case, once."""
    return {name: {**feeds, **reference(nodes, feeds)} for name, (nodes, feeds, _) in CASES.items()}


def lowered(name, values, target, blocked=True):
    """The region of a case, its kernels for the machine `target`, and their layouts."""
    nodes, _, constants = CASES[name]
    output = nodes[-1].output[0]
    region = region_of(nodes, values, [output], constants, nodes[0].op_type)
    family, reasons = choose(region)
    assert family is not None, reasons
    images = blocked and any(n.op_type in ("Conv", "ConvTranspose", "MaxPool", "AveragePool") for n in nodes)
    block = Layout(target.lanes("float32"))
    wanted = {n: block if images and len(region.types[n].shape) == 4 else PLAIN for n in region.inputs}
    if "first layer" in name:
        wanted["x"] = PLAIN
    layouts = dict(family.layouts(region, target, wanted))
    return region, family.lower(region, target, layouts), layouts


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("which", MACHINES)
def test_every_machine_computes_the_same(which, name, expected):
    values = expected[name]
    region, kernels, layouts = lowered(name, values, MACHINES[which])
    output = region.outputs[0]
    found = run_lowered(region, kernels, CASES[name][1], MACHINES[which], layouts)[output]
    wanted = values[output]
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if wanted.dtype.kind in "iub":
        np.testing.assert_array_equal(found, wanted)
        return
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    # 16-bit results may round to a neighbour: the references round after every operation.
    step = {"float16": 2e-3, "bfloat16": 2e-2}.get(region.types[output].dtype, 2e-6)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=step * max(1.0, float(np.abs(wanted).max())))


def hot_loops(name, arch):
    """The assembly of a case for a machine as basic blocks that hold multiply-adds."""
    nodes, feeds, _ = CASES[name]
    target = machine(arch)
    _, kernels, _ = lowered(name, {**feeds, **reference(nodes, feeds)}, target)
    blocks = []
    for launch in kernels.launches:
        text = print_kernel(expand(launch.kernel, target), "kernel", target).text
        blocks += re.split(r"^\.LBB\S+:", compile_ir(text, target, assembly=True).assembly, flags=re.MULTILINE)
    return [block for block in blocks if re.search(r"\tv?fml?a", block) or "\tvfmadd" in block]


HOT = [
    "conv 3x3",
    "conv 3x3, stride 2",
    "conv 1x1",
    "conv, first layer",
    "conv, grouped",
    "product",
    "product of few rows",
]


@pytest.mark.parametrize("name", [*HOT, "conv, depthwise"])
def test_avx512_multiplies_in_zmm_without_spills(name):
    loops = hot_loops(name, "avx512")
    assert any(re.search(r"\tvfmadd\d+ps\t.*%zmm", loop) for loop in loops)
    for loop in loops:
        assert not re.search(r"\tvmov[au]p[sd]\t(%zmm\d+, -?\d*\(%rsp\)|-?\d*\(%rsp\), %zmm\d+)", loop)


@pytest.mark.parametrize("name", [*HOT, "conv, depthwise"])
def test_neon_multiplies_four_lanes_without_spills(name):
    loops = hot_loops(name, "neon")
    assert any(re.search(r"\tfmla\tv\d+\.4s", loop) for loop in loops)
    for loop in loops:
        assert not re.search(r"\t(ld|st)[rpu]+\tq\d+,.*\[sp", loop)


@pytest.mark.parametrize("pixels", [7, 14, 28, 56, 112])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 8, 16, 32])
def test_a_tile_leaves_room_for_the_weights_of_two_steps(vectors, pixels):
    mr, nr = register_tile(vectors, pixels, 32)
    assert mr * nr + kept_weights(nr, 32) + 1 <= 32 and mr * nr >= min(8, vectors * pixels)


def cnn():
    """A small network with every kind of layer of a vision model."""
    shapes = {"w1": (20, 3, 3, 3), "b1": (20,), "w2": (20, 1, 3, 3), "w3": (33, 20, 1, 1), "w4": (33, 10)}
    weights = [numpy_helper.from_array(noise(*shape, scale=0.4), name) for name, shape in shapes.items()]
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1] * 4, strides=[2, 2]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], pads=[1] * 4, group=20),
        node("Conv", ["c2", "w3"], ["c3"]),
        node("MaxPool", ["c3"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["m"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("MatMul", ["f", "w4"], ["l"]),
        node("Softmax", ["l"], ["y"]),
    ]
    return network(nodes, weights, [1, 3, 20, 18], [1, 10])


def transformer():
    """Attention, layer norm and a perceptron over 9 tokens, and a last step in float16."""
    shapes = {"wq": (24, 24), "wk": (24, 24), "wv": (24, 24), "w1": (24, 52), "w2": (52, 24), "g": (24,), "b": (24,)}
    weights = [numpy_helper.from_array(noise(*shape, scale=0.2), name) for name, shape in shapes.items()]
    nodes = [
        *(node("MatMul", ["x", f"w{n}"], [n]) for n in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Softmax", ["s"], ["p"]),
        node("MatMul", ["p", "v"], ["a"]),
        node("Add", ["a", "x"], ["r"]),
        node("LayerNormalization", ["r", "g", "b"], ["n"]),
        node("MatMul", ["n", "w1"], ["h"]),
        node("Gelu", ["h"], ["e"]),
        node("MatMul", ["e", "w2"], ["o"]),
        node("Cast", ["o"], ["half"], to=TensorProto.FLOAT16),
        node("Cast", ["half"], ["y"], to=TensorProto.FLOAT),
    ]
    return network(nodes, weights, [1, 9, 24], [1, 9, 24])


def network(nodes, weights, shape, out):
    """A model with one input `x` and one output `y`."""
    border = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", out))]
    graph = helper.make_graph(nodes, "network", border[:1], border[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model


@pytest.mark.skipif(not X86, reason="SSE2 is of x86")
@pytest.mark.parametrize("make", [cnn, transformer])
def test_whole_models_run_with_sse2(make, tmp_path):
    model = make()
    x = noise(*[d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"x": x})[0]
    with nestc.compile(model, targets=["cpu:arch=sse2"], threads=2) as executable:
        np.testing.assert_allclose(executable(x), wanted, rtol=0, atol=1e-3 if make is transformer else 1e-6)
        executable.save(tmp_path / "model.nest")
    with nestc.open(tmp_path / "model.nest") as executable:
        np.testing.assert_allclose(executable(x), wanted, rtol=0, atol=1e-3 if make is transformer else 1e-6)


# e_machine of an ELF header (System V ABI): 62 is x86-64, 183 AArch64.
@pytest.mark.parametrize(("arch", "number"), [("avx512", 62), ("neon", 183)])
def test_code_for_a_machine_that_is_not_here(arch, number, tmp_path):
    if HOST.vector_bytes == 64 if arch == "avx512" else not X86:
        pytest.skip("this machine may run the code")
    executable = nestc.compile(cnn(), targets=[f"cpu:arch={arch}"])
    objects = executable.bundle.partitions[0].artifact.files
    assert "main.o" in objects and len(objects) > 4
    for code in objects.values():
        assert code[:4] == b"\x7fELF" and int.from_bytes(code[18:20], "little") == number
    assert executable.stats()["kernel_calls"] >= 5
    executable.save(tmp_path / "model.nest")
    reason = "compiled for aarch64 on linux, but this machine is" if arch == "neon" else "needs a CPU with avx512"
    with pytest.raises(TargetError, match=reason):
        executable(noise(1, 3, 20, 18))
    with pytest.raises(TargetError, match=reason):
        nestc.open(tmp_path / "model.nest")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu:arhc=avx2", "target 'cpu' has no option 'arhc', did you mean 'arch'"),
        ("cpu:arch=avx3", "there is no arch 'avx3', did you mean 'avx2'"),
        ("cpu:arch=NEON", "there is no arch 'NEON', did you mean 'neon'"),
        ("cpu:arch", "option 'arch' of target 'cpu' has no value; write cpu:arch=VALUE"),
    ],
)
def test_typing_errors_in_options_get_a_sentence(text, message):
    with pytest.raises(TargetError, match=re.escape(message)):
        nestc.compile(cnn(), targets=[text])
