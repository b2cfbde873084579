"""Numbers that a layer's instructions need beside weights: biases as digits for the GEMM, vectors for the ALU."""

from __future__ import annotations

from typing import Literal

import numpy as np

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import AluOp
from nestc.targets.vta.layer import Init, Layer, Shift
from nestc.targets.vta.tiling import Share

DIGIT = 127
"""What lanes of the constant input element hold, but for the last, which holds 1."""

MOST_DIGITS = 2
"""Weight blocks of a bias above which the ALU adds it: two cycles an accumulator, as two blocks take."""


def unit(config: VtaConfig) -> np.ndarray:
    """The constant input element (1, batch, block) that biases are multiplied with."""
    element = np.full((1, config.batch, config.block), DIGIT, np.int8)
    element[:, :, -1] = 1
    return element


def is_immediate(values: np.ndarray) -> bool:
    """Whether one number holds for all channels and fits the ALU's immediate (16 bits)."""
    return values.ndim == 0 and -(1 << 15) <= int(values) < 1 << 15


def bound_that_sets(values: np.ndarray) -> AluOp | None:
    """The operation that makes any number of 8 bits the one number of `values`; None if none does."""
    if not is_immediate(values) or -128 < int(values) < 127:
        return None
    return AluOp.MAX if int(values) >= 127 else AluOp.MIN


def digits_needed(values: np.ndarray, config: VtaConfig) -> int:
    """Weight blocks that hold `values` (int64) as multiples of the constant input element."""
    largest = int(np.abs(_quotient(values)).max(initial=0))
    return max(1, -(-largest // (DIGIT * (config.block - 1))))


def bias_digits(values: np.ndarray, digits: int) -> np.ndarray:
    """Weight blocks int8 (blocks * digits, block, block) whose products with `unit` sum to `values` (blocks, block)."""
    blocks, block = values.shape
    weights = np.zeros((blocks, digits, block, block), np.int8)
    rest = _quotient(values)
    weights[:, 0, :, -1] = values - DIGIT * rest
    for digit in range(digits):
        for lane in range(block - 1):
            part = np.clip(rest, -DIGIT, DIGIT)
            weights[:, digit, :, lane] = part
            rest = rest - part
    return weights.reshape(-1, block, block)


def _quotient(values: np.ndarray) -> np.ndarray:
    """The nearest multiple of `DIGIT`, divided by it; what is left fits in 7 bits."""
    return np.floor_divide(values + DIGIT // 2, DIGIT)


class Vectors:
    """Which steps of a layer take a vector of channels by the ALU, and the numbers of all as elements of VTA."""

    def __init__(self, layer: Layer, share: Share, config: VtaConfig) -> None:
        self.layer, self.config = layer, config
        self.blocks = -(-layer.output.channels // config.block)
        self.numbers: list[int] = []
        self.digits = 0
        for number, step in enumerate(layer.steps):
            if isinstance(step, Shift) and step.amounts.ndim and (step.amounts != step.amounts.flat[0]).any():
                self.numbers.append(number)
            if isinstance(step, Init) and step.values.any() and not is_immediate(step.values):
                digits = digits_needed(step.values, config)
                if digits > MOST_DIGITS:
                    self.numbers.append(number)
                else:
                    self.digits = digits

    @property
    def count(self) -> int:
        """Steps that take a vector."""
        return len(self.numbers)

    def by_digits(self, number: int) -> bool:
        """Whether the bias of step `number` is multiplied, not added by the ALU."""
        return number not in self.numbers

    def blocked(self, values: np.ndarray, fill: Literal["edge", "constant"] = "edge") -> np.ndarray:
        """int64 (blocks, block) of one number a channel, or of one for all.

        Lanes behind the last channel repeat it ("edge"), so that equal numbers stay equal, or hold 0 ("constant").
        """
        room = self.blocks * self.config.block
        flat = np.broadcast_to(values, (self.layer.output.channels,)) if values.ndim == 0 else values
        return np.pad(flat.astype(np.int64), (0, room - flat.size), mode=fill).reshape(self.blocks, -1)

    def arrays(self) -> list[tuple[str, np.ndarray]]:
        """Parameter name and elements int32 (blocks, batch, block) of each vector, in the order of `numbers`."""
        found: list[tuple[str, np.ndarray]] = []
        for number in self.numbers:
            step = self.layer.steps[number]
            assert isinstance(step, Init | Shift)
            values = self.blocked(step.values, "constant") if isinstance(step, Init) else self.blocked(step.amounts)
            elements = np.repeat(values.astype(np.int32)[:, None, :], self.config.batch, axis=1)
            found.append((f"{self.layer.name}/vector{number}", elements))
        return found
