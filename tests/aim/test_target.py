"""The target as users meet it: options, what it says of its machine, and models that run partly or wholly on it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aim_nets import Net, on_cpu, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

import nestc
from nestc.bundle.artifact import Artifact
from nestc.commands.targets import describe
from nestc.errors import BundleError, TargetError
from nestc.runtime.aim.device import AimDevice
from nestc.runtime.aim.machine import format_machine, preset
from nestc.targets import make
from nestc.targets.aim.target import AimTarget

X = np.random.default_rng(3).standard_normal((1, 200)).astype(np.float32)

BF16 = 2.0**-8
"""Relative error of a result that is rounded to bfloat16, and of the partial sums in it."""


def aim(text: str) -> AimTarget:
    target = make(text)
    assert isinstance(target, AimTarget)
    return target


def mlp(rows: int = 1) -> nestc.Model:
    """Three layers: a bias and Relu, a bias of its own and Sigmoid, and GELU."""
    net = Net()
    h = net.node("Relu", net.node("Gemm", net.input((rows, 200)), net.matrix(64, 200), net.matrix(64), transB=1))
    h = net.node("Sigmoid", net.node("Add", net.node("MatMul", h, net.matrix(64, 10)), net.matrix(10)))
    return net.model(net.node("Gelu", net.node("MatMul", h, net.matrix(10, 32))))


def artifacts(executable: nestc.Executable) -> list[Artifact]:
    return [part.artifact for part in executable.bundle.partitions if part.device == "aim"]


def test_options_choose_the_machine(tmp_path: Path) -> None:
    assert aim("aim").config == preset("gddr6_aim")
    assert aim("aim:channels=4").config == replace(preset("gddr6_aim"), channels=4)
    file = tmp_path / "mine.yaml"
    file.write_text(format_machine(replace(preset("gddr6_aim"), name="mine", rows=64)))
    mine = aim(f"aim:machine={file},number=float16")
    assert (mine.config.name, mine.config.rows, mine.number) == ("mine", 64, "float16")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("aim:machine=gddr7", "there is no machine 'gddr7'|machine 'gddr7' cannot be read"),
        ("aim:machine=newton_pimflow", "no code is generated for it; take gddr6_aim"),
        ("aim:channels=0", "1 to 32 channels, not 0"),
        ("aim:channels=33", "1 to 32 channels, not 33"),
        ("aim:number=int8", "bfloat16 or float16, not as 'int8'"),
        ("aim:chanels=4", "did you mean 'channels'"),
    ],
)
def test_options_that_make_no_machine_are_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        make(text)


def test_the_target_describes_its_machine() -> None:
    described = describe(make("aim:channels=2"))
    facts = described["machine"]["facts"]
    assert facts["channels"] == 2 and facts["times_and_energies"] == "modelled" and facts["nRCDRDMAC"] == 56
    assert facts["internal_bytes_per_second"] == 2 * 16 * 16 * 2 * 1e9
    assert described["offers"][0]["quant"] == "bf16"


@pytest.mark.parametrize("options", ["aim", "aim:channels=1"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_network_runs_in_the_banks(options: str, rows: int) -> None:
    model = mlp(rows)
    x = np.random.default_rng(rows).standard_normal((rows, 200)).astype(np.float32)
    executable = nestc.compile(model, targets=[options])
    (found,) = executable.run({"x0": x}).values()
    (expected,) = on_cpu(model, {"x0": x}).values()
    assert relative_error(found, expected) < 2 * BF16
    partitions = [part for part in executable.plan.partitions if part.device == "aim"]
    assert len(partitions) == 1 and len(partitions[0].regions) == 3


@settings(max_examples=15, deadline=None)
@given(
    m=st.integers(1, 700),
    k=st.integers(1, 1500),
    rows=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 32]),
    bias=st.booleans(),
    activation=st.sampled_from([None, "Relu", "Tanh", "Gelu"]),
)
def test_products_of_every_size(m: int, k: int, rows: int, channels: int, bias: bool, activation: str | None) -> None:
    net = Net(m * k)
    x = net.input((rows, k))
    y = net.node("Gemm", x, net.matrix(m, k), *([net.matrix(m)] if bias else []), transB=1)
    model = net.model(y if activation is None else net.node(activation, y))
    value = np.random.default_rng(k).standard_normal((rows, k)).astype(np.float32)
    executable = nestc.compile(model, targets=[f"aim:channels={channels}"])
    (found,), (expected,) = executable.run({x: value}).values(), on_cpu(model, {x: value}).values()
    assert len(artifacts(executable)) == 1
    scale = max(float(np.abs(expected).max()), 1.0)
    np.testing.assert_allclose(found, expected, atol=3 * BF16 * scale)


def test_the_artifact_says_what_is_modelled() -> None:
    executable = nestc.compile(mlp(), targets=["aim"])
    (artifact,) = artifacts(executable)
    timing = artifact.metadata["timing"]
    assert timing["kind"] == "modelled" and [layer["m"] for layer in timing["layers"]] == [64, 10, 32]
    assert timing["ticks"] == sum(layer["ticks"] for layer in timing["layers"])
    assert timing["seconds"] == timing["memory_seconds"] + timing["host_seconds"]
    assert timing["memory_seconds"] == timing["ticks"] / 2e9
    assert timing["energy_joules"] == pytest.approx(sum(timing["energy_parts"].values()))
    assert 0 < timing["bandwidth_fraction"] < 1
    executable(X)
    marks = [mark for mark in executable.timeline() if mark["device"] == "aim"]
    assert [mark["kind"] for mark in marks] == ["modelled"]
    launch_us = 1.0  # the option's default, which is assumed
    assert marks[0]["end_us"] - marks[0]["start_us"] == pytest.approx(timing["seconds"] * 1e6 + launch_us, abs=1e-3)


def test_bundles_hold_all_of_it(tmp_path: Path) -> None:
    executable = nestc.compile(mlp(), targets=["aim"])
    executable.save(tmp_path / "m.nest")
    again = nestc.open(tmp_path / "m.nest")
    expected = executable(X)
    np.testing.assert_array_equal(again(X), expected)
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(again(X))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found:
        np.testing.assert_array_equal(each, expected)


def test_a_residual_and_a_gate_are_added_on_the_host() -> None:
    net = Net()
    x = net.input((1, 96))
    h = net.node("Gelu", net.node("MatMul", x, net.matrix(96, 160)))
    gate = net.node("Sigmoid", net.node("MatMul", x, net.matrix(96, 96)))
    y = net.node("Add", net.node("MatMul", h, net.matrix(160, 96)), x)
    model = net.model(net.node("Mul", y, gate))
    value = np.random.default_rng(5).standard_normal((1, 96)).astype(np.float32)
    found = nestc.compile(model, targets=["aim"])(value)
    (expected,) = on_cpu(model, {x: value}).values()
    assert relative_error(np.asarray(found), expected) < 2 * BF16


def test_matrices_with_the_same_vectors_are_one_launch() -> None:
    net = Net()
    x = net.input((3, 64))
    names = [net.node("MatMul", x, net.matrix(64, size)) for size in (40, 24)]
    names.append(net.node("Add", net.node("MatMul", x, net.matrix(64, 24)), net.matrix(24)))
    late = net.node("Relu", net.node("MatMul", x, net.matrix(64, 8)))
    names.append(net.node("Add", net.node("MatMul", late, net.matrix(8, 24)), names[1]))
    model = net.model(*names)
    value = np.random.default_rng(9).standard_normal((3, 64)).astype(np.float32)
    executable = nestc.compile(model, targets=["aim"])
    found, expected = executable.run({x: value}), on_cpu(model, {x: value})
    for name in names:
        assert relative_error(found[name], expected[name]) < 2 * BF16
    (artifact,) = artifacts(executable)
    assert [layer["m"] for layer in artifact.metadata["timing"]["layers"]] == [40 + 24 + 24, 8, 24]


def test_a_recurrent_cell_written_out() -> None:
    """Two steps of an LSTM whose weights both steps share; the gates' curves are the CPU's."""
    net = Net(4)
    width, size = 48, 40
    weights, states = net.matrix(4 * width, size), net.matrix(4 * width, width)
    bias = net.matrix(4 * width)
    h, c = net.constant(np.zeros((1, width))), net.constant(np.zeros((1, width)))
    xs = [net.input((1, size)) for _ in range(2)]
    for x in xs:
        gates = net.node("Add", net.node("Gemm", x, weights, bias, transB=1), net.node("Gemm", h, states, transB=1))
        parts = [
            net.node(
                kind,
                net.node("Slice", gates, *(net.constant([n], np.int64) for n in (i * width, i * width + width, 1))),
            )
            for i, kind in enumerate(("Sigmoid", "Sigmoid", "Tanh", "Sigmoid"))
        ]
        c = net.node("Add", net.node("Mul", parts[1], c), net.node("Mul", parts[0], parts[2]))
        h = net.node("Mul", parts[3], net.node("Tanh", c))
    model = net.model(h)
    random = np.random.default_rng(6)
    inputs = {x: random.standard_normal((1, size)).astype(np.float32) for x in xs}
    executable = nestc.compile(model, targets=["aim"])
    (found,) = executable.run(inputs).values()
    (expected,) = on_cpu(model, inputs).values()
    assert relative_error(found, expected) < 2 * BF16
    taken = [op for part in executable.plan.partitions if part.device == "aim" for op in executable.plan.ops(part)]
    assert "Gemm" in taken


def test_convolutions_of_one_pixel_are_matrix_vector_products() -> None:
    net = Net()
    x = net.input((1, 72, 6, 6))
    h = net.node("GlobalAveragePool", x)
    h = net.node("Relu", net.node("Conv", h, net.matrix(24, 72, 1, 1), net.matrix(24)))
    model = net.model(net.node("Sigmoid", net.node("Conv", h, net.matrix(72, 24, 1, 1), net.matrix(72))))
    value = np.random.default_rng(7).standard_normal((1, 72, 6, 6)).astype(np.float32)
    executable = nestc.compile(model, targets=["aim"])
    (expected,) = on_cpu(model, {x: value}).values()
    assert relative_error(np.asarray(executable(value)), expected) < 2 * BF16
    assert len(artifacts(executable)) == 1


def test_float16_models() -> None:
    net = Net()
    x = net.input((2, 64), TensorProto.FLOAT16)
    y = net.node("Relu", net.node("MatMul", x, net.matrix(64, 40, dtype=np.float16)))
    model = net.float_model(y, dtype=TensorProto.FLOAT16)
    value = np.random.default_rng(8).standard_normal((2, 64)).astype(np.float16)
    executable = nestc.compile(model, targets=["aim:number=float16"])
    assert len(artifacts(executable)) == 1
    (expected,) = on_cpu(model, {x: value}).values()
    found = executable(value)
    assert np.asarray(found).dtype == np.float16
    assert relative_error(np.asarray(found), expected) < 2.0**-10


def test_float_models_run_on_the_cpu_and_are_told_why() -> None:
    net = Net()
    executable = nestc.compile(
        net.float_model(net.node("MatMul", net.input((1, 8)), net.matrix(8, 8))), targets=["aim"]
    )
    assert not artifacts(executable)
    assert "quantize the model with scheme bf16" in executable.plan.explain()


def test_matrices_that_the_banks_cannot_hold_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(format_machine(replace(preset("gddr6_aim"), name="small", rows=1, channels=1)))
    net = Net()
    model = net.model(net.node("MatMul", net.input((1, 1024)), net.matrix(1024, 32)))
    executable = nestc.compile(model, targets=[f"aim:machine={file}"])
    assert "takes 2 rows of every bank, and small has 1" in executable.plan.explain()


def test_damaged_artifacts_are_refused_in_words() -> None:
    (artifact,) = artifacts(nestc.compile(mlp(), targets=["aim"]))
    device = AimDevice()
    with pytest.raises(BundleError, match="not complete"):
        device.load(replace(artifact, metadata={**artifact.metadata, "steps": [{"kind": "launch"}]}), 1)
    cut = {**artifact.files, "0.aim.bin": artifact.files["0.aim.bin"][:-1]}
    with pytest.raises(BundleError, match="cannot be run: .* is cut"):
        device.load(replace(artifact, files=cut), 1)
    other = {**artifact.files, "0.aim.bin": artifact.files["1.aim.bin"]}
    with pytest.raises(BundleError, match="write .* registers and read"):
        device.load(replace(artifact, files=other), 1)
    steps = [{**step, "op": "Softmax"} if step["kind"] == "host" else step for step in artifact.metadata["steps"]]
    with pytest.raises(BundleError, match="has no operator Softmax"):
        device.load(replace(artifact, metadata={**artifact.metadata, "steps": steps}), 1)


def test_metadata_that_does_not_fit_is_refused_before_the_first_call() -> None:
    """A name that nothing makes, sizes that do not fit, weights of another machine: a BundleError, and at once."""
    (artifact,) = artifacts(nestc.compile(mlp(), targets=["aim"]))
    launches = [index for index, step in enumerate(artifact.metadata["steps"]) if step["kind"] == "launch"]

    def load(weights: dict[str, np.ndarray] | None = None, **changes: object) -> None:
        AimDevice().load(
            replace(artifact, weights=weights or artifact.weights, metadata={**artifact.metadata, **changes}), 1
        )

    def changed(index: int, **changes: object) -> list[object]:
        steps = list(artifact.metadata["steps"])
        steps[index] = {**steps[index], **changes}
        return steps

    first = artifact.metadata["steps"][launches[0]]
    (output,) = first["outputs"]
    for steps in (
        changed(launches[0], source="nothing"),
        changed(launches[0], layout={**first["layout"], "k": 1}),
        changed(launches[0], layout={**first["layout"], "writes": [10**6, *first["layout"]["writes"][1:]]}),
        changed(launches[0], outputs=[{**output, "shape": [1, 65]}]),
        changed(launches[0], outputs=[{**output, "name": "other"}]),
        changed(launches[0], outputs=[{**output, "first": 60}]),
        [],
    ):
        with pytest.raises(BundleError, match="not complete"):
            load(steps=steps)
    (border,) = artifact.metadata["outputs"]
    with pytest.raises(BundleError, match="not complete"):
        load(outputs=[{**border, "shape": [1, 5]}])
    weights = dict(artifact.weights)
    for name, values in (
        ("banks", weights["banks"][:, :, :1]),
        ("banks", weights["banks"][..., :8]),
        ("banks", weights["banks"].astype(np.float32)),
        ("registers", weights["registers"][:, :8]),
    ):
        with pytest.raises(BundleError, match="not complete"):
            load({**weights, name: values})


def test_programs_check_what_they_are_given_and_can_be_closed() -> None:
    (artifact,) = artifacts(nestc.compile(mlp(), targets=["aim"]))
    program = AimDevice().load(artifact, 1)
    ((name, _, shape),) = program.inputs
    with pytest.raises(TargetError, match=f"compiled for '{name}' as bfloat16"):
        program([np.zeros(shape, np.float32)], [None])
    program.close()
    with pytest.raises(TargetError, match="closed"):
        program([np.zeros(shape, np.float32)], [None])
