"""Targets are found through entry points and made from text; every mistake in the text gets a sentence."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import types

import pytest

import nestc
from nestc.errors import TargetError
from nestc.targets import make, resolve


class Adjustable:
    """A target with options of every kind."""

    def __init__(
        self, size: int = 1, scale: float = 1.0, fast: bool = False, model: str = "a", most: int | None = None
    ):
        self.name = "adjustable"
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


def test_a_target_cannot_be_given_twice(adjustable: None) -> None:
    with pytest.raises(TargetError, match="given twice"):
        resolve(["adjustable", "adjustable:size=2"])


def test_objects_pass_through() -> None:
    @dataclasses.dataclass
    class Mine:
        name: str = "mine"

    mine = Mine()
    assert resolve([mine]) == (mine,)
