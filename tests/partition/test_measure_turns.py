"""The meter: programs that are compared take turns, after as much other data as a network has beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest
from partition_fakes import (
    CHAIN,
    NEG,
    US,
    Scripted,
    meter,
    models,
)

from nestc.partition.costs import Chain
from nestc.partition.repeat import Effort, together
from nestc.targets.api import Machine


def test_programs_take_turns() -> None:
    order: list[str] = []

    def program(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return seconds

        return run

    found = together([program("a", 2.0), program("b", US), program("c", 3.0)], Effort(runs=3, seconds=0.0))
    assert [(each.seconds, each.spread, each.runs) for each in found] == [(2.0, 0.0, 3), (US, 0.0, 3), (3.0, 0.0, 3)]
    # Every first block begins with a run that does not count, and so does each of a program that caches help.
    assert "".join(order) == "aabbcc" + "bbca" + "cabb"
    assert together([], Effort()) == []


def test_devices_are_measured_side_by_side(tmp_path: Path) -> None:
    targets = [Scripted({"Neg": 2 * US}, name="one"), Scripted({"Neg": 3 * US}, name="two", ops="Neg")]
    targets[1].machine = Machine("two", (), ("float32",))
    measured = meter(tmp_path)
    known = measured.region(targets[0], NEG, models(NEG))
    found = measured.regions(targets, NEG, models(NEG))
    assert {name: entry.seconds for name, entry in found.items()} == {"one": 2 * US, "two": 3 * US}
    assert found["one"] == known and targets[0]._compiled == [("Neg",)]
    chains = measured.chains([(targets[0], CHAIN), (targets[1], CHAIN[1:]), (targets[1], CHAIN[1:2])], models(*CHAIN))
    assert [sum(entry.seconds for entry in chain.values()) for chain in chains] == pytest.approx(
        [8 / 3 * US, 8 / 3 * US, 3 * US]
    )
    assert measured.chain(targets[0], CHAIN, models(*CHAIN)) == chains[0]
    assert sum(len(ops) > 1 for target in targets for ops in target._compiled) == 2


def test_the_rest_of_a_network_goes_through_the_caches_before_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[int] = []
    monkeypatch.setattr("nestc.partition.measure.evict", touched.append)
    target = Scripted({"Neg": iter([US, *[2 * US] * 6, *[3 * US] * 99])})
    measured = meter(tmp_path)
    alone = measured.region(target, NEG, models(NEG), network=100_000)
    assert (alone.seconds, set(touched)) == (2 * US, {0})
    touched.clear()
    beside = measured.region(target, NEG, models(NEG), network=3 << 20)  # another measurement
    assert (beside.seconds, set(touched)) == (3 * US, {2 << 20})
    touched.clear()
    again = meter(tmp_path)  # from the store: a network of about the same size is the same measurement
    assert again.region(target, NEG, models(NEG), network=(4 << 20) - 1).seconds == 3 * US
    assert again.region(target, NEG, models(NEG)).seconds == 2 * US
    assert touched == []
    measured.chain(target, CHAIN, models(*CHAIN), network=5 << 20)
    measured.launch(target, network=40 << 20)
    assert set(touched) == {4 << 20, 16 << 20}


def test_a_simulator_has_no_caches_to_be_evicted(tmp_path: Path) -> None:
    target = Scripted(timing={"seconds": 1e-3}, facts={"times_and_energies": "modelled"})
    measured = meter(tmp_path)
    found = [measured.region(target, NEG, models(NEG), network) for network in (0, 1 << 20, 1 << 30)]
    assert found[0] == found[1] == found[2] and target._compiled == [("Neg",)]


def test_partitions_of_several_plans_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def told(name: str) -> Iterator[float]:
        while True:
            order.append(name)
            yield {"n": 2 * US, "r": 4 * US}[name]

    target = Scripted({"Neg": told("n"), "Relu": told("r"), "Abs": US})
    chains = [Chain(target, CHAIN[:1], models(*CHAIN), 0), Chain(target, CHAIN[1:], models(*CHAIN), 0)]
    measured = meter(tmp_path)
    found = measured.compare(chains)
    assert [each.seconds for each in found] == pytest.approx([4 * US, 2 * US])
    turns = "".join(order)
    assert "rn" in turns and "nr" in turns
    assert [each.seconds for each in measured.chain(target, CHAIN[:1], models(*CHAIN)).values()] == [4 * US]
    order.clear()
    assert meter(tmp_path).compare(chains) == [replace(each, at=ANY, version=ANY) for each in found]  # from the store
    assert order == []
    meter(tmp_path).compare(chains[:1])  # beside others it is another measurement
    assert order


def test_of_several_rounds_the_fastest_counts() -> None:
    def program(times: Sequence[float]) -> Callable[[], float]:
        left = iter(times)
        return lambda: next(left)

    # Each round begins with a run that warms up.
    times = [9.0, 5.0, 5.0, 5.0, 9.0, 3.0, 3.0, 3.0, 9.0, 4.0, 4.0, 4.0]
    (found,) = together([program(times)], Effort(runs=3, seconds=0.0, rounds=3))
    assert (found.seconds, found.runs) == (3.0, 3)
