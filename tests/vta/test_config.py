"""VTA's configuration: what its keys mean, what follows from them, and what is refused in words."""

import json
from dataclasses import replace

import pytest

from nestc.errors import TargetError
from nestc.runtime.vta.config import KEYS, PRESETS, VtaConfig, from_json, load, preset

# The content of tvm-vta's config/vta_config.json, as facts.
STOCK = {
    "TARGET": "sim",
    "HW_VER": "0.0.1",
    "LOG_INP_WIDTH": 3,
    "LOG_WGT_WIDTH": 3,
    "LOG_ACC_WIDTH": 5,
    "LOG_BATCH": 0,
    "LOG_BLOCK": 4,
    "LOG_UOP_BUFF_SIZE": 15,
    "LOG_INP_BUFF_SIZE": 15,
    "LOG_WGT_BUFF_SIZE": 18,
    "LOG_ACC_BUFF_SIZE": 17,
    "ACC_DEP_DISTANCE": 3,
}


def test_stock_file_is_the_default_preset():
    config = from_json(json.dumps(STOCK), "pynq_1x16x16")
    assert config == preset("pynq_1x16x16") == VtaConfig()
    assert (config.batch, config.block) == (1, 16)
    assert (config.uop_depth, config.inp_depth, config.wgt_depth, config.acc_depth) == (8192, 2048, 1024, 2048)
    assert (config.inp_bytes, config.wgt_bytes, config.acc_bytes) == (16, 256, 64)
    assert (config.clock_hz, config.bus_bits) == (100e6, 64)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_fit_and_go_through_json(name: str):
    config = preset(name)
    assert config.name == name
    assert config.layouts.gemm.bits == config.layouts.alu.bits == config.layouts.memory.bits == 128
    assert config.layouts.uop.bits == 32
    again = from_json(json.dumps(config.to_json()), name)
    assert replace(again, clock_hz=config.clock_hz, bus_bits=config.bus_bits) == config
    assert list(config.to_json()) == list(KEYS)


def test_larger_preset():
    config = preset("1x32x32")
    assert (config.block, config.inp_bytes, config.wgt_bytes, config.acc_bytes) == (32, 32, 1024, 128)
    assert (config.uop_depth, config.inp_depth, config.wgt_depth, config.acc_depth) == (8192, 2048, 1024, 2048)


def test_board_gives_clock_and_bus():
    config = from_json(STOCK | {"TARGET": "zcu104"}, "board")
    assert (config.clock_hz, config.bus_bits) == (333e6, 128) == (preset("zcu102_1x16").clock_hz, 128)


def test_batch_shares_the_element():
    config = from_json(STOCK | {"LOG_BATCH": 1}, "two")
    assert (config.inp_bytes, config.acc_bytes, config.inp_depth, config.acc_depth) == (32, 128, 1024, 1024)


def test_file_is_named_after(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(STOCK | {"LOG_BLOCK_IN": 4, "LOG_BLOCK_OUT": 4, "LOG_OUT_BUFF_SIZE": 15}))
    assert load(path) == VtaConfig("mine")
    with pytest.raises(TargetError, match="cannot be read"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"LOG_BLOCK": "4"}, "LOG_BLOCK is '4'; it must be an integer"),
        ({"LOG_BLOCK": 4.0}, "must be an integer"),
        ({"LOG_BATCH": True}, "LOG_BATCH is True; it must be an integer"),
        ({"LOG_BATCH": -1}, "LOG_BATCH is -1; it must be from 0 to 5"),
        ({"LOG_BLOCK": 1}, "LOG_BLOCK is 1; it must be from 2 to 8"),
        ({"LOG_BLOCK": 40}, "LOG_BLOCK is 40"),
        ({"LOG_ACC_BUFF_SIZE": 10**9}, "LOG_ACC_BUFF_SIZE is 1000000000; it must be from 0 to 30"),
        ({"LOG_INP_WIDTH": 2}, "only for 8-bit inputs and weights and 32-bit accumulators"),
        ({"LOG_ACC_WIDTH": 4}, "LOG_ACC_WIDTH is 4"),
        ({"LOG_WGT_BUFF_SIZE": 7}, "fewer than two elements, of 256 bytes each"),
        ({"LOG_UOP_BUFF_SIZE": 1}, "LOG_UOP_BUFF_SIZE 1 makes a buffer of fewer than two"),
        ({"LOG_INP_BUFF_SIZE": 21}, "an SRAM address has 16 bits"),
        ({"LOG_UOP_BUFF_SIZE": 16}, "a GEMM instruction would take 192 bits"),
        ({"LOG_INP_BUFF_SIZE": 16}, "a GEMM instruction would take 192 bits"),
        ({"LOG_ACC_BUFF_SIZE": 18}, "a GEMM instruction would take 192 bits"),
        ({"LOG_ACC_BUFF_SIZE": 18, "LOG_INP_BUFF_SIZE": 13}, "an ALU instruction would take 192 bits"),
        ({"LOG_WGT_BUFF_SIZE": 19, "LOG_INP_BUFF_SIZE": 14}, "a micro-op would take 64 bits"),
        ({"LOG_BLOCK_OUT": 5}, "LOG_BLOCK_OUT is 5, but the other keys make it 4"),
        ({"LOG_OUT_WIDTH": 4}, "LOG_OUT_WIDTH is 4"),
    ],
)
def test_refused_in_words(change: dict[str, object], words: str):
    with pytest.raises(TargetError) as error:
        from_json(STOCK | change, "bad")
    assert words in str(error.value)
    assert "'bad'" in str(error.value)


def test_missing_keys_and_bad_text():
    with pytest.raises(TargetError, match="lacks LOG_BATCH, LOG_BLOCK;"):
        from_json({key: value for key, value in STOCK.items() if key not in ("LOG_BATCH", "LOG_BLOCK")}, "short")
    with pytest.raises(TargetError, match="is not JSON"):
        from_json("{", "broken")
    with pytest.raises(TargetError, match="is not a JSON object"):
        from_json("[1]", "list")


def test_parameters_beside_the_keys():
    assert replace(VtaConfig(), bus_bits=512).bus_bits == 512
    with pytest.raises(TargetError, match="power of two"):
        replace(VtaConfig(), bus_bits=96)
    with pytest.raises(TargetError, match="the clock is 0"):
        replace(VtaConfig(), clock_hz=0)
    with pytest.raises(TargetError, match="there is no VTA configuration 'x'; there are pynq_1x16x16"):
        preset("x")
