"""`--emit commands`: what is written for AiM, and that it suffices to replay a partition."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from aim_nets import BFLOAT16, Net
from typer.testing import CliRunner

import nestc
from nestc.bundle.artifact import Artifact
from nestc.cli import app
from nestc.runtime.aim.commands import Eoc, ReadGpr, WriteGpr
from nestc.runtime.aim.encode import decode
from nestc.runtime.aim.machine import parse
from nestc.runtime.aim.simulate import Machine
from nestc.runtime.aim.timing import simulate_timing
from nestc.runtime.aim.trace import format_trace, parse_trace
from nestc.targets.aim.commands import files


def model() -> nestc.Model:
    """Two layers; the second has several slices of K on one channel."""
    net = Net()
    x = net.input((2, 72))
    h = net.node("Relu", net.node("Gemm", x, net.matrix(1500, 72), net.matrix(1500), transB=1))
    return net.model(
        net.node("Add", net.node("MatMul", h, net.matrix(1500, 40)), net.node("MatMul", x, net.matrix(72, 40)))
    )


def gates() -> nestc.Model:
    """Products and a sum of values, one of them constant, beside a matrix."""
    net = Net()
    x, y = net.input((2, 40)), net.input((2, 40))
    h = net.node("Add", net.node("Mul", x, y), net.node("Mul", y, net.matrix(40)))
    return net.float_model(net.node("MatMul", h, net.matrix(40, 24)), h)


def artifact(source: nestc.Model, target: str = "aim:channels=4") -> Artifact:
    executable = nestc.compile(source, targets=[target])
    (found,) = [part.artifact for part in executable.bundle.partitions if part.device == "aim"]
    return found


def arrays(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data)) as found:
        return {name: found[name] for name in found.files}


@pytest.mark.parametrize(("source", "target", "layers"), [(model, "", 3), (gates, ",round=true", 2)])
def test_the_trace_replays_the_partition(source: Callable[[], nestc.Model], target: str, layers: int) -> None:
    written = files("part", artifact(source(), f"aim:channels=4{target}"))
    about = json.loads(written["part.json"])
    machine = parse(written["part.machine.yaml"].decode(), "x")
    assert machine.channels == 4 and about["machine"] == "gddr6_aim"
    requests = parse_trace(written["part.aim"].decode())
    assert isinstance(requests[-1], Eoc) and sum(isinstance(each, Eoc) for each in requests) == 1
    banks = np.frombuffer(written["part.banks.bin"], BFLOAT16).reshape(about["banks"]["shape"]).copy()
    registers = np.frombuffer(written["part.registers.bin"], BFLOAT16).reshape(about["registers"]["shape"])
    given, expected = arrays(written["part.inputs.npz"]), arrays(written["part.outputs.npz"])
    memory = Machine(machine, memory=banks)
    memory.gpr[: len(registers)] = registers
    for layer in about["trace"]["layers"]:
        stream = requests[layer["first"] : layer["first"] + layer["requests"]]
        writes = given[f"{layer['name']}@writes"].view(ml_dtypes.bfloat16)
        assert sum(isinstance(each, WriteGpr) for each in stream) == len(writes) == layer["writes"]
        assert sum(isinstance(each, ReadGpr) for each in stream) == layer["reads"]
        reads = np.stack(memory.run(stream, list(writes)))
        np.testing.assert_array_equal(reads.view(np.uint16), expected[f"{layer['name']}@reads"])
    assert len(about["trace"]["layers"]) == layers
    assert {value["name"] for value in about["outputs"]} <= set(expected)


@pytest.mark.parametrize(("source", "target"), [(model, ""), (gates, ",round=true")])
def test_the_text_is_the_binary_stream(source: Callable[[], nestc.Model], target: str) -> None:
    made = artifact(source(), f"aim:channels=4{target}")
    written = files("part", made)
    requests = parse_trace(written["part.aim"].decode())
    assert parse_trace(format_trace(requests)) == requests
    streams = [decode(made.files[step["file"]]) for step in made.metadata["steps"] if step["kind"] != "host"]
    assert requests == [each for stream in streams for each in stream[:-1]] + [Eoc()]
    # Streams one after the other take what the artifact says but for their ends, which all but one of them lose here.
    ticks = simulate_timing(requests, parse(made.files["machine.yaml"].decode(), "x")).ticks
    assert abs(ticks - made.metadata["timing"]["ticks"]) <= 0.1 * ticks


def test_the_command_line_writes_them(tmp_path: Path) -> None:
    model().save(tmp_path / "m.onnx")
    arguments = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.nest"), "--target", "aim:channels=4"]
    arguments += ["--emit", "commands", "--emit", "tensor", "--emit-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "simulated: " in result.output and " ticks, " in result.output
    assert "% of the internal bandwidth" in result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    parts = {name.removesuffix(".aim") for name in names if name.endswith(".aim")}
    assert len(parts) == 1
    (part,) = parts
    for ending in ("json", "banks.bin", "registers.bin", "machine.yaml", "inputs.npz", "outputs.npz"):
        assert f"{part}.{ending}" in names
    assert any(name.startswith(part) and name.endswith(".tensor") for name in names)
    texts = list((tmp_path / "out").glob(f"{part}_*.txt"))
    assert texts and all(isinstance(parse_trace(path.read_text())[-1], Eoc) for path in texts)
    assert isinstance(parse_trace((tmp_path / "out" / f"{part}.aim").read_text())[-1], Eoc)
