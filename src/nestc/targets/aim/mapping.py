"""Where weights lie over channels, banks, rows and columns, and in which order a layer's commands go.

A matrix (m, k) is cut into blocks of `banks` outputs, and K into slices of at most a row's columns. An item is one
slice of one block: it fills some columns of one row in all banks of one channel, and is one burst of MAC_ABK, which
gives a partial sum in every bank. Every channel has a list of items; all channels do their i-th items together. As an
accumulator holds one sum, and the global buffer one row's columns of the vector, sums are read after every item, which
is cheaper than filling the buffer anew; and channels keep a slice as long as they can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.aim.layout import Array, Layout, Segment
from nestc.runtime.aim.machine import AimMachine
from nestc.runtime.aim.simulate import NUMBERS, widen
from nestc.targets.aim.layer import ACTIVATIONS, MatrixVector

SPARE_BANK = 2
"""The bank that EWMUL writes in the first bank group."""


@dataclass(frozen=True)
class Mapping:
    """The choices for one layer.

    Attributes:
        slices: pieces of K.
        pack: items that lie side by side in a row; the vector is then that many times in the global buffer.
        even: every channel has one slice only, so that buffers are filled once, though some channels may do less.
        opener: before sums are read, EWMUL opens the next row, so that precharge and activation hide behind the change
            to register mode. It writes products to a column of one bank: zeros to a free column; or, where a row is
            full, known numbers p in place of weights w, and w and -p are multiplied apart, in a row of spares.
        inside: the memory applies the activation function (AF); only with one slice.
    """

    slices: int
    pack: int = 1
    even: bool = True
    opener: bool = False
    inside: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON values: the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """A mapping worked out for a layer on a machine; rows count from 0.

    Attributes:
        layout: what registers mean, and which items each channel has.
        rows: rows of every bank; the last one is that of spares, if there are any.
        spoilt: the column of bank `SPARE_BANK` that the opener of each row writes, one a row; empty without openers.
            The weights of 16 rows one after another share a column, and lie in 16 banks of the spares' row.
    """

    mapping: Mapping
    layout: Layout
    rows: int
    spoilt: tuple[int, ...]

    @property
    def items(self) -> int:
        """Items that a channel does at most."""
        return max(sum(s[2] for s in channel) for channel in self.layout.segments)

    @property
    def spares(self) -> tuple[int, ...]:
        """Columns of the spares' row, of which the one before belongs to it: -p before w."""
        return tuple(self.spoilt[:: self.layout.banks][: self.layout.spares])

    def place(self, item: int) -> tuple[int, int]:
        """Row and first column of an item."""
        return item // self.mapping.pack, item % self.mapping.pack * self.layout.width


