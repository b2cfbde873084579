"""Values between partitions: whose memory they are in, how long they live, and what is used again."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from handmade import f32, native_bundle
from scripted import bundle, part, scripted, x

from nestc.bundle.artifact import Artifact, Elapsed
from nestc.bundle.bundle import Bundle, BundlePartition, TensorSpec
from nestc.codegen.main import Step
from nestc.runtime import Executable, devices
from nestc.runtime.stages import CALLS, Flow, Values, load

pytestmark = pytest.mark.usefixtures("scripted")

__all__ = ["scripted"]

CHAIN = [
    part("A", "a", "x", "t"),
    part("B", "a", "t", "u unused"),
    part("C", "a", "u", "v"),
    part("D", "a", "v t", "y"),
]


def run(flow: Flow, value: int) -> tuple[list[np.ndarray], list[set[int]]]:
    """The results, and after each stage the addresses of values in memory that is free again."""
    values = Values(flow, [x(value)], [None] * len(flow.outputs))
    free: list[set[int]] = []
    for stage in flow.stages:
        values.run(stage)
        values.release(stage)
        free.append({array.ctypes.data for arrays in flow.spare.values() for array in arrays})
    return values.results(), free


def test_memory_is_free_after_the_last_use_and_used_again():
    flow = load(bundle(CHAIN, "y"), 1, None)
    (y,), free = run(flow, 1)
    assert y.tolist() == [3 * (27 + 3)] * 2
    assert [len(each) for each in free] == [0, 1, 2, 4]  # unused; u; v and t
    known = free[-1]
    (again,), free = run(flow, 2)
    assert again.tolist() == [180, 180] and free[-1] == known
    assert again.ctypes.data not in known and y.tolist() == [90, 90]


def test_memory_of_a_graph_output_is_never_used_again():
    flow = load(bundle(CHAIN, "y t u"), 1, None)
    results, free = run(flow, 1)
    assert [array.tolist() for array in results] == [[90, 90], [3, 3], [9, 9]]
    assert len(free[-1]) == 2  # v and what is not used
    run(flow, 5)
    assert [array.tolist() for array in results] == [[90, 90], [3, 3], [9, 9]]


class _Viewing:
    """A device whose results are views of its inputs."""

    name = "viewing"

    def load(self, artifact: Artifact, threads: int) -> "_Viewing":
        return self

    def __call__(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]):
        return [inputs[0]], Elapsed(1e-3, "measured")

    def close(self) -> None:
        pass


def viewing(name: str, inputs: str, output: str) -> BundlePartition:
    return BundlePartition(name, "v", (inputs,), (TensorSpec(output, "int64", (2,)),), Artifact("viewing", {}, {}, {}))


def test_views_are_safe(monkeypatch: pytest.MonkeyPatch):
    """A view of memory that is lent would change with the next request; one of an input is the caller's."""
    monkeypatch.setitem(devices._OWN, "viewing", ("test_stages", "_Viewing"))
    parts = [part("A", "a", "x", "t"), viewing("B", "t", "u"), viewing("C", "x", "w"), part("D", "a", "t", "y")]
    for outputs in ("u w y", "u w"):
        with Executable(bundle(parts, outputs)) as executable:
            given = [x(number) for number in range(6)]
            for found in (
                [executable(each) for each in given],
                [executable(each) for each in given],
                list(executable.map(given)),
            ):
                for number, (u, w) in enumerate(each[:2] for each in found):
                    assert (u.tolist(), w.tolist()) == ([3 * number] * 2, [number] * 2)
                    assert not np.shares_memory(w, given[number])


def test_native_code_passes_values_on_without_copies():
    """t is written by one partition and read by the next in the same memory, request after request."""
    writes = (False, False, True)
    first = native_bundle([Step("add", ("x", "x", "t"), writes, 24)], {"x": f32(24)}, {"t": f32(24)}, {})
    second = native_bundle([Step("mul", ("t", "t", "y"), writes, 24)], {"t": f32(24)}, {"y": f32(24)}, {})
    made = Bundle("two", first.inputs, second.outputs, (*first.partitions, *second.partitions))
    values = np.arange(24, dtype=np.float32)
    with Executable(made) as executable:
        session = executable._session
        assert session is not None
        seen: list[int] = []
        for _ in range(3):
            np.testing.assert_array_equal(executable(values), (values + values) ** 2)
            seen += [array.ctypes.data for array in session._flow.spare["t"]]
        assert len(set(seen)) == 1 and seen[0] % 64 == 0
        results = list(executable.map([values + n for n in range(20)], in_flight=4))
        for number, y in enumerate(results):
            np.testing.assert_array_equal(y, (2 * (values + number)) ** 2)
        assert len(session._flow.spare["t"]) <= 4


def test_stages_of_one_resource_drive_each_other_from_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    def holding(name: str, device: str, nbytes: int) -> BundlePartition:
        whole = part(name, device, "x", f"{name}y")
        return replace(whole, artifact=replace(whole.artifact, weights={"w": np.zeros(nbytes, np.uint8)}))

    parts = [holding("A", "a", 1 << 20), holding("B", "a", 3 << 20), holding("C", "b", 5 << 20)]
    flow = load(bundle(parts, "Ay By Cy"), 1, None)
    assert [stage.beside for stage in flow.stages] == [2 << 20, 1 << 20, 0]
    touched: list[int] = []
    monkeypatch.setattr("nestc.runtime.stages.evict", touched.append)
    values = Values(flow, [x(1)], [None] * 3)
    for stage in flow.stages:
        values.run(stage, steady=True)
    assert touched == [2 << 20] * CALLS + [1 << 20] * CALLS + [0] * CALLS
