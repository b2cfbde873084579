"""The search: what it measures in which order, what it believes, and what it keeps when its time is up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from nestc.errors import TargetError
from nestc.kernels.families import alternatives
from nestc.targets.api import Partition
from nestc.targets.cpu.target import CpuTarget
from nestc.tune import measure, run
from nestc.tune.key import code_version, machine_key, region_key
from nestc.tune.run import Report, as_json, exported, network_tasks, tune
from nestc.tune.search import AT_ONCE, Found, search, unknown
from nestc.tune.store import ChoiceStore
from nestc.tune.task import Drawn, Kept, Task

Parts = Callable[[Path, CpuTarget], Sequence[Partition]]


@pytest.fixture
def target() -> CpuTarget:
    return CpuTarget(threads=1)


@pytest.fixture
def task(net: Path, partitions: Parts, target: CpuTarget) -> Task:
    """The convolution of the network."""
    tasks, _ = network_tasks(target, partitions(net, target))
    return next(task for task in tasks if task.region.anchor == "Conv")


class Fake:
    """A machine on which ways take the seconds that `seconds` says, else 1; and that remembers what it ran."""

    def __init__(self, seconds: Mapping[str, float], noise: Callable[[str, int], float] | None = None) -> None:
        self.seconds = seconds
        self.noise = noise or (lambda name, round: 1.0)
        self.calls: list[list[str]] = []

    def __call__(self, task: Task, names: Sequence[str], rounds: int) -> dict[str, list[float]]:
        self.calls.append(list(names))
        number = len(self.calls)
        return {
            name: [self.seconds.get(name, 1.0) * self.noise(name, number) * (1 + 0.5 * r) for r in range(rounds)]
            for name in names
            if self.seconds.get(name) != 0
        }


def names_of(task: Task, target: CpuTarget) -> list[str]:
    return [way.name for way in alternatives(task.region, target.cpu, task.exact)]


def test_all_algorithms_are_measured_and_the_winner_is_confirmed(task: Task, target: CpuTarget) -> None:
    names = names_of(task, target)
    wanted = next(name for name in names[1:] if name.startswith("winograd") and "_" not in name)
    fake = Fake({wanted: 0.5})
    found = search(task, lambda: 1, fake)
    assert found.key == region_key(task.region) and found.done
    assert {name for name in names if "_" not in name} <= set(found.times)
    assert next(iter(found.times)) == names[0]
    assert all(call[0] == names[0] and len(call) <= AT_ONCE + 1 for call in fake.calls)
    assert fake.calls[-1] == [names[0], wanted]
    assert found.times[wanted] == pytest.approx(0.5 * found.times[names[0]])


def test_parameters_are_searched_around_the_best(task: Task, target: CpuTarget) -> None:
    tile = next(name for name in names_of(task, target) if name.startswith("conv_") and "x" in name)
    found = search(task, lambda: 1, Fake({"conv": 0.6, tile: 0.5, f"{tile}_r1": 0.4, f"{tile}_r2": 0.4}))
    assert any(name.startswith(f"{tile}_r") for name in found.times)
    assert found.done and not unknown(task, target.cpu, found.times)


def test_slow_algorithms_are_not_refined(task: Task, target: CpuTarget) -> None:
    found = search(task, lambda: 1, Fake({"conv": 5.0}))
    assert found.done and not any(name.startswith("conv_") for name in found.times)


def test_luck_is_not_believed(task: Task, target: CpuTarget) -> None:
    names = names_of(task, target)
    lucky = next(name for name in names[1:] if "_" not in name)
    fake = Fake({}, noise=lambda name, call: 0.5 if name == lucky and call == 1 else 1.0)
    found = search(task, lambda: 1, fake)
    assert found.times[lucky] == pytest.approx(found.times[names[0]])


def test_a_gain_within_the_spread_is_not_believed(task: Task, target: CpuTarget) -> None:
    names = names_of(task, target)
    noisy = next(name for name in names[1:] if "_" not in name)

    def time_ways(task: Task, names: Sequence[str], rounds: int) -> dict[str, list[float]]:
        runs = {name: [1.0] * rounds for name in names}
        if noisy in runs:
            runs[noisy] = [0.9, 0.9, 1.3] * (rounds // 3) + [0.9] * (rounds % 3)
        return runs

    found = search(task, lambda: 1, time_ways)
    assert found.times[noisy] == pytest.approx(found.times[names[0]])


def test_a_way_that_does_not_compile_is_left_out(task: Task, target: CpuTarget) -> None:
    broken = next(name for name in names_of(task, target)[1:] if "_" not in name)
    found = search(task, lambda: 1, Fake({broken: 0, "conv": 0.9}))
    assert found.done and broken not in found.times and len(found.times) > 3


def test_what_is_known_is_kept_when_the_time_is_up(task: Task, target: CpuTarget) -> None:
    assert search(task, lambda: 0, Fake({})) == Found(task.key, {}, done=False)
    left = iter([1.0, -1.0])
    names = names_of(task, target)
    found = search(task, lambda: next(left), Fake({names[1]: 0.5}))
    assert not found.done and found.times[names[1]] == pytest.approx(0.5 * found.times[names[0]])


def test_tasks_hold_what_a_measurement_needs(net: Path, partitions: Parts, target: CpuTarget) -> None:
    tasks, total = network_tasks(target, partitions(net, target))
    assert [task.weight for task in tasks] == sorted((task.weight for task in tasks), reverse=True)
    assert 0 < sum(task.weight for task in tasks) <= total
    convolution = next(task for task in tasks if task.region.anchor == "Conv")
    assert convolution.count == 2
    assert (convolution.machine, convolution.code) == (machine_key(target.cpu), code_version())
    assert {layout.block for layout in convolution.borders.values()} == {target.cpu.lanes("float32")}
    (weights,) = convolution.region.constants.values()
    assert isinstance(weights, Drawn) and weights().shape == (16, 16, 3, 3)
    np.testing.assert_array_equal(weights(), weights())
    assert Kept(np.arange(3))().tolist() == [0, 1, 2]


def test_ways_are_timed_as_programs(task: Task, target: CpuTarget) -> None:
    names = names_of(task, target)[:3]
    times = measure.time_ways(task, [*names, "conv_2x2_r1", "winograd99"], 5)
    assert set(times) == {*names, "conv_2x2_r1"}
    assert all(len(runs) >= measure.LOOK and min(runs) > 0 for runs in times.values())
    assert len(times[names[0]]) == 5


def test_another_machine_measures_nothing(task: Task) -> None:
    import dataclasses

    for other in (dataclasses.replace(task, machine="another"), dataclasses.replace(task, code="another")):
        with pytest.raises(TargetError, match="cannot measure for"):
            measure.time_ways(other, ["conv"], 1)


def test_a_program_of_one_region_computes_what_the_region_does(task: Task, target: CpuTarget) -> None:
    from nestc.kernels.api import PLAIN, from_layout, to_layout

    outputs = []
    region = task.region
    x, y = region.inputs[0], region.outputs[0]
    array = np.random.default_rng(1).standard_normal(region.types[x].shape, np.float32)
    for borders in (task.borders, {}):  # with conversions at both ends, where the borders are plain
        for way in alternatives(region, target.cpu)[:3]:
            program = target.open().load(target.compile_alone(region, way, borders), 1)
            (result,), _ = program([to_layout(array, borders.get(x, PLAIN))], [None])
            outputs.append(from_layout(result, region.types[y], borders.get(y, PLAIN)))
            program.close()
    for output in outputs:
        np.testing.assert_allclose(output, outputs[0], rtol=0, atol=1e-4 * float(np.abs(outputs[0]).max()))


def test_tuning_goes_on_where_it_stopped(
    net: Path, partitions: Parts, target: CpuTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def half(tasks: Sequence[Task], seconds: float):
        asked.extend(task.region.name for task in tasks)
        for task in tasks[:1]:
            yield search(task, lambda: 1, Fake({names_of(task, target)[-1]: 0.5}))

    first = tune(target, partitions(net, target), 60, runner=half)
    assert len(asked) == len(first.rows) == 2 and len(first.left) == 1
    assert first.predicted_seconds < first.default_seconds == first.network_seconds
    target = CpuTarget(threads=1)  # which knows what the first tuning has found
    second = tune(target, partitions(net, target), 60, runner=half)
    assert asked[2:] == list(first.left) and second.left == ()
    assert second.predicted_seconds < second.network_seconds < second.default_seconds
    third = tune(target, partitions(net, target), 60, runner=half)
    assert len(asked) == 3 and third.left == ()
    tune(target, partitions(net, target), 60, runner=half, again=True)
    assert len(asked) == 5


def test_reports_as_data_and_as_defaults(net: Path, partitions: Parts, target: CpuTarget, tmp_path: Path) -> None:
    def all_at_once(tasks: Sequence[Task], seconds: float):
        for task in tasks:
            yield search(task, lambda: 1, Fake({names_of(task, target)[0]: 2.0}))

    report: Report = tune(target, partitions(net, target), 60, runner=all_at_once)
    told = as_json(report)
    assert told["threads"] == 1 and told["left"] == []
    regions = told["regions"]
    assert isinstance(regions, list) and {row["count"] for row in regions} == {1, 2}
    for row in regions:
        assert row["default"] != row["best"] and row["best_ms"] < row["default_ms"]
        assert row["ways_ms"][row["best"]] == row["best_ms"]
    assert exported(report, target, tmp_path / "defaults.json") == 2
    assert any(row["shape"] == "1x16x20x20 * 16x16x3x3" for row in regions)


def test_no_time_measures_nothing(net: Path, partitions: Parts, target: CpuTarget) -> None:
    assert list(run.one_by_one(network_tasks(target, partitions(net, target))[0], 0.0)) == []
    report = tune(target, partitions(net, target), 0.001)
    assert len(report.left) == 2 and report.predicted_seconds == report.default_seconds
    assert ChoiceStore().own(target.cpu, 1) == {}
