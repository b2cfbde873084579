"""Targets are found through entry points and made from text; every mistake in the text gets a sentence."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import types

import pytest

import nestc
from nestc.errors import TargetError
from nestc.targets import make, resolve
from nestc.targets.api import Machine


class Adjustable:
    """A target with options of every kind."""

    def __init__(
        self, size: int = 1, scale: float = 1.0, fast: bool = False, model: str = "a", most: int | None = None
    ):
        self.name = "adjustable"
        self.machine = Machine("adjustable", (), ())
        self.given = (size, scale, fast, model, most)


@pytest.fixture
def adjustable(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed target `adjustable`, beside one whose package does not load."""
    entries = [
        types.SimpleNamespace(name="adjustable", load=lambda: Adjustable),
        importlib.metadata.EntryPoint("broken", "no_such_package:Target", "nestc.targets"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)


def test_targets_are_listed_through_the_package() -> None:
    assert {"cpu", "host"} <= set(nestc.targets())


def test_options_are_read_by_the_kinds_of_the_constructor(adjustable: None) -> None:
    target = make("adjustable:size=3,scale=2.5,fast=yes,model=b,most=7")
    assert target.given == (3, 2.5, True, "b", 7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ajustable", "did you mean 'adjustable'"),
        ("adjustable:sise=1", "did you mean 'size'"),
        ("adjustable:size", "adjustable:size=VALUE"),
        ("adjustable:size=big", "a number (int), not 'big'"),
        ("adjustable:big", "a number (int), not 'big'"),
        ("adjustable:1,big", "adjustable:big=VALUE"),
        ("adjustable:1,size=2", "option 'size' of target 'adjustable' is given twice"),
        ("adjustable:fast=perhaps", "true or false, not 'perhaps'"),
        ("broken", "does not load"),
    ],
)
def test_mistakes_are_explained(adjustable: None, text: str, said: str) -> None:
    with pytest.raises(TargetError) as caught:
        make(text)
    assert said in str(caught.value)


def test_a_target_that_does_not_load_is_not_listed(adjustable: None) -> None:
    assert list(nestc.targets()) == ["adjustable"]


def test_a_first_word_is_the_first_option(adjustable: None) -> None:
    assert make("adjustable:3,fast=yes").given == (3, 1.0, True, "a", None)


def test_a_second_device_of_a_kind_gets_a_name_of_its_own(adjustable: None) -> None:
    made = resolve(["adjustable", "adjustable:size=2", "adjustable"])
    assert [(target.name, target.given[0]) for target in made] == [
        ("adjustable", 1),
        ("adjustable_2", 2),
        ("adjustable_3", 1),
    ]


def test_a_name_that_is_taken_is_left_to_its_owner(adjustable: None) -> None:
    own = Adjustable()
    own.name = "adjustable_2"
    assert [target.name for target in resolve(["adjustable", own, "adjustable"])] == [
        "adjustable",
        "adjustable_2",
        "adjustable_3",
    ]


def test_an_object_keeps_its_name_where_a_copy_gets_another() -> None:
    first, second = Adjustable(), Adjustable(size=2)
    made = resolve([first, second])
    assert [target.name for target in made] == ["adjustable", "adjustable_2"]
    assert (first.name, second.name) == ("adjustable", "adjustable")


def test_the_same_object_cannot_be_given_twice() -> None:
    target = Adjustable()
    with pytest.raises(TargetError, match="given twice, as the same object"):
        resolve([target, target])


@pytest.mark.parametrize("texts", [("cpu", "cpu:avx2"), ("host", "host"), ("onnxruntime", "onnxruntime:cpu")])
def test_one_processor_cannot_be_given_twice(texts: tuple[str, str]) -> None:
    with pytest.raises(
        TargetError, match=f"target '{texts[1].partition(':')[0]}' is given twice, but there is one cpu"
    ):
        resolve(texts)


def test_two_accelerators_are_two_devices() -> None:
    made = resolve(["vta", "vta:count=2", "aim", "aim:channels=8", "cpu"])
    assert [target.name for target in made] == ["vta", "vta_2", "aim", "aim_2", "cpu"]
    assert [target.machine.resource for target in made] == ["", "", "", "", "cpu"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu:watts=-1", "option 'watts' of target cpu is -1.0; it must be 0 or more"),
        ("vta:launch_us=nan", "option 'launch_us' of target vta is nan; it must be 0 or more"),
        ("vta:link_mb_s=0", "option 'link_mb_s' of target vta is 0.0; it must be above 0"),
        ("aim:launch_us=inf", "option 'launch_us' of target aim is inf; it must be 0 or more"),
    ],
)
def test_figures_of_borders_and_power_are_checked(text: str, said: str) -> None:
    with pytest.raises(TargetError) as caught:
        make(text)
    assert said in str(caught.value)


def test_borders_are_assumed_and_say_so() -> None:
    vta, slow, aim = (
        make("vta").machine.link,
        make("vta:launch_us=80,link_mb_s=100").machine.link,
        make("aim").machine.link,
    )
    assert (vta.launch_seconds, vta.bytes_per_second) == pytest.approx((50e-6, 800e6))
    assert (slow.launch_seconds, slow.bytes_per_second) == pytest.approx((80e-6, 100e6))
    assert (aim.launch_seconds, aim.bytes_per_second) == pytest.approx((1e-6, 0.0))
    assert {vta.kind, slow.kind, aim.kind} == {"estimated"}


def test_power_is_by_the_thread_unless_given() -> None:
    assert make("cpu:threads=3").machine.watts == 30.0
    assert make("cpu", {"threads": 2}).machine.watts == 20.0
    assert make("cpu:threads=3,watts=45").machine.watts == 45.0
    assert make("host").machine.watts == 10.0


def test_objects_pass_through() -> None:
    @dataclasses.dataclass
    class Mine:
        name: str = "mine"

    mine = Mine()
    assert resolve([mine]) == (mine,)
