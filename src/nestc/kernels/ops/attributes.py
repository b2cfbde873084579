"""Attributes of operators with their defaults and types checked."""

from __future__ import annotations

from nestc.errors import UnsupportedOp
from nestc.graph.region import Op


def integer(op: Op, name: str, default: int) -> int:
    """An integer attribute."""
    value = op.attributes.get(name)
    return value if isinstance(value, int) else default


def number(op: Op, name: str, default: float) -> float:
    """A float attribute."""
    value = op.attributes.get(name)
    return float(value) if isinstance(value, (int, float)) else default


def text(op: Op, name: str, default: str) -> str:
    """A string attribute."""
    value = op.attributes.get(name)
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, str) else default


def integers(op: Op, name: str) -> tuple[int, ...] | None:
    """A list of integers, None if absent."""
    value = op.attributes.get(name)
    if value is None:
        return None
    if not isinstance(value, tuple):
        raise refused(op, f"attribute {name} is not a list")
    return tuple(int(v) for v in value)


def axis_of(op: Op, rank: int, default: int = 0) -> int:
    """The axis attribute, counted from the front."""
    axis = integer(op, "axis", default)
    if not -max(rank, 1) <= axis < max(rank, 1):
        raise refused(op, f"axis {axis} is outside rank {rank}")
    return axis % max(rank, 1)


def refused(op: Op, why: str) -> UnsupportedOp:
    """The error for a form that has no generated code."""
    return UnsupportedOp(f"{op.op_type} (node {op.name!r}): {why}")
