"""How vectors go into an AiM memory's registers and come back: padding, partial sums, bias, activation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.aim.simulate import NUMBERS, widen

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

Segment: TypeAlias = tuple[int, int, int]
"""A slice of K, the first block of outputs, and how many blocks follow one another."""


@dataclass(frozen=True)
class Layout:
    """What the registers of one launch mean.

    Results are cut into blocks of ``banks`` outputs, K into `slices` of ``width`` columns of ``lanes`` elements. Each
    channel computes the partial sums of its `segments`, one a step. Columns of bank ``spare_bank`` are multiplied apart
    after the steps, in ``spares`` sums more, each for as many steps as there are banks (see targets/aim/mapping.py).
    ``bias_inside``: accumulators start with the bias; else the host adds it. ``activation``: what the host applies to
    sums, None for nothing.
    ``writes``: the order in which the host writes the registers of its vectors; empty for their own order.
    """

    m: int
    k: int
    vectors: int
    number: str
    banks: int
    lanes: int
    slices: int
    width: int
    segments: tuple[tuple[Segment, ...], ...]
    spares: int = 0
    spare_bank: int = 0
    bias_inside: bool = False
    activation: str | None = None
    writes: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values, which `from_json` reads back."""
        return asdict(self)

    @property
    def blocks(self) -> int:
        """Blocks of outputs."""
        return math.ceil(self.m / self.banks)

    @property
    def inputs(self) -> int:
        """Registers of an input vector."""
        return self.slices * self.width

    @cached_property
    def steps(self) -> tuple[Array, Array]:
        """Slice and block of every step and channel: two int64 (steps, channels), -1 where a channel does nothing."""
        count = max((sum(s[2] for s in channel) for channel in self.segments), default=0)
        slices = np.full((count, len(self.segments)), -1, np.int64)
        blocks = np.full_like(slices, -1)
        for channel, segments in enumerate(self.segments):
            place = 0
            for piece, first, number in segments:
                slices[place : place + number, channel] = piece
                blocks[place : place + number, channel] = np.arange(first, first + number)
                place += number
        return slices, blocks

    @cached_property
    def outputs(self) -> Array:
        """The output that each lane of each register belongs to, int64 (registers, banks); -1 for none.

        Registers in the order in which they are read: for every step its active channels, then those of spare columns.
        """
        _, blocks = self.steps
        active = blocks[blocks >= 0]
        found = active[:, None] * self.banks + np.arange(self.banks)
        parts = [np.where(found < self.m, found, -1)]
        for spare in range(self.spares):
            of = blocks[spare * self.banks : (spare + 1) * self.banks]
            of = np.pad(of, ((0, self.banks - len(of)), (0, 0)), constant_values=-1)
            of = of[:, np.any(of >= 0, axis=0)]
            places = np.where(of >= 0, of * self.banks + self.spare_bank, -1).T
            parts.append(np.where(places < self.m, places, -1))
        return np.concatenate(parts)

    @property
    def additions(self) -> int:
        """Additions of the host for one vector: partial sums beyond the first of each output, and the bias."""
        sums = int((self.outputs >= 0).sum()) - self.m
        return sums + (0 if self.bias_inside else self.m)

    def pack(self, vectors: Array) -> Array:
        """What the host writes to registers, 16-bit (vectors * inputs, lanes), from vectors * k numbers in order."""
        rows = np.asarray(vectors).reshape(self.vectors, self.k)
        with np.errstate(over="ignore"):
            narrow = rows.astype(NUMBERS[self.number])
        padded = np.zeros((self.vectors, self.inputs * self.lanes), narrow.dtype)
        padded[:, : self.k] = narrow
        registers = padded.reshape(-1, self.lanes)
        return registers[list(self.writes)] if self.writes else registers

    def unpack(self, reads: Sequence[Array] | Array, bias: Array | None = None) -> Array:
        """Results, float32 (vectors, m), from the registers that were read, in order.

        Partial sums are added in float32 in the order in which they come; then `bias` (m,) if accumulators did not
        start with it; then the activation is applied.
        """
        places = self.outputs
        values = widen(np.stack(list(reads))).reshape(self.vectors, len(places), -1)[:, :, : self.banks]
        result = np.zeros((self.vectors, self.m + 1), np.float32)
        for vector in range(self.vectors):
            np.add.at(result[vector], places, values[vector])
        sums = result[:, : self.m]
        if bias is not None and not self.bias_inside:
            sums = sums + bias.astype(np.float32)
        return sums if self.activation is None else _ACTIVATIONS[self.activation](sums)


def from_json(data: Mapping[str, Any]) -> Layout:
    """The layout that `to_json` wrote."""
    fields = dict(data)
    fields["segments"] = tuple(tuple((int(s), int(b), int(n)) for s, b, n in channel) for channel in data["segments"])
    fields["writes"] = tuple(map(int, data["writes"]))
    return Layout(**fields)


def _gelu(x: Array) -> Array:
    erf = np.array([math.erf(v) for v in (x.reshape(-1) * np.float32(math.sqrt(0.5))).tolist()], np.float32)
    return np.float32(0.5) * x * (1 + erf.reshape(x.shape))


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return (np.where(x >= 0, np.float32(1), e) / (1 + e)).astype(np.float32)


_ACTIVATIONS = {"relu": lambda x: np.maximum(x, np.float32(0)), "sigmoid": _sigmoid, "tanh": np.tanh, "gelu": _gelu}


def require_activation(name: str | None) -> None:
    """Raises TargetError for an activation function that there is not."""
    if name is not None and name not in _ACTIVATIONS:
        raise TargetError(f"AiM has no activation function '{name}'; it has {', '.join(_ACTIVATIONS)}")
