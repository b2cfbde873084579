"""The meter: how often it runs a region, what it makes of the times, and what it does where nothing can be timed."""

from __future__ import annotations

from pathlib import Path

import pytest
from partition_fakes import (
    NEG,
    US,
    Scripted,
    measure,
    meter,
    models,
    unary,
)

from nestc.errors import TargetError, UnsupportedOp
from nestc.partition.measure import Meter
from nestc.partition.repeat import LEAST_SECONDS, Effort
from nestc.partition.store import ProfileStore


def test_the_median_of_runs_after_two_that_warm_up(tmp_path: Path) -> None:
    times = iter([9e-3, 8e-3, 5 * US, 1 * US, 3 * US, 4 * US, 2 * US, *[3 * US] * 100])
    target = Scripted({"Neg": times}, watts=20.0)
    told: list[str] = []
    found = meter(tmp_path, progress=told.append).region(target, NEG, models(NEG))
    # The first try has a spread of 2 of 3 us, so it is measured again, this time without.
    assert (found.seconds, found.spread, found.runs, found.kind) == (3 * US, 0.0, 5, "measured")
    assert (found.joules, found.energy_kind, found.bytes) == (pytest.approx(60 * US), "estimated", 40)
    assert told == [f"measure {NEG.name} on fake"]
    assert (target._runs, target._closed) == (13, 1)


def test_the_steadiest_of_three_tries_is_kept(tmp_path: Path) -> None:
    spreads = (4.0, 1.5, 2.0)
    times = [each * US for s in spreads for each in (5, 5 - s / 2, 5 - s / 2, 5, 5 + s / 2, 5 + s / 2)]
    target = Scripted({"Neg": iter([5 * US, *times])})
    found = measure(tmp_path, target, NEG)
    assert found.seconds == 5 * US
    assert found.spread == pytest.approx(1.5 * US)
    steadier = Scripted({"Neg": iter([each * US for each in (5, 5, 4.5, 4.5, 5, 5.5, 5.5)])})
    assert measure(tmp_path / "other", steadier, NEG).spread == pytest.approx(US)
    assert steadier._runs == 7


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    target = Scripted()
    first = meter(tmp_path)
    found = first.region(target, NEG, models(NEG))
    renamed = unary("Neg", "p", "q")
    assert first.region(target, renamed, models(renamed)) == found
    assert len(target._compiled) == 1
    later = Scripted()
    again = measure(tmp_path, later, renamed)
    assert (again.seconds, again.runs) == (found.seconds, found.runs) and again.at
    assert later._compiled == []
    assert measure(tmp_path, later, unary("Abs", "x", "y")).seconds == US
    assert later._compiled == [("Abs",)]
    second = Scripted(name="fake_2")
    second.machine = later.machine
    assert measure(tmp_path, second, NEG).at and second._compiled == []  # a second device of one kind


def test_a_device_that_refuses_does_not_hinder_others(tmp_path: Path) -> None:
    refusing = Scripted(name="one", faults={"run": TargetError("out of memory")}, facts={"another": True})
    modelled = Scripted(name="three", timing={"seconds": 1e-3}, facts={"a third": True})
    targets = [refusing, Scripted(name="two"), modelled]
    found = meter(tmp_path).regions(targets, NEG, models(NEG))
    assert [entry.refusal for entry in found.values()] == ["out of memory", None, None]
    assert [entry.kind for entry in found.values()][1:] == ["measured", "modelled"]
    assert [target._closed for target in targets] == [1, 1, 0]


def test_a_time_that_the_clock_does_not_see_is_not_zero(tmp_path: Path) -> None:
    assert measure(tmp_path, Scripted({"Neg": 0.0}), NEG).seconds == LEAST_SECONDS


def test_a_run_that_takes_long_is_the_only_one(tmp_path: Path) -> None:
    target = Scripted({"Neg": 3.0})
    slow = Meter(ProfileStore(tmp_path / "profiles.sqlite"), effort=Effort(runs=5, seconds=0.0, longest=0.0))
    found = slow.region(target, NEG, models(NEG))
    assert (found.seconds, found.runs, target._runs) == (3.0, 1, 1)


@pytest.mark.parametrize("when", ["compile", "load", "run"])
@pytest.mark.parametrize("error", [TargetError("it has no such thing"), UnsupportedOp("it has no such thing")])
def test_refusals_are_kept_with_their_words(tmp_path: Path, when: str, error: Exception) -> None:
    target = Scripted(faults={when: error}, cost=lambda region: 1.0)
    found = measure(tmp_path, target, NEG)
    assert found.refusal == "it has no such thing"
    assert found.kind != "estimated"
    later = Scripted()
    assert measure(tmp_path, later, NEG).refusal == "it has no such thing"
    assert later._compiled == []
    assert target._closed == {"compile": 0, "load": 1, "run": 1}[when]


@pytest.mark.parametrize("when", ["open", "load anything"])
def test_a_device_that_is_not_here_is_estimated_and_marked(tmp_path: Path, when: str) -> None:
    target = Scripted(faults={when: TargetError("no card")}, cost=lambda region: 3e-3, watts=2.0)
    found = measure(tmp_path, target, NEG)
    assert (found.seconds, found.kind, found.joules, found.refusal) == (3e-3, "estimated", 6e-3, None)
    assert "not here: no card" in found.note
    # The device may be here next time, so nothing was stored.
    assert measure(tmp_path, Scripted({"Neg": 5 * US}), NEG).seconds == 5 * US


def test_a_device_that_is_not_here_and_says_nothing_is_refused(tmp_path: Path) -> None:
    found = measure(tmp_path, Scripted(faults={"open": TargetError("no card")}), NEG)
    assert found.refusal is not None and "no card" in found.refusal and "no cost" in found.refusal
    assert measure(tmp_path, Scripted({"Neg": 5 * US}), NEG).refusal is None


def test_what_the_compiler_modelled_is_taken_and_nothing_runs(tmp_path: Path) -> None:
    target = Scripted(timing={"seconds": 4e-5, "energy_joules": 3e-9}, watts=50.0)
    found = measure(tmp_path, target, NEG)
    assert (found.seconds, found.kind, found.joules, found.energy_kind) == (4e-5, "modelled", 3e-9, "modelled")
    assert (found.bytes, target._runs) == (40, 0)
    assert measure(tmp_path, Scripted(), NEG).kind == "modelled"


def test_a_simulator_runs_once(tmp_path: Path) -> None:
    target = Scripted({"Neg": 4e-5}, kind="modelled")
    found = measure(tmp_path, target, NEG)
    assert (found.seconds, found.kind, target._runs) == (4e-5, "modelled", 1)
