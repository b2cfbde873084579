"""``nestc tune`` on a small network, ``compile --tune`` and ``--exact``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nestc.runtime import open as open_bundle
from nestc.targets.cpu.target import CpuTarget
from nestc.tune import search
from nestc.tune.store import ChoiceStore

Run = Callable[..., Any]


def own() -> dict[str, Any]:
    return dict(ChoiceStore().own(CpuTarget(threads=1).cpu, 1))


def ways(bundle: Path) -> set[str]:
    """The ways of the regions of a bundle."""
    with open_bundle(bundle) as executable:
        return {way for part in executable.bundle.partitions for way in part.artifact.metadata["ways"].values()}


def test_tune_measures_and_compile_uses_it(net: Path, nestc: Run, tmp_path: Path) -> None:
    defaults = tmp_path / "defaults.json"
    result = nestc("tune", net, "--threads", 1, "--seconds", 60, "--json", "--export", defaults)
    assert result.status == 0, result.err
    told = json.loads(result.out)
    assert told["threads"] == 1 and told["left"] == [] and told["predicted_ms"] <= told["default_ms"]
    assert {row["count"] for row in told["regions"]} == {1, 2}
    assert json.loads(defaults.read_text())["machines"]
    assert len(own()) == 2
    assert nestc("compile", net, "--threads", 1, "-o", tmp_path / "net.nest").status == 0
    assert ways(tmp_path / "net.nest") == {row["best"] for row in told["regions"]}
    explained = json.loads(nestc("explain", tmp_path / "net.nest", "--json").out)
    assert set(explained["ways"].values()) == ways(tmp_path / "net.nest")
    assert "kernels of the CPU: " in nestc("explain", tmp_path / "net.nest").out
    # Measured again, another way may be the best.
    again = nestc("tune", net, "--threads", 1, "--seconds", 60)
    assert again.status == 0 and "net.onnx, 1 threads" in again.out and "kernels of the network" in again.out


def test_too_little_time_is_said(net: Path, nestc: Run) -> None:
    result = nestc("tune", net, "--threads", 1, "--seconds", 0)
    assert result.status == 0 and "too short for 2 of 2 regions" in result.out and "not measured" in result.out
    assert own() == {}


def test_compile_with_tune_measures_first(
    net: Path, nestc: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_is_fast(task: Any, names: Any, rounds: int) -> dict[str, list[float]]:
        return {name: [0.5 if name == "conv_2x2" else 1.0] * rounds for name in [*names, "conv_2x2"]}

    def runner(tasks: Any, seconds: float) -> Any:
        assert seconds <= 30
        return (search.search(task, lambda: 1, one_is_fast) for task in tasks)

    monkeypatch.setattr("nestc.tuning.one_by_one", runner)
    result = nestc("compile", net, "--threads", 1, "-o", tmp_path / "net.nest", "--tune", 30, "--json")
    assert result.status == 0, result.err
    assert "conv_2x2" in ways(tmp_path / "net.nest")
    assert json.loads(result.out)["ways"]["conv_2x2"] == 2


@pytest.mark.parametrize("command", ["compile", "run", "bench"])
def test_exact_runs_without_winograd(net: Path, nestc: Run, tmp_path: Path, command: str) -> None:
    options = ["-o", tmp_path / "net.nest"] if command == "compile" else []
    result = nestc(command, net, "--exact", "--threads", 1, *options, *(["--runs", 1] if command == "bench" else []))
    assert result.status == 0, result.err
    if command == "compile":
        assert all(way.startswith(("conv", "gemm")) for way in ways(tmp_path / "net.nest"))
        plain = nestc("compile", net, "--target", "cpu:exact=true", "--threads", 1, "-o", tmp_path / "other.nest")
        assert plain.status == 0 and ways(tmp_path / "other.nest") == ways(tmp_path / "net.nest")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compile", "NET", "--exact", "--target", "host"), "--exact is for the target cpu"),
        (("run", "BUNDLE", "--exact"), "--exact is for a model"),
        (("tune", "NET", "--target", "host"), "only the target cpu is tuned"),
        (("tune", "BUNDLE"), "is a bundle"),
        (("tune", "missing.onnx"), "there is no file missing.onnx"),
        (("tune", "NET", "--export", "nowhere/defaults.json"), "in a folder that does not exist"),
        (("tune", "NET", "--target", "cpu:arch=neon"), "compile it for this one"),
    ],
)
def test_bad_input_is_said_in_a_sentence(net: Path, nestc: Run, tmp_path: Path, arguments: Any, said: str) -> None:
    bundle = tmp_path / "net.nest"
    if "BUNDLE" in arguments:
        assert nestc("compile", net, "--threads", 1, "-o", bundle).status == 0
    given = [{"NET": net, "BUNDLE": bundle}.get(each, each) for each in arguments]
    result = nestc(*given)
    assert result.status == 2 and said in result.err and result.err.count("\n") == 1, result.err


def test_nothing_to_tune(nestc: Run, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "relu.onnx")
    result = nestc("tune", tmp_path / "relu.onnx", "--json")
    assert result.status == 0 and json.loads(result.out)["regions"] == []
