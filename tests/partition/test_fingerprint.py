"""Hashes of regions and devices: the same for what takes the same time, in every process; another for what may not."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nestc.errors import TargetError
from nestc.graph.region import Op, Region, TensorType
from nestc.partition import fingerprint
from nestc.partition.fingerprint import chain_hash, device_fingerprint, region_hash
from nestc.targets import make
from nestc.targets.api import Machine, Memory


def convolution(
    prefix: str = "",
    *,
    channels: int = 8,
    stride: int = 1,
    scale: float = 0.5,
    limit: float = 6.0,
    seed: int = 0,
    integer: bool = False,
) -> Region:
    """A convolution with a bias, Clip and QuantizeLinear; `prefix` changes every name."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal((channels, 8, 3, 3)).astype(np.float32)
    if integer:
        weights = (weights * 20).astype(np.int8)
    arrays = {
        "w": weights,
        "b": random.standard_normal(64).astype(np.float32),
        "low": np.float32(0),
        "high": np.float32(limit),
        "scale": np.full(32, scale, np.float32),
        "zero": np.zeros(32, np.int8),
    }
    constants = {f"{prefix}{name}": partial(np.asarray, array) for name, array in arrays.items()}
    types = {f"{prefix}{name}": TensorType(str(np.asarray(a).dtype), np.asarray(a).shape) for name, a in arrays.items()}
    types |= {f"{prefix}{name}": TensorType("float32", (1, 8, 6, 6)) for name in ("x", "sum", "clipped")}
    types[f"{prefix}y"] = TensorType("int8", (1, 8, 6, 6))

    def op(kind: str, inputs: str, output: str, **attributes: object) -> Op:
        names = tuple(f"{prefix}{name}" for name in inputs.split())
        return Op(kind, names, (f"{prefix}{output}",), attributes, name=f"{prefix}n_{output}")

    ops = (
        op("Conv", "x w b", "sum", strides=(stride, stride), pads=(1, 1, 1, 1)),
        op("Clip", "sum low high", "clipped"),
        op("QuantizeLinear", "clipped scale zero", "y", axis=1),
    )
    return Region(f"{prefix}r", "Conv", ops, (f"{prefix}x",), (f"{prefix}y",), types, constants)


def test_names_do_not_count() -> None:
    assert region_hash(convolution()) == region_hash(convolution("another."))


def test_many_floating_parameters_count_by_shape() -> None:
    assert region_hash(convolution(seed=1)) == region_hash(convolution(seed=2))


@pytest.mark.parametrize(
    "change",
    [
        lambda: convolution(channels=16),
        lambda: convolution(stride=2),
        lambda: convolution(scale=0.25),
        lambda: convolution(limit=5.0),
        lambda: convolution(integer=True),
        lambda: replace(convolution(), anchor=None),
        lambda: replace(convolution(), outputs=("y", "sum")),
        lambda: replace(convolution(), types={**convolution().types, "x": TensorType("float32", (2, 8, 6, 6))}),
        lambda: replace(convolution(), types={**convolution().types, "x": TensorType("float16", (1, 8, 6, 6))}),
        lambda: replace(convolution(), ops=convolution().ops[:2]),
    ],
)
def test_what_changes_the_work_counts(change: Callable[[], Region]) -> None:
    assert region_hash(change()) != region_hash(convolution())


def test_integer_weights_count_by_contents() -> None:
    first, second = convolution(seed=1, integer=True), convolution(seed=2, integer=True)
    assert region_hash(first) != region_hash(second)
    assert region_hash(first) == region_hash(convolution("another.", seed=1, integer=True))


def test_the_order_of_operands_counts() -> None:
    def difference(inputs: tuple[str, str], used: tuple[str, str]) -> Region:
        types = {name: TensorType("float32", (4,)) for name in "abc"}
        return Region("r", None, (Op("Sub", used, ("c",)),), inputs, ("c",), types, {})

    plain = region_hash(difference(("a", "b"), ("a", "b")))
    assert plain == region_hash(difference(("b", "a"), ("b", "a")))
    assert plain != region_hash(difference(("a", "b"), ("a", "a")))
    assert plain != region_hash(difference(("a", "b"), ("b", "a")))


def test_graphs_inside_count() -> None:
    assert region_hash(convolution(), b"one") != region_hash(convolution(), b"other")


