"""Steps of pairs of bytes: exact for every input, no 16-bit sum saturates, and with 8-bit weights nearly all are pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.kernels.byte_pairs import UNITS, VECTORS, PairedUnits, Pairing

LIMITS = np.iinfo(np.int16)


def computed(paired: PairedUnits, x: np.ndarray) -> np.ndarray:
    """Sums [batch][columns][lanes] of inputs [batch][units][4], as the kernels form them; no 16-bit sum may overflow for
    any input."""
    columns, chunks, _ = paired.counts.shape
    lanes = paired.vectors.shape[-1] // 4
    total = np.zeros((len(x), columns, lanes), np.int64) + paired.offset
    for column in range(columns):
        for chunk in range(chunks):
            numbers, vectors = paired.numbers[column, chunk], paired.vectors[column, chunk]
            for kind in range(3):
                assert paired.counts[column, chunk, kind] <= paired.most[kind]
                for step in range(paired.counts[column, chunk, kind]):
                    unit, vector = (step * a + b for a, b in paired.places(kind))
                    assert 0 <= unit <= len(numbers) - UNITS[kind] and 0 <= vector <= len(vectors) - VECTORS[kind]
                    halves = high = low = np.int64(0)
                    for i in range(UNITS[kind]):
                        weights = vectors[vector + i].reshape(lanes, 2, 2).astype(np.int64)
                        inputs = x[:, numbers[unit + i]].reshape(-1, 1, 2, 2)
                        if kind and i == UNITS[kind] - 1:
                            mask = vectors[vector + i + 1].view(np.uint8).reshape(lanes, 2, 2)
                            assert np.isin(mask, (0, 255)).all()
                            inputs = inputs ^ mask
                        alone = 255 * np.maximum(weights, 0).sum(-1), 255 * np.minimum(weights, 0).sum(-1)
                        assert alone[0].max() <= LIMITS.max and alone[1].min() >= LIMITS.min
                        halves = halves + (inputs * weights).sum(-1)
                        high, low = high + alone[0], low + alone[1]
                    assert np.max(high) <= LIMITS.max and np.min(low) >= LIMITS.min
                    total[:, column] += np.sum(halves, axis=-1)
    return total


def expected(units: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The same sums in int64."""
    columns, count, width = units.shape
    return np.einsum("cnwf,bnf->bcw", units.reshape(columns, count, width // 4, 4).astype(np.int64), x)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_sums_are_exact_and_never_saturate(data: st.DataObject) -> None:
    draw = data.draw
    columns, count, lanes = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.sampled_from([4, 8, 16]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    deviation = draw(st.sampled_from([3, 20, 40, 70, 400]))
    units = np.clip(np.round(rng.normal(0, deviation, (columns, count, lanes * 4))), -128, 127).astype(np.int8)
    extreme = rng.random(units.shape) < draw(st.sampled_from([0.0, 0.05, 1.0]))
    units[extreme] = rng.choice(draw(st.sampled_from([(-128, 127), (-128,), (127,), (-127, 127)])), int(extreme.sum()))
    x = rng.integers(0, 256, (5, count, 4)).astype(np.int64)
    x[1], x[2], x[3] = 0, 255, rng.choice([0, 255], (count, 4))
    paired = Pairing(units).pack(draw(st.sampled_from([64, 1000, 1 << 20])))
    np.testing.assert_array_equal(computed(paired, x), expected(units, x))


@pytest.mark.parametrize("weight", [-128, -127, 127])
def test_all_weights_at_an_end(weight: int) -> None:
    units = np.full((2, 7, 32), weight, np.int8)
    x = np.full((1, 7, 4), 255, np.int64)
    np.testing.assert_array_equal(computed(Pairing(units).pack(1 << 20), x), expected(units, x))


def test_normal_weights_of_eight_bits_make_pairs() -> None:
    rng = np.random.default_rng(0)
    units = np.clip(np.round(rng.normal(0, 37, (8, 256, 32))), -127, 127).astype(np.int8)
    plain, flipped, single = Pairing(units).counts.mean(axis=0)
    # Of 256 units, a third of which may saturate (56 do not fit with any other as they are).
    assert plain > 40 and flipped > 40 and single < 6
    assert 2 * plain + 2 * flipped + single == 256


def test_small_weights_need_no_complement() -> None:
    units = np.random.default_rng(0).integers(-32, 33, (3, 20, 64)).astype(np.int8)
    assert (Pairing(units).counts == [10, 0, 0]).all()
