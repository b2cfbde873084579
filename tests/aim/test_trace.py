from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestc.errors import TargetError
from nestc.runtime.aim import commands as c
from nestc.runtime.aim.encode import RECORD_BYTES, decode, encode
from nestc.runtime.aim.machine import preset
from nestc.runtime.aim.trace import format_trace, parse_trace

MACHINE = preset("gddr6_aim")
ALL = (1 << 32) - 1

# The words, order and number of fields are those that aim_trace.cpp and request.h take.
LINES = {
    c.WrSbk(1, 15, 2, 3): "AiM WR_SBK 1 0x0000000f 2 3",
    c.WrAbk(1, 8, 3): "AiM WR_ABK 1 0x00000008 3",
    c.WrGb(64, 2, ALL): "AiM WR_GB 64 2 0xffffffff",
    c.WrBias(4, ALL): "AiM WR_BIAS 4 0xffffffff",
    c.RdMac(8, ALL): "AiM RD_MAC 8 0xffffffff",
    c.RdAf(12, ALL): "AiM RD_AF 12 0xffffffff",
    c.RdSbk(20, 1, 5, 7): "AiM RD_SBK 20 0x00000001 5 7",
    c.CopyBkGb(2, 15, 0, 9): "AiM COPY_BKGB 2 0x0000000f 0 9",
    c.CopyGbBk(2, 15, 0, 9): "AiM COPY_GBBK 2 0x0000000f 0 9",
    c.MacSbk(2, 15, 1, 9): "AiM MAC_SBK 2 0x0000000f 1 9",
    c.MacAbk(64, ALL, 5): "AiM MAC_ABK 64 0xffffffff 5",
    c.Af(15): "AiM AF 0x0000000f",
    c.EwMul(2, 15, 3): "AiM EWMUL 2 0x0000000f 3",
    c.EwAdd(4, 8, 12): "AiM EWADD 4 8 12",
    c.Sync(): "AiM SYNC",
    c.Eoc(): "AiM EOC",
    c.WriteGpr(3): "W GPR 3",
    c.ReadGpr(3): "R GPR 3",
    c.WriteCfr(0, 1): "W CFR 0 1",
    c.ReadCfr(2): "R CFR 2 0",
    # Our channel 0 is bit 0 of a mask, which the simulator calls channel 31.
    c.WriteMem(0, 2, 8): "W MEM 31 2 8",
    c.ReadMem(31, 2, 8): "R MEM 0 2 8",
}


@pytest.mark.parametrize(("command", "line"), LINES.items(), ids=list(LINES.values()))
def test_each_request_has_its_line(command, line):
    assert format_trace([command]) == line + "\n"
    assert parse_trace(line) == [command]


def test_every_kind_has_a_line():
    assert {type(command) for command in LINES} == set(c.KINDS)


def test_where_to_start_in_a_row_is_a_comment():
    stream = [c.MacAbk(4, ALL, 5, 32), c.MacAbk(4, ALL, 5)]
    assert format_trace(stream) == "# column 32\nAiM MAC_ABK 4 0xffffffff 5\nAiM MAC_ABK 4 0xffffffff 5\n"
    assert parse_trace(format_trace(stream)) == stream


def test_comments_empty_lines_prefixes_and_decimal_masks_are_read():
    text = "# a comment\n\n  AiM ISR_MAC_ABK 2 15 3  \n# column 1\nAiM WR_GB 1 0 0XF\n"
    assert parse_trace(text) == [c.MacAbk(2, 15, 3), c.WrGb(1, 0, 15, 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("AiM EOC\nAiM WR_AFLUT 1", "line 2 of the trace: there is no request 'AiM WR_AFLUT'"),
        ("AiM MAC_ABK 64 0xff", "line 1 of the trace: AiM MAC_ABK takes 3 numbers, not 2"),
        ("AiM RD_MAC 1 x", "line 1 of the trace: '1 x' are not all whole numbers"),
        ("# column 4\nAiM EOC", "line 2 of the trace: AiM EOC does not start at a column"),
        ("# column", "line 1 of the trace: # column takes 1 numbers, not 0"),
        ("AiM", "there is no request 'AiM'"),
    ],
)
def test_wrong_traces_are_refused_with_the_line(text, message):
    with pytest.raises(TargetError, match=message):
        parse_trace(text)


def small(high):
    return st.integers(0, high)


