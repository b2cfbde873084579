"""Where data lies in an SRAM: slots of one size used in turn, which remember what they hold."""

from __future__ import annotations

from collections.abc import Hashable


class Slots:
    """Slots of `size` elements from `base` on, as many as fit before `end`.

    Data that is asked for again while it is there is not loaded again. Slots are used in turn, so that with two of
    them one is filled while the other is read.
    """

    def __init__(self, base: int, end: int, size: int) -> None:
        self.base = base
        self.size = max(size, 1)
        self.count = (end - base) // self.size
        self.held: list[Hashable] = [None] * max(self.count, 0)
        self.next = 0

    def find(self, key: Hashable) -> int | None:
        """The place of what `key` names, if it is there."""
        return self.base + self.held.index(key) * self.size if key in self.held else None

    def take(self, key: Hashable) -> int:
        """The place of the slot that is next in turn, which holds `key` from now on."""
        slot = self.next
        self.next = (slot + 1) % self.count
        self.held[slot] = key
        return self.base + slot * self.size
