"""Schedules made by hand, with figures worked out by hand; and stages that cannot run, refused in a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nestc.errors import PlanError
from nestc.partition.arrange import arrange
from nestc.partition.evaluate import check, evaluate, pipelined
from nestc.partition.heft import heft
from nestc.partition.problem import HOST, Cost, Crossing, Edge, Problem, Stage, Task, Unit

CPU, NPU, LIB = Unit("cpu", "cpu", launch=1.0), Unit("npu", "npu", launch=2.0, memory_bytes=8), Unit("lib", "cpu")

# a feeds b and c, which meet in d; the tensor of a is sent once and received by each stage that takes it.
A_OUT = {
    ("cpu", "npu"): Crossing(out_seconds=0.5, wire_seconds=0.25, in_seconds=0.125, joules=7.0),
    ("cpu", "lib"): Crossing(out_seconds=0.25, in_seconds=1.0, joules=3.0),
}
BACK = {("npu", "cpu"): Crossing(0.5, 1.0, 0.25, 2.0), ("lib", "cpu"): Crossing(0.0, 0.0, 0.5, 1.0)}
DIAMOND = Problem(
    (CPU, NPU, LIB),
    (
        Task("a", {"cpu": Cost(4.0, 10.0)}),
        Task("b", {"cpu": Cost(6.0, 20.0), "npu": Cost(3.0, 5.0, bytes=6), "lib": Cost(5.0, 18.0)}),
        Task("c", {"cpu": Cost(8.0, 30.0), "npu": Cost(5.0, 6.0, bytes=6), "lib": Cost(7.0, 28.0)}),
        Task("d", {"cpu": Cost(2.0, 1.0)}),
    ),
    (
        Edge("input", None, "a", 4, {(HOST, "cpu"): Crossing(in_seconds=0.5, joules=0.5)}),
        Edge("x", "a", "b", 4, A_OUT, {"cpu": 0.75}),
        Edge("x", "a", "c", 4, A_OUT),
        Edge("y", "b", "d", 4, BACK),
        Edge("z", "c", "d", 4, BACK, {"cpu": 0.25}),
        Edge("out", "d", None, 4, {("cpu", HOST): Crossing(out_seconds=0.5, wire_seconds=3.0, joules=0.25)}),
    ),
)


def times(problem: Problem, stages: list[Stage]) -> list[tuple[float, float]]:
    return [(timed.begin, timed.end) for timed in evaluate(problem, stages).times]


def test_one_stage_is_launched_once_and_makes_its_gains():
    found = evaluate(DIAMOND, [Stage("cpu", ("a", "b", "c", "d"))])
    # launch 1, input 0.5, work 4 + 6 + 8 + 2, gains 0.75 + 0.25, output 0.5; then 3 on the way to the host
    assert found.times[0].end == 21.0
    assert found.latency == 24.0
    assert found.busy == {"cpu": 21.0, "npu": 0.0}
    assert found.period == 21.0
    assert found.joules == 10 + 20 + 30 + 1 + 0.5 + 0.25


def test_graph_inputs_arrive_after_their_way():
    way = {(HOST, "cpu"): Crossing(in_seconds=0.5, wire_seconds=9.0)}
    late = replace(DIAMOND, edges=(replace(DIAMOND.edges[0], crossings=way), *DIAMOND.edges[1:]))
    stages = [Stage("cpu", ("a", "b", "c", "d"))]
    assert times(late, stages) == [(9.0, 30.0)]
    assert evaluate(late, stages).latency == 33.0 and evaluate(late, stages).period == 21.0
    # The second request's input is on its way while the first is computed.
    found = pipelined(late, stages, requests=2, in_flight=2)
    assert [(each.begin, each.end) for each in found.times] == [(9.0, 30.0), (30.0, 51.0)]
    found = pipelined(late, stages, requests=2, in_flight=1)
    assert [(each.begin, each.end) for each in found.times] == [(9.0, 30.0), (42.0, 63.0)]


def test_what_fills_a_memory_fits():
    stages = [Stage("cpu", ("a",)), Stage("npu", ("b", "c")), Stage("cpu", ("d",))]
    check(replace(DIAMOND, units=(CPU, replace(NPU, memory_bytes=12), LIB)), stages)


def test_branches_run_beside_each_other():
    stages = [Stage("cpu", ("a",)), Stage("npu", ("c",)), Stage("cpu", ("b", "d"))]
    # c: after a and the way; the second stage of the cpu waits for c to come back
    assert times(DIAMOND, stages) == [(0.0, 6.0), (6.25, 13.875), (14.875, 24.625)]
    found = evaluate(DIAMOND, stages)
    assert found.latency == 24.625 + 3.0
    assert found.busy == {"cpu": 15.75, "npu": 7.625}
    assert found.joules == (10 + 20 + 6 + 1) + 7 + 2 + 0.5 + 0.25


def test_stages_of_one_resource_wait_for_each_other():
    stages = [Stage("cpu", ("a",)), Stage("lib", ("b", "c")), Stage("cpu", ("d",))]
    # the tensor of a: sent once (0.25), received once (1.0); two tensors come back (0.5 each)
    assert times(DIAMOND, stages) == [(0.0, 5.75), (5.75, 18.75), (18.75, 23.25)]
    assert evaluate(DIAMOND, stages).joules == 10 + 18 + 28 + 1 + 3 + 1 + 1 + 0.5 + 0.25


def test_a_tensor_is_sent_once_at_the_cost_of_its_dearest_way():
    stages = [Stage("cpu", ("a",)), Stage("npu", ("c",)), Stage("lib", ("b",)), Stage("cpu", ("d",))]
    # out: the larger of 0.5 and 0.25
    assert times(DIAMOND, stages)[0] == (0.0, 6.0)
    assert times(DIAMOND, stages)[2] == (6.0, 12.0)
    separate = [Stage("cpu", ("a",)), Stage("lib", ("b",)), Stage("lib", ("c",)), Stage("cpu", ("d",))]
    assert times(DIAMOND, separate) == [(0.0, 5.75), (5.75, 11.75), (11.75, 19.75), (19.75, 24.25)]


def test_without_crossings_two_devices_run_at_once():
    problem = Problem(
        (Unit("p", "p"), Unit("q", "q")),
        tuple(Task(name, {"p": Cost(2.0), "q": Cost(3.0)}) for name in "ab"),
        tuple(Edge(name, name, None) for name in "ab"),
    )
    found = evaluate(problem, [Stage("p", ("a",)), Stage("q", ("b",))])
    assert found.latency == 3.0
    assert found.period == 3.0


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage("gpu", ("a", "b", "c", "d"))], "'gpu', which is not among the units cpu, npu, lib"),
        ([Stage("cpu", ("a", "b", "c", "d", "e"))], "task 'e', which the problem does not have"),
        ([Stage("cpu", ("a", "b", "c"))], "places task 'd' nowhere"),
        ([Stage("cpu", ("a", "b", "c", "d")), Stage("lib", ("b",))], "places task 'b' 2 times"),
        ([Stage("npu", ("a", "b", "c", "d"))], "unit 'npu' does not take task 'a'; place it on one of cpu"),
        ([Stage("cpu", ("b", "a", "c", "d"))], "in stage 1 task 'b' stands before 'a', which it needs"),
        (
            [Stage("cpu", ("b", "c", "d")), Stage("cpu", ("a",))],
            "stage 1 on 'cpu' runs task 'b', which needs 'x' of task 'a'",
        ),
        ([Stage("cpu", ("a", "d")), Stage("lib", ("b", "c"))], "needs 'y' of task 'b' in the later stage 2"),
        ([Stage("cpu", ("a",)), Stage("npu", ("b", "c")), Stage("cpu", ("d",))], "occupy 12 bytes, but it has 8"),
        ([Stage("cpu", ()), Stage("cpu", ("a", "b", "c", "d"))], "a stage on 'cpu' without tasks"),
    ],
)
def test_stages_that_cannot_run_are_refused(stages: list[Stage], message: str):
    with pytest.raises(PlanError, match=message):
        check(DIAMOND, stages)


LINE = Problem(
    (Unit("p", "p"), Unit("q", "q")),
    (Task("a", {"p": Cost(2.0)}), Task("b", {"q": Cost(3.0)}), Task("c", {"p": Cost(1.0)})),
    (
        Edge("x", "a", "b", 4, {("p", "q"): Crossing(wire_seconds=0.5)}),
        Edge("y", "b", "c"),
        Edge("z", "c", None, 4, {("p", HOST): Crossing(wire_seconds=0.25)}),
    ),
)
LINE_STAGES = [Stage("p", ("a",)), Stage("q", ("b",)), Stage("p", ("c",))]


def test_requests_one_by_one_take_their_latency():
    found = pipelined(LINE, LINE_STAGES, requests=4, in_flight=1)
    assert found.period == found.latency == evaluate(LINE, LINE_STAGES).latency == 6.75
    assert found.makespan == 27.0


def test_requests_in_flight_overlap():
    found = pipelined(LINE, LINE_STAGES, requests=2, in_flight=2)
    by_stage = {(timed.request, timed.stage): (timed.begin, timed.end) for timed in found.times}
    assert by_stage == {
        (0, 0): (0.0, 2.0),
        (1, 0): (2.0, 4.0),
        (0, 1): (2.5, 5.5),
        (0, 2): (5.5, 6.5),
        (1, 1): (5.5, 8.5),
        (1, 2): (8.5, 9.5),
    }
    assert found.makespan == 9.75


def test_the_steady_state_is_the_period_of_the_busiest_resource():
    found = pipelined(LINE, LINE_STAGES, requests=40, in_flight=4)
    assert found.period == pytest.approx(evaluate(LINE, LINE_STAGES).period)
    assert found.busy == {"p": 3.0, "q": 3.0}


def test_a_pipeline_needs_a_request():
    with pytest.raises(ValueError, match="at least one request"):
        pipelined(LINE, LINE_STAGES, requests=0, in_flight=1)


def test_neighbours_are_one_stage_where_nobody_waits_longer():
    found = arrange(DIAMOND, {"a": "cpu", "b": "cpu", "c": "cpu", "d": "cpu"})
    assert found == (Stage("cpu", ("a", "b", "c", "d")),)
    # c on the npu runs beside b only if a's results do not wait for b: three stages of the cpu
    beside = arrange(DIAMOND, {"a": "cpu", "b": "cpu", "c": "npu", "d": "cpu"})
    least = evaluate(DIAMOND, beside).latency
    assert least == min(
        evaluate(DIAMOND, stages).latency
        for stages in (
            [Stage("cpu", ("a",)), Stage("npu", ("c",)), Stage("cpu", ("b",)), Stage("cpu", ("d",))],
            [Stage("cpu", ("a",)), Stage("npu", ("c",)), Stage("cpu", ("b", "d"))],
            [Stage("cpu", ("a", "b")), Stage("npu", ("c",)), Stage("cpu", ("d",))],
        )
    )


def test_an_assignment_must_name_units_that_take_the_tasks():
    with pytest.raises(PlanError, match="unit 'npu' does not take task 'a'; place it on one of cpu"):
        arrange(DIAMOND, {"a": "npu", "b": "cpu", "c": "cpu", "d": "cpu"})
    with pytest.raises(PlanError, match="says nothing of task 'd'"):
        arrange(DIAMOND, {"a": "cpu", "b": "cpu", "c": "cpu"})


def test_heft_keeps_memories():
    units = heft(DIAMOND)
    assert units["a"] == units["d"] == "cpu"
    assert [units["b"], units["c"]].count("npu") <= 1
