import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.codegen.schedule import PARALLEL, Alias, ScheduledStep, Step, schedule

WRITES = (False, False, True)


def plan(steps, sizes, threads=2, **options):
    return schedule(steps, inputs=["x"], outputs=["y"], constants=["w"], sizes=sizes, threads=threads, **options)


def test_dependent_steps_meet_and_independent_ones_do_not():
    steps = [
        Step("k", ("x", "w", "a"), WRITES, 64),
        Step("k", ("x", "w", "b"), WRITES, 64),  # beside a
        Step("k", ("a", "b", "c"), WRITES, 64),
        Step("k", ("c", "w", "y"), WRITES, 64),
    ]
    made = plan(steps, {"a": 64, "b": 64, "c": 64})
    assert [item.barrier for item in made.steps] == [False, False, True, True]
    assert [item.lane for item in made.steps] == [PARALLEL] * 4
    assert made.arena_bytes == 192


def test_memory_is_not_reused_inside_a_phase_so_no_barrier_is_added():
    # Of the two branches x -> a -> p and x -> b -> q the first steps share a phase, as do the second ones.
    steps = [
        Step("k", ("x", "w", "a"), WRITES, 64),
        Step("k", ("x", "w", "b"), WRITES, 64),
        Step("k", ("a", "w", "p"), WRITES, 64),
        Step("k", ("b", "w", "q"), WRITES, 64),
        Step("k", ("p", "q", "y"), WRITES, 64),
    ]
    sizes = dict.fromkeys("abpq", 64)
    assert [item.barrier for item in plan(steps, sizes).steps] == [False, False, True, False, True]
    assert plan(steps, sizes).arena_bytes == 256
    assert plan(steps, sizes, threads=1).arena_bytes == 192


def test_a_chain_of_serial_steps_stays_on_one_worker_without_barriers():
    names = ["x", "a", "b", "c", "y"]
    steps = [Step("k", (one, "w", two), WRITES) for one, two in itertools.pairwise(names)]
    made = plan(steps, dict.fromkeys("abc", 64))
    assert [(item.lane, item.barrier) for item in made.steps] == [(0, False)] * 4
    assert made.arena_bytes == 128


def test_costly_independent_serial_chains_run_side_by_side():
    steps = [
        Step("k", ("x", "w", "a"), WRITES, cost=1e-3),
        Step("k", ("a", "w", "b"), WRITES, cost=1e-3),
        Step("k", ("x", "w", "c"), WRITES, cost=1e-3),
        Step("k", ("c", "w", "d"), WRITES, cost=1e-3),
        Step("k", ("b", "d", "y"), WRITES, 64, cost=1e-3),
    ]
    made = plan(steps, dict.fromkeys("abcd", 64))
    assert [item.lane for item in made.steps] == [0, 0, 1, 1, PARALLEL]
    assert [item.barrier for item in made.steps] == [False, False, False, False, True]


def test_small_steps_are_serial_and_a_small_model_is_not_worth_threads():
    made = plan([Step("k", ("x", "w", "y"), WRITES, 1000, cost=1e-6)], {})
    assert made.steps[0].lane == 0
    assert not made.worth_threads
    assert plan([Step("k", ("x", "w", "y"), WRITES, 1000, cost=1e-3)], {}).worth_threads


def test_parts_of_one_value_may_be_written_at_the_same_time():
    aliases = {"left": Alias("whole"), "right": Alias("whole", 128), "wide": Alias("whole", 64)}
    sizes = {"whole": 256, "left": 128, "right": 128, "wide": 128}
    parts = [
        Step("k", ("x", "w", "left"), WRITES, 64),
        Step("k", ("x", "w", "right"), WRITES, 64),
        Step("k", ("whole", "w", "y"), WRITES, 64),
    ]
    made = plan(parts, sizes, aliases=aliases)
    assert [item.barrier for item in made.steps] == [False, False, True]
    assert made.steps[1].places[2].offset == made.steps[0].places[2].offset + 128
    overlapping = [parts[0], Step("k", ("x", "w", "wide"), WRITES, 64), parts[1], parts[2]]
    assert [item.barrier for item in plan(overlapping, sizes, aliases=aliases).steps] == [False, True, True, True]


def test_an_alias_may_lie_in_an_output():
    aliases = {"t": Alias("y", 64)}
    made = plan([Step("k", ("x", "w", "t"), WRITES, 8)], {"t": 32}, aliases=aliases)
    assert (made.steps[0].places[2].slot, made.steps[0].places[2].offset) == (1, 64)
    assert made.arena_bytes == 0


@pytest.mark.parametrize(
    ("step", "sizes", "aliases", "message"),
    [
        (Step("k", ("x", "a", "y"), WRITES), {"a": 4}, {}, "reads 'a' before"),
        (Step("k", ("x", "w", "a"), WRITES), {}, {}, "'a', which has no size"),
        (Step("k", ("x", "y", "w"), (False, True, True)), {}, {}, "writes 'w', which is an input or a constant"),
        (Step("k", ("x", "y"), WRITES), {}, {}, "2 arguments and 3 write flags"),
        (Step("k", ("x", "w", "y"), WRITES, 0), {}, {}, "extent 0"),
        (Step("k", ("x", "w", "b"), WRITES), {"a": 4, "b": 4}, {"b": Alias("a", 4)}, "reaches beyond 'a'"),
        (Step("k", ("x", "w", "b"), WRITES), {"b": 4}, {"b": Alias("c"), "c": Alias("b")}, "alias of itself"),
    ],
)
def test_steps_that_do_not_fit_together_are_refused(step, sizes, aliases, message):
    with pytest.raises(ValueError, match=message):
        plan([step], sizes, aliases=aliases)


def _orders(steps: list[ScheduledStep], workers: int) -> list[tuple[int, int]]:
    """Pairs of steps that may run at the same time, or in any order."""
    phase = np.cumsum([item.barrier for item in steps])
    return [
        (one, two)
        for one, two in itertools.combinations(range(len(steps)), 2)
        if phase[one] == phase[two]
        and (PARALLEL in (steps[one].lane, steps[two].lane) or steps[one].lane % workers != steps[two].lane % workers)
    ]


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_steps_that_may_overlap_never_touch_the_same_memory(data: st.DataObject):
    """Random graphs: whatever runs unordered shares no byte that one of them writes, for 1 to 4 workers."""
    count = data.draw(st.integers(1, 15))
    steps, values = [], ["x", "w"]
    for number in range(count):
        sources = [data.draw(st.sampled_from(values)) for _ in range(2)]
        result = "y" if number == count - 1 else f"t{number}"
        extent = data.draw(st.sampled_from([1, 1, 64]))
        steps.append(Step("k", (*sources, result), WRITES, extent, cost=data.draw(st.sampled_from([0.0, 1e-6, 1e-3]))))
        values.append(result)
    sizes = {name: data.draw(st.sampled_from([64, 128, 1000])) for name in values if name.startswith("t")}
    made = plan(steps, sizes, threads=data.draw(st.sampled_from([1, 2, 4])))
    for workers in (2, 3, 4):
        for one, two in _orders(list(made.steps), workers):
            first, second = made.steps[one], made.steps[two]
            for (a, wa), (b, wb) in itertools.product(
                zip(first.places, first.step.writes), zip(second.places, second.step.writes)
            ):
                assert not ((wa or wb) and a.slot == b.slot and a.offset < b.end and b.offset < a.end)
