"""VTA's intrinsics compute what hw_spec.h says, and kernels that use them out of place are refused."""

import numpy as np
import pytest

from nestc.errors import Error
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import AluOp
from nestc.targets.vta import intrinsics as vta
from nestc.tensor import index as ix
from nestc.tensor.interp import run
from nestc.tensor.ir import Buffer, Call, For, Kernel, Stmt, Var, Window, effects, written
from nestc.tensor.text import kernel_text
from nestc.tensor.verify import verify

CONFIG = VtaConfig(log_batch=1, log_block=2, log_inp_buff_size=7, log_wgt_buff_size=7, log_acc_buff_size=9)
INP, WGT, ACC = (vta.sram(memory, CONFIG) for memory in (vta.INP, vta.WGT, vta.ACC))


def at(buffer: Buffer, *terms: ix.Expr | int) -> Window:
    return Window(buffer, (ix.add(*terms), ix.const(0), ix.const(0)))


def kernel(params: tuple[Buffer, ...], *body: Stmt) -> Kernel:
    return Kernel("k", params, body, (INP, WGT, ACC))


def on_accumulators(values: np.ndarray, *body: Stmt) -> np.ndarray:
    """What is in all accumulators after `body`, which starts with `values` there; int8 to look at the low bits only."""
    x, y = vta.dram("x", vta.ACC, len(values), CONFIG), vta.dram("y", vta.INP, len(values), CONFIG)
    fill = Call(vta.load_tile(vta.ACC, 1, len(values), len(values), CONFIG), (at(ACC, 0), at(x, 0)))
    result = np.zeros(y.shape, np.int8)
    drain = Call(vta.store_tile(1, len(values), len(values), CONFIG), (at(y, 0), at(ACC, 0)))
    k = kernel((x, y), fill, *body, drain)
    verify(k)
    run(k, {"x": values, "y": result})
    return result


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max, shape, dtype, endpoint=True)


def test_depths():
    assert (INP.shape, WGT.shape, ACC.shape) == ((16, 2, 4), (8, 4, 4), (16, 2, 4))
    assert (INP.dtype, WGT.dtype, ACC.dtype) == ("int8", "int8", "int32")


def test_gemm_adds_input_times_weights():
    x, w, b, y = (
        vta.dram(name, memory, 1, CONFIG)
        for name, memory in (("x", vta.INP), ("w", vta.WGT), ("b", vta.ACC), ("y", vta.INP))
    )
    body = [
        Call(vta.load_tile(buffer.memory, 1, 1, 1, CONFIG), (at(buffer, 0), at(source, 0)))
        for buffer, source in ((INP, x), (WGT, w), (ACC, b))
    ]
    body.append(Call(vta.gemm(CONFIG), (at(ACC, 0), at(INP, 0), at(WGT, 0))))
    body.append(Call(vta.alu(AluOp.SHR, 6, CONFIG), (at(ACC, 0),)))
    body.append(Call(vta.store_tile(1, 1, 1, CONFIG), (at(y, 0), at(ACC, 0))))
    k = kernel((x, w, b, y), *body)
    verify(k)
    values = {"x": numbers(x.shape, "int8"), "w": numbers(w.shape, "int8", 1), "b": numbers(b.shape, "int32", 2)}
    result = np.zeros(y.shape, np.int8)
    run(k, {**values, "y": result})
    wide = values["x"][0].astype(np.int64) @ values["w"][0].T.astype(np.int64) + values["b"][0]
    assert np.array_equal(result[0], (wide.astype(np.int32) >> 6).astype(np.int8))
    assert written(k) == {"y"}


def test_reset_clears_and_store_keeps_the_low_bits():
    values = numbers((3, 2, 4), "int32")
    result = on_accumulators(values, Call(vta.reset(CONFIG), (at(ACC, 1),)))
    values[1] = 0
    assert np.array_equal(result, values.astype(np.int8))


@pytest.mark.parametrize(
    ("op", "imm", "expected"),
    [
        (AluOp.MIN, -300, lambda a, b: np.minimum(a, -300)),
        (AluOp.MAX, 5, lambda a, b: np.maximum(a, 5)),
        (AluOp.ADD, -32768, lambda a, b: a - 32768),
        (AluOp.SHR, 7, lambda a, b: a >> 7),
        (AluOp.SHR, -3, lambda a, b: a << 3),
        (AluOp.MUL, 77, lambda a, b: a * 77),
        (AluOp.MIN, None, np.minimum),
        (AluOp.MAX, None, np.maximum),
        (AluOp.ADD, None, np.add),
        (AluOp.MUL, None, np.multiply),
    ],
)
def test_alu(op, imm, expected):
    values = numbers((2, 2, 4), "int32")
    operands = (at(ACC, 0),) if imm is not None else (at(ACC, 0), at(ACC, 1))
    result = on_accumulators(values, Call(vta.alu(op, imm, CONFIG), operands))
    with np.errstate(over="ignore"):
        values[0] = expected(values[0], values[1])
    assert np.array_equal(result, values.astype(np.int8))


def test_shift_by_a_tensor():
    values = numbers((2, 2, 4), "int32")
    values[1] = np.arange(8).reshape(2, 4) * 4
    result = on_accumulators(values, Call(vta.alu(AluOp.SHR, None, CONFIG), (at(ACC, 0), at(ACC, 1))))
    assert np.array_equal(result[0], (values[0] >> values[1]).astype(np.int8))


