"""How whole values go into registers, chunk by chunk, and their sums and products come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from nestc.runtime.aim.simulate import NUMBERS, widen

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class ElementLayout:
    """What the registers of a launch mean that multiplies and adds values element by element.

    Every value has `elements` numbers, ``lanes`` a register; they are worked on in `chunks` of `registers` registers
    of each value, the last one padded with zeros. For every chunk the host writes ``writes`` values (places among the
    inputs; one may come twice) and reads ``reads`` (places among the outputs), all registers of one after the other.
    """

    elements: int
    number: str
    lanes: int
    chunks: int
    registers: int
    writes: tuple[int, ...]
    reads: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values, which `from_json` reads back."""
        return asdict(self)

    def pack(self, inputs: Sequence[Array]) -> Array:
        """What the host writes, 16-bit (chunks * writes * registers, lanes); inputs have `elements` numbers each."""
        cut = [self.cut(array) for array in inputs]
        chosen = [cut[place][chunk] for chunk in range(self.chunks) for place in self.writes]
        return np.concatenate(chosen) if chosen else np.zeros((0, self.lanes), NUMBERS[self.number])

    def cut(self, array: Array) -> Array:
        """A value of `elements` numbers as (chunks, registers, lanes), rounded to 16 bits and padded with zeros."""
        padded = np.zeros(self.chunks * self.registers * self.lanes, NUMBERS[self.number])
        with np.errstate(over="ignore"):
            padded[: self.elements] = np.ascontiguousarray(array).reshape(-1).astype(padded.dtype)
        return padded.reshape(self.chunks, self.registers, self.lanes)

    def unpack(self, reads: Sequence[Array]) -> list[Array]:
        """The outputs, float32 (elements,) each, from the registers that were read, in order."""
        shape = self.chunks, len(self.reads), self.registers * self.lanes
        values = widen(np.stack(list(reads))).reshape(shape)
        order = [self.reads.index(place) for place in range(len(self.reads))]
        return [np.ascontiguousarray(values[:, place]).reshape(-1)[: self.elements] for place in order]


def from_json(data: Mapping[str, Any]) -> ElementLayout:
    """The layout that `to_json` wrote. Raises ValueError if its numbers do not fit each other."""
    fields = dict(data)
    fields["writes"], fields["reads"] = tuple(map(int, data["writes"])), tuple(map(int, data["reads"]))
    found = ElementLayout(**fields)
    if found.number not in NUMBERS or min(found.elements, found.lanes, found.chunks, found.registers) < 1:
        raise ValueError("sizes of a launch on elements are below 1, or its format is none")
    if found.elements > found.chunks * found.registers * found.lanes:
        raise ValueError(f"{found.elements} elements are more than the registers hold")
    if sorted(found.reads) != list(range(len(found.reads))):
        raise ValueError("outputs of a launch on elements are not all read once")
    return found


def chunks_of(elements: int, lanes: int, most: int) -> tuple[int, int]:
    """Chunks, and registers of each, of values of which at most `most` registers are there at a time."""
    registers = math.ceil(elements / lanes)
    chunks = math.ceil(registers / most)
    return chunks, math.ceil(registers / chunks)
