"""How much other data is touched between two runs of what is timed."""

import numpy as np
import pytest

from nestc import evict


@pytest.mark.parametrize(
    ("wanted", "touched"),
    [
        (-5, 0),
        (0, 0),
        ((1 << 18) - 1, 0),
        (1 << 18, 1 << 18),
        (3 << 20, 2 << 20),
        (1 << 24, 1 << 24),
        (1 << 30, 1 << 24),
    ],
)
def test_sizes_are_rounded_down_to_powers_of_two(wanted: int, touched: int) -> None:
    assert evict.evicting(wanted) == touched


def test_so_many_bytes_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.zeros(evict.MOST_BYTES, np.uint8)
    monkeypatch.setattr(evict, "_other_data", data)
    evict.evict(0)
    evict.evict(-1)
    assert not data.any()
    evict.evict(1000)
    assert data[:1000].tolist() == [1] * 1000 and not data[1000:].any()
