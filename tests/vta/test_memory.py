"""The DRAM plan: addresses as allocations have them, values that share memory, and what does not fit."""

import itertools

import pytest

from nestc.errors import TargetError
from nestc.runtime.vta.config import PRESETS, VtaConfig
from nestc.targets.vta.memory import DISTANCE, PAGE, START, Dram, Value

CONFIG = PRESETS["pynq_1x16x16"]


def test_the_first_buffer_lies_where_tvm_vta_allocates_first_and_all_begin_at_pages():
    dram = Dram(CONFIG)
    assert dram.place("a", 1) == START == 0x1000
    assert dram.place("b", PAGE + 1) == 0x2000
    assert dram.place("c", 16) == 0x4000
    assert dram.end == 0x5000 and dram.addresses == {"a": 0x1000, "b": 0x2000, "c": 0x4000}


def test_elements_larger_than_a_page_are_aligned_to_themselves():
    large = VtaConfig("large", log_block=8, log_wgt_buff_size=20, log_inp_buff_size=18, log_acc_buff_size=19)
    dram = Dram(large)
    assert large.wgt_bytes == 1 << 16
    assert dram.place("a", 100) % large.wgt_bytes == 0 and dram.place("b", 1) % large.wgt_bytes == 0


def test_intermediate_values_share_memory_unless_they_live_at_the_same_time():
    dram = Dram(CONFIG)
    dram.place("x", 5000)
    values = [Value(f"v{number}", 10_000 + 4096 * (number % 3), number, number + 1) for number in range(12)]
    dram.place_intermediate(values)
    for one, other in itertools.combinations(values, 2):
        apart = one.last + DISTANCE < other.first or other.last + DISTANCE < one.first
        low, high = sorted((one, other), key=lambda value: dram.addresses[value.name])
        overlap = dram.addresses[low.name] + low.bytes > dram.addresses[high.name]
        assert apart or not overlap
    assert all(dram.addresses[value.name] >= 0x3000 for value in values)
    assert dram.end < 0x3000 + sum(value.bytes for value in values) // 2
    after = dram.place("weights", 10)
    assert after + PAGE == dram.end and all(dram.addresses[each.name] + each.bytes <= after for each in values)


def test_a_view_and_a_part_lie_in_their_whole():
    dram = Dram(CONFIG)
    dram.place("x", 16)
    dram.place_inside({"z": ("x", 64), "y": ("x", 0)})
    assert dram.addresses["y"] == dram.addresses["x"] == dram.addresses["z"] - 64


def test_addresses_end_at_32_bits():
    dram = Dram(CONFIG)
    dram.place("most", (1 << 32) - START)
    with pytest.raises(TargetError, match="its addresses have 32 bits; use a smaller batch"):
        dram.place("more", 1)


def test_a_value_keeps_its_memory_while_a_layer_reads_it() -> None:
    """A layer stores tiles of its result before it has loaded the last of its source."""
    dram = Dram(VtaConfig())
    dram.place_intermediate([Value("a", 4096, 0, 1), Value("b", 4096, 1, 2), Value("c", 4096, 2, 3)])
    assert len({dram.addresses[name] for name in "ab"}) == len({dram.addresses[name] for name in "bc"}) == 2
