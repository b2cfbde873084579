"""Packed weights of an integer convolution, and the way of multiplying that suits them on a machine.

A *unit* is the group of neighbouring channels that one broadcast brings in. Where there is no instruction for four
products of bytes, there are three ways: bytes widened to 16 bits, two channels a unit (`Dot` of int16); or pmaddubsw
(`PairSum`, x86), four channels a unit, whose sums of two products saturate at 16 bits. The second is exact where the
positive and the negative weights of a sum are small enough: 255 * 128 < 2**15. What exceeds that is taken off and
multiplied once more, in *extra* units at the end: a split of the weights, not an approximation. The third multiplies
units in an order of their own, of some of them complemented inputs (`byte_pairs`): it suits weights of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd

import numpy as np

from nestc.kernels.api import CpuMachine
from nestc.kernels.byte_pairs import PairedUnits, Pairing
from nestc.kernels.conv_shape import ConvShape, register_tile
from nestc.tensor.ir import DOT_GROUPS

_BOUND = 128  # of the positive, and of the negative, weights of one 16-bit sum: 255 * 128 = 32640
# Ways of multiplying, as (`PairSum` added in 16 bits, vectors of outputs of a tile; 0 is as many as fit), with the time
# of four channels and one accumulator, relative to the second: 3x3 layers of ResNet-50 on one core of a Zen 3.
WAYS = {(0, 0): 1.22, (1, 1): 1.0, (1, 2): 0.97, (2, 1): 0.87, (2, 2): 0.8}
_EXTRA = 1.1  # of an extra unit
# Likewise of a plain, a flipped and a single step of `byte_pairs`: by their instructions in a tile of ten outputs, of
# which a unit takes 4.2, 4.6 and 5.9 (5.7 where bytes are widened). 1x1 layers of ResNet-50 ran 1.05 to 1.35 times as
# fast with them as with (0, 0); predicted 1.04 to 1.3.
PAIRED = (1.8, 1.97, 1.26)
PAIRED_TILE = 1.5  # of their three loops: layers of 16 units, which are all single, were 2 to 5 % slower than (0, 0)


@dataclass(frozen=True)
class Window:
    """How the taps of a convolution lie in a staged row: `taps` runs of `length` neighbouring elements for each kernel
    row, plane and block of `block` channels."""

    channels: int
    block: int
    planes: int
    rows: int
    taps: int
    length: int

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return ceil(self.channels / self.block)


@dataclass(frozen=True)
class Packed:
    """Weights in the order in which they are read.

    ``depth`` is 0 for a `Dot` a unit, else the number of `PairSum` that are added in 16 bits before they are widened.
    ``weights``: [columns][block][plane][row][tap][unit][nr * lanes * channels of a unit]; not used if they are
    ``paired``. ``extra_units`` (int64 [columns][extra], numbers of units in that order) and ``extra_weights`` (int8
    [columns][extra][nr * lanes * 4]) are None where nothing exceeds the bound.
    """

    pair: tuple[str, str]
    depth: int
    mr: int
    nr: int
    weights: np.ndarray
    extra_units: np.ndarray | None
    extra_weights: np.ndarray | None
    paired: PairedUnits | None = None

    @property
    def group(self) -> int:
        """Channels of a unit."""
        return DOT_GROUPS[self.pair]

    @property
    def columns(self) -> int:
        """Register columns of all groups."""
        return self.weights.shape[0]

    @property
    def units(self) -> int:
        """Units of one tap."""
        return self.weights.shape[5]


def pack(weights: np.ndarray, shape: ConvShape, window: Window, pixels: int, machine: CpuMachine) -> Packed:
    """Pack `weights` (int32 [O, I/group, *kernel], zero points taken off) for rows of `pixels` outputs."""
    vectors = ceil(shape.out_channels // shape.group / machine.lanes("int32"))
    registers = machine.vector_registers
    fits = bool(weights.min() >= -128 and weights.max() <= 127)
    if fits and machine.dot_dtypes != ("int16", "int16"):
        mr, nr = register_tile(vectors if shape.group == 1 else gcd(vectors, 2), pixels, registers)
        return Packed(machine.dot_dtypes, 0, mr, nr, _ordered(weights, shape, window, machine, 4, nr, 1), None, None)
    # Of several groups each has whole tiles of vectors.
    whole = vectors if shape.group == 1 else gcd(vectors, 2)
    single: dict[int, np.ndarray] = {}

    def ordered(group: int, nr: int, multiple: int) -> np.ndarray:
        return _ordered(weights, shape, window, machine, group, nr, multiple)

    best, best_cost = (0, 0, 1, 1), float("inf")
    for (depth, together), time in WAYS.items():
        if depth and not (fits and machine.dot_bytes >= 32):
            continue
        if depth:
            mr, nr = sums_tile(whole, pixels, registers, depth, together)
            units = ceil(window.length / (4 * depth)) * depth
            if depth not in single:
                single[depth] = exceeding(ordered(4, 1, depth), depth)
            extra = _columns_together(single[depth], nr).sum(axis=1).max()
        else:
            mr, nr = pair_tile(whole, pixels, registers)
            units, extra = ceil(window.length / 2) / 2, 0
        runs = window.blocks * window.planes * window.rows * window.taps
        cost = (time * runs * units + _EXTRA * extra) * ceil(vectors / nr) * nr
        if cost < best_cost:
            best, best_cost = (depth, together, mr, nr), cost
    together = min(registers // 16, whole)
    units = window.blocks * window.planes * window.rows * window.taps * ceil(window.length / 4)
    if fits and machine.dot_bytes >= 32 and PAIRED[0] / 2 * units * ceil(vectors / together) * together < best_cost:
        mr, nr = paired_tile(whole, pixels, registers)
        packed = ordered(4, nr, 1)
        pairing = Pairing(packed.reshape(packed.shape[0], units, packed.shape[-1]))
        if (float((pairing.counts @ PAIRED).mean()) + PAIRED_TILE) * ceil(vectors / nr) * nr < best_cost:
            steps = pairing.pack(machine.l1_bytes * 3 // 4)
            return Packed(("uint8", "int8"), 1, mr, nr, packed, None, None, steps)
    depth, _, mr, nr = best
    if not depth:
        return Packed(("int16", "int16"), 0, mr, nr, ordered(2, nr, 1), None, None)
    packed = ordered(4, nr, depth)
    return Packed(("uint8", "int8"), depth, mr, nr, packed, *take_excess(packed, depth))


def _columns_together(mask: np.ndarray, nr: int) -> np.ndarray:
    """`mask` ([vectors][sums]) for register columns of `nr` vectors: whether one of them holds."""
    padded = np.zeros((-(-mask.shape[0] // nr) * nr, mask.shape[1]), bool)
    padded[: mask.shape[0]] = mask
    return np.asarray(padded.reshape(-1, nr, mask.shape[1]).any(axis=1))


def _ordered(
    weights: np.ndarray, shape: ConvShape, window: Window, machine: CpuMachine, group: int, nr: int, multiple: int
) -> np.ndarray:
    """The weights as [columns][block][plane][row][tap][unit][nr * lanes * group]; units a multiple of `multiple`."""
    wide = nr * machine.lanes("int32")
    per_group = shape.out_channels // shape.group
    columns = ceil(per_group / wide)
    kernel = window.taps * window.length // window.block
    dtype = np.int16 if group == 2 else np.int8
    padded = np.zeros(
        (shape.group, columns * wide, window.blocks * window.block, window.planes, window.rows, kernel), dtype
    )
    padded[:, :per_group, : window.channels] = weights.reshape(
        shape.group, per_group, window.channels, window.planes, window.rows, kernel
    )
    # [group][outputs][block][channel][plane][row][column] -> [group][outputs][block][plane][row][tap][element]
    split = padded.reshape(shape.group, columns * wide, window.blocks, window.block, window.planes, window.rows, kernel)
    split = split.transpose(0, 1, 2, 4, 5, 6, 3).reshape(*split.shape[:3], window.planes, window.rows, window.taps, -1)
    units = ceil(window.length / (group * multiple)) * multiple
    whole = np.zeros((*split.shape[:-1], units * group), dtype)
    whole[..., : window.length] = split
    whole = whole.reshape(shape.group * columns, wide, *whole.shape[2:-1], units, group)
    return np.ascontiguousarray(np.moveaxis(whole, 1, -2)).reshape(*whole.shape[:1], *whole.shape[2:-1], wide * group)


def exceeding(units: np.ndarray, depth: int) -> np.ndarray:
    """Which sums of `depth` units may saturate in some lane: bool [columns][units / depth], of int8
    [columns][...][unit][lanes * 4]."""
    flat = units.reshape(units.shape[0], -1, depth, units.shape[-1])
    found = np.zeros(flat.shape[:2], bool)
    for bound in (np.maximum, np.minimum):
        part = bound(flat, 0).reshape(*flat.shape[:3], -1, 2)
        total = part[..., 0].astype(np.int16)
        total += part[..., 1]
        sums = total[:, :, 0]
        for d in range(1, depth):
            sums = sums + total[:, :, d]
        found |= (np.abs(sums) > _BOUND).any(axis=2)
    return found


def take_excess(units: np.ndarray, depth: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Reduce int8 `units` ([columns][...][unit][lanes * 4], in place) until no sum of `depth` `PairSum` can saturate.

    Gives the numbers of the units that what was taken off belongs to, and it as weights: each of them such that one
    `PairSum` cannot saturate; both None if there is nothing. Numbers of one column may repeat; columns with fewer than
    others are filled up with weights of zero.
    """
    columns, wide = units.shape[0], units.shape[-1]
    flat = units.reshape(columns, -1, depth, wide // 4, 4)
    held = exceeding(units, depth)
    column, place = np.nonzero(held)
    if not column.size:
        return None, None
    rest = _excess(flat[held])
    flat[held] -= rest
    column = np.repeat(column, depth)
    number = (place[:, None] * depth + np.arange(depth)).reshape(-1)
    rest = rest.reshape(-1, 1, wide // 4, 4)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while True:
        live = rest.any(axis=(1, 2, 3))
        column, number, rest = column[live], number[live], rest[live]
        if not column.size:
            break
        later = _excess(rest)
        found.append((column, number, (rest - later).reshape(-1, wide)))
        rest = later
    column, number, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(column, kind="stable")
    column, number, values = column[order], number[order], values[order]
    counts = np.bincount(column, minlength=columns)
    place = np.arange(column.size) - np.repeat(np.cumsum(counts) - counts, counts)
    # Layers of one shape share a kernel more often if the number is one of few.
    most = int(counts.max())
    coarse = max(1, 1 << max(0, most.bit_length() - 3))
    most = -(-most // coarse) * coarse
    numbers, extra = np.zeros((columns, most), np.int64), np.zeros((columns, most, wide), np.int8)
    numbers[column, place], extra[column, place] = number, values
    return numbers, extra


def _excess(sums: np.ndarray) -> np.ndarray:
    """What has to be taken off int8 [sums][units][lanes][4], so that in each sum over its units, of the elements 2p
    and 2p + 1 of each, positive and negative parts stay within the bound. Last elements give first."""
    count, depth, lanes, _ = sums.shape
    values = sums.reshape(count, depth, lanes, 2, 2).transpose(0, 2, 3, 1, 4).reshape(count, lanes, 2, 2 * depth)
    taken = np.zeros(values.shape, np.int8)
    for sign in (1, -1):
        part = np.maximum(sign * values.astype(np.int16), 0)
        over = np.maximum(part.sum(-1, dtype=np.int16) - _BOUND, 0)
        for element in range(2 * depth - 1, -1, -1):
            give = np.minimum(part[..., element], over)
            taken[..., element] += (sign * give).astype(np.int8)
            over = over - give
    back = taken.reshape(count, lanes, 2, depth, 2).transpose(0, 3, 1, 2, 4)
    return np.ascontiguousarray(back).reshape(sums.shape)


def pair_tile(vectors: int, pixels: int, registers: int) -> tuple[int, int]:
    """Outputs and vectors of outputs of a register tile whose multiplication and addition are two instructions.

    A step loads ``nr`` weights and broadcasts ``mr`` inputs for ``mr * nr`` multiplications (two a cycle) and as many
    additions; the processor takes six operations a cycle. Beside accumulators there are one input, one product and the
    weights of two steps in registers (of 32, a few more), since LLVM loads some early. Additions take one cycle, so
    that few accumulators are enough.
    """
    best, best_cost = (1, 1), float("inf")
    for nr in range(1, min(4, vectors) + 1):
        groups = ceil(vectors / nr)
        for mr in range(1, min(pixels, registers) + 1):
            if mr * nr + 2 * nr + registers // 8 > registers:
                break
            tiles = ceil(pixels / mr)
            base, longer = divmod(pixels, tiles)
            cost = groups * (longer * _pair_cycles(base + 1, nr) + (tiles - longer) * _pair_cycles(base, nr))
            if cost < best_cost - 1e-9:
                best, best_cost = (mr, nr), cost
    return best


def _pair_cycles(width: int, nr: int) -> float:
    """Cycles of one step: multiplications, or all operations; a tile has an overhead."""
    return max(width * nr / 2, (2 * width * nr + width + nr) / 5.7) + 0.1


def sums_tile(vectors: int, pixels: int, registers: int, depth: int, together: int) -> tuple[int, int]:
    """Outputs and vectors of outputs (at most `together`, for 16 registers) of a register tile of `PairSum`.

    Beside accumulators there are weights, inputs, one sum and the ones that widen it in registers. Of few vectors the
    excess of fewer outputs is multiplied again; of more, the inputs are broadcast less often.
    """
    nr = min(together * registers // 16, vectors)
    widest = max(1, (registers - depth * nr - depth - 2) // nr)
    tiles = ceil(pixels / widest)
    return ceil(pixels / tiles), nr


def paired_tile(vectors: int, pixels: int, registers: int) -> tuple[int, int]:
    """Outputs and vectors of outputs of a register tile of `byte_pairs`.

    Beside accumulators there are the weights of two units and a mask, an input of each, and the ones that widen.
    """
    nr = min(registers // 16, vectors)
    tiles = ceil(pixels / ((registers - 3 * nr - 3) // nr))
    return ceil(pixels / tiles), nr
