"""Kernels of random layers, run by the interpreter of Tensor IR, against plain arithmetic on whole maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.constants import bias_digits, digits_needed, unit
from nestc.targets.vta.layer import Add, Clip, FeatureMap, Init, Layer, Maximum, Product, Shift, Step
from nestc.targets.vta.lower import lower
from nestc.targets.vta.shape import block_count, elements
from nestc.targets.vta.tiling import Share, Tiling
from nestc.tensor.interp import run
from nestc.tensor.text import kernel_text

SMALL = VtaConfig("small", log_block=2, log_inp_buff_size=8, log_wgt_buff_size=10, log_acc_buff_size=11)
BATCHED = VtaConfig(
    "batched", log_batch=1, log_block=2, log_inp_buff_size=9, log_wgt_buff_size=10, log_acc_buff_size=12
)


def pack(array: np.ndarray, config: VtaConfig) -> np.ndarray:
    """NCHW to elements [N/B][C/block][H][W] of (B, block), padded with 99."""
    n, c, h, w = array.shape
    images, blocks = -(-n // config.batch), -(-c // config.block)
    full = np.full((images * config.batch, blocks * config.block, h, w), 99, array.dtype)
    full[:n, :c] = array
    parts = full.reshape(images, config.batch, blocks, config.block, h, w).transpose(0, 2, 4, 5, 1, 3)
    return np.ascontiguousarray(parts).reshape(-1, config.batch, config.block)


def unpack(packed: np.ndarray, map_: FeatureMap, config: VtaConfig) -> np.ndarray:
    images, blocks = -(-map_.batch // config.batch), block_count(map_, config)
    parts = packed.reshape(images, blocks, map_.height, map_.width, config.batch, config.block)
    full = parts.transpose(0, 4, 1, 5, 2, 3).reshape(images * config.batch, blocks * config.block, map_.height, -1)
    return full[: map_.batch, : map_.channels]


def expected(layer: Layer, values: Mapping[str, np.ndarray], config: VtaConfig) -> np.ndarray:
    """What the steps say, pixel by pixel of whole maps, in int64."""
    out, block = layer.output, config.block
    acc = np.zeros((out.batch, block_count(out, config) * block, out.height, out.width), np.int64)

    def channels(numbers: np.ndarray) -> np.ndarray:
        flat = np.broadcast_to(numbers, (out.channels,)) if numbers.ndim == 0 else numbers
        return np.pad(flat, (0, acc.shape[1] - out.channels))[:, None, None]

    def taps(step: Product | Maximum) -> Iterator[tuple[int, int, int, np.ndarray]]:
        source = layer.sources[step.source]
        x = values[step.source].astype(np.int64)
        x = np.pad(x, ((0, 0), (0, block_count(source, config) * block - source.channels), (0, 0), (0, 0)))
        for tap, (dy, dx) in enumerate(step.taps):
            for oy in range(out.height):
                for ox in range(out.width):
                    sy, sx = oy * step.strides[0] + dy, ox * step.strides[1] + dx
                    if 0 <= sy < source.height and 0 <= sx < source.width:
                        yield tap, oy, ox, x[:, :, sy, sx]

    for step in layer.steps:
        if isinstance(step, Init):
            acc[:] = channels(step.values)
        elif isinstance(step, Product):
            for tap, oy, ox, pixel in taps(step):
                for k, (o, i) in enumerate(step.pairs):
                    part = pixel[:, i * block : (i + 1) * block] @ step.weights[k, tap].astype(np.int64).T
                    acc[:, o * block : (o + 1) * block, oy, ox] += part
        elif isinstance(step, Maximum):
            for _, oy, ox, pixel in taps(step):
                acc[:, :, oy, ox] = np.maximum(acc[:, :, oy, ox], pixel)
        elif isinstance(step, Shift):
            amounts = np.broadcast_to(channels(step.amounts), acc.shape)
            acc = np.where(amounts >= 0, acc >> np.maximum(amounts, 0), acc << np.maximum(-amounts, 0))
        elif isinstance(step, Add):
            acc += step.value
        else:
            acc = np.clip(acc, step.low, step.high)
    return acc[:, : out.channels]


def check(layer: Layer, tiling: Tiling, config: VtaConfig, seed: int, shares: list[Share] | None = None) -> None:
    random = np.random.default_rng(seed)
    values = {
        name: random.integers(-128, 128, (map_.batch, map_.channels, map_.height, map_.width), np.int8)
        for name, map_ in layer.sources.items()
    }
    out = layer.output
    arrays = {name: pack(value, config) for name, value in values.items()}
    arrays[out.name] = np.full((elements(out, config), config.batch, config.block), 77, np.int8)
    whole = Share((0, block_count(out, config)), (0, out.height))
    for share in shares or [whole]:
        kernel, constants = lower(layer, share, tiling, config)
        run(kernel, {param.name: {**arrays, **constants}[param.name] for param in kernel.params})
    result = unpack(arrays[out.name], out, config)
    assert np.array_equal(result, expected(layer, values, config))


@st.composite
def convolutions(draw: st.DrawFn, config: VtaConfig) -> Layer:
    """A product of any kind, perhaps with a residual, a bias and shifts by channel."""
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    batch, height, width = draw(st.integers(1, 2)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    kind = draw(st.sampled_from(["dense", "diagonal", "grouped", "sparse"]))
    ins, outs = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    if kind != "dense":
        ins = outs = draw(st.sampled_from([3, 8, 16]))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    strides, dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3))), draw(st.integers(1, 2))
    pads = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    source = FeatureMap("x", batch, ins, height, width)
    size = tuple(draw(st.integers(1, 5)) for _ in range(2))
    block = config.block
    obs, ibs = -(-outs // block), -(-ins // block)
    pairs = [(o, i) for o in range(obs) for i in range(ibs)]
    if kind == "diagonal":
        pairs = [(o, o) for o in range(obs)]
    elif kind == "grouped":
        pairs = [(o, i) for o, i in pairs if o // 2 == i // 2]
    elif kind == "sparse":
        pairs = [pair for pair in pairs if random.random() < 0.6] or [(0, 0)]
    taps = tuple((a * dilation - pads[0], b * dilation - pads[1]) for a in range(kernel[0]) for b in range(kernel[1]))
    shared = draw(st.sampled_from(["nothing", "taps", "all"]))
    given = (1 if shared == "all" else len(pairs), len(taps) if shared == "nothing" else 1, block, block)
    drawn = random.integers(-128, 128, given, np.int8)
    weights = np.broadcast_to(drawn, (len(pairs), len(taps), block, block)).copy()
    for k, (o, i) in enumerate(pairs):
        weights[k, :, max(0, outs - o * block) :] = 0
        weights[k, :, :, max(0, ins - i * block) :] = 0
    out = FeatureMap("y", batch, outs, *size)
    spread = draw(st.sampled_from([1000, 40000, 4000000]))
    bias = random.integers(-spread, spread, outs) if draw(st.booleans()) else np.array(random.integers(-spread, spread))
    steps: list[Step] = [Init(bias.astype(np.int64)), Product("x", strides, taps, tuple(pairs), weights)]
    sources = {"x": source}
    if draw(st.booleans()):
        steps += [Shift(random.integers(0, 9, outs)), Clip(-128, 127)]
        sources["r"] = FeatureMap("r", batch, outs, *size)
        one = np.zeros((obs, 1, block, block), np.int8)
        one[:, 0] = np.eye(block, dtype=np.int8) * 2
        steps += [Product("r", (1, 1), ((0, 0),), tuple((o, o) for o in range(obs)), one), Add(1)]
    steps += [
        Shift(np.array(draw(st.integers(-1, 12)))),
        Clip(draw(st.sampled_from([None, -128, 0])), 127),
        Clip(-128, None),
    ]
    return Layer("layer", out, sources, tuple(steps))


TILINGS = st.builds(Tiling, st.integers(1, 3), st.integers(1, 5), st.integers(1, 2), st.integers(1, 2), st.booleans())


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([SMALL, BATCHED]), TILINGS, st.integers(0, 1 << 30))
def test_products(data: st.DataObject, config: VtaConfig, tiling: Tiling, seed: int) -> None:
    layer = data.draw(convolutions(config))
    try:
        check(layer, tiling, config, seed)
    except TargetError as error:
        assert "does not fit" in str(error)


@settings(deadline=None, max_examples=10)
@given(st.data(), TILINGS, st.integers(0, 1 << 30))
def test_shares_make_the_whole(data: st.DataObject, tiling: Tiling, seed: int) -> None:
    layer = data.draw(convolutions(SMALL))
    blocks, height = block_count(layer.output, SMALL), layer.output.height
    middle = (blocks + 1) // 2
    shares = [Share((first, last), (0, height)) for first, last in ((0, middle), (middle, blocks)) if first < last]
    try:
        check(layer, tiling, SMALL, seed, shares)
        check(layer, tiling, SMALL, seed, [Share((0, blocks), (row, row + 1)) for row in range(height)])
    except TargetError as error:
        assert "does not fit" in str(error)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 9), st.integers(2, 7), st.integers(2, 7), st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.sampled_from([-128, -7]), TILINGS, st.integers(0, 1 << 30),
)  # fmt: skip
def test_maximum(
    channels: int,
    height: int,
    width: int,
    size: tuple[int, int],
    strides: tuple[int, int],
    start: int,
    tiling: Tiling,
    seed: int,
) -> None:
    taps = tuple((a - size[0] // 2, b - size[1] // 2) for a in range(size[0]) for b in range(size[1]))
    out = FeatureMap("y", 1, channels, (height - 1) // strides[0] + 1, (width - 1) // strides[1] + 1)
    steps = (Init(np.array(start)), Maximum("x", strides, taps))
    layer = Layer("pool", out, {"x": FeatureMap("x", 1, channels, height, width)}, steps)
    try:
        check(layer, tiling, SMALL, seed)
    except TargetError as error:
        assert "does not fit" in str(error)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(1 << 20), 1 << 20), min_size=1, max_size=16))
def test_digits_of_a_bias_sum_to_it(values: list[int]) -> None:
    config = VtaConfig()
    blocked = np.zeros((1, config.block), np.int64)
    blocked[0, : len(values)] = values
    digits = digits_needed(blocked, config)
    weights = bias_digits(blocked, digits)
    sums = (weights.astype(np.int64) @ unit(config)[0, 0].astype(np.int64)).sum(axis=0)
    assert np.array_equal(sums, blocked[0])
    assert weights.shape == (digits, config.block, config.block)


def test_text_of_a_kernel() -> None:
    weights = np.ones((1, 1, 4, 4), np.int8)
    steps = (Init(np.array(8)), Product("x", (1, 1), ((0, 0),), ((0, 0),), weights), Shift(np.array(4)), Clip(0, 127))
    layer = Layer("conv", FeatureMap("y", 1, 4, 2, 2), {"x": FeatureMap("x", 1, 4, 2, 2)}, steps)
    kernel, _ = lower(layer, Share((0, 1), (0, 2)), Tiling(2, 2, 1, 1), SMALL)
    calls = [line.strip() for line in kernel_text(kernel).splitlines() if "(" in line]
    names = ("reset", "add[8]", "load.wgt[1x1, 1]", "load.inp[1x4, 4]", "gemm", "shr[4]", "max[0]", "min[127]", "store")
    found = [name for line in calls for name in names if line.startswith(name) or f" {name}" in line]
    assert found == list(names)


def full_inputs(random: np.random.Generator) -> tuple[Layer, Tiling]:
    """Three slots of 16 inputs leave 15 elements, and in the last one lies what biases are multiplied with."""
    weights = random.integers(-9, 10, (1, 1, 4, 4), np.int8)
    steps = (Init(random.integers(9000, 9999, 4)), Product("x", (1, 1), ((0, 0),), ((0, 0),), weights))
    out, x = (FeatureMap(name, 1, 4, 16, 8) for name in "yx")
    return Layer("inputs", out, {"x": x}, (*steps, Shift(np.array(6)), Clip(-128, 127))), Tiling(2, 8, 1, 1)


def full_weights(random: np.random.Generator) -> tuple[Layer, Tiling]:
    """16 chunks of 4 weight blocks take 13 slots in turn; behind them lie the biases of all blocks, used twice."""
    pairs = tuple((o, i) for o in range(8) for i in range(4))
    weights = random.integers(-9, 10, (32, 2, 4, 4), np.int8)
    steps = (Init(random.integers(9000, 9999, 32)), Product("x", (1, 1), ((0, 0), (0, 1)), pairs, weights))
    out, x = FeatureMap("y", 1, 32, 4, 3), FeatureMap("x", 1, 16, 4, 3)
    return Layer("weights", out, {"x": x}, (*steps, Shift(np.array(6)), Clip(-128, 127))), Tiling(2, 3, 1, 2)


def full_accumulators(random: np.random.Generator) -> tuple[Layer, Tiling]:
    """Seven slots of 16 accumulators, and a vector of shifts in the last four of 128."""
    pairs = tuple((o, o) for o in range(4))
    weights = random.integers(-9, 10, (4, 1, 4, 4), np.int8)
    steps = (Init(np.array(0)), Product("x", (1, 1), ((0, 0),), pairs, weights), Shift(random.integers(1, 9, 16)))
    out, x = (FeatureMap(name, 1, 16, 8, 8) for name in "yx")
    return Layer("accumulators", out, {"x": x}, (*steps, Clip(-128, 127))), Tiling(2, 8, 1, 1)


def full_staging(random: np.random.Generator) -> tuple[Layer, Tiling]:
    """Six slots of 16 accumulators, and 32 to which the inputs of a maximum are copied."""
    del random
    taps = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    out, x = (FeatureMap(name, 1, 4, 16, 8) for name in "yx")
    return Layer("staging", out, {"x": x}, (Init(np.array(-128)), Maximum("x", (1, 1), taps))), Tiling(2, 8, 1, 1)


def many_blocks(random: np.random.Generator) -> tuple[Layer, Tiling]:
    """Neither biases nor shifts of all blocks are kept: every tile of two blocks brings its own, and only the second
    block of each is shifted by a vector."""
    pairs = tuple((o, o) for o in range(18))
    weights = random.integers(-9, 10, (18, 1, 4, 4), np.int8)
    amounts = random.integers(6, 9, 72)
    amounts.reshape(18, 4)[::2] = 7
    steps = (Init(random.integers(9000, 9999, 72)), Product("x", (1, 1), ((0, 0),), pairs, weights))
    out, x = (FeatureMap(name, 1, 72, 3, 3) for name in "yx")
    return Layer("blocks", out, {"x": x}, (*steps, Shift(amounts), Clip(-128, 127))), Tiling(3, 3, 2, 2)


def gaps(random: np.random.Generator) -> tuple[Layer, Tiling]:
    """Input blocks 0 and 2, but not the one between, and weights that do not lie side by side either."""
    weights = random.integers(-9, 10, (4, 1, 4, 4), np.int8)
    product = Product("x", (1, 1), ((0, 0),), ((0, 0), (0, 2), (1, 1), (1, 2)), weights)
    out, x = FeatureMap("y", 1, 8, 3, 4), FeatureMap("x", 1, 12, 3, 4)
    return Layer("gaps", out, {"x": x}, (Init(np.array(4)), product, Shift(np.array(3)), Clip(-128, 127))), Tiling(
        3, 4, 1, 2
    )


@pytest.mark.parametrize("build", [full_inputs, full_weights, full_accumulators, full_staging, many_blocks, gaps])
def test_tiles_that_fill_a_buffer_or_leave_gaps(build: Callable[[np.random.Generator], tuple[Layer, Tiling]]) -> None:
    check(*build(np.random.default_rng(5)), SMALL, seed=0)


def test_a_tile_that_does_not_fit_is_refused() -> None:
    weights = np.ones((1, 1, 4, 4), np.int8)
    steps = (Init(np.array(0)), Product("x", (1, 1), ((0, 0),), ((0, 0),), weights))
    layer = Layer("conv", FeatureMap("y", 1, 4, 20, 20), {"x": FeatureMap("x", 1, 4, 20, 20)}, steps)
    with pytest.raises(TargetError, match="layer conv: a tile of .* does not fit the input buffer"):
        lower(layer, Share((0, 1), (0, 20)), Tiling(20, 20, 1, 1), SMALL)