def test_chains_count_how_regions_connect_and_what_leaves_them() -> None:
    def chain(inputs: str, outputs: str) -> str:
        types = {name: TensorType("float32", (4,)) for name in "xabc"}
        regions = [
            Region(f"r{y}", None, (Op("Relu", (x,), (y,)),), (x,), (y,), types, {}) for x, y in zip(inputs, "abc")
        ]
        return chain_hash([region_hash(region) for region in regions], regions, tuple(outputs))

    assert chain("xab", "c") == chain("xab", "c")
    assert len({chain("xab", "c"), chain("xaa", "bc"), chain("xab", "bc"), chain("xax", "bc")}) == 4


def test_hashes_are_the_same_in_every_process() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_fingerprint as t; from nestc.targets import make;"
        "print(t.region_hash(t.convolution('p', integer=True)), *(t.device_fingerprint(make(n), 1) for n in t.NAMES))"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    here = [region_hash(convolution(integer=True)), *(device_fingerprint(make(name), 1) for name in NAMES)]
    assert found.stdout.split() == here


NAMES = ("cpu:arch=avx2", "vta", "aim", "host")


def test_options_threads_and_devices_count() -> None:
    texts = ("cpu", "cpu:arch=sse2", "vta", "vta:count=2", "vta:clock_mhz=200", "vta:unroll=false", "aim", "host")
    assert len({device_fingerprint(make(text), 1) for text in texts}) == len(texts)
    assert device_fingerprint(make("cpu:threads=1"), 1) != device_fingerprint(make("cpu:threads=1"), 2)
    assert device_fingerprint(make("cpu:threads=1"), 1) != device_fingerprint(make("cpu:threads=2"), 1)


def test_two_devices_of_a_kind_share_their_times() -> None:
    second = make("vta")
    second.name = "vta_2"
    second.machine = replace(second.machine, resource="vta_2")
    assert device_fingerprint(second, 1) == device_fingerprint(make("vta"), 1)


def test_this_processor_counts_only_where_times_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cpu", "vta", "aim")
    before = [device_fingerprint(make(name), 1) for name in names]
    facts = {**fingerprint.host_facts(), "model name": "another"}
    monkeypatch.setattr(fingerprint, "host_facts", lambda: facts)
    after = [device_fingerprint(make(name), 1) for name in names]
    assert [a == b for a, b in zip(before, after)] == [False, True, True]


def test_host_facts_name_the_processor() -> None:
    facts = fingerprint.host_facts()
    assert facts["cores"] >= 1 and facts["architecture"]


PACKAGE = {
    "__init__.py": "",
    "target.py": "from ours_for_test.kernels import (\n    multiply,  # a comment\n)\nimport json, os\n",
    "kernels.py": "def multiply():\n    from ours_for_test import tables\n    import numpy\n",
    "tables.py": "ONE = 1\n",
    "unrelated.py": "",
}


@dataclass
class Options:
    width: int


class Plain:
    """What a fingerprint reads of a target; the device is not here."""

    def __init__(self) -> None:
        self.name = "ours"
        self.machine = Machine("ours", (Memory("ram", 0),), ("float32",), {"version": "1.0"})
        self.offers = ()
        self.options = Options(8)
        self.compiled: list[str] = []

    def open(self) -> object:
        raise TargetError("there is no such device here")


def test_code_of_other_packages_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ours_for_test"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("ours_for_test.target")
    monkeypatch.setattr(Plain, "__module__", "ours_for_test.target")

    def now() -> str:
        fingerprint._code_of.cache_clear()
        return device_fingerprint(Plain(), 1)  # type: ignore[arg-type]

    first = now()
    (folder / "unrelated.py").write_text("# nobody imports it\n")
    assert now() == first
    (folder / "tables.py").write_text("ONE = 2\n")  # imported by what the target imports, inside a function
    assert now() != first
    second = now()
    monkeypatch.setattr(fingerprint, "_version", lambda name: "9.9" if name == "numpy" else "")
    assert now() != second
    fingerprint._code_of.cache_clear()


def test_facts_and_options_of_a_target_count() -> None:
    first, second, third, busy = Plain(), Plain(), Plain(), Plain()
    second.machine = replace(second.machine, facts={"version": "1.1"})
    third.options = Options(16)
    busy.compiled.append("something")
    found = [device_fingerprint(each, 1) for each in (first, second, third, busy)]  # type: ignore[arg-type]
    assert len(set(found)) == 3 and found[3] == found[0]