size, mask, bank = st.integers(1, 64), st.integers(1, ALL), small(15)
row, column, gpr, channel = small(16383), small(63), small(16383), small(31)
ANY = st.one_of(
    st.builds(c.WrSbk, gpr, mask, bank, row, column),
    st.builds(c.WrAbk, gpr, mask, row, column),
    st.builds(c.WrGb, size, gpr, mask, column),
    st.builds(c.WrBias, gpr, mask),
    st.builds(c.RdMac, gpr, mask),
    st.builds(c.RdAf, gpr, mask),
    st.builds(c.RdSbk, gpr, mask, bank, row, column),
    st.builds(c.CopyBkGb, size, mask, bank, row, column),
    st.builds(c.CopyGbBk, size, mask, bank, row, column),
    st.builds(c.MacSbk, size, mask, bank, row, column),
    st.builds(c.MacAbk, size, mask, row, column),
    st.builds(c.Af, mask),
    st.builds(c.EwMul, size, mask, row, column),
    st.builds(c.EwAdd, st.integers(1, 500), gpr, gpr),
    st.just(c.Sync()),
    st.just(c.Eoc()),
    st.builds(c.WriteGpr, gpr),
    st.builds(c.ReadGpr, gpr),
    st.builds(c.WriteCfr, small(2), small(7)),
    st.builds(c.ReadCfr, small(2)),
    st.builds(c.WriteMem, channel, bank, row, column),
    st.builds(c.ReadMem, channel, bank, row, column),
)


@given(st.lists(ANY, max_size=20))
def test_text_and_bytes_read_back(stream):
    assert parse_trace(format_trace(stream)) == stream
    data = encode(stream)
    assert len(data) == RECORD_BYTES * len(stream)
    assert decode(data) == stream


def test_wrong_bytes_are_refused():
    data = bytearray(encode([c.MacAbk(64, ALL, 5), c.Eoc()]))
    with pytest.raises(TargetError, match="has 63 bytes; it must be a multiple of 32"):
        decode(bytes(data[:-1]))
    with pytest.raises(TargetError, match="request 1: there is no code 99"):
        decode(bytes(data[:32]) + bytes([99]) + bytes(31))
    with pytest.raises(TargetError, match="request 1 .EOC. has a number in a field that it does not have"):
        decode(bytes(data[:-1]) + b"\1")
    data[21] = 1
    with pytest.raises(TargetError, match="bits set between its fields"):
        decode(bytes(data))


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(TargetError, match=r"request 1 \(WR_GB\): size is 70000; its field holds 0 to 65535"):
        encode([c.Eoc(), c.WrGb(70000, 0, 1)])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (c.MacAbk(65, ALL, 0), "columns 0 to 64 are not all among the 64 of a global buffer"),
        (c.EwMul(1, 1, 0, 64), "columns 64 to 64 are not all among the 64 of a row"),
        (c.MacAbk(0, ALL, 0), "size is 0; it must be at least 1"),
        (c.MacAbk(1, 0, 0), "must name at least one of 32 channels"),
        (c.MacAbk(1, 1 << 32, 0), "must name at least one of 32 channels"),
        (c.MacAbk(1, 1, 16384), "row is 16384; it must be from 0 to 16383"),
        (c.MacSbk(1, 1, 16, 0), "bank is 16; it must be from 0 to 15"),
        (c.WrAbk(0, 3, 0), "takes one channel, and the mask 0x3 names several"),
        (c.WrGb(64, 16370, 1), "registers 16370 to 16433 are not all among the 16384"),
        (c.RdMac(16383, 3), "registers 16383 to 16384 are not all"),
        (c.EwAdd(2, 0, 16383), "registers 16383 to 16384 are not all"),
        (c.WriteCfr(0, 2), "value is 2; it must be from 0 to 1"),
        (c.WriteCfr(3, 0), "cfr is 3; it must be from 0 to 2"),
        (c.WriteMem(32, 0, 0), "channel is 32; it must be from 0 to 31"),
        (c.Eoc(), "request 1 of 3 is EOC, which must be the last one"),
    ],
)
def test_requests_that_the_machine_does_not_have_are_refused(command, message):
    with pytest.raises(TargetError, match=message):
        c.check([c.Sync(), command, c.Eoc()], MACHINE)


def test_a_stream_must_end():
    with pytest.raises(TargetError, match="must end with EOC"):
        c.check([c.Sync()], MACHINE)
    with pytest.raises(TargetError, match="registers 8 to 8 are not all among the 8"):
        c.check([c.WriteGpr(8), c.Eoc()], MACHINE, gprs=8)


def test_products_of_banks_need_three_banks_a_group():
    machine = replace(MACHINE, bank_groups=8, banks_per_group=2)
    with pytest.raises(TargetError, match="takes three banks of a group, and 'gddr6_aim' has 2"):
        c.check([c.EwMul(1, 1, 0), c.Eoc()], machine)


def test_kinds_are_counted():
    stream = [c.WriteGpr(0), c.WriteGpr(1), c.MacAbk(1, 1, 0), c.Eoc()]
    assert c.count_kinds(stream) == {"W GPR": 2, "MAC_ABK": 1, "EOC": 1}
    assert c.channels_of(0b1010) == [1, 3]
