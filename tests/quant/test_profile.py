"""The profile's file: what is written is read again, and what is no profile of the model is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from quant_nets import batches, chain

import nestc
from nestc.quant.prepare import prepare
from nestc.quant.profile import Nonfinite, Profile
from nestc.quantization import quantize


@pytest.fixture(scope="module")
def profile() -> Profile:
    return nestc.calibrate(chain(), batches(2), "percentile:99.9")


def test_a_saved_profile_is_read_again(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    kept = Profile(profile.model_hash, profile.method, 8, profile.tensors, (Nonfinite("log", "l", 1, 2),))
    kept.save(path)
    again = Profile.load(path, prepare(chain()).hash)
    assert (again.method, again.samples, again.nonfinite) == ("percentile:99.9", 8, (Nonfinite("log", "l", 1, 2),))
    assert list(again.tensors) == list(profile.tensors)
    for name, stats in profile.tensors.items():
        read = again.tensors[name]
        assert (read.min, read.max, read.count, read.channel_axis) == (
            stats.min, stats.max, stats.count, stats.channel_axis,
        )  # fmt: skip
        np.testing.assert_array_equal(read.channel_max, stats.channel_max)
        np.testing.assert_array_equal(read.histogram.counts, stats.histogram.counts)
        assert (read.histogram.width, read.histogram.first) == (stats.histogram.width, stats.histogram.first)
    assert [each.name for each in tmp_path.iterdir()] == ["profile.json"]


def test_the_file_can_be_read_by_people(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["kind"] == "nestc profile" and content["version"] == 1 and content["samples"] == 8
    first = content["tensors"]["x"]
    assert first["percentiles"]["50.0"] == pytest.approx(0, abs=0.1) and len(first["channel_min"]) == 3


def test_a_profile_of_another_model_is_refused(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.json")
    with pytest.raises(nestc.ModelError, match="was made of another model") as caught:
        Profile.load(tmp_path / "p.json", prepare(chain(seed=5)).hash)
    assert "p.json" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(nestc.ModelError, match="was made of another model"):
        quantize(chain(seed=5), profile)
    with pytest.raises(nestc.ModelError, match="has no tensor 'z'"):
        profile.stats("z")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "", "not JSON"),
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[1, 2]", "is not a profile"),
        (lambda text: '{"kind": "something"}', "is not a profile"),
        (lambda text: text.replace('"version": 1', '"version": 99'), "has version 99, this nestc reads 1"),
        (lambda text: text.replace('"samples"', '"sampels"'), "is damaged"),
        (lambda text: text.replace('"width": ', '"width": -'), "is damaged"),
        (lambda text: text.replace('"percentile:99.9"', '"guess"'), "unknown method 'guess'"),
        (lambda text: text.replace('"min": ', '"min": 1e9, "low": '), "is damaged"),
    ],
)
def test_files_that_are_no_profile(profile: Profile, tmp_path: Path, change, said: str) -> None:
    path = tmp_path / "p.json"
    profile.save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(nestc.ModelError, match=said) as caught:
        Profile.load(path)
    assert "p.json" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_or_written(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(nestc.ModelError, match="cannot read the profile"):
        Profile.load(tmp_path / "none.json")
    with pytest.raises(nestc.Error, match="cannot write the profile"):
        profile.save(tmp_path / "no" / "p.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(nestc.Error, match="cannot write the profile"):
        profile.save(tmp_path / "folder")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]
