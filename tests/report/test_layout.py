"""Drawings: nothing overlaps, edges go down, chains are straight, few edges cross, long graphs are wrapped."""

from __future__ import annotations

import itertools
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.report.layout import HEIGHT, WIDTH, Drawing, draw


def overlapping(drawing: Drawing) -> list[tuple[str, str]]:
    """Pairs of boxes that share a place."""
    return [
        (a, b)
        for (a, (ax, ay)), (b, (bx, by)) in itertools.combinations(drawing.places.items(), 2)
        if abs(ax - bx) < WIDTH - 0.01 and abs(ay - by) < HEIGHT - 0.01
    ]


@st.composite
def graphs(draws: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    """Nodes in a topological order and edges from earlier to later ones, each once."""
    count = draws(st.integers(1, 24))
    nodes = [f"n{number}" for number in range(count)]
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))
    edges = {(min(pair), max(pair)) for pair in draws(st.lists(pairs, max_size=40)) if pair[0] != pair[1]}
    return nodes, [(nodes[a], nodes[b]) for a, b in sorted(edges)]


@settings(deadline=None, max_examples=60)
@given(graphs())
def test_boxes_do_not_overlap_and_stay_inside(graph: tuple[list[str], list[tuple[str, str]]]) -> None:
    nodes, edges = graph
    drawing = draw(nodes, edges)
    assert set(drawing.places) == set(nodes) and len(drawing.paths) == len(edges)
    assert not overlapping(drawing)
    for x, y in drawing.places.values():
        assert WIDTH / 2 - 0.01 <= x <= drawing.width - WIDTH / 2 + 0.01
        assert HEIGHT / 2 <= y <= drawing.height - HEIGHT / 2
    for (source, destination), path in zip(edges, drawing.paths, strict=True):
        numbers = [float(each) for each in re.findall(r"-?\d+(?:\.\d+)?", path)]
        begin, end = drawing.places[source], drawing.places[destination]
        assert abs(numbers[0] - begin[0]) < 0.1 and abs(numbers[1] - begin[1] - HEIGHT / 2) < 0.1
        assert abs(numbers[-2] - end[0]) < 0.1 and abs(numbers[-1] - end[1] + HEIGHT / 2) < 0.1


def test_a_short_chain_is_a_column() -> None:
    drawing = draw(["a", "b"], [("a", "b")])
    (ax, ay), (bx, by) = drawing.places["a"], drawing.places["b"]
    assert ax == bx and ay < by


def test_a_long_chain_is_wrapped_into_columns() -> None:
    nodes = [f"n{number}" for number in range(120)]
    drawing = draw(nodes, list(itertools.pairwise(nodes)))
    assert len({x for x, _ in drawing.places.values()}) > 3
    assert 0.8 < drawing.width / drawing.height < 3.5
    assert not overlapping(drawing)


def test_edges_that_need_not_cross_do_not() -> None:
    # Two chains side by side, given so that the second layer begins in the wrong order.
    drawing = draw(["a", "b", "d", "c"], [("a", "c"), ("b", "d")])
    places = drawing.places
    assert (places["a"][0] < places["b"][0]) == (places["c"][0] < places["d"][0])


def test_long_edges_of_one_source_are_one_line() -> None:
    nodes = [f"n{number}" for number in range(5)]
    chain = list(itertools.pairwise(nodes))
    drawing = draw(nodes, [*chain, ("n0", "n3"), ("n0", "n4")])
    first, second = drawing.paths[-2:]
    common = first[: first.rindex("C")]  # all but the way into its user
    assert second.startswith(common) and common.count("C") == 2


def test_what_has_nothing_before_it_stands_above_its_user() -> None:
    places = draw(["a", "b", "c", "late", "d"], [("a", "b"), ("b", "c"), ("c", "d"), ("late", "d")]).places
    assert places["late"][1] == places["c"][1]


def test_nothing_to_draw() -> None:
    assert draw([], []).places == {}
