"""Concatenation without a copy: where parts lie, what stays a layer, and that networks compute the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.device import VtaDevice
from nestc.targets.vta.compiler import Network, compile_network
from nestc.targets.vta.concat import Part, join
from nestc.targets.vta.evaluate import evaluate
from nestc.targets.vta.layer import Clip, FeatureMap, Init, Layer, Product, Shift

CONFIG = VtaConfig()


def conv(name: str, source: FeatureMap, output: FeatureMap, seed: int) -> Layer:
    random = np.random.default_rng(seed)
    outs, ins = -(-output.channels // 16), -(-source.channels // 16)
    weights = random.integers(-128, 128, (outs * ins, 1, 16, 16), np.int8)
    weights[-1, :, :, source.channels % 16 or 16 :] = 0
    pairs = tuple((o, i) for o in range(outs) for i in range(ins))
    steps = (Init(np.array(64)), Product(source.name, (1, 1), ((0, 0),), pairs, weights), Shift(np.array(7)))
    return Layer(name, output, {source.name: source}, (*steps, Clip(-128, 127)))


def concat(name: str, sources: list[FeatureMap], output: FeatureMap) -> Layer:
    """A layer as regions of Concat become, with one-hot weights wherever channels come to lie."""
    steps: list[Init | Product] = [Init(np.array(0))]
    first = 0
    for source in sources:
        blocks: dict[tuple[int, int], np.ndarray] = {}
        for channel in range(source.channels):
            pair = ((first + channel) // 16, channel // 16)
            blocks.setdefault(pair, np.zeros((1, 16, 16), np.int8))[0, (first + channel) % 16, channel % 16] = 1
        pairs = tuple(sorted(blocks))
        steps.append(Product(source.name, (1, 1), ((0, 0),), pairs, np.stack([blocks[pair] for pair in pairs])))
        first += source.channels
    return Layer(name, output, {source.name: source for source in sources}, tuple(steps))


def network(sizes: list[int]) -> tuple[list[Layer], FeatureMap]:
    x = FeatureMap("x", 1, 16, 3, 4)
    maps = [FeatureMap(f"part{k}", 1, size, 3, 4) for k, size in enumerate(sizes)]
    whole = FeatureMap("whole", 1, sum(sizes), 3, 4)
    layers = [conv(f"conv{k}", x, map_, k) for k, map_ in enumerate(maps)]
    layers.append(concat("join", maps, whole))
    layers.append(conv("last", whole, FeatureMap("y", 1, 16, 3, 4), 9))
    return layers, x


def check(layers: list[Layer], x: FeatureMap, outputs: tuple[str, ...]) -> list[str]:
    """Run on the machine and compare with the meaning of the layers; returns the names of layers that were run."""
    shapes = {layer.output.name: layer.output for layer in layers}
    borders = {n: (1, shapes[n].channels, shapes[n].height, shapes[n].width) for n in outputs}
    net = Network("net", layers, {}, {"x": (1, x.channels, x.height, x.width)}, borders)
    artifact = compile_network(net, CONFIG)
    values = {"x": np.random.default_rng(3).integers(-128, 128, (1, 16, 3, 4), np.int8)}
    found, _ = VtaDevice().load(artifact, 1)([values["x"]], [None] * len(outputs))
    for layer in layers:
        values[layer.output.name] = evaluate(layer, values)
    for name, array in zip(outputs, found, strict=True):
        assert np.array_equal(array, values[name])
    return [layer["name"] for layer in artifact.metadata["timing"]["layers"]]


@pytest.mark.parametrize("sizes", [[16, 32], [32, 16, 5], [16, 16]])
def test_parts_are_written_in_place(sizes: list[int]) -> None:
    layers, x = network(sizes)
    kept, parts = join(layers, ["x"], CONFIG)
    assert "join" not in [layer.name for layer in kept]
    first = np.cumsum([0, *sizes[:-1]]) // 16
    assert parts == {f"part{k}": Part("whole", int(place) * 12 * 16) for k, place in enumerate(first)}
    assert "join" not in check(layers, x, ("y",))
    check(layers, x, ("whole", "part1", "y"))


def test_parts_that_begin_inside_a_block_are_copied() -> None:
    layers, x = network([5, 16])
    assert join(layers, ["x"], CONFIG) == (tuple(layers), {})
    assert "join" in check(layers, x, ("y",))


def test_a_part_of_two_wholes_is_copied_to_the_second() -> None:
    layers, x = network([16, 16])
    again = FeatureMap("again", 1, 32, 3, 4)
    layers.append(concat("join2", [layers[1].output, layers[0].output], again))
    kept, parts = join(layers, ["x"], CONFIG)
    assert [layer.name for layer in kept] == ["conv0", "conv1", "last", "join2"]
    assert set(parts) == {"part0", "part1"}
    check(layers, x, ("again", "y"))


def test_images_that_do_not_lie_in_one_piece_are_copied() -> None:
    layers, _ = network([16, 16])
    many = [
        replace(
            layer,
            output=replace(layer.output, batch=2),
            sources={k: replace(m, batch=2) for k, m in layer.sources.items()},
        )
        for layer in layers
    ]
    assert join(many, ["x"], CONFIG) == (tuple(many), {})
    assert join(many, ["x"], replace(CONFIG, log_batch=1))[1].keys() == {"part0", "part1"}


def test_an_input_is_copied() -> None:
    layers, x = network([16])
    whole = FeatureMap("with_input", 1, 32, 3, 4)
    layers.append(concat("join2", [x, layers[0].output], whole))
    assert "join2" in [layer.name for layer in join(layers, ["x"], CONFIG)[0]]
    check(layers, x, ("with_input", "y"))


def test_a_whole_inside_a_whole() -> None:
    layers, x = network([16, 16])
    outer = FeatureMap("outer", 1, 48, 3, 4)
    layers.append(conv("more", x, FeatureMap("more", 1, 16, 3, 4), 5))
    layers.append(concat("join2", [FeatureMap("more", 1, 16, 3, 4), layers[2].output], outer))
    assert join(layers, ["x"], CONFIG)[1]["whole"] == Part("outer", 16 * 12)
    assert not {"join", "join2"} & set(check(layers, x, ("outer", "y")))
