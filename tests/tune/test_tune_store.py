"""What is known of ways is kept between processes, chosen by a margin, and never the reason that a compilation fails."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from nestc.errors import Error
from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.families import alternatives
from nestc.partition.fingerprint import device_fingerprint
from nestc.targets.api import Partition
from nestc.targets.cpu.machine import machine
from nestc.targets.cpu.target import CpuTarget
from nestc.tune import store as stores
from nestc.tune.key import machine_key, region_key
from nestc.tune.store import ChoiceStore, Tuned, export, fastest

HOST = machine("native")
Parts = Callable[[Path, CpuTarget], Sequence[Partition]]


def convolution(name: str = "a", channels: int = 16, shift: float = 0.0, relu: bool = True) -> Region:
    """A 3x3 convolution; values are called after `name` and weights are `shift`."""
    x, w, y, z = (f"{name}{letter}" for letter in "xwyz")
    types = {
        x: TensorType("float32", (1, channels, 8, 8)),
        w: TensorType("float32", (16, channels, 3, 3)),
        y: TensorType("float32", (1, 16, 8, 8)),
        z: TensorType("float32", (1, 16, 8, 8)),
    }
    ops = (Op("Conv", (x, w), (y,), {"pads": (1, 1, 1, 1)}, name=name), Op("Relu", (y,), (z,), name=f"{name}r"))
    weights = np.full(types[w].shape, shift, np.float32)
    last = z if relu else y
    return Region(name, "Conv", ops[: 1 + relu], (x,), (last,), types, {w: lambda: weights})


def test_keys_say_what_is_computed_and_no_more() -> None:
    key = region_key(convolution())
    assert key == region_key(convolution("b", shift=1.0))
    assert key != region_key(convolution(channels=32))
    assert key != region_key(convolution(relu=False))


def test_keys_tell_small_integers_apart() -> None:
    def slice_from(start: int) -> Region:
        types = {"x": TensorType("float32", (8,)), "s": TensorType("int64", (1,)), "y": TensorType("float32", (4,))}
        op = Op("Slice", ("x", "s"), ("y",))
        return Region("r", None, (op,), ("x",), ("y",), types, {"s": lambda: np.array([start])})

    assert region_key(slice_from(1)) == region_key(slice_from(1)) != region_key(slice_from(2))


def test_machines_are_told_apart_by_what_kernels_are_chosen_by() -> None:
    assert machine_key(HOST) == machine_key(dataclasses.replace(HOST, features="+x", name="other", l3_bytes=1))
    assert machine_key(HOST) != machine_key(dataclasses.replace(HOST, l2_bytes=1 << 30))
    assert machine_key(machine("avx2")) != machine_key(machine("avx512"))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, 0),
        ({"b": 1.0}, 0),  # nothing to compare it with
        ({"a": 1.0, "b": 0.98}, 0),  # within the noise
        ({"a": 1.0, "b": 0.9, "c": 0.95}, 1),
        ({"a": 1.0, "b": 1.5, "unheard of": 0.1}, 0),
    ],
)
def test_the_default_stays_unless_another_is_clearly_faster(times, expected) -> None:
    assert fastest(["a", "b", "c"], times) == expected


def test_kept_and_merged(tmp_path: Path) -> None:
    store = ChoiceStore(tmp_path / "tuning.sqlite")
    assert store.get("k", HOST, 1) == {} and store.own(HOST, 1) == {}
    store.put("k", HOST, 1, {"conv": 2.0, "conv_6x2": 1.0})
    store.put("k", HOST, 2, {"conv": 5.0})
    store.put("k", HOST, 1, {"conv": 4.0, "winograd4": 3.0})  # the machine is half as fast now
    assert store.get("k", HOST, 1) == {"conv": 4.0, "winograd4": 3.0, "conv_6x2": 2.0}
    assert next(iter(ChoiceStore(store.path).own(HOST, 1)["k"])) == "conv"
    assert store.own(HOST, 2) == {"k": {"conv": 5.0}}
    assert store.own(machine("sse2"), 1) == {}
    store.put("k", HOST, 1, {"other": 1.0})  # the default has changed, so nothing compares
    assert store.get("k", HOST, 1) == {"other": 1.0}


def test_other_code_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ChoiceStore(tmp_path / "tuning.sqlite")
    store.put("k", HOST, 1, {"conv": 1.0})
    monkeypatch.setattr(stores, "code_version", lambda: "another")
    assert store.get("k", HOST, 1) == {} and store.own(HOST, 1) == {}


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"conv": "fast"}', '{"conv": -1}', '{"conv": NaN}', "null"])
def test_what_is_no_entry_is_as_if_it_were_not_there(tmp_path: Path, text: str) -> None:
    store = ChoiceStore(tmp_path / "tuning.sqlite")
    store.put("k", HOST, 1, {"conv": 1.0})
    (key,) = store._texts.starting("cpu|")
    store._texts.put(key, text)
    assert store.get("k", HOST, 1) == {} and store.own(HOST, 1) == {}


def test_a_corrupt_file_is_begun_anew(tmp_path: Path) -> None:
    store = ChoiceStore(tmp_path / "tuning.sqlite")
    store.path.write_bytes(b"no database at all" * 100)
    assert store.own(HOST, 1) == {} and store.get("k", HOST, 1) == {}
    store.put("k", HOST, 1, {"conv": 1.0})
    assert store.get("k", HOST, 1) == {"conv": 1.0}


def _write_many(path: Path, first: int) -> None:
    store = ChoiceStore(path)
    for number in range(first, first + 20):
        store.put(str(number), HOST, 1, {"conv": 1.0 + number})


def test_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tuning.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(path, first)) for first in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    assert ChoiceStore(path).own(HOST, 1) == {str(number): {"conv": 1.0 + number} for number in range(40)}


def test_shipped_times_stand_behind_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = region_key(convolution())
    mine = {machine_key(HOST): {"1": {key: {"a": 2.0, "b": 1.0}, "other": {"a": 1.0}}}}
    monkeypatch.setattr(stores, "_defaults", lambda: mine)
    store = ChoiceStore(tmp_path / "tuning.sqlite")
    assert store.tuned(HOST, 1).times(convolution()) == {"a": 2.0, "b": 1.0}
    assert store.tuned(HOST, 2).times(convolution()) == {}
    store.put(key, HOST, 1, {"a": 1.0, "b": 2.0})
    assert store.tuned(HOST, 1).times(convolution()) == {"a": 1.0, "b": 2.0}


def test_the_digest_changes_with_the_choice_only() -> None:
    assert Tuned({}).digest == ""
    one = Tuned({"k": {"a": 1.0, "b": 0.5}}).digest
    assert one == Tuned({"k": {"a": 1.1, "b": 0.6}}).digest != Tuned({"k": {"a": 1.0, "b": 1.5}}).digest


def test_export_adds_what_pays(tmp_path: Path) -> None:
    file = tmp_path / "defaults.json"
    assert export(file, {"k": {"a": 1.0, "b": 0.5}, "same": {"a": 1.0, "b": 0.99}}, HOST, 1) == 1
    assert export(file, {"l": {"a": 1.0, "b": 0.123456}}, HOST, 1) == 1
    assert json.loads(file.read_text()) == {
        "machines": {machine_key(HOST): {"1": {"k": {"a": 1.0, "b": 0.5}, "l": {"a": 1.0, "b": 0.1235}}}}
    }
    file.write_text("[]")
    with pytest.raises(Error, match="no file of tuned choices"):
        export(file, {}, HOST, 1)


def test_what_is_shipped_can_be_read() -> None:
    for by_threads in stores._defaults().values():
        for threads, regions in by_threads.items():
            assert int(threads) > 0
            assert all(times and min(times.values()) > 0 for times in regions.values())


def keep(region: Region, times: dict[str, float]) -> None:
    ChoiceStore().put(region_key(region), HOST, 1, times)


def ways_of(net: Path, partitions: Parts, target: CpuTarget) -> set[str]:
    """The ways that the convolutions are compiled in."""
    (part,) = partitions(net, target)
    convolutions = {region.name for region in part.regions if region.anchor == "Conv"}
    ways = target.compile(part).metadata["ways"]
    assert set(ways) == {region.name for region in part.regions}
    return {ways[name] for name in convolutions}


def test_a_compile_takes_what_the_store_names(net: Path, partitions: Parts) -> None:
    target = CpuTarget(threads=1)
    region = partitions(net, target)[0].regions[0]
    names = [way.name for way in alternatives(region, target.cpu)]
    before = device_fingerprint(target, 1)
    assert ways_of(net, partitions, target) == {names[0]}
    for wanted, seconds in ((names[-1], 0.5), ("conv_3x2_r4", 0.4)):  # one that is listed, one that is not
        keep(region, {names[0]: 1.0, wanted: seconds})
        tuned = CpuTarget(threads=1)
        assert ways_of(net, partitions, tuned) == {wanted}
        assert device_fingerprint(tuned, 1) != before
    assert ways_of(net, partitions, CpuTarget(threads=2)) == {names[0]}


@pytest.mark.parametrize("name", ["winograd99", "conv_", "", "🙂", "gemm_6x2", "conv_99999x1"])
def test_an_unknown_way_is_ignored(net: Path, partitions: Parts, name: str) -> None:
    region = partitions(net, CpuTarget(threads=1))[0].regions[0]
    default = alternatives(region, HOST)[0].name
    keep(region, {default: 1.0, name: 0.5})
    assert ways_of(net, partitions, CpuTarget(threads=1)) == {default}


def test_exact_forbids_winograd(net: Path, partitions: Parts) -> None:
    target = CpuTarget(threads=1, exact=True)
    region = partitions(net, target)[0].regions[0]
    assert all(way.name.startswith("conv") for way in alternatives(region, HOST, exact=True))
    others = [way.name for way in alternatives(region, HOST) if way.name.startswith("winograd")]
    assert others
    keep(region, {"conv": 1.0, others[0]: 0.1, "conv_2x2": 0.5})
    assert ways_of(net, partitions, CpuTarget(threads=1, exact=True)) == {"conv_2x2"}
    assert device_fingerprint(target, 1) != device_fingerprint(CpuTarget(threads=1), 1)
