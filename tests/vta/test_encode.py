"""Bits of VTA's instructions: positions counted by hand from hw_spec.h, and the way there and back."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig, from_json, preset
from nestc.runtime.vta.encode import EncodingError, decode, decode_uops, encode, encode_uops
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Instruction, Load, MemoryId, Store, Tokens

STOCK = preset("pynq_1x16x16")
# Depths 2^5, 2^6, 2^7, 2^8: more room in the first word, so that fields move into it.
SMALL = VtaConfig("small", log_uop_buff_size=7, log_inp_buff_size=10, log_wgt_buff_size=15, log_acc_buff_size=14)
BATCHED = VtaConfig("batched", log_batch=2)
CONFIGS = (STOCK, preset("1x32x32"), SMALL, BATCHED)


def bits(instruction: Instruction, config: VtaConfig = STOCK) -> int:
    data = encode([instruction], config)
    assert len(data) == 16
    return int.from_bytes(data, "little")


def test_load_bits():
    load = Load(MemoryId.INP, 0xABCD, 0x12345678, 0x1111, 0x2222, 0x3333, 1, 2, 3, 4, Tokens(False, True, False, True))
    want = 0 | 1 << 4 | 1 << 6 | 2 << 7 | 0xABCD << 10 | 0x12345678 << 26
    want |= 0x1111 << 64 | 0x2222 << 80 | 0x3333 << 96 | 1 << 112 | 2 << 116 | 3 << 120 | 4 << 124
    assert bits(load) == want
    # Nothing of a LOAD depends on the sizes of the buffers.
    assert {bits(load, config) for config in CONFIGS} == {want}


def test_store_bits():
    store = Store(7, 0xFFFFFFFF, 5, 6, 56, Tokens(pop_prev=True, push_prev=True))
    assert bits(store) == 1 | 1 << 3 | 1 << 5 | 4 << 7 | 7 << 10 | 0xFFFFFFFF << 26 | 5 << 64 | 6 << 80 | 56 << 96


def test_gemm_bits():
    gemm = Gemm(
        True, 0x1ABC, 0x2001, 0x3FFF, 0x2AAA, 0x701, 0x402, 0x603, 0x504, 0x305, 0x206, Tokens(True, True, True, True)
    )
    want = 2 | 0b1111 << 3 | 1 << 7 | 0x1ABC << 8 | 0x2001 << 21 | 0x3FFF << 35 | 0x2AAA << 49
    want |= 0x701 << 64 | 0x402 << 75 | 0x603 << 86 | 0x504 << 97 | 0x305 << 108 | 0x206 << 118
    assert bits(gemm) == want


def test_alu_bits():
    alu = Alu(AluOp.SHR, 1, 2, 3, 4, 5, 6, 7, 2047, True, -2, Tokens(push_next=True))
    want = 4 | 1 << 6 | 1 << 8 | 2 << 21 | 3 << 35 | 4 << 49
    want |= 5 << 64 | 6 << 75 | 7 << 86 | 2047 << 97 | 3 << 108 | 1 << 111 | 0xFFFE << 112
    assert bits(alu) == want
    mul = Alu(AluOp.MUL, 0, 1, 1, 1, imm=32767)
    assert bits(mul) == 4 | 1 << 21 | 1 << 35 | 1 << 49 | 4 << 108 | 32767 << 112


def test_finish_bits():
    assert bits(Finish()) == 3
    assert bits(Finish(Tokens(pop_next=True))) == 3 | 1 << 4


def test_fields_move_with_the_buffers():
    # 3 + 4 + 1 + 5 + 6 + 14 + 14 = 47 bits, and 17 are left: the first factor (8 bits) lies at 47, the second at 55, no more fit.
    gemm = Gemm(False, 31, 32, 1, 2, 200, 201, 40, 41, 100, 101)
    want = 2 | 31 << 8 | 32 << 13 | 1 << 19 | 2 << 33 | 200 << 47 | 201 << 55
    want |= 40 << 64 | 41 << 70 | 100 << 76 | 101 << 83
    assert bits(gemm, SMALL) == want
    alu = Alu(AluOp.MAX, 0, 1, 1, 2, 200, 201, 202, 203, True, -1)
    want = (
        4
        | 1 << 13
        | 1 << 19
        | 2 << 33
        | 200 << 47
        | 201 << 55
        | 202 << 64
        | 203 << 72
        | 1 << 80
        | 1 << 83
        | 0xFFFF << 84
    )
    assert bits(alu, SMALL) == want
    # LOG_BATCH 2: 2^9 inputs and accumulators; the first word is as full as in the stock one.
    want = 2 | 1 << 21 | 1 << 35 | 1 << 49 | 511 << 64 | 510 << 73 | 509 << 82 | 508 << 91 | 1023 << 100 | 1022 << 110
    assert bits(Gemm(False, 0, 1, 1, 1, 511, 510, 509, 508, 1023, 1022), BATCHED) == want


def test_uop_bits():
    uops = np.array([[2047, 1, 1023], [1, 2046, 2]])
    want = [2047 | 1 << 11 | 1023 << 22, 1 | 2046 << 11 | 2 << 22]
    assert encode_uops(uops, STOCK) == b"".join(word.to_bytes(4, "little") for word in want)
    assert encode_uops(np.array([[255, 3, 100]]), SMALL) == (255 | 3 << 8 | 100 << 16).to_bytes(4, "little")
    assert decode_uops(encode_uops(np.zeros((0, 3), np.int64), STOCK), STOCK).shape == (0, 3)


def test_instructions_keep_their_order():
    stream = [Finish(), Gemm(False, 0, 1, 1, 1), Load(MemoryId.UOP, 0, 0, 1, 1, 1), Finish(), Store(0, 0, 1, 1, 1)]
    assert [encode(stream, STOCK)[16 * i] & 7 for i in range(5)] == [3, 2, 0, 3, 1]
    assert decode(encode(stream, STOCK), STOCK) == stream
    assert encode([], STOCK) == b"" and decode(b"", STOCK) == []


def unsigned(width: int):
    return st.integers(0, (1 << width) - 1) | st.sampled_from([0, (1 << width) - 1])


TOKENS = st.builds(Tokens, *[st.booleans()] * 4)


def instructions(config: VtaConfig):
    size, loop, pad = unsigned(16), unsigned(14), unsigned(4)
    uop, inp, wgt, acc = (
        unsigned(n) for n in (config.log_uop_depth, config.log_inp_depth, config.log_wgt_depth, config.log_acc_depth)
    )
    end = unsigned(config.log_uop_depth + 1)
    return st.one_of(
        st.builds(Load, st.sampled_from(MemoryId), size, unsigned(32), size, size, size, pad, pad, pad, pad, TOKENS),
        st.builds(Store, size, unsigned(32), size, size, size, TOKENS),
        st.builds(Gemm, st.booleans(), uop, end, loop, loop, acc, acc, inp, inp, wgt, wgt, TOKENS),
        st.builds(
            Alu,
            st.sampled_from(AluOp),
            uop,
            end,
            loop,
            loop,
            acc,
            acc,
            acc,
            acc,
            st.booleans(),
            st.integers(-32768, 32767),
            TOKENS,
        ),
        st.builds(Finish, TOKENS),
    )


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(CONFIGS))
def test_round_trip(data: st.DataObject, config: VtaConfig):
    stream = data.draw(st.lists(instructions(config), max_size=8))
    encoded = encode(stream, config)
    again = decode(encoded, config)
    assert again == stream
    assert [[type(getattr(a, f.name)) for f in fields(a)] for a in again] == [
        [type(getattr(a, f.name)) for f in fields(a)] for a in stream
    ]
    assert encode(again, config) == encoded


@settings(deadline=None, max_examples=30)
@given(st.data(), st.sampled_from(CONFIGS))
def test_uop_round_trip(data: st.DataObject, config: VtaConfig):
    acc, wgt = unsigned(config.log_acc_depth), unsigned(config.log_wgt_depth)
    uops = np.array(data.draw(st.lists(st.tuples(acc, acc, wgt), min_size=1, max_size=20)), np.int64)
    np.testing.assert_array_equal(decode_uops(encode_uops(uops, config), config), uops)


GEMM, LOAD = Gemm(False, 0, 1, 1, 1), Load(MemoryId.INP, 0, 0, 1, 1, 1)


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        (replace(GEMM, src_out=2048), "instruction 2 (gemm): src_out is 2048, and its 11 bits hold 0 to 2047"),
        (replace(GEMM, wgt_in=1024), "wgt_in is 1024"),
        (replace(GEMM, uop_end=1 << 14), "uop_end is 16384"),
        (replace(GEMM, iter_in=-1), "iter_in is -1, and its 14 bits hold 0 to 16383"),
        (replace(LOAD, dram=1 << 32), "instruction 2 (load): dram is 4294967296"),
        (replace(LOAD, dram=1 << 80), "dram is 1208925819614629174706176"),
        (replace(LOAD, x_pad_1=16), "x_pad_1 is 16, and its 4 bits hold 0 to 15"),
        (Store(0, 0, 1 << 16, 1, 1), "instruction 2 (store): y_size is 65536"),
        (
            Alu(AluOp.ADD, 0, 1, 1, 1, imm=32768),
            "instruction 2 (alu): imm is 32768, and its 16 bits hold -32768 to 32767",
        ),
        (Alu(AluOp.ADD, 0, 1, 1, 1, imm=-32769), "imm is -32769"),
    ],
)
def test_what_does_not_fit_is_named(instruction: Instruction, words: str):
    with pytest.raises(EncodingError) as error:
        encode([LOAD, GEMM, instruction, LOAD, GEMM, Finish()], STOCK)
    assert words in str(error.value)
    assert error.value.index == 2


def test_the_first_fault_is_told():
    with pytest.raises(EncodingError, match="instruction 1 "):
        encode([GEMM, replace(GEMM, dst_in=4096), replace(LOAD, sram=-1), replace(GEMM, dst_in=4096)], STOCK)


def test_uop_that_does_not_fit():
    with pytest.raises(EncodingError, match="micro-op 1: wgt is 1024, and its 10 bits hold 0 to 1023"):
        encode_uops(np.array([[0, 0, 0], [0, 0, 1024]]), STOCK)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        (5, "instruction 1: there is no opcode 5"),
        (0 | 6 << 7, "there is no memory 6"),
        (1 | 2 << 7, "there is no store with memory 2"),
        (1 | 4 << 7 | 1 << 120, "x_pad_0 1"),
        (4 | 5 << 108, "there is no ALU operation 5"),
        (4 | 1 << 7, "reset 1"),
        (3 | 1 << 7, "(finish) has bits set outside its fields"),
        (2 | 1 << 63, "(gemm) has bits set outside its fields"),
    ],
)
def test_bits_that_mean_nothing(word: int, words: str):
    with pytest.raises(TargetError) as error:
        decode(encode([Finish()], STOCK) + word.to_bytes(16, "little"), STOCK)
    assert words in str(error.value)
    assert "instruction 1" in str(error.value)


def test_cut_data():
    with pytest.raises(TargetError, match="24 bytes"):
        decode(bytes(24), STOCK)
    with pytest.raises(TargetError, match="6 bytes"):
        decode_uops(bytes(6), STOCK)


def test_a_configuration_read_from_json_encodes_alike():
    assert bits(replace(GEMM, dst_out=9), from_json(STOCK.to_json(), "copy")) == bits(replace(GEMM, dst_out=9))
