"""Maps in DRAM, and the device "vta" on artifacts made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nestc.bundle.artifact import Artifact
from nestc.errors import BundleError, TargetError
from nestc.runtime.devices import device_for
from nestc.runtime.vta.config import PRESETS, VtaConfig
from nestc.runtime.vta.device import VtaDevice, VtaProgram
from nestc.runtime.vta.encode import encode, encode_uops
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Instruction, Load, MemoryId, Store, Tokens
from nestc.runtime.vta.layout import channels_first, map_bytes, pack, unpack

CONFIG = PRESETS["pynq_1x16x16"]
X, Y, W, U, END = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
PIXELS = 12


def sequential_pack(values: np.ndarray, config: VtaConfig) -> np.ndarray:
    """Each number of an (N, C, H, W) map to the place that the layout's formula gives it."""
    _, channels, height, width = values.shape
    blocks = -(-channels // config.block)
    found = np.zeros(map_bytes(values.shape, config), np.int8)
    for n, c, y, x in np.ndindex(values.shape):
        element = ((n // config.batch * blocks + c // config.block) * height + y) * width + x
        found[(element * config.batch + n % config.batch) * config.block + c % config.block] = values[n, c, y, x]
    return found.view(np.uint8)


@settings(deadline=None, max_examples=60)
@example((1, 16, 1, 1), CONFIG)  # the one map that lies in DRAM as ONNX has it
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([CONFIG, PRESETS["1x32x32"], replace(CONFIG, log_batch=1, log_inp_buff_size=16)]),
)
def test_maps(sizes, config):
    values = np.random.default_rng(sum(sizes)).integers(-128, 128, sizes).astype(np.int8)
    data = pack(values, sizes, config)
    np.testing.assert_array_equal(data, sequential_pack(values, config))
    data[data == 0] = 99  # padding may hold anything
    found = unpack(data, sizes, sizes, config)
    np.testing.assert_array_equal(np.where(values == 0, 99, values), found)
    assert found.flags.c_contiguous and not np.may_share_memory(found, data)


@pytest.mark.parametrize(
    ("shape", "rows"), [((7, 20), 7), ((2, 3, 20), 6), ((20,), 1), ((1, 4, 5, 20), 20), ((1, 20), 1)]
)
def test_matrices(shape, rows):
    values = np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)
    as_map = values.reshape(rows, 20).T.reshape(1, 20, 1, rows)
    data = pack(values, as_map.shape, CONFIG)
    np.testing.assert_array_equal(data, sequential_pack(as_map, CONFIG))
    np.testing.assert_array_equal(unpack(data, as_map.shape, shape, CONFIG), values)


@pytest.mark.parametrize(
    ("shape", "sizes", "wanted"),
    [
        ((1, 8, 5, 6), (1, 8, 5, 6), True),
        ((1, 8, 30), (1, 8, 5, 6), True),  # a view
        ((1, 1, 8, 8), (1, 8, 1, 8), False),
        ((1, 8, 9), (1, 8, 1, 9), True),  # one-dimensional convolution
        ((1, 9, 8), (1, 8, 1, 9), False),
        ((4, 8), (4, 8, 1, 1), True),  # batch of vectors
        ((4, 8), (1, 8, 1, 4), False),
    ],
)
def test_how_a_shape_is_read(shape, sizes, wanted):
    assert channels_first(shape, sizes) is wanted


def test_a_shape_that_is_no_map_is_refused():
    with pytest.raises(TargetError, match=r"\[2, 3\] is no map of \[1, 2, 1, 4\]"):
        channels_first((2, 3), (1, 2, 1, 4))


def doubling(first: int, count: int, weight: int) -> list[Instruction]:
    """y = clip(weight block @ x) for some pixels of a map of 16 channels."""
    x, y = X // 16 + first, Y // 16 + first
    micro_ops = Load(MemoryId.UOP, 0, U // 4, 1, 1, 1)
    return [
        Load(MemoryId.WGT, 0, W // 256 + weight, 1, 1, 1),
        Load(MemoryId.INP, 0, x, 1, count, count, tokens=Tokens(push_next=True)),
        micro_ops,
        Gemm(True, 0, 1, count, 1, 1),
        Gemm(False, 0, 1, count, 1, 1, 0, 1, tokens=Tokens(pop_prev=True)),
        Alu(AluOp.MIN, 0, 1, count, 1, 1, use_imm=True, imm=127),
        Alu(AluOp.MAX, 0, 1, count, 1, 1, use_imm=True, imm=-128, tokens=Tokens(push_next=True)),
        Store(0, y, 1, count, count, tokens=Tokens(pop_prev=True, push_prev=True)),
        Finish(Tokens(pop_next=True)),
    ]


def artifact(timing: Mapping[str, Any] | None = None, **changes: Any) -> Artifact:
    """Two launches: pixels 0..8 on two devices, then the rest on one, with other weights."""
    streams = {"a": doubling(0, 4, 0), "b": doubling(4, 4, 0), "c": doubling(8, 4, 1)}
    launches = [[{"insn": f"{n}.insn.bin", "count": len(streams[n])} for n in names] for names in ("ab", "c")]
    border = {"bytes": 16 * PIXELS, "shape": [1, 10, 3, 4], "map": [1, 10, 3, 4]}
    metadata = {
        "config": CONFIG.to_json(),
        "preset": CONFIG.name,
        "clock_hz": 100e6,
        "bus_bits": 64,
        "dram_bytes": END,
        "launches": launches,
        "inputs": [{"name": "x", "address": X, **border}],
        "outputs": [{"name": "y", "address": Y, **border}],
        "constants": [{"name": "w", "address": W}],
        "uops": [{"file": "p.uop.bin", "address": U}],
        "timing": timing or {},
        **changes,
    }
    files = {f"{name}.insn.bin": encode(stream, CONFIG) for name, stream in streams.items()}
    files["p.uop.bin"] = encode_uops(np.zeros((1, 3), np.int64), CONFIG)
    weights = np.stack([np.eye(16, dtype=np.int8) * 2, np.eye(16, dtype=np.int8)[:, ::-1] * 3])
    return Artifact("vta", files, {"w": weights}, json.loads(json.dumps(metadata)))


def expected(x: np.ndarray) -> np.ndarray:
    """The same with plain arithmetic; channels 10 to 15 are padding, so the second launch sees zeros there."""
    y = np.clip(2 * x.astype(np.int64), -128, 127)
    mirrored = np.zeros((1, 16, 1, 4), np.int64)
    mirrored[:, 6:] = x[:, ::-1, 2:]
    y[:, :, 2:] = np.clip(3 * mirrored[:, :10], -128, 127)
    return y.astype(np.int8)


def value(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, (1, 10, 3, 4)).astype(np.int8)


def program(**changes: Any) -> VtaProgram:
    return VtaDevice().load(artifact(**changes), 1)


def test_a_program_runs():
    loaded = device_for("vta").load(artifact({"seconds": 0.25, "cycles": 25}), 1)
    for seed in range(3):
        (y,), elapsed = loaded([value(seed)], [None])
        np.testing.assert_array_equal(y, expected(value(seed)))
        assert y.dtype == np.int8 and (elapsed.seconds, elapsed.kind) == (0.25, "modelled")


def test_outputs_are_written_where_they_are_wanted():
    given = np.zeros((1, 10, 3, 4), np.int8)
    (y,), _ = program()([value(1)], [given])
    assert y is given
    np.testing.assert_array_equal(given, expected(value(1)))


def test_without_a_time_the_streams_are_timed():
    (_, elapsed) = program()([value(1)], [None])
    # Three times nine instructions: some hundred cycles of 10 ns, and the first launch as long as one of its devices.
    assert elapsed.kind == "modelled" and 1e-6 < elapsed.seconds < 1e-4


def test_several_threads_may_call():
    loaded = program()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: loaded([value(seed)], [None])[0][0], range(16)))
    for seed, y in enumerate(found):
        np.testing.assert_array_equal(y, expected(value(seed)))


def test_a_closed_program_says_so():
    loaded = program()
    loaded.close()
    with pytest.raises(TargetError, match="closed"):
        loaded([value(0)], [None])


def test_an_input_of_another_shape_is_refused():
    with pytest.raises(TargetError, match=r"'x' as int8\[1, 10, 3, 4\], not int8\[10, 3, 4\]"):
        program()([value(0)[0]], [None])


FAR = {"name": "y", "address": END - 16, "bytes": 16 * PIXELS, "shape": [1, 10, 3, 4], "map": [1, 10, 3, 4]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"launches": None}, "not complete"),
        ({"config": {}}, "lacks LOG_INP_WIDTH"),
        ({"clock_hz": 0}, "clock is 0 Hz"),
        ({"bus_bits": "64"}, "data bus"),
        ({"dram_bytes": -1}, "memory of -1 bytes"),
        ({"dram_bytes": 1 << 40}, "32 bits"),
        ({"dram_bytes": U}, r"'p.uop.bin' \(4 bytes at 0x4000\)"),
        ({"constants": [{"name": "v", "address": W}]}, "not complete: KeyError"),
        ({"launches": [[{"insn": "z.insn.bin", "count": 9}]]}, "not complete: KeyError"),
        ({"launches": [[{"insn": "a.insn.bin", "count": 8}]]}, "holds 9 instructions, not 8"),
        ({"launches": [[{"insn": "p.uop.bin", "count": 8}]]}, "has 4 bytes"),
        ({"outputs": [FAR]}, r"'y' \(192 bytes at 0x4ff0\)"),
        ({"outputs": [{**FAR, "bytes": 5}]}, "'y' has 5 bytes, but a map"),
        ({"outputs": [{**FAR, "shape": [1, 10, 4, 4]}]}, r"\[1, 10, 4, 4\] is no map of \[1, 10, 3, 4\]"),
    ],
)
def test_artifacts_that_are_not_well_formed(changes, words):
    with pytest.raises(BundleError, match=words):
        program(**changes)


def test_a_deadlock_is_found_when_loading():
    good = artifact()
    bad = encode([Finish(Tokens(pop_prev=True))], CONFIG)
    launches = [[{"insn": "a.insn.bin", "count": 1}]]
    broken = replace(good, files={**good.files, "a.insn.bin": bad}, metadata={**good.metadata, "launches": launches})
    with pytest.raises(BundleError, match=r"deadlock.*instruction 0 \(FINISH\)"):
        VtaDevice().load(broken, 1)
