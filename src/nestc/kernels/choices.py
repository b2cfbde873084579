"""What a measurement may choose of a direct convolution or a product, apart from the algorithm; each has a rule, too.

The text of a choice is a part of the name of its family ("conv_6x2_r4"), which the tuning store keeps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ConvChoice:
    """Parameters of a direct convolution; None: by rule.

    ``tile``: outputs along a row x vectors of output channels that are summed in registers. ``rows``: output rows of a
    parallel item; ``blocks``: blocks of input channels that are summed before the next tile. Of both the largest
    divisor of what there is counts that is not above the number.
    """

    tile: tuple[int, int] | None = None
    rows: int | None = None
    blocks: int | None = None

    @property
    def text(self) -> str:
        """As it stands in a name; empty if all is by rule."""
        return _tile_text(self.tile) + _text("r", self.rows) + _text("c", self.blocks)


@dataclass(frozen=True)
class GemmChoice:
    """Parameters of a product; None: by rule.

    ``tile``: rows x vectors of columns that are summed in registers. ``items``: register tiles of rows x panels of
    columns in a parallel item (the largest divisors that are not above). ``parts``: how many parts k is summed in.
    """

    tile: tuple[int, int] | None = None
    items: tuple[int, int] | None = None
    parts: int | None = None

    @property
    def text(self) -> str:
        """As it stands in a name; empty if all is by rule."""
        items = "" if self.items is None else f"_i{self.items[0]}x{self.items[1]}"
        return _tile_text(self.tile) + items + _text("k", self.parts)


CONV_BY_RULE = ConvChoice()
GEMM_BY_RULE = GemmChoice()

_CONV = re.compile(r"conv(?:_(\d{1,2})x(\d))?(?:_r(\d{1,5}))?(?:_c(\d{1,5}))?")
_GEMM = re.compile(r"gemm(?:_(\d{1,2})x(\d))?(?:_i(\d{1,5})x(\d{1,5}))?(?:_k(\d{1,5}))?")


def conv_choice(name: str) -> ConvChoice | None:
    """The choice that a family's name holds; None if it is no name of a direct convolution."""
    found = _CONV.fullmatch(name)
    if found is None:
        return None
    rows, blocks = (None if part is None else int(part) for part in found.groups()[2:])
    return ConvChoice(_pair(found[1], found[2]), rows, blocks)


def gemm_choice(name: str) -> GemmChoice | None:
    """The choice that a family's name holds; None if it is no name of a product."""
    found = _GEMM.fullmatch(name)
    if found is None:
        return None
    return GemmChoice(_pair(found[1], found[2]), _pair(found[3], found[4]), None if found[5] is None else int(found[5]))


def below(n: int, most: int) -> int:
    """The largest divisor of `n` that is not above `most`, at least 1."""
    return next(each for each in range(max(1, min(n, most)), 0, -1) if n % each == 0)


def _tile_text(tile: tuple[int, int] | None) -> str:
    return "" if tile is None else f"_{tile[0]}x{tile[1]}"


def _text(letter: str, number: int | None) -> str:
    return "" if number is None else f"_{letter}{number}"


def _pair(first: str | None, second: str | None) -> tuple[int, int] | None:
    return None if first is None or second is None else (max(1, int(first)), max(1, int(second)))
