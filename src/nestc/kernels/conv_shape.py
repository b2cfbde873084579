"""The geometry of a convolution, read once from its ONNX node, and how a row of outputs is cut into register tiles."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from nestc.graph.region import Op, Region


@dataclass(frozen=True)
class ConvShape:
    """Sizes of one convolution; spatial tuples run from the outermost axis to the innermost.

    ``pads_begin`` is what lies before the input on each spatial axis; the end padding follows from ``out``.
    """

    batch: int
    group: int
    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    out: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads_begin: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        taps = prod(self.kernel) * self.in_channels // self.group
        return 2 * self.batch * self.out_channels * prod(self.out) * taps

    def squeezed(self) -> ConvShape:
        """The same convolution without innermost axes of one pixel (but for the first axis), since tiles lie along
        the innermost one."""
        rank = len(self.out)
        while rank > 1 and self.size[rank - 1] == self.out[rank - 1] == self.kernel[rank - 1] == 1:
            if self.pads_begin[rank - 1]:  # the only output is padding
                break
            rank -= 1
        axes = (self.size, self.out, self.kernel, self.strides, self.dilations, self.pads_begin)
        cut = (axis[:rank] for axis in axes)
        return ConvShape(self.batch, self.group, self.in_channels, self.out_channels, *cut)

    @property
    def pointwise(self) -> bool:
        """A 1x1 convolution whose output pixels are its input pixels."""
        ones = (1,) * len(self.kernel)
        return self.kernel == ones and self.strides == ones and not any(self.pads_begin) and self.size == self.out


def conv_shape(op: Op, region: Region) -> ConvShape:
    """Geometry of a Conv node (ONNX Conv-22), `auto_pad` resolved as its specification says."""
    x, w, y = (region.types[name].shape for name in (op.inputs[0], op.inputs[1], op.outputs[0]))
    rank = len(x) - 2
    kernel = w[2:]
    strides = _ints(op, "strides", (1,) * rank)
    dilations = _ints(op, "dilations", (1,) * rank)
    begin = _ints(op, "pads", (0,) * (2 * rank))[:rank]
    mode = op.attributes.get("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max(0, (ceil(n / s) - 1) * s + d * (k - 1) + 1 - n) for n, s, d, k in zip(x[2:], strides, dilations, kernel)
        ]
        begin = tuple(t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in totals)
    elif mode == "VALID":
        begin = (0,) * rank
    group = op.attributes.get("group", 1)
    assert isinstance(group, int)
    return ConvShape(x[0], group, x[1], w[0], x[2:], y[2:], kernel, strides, dilations, begin)


def _ints(op: Op, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = op.attributes.get(name)
    if value is None:
        return default
    assert isinstance(value, tuple)
    return tuple(int(v) for v in value)


@dataclass(frozen=True)
class Tile:
    """`count` neighbouring tiles of `width` outputs along a row, the first at `start`.

    ``taps[k]`` lists the outputs (0 .. width-1) for which kernel column k reads inside the input; None: all do.
    """

    start: int
    width: int
    count: int
    taps: tuple[tuple[int, ...], ...] | None

    @property
    def ragged(self) -> frozenset[int]:
        """The outputs that some kernel column would make read outside the input."""
        return frozenset(j for js in self.taps or () for j in range(self.width) if j not in js)


def cut_row(out: int, size: int, kernel: int, stride: int, dilation: int, pad: int, widest: int) -> tuple[Tile, ...]:
    """Cut a row of `out` outputs into balanced tiles of at most `widest`, those at the borders apart from the rest.

    Balanced, since the time of a tile is hardly less when it is a little narrower, and a tile of one or two outputs
    does not cover the latency of its multiply-adds.
    """
    pieces = max(1, ceil(out / widest))
    base, longer = divmod(out, pieces)
    tiles: list[Tile] = []
    start = 0
    for piece in range(pieces):
        width = base + (piece < longer)
        valid = tuple(
            tuple(j for j in range(width) if 0 <= (start + j) * stride + k * dilation - pad < size)
            for k in range(kernel)
        )
        taps = None if all(len(js) == width for js in valid) else valid
        last = tiles[-1] if tiles else None
        if last is not None and taps is None and last.taps is None and last.width == width:
            tiles[-1] = Tile(last.start, width, last.count + 1, None)
        else:
            tiles.append(Tile(start, width, 1, taps))
        start += width
    return tuple(tiles)


def met(tile: Tile, shape: ConvShape) -> dict[int, list[tuple[int, int]]]:
    """The inputs of a row that a tile reads, counted from the first one, and the pairs (output, kernel column) that
    each of them meets."""
    found: dict[int, list[tuple[int, int]]] = {}
    for kw in range(shape.kernel[-1]):
        for j in range(tile.width) if tile.taps is None else tile.taps[kw]:
            found.setdefault(j * shape.strides[-1] + kw * shape.dilations[-1], []).append((j, kw))
    return dict(sorted(found.items()))


def columns_pay(shape: ConvShape, lanes: int, registers: int) -> bool:
    """Whether the weights of a whole kernel row should be in registers: where one vector of outputs leaves room for
    them, a tile would else be bound by broadcasting each input once for every column that it meets."""
    columns = shape.kernel[-1]
    shared = columns > shape.strides[-1] and shape.dilations[-1] == 1
    return shared and shape.group == 1 and shape.out_channels <= lanes and registers - columns >= 9


def fold_pixels(pixels: int, widest: int) -> tuple[int, int]:
    """Rows and row length for the pixels of a pointwise convolution: long rows that the register tile divides well.

    Of the divisors up to 256 the one with the least waste wins; ties go to the longer row.
    """
    best, best_score = (1, pixels), float("inf")
    for length in range(1, min(pixels, 256) + 1):
        if pixels % length:
            continue
        # Tiles cost at least 8 multiply-adds of latency and otherwise their width; a row has a little overhead.
        score = (pixels // length) * (ceil(length / widest) * widest + 2) / pixels
        if score <= best_score:
            best, best_score = (pixels // length, length), score
    if pixels <= 256 or best_score < 2:
        return best
    return (1, pixels)


_SPILLED = 1.04  # times as long takes a tile that is spilled now and then (pointwise layers on a Zen 3: 1.00 to 1.11)
_TILE_SHARE = 0.25  # cycles a step that a tile takes beside its steps, of a sum of about 100


def register_tile(lanes_out: int, pixels: int, registers: int, few: bool = False) -> tuple[int, int]:
    """Outputs a row tile may hold, and output vectors a tile, for `registers` vector registers.

    A step over one input channel loads ``nr`` weights and broadcasts ``mr`` inputs (two loads a cycle) for ``mr * nr``
    multiply-adds (two a cycle, latency 4: fewer than 8 in flight stall), all of it in registers. `few`: tiles that
    might be spilled are out of question.
    """
    return register_tiles(lanes_out, pixels, registers, few)[0]


def register_tiles(lanes_out: int, pixels: int, registers: int, few: bool = False) -> list[tuple[int, int]]:
    """For each number of vectors the tile with the least modelled cycles, the best of all first."""
    found: list[tuple[float, tuple[int, int]]] = []
    for nr in range(1, min(8, lanes_out) + 1):
        groups = ceil(lanes_out / nr)
        best, best_cost = (1, nr), float("inf")
        for mr in range(1, min(pixels, registers) + 1):
            factor = spilling(mr, nr, registers)
            if factor is None or (few and factor > 1):
                break
            tiles = ceil(pixels / mr)
            base, longer = divmod(pixels, tiles)
            cost = longer * _step_cycles(base + 1, nr) + (tiles - longer) * _step_cycles(base, nr)
            cost = groups * (factor * cost + _TILE_SHARE * tiles)
            if cost < best_cost - 1e-9:
                best, best_cost = (mr, nr), cost
        if best_cost < float("inf"):
            found.append((best_cost, best))
    # Of about equal ones that with fewer vectors, which comes first.
    return [tile for _, tile in sorted(found, key=lambda each: round(each[0], 6))] or [(1, 1)]


def spilling(mr: int, nr: int, registers: int) -> float | None:
    """How much longer a tile takes that LLVM spills; None if it never fits.

    Beside accumulators and an input there are weights in registers, at the begin of a run of steps those of two steps:
    a tile that leaves no room for both is spilled once a run.
    """
    kept = kept_weights(nr, registers)
    if mr * nr + kept + 1 > registers:
        return None
    return 1.0 if mr * nr + 2 * kept + 1 <= registers else _SPILLED


def kept_weights(vectors: int, registers: int) -> int:
    """Registers that hold weights beside the accumulators. LLVM loads those of a second step early where it takes the
    inputs as memory operands or has few weights a step; a tile that leaves no room for them spills or moves every
    accumulator each step."""
    return min(vectors, 4) if registers <= 16 else max(vectors, 4)


def _step_cycles(width: int, nr: int) -> float:
    """Cycles of one input channel: multiply-adds, loads, or latency; wider tiles load less."""
    return max(width * nr / 2, (width + nr) / 2, 4.0) + 0.02 * (width + nr)
