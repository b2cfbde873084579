"""The command line with models that run on VTA: modelled time is named, commands are written, refusals are said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from qdq_nets import residual

from nestc.runtime.vta.assembly import assemble
from nestc.runtime.vta.config import from_json
from nestc.runtime.vta.encode import encode, encode_uops


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return residual(tmp_path / "m.onnx")


def test_compile_and_run_say_what_is_modelled(nestc, model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "m.nest"
    report = json.loads(nestc("compile", model, "--target", "vta", "-o", bundle, "--json").out)
    (partition,) = report["partitions"]
    assert partition["device"] == "vta" and partition["simulated"]["cycles"] > 0
    assert report["fallback_ops"] == {} and report["weights_bytes"] > 0
    shown = nestc("compile", model, "--target", "vta", "-o", bundle).out
    assert "simulated: " in shown and " cycles, " in shown and "J\n" in shown

    ran = json.loads(nestc("run", bundle, "--json").out)
    there, mark, back = ran["timeline"]
    assert (mark["device"], mark["kind"]) == ("vta", "modelled")
    assert (there["kind"], back["kind"]) == ("estimated", "estimated")
    launch_ms = (mark["end_us"] - mark["start_us"]) / 1e3 - partition["simulated"]["seconds"] * 1e3
    assert launch_ms == pytest.approx(0.05)  # by default
    assert list(ran["modelled_ms"]) == [there["device"], "vta", back["device"]]
    assert ran["latency_ms"] == pytest.approx(sum(ran["modelled_ms"].values()), abs=1e-4)
    shown = nestc("run", bundle).out
    assert "modelled or estimated, not measured: " in shown and "vta 0." in shown


def test_bench_compares_no_modelled_time_with_a_measured_one(nestc, model: Path) -> None:
    arguments = ("bench", model, "--target", "vta", "--runs", "2", "--threads", "1")
    report = json.loads(nestc(*arguments, "--vs", "onnxruntime", "--json").out)
    assert report["nestc"]["median_ms"] == pytest.approx(sum(report["nestc"]["modelled_ms"].values()))
    assert report["vs"]["onnxruntime"]["ratio"] is None and report["vs"]["onnxruntime"]["median_ms"] > 0
    assert report["max_abs_diff"] <= 3  # ties, which VTA rounds up, and what later layers make of them
    shown = nestc(*arguments).out
    assert "modelled by its simulator, not measured" in shown and "estimated for the link, not measured" in shown


@pytest.mark.parametrize("target", ["vta", "vta:count=2"])
def test_emit_commands_writes_all_that_a_replay_needs(nestc, model: Path, tmp_path: Path, target: str) -> None:
    folder = tmp_path / "out"
    result = nestc(
        "compile", model, "--target", target, "-o", tmp_path / "m.nest", "--emit", "commands", "--emit-dir", folder
    )
    assert result.status == 0, result.err
    names = {path.name for path in folder.iterdir()}
    suffixes = {"insn.bin", "uop.bin", "dram.bin", "json", "inputs.npz", "outputs.npz"}
    about = json.loads((folder / "vta_0.json").read_text())
    texts = sorted(folder.glob("*.txt"))
    assert names == {f"vta_0.{suffix}" for suffix in suffixes} | {path.name for path in texts}
    assert len(texts) == sum(len(launch) for launch in about["instructions"]["launches"])
    config = from_json(about["config"], about["preset"])
    streams = [assemble(path.read_text(), config) for path in texts]
    code = b"".join(encode(stream.instructions, config) for stream in streams)
    uops = b"".join(encode_uops(stream.uops, config) for stream in streams)
    assert (folder / "vta_0.insn.bin").read_bytes() == code
    assert (folder / "vta_0.uop.bin").read_bytes() == uops

    with np.load(folder / "vta_0.inputs.npz") as held:
        inputs = {name: held[name] for name in held.files if not name.endswith("@dram")}
    np.savez(tmp_path / "in.npz", **inputs)
    assert nestc("run", tmp_path / "m.nest", "-i", tmp_path / "in.npz", "-o", tmp_path / "o.npz").status == 0
    with np.load(tmp_path / "o.npz") as found, np.load(folder / "vta_0.outputs.npz") as wanted:
        for name in found.files:
            np.testing.assert_array_equal(found[name], wanted[name])


def test_emit_commands_without_such_a_device_is_said(nestc, model: Path, tmp_path: Path) -> None:
    arguments = ("--emit", "commands", "--emit-dir", tmp_path / "out", "-o", tmp_path / "m.nest")
    result = nestc("compile", model, *arguments)
    assert result.status == 2 and "give such a target" in result.err


def test_other_levels_of_a_vta_model_are_emitted(nestc, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ("--emit", "graph", "--emit", "tensor", "--emit", "asm", "--emit-dir", folder)
    assert nestc("compile", model, "--target", "vta", "-o", tmp_path / "m.nest", *arguments).status == 0
    names = [path.name for path in folder.iterdir()]
    assert "model.onnx" in names and any(name.endswith(".tensor") for name in names)
    assert not any(name.endswith((".txt", ".bin")) for name in names if not name.endswith(".onnx.txt"))


def test_a_target_that_takes_nothing_is_said(nestc, tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "float", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph, ir_version=8), tmp_path / "f.onnx")
    shown = nestc("compile", tmp_path / "f.onnx", "--target", "vta", "-o", tmp_path / "f.nest").out
    assert "vta takes nothing: nestc explain" in shown
    assert "quantize with scheme int8-pow2" in nestc("explain", tmp_path / "f.onnx", "--target", "vta").out


def test_explain_and_targets_know_it(nestc, model: Path) -> None:
    assert "-> vta:" in nestc("explain", model, "--target", "vta").out
    report = json.loads(nestc("targets", "--json").out)["targets"]["vta"]
    assert report["machine"]["name"] == "pynq_1x16x16" and report["machine"]["facts"]["block"] == 16
    ops = {op for offer in report["offers"] for op in offer["ops"]}
    assert {"Conv", "MatMul", "Add", "MaxPool", "GlobalAveragePool", "Concat"} <= ops
    assert "vta: pynq_1x16x16" in nestc("targets").out
