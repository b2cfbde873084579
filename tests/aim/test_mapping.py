"""Where weights lie: every one has one place, and rows, columns and channels are what the plan says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines_small import small

from nestc.errors import TargetError
from nestc.runtime.aim.layout import from_json
from nestc.runtime.aim.machine import preset
from nestc.runtime.aim.simulate import NUMBERS
from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.mapping import SPARE_BANK, Mapping, plan, write_weights
from nestc.targets.aim.search import mappings


def _layer(m: int, k: int, weights: np.ndarray | None = None, bias: bool = False) -> MatrixVector:
    """A layer of the given weights, or of different numbers that 16 bits hold."""
    if weights is None:
        weights = (np.arange(m * k).reshape(m, k) % 251 + 1).astype(np.float32)
    return MatrixVector("layer", weights, np.ones(m, np.float32) if bias else None, None, "x", "y")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 5), st.data())
def test_every_weight_has_one_place(m: int, k: int, channels: int, data: st.DataObject) -> None:
    """Reading the banks by the steps of the layout gives back the matrix, padded with zeros and nothing else."""
    machine = small(channels)
    layer = _layer(m, k)
    choices = [mapping for mapping in mappings(layer, machine) if not mapping.opener]
    mapping = data.draw(st.sampled_from(choices))
    try:
        found = plan(layer, mapping, machine)
    except TargetError:
        return
    memory = np.zeros((channels, machine.banks, found.rows + 2, machine.columns, machine.lanes), NUMBERS["bfloat16"])
    write_weights(memory, 1, layer, found)
    layout = found.layout
    matrix = np.zeros((layout.blocks, machine.banks, layout.slices, layout.width, machine.lanes), np.float32)
    slices, blocks = layout.steps
    for item, channel in np.argwhere(blocks >= 0):
        row, column = found.place(int(item))
        held = memory[channel, :, 1 + row, column : column + layout.width].astype(np.float32)
        assert not matrix[blocks[item, channel], :, slices[item, channel]].any(), "two places for the same weights"
        matrix[blocks[item, channel], :, slices[item, channel]] = held
    flat = matrix.reshape(layout.blocks * machine.banks, -1)
    assert np.array_equal(flat[:m, :k], layer.weights)
    assert not flat[m:].any() and not flat[:, k:].any()
    assert np.count_nonzero(memory) == m * k, "each weight is in the banks once"
    assert not memory[:, :, 0].any() and not memory[:, :, -1].any(), "rows of other layers are not touched"


def test_openers_of_full_rows_keep_known_products() -> None:
    """What EWMUL will write is there from the start; the weight and the product's negative are among the spares."""
    machine = small(2, 4)
    weights = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)
    layer = _layer(24, 16, weights)
    found = plan(layer, Mapping(1, opener=True), machine, "float16")
    assert (found.items, found.rows, found.layout.spares, found.spoilt) == (3, 4, 1, (3, 3, 3))
    memory = np.zeros((2, 4, found.rows, 4, 4), np.float16)
    write_weights(memory, 0, layer, found)
    for channel in range(2):
        for row in range(3):
            first, second, third = memory[channel, :3, row, 3].astype(np.float32)
            assert np.array_equal(third, (first * second).astype(np.float16))
            block = channel * 3 + row
            original = weights[block * 4 + SPARE_BANK, 12:].astype(np.float16)
            spare = memory[channel, row, 3, 2:4]
            assert np.array_equal(spare[0], -third.astype(np.float16)) and np.array_equal(spare[1], original)


def test_products_that_overflow_are_no_openers() -> None:
    weights = np.full((12, 16), 1e4, np.float32)
    layer = _layer(12, 16, weights)
    machine = small(1, 4)
    found = plan(layer, Mapping(1, opener=True), machine, "float16")
    with pytest.raises(TargetError, match="overflows"):
        write_weights(np.zeros((1, 4, found.rows, 4, 4), np.float16), 0, layer, found)


def test_a_free_column_stays_zero() -> None:
    """Where rows have a free column EWMUL multiplies zeros."""
    machine = small(1, 4)
    layer = _layer(8, 12)
    found = plan(layer, Mapping(1, opener=True), machine)
    assert (found.rows, found.layout.spares, found.spoilt) == (2, 0, (3, 3))


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        (Mapping(1), "do not fit in a row"),
        (Mapping(5), "are not cut into 5 slices, but 4"),
        (Mapping(2, pack=2), "do not fit in a row"),
        (Mapping(8, pack=4, opener=True, even=False), "no column is free"),
        (Mapping(4, inside=True), "only to whole sums"),
        (Mapping(8), "8 slices are more than 3 channels"),
    ],
)
def test_what_does_not_suit_is_refused(mapping: Mapping, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        plan(_layer(20, 32), mapping, small(3, 4))


def test_unknown_functions_are_refused() -> None:
    layer = MatrixVector("layer", np.zeros((4, 4), np.float32), None, "softmax", "x", "y")
    with pytest.raises(TargetError, match="no activation function 'softmax'"):
        plan(layer, Mapping(1), small())


def test_dense_shares_change_slices_together() -> None:
    """25 slices on 32 channels: the same number of items each, in two segments whose order makes changes coincide."""
    layer = MatrixVector("fc", np.broadcast_to(np.float32(0), (4096, 25088)), None, None, "x", "y")
    found = plan(layer, Mapping(25, even=False), preset("gddr6_aim"))
    segments = found.layout.segments
    assert {sum(s[2] for s in channel) for channel in segments} == {200}
    changes = {channel[0][2] for channel in segments if len(channel) > 1}
    assert len(changes) <= 12
    slices, blocks = found.layout.steps
    assert len(set(zip(slices.ravel().tolist(), blocks.ravel().tolist()))) == 25 * 256


def test_layouts_are_kept_as_json() -> None:
    found = plan(_layer(30, 20, bias=True), Mapping(2, even=False), small())
    assert from_json(found.layout.to_json()) == found.layout
    assert found.layout.additions == 2 * 30 - 30 + 30
