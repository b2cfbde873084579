"""Networks of which VTA's cycles are published, in the schedules that TVM has for VTA: a check of the timing model.

Published (apache/tvm-vta pull request 30): cycles of the RTL for whole networks, first convolution and classifier on
the CPU, tuned by TVM; of single layers none. The tiles that were used are not published. Here each convolution has the
tiles that are fastest in the simulator among those of TVM's space (``schedule_conv2d_packed``: sizes of rows, columns,
input and output blocks, two virtual threads over rows or output blocks), with that schedule's order of instructions
and tokens: reset, for each group of input blocks loads with padding and one product, bias, five more ALU operations
(ReLU, rounding, shift, two bounds), store. Residual sums are left out, since it is not said where they ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Instruction, Load, MemoryId, Store, Tokens
from nestc.runtime.vta.timing import simulate_timing

BLOCK = 16
IMMEDIATES = (AluOp.MAX, AluOp.ADD, AluOp.SHR, AluOp.MIN, AluOp.MAX)
"""ALU operations after the bias: ReLU, rounding, shift, upper and lower bound."""

_INP, _WGT, _ACC, _OUT, _UOP = 1 << 16, 1 << 15, 1 << 8, 1 << 21, 1 << 10
_MOST_TRIED = 60


@dataclass(frozen=True)
class Convolution:
    """A square convolution with "same" padding: size of its input, channels in and out, kernel, stride."""

    size: int
    inputs: int
    outputs: int
    kernel: int
    stride: int

    @property
    def output(self) -> int:
        """Rows and columns of the result."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def ideal(self) -> int:
        """Cycles of its products alone, those with padding included."""
        return self.output**2 * self.kernel**2 * (self.inputs // BLOCK) * (self.outputs // BLOCK)


@dataclass(frozen=True)
class Tiles:
    """Rows, columns, input blocks and output blocks of a tile; two tiles go side by side, along ``thread``."""

    rows: int
    columns: int
    inputs: int
    outputs: int
    thread: str = "outputs"


@dataclass(frozen=True)
class NetworkRow:
    """Simulated and published cycles of a network, and those of its products alone."""

    network: str
    simulated: int
    published: int
    ideal: int


def _net(*rows: tuple[int, tuple[int, int, int, int, int], Tiles]) -> tuple[tuple[int, Convolution, Tiles], ...]:
    return tuple((count, Convolution(*layer), tiles) for count, layer, tiles in rows)


def _basic(counts: Sequence[int]) -> tuple[tuple[int, Convolution, Tiles], ...]:
    """ResNet-18 and -34 after the first convolution; `counts`: 3x3 convolutions of stride 1 by stage."""
    a, b, c, d = counts
    return _net(
        (a, (56, 64, 64, 3, 1), Tiles(8, 56, 1, 2)),
        (1, (56, 64, 128, 3, 2), Tiles(7, 28, 1, 4, "rows")),
        (1, (56, 64, 128, 1, 2), Tiles(7, 14, 2, 8, "rows")),
        (b, (28, 128, 128, 3, 1), Tiles(14, 28, 1, 2)),
        (1, (28, 128, 256, 3, 2), Tiles(14, 14, 1, 4)),
        (1, (28, 128, 256, 1, 2), Tiles(7, 7, 2, 16, "rows")),
        (c, (14, 256, 256, 3, 1), Tiles(14, 14, 1, 4)),
        (1, (14, 256, 512, 3, 2), Tiles(7, 7, 1, 8)),
        (1, (14, 256, 512, 1, 2), Tiles(7, 7, 1, 16)),
        (d, (7, 512, 512, 3, 1), Tiles(7, 7, 1, 8)),
    )


NETWORKS: Mapping[str, tuple[int, tuple[tuple[int, Convolution, Tiles], ...]]] = {
    "resnet18": (7_729_601, _basic((4, 3, 3, 3))),
    "resnet34": (15_736_441, _basic((6, 7, 11, 5))),
    "resnet50_v2": (
        22_012_906,
        _net(
            (1, (56, 64, 64, 1, 1), Tiles(4, 56, 2, 4, "rows")),
            (3, (56, 64, 64, 3, 1), Tiles(8, 56, 1, 2)),
            (4, (56, 64, 256, 1, 1), Tiles(4, 56, 2, 4)),
            (2, (56, 256, 64, 1, 1), Tiles(4, 56, 2, 4, "rows")),
            (1, (56, 256, 128, 1, 1), Tiles(4, 56, 4, 4)),
            (1, (56, 128, 128, 3, 2), Tiles(7, 28, 1, 4, "rows")),
            (1, (56, 256, 512, 1, 2), Tiles(2, 28, 4, 16)),
            (4, (28, 128, 512, 1, 1), Tiles(7, 28, 4, 4)),
            (3, (28, 512, 128, 1, 1), Tiles(7, 28, 4, 4)),
            (3, (28, 128, 128, 3, 1), Tiles(14, 28, 1, 2)),
            (1, (28, 512, 256, 1, 1), Tiles(4, 28, 8, 8)),
            (1, (28, 256, 256, 3, 2), Tiles(14, 14, 1, 4)),
            (1, (28, 512, 1024, 1, 2), Tiles(2, 14, 4, 32)),
            (6, (14, 256, 1024, 1, 1), Tiles(7, 14, 8, 8)),
            (5, (14, 1024, 256, 1, 1), Tiles(7, 14, 8, 8)),
            (5, (14, 256, 256, 3, 1), Tiles(14, 14, 1, 4)),
            (1, (14, 1024, 512, 1, 1), Tiles(7, 14, 8, 8)),
            (1, (14, 512, 512, 3, 2), Tiles(7, 7, 1, 16)),
            (1, (14, 1024, 2048, 1, 2), Tiles(7, 7, 2, 16)),
            (3, (7, 512, 2048, 1, 1), Tiles(7, 7, 2, 16)),
            (2, (7, 2048, 512, 1, 1), Tiles(7, 7, 2, 16)),
            (2, (7, 512, 512, 3, 1), Tiles(7, 7, 1, 8)),
        ),
    ),
}
"""By network: published cycles; how often each convolution occurs, and its tiles as `search` finds them."""


def networks() -> list[NetworkRow]:
    """Simulated beside published cycles of every network, at 1x16x16 with a bus of 64 bits."""
    return [
        NetworkRow(
            name,
            sum(count * cycles(layer, tiles) for count, layer, tiles in layers),
            published,
            sum(count * layer.ideal for count, layer, _ in layers),
        )
        for name, (published, layers) in NETWORKS.items()
    ]


@cache
def cycles(layer: Convolution, tiles: Tiles) -> int:
    """Simulated cycles of a layer."""
    return simulate_timing(list(stream(layer, tiles)), VtaConfig()).cycles


def search(layer: Convolution) -> Tiles:
    """The fastest of the largest tiles that fit, two of each side by side, in the default machine's SRAMs."""
    found = sorted(_fitting(layer), key=lambda t: -t.rows * t.columns * t.inputs * t.outputs)
    return min(found[:_MOST_TRIED], key=lambda tiles: cycles(layer, tiles))


def _fitting(layer: Convolution) -> Iterator[Tiles]:
    config, size, kernel = VtaConfig(), layer.output, layer.kernel
    blocks = layer.outputs // BLOCK
    for thread in ("outputs", "rows"):
        for rows in _divisors(size):
            for columns in [size, *([size // 2] if size % 2 == 0 else [])]:
                read = ((rows - 1) * layer.stride + kernel) * ((columns - 1) * layer.stride + kernel)
                for outputs in _divisors(blocks):
                    if (blocks // outputs if thread == "outputs" else size // rows) % 2:
                        continue
                    for inputs in _divisors(layer.inputs // BLOCK):
                        fits = (
                            2 * read * inputs <= config.inp_depth
                            and 2 * outputs * inputs * kernel**2 <= config.wgt_depth
                            and 2 * outputs * rows * columns <= config.acc_depth
                        )
                        if fits and (kernel == 1 or inputs <= 2):
                            yield Tiles(rows, columns, inputs, outputs, thread)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def stream(layer: Convolution, tiles: Tiles) -> Iterator[Instruction]:
    """Instructions of a layer in TVM's order; addresses are of no buffer, but aligned as buffers are."""
    taps, steps = layer.kernel**2, layer.inputs // BLOCK
    uops = taps * tiles.inputs * tiles.outputs
    size = layer.output
    yield Load(MemoryId.UOP, 0, _UOP, 1, uops + tiles.outputs, uops + tiles.outputs)
    for number, pair in enumerate(_pairs(layer, tiles)):
        for _ in pair:
            tokens = Tokens(pop_next=number > 0, push_prev=True)
            yield Gemm(True, 0, tiles.outputs, tiles.rows, tiles.columns, tokens=tokens)
        for step in range(0, steps, tiles.inputs):
            for row, block, column in pair:
                for source in range(step, step + tiles.inputs):
                    yield _input(layer, tiles, source, row, column, Tokens(pop_next=source == step))
                place = _WGT + (block * steps + step) * taps
                tokens = Tokens(push_next=True)
                yield Load(MemoryId.WGT, 0, place, tiles.outputs, tiles.inputs * taps, steps * taps, tokens=tokens)
            for _ in pair:
                tokens = Tokens(pop_prev=True, push_prev=step + tiles.inputs < steps)
                yield Gemm(False, 0, uops, tiles.rows, tiles.columns, tokens=tokens)
        for _, block, _ in pair:
            yield Load(MemoryId.ACC, 0, _ACC + block, 1, tiles.outputs, tiles.outputs)
            yield Alu(AluOp.ADD, 0, tiles.outputs, tiles.rows, tiles.columns)
            for i, op in enumerate(IMMEDIATES, 1):
                tokens = Tokens(push_next=i == len(IMMEDIATES))
                yield Alu(op, 0, tiles.outputs, tiles.rows, tiles.columns, use_imm=True, tokens=tokens)
        for row, block, column in pair:
            if tiles.columns == size:
                place = _OUT + (block * size + row) * size
                tokens = Tokens(pop_prev=True, push_prev=True)
                yield Store(0, place, tiles.outputs, tiles.rows * size, size * size, tokens)
                continue
            for part in range(tiles.outputs):
                place = _OUT + ((block + part) * size + row) * size + column
                tokens = Tokens(pop_prev=part == 0, push_prev=part == tiles.outputs - 1)
                yield Store(0, place, tiles.rows, tiles.columns, size, tokens)
    yield Finish(Tokens(pop_next=True))


def _pairs(layer: Convolution, tiles: Tiles) -> Iterator[list[tuple[int, int, int]]]:
    """Row, output block and column where the two tiles begin that go side by side."""
    size, blocks = layer.output, layer.outputs // BLOCK
    along_rows = tiles.thread == "rows"
    for row in range(0, size, tiles.rows * (2 if along_rows else 1)):
        for block in range(0, blocks, tiles.outputs * (1 if along_rows else 2)):
            for column in range(0, size, tiles.columns):
                other = (row + tiles.rows, block) if along_rows else (row, block + tiles.outputs)
                yield [(row, block, column), (*other, column)]


def _input(layer: Convolution, tiles: Tiles, source: int, row: int, column: int, tokens: Tokens) -> Load:
    """The input of a tile, one block of channels, with its zeros."""
    pad, size = layer.kernel // 2, layer.size
    top, left = row * layer.stride - pad, column * layer.stride - pad
    bottom = top + (tiles.rows - 1) * layer.stride + layer.kernel
    right = left + (tiles.columns - 1) * layer.stride + layer.kernel
    y, x = max(top, 0), max(left, 0)
    height, width = min(bottom, size) - y, min(right, size) - x
    pads = (y - top, max(bottom - size, 0), x - left, max(right - size, 0))
    return Load(MemoryId.INP, 0, _INP + (source * size + y) * size + x, height, width, size, *pads, tokens)
