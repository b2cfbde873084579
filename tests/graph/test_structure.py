"""The structure of a region: what counts of it, and what does not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nestc.graph.region import AttributeValue, Op, Region, TensorType
from nestc.graph.structure import digest, plain, structure

FLOATS = TensorType("float32", (2, 4))


def scaled(prefix: str = "", **attributes: AttributeValue) -> Region:
    """x * w, through an operator with the attributes given."""
    x, w, y, unused = (f"{prefix}{name}" for name in ("x", "w", "y", "unused"))
    ops = (
        Op("Mul", (x, w), (f"{prefix}p",), name=f"{prefix}mul"),
        Op("Clip", (f"{prefix}p", "", w), (y,), attributes),
    )
    constants = {name: partial(np.ones, (2, 4), np.float32) for name in (w, unused)}
    return Region(
        f"{prefix}r", "Mul", ops, (x,), (y,), dict.fromkeys((x, w, f"{prefix}p", y, unused), FLOATS), constants
    )


def test_values_are_numbered_in_the_order_they_are_met() -> None:
    anchor, inputs, ops, types, constants, outputs = structure(scaled(), lambda name: f"contents of {name}")
    assert (anchor, inputs, outputs) == ("Mul", [0], [3])
    assert ops == [["::Mul", {}, [0, 1], [2]], ["::Clip", {}, [2, -1, 1], [3]]]
    assert types == [(number, "float32", (2, 4)) for number in range(4)]
    assert constants == [(1, "contents of w")]


def test_names_and_attributes_that_are_not_set_do_not_count() -> None:
    mine = digest(structure(scaled(), len))
    assert mine == digest(structure(scaled(alpha=None), len))
    assert mine != digest(structure(scaled(alpha=1), len))
    assert digest(structure(scaled("a"), lambda _: 0)) == digest(structure(scaled("another."), lambda _: 0))


@dataclass
class Options:
    size: int
    folder: Path


def test_values_as_json_has_them() -> None:
    assert plain(0.1) == (0.1).hex()
    assert plain(b"\x01") == ["bytes", "01"]
    assert plain({"b": (1, None), "a": Options(2, Path("x"))}) == {"a": {"size": 2, "folder": "x"}, "b": [1, None]}
    assert plain(np.array(["é"], object)) == ["array", "object", [1], ["é"]]
    assert plain(object()) == "object"


def test_arrays_count_by_type_shape_and_contents() -> None:
    array = np.arange(6, dtype=np.int32)
    assert plain(array) == plain(array.copy()) == plain(array[::-1][::-1])
    others = [array.astype(np.int64), array.reshape(2, 3), array + 1, array.astype(np.float32)]
    assert len({digest(plain(each)) for each in [array, *others]}) == 5
    assert plain(np.int32(3)) == plain(np.asarray(np.int32(3)))
