"""One convolution on VTA with wider and wider buses, in the schedule of which cycles are published, and in ours.

Published (apache/tvm-vta pull request 32, ``test_benchmark_topi_conv2d.py`` limited to layer C2 of ResNet-18): million
cycles by bits of the bus. What was counted there follows from the figures: 78 of the 97 million cycles shrink with the
bus, which is the traffic of five runs (one to warm up, four timed) under TVM's fallback schedule, whose tiles are one
element: for every one of 56 x 56 x 4 outputs and of 4 input blocks, 3 x 3 inputs and 3 x 3 weight blocks are loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import nestc
from nestc.driver import build, with_fallbacks
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Instruction, Load, MemoryId, Store, Tokens
from nestc.runtime.vta.timing import simulate_timing
from nestc.targets import resolve

PUBLISHED = {64: 97_000_000, 128: 58_000_000, 256: 39_000_000, 512: 29_000_000}
"""Cycles by bits of the bus."""

RUNS = 5
SIZE, BLOCKS, KERNEL = 56, 4, 3
_ROWS = 2
"""Output rows that are simulated, of 56; the others are the same, and counted without being simulated."""


@dataclass(frozen=True)
class BusRow:
    """Cycles of layer C2 with a bus of so many bits; two are simulated: ``same``, of the published schedule, and
    ``ours``, of one run with tiles of our own."""

    bits: int
    published: int
    same: int
    ours: int


def bus_widths() -> list[BusRow]:
    """Simulated beside published cycles on the default machine, for each width that was published."""
    rows: list[BusRow] = []
    for bits, published in PUBLISHED.items():
        machine = dataclasses.replace(VtaConfig(), bus_bits=bits)
        cycles = [simulate_timing([*_outputs(rows_), Finish()], machine).cycles for rows_ in (_ROWS, 2 * _ROWS)]
        # The difference leaves out how the stream starts and ends.
        same = RUNS * (cycles[1] - cycles[0]) * SIZE // _ROWS
        rows.append(BusRow(bits, published, same, _ours(f"vta:bus_bits={bits}")))
    return rows


def _ours(target: str) -> int:
    """Cycles of the layer as it is compiled for a target."""
    done = build(nestc.load(_layer()), with_fallbacks(resolve([target]), 1))
    return sum(each.metadata["timing"]["cycles"] for each in done.artifacts.values() if each.kind == "vta")


def _layer() -> onnx.ModelProto:
    """The layer on int8: convolution, bias, shift by 8, clip to 0..127."""
    random = np.random.default_rng(0)
    channels = BLOCKS * 16
    constants = {
        "w": random.integers(-127, 128, (channels, channels, KERNEL, KERNEL), np.int8),
        "b": random.integers(-1000, 1000, channels, np.int32),
        "one": np.float32(1.0),
        "scale": np.float32(256.0),
        "zero": np.int8(0),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "one", "zero"], ["xr"]),
        helper.make_node("DequantizeLinear", ["w", "one", "zero"], ["wr"]),
        helper.make_node("DequantizeLinear", ["b", "one"], ["br"]),
        helper.make_node("Conv", ["xr", "wr", "br"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "scale", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(each, TensorProto.INT8, [1, channels, SIZE, SIZE]) for each in "xy")
    weights = [numpy_helper.from_array(np.asarray(array), key) for key, array in constants.items()]
    graph = helper.make_graph(nodes, "resnet18_c2", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _outputs(rows: int) -> Iterator[Instruction]:
    """The stream for so many rows of outputs, starting at the second, tile after tile, with one buffer of each sort."""
    yield Load(MemoryId.UOP, 0, 0, 1, 4, 4)
    first = True
    for row in range(1, rows + 1):
        for block in range(BLOCKS):
            for column in range(SIZE):
                yield from _tile(row, block, column, first)
                first = False


def _tile(row: int, block: int, column: int, first: bool) -> Iterator[Instruction]:
    """One output element: reset, four steps of 3 x 3 products, shift, bias, clip, store."""
    yield Gemm(True, 0, 1, 1, 1, tokens=Tokens(pop_next=not first, push_prev=True))
    for source in range(BLOCKS):
        left, right = max(column - 1, 0), min(column + 2, SIZE)
        yield Load(
            MemoryId.INP, 0, (source * SIZE + row - 1) * SIZE + left, KERNEL, right - left, SIZE,
            x_pad_0=left - (column - 1), x_pad_1=column + 2 - right, tokens=Tokens(pop_next=True),
        )  # fmt: skip
        taps = KERNEL * KERNEL
        yield Load(MemoryId.WGT, 0, (block * BLOCKS + source) * taps, 1, taps, taps, tokens=Tokens(push_next=True))
        last = source == BLOCKS - 1
        yield Gemm(
            False, 1, 2, KERNEL, KERNEL, src_out=KERNEL, src_in=1, wgt_out=KERNEL, wgt_in=1,
            tokens=Tokens(pop_prev=True, push_prev=not last),
        )  # fmt: skip
    yield Alu(AluOp.SHR, 2, 3, 1, 1, use_imm=True, imm=8)
    yield Load(MemoryId.ACC, 1, block, 1, 1, 1)
    yield Alu(AluOp.ADD, 3, 4, 1, 1)
    yield Alu(AluOp.MIN, 2, 3, 1, 1, use_imm=True, imm=127)
    yield Alu(AluOp.MAX, 2, 3, 1, 1, use_imm=True, imm=0, tokens=Tokens(push_next=True))
    yield Store(0, (block * SIZE + row) * SIZE + column, 1, 1, 1, tokens=Tokens(pop_prev=True, push_prev=True))