@pytest.mark.parametrize(("y", "x", "stride"), [(3, 2, 5), (3, 2, 2), (1, 6, 6), (2, 1, 3)])
def test_tiles_in_and_out(y, x, stride):
    span = (y - 1) * stride + x
    source, target = vta.dram("s", vta.ACC, span, CONFIG), vta.dram("t", vta.INP, span, CONFIG)
    k = kernel(
        (source, target),
        Call(vta.load_tile(vta.ACC, y, x, stride, CONFIG), (at(ACC, 2), at(source, 0))),
        Call(vta.store_tile(y, x, stride, CONFIG), (at(target, 0), at(ACC, 2))),
    )
    verify(k)
    values, result = numbers(source.shape, "int32"), np.full(target.shape, 7, np.int8)
    run(k, {"s": values, "t": result})
    moved = (np.arange(y)[:, None] * stride + np.arange(x)).ravel()
    expected = np.full(target.shape, 7, np.int8)
    expected[moved] = values[moved].astype(np.int8)
    assert np.array_equal(result, expected)


def test_a_strided_tile_of_inputs_is_packed():
    source = vta.dram("s", vta.INP, 12, CONFIG)
    w, y = vta.dram("w", vta.WGT, 1, CONFIG), vta.dram("y", vta.INP, 4, CONFIG)
    i = Var("i", 4)
    k = kernel(
        (source, w, y),
        Call(vta.load_tile(vta.INP, 2, 2, 9, CONFIG), (at(INP, 3), at(source, 1))),
        Call(vta.load_tile(vta.WGT, 1, 1, 1, CONFIG), (at(WGT, 7), at(w, 0))),
        For(i, (Call(vta.reset(CONFIG), (at(ACC, i),)),)),
        For(Var("j", 4), (Call(vta.gemm(CONFIG), (at(ACC, Var("j", 4)), at(INP, 3, Var("j", 4)), at(WGT, 7))),)),
        Call(vta.store_tile(1, 4, 4, CONFIG), (at(y, 0), at(ACC, 0))),
    )
    verify(k)
    values, result = numbers(source.shape, "int8"), np.zeros(y.shape, np.int8)
    run(k, {"s": values, "w": np.eye(4, dtype=np.int8)[None], "y": result})
    assert np.array_equal(result, values[[1, 2, 10, 11]])


def test_text():
    i = Var("i", 3)
    k = kernel((), For(i, (Call(vta.reset(CONFIG), (at(ACC, ix.mul(i, 2), 1),)),)))
    assert kernel_text(k) == (
        "kernel k():\n"
        "  inp: int8[16, 2, 4] in vta.inp\n"
        "  wgt: int8[8, 4, 4] in vta.wgt\n"
        "  acc: int32[16, 2, 4] in vta.acc\n"
        "  for i in 3:\n"
        "    reset(acc[((i * 2) + 1), 0, 0])\n"
    )


def test_effects():
    assert effects(vta.gemm(CONFIG)) == ((True, True), (True, False), (True, False))
    assert effects(vta.reset(CONFIG)) == ((False, True),)
    assert effects(vta.load_tile(vta.INP, 1, 2, 2, CONFIG)) == ((False, True), (True, False))
    assert effects(vta.alu(AluOp.ADD, 1, CONFIG)) == ((True, True),)


X = vta.dram("x", vta.INP, 8, CONFIG)
FILL = Call(vta.load_tile(vta.INP, 1, 8, 8, CONFIG), (at(INP, 0), at(X, 0)))
FOUR = Var("i", 4)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ([Call(FILL.intrinsic, (at(INP, 9), at(X, 0)))], "64 elements from position 72 of inp end behind its 128"),
        ([Call(FILL.intrinsic, (at(INP, 0), at(X, 1)))], "64 elements from position 8 of x end behind its 64"),
        ([Call(FILL.intrinsic, (at(ACC, 0), at(X, 0)))], "acc has not the elements that load.inp"),
        ([Call(FILL.intrinsic, (at(INP, 0),))], "takes 2 operands, not 1"),
        ([For(FOUR, (Call(vta.reset(CONFIG), (at(ACC, ix.mul(FOUR, 6)),)),))], "runs over [0, 18], outside its extent 16"),
        ([Call(vta.alu(AluOp.ADD, 1, CONFIG), (at(ACC, 0),))], "acc is read before it is written"),
        ([FILL, Call(vta.reset(CONFIG), (at(ACC, 0),)), Call(vta.gemm(CONFIG), (at(ACC, 0), at(INP, 0), at(WGT, 0)))],
         "wgt is read before it is written"),
        ([Call(FILL.intrinsic, (at(INP, 0), at(vta.dram("z", vta.INP, 8, CONFIG), 0)))], "z is an operand of"),
    ],
)  # fmt: skip
def test_kernels_that_are_refused(body, problem):
    with pytest.raises(Error) as caught:
        verify(kernel((X,), *body))
    assert problem in str(caught.value)


def test_the_interpreter_stays_inside():
    outside = kernel((X,), Call(FILL.intrinsic, (at(INP, 9), at(X, 0))))
    with pytest.raises(Error, match="access outside inp: 64 elements from 72 on, of 128"):
        run(outside, {"x": np.zeros(X.shape, np.int8)})
