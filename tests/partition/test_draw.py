"""Inputs that are made up for a region."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from partition_fakes import (
    Scripted,
    measure,
    models,
    unary,
)

from nestc.errors import TargetError
from nestc.graph.region import Op, Region, TensorType
from nestc.partition.draw import CannotDraw, draw
from nestc.targets.api import Partition


def partition(*given: Region) -> Partition:
    types = {name: type_ for region in given for name, type_ in region.types.items()}
    inputs = tuple(name for region in given for name in region.inputs)
    return Partition("p", "fake", given, inputs, given[-1].outputs, types, lambda: models(*given)([]))


def test_inputs_are_of_their_types_and_valid_where_they_index() -> None:
    types = {
        "data": TensorType("float32", (5, 7)),
        "index": TensorType("int64", (400,)),
        "out": TensorType("float32", (5, 400)),
    }
    gather = Region(
        "g", None, (Op("Gather", ("data", "index"), ("out",), {"axis": 1}),), ("data", "index"), ("out",), types, {}
    )
    (data, index), sure = draw(partition(gather))
    assert sure and data.dtype == np.float32 and abs(float(data.mean())) < 1
    assert set(index.tolist()) == set(range(7))
    again, _ = draw(partition(gather))
    assert np.array_equal(again[0], data)
    for dtype, least, most, certain in (("int8", -128, 127, True), ("uint8", 0, 255, True), ("int64", 1, 2, False)):
        region = unary("Neg", "x", "y", TensorType(dtype, (3000,)))
        (array,), sure = draw(partition(region))
        assert (array.dtype, int(array.min()), int(array.max()), sure) == (np.dtype(dtype), least, most, certain)
    (array,), _ = draw(partition(unary("Neg", "x", "y", TensorType("bfloat16", (4,)))))
    assert array.dtype.name == "bfloat16"
    (array,), _ = draw(partition(unary("Neg", "x", "y", TensorType("bool", (4,)))))
    assert array.dtype == np.bool_


def test_indices_that_are_computed_first_are_zero() -> None:
    types = {"i": TensorType("int64", (3,)), "j": TensorType("int64", (3,)), "d": TensorType("float32", (2,))}
    ops = (Op("Abs", ("i",), ("j",)), Op("Gather", ("d", "j"), ("o",)))
    region = Region("g", None, ops, ("i", "d"), ("o",), {**types, "o": TensorType("float32", (3,))}, {})
    (index, _), _ = draw(partition(region))
    assert index.tolist() == [0, 0, 0]


@pytest.mark.parametrize("type_", [TensorType("float32", (2, -1)), TensorType("sequence(float32)", ())])
def test_inputs_that_cannot_be_made_up_leave_an_estimate(tmp_path: Path, type_: TensorType) -> None:
    region = unary("Neg", "x", "y", type_)
    with pytest.raises(CannotDraw, match="'x'"):
        draw(partition(region))
    target = Scripted(cost=lambda region: 2e-3, facts={"dynamic_shapes": True})
    found = measure(tmp_path, target, region)
    assert (found.seconds, found.kind) == (2e-3, "estimated") and "'x'" in found.note


def test_values_that_may_not_suit_are_no_reason_to_refuse(tmp_path: Path) -> None:
    region = unary("Neg", "x", "y", TensorType("int64", (4,)))
    found = measure(tmp_path, Scripted(faults={"run": TargetError("out of range")}), region)
    assert (found.kind, found.refusal) == ("estimated", None)
    assert found.seconds > 0 and "out of range" in found.note