def plan(
    layer: MatrixVector, mapping: Mapping, machine: AimMachine, number: str = "bfloat16", *, bias_inside: bool = True
) -> Plan:
    """The plan of a layer; with `bias_inside` accumulators start with a bias where K is not cut.

    Raises:
        TargetError: the mapping does not suit the layer or the machine; says why.
    """
    if layer.activation is not None and layer.activation not in ACTIVATIONS:
        raise TargetError(
            f"{layer.name}: AiM has no activation function '{layer.activation}'; it has {', '.join(ACTIVATIONS)}"
        )
    buffer = min(machine.columns, machine.global_buffer_columns)
    columns = math.ceil(layer.k / machine.lanes)
    width = math.ceil(columns / mapping.slices)
    slices = math.ceil(columns / width)
    if slices != mapping.slices:
        raise TargetError(f"{layer.name}: {columns} columns are not cut into {mapping.slices} slices, but {slices}")
    if slices * width + 2 * machine.channels > machine.gprs:
        raise TargetError(
            f"{layer.name}: {machine.gprs} registers do not hold a vector of {slices * width} and results"
        )
    if width * mapping.pack > buffer:
        raise TargetError(f"{layer.name}: {mapping.pack} items of {width} columns do not fit in a row of {buffer}")
    if mapping.inside and (slices > 1 or layer.activation is None):
        raise TargetError(f"{layer.name}: banks apply an activation function only to whole sums")
    if mapping.inside and mapping.opener:
        raise TargetError(f"{layer.name}: AF opens a row of its own, so that opening the next one before it is no use")
    blocks = math.ceil(layer.m / machine.banks)
    segments = _even(slices, blocks, machine.channels) if mapping.even else _dense(slices, blocks, machine.channels)
    if segments is None:
        raise TargetError(f"{layer.name}: {slices} slices are more than {machine.channels} channels have, one each")
    items = max(sum(s[2] for s in channel) for channel in segments)
    rows = math.ceil(items / mapping.pack)
    spoilt: tuple[int, ...] = ()
    spares = 0
    if mapping.opener:
        free = mapping.pack * width < machine.columns
        if machine.banks_per_group <= SPARE_BANK:
            raise TargetError(f"{layer.name}: a bank group of {machine.name} has no third bank for EWMUL to write")
        if not free and (mapping.pack > 1 or not mapping.even):
            raise TargetError(f"{layer.name}: no column is free for EWMUL to write")
        spares = 0 if free else math.ceil(rows / machine.banks)
        if 2 * spares > machine.columns:
            raise TargetError(f"{layer.name}: {rows} rows have more spares than a row has columns")
        spoilt = tuple(machine.columns - 1 - (0 if free else row // machine.banks * 2) for row in range(rows))
    layout = Layout(
        m=layer.m,
        k=layer.k,
        vectors=layer.vectors,
        number=number,
        banks=machine.banks,
        lanes=machine.lanes,
        slices=slices,
        width=width,
        segments=segments,
        spares=spares,
        spare_bank=SPARE_BANK if spares else 0,
        bias_inside=bias_inside and slices == 1 and layer.bias is not None,
        activation=None if mapping.inside else layer.activation,
    )
    return Plan(mapping, layout, rows + (1 if spares else 0), spoilt)


def _even(slices: int, blocks: int, channels: int) -> tuple[tuple[Segment, ...], ...] | None:
    """One slice a channel: channels are shared among slices, and a slice's blocks among its channels."""
    if slices > channels:
        return None
    found: list[tuple[Segment, ...]] = []
    for piece in range(slices):
        own = channels * (piece + 1) // slices - channels * piece // slices
        each = math.ceil(blocks / own)
        for channel in range(own):
            first = min(channel * each, blocks)
            number = min(each, blocks - first)
            found.append(((piece, first, number),) if number else ())
    return tuple(found)


def _dense(slices: int, blocks: int, channels: int) -> tuple[tuple[Segment, ...], ...]:
    """All items in order, slice by slice, in equal shares, so that most channels have two slices.

    Of two slices, a channel begins with the shorter part, so that more channels change at the same item.
    """
    each = math.ceil(slices * blocks / channels)
    found: list[tuple[Segment, ...]] = []
    for channel in range(channels):
        place, end = channel * each, min((channel + 1) * each, slices * blocks)
        parts: list[Segment] = []
        while place < end:
            piece, first = divmod(place, blocks)
            number = min(blocks - first, end - place)
            parts.append((piece, first, number))
            place += number
        if len(parts) == 2 and parts[0][2] > parts[1][2] and sum(p[2] for p in parts) == each:
            parts.reverse()
        found.append(tuple(parts))
    return tuple(found)


def write_weights(memory: Array, base: int, layer: MatrixVector, found: Plan) -> None:
    """Put a layer's weights in their places.

    Args:
        memory: (channels, banks, rows, columns, lanes) of the plan's 16-bit format; rows from `base` on are written,
            which must be zero before.
        base: first row.
        layer: weights (m, k), rounded to nearest even here.
        found: its plan.

    Raises:
        TargetError: openers would write infinite products.
    """
    layout = found.layout
    number = NUMBERS[layout.number]
    weights = np.zeros((layout.blocks * layout.banks, layout.inputs * layout.lanes), number)
    with np.errstate(over="ignore"):
        weights[: layer.m, : layer.k] = layer.weights.astype(number)
    blocked = weights.reshape(layout.blocks, layout.banks, layout.slices, layout.width, layout.lanes)
    for channel, item, piece, block in _placed(layout):
        row, column = found.place(item)
        memory[channel, :, base + row, column : column + layout.width] = blocked[block, :, piece]
        if layout.spares:
            spoilt, bank, spare = found.spoilt[row], item % layout.banks, base + found.rows - 1
            first, second, third = memory[channel, : SPARE_BANK + 1, base + row, spoilt]
            with np.errstate(over="ignore"):
                product = (widen(first) * widen(second)).astype(number)
            if not np.isfinite(product.astype(np.float32)).all():
                raise TargetError(f"{layer.name}: EWMUL of its weights overflows, so that rows cannot be opened by it")
            memory[channel, bank, spare, spoilt - 1 : spoilt + 1] = np.stack([np.negative(product), third])
            memory[channel, SPARE_BANK, base + row, spoilt] = product


def _placed(layout: Layout) -> Iterator[tuple[int, int, int, int]]:
    """Channel, item, slice and block of everything that has a place."""
    slices, blocks = layout.steps
    for item, channel in np.argwhere(blocks >= 0).tolist():
        yield channel, item, int(slices[item, channel]), int(blocks[item, channel])
