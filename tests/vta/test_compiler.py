"""Hand-made layers through the whole pipeline: plan of memory, streams, metadata, and what the device computes."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from nestc.bundle.artifact import Artifact
from nestc.errors import TargetError
from nestc.runtime.vta.assembly import assemble
from nestc.runtime.vta.config import PRESETS, VtaConfig, from_json
from nestc.runtime.vta.device import VtaDevice
from nestc.runtime.vta.encode import decode, encode, encode_uops
from nestc.runtime.vta.simulate import simulate
from nestc.targets.vta.commands import files
from nestc.targets.vta.compiler import Network, compile_network
from nestc.targets.vta.layer import Clip, FeatureMap, Init, Layer, Product, Shift

CONFIG = PRESETS["pynq_1x16x16"]
Reference = Callable[[np.ndarray], np.ndarray]


def convolution(
    name: str, source: FeatureMap, target: str, channels: int, size: int, stride: int, config: VtaConfig = CONFIG
) -> tuple[Layer, Reference]:
    """A dense convolution with Relu, padded to keep its size, and the same in numpy, both from (N, C, H, W) int8."""
    generator = np.random.default_rng(len(name) + channels)
    block, pad, height = config.block, size // 2, -(-source.height // stride)
    weights = generator.integers(-128, 128, (channels, source.channels, size, size))
    outs, ins = -(-channels // block), -(-source.channels // block)
    full = np.zeros((outs * block, ins * block, size * size), np.int8)
    full[:channels, : source.channels] = weights.reshape(channels, source.channels, -1)
    blocks = full.reshape(outs, block, ins, block, -1).transpose(0, 2, 4, 1, 3).reshape(outs * ins, -1, block, block)
    bias = generator.integers(-5000, 5000, channels)
    shift = 9 + int(np.log2(source.channels * size * size) / 2)
    steps = (
        Init(bias + (1 << shift - 1)),
        Product(
            source.name,
            (stride, stride),
            tuple((y - pad, x - pad) for y in range(size) for x in range(size)),
            tuple((o, i) for o in range(outs) for i in range(ins)),
            blocks,
        ),
        Shift(np.array(shift)),
        Clip(0, 127),
    )

    def reference(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        total = np.zeros((x.shape[0], channels, height, height), np.int64) + bias[:, None, None] + (1 << shift - 1)
        end = (height - 1) * stride + 1
        for y in range(size):
            for z in range(size):
                window = padded[:, :, y : y + end : stride, z : z + end : stride]
                total += np.einsum("oi,nihw->nohw", weights[:, :, y, z], window)
        return np.clip(total >> shift, 0, 127).astype(np.int8)

    return Layer(
        name, FeatureMap(target, source.batch, channels, height, height), {source.name: source}, steps
    ), reference


def three(config: VtaConfig = CONFIG, batch: int = 1) -> tuple[Network, Reference]:
    """Three convolutions; ``z`` is another name of the last one's output."""
    x = FeatureMap("x", batch, 20, 10, 10)
    first, one = convolution("first", x, "a", 40, 3, 1, config)
    second, two = convolution("second", first.output, "b", 24, 3, 2, config)
    third, last = convolution("third", second.output, "c", 33, 1, 1, config)
    shape = (batch, 33, 5, 5)
    net = Network("vta_0", [first, second, third], {"z": "c"}, {"x": (batch, 20, 10, 10)}, {"c": shape, "z": shape})
    return net, lambda x: last(two(one(x)))


def ran(artifact: Artifact, x: np.ndarray) -> tuple[np.ndarray, float]:
    results, elapsed = VtaDevice().load(artifact, 1)([x], [None] * len(artifact.metadata["outputs"]))
    assert elapsed.kind == "modelled"
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    return results[0], elapsed.seconds


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_network_computes_what_its_layers_say_on_every_preset(preset: str, count: int) -> None:
    config = PRESETS[preset]
    net, reference = three(config)
    artifact = compile_network(net, config, count)
    x = numbers((1, 20, 10, 10))
    found, seconds = ran(artifact, x)
    np.testing.assert_array_equal(found, reference(x))
    timing = artifact.metadata["timing"]
    assert timing["kind"] == "modelled" and timing["cycles"] > 0 and timing["energy_joules"] > 0
    assert seconds == timing["seconds"] == timing["cycles"] / config.clock_hz
    assert [layer["name"] for layer in timing["layers"]] == ["first", "second", "third"]
    assert sum(layer["cycles"] for layer in timing["layers"]) == timing["cycles"]
    assert set(timing["engines"]) == {"load", "compute", "store"}
    assert all(0 < engine["utilization"] <= 1 for engine in timing["engines"].values())
    assert json.loads(json.dumps(artifact.metadata)) == artifact.metadata


def test_a_machine_with_a_batch_and_values_that_are_no_multiple_of_it() -> None:
    config = from_json({**CONFIG.to_json(), "LOG_BATCH": 1, "LOG_INP_BUFF_SIZE": 16, "LOG_ACC_BUFF_SIZE": 18}, "two")
    net, reference = three(config, batch=3)
    x = numbers((3, 20, 10, 10))
    np.testing.assert_array_equal(ran(compile_network(net, config), x)[0], reference(x))


def test_one_device_is_one_launch_and_several_share_each_layer() -> None:
    net, _ = three()
    one, several = (compile_network(net, CONFIG, count).metadata for count in (1, 4))
    assert [len(launch) for launch in one["launches"]] == [1]
    assert len(several["launches"]) == 3 and max(len(launch) for launch in several["launches"]) > 1
    assert several["timing"]["cycles"] < one["timing"]["cycles"]


