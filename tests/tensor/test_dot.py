"""`Dot` and `Repeat`: machine code against the interpreter for every pair of factors, and the instruction chosen."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.codegen.llvm import print_kernel
from nestc.codegen.objects import compile_ir
from nestc.kernels.api import CpuMachine
from nestc.kernels.testing import Compiled, host_machine
from nestc.targets.cpu.machine import machine
from nestc.tensor import interp
from nestc.tensor.build import Builder, load
from nestc.tensor.ir import DOT_GROUPS, Dot, Kernel, PairSum, Repeat
from nestc.tensor.text import kernel_text
from nestc.tensor.verify import verify

HOST = host_machine()
WIDE = dataclasses.replace(HOST, vector_bytes=64, vector_registers=32)
PORTABLE = dataclasses.replace(HOST, dot_bytes=0, vnni=False, bf16=False, dotprod=False)
X86 = HOST.triple.startswith("x86_64")
MACHINES = [HOST, WIDE, PORTABLE, *([machine("sse2")] if X86 else [])]
PAIRS = sorted(DOT_GROUPS)


def dot_kernel(a_dtype: str, b_dtype: str, lanes: int, repeated: bool = False) -> Kernel:
    """out = dot(acc, a, b) on one vector; `a` is one group, repeated, if asked for."""
    group = DOT_GROUPS[a_dtype, b_dtype]
    kind = "float32" if a_dtype == "bfloat16" else "int32"
    k = Builder("k")
    acc, out = k.param("acc", kind, (lanes,)), k.param("out", kind, (lanes,))
    a = k.param("a", a_dtype, (group if repeated else group * lanes,))
    b = k.param("b", b_dtype, (group * lanes,))
    x = Repeat(load(a, 0, lanes=group), lanes) if repeated else load(a, 0, lanes=group * lanes)
    k.store(out, (0,), Dot(load(acc, 0, lanes=lanes), x, load(b, 0, lanes=group * lanes)))
    made = k.finish()
    verify(made)
    return made


def numbers(rng: np.random.Generator, dtype: str, count: int) -> np.ndarray:
    """Integers with the extremes often among them, or normal numbers."""
    kind = interp.numpy_dtype(dtype)
    if dtype in ("float32", "bfloat16"):
        return rng.normal(size=count).astype(kind)
    info = np.iinfo(kind)
    values = rng.integers(info.min, info.max, count, kind, endpoint=True)
    return np.where(rng.random(count) < 0.3, rng.choice([info.min, info.max], count), values).astype(kind)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(PAIRS),
    st.sampled_from([1, 3, 4, 8, 16, 24, 32]),
    st.booleans(),
    st.sampled_from(MACHINES),
    st.integers(0, 1000),
)
def test_machine_code_does_what_the_interpreter_does(
    pair: tuple[str, str], lanes: int, repeated: bool, target: CpuMachine, seed: int
) -> None:
    made = dot_kernel(*pair, lanes, repeated)
    rng = np.random.default_rng(seed)
    arrays = {p.name: numbers(rng, p.dtype, p.size) for p in made.params}
    want = arrays | {"out": np.zeros(lanes, arrays["acc"].dtype)}
    got = np.zeros(lanes, arrays["acc"].dtype)
    interp.run(made, want)
    group = DOT_GROUPS[pair]
    a = np.tile(arrays["a"], lanes) if repeated else arrays["a"]
    kind = np.float64 if pair[0] == "bfloat16" else np.int64
    exact = arrays["acc"].astype(kind) + (a.astype(kind) * arrays["b"].astype(kind)).reshape(lanes, group).sum(1)
    Compiled(made, target)([got if p.name == "out" else arrays[p.name] for p in made.params])
    if pair[0] == "bfloat16":
        np.testing.assert_allclose(want["out"], exact, rtol=1e-6)
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(want["out"], exact.astype(np.int32))
        np.testing.assert_array_equal(got, exact.astype(np.int32))


@pytest.mark.parametrize(("dtype", "count", "times"), [("uint8", 4, 8), ("int16", 2, 4), ("float32", 3, 2)])
def test_repeat(dtype: str, count: int, times: int) -> None:
    k = Builder("k")
    x, out = k.param("x", dtype, (count,)), k.param("out", dtype, (count * times,))
    k.store(out, (0,), Repeat(load(x, 0, lanes=count), times))
    made = k.finish()
    data, got = np.arange(count).astype(dtype), np.zeros(count * times, dtype)
    Compiled(made, HOST)([data, got])
    np.testing.assert_array_equal(got, np.tile(data, times))
    interp.run(made, {"x": data, "out": got})
    np.testing.assert_array_equal(got, np.tile(data, times))


@pytest.mark.parametrize(
    ("arch", "pair", "lanes", "instruction"),
    [
        ("avx512_vnni", ("uint8", "int8"), 16, r"vpdpbusd\t.*%zmm"),
        ("avx512_vnni", ("uint8", "int8"), 8, r"vpdpbusd\t.*%ymm"),
        ("avx512_vnni", ("int16", "int16"), 16, r"vpdpwssd\t.*%zmm"),
        ("avx512_vnni", ("bfloat16", "bfloat16"), 16, r"vdpbf16ps\t.*%zmm"),
        ("avx512", ("int16", "int16"), 16, r"vpmaddwd\t.*%zmm"),
        ("avx2", ("int16", "int16"), 8, r"vpmaddwd\t.*%ymm"),
        ("sse2", ("int16", "int16"), 4, r"pmaddwd\t.*%xmm"),
        ("neon_dotprod", ("int8", "int8"), 4, r"sdot\tv\d+\.4s"),
        ("neon_dotprod", ("uint8", "uint8"), 4, r"udot\tv\d+\.4s"),
        ("neon", ("int16", "int16"), 4, r"smull2?\tv\d+\.4s"),
    ],
)
def test_the_instruction_of_a_machine(arch: str, pair: tuple[str, str], lanes: int, instruction: str) -> None:
    target = machine(arch)
    text = print_kernel(dot_kernel(*pair, lanes, repeated=True), "kernel", target).text
    assembly = compile_ir(text, target, assembly=True).assembly
    assert re.search(rf"\t{instruction}", assembly)
    if arch.startswith("avx"):
        # The group is one 32-bit element in memory.
        assert re.search(r"\tv(pbroadcastd|broadcastss)\t\(|{1to", assembly)


def test_text_form_and_types() -> None:
    assert "dot(acc[0:8], repeat(a[0:4], 8), b[0:32])" in kernel_text(dot_kernel("uint8", "int8", 8, True))
    k = Builder("k")
    a, b = k.param("a", "int16", (8,)), k.param("b", "int8", (8,))
    with pytest.raises(TypeError, match="no sum of products of int16 and int8"):
        Dot(load(a, 0, lanes=4), load(a, 0, lanes=8), load(b, 0, lanes=8))
    with pytest.raises(TypeError, match="dot: operands do not fit"):
        Dot(load(a, 0, lanes=4), load(b, 0, lanes=8), load(b, 0, lanes=8))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 2, 8, 16, 24, 32]), st.sampled_from(MACHINES), st.integers(0, 1 << 30))
def test_pair_sums_saturate_like_the_instruction(lanes: int, target: CpuMachine, seed: int) -> None:
    k = Builder("k")
    a, b = k.param("a", "uint8", (2 * lanes,)), k.param("b", "int8", (2 * lanes,))
    out = k.param("out", "int16", (lanes,))
    k.store(out, (0,), PairSum(load(a, 0, lanes=2 * lanes), load(b, 0, lanes=2 * lanes)))
    kernel = k.finish()
    verify(kernel)
    rng = np.random.default_rng(seed)
    x, y = numbers(rng, "uint8", 2 * lanes), numbers(rng, "int8", 2 * lanes)
    wanted = np.clip((x.astype(int) * y).reshape(-1, 2).sum(1), -32768, 32767).astype(np.int16)
    found, defined = np.zeros(lanes, np.int16), np.zeros(lanes, np.int16)
    Compiled(kernel, target)([x, y, found])
    interp.run(kernel, {"a": x, "b": y, "out": defined})
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(defined, wanted)


def test_the_instruction_of_pair_sums() -> None:
    k = Builder("k")
    a, b, out = k.param("a", "uint8", (32,)), k.param("b", "int8", (32,)), k.param("out", "int16", (16,))
    k.store(out, (0,), PairSum(load(a, 0, lanes=32), load(b, 0, lanes=32)))
    kernel = k.finish()
    assert "pair_sum(" in kernel_text(kernel)
    avx2 = machine("avx2")
    assert "vpmaddubsw" in compile_ir(print_kernel(kernel, "k", avx2).text, avx2, assembly=True).assembly
