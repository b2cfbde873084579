"""The target as users meet it: options, what it says of its machine, and models that run partly or wholly on it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from qdq_nets import Net, residual
from reference import run_qdq

import nestc
from nestc.commands.targets import describe
from nestc.errors import BundleError, TargetError
from nestc.graph import pipeline
from nestc.graph.regions import form, regions, submodel
from nestc.partition.group import partitions
from nestc.partition.match import takes
from nestc.runtime.vta.config import PRESETS
from nestc.targets import make
from nestc.targets.vta import compiler
from nestc.targets.vta.target import VtaTarget

KEYS = PRESETS["pynq_1x16x16"].to_json()
X = np.random.default_rng(1).integers(-128, 128, (1, 20, 8, 8)).astype(np.int8)


def vta(text: str) -> VtaTarget:
    target = make(text)
    assert isinstance(target, VtaTarget)
    return target


def test_options_choose_the_machine(tmp_path: Path) -> None:
    assert vta("vta").config == PRESETS["pynq_1x16x16"]
    assert vta("vta:config=1x32x32,count=4").count == 4
    changed = vta("vta:config=zcu102_1x16,clock_mhz=250,bus_bits=64").config
    assert (changed.clock_hz, changed.bus_bits, changed.log_block) == (250e6, 64, 4)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**KEYS, "LOG_WGT_BUFF_SIZE": 17, "TARGET": "zcu104", "HW_VER": "0.0.2"}))
    mine = vta(f"vta:config={file}").config
    assert (mine.name, mine.log_wgt_buff_size, mine.clock_hz) == ("mine", 17, 333e6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vta:config=pynk_1x16x16", "there is no VTA configuration 'pynk_1x16x16'; there are pynq_1x16x16"),
        ("vta:config=none/here.json", "'none/here.json' cannot be read"),
        ("vta:count=0", "1 to 64 devices, not 0"),
        ("vta:count=many", "is a number"),
        ("vta:clock_mhz=0", "above 0"),
        ("vta:clock_mhz=nan", "above 0"),
        ("vta:bus_bits=48", "power of two from 8 to 1024"),
        ("vta:cout=4", "did you mean 'count'"),
        ("vta:energy=none.json", "cannot be read from 'none.json'"),
    ],
)
def test_options_that_make_no_machine_are_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        make(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        (json.dumps({**KEYS, "LOG_BLOCK": "4"}), "LOG_BLOCK is '4'; it must be an integer"),
        (json.dumps({key: KEYS[key] for key in KEYS if key != "LOG_BATCH"}), "lacks LOG_BATCH"),
        (json.dumps({**KEYS, "LOG_WGT_WIDTH": 2}), "8-bit inputs and weights"),
        (json.dumps({**KEYS, "LOG_ACC_BUFF_SIZE": 20}), "ACC"),
    ],
)
def test_files_that_describe_no_machine_are_refused_in_words(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(TargetError, match=words):
        make(f"vta:config={file}")


def test_energies_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "energy.json"
    known = {"multiply_pj": 1, "add_pj": 0.5, "sram_word_pj": 20, "dram_word_pj": 1000}
    file.write_text(json.dumps(known))
    facts = vta(f"vta:energy={file}").machine.facts
    assert {key: facts[key] for key in known} == pytest.approx(known)
    for wrong, words in (({"add_pj": 1}, "nothing else"), ({**known, "add_pj": -1}, "number of picojoules")):
        file.write_text(json.dumps(wrong))
        with pytest.raises(TargetError, match=words):
            make(f"vta:energy={file}")


def test_what_it_says_of_its_machine_is_json() -> None:
    told = json.loads(json.dumps(describe(VtaTarget(count=2))))
    facts = told["machine"]["facts"]
    assert (facts["block"], facts["count"], facts["macs_per_cycle"], facts["LOG_BLOCK"]) == (16, 2, 256, 4)
    assert facts["times_and_energies"] == "modelled" and facts["dram_word_pj"] > 0
    assert {memory["name"]: memory["bytes"] for memory in told["machine"]["memories"]} == {
        "sram.uop": 1 << 15, "sram.inp": 1 << 15, "sram.wgt": 1 << 18, "sram.acc": 1 << 17,
    }  # fmt: skip
    assert told["offers"] and all(offer["quant"] in ("int8-pow2", None) for offer in told["offers"])


@pytest.mark.parametrize("target", ["vta", "vta:count=3"])
def test_a_quantized_network_runs_on_it(tmp_path: Path, target: str) -> None:
    path = residual(tmp_path / "m.onnx")
    executable = nestc.compile(path, targets=[target])
    assert [part.device for part in executable.plan.partitions] == ["vta"]
    found = executable(X)
    np.testing.assert_array_equal(found, run_qdq(nestc.load(path), {"x": X})["y"])
    assert found.std() > 10
    there, mark, back = executable.timeline()
    assert (mark["device"], mark["kind"]) == ("vta", "modelled") and mark["end_us"] > 0
    assert (there["device"], back["device"]) == ("host memory->vta", "vta->host memory")
    assert there["end_us"] == mark["start_us"] and mark["end_us"] == back["start_us"]
    (row,) = executable.profile(X)
    launch_us = executable.bundle.devices[0].launch_seconds * 1e6
    assert row["kind"] == "modelled"
    assert row["us"] + launch_us == pytest.approx(mark["end_us"] - mark["start_us"])
    assert executable.stats()["device_bytes"] > executable.stats()["weights_bytes"] > 0

    executable.save(tmp_path / "m.nest")
    with nestc.open(tmp_path / "m.nest") as again:
        np.testing.assert_array_equal(again(X), found)
        assert again.timeline() == [there, mark, back]


def test_the_cost_of_a_region_is_near_what_the_simulator_says(tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", [1, 64, 28, 28])
    a = net.conv(x, "a", 64, 64)
    net.output(net.conv(net.pool(net.conv(a, "b", 64, 96, stride=2), "p"), "y", 96, 40, size=1), [1, 40, 7, 7])
    executable = nestc.compile(net.save(tmp_path / "m.onnx"), targets=["vta"])
    layers = executable.bundle.partitions[0].artifact.metadata["timing"]["layers"]
    predicted = {region.name: region.predicted_ms for region in executable.plan.regions}
    for layer in layers[:2]:
        assert predicted[layer["name"]] == pytest.approx(layer["cycles"] / 100e6 * 1e3, rel=0.15)
    assert executable.plan.predicted_ms == pytest.approx(sum(each["cycles"] for each in layers) / 100e3, rel=0.2)


@pytest.mark.parametrize("target", ["vta", "vta:count=2"])
def test_what_is_not_proven_states_the_same_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    formed = form(pipeline.optimize(nestc.load(residual(tmp_path / "m.onnx"))))
    made = vta(target)
    taken = [region for region in regions(formed) if takes(made, region)]
    outputs = [value.name or "" for value in submodel(formed, [region.name for region in taken]).graph.outputs]
    (partition,) = partitions([taken], dict.fromkeys((r.name for r in taken), "vta"), outputs, lambda _: formed.ir)
    proven = made.compile(partition)
    for name in ("verify", "verify_kernel", "_require_apart"):
        monkeypatch.delattr(compiler, name)
    unproven = made.compile_unproven(partition)
    assert unproven.metadata == proven.metadata and unproven.files == proven.files
    assert [array.nbytes for array in unproven.weights.values()] == [a.nbytes for a in proven.weights.values()]


def test_parts_that_it_refuses_run_on_the_cpu_in_between(tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", [1, 20, 8, 8])
    a = net.conv(x, "a", 20, 24)
    net.nodes.append(onnx.helper.make_node("Softmax", [net.real(a)], ["soft"], axis=1))
    y = net.conv(net.quantize("soft", "b", -7), "y", 24, 24)
    net.output(y, [1, 24, 8, 8])
    executable = nestc.compile(net.save(tmp_path / "m.onnx"), targets=["vta"])
    assert [part.device for part in executable.plan.partitions] == ["vta", "cpu", "vta"]
    refused = next(region for region in executable.plan.regions if region.device == "cpu")
    assert "Softmax" in refused.refusals["vta"]
    on_cpu = nestc.compile(tmp_path / "m.onnx")(X)
    assert np.abs(executable(X).astype(int) - on_cpu).max() <= 3
    marks = [mark for mark in executable.timeline() if "bytes" not in mark]  # the others are tensors on their way
    assert [mark["kind"] for mark in marks] == ["modelled", "measured", "modelled"]
    assert all(one["end_us"] <= other["start_us"] + 1e-6 for one, other in itertools.pairwise(marks))


@pytest.mark.parametrize(
    "sizes",
    [
        {"LOG_UOP_BUFF_SIZE": 4},
        {"LOG_INP_BUFF_SIZE": 8},
        {"LOG_WGT_BUFF_SIZE": 12},
        {"LOG_ACC_BUFF_SIZE": 16},  # fewer accumulators than inputs: a micro-op names no more inputs than accumulators
        {"LOG_ACC_BUFF_SIZE": 10},
        {"LOG_BLOCK": 6, "LOG_WGT_BUFF_SIZE": 20, "LOG_INP_BUFF_SIZE": 16, "LOG_ACC_BUFF_SIZE": 18},
        {"LOG_BATCH": 2, "LOG_INP_BUFF_SIZE": 17, "LOG_ACC_BUFF_SIZE": 19},
    ],
    ids=str,
)
def test_machines_of_other_sizes_compute_the_same(tmp_path: Path, sizes: dict[str, int]) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps({**KEYS, **sizes}))
    path = residual(tmp_path / "m.onnx")
    executable = nestc.compile(path, targets=[f"vta:config={file}"])
    assert [part.device for part in executable.plan.partitions] == ["vta"]
    np.testing.assert_array_equal(executable(X), run_qdq(nestc.load(path), {"x": X})["y"])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"LOG_INP_BUFF_SIZE": 7}, "a window of 3 x 3 pixels does not fit VTA's input buffer of 8 elements"),
        ({"LOG_WGT_BUFF_SIZE": 11}, "9 taps do not fit VTA's weight buffer, which has 3 blocks beside its biases"),
    ],
)
def test_windows_that_no_buffer_holds_are_refused(tmp_path: Path, sizes: dict[str, int], words: str) -> None:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps({**KEYS, **sizes}))
    plan = nestc.compile(residual(tmp_path / "m.onnx"), targets=[f"vta:config={file}"]).plan
    assert plan.regions[0].device == "cpu" and plan.regions[0].refusals["vta"] == words


def test_a_mean_over_more_pixels_than_the_input_buffer_holds_is_refused(tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", [1, 20, 64, 64])
    net.nodes.append(onnx.helper.make_node("GlobalAveragePool", [net.real(x)], ["mean"]))
    net.output(net.quantize("mean", "y", -6), [1, 20, 1, 1])
    plan = nestc.compile(net.save(tmp_path / "m.onnx"), targets=["vta"]).plan
    assert "64 x 64 pixels does not fit VTA's input buffer" in plan.regions[0].refusals["vta"]


def test_a_float_model_stays_on_the_cpu_and_says_why(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["h"]), onnx.helper.make_node("Relu", ["h"], ["y"])]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "float",
        [value("x", onnx.TensorProto.FLOAT, [1, 4, 6, 6])],
        [value("y", onnx.TensorProto.FLOAT, [1, 8, 4, 4])],
        [onnx.numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float32), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    plan = nestc.compile(tmp_path / "m.onnx", targets=["vta"]).plan
    assert [region.device for region in plan.regions] == ["cpu"]
    assert "int8-pow2" in plan.regions[0].refusals["vta"]


@pytest.mark.parametrize("config", ["pynq_1x16x16", "two"])
def test_an_open_batch_is_compiled_for_each_size(tmp_path: Path, config: str) -> None:
    path = residual(tmp_path / "m.onnx", batch="N")
    if config == "two":
        config = str(tmp_path / "two.json")
        larger = {"LOG_BATCH": 1, "LOG_INP_BUFF_SIZE": 16, "LOG_ACC_BUFF_SIZE": 18}
        Path(config).write_text(json.dumps({**KEYS, **larger}))
    executable = nestc.compile(path, targets=[f"vta:config={config}"])
    one = nestc.compile(residual(tmp_path / "one.onnx"), targets=["vta"])
    for batch in (1, 2):
        x = np.random.default_rng(batch).integers(-128, 128, (batch, 20, 8, 8)).astype(np.int8)
        wanted = np.concatenate([one(sample[None]) for sample in x])
        np.testing.assert_array_equal(executable(x), wanted)


def test_a_bundle_that_was_altered_is_refused(tmp_path: Path) -> None:
    executable = nestc.compile(residual(tmp_path / "m.onnx"), targets=["vta"])
    (part,) = executable.bundle.partitions
    executable.save(tmp_path / "m.nest")
    data = bytearray((tmp_path / "m.nest").read_bytes())
    place = data.find(part.artifact.files["0.0.insn.bin"])
    assert place > 0
    data[place + 8] ^= 255
    (tmp_path / "m.nest").write_bytes(data)
    with pytest.raises(BundleError, match=r"insn.bin was altered"):
        nestc.open(tmp_path / "m.nest")