def test_nothing_overlaps_in_memory_but_views_and_dead_values() -> None:
    net, _ = three()
    about = compile_network(net, CONFIG, 2).metadata
    spans = [
        (each["address"], each["bytes"]) for each in (*about["inputs"], *about["outputs"][:1], *about["constants"])
    ]
    spans += [(stream["address"], 16 * stream["count"]) for launch in about["launches"] for stream in launch]
    spans.append((about["uops"][0]["address"], 4))
    assert about["outputs"][1]["address"] == about["outputs"][0]["address"]
    spans.sort()
    assert spans[0][0] == 0x1000 and all(address % 4096 == 0 for address, _ in spans)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(spans))
    assert spans[-1][0] + spans[-1][1] <= about["dram_bytes"]


def test_a_partition_of_nothing_but_a_view() -> None:
    net = Network("vta_0", [], {"y": "x"}, {"x": (1, 20, 1, 1)}, {"y": (1, 20)})
    artifact = compile_network(net, CONFIG)
    x = numbers((1, 20, 1, 1))
    found, seconds = ran(artifact, x)
    np.testing.assert_array_equal(found, x.reshape(1, 20))
    assert seconds == 0 and artifact.metadata["timing"]["cycles"] == 0
    assert np.array_equal(arrays(files("vta_0", artifact)["vta_0.outputs.npz"])["y"].shape, (1, 20))


def test_a_value_seen_in_two_layouts_is_a_fault() -> None:
    first, _ = convolution("first", FeatureMap("x", 1, 16, 4, 4), "a", 16, 1, 1)
    second, _ = convolution("second", FeatureMap("a", 4, 16, 2, 2), "b", 16, 1, 1)
    net = Network("vta_0", [first, second], {}, {"x": (1, 16, 4, 4)}, {"b": (4, 16, 2, 2)})
    with pytest.raises(TargetError, match="layer second reads 'a'"):
        compile_network(net, CONFIG)


def arrays(data: bytes) -> Mapping[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as held:
        return dict(held)


@pytest.mark.parametrize("count", [1, 2])
def test_the_files_are_enough_for_a_replay(count: int) -> None:
    net, reference = three()
    artifact = compile_network(net, CONFIG, count)
    made = files("vta_0", artifact)
    suffixes = ("insn.bin", "uop.bin", "dram.bin", "json", "inputs.npz", "outputs.npz")
    assert set(made) == {f"vta_0.{suffix}" for suffix in suffixes}
    about = json.loads(made["vta_0.json"])
    inputs, outputs = arrays(made["vta_0.inputs.npz"]), arrays(made["vta_0.outputs.npz"])
    np.testing.assert_array_equal(outputs["c"], reference(inputs["x"]))
    np.testing.assert_array_equal(outputs["z"], outputs["c"])

    # Only what the files say: the memory image, and where instructions, inputs and outputs lie in it.
    config = from_json(about["config"], about["preset"])
    start = about["dram"]["address"]
    memory = np.concatenate([np.zeros(start, np.uint8), np.frombuffer(made["vta_0.dram.bin"], np.uint8)])
    assert len(made["vta_0.dram.bin"]) == about["dram"]["bytes"]
    for value in about["inputs"]:
        begin = value["address"]
        np.testing.assert_array_equal(memory[begin : begin + value["bytes"]], inputs[f"{value['name']}@dram"])
    for launch in about["instructions"]["launches"]:
        for stream in launch:
            begin = stream["address"]
            simulate(decode(memory[begin : begin + 16 * stream["count"]].tobytes(), config), config, memory)
    for value in about["outputs"]:
        begin = value["address"]
        np.testing.assert_array_equal(memory[begin : begin + value["bytes"]], outputs[f"{value['name']}@dram"])

    # The streams and micro-ops are in files of their own too, and weights where the description says.
    assert len(made["vta_0.insn.bin"]) == 16 * about["instructions"]["count"]
    begin = about["uops"]["address"]
    assert memory[begin : begin + 4 * about["uops"]["count"]].tobytes() == made["vta_0.uop.bin"]
    assert {each["name"] for each in about["weights"]} == {f"{name}/weights1" for name in ("first", "second", "third")}
    assert {each["name"] for each in about["biases"]} == {f"{name}/bias0" for name in ("first", "second", "third")}
    for each in (*about["weights"], *about["biases"], *about["constants"]):
        begin = each["address"]
        assert memory[begin : begin + each["bytes"]].tobytes() == artifact.weights[each["name"]].tobytes()


def test_emitted_commands_assemble_to_the_bits_of_the_artifact() -> None:
    net, _ = three()
    forms: dict[tuple[str, str], str] = {}
    artifact = compile_network(net, CONFIG, 1, lambda level, name, text: forms.update({(level, name): text}))
    assert set(forms) == {
        ("commands", "vta_0"), ("tensor", "vta_0_first"), ("tensor", "vta_0_second"), ("tensor", "vta_0_third"),
    }  # fmt: skip
    text = forms["commands", "vta_0"]
    assert "; layer second" in text
    stream = assemble(text, CONFIG)
    assert encode(stream.instructions, CONFIG) == artifact.files["0.0.insn.bin"]
    assert encode_uops(stream.uops, CONFIG) == artifact.files["uop.bin"]
