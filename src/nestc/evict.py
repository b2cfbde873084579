"""Driving a program's data out of a processor's caches, as the rest of a network does between two of its runs."""

from __future__ import annotations

import numpy as np

MOST_BYTES = 16 << 20
"""More is not touched: what a level-2 cache and one core's part of a level-3 cache hold is gone by then."""

LEAST_BYTES = 1 << 18
"""Less is left out: half of a common level-2 cache stays as it was."""

_other_data = np.zeros(MOST_BYTES, np.uint8)


def evicting(nbytes: int) -> int:
    """The bytes that `evict` touches for so many: rounded down to a power of two, from `LEAST_BYTES` to `MOST_BYTES`,
    so that measurements beside networks of about the same size are the same measurement; 0 below."""
    if nbytes < LEAST_BYTES:
        return 0
    return min(MOST_BYTES, 1 << (nbytes.bit_length() - 1))


def evict(nbytes: int) -> None:
    """Read and write other data of so many bytes, at most `MOST_BYTES`.

    A short program that runs over and over keeps its weights in a cache, which between the other parts of a network it
    does not: there a classifier of 5 MB took three times as long as alone.
    """
    if nbytes > 0:
        part = _other_data[:nbytes]
        np.add(part, 1, out=part)
