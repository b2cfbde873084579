import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.codegen.arena import Buffer, lower_bound, plan_arena


def test_a_chain_needs_its_two_largest_neighbours():
    # a -> b -> c -> d: each lives from the step that writes it through the step that reads it.
    plan = plan_arena([Buffer("a", 256, 0, 1), Buffer("b", 512, 1, 2), Buffer("c", 128, 2, 3), Buffer("d", 640, 3, 4)])
    assert plan.nbytes == 768
    assert plan.offsets["a"] != plan.offsets["b"]


def test_equal_sizes_alternate_between_two_places():
    plan = plan_arena([Buffer(str(step), 64, step, step + 1) for step in range(10)])
    assert plan.nbytes == 128
    assert {plan.offsets[str(step)] for step in range(0, 10, 2)} != {
        plan.offsets[str(step)] for step in range(1, 10, 2)
    }


def test_best_fit_takes_the_smaller_gap():
    # Two gaps are free at step 2: 256 bytes (where `a` was) and 128 bytes (where `c` was).
    buffers = [Buffer("a", 256, 0, 1), Buffer("b", 320, 0, 3), Buffer("c", 128, 0, 1), Buffer("d", 64, 0, 3)]
    plan = plan_arena([*buffers, Buffer("e", 128, 2, 3), Buffer("f", 256, 2, 3)])
    assert plan.nbytes == 768
    assert plan.offsets["e"] == plan.offsets["c"]
    assert plan.offsets["f"] == plan.offsets["a"]


def test_a_residual_block_keeps_its_input():
    # x is read again by the add at step 3.
    plan = plan_arena(
        [Buffer("x", 1024, 0, 3), Buffer("t", 512, 1, 2), Buffer("u", 1024, 2, 3), Buffer("y", 1024, 3, 4)]
    )
    assert plan.nbytes == 3072


def test_sizes_are_rounded_to_cache_lines_and_nothing_needs_nothing():
    assert plan_arena([Buffer("a", 1, 0, 0), Buffer("b", 65, 0, 0)]).nbytes == 192
    assert plan_arena([Buffer("a", 0, 0, 5)]).offsets == {"a": 0}
    assert plan_arena([]).nbytes == 0


@pytest.mark.parametrize(
    "buffers",
    [[Buffer("a", -1, 0, 0)], [Buffer("a", 1, 2, 1)], [Buffer("a", 1, 0, 0), Buffer("a", 1, 1, 1)]],
)
def test_impossible_buffers_are_refused(buffers: list[Buffer]):
    with pytest.raises(ValueError, match="'a'"):
        plan_arena(buffers)


@st.composite
def _buffers(draw: st.DrawFn) -> list[Buffer]:
    lives = draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 30), st.integers(0, 10)), max_size=40))
    return [Buffer(str(number), size, first, first + length) for number, (size, first, length) in enumerate(lives)]


@settings(deadline=None, max_examples=150)
@given(_buffers())
def test_live_buffers_never_overlap(buffers: list[Buffer]):
    plan = plan_arena(buffers)
    for one in buffers:
        begin = plan.offsets[one.name]
        assert begin % 64 == 0
        assert begin + one.nbytes <= plan.nbytes
        for other in buffers:
            if one is other or one.first > other.last or other.first > one.last:
                continue
            start = plan.offsets[other.name]
            assert begin + one.nbytes <= start or start + other.nbytes <= begin or 0 in (one.nbytes, other.nbytes)
    assert lower_bound(buffers) <= plan.nbytes <= sum(-(-item.nbytes // 64) * 64 for item in buffers)
