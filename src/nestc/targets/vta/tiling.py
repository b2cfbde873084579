"""How a layer is cut: sizes of tiles, the order of their loops, and slots in the SRAMs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """What of a layer one device computes: output blocks first .. last - 1 and rows first .. last - 1."""

    blocks: tuple[int, int]
    rows: tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """Sizes of a tile and the order of tiles.

    A tile is `blocks` output blocks of `rows` x `columns` positions; its sums take `inputs` input blocks at a time.
    ``blocks_outer``: output blocks are the outer loop of tiles (weights stay), else positions (inputs stay).
    """

    rows: int
    columns: int
    blocks: int
    inputs: int
    blocks_outer: bool = False
