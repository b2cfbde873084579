"""Layouts over a whole graph: the least of all choices on small graphs, and what the choice does to networks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import nestc
from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, Layout
from nestc.kernels.families import alternatives
from nestc.partition import labelling
from nestc.targets.cpu import ways
from nestc.targets.cpu.assign import assign, cheapest
from nestc.targets.cpu.cost import conversion_seconds
from nestc.targets.cpu.layout import Option, same_bytes
from nestc.targets.cpu.machine import machine
from nestc.targets.cpu.target import CpuTarget
from nestc.targets.cpu.ways import distinct_ways
from nestc.tune.key import region_key
from nestc.tune.store import Tuned

BLOCKED = Layout(8)
SIZES = st.sampled_from([(1, 8, 4, 4), (1, 16, 30, 30), (1, 3, 100, 100), (1, 16, 1, 1), (1, 5, 1, 1)])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Option]], list[str], list[str], dict[str, TensorType]]:
    """Regions of one or two inputs, each with up to four options."""
    types = {"in": TensorType("float32", draw(SIZES))}
    options: list[list[Option]] = []
    for number in range(draw(st.integers(1, 6))):
        values = list(types)
        inputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True))
        output = f"v{number}"
        types[output] = TensorType("float32", draw(SIZES))
        region = Region(f"r{number}", None, (), tuple(inputs), (output,), types, {})
        every = list(itertools.product((PLAIN, BLOCKED), repeat=len(inputs) + 1))
        chosen = draw(st.lists(st.sampled_from(every), min_size=1, max_size=4, unique=True))
        options.append(
            [
                Option(region, None, dict(zip((*inputs, output), each, strict=True)), draw(st.floats(0, 1e-4)))
                for each in chosen
            ]
        )
    outputs = draw(st.lists(st.sampled_from(list(types)[1:]), min_size=1, max_size=2, unique=True))
    return options, ["in"], outputs, types


def spent(
    choice: Sequence[Option], inputs: Sequence[str], outputs: Sequence[str], types: dict[str, TensorType]
) -> float:
    """Seconds of kernels and of one conversion for each layout that a value is read in and not made in."""
    made = dict.fromkeys(inputs, PLAIN)
    wanted = {(name, PLAIN) for name in outputs}
    total = 0.0
    for option in choice:
        total += option.seconds
        wanted |= {(name, option.layout(name)) for name in option.region.inputs}
        made |= {name: option.layout(name) for name in option.region.outputs}
    for name, layout in wanted:
        if layout != made[name] and not same_bytes(types[name], made[name], layout):
            total += conversion_seconds(types[name], made[name], layout)
    return total


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_nothing_costs_less(problem: tuple[list[list[Option]], list[str], list[str], dict[str, TensorType]]) -> None:
    options, inputs, outputs, types = problem
    found = cheapest(options, inputs, outputs, types)
    least = min(spent(each, inputs, outputs, types) for each in itertools.product(*options))
    assert found.optimal
    assert found.seconds == pytest.approx(least, abs=1e-12)
    assert found.seconds == pytest.approx(spent(found.options, inputs, outputs, types), abs=1e-12)
    assert found.greedy_seconds == pytest.approx(spent([each[0] for each in options], inputs, outputs, types))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_where_tables_would_be_too_large_it_is_never_worse_than_greedy(
    problem: tuple[list[list[Option]], list[str], list[str], dict[str, TensorType]],
) -> None:
    options, inputs, outputs, types = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelling, "ENTRIES", 2)
        found = cheapest(options, inputs, outputs, types)
        assert found == cheapest(options, inputs, outputs, types)
    least = min(spent(each, inputs, outputs, types) for each in itertools.product(*options))
    assert least - 1e-12 <= found.seconds <= found.greedy_seconds
    if found.optimal:
        assert found.seconds == pytest.approx(least, abs=1e-12)


def weight(random: np.random.Generator, name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array((random.standard_normal(shape) / 8).astype(np.float32), name)


def channels_last() -> onnx.ModelProto:
    """A convolution over rows that come with channels last; bias and activation on a squeezed tensor, then a maximum."""
    random = np.random.default_rng(3)
    nodes = [
        helper.make_node("Softmax", ["x"], ["p"], axis=2),
        helper.make_node("Transpose", ["p"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["t", "w"], ["c"]),
        helper.make_node("Unsqueeze", ["c", "axis"], ["u"]),
        helper.make_node("Mul", ["u", "scale"], ["m"]),
        helper.make_node("Sigmoid", ["m"], ["s"]),
        helper.make_node("GlobalMaxPool", ["s"], ["y"]),
    ]
    constants = [
        weight(random, "w", 32, 64, 5),
        numpy_helper.from_array(np.array([3], np.int64), "axis"),
        weight(random, "scale", 1, 1, 60, 1),
    ]
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 64, 64))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 32, 1, 1))],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_explain_says_what_was_chosen(nestc: Callable[..., Any], tmp_path: Path) -> None:
    onnx.save(channels_last(), tmp_path / "net.onnx")
    assert nestc("compile", tmp_path / "net.onnx", "-o", tmp_path / "net.nest", "--threads", 1).status == 0
    told = nestc("explain", tmp_path / "net.nest").out
    assert "layouts of cpu_0: 0 conversions, modelled " in told and "proven best by this model" in told
    (report,) = json.loads(nestc("explain", tmp_path / "net.nest", "--json").out)["layouts"].values()
    assert report["conversions"] == 0 < report["greedy_conversions"]


def test_a_network_needs_fewer_conversions_than_greedy() -> None:
    model = channels_last()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((1, 64, 64)).astype(np.float32)
    with nestc.compile(model, targets=["cpu:arch=native"], threads=1) as executable:
        (found,) = executable.run({"x": x}).values()
        (partition,) = executable.bundle.partitions
        report = partition.artifact.metadata["layouts"]
    np.testing.assert_allclose(found, session.run(None, {"x": x})[0], rtol=0, atol=1e-5)
    assert report["conversions"] == 0 < report["greedy_conversions"]
    assert report["modelled_seconds"] < report["greedy_modelled_seconds"]
    assert report["optimal"]


# Ways and layouts together


def convolution(before: int, after: int, pixels: int) -> Region:
    """A 3x3 convolution of an image."""
    types = {
        "x": TensorType("float32", (1, before, pixels, pixels)),
        "w": TensorType("float32", (after, before, 3, 3)),
        "y": TensorType("float32", (1, after, pixels, pixels)),
    }
    op = Op("Conv", ("x", "w"), ("y",), {"pads": (1, 1, 1, 1), "kernel_shape": (3, 3)})
    zeros = {"w": lambda: np.zeros(types["w"].shape, np.float32)}
    return Region("r", "Conv", (op,), ("x",), ("y",), types, zeros)


def test_a_way_that_reads_what_is_there_is_taken_where_conversions_cost_more() -> None:
    """With blocks of 16, the map of 24 channels would have to be put into two blocks for Winograd's kernel."""
    avx512, region = machine("avx512"), convolution(24, 8, 56)
    chosen, *others = alternatives(region, avx512)
    assert chosen.name.startswith("winograd")
    pairs = [(region, chosen)]
    alone = assign(pairs, ["x"], ["y"], region.types, avx512)
    assert (alone.conversions, alone.other_ways) == (2, 0)
    joint = assign(pairs, ["x"], ["y"], region.types, avx512, {"r": others})
    assert (joint.conversions, joint.other_ways) == (1, 1)
    (option,) = joint.options
    assert option.family is not None and option.family.name == "conv"
    assert option.layouts == {"x": PLAIN, "y": Layout(16)}
    # By the same costs: the direct kernel and one conversion, against Winograd's and two.
    first, second = distinct_ways(region, chosen, others, avx512, 1.0)
    out = conversion_seconds(region.types["y"], Layout(16), PLAIN)
    into = conversion_seconds(region.types["x"], PLAIN, Layout(16))
    assert first.seconds < second.seconds
    assert joint.seconds == pytest.approx(second.seconds + out)
    assert joint.seconds < first.seconds + into + out
    assert joint.report()["other_ways"] == 1


def test_ways_that_want_nothing_else_are_not_offered() -> None:
    avx2 = machine("avx2")
    for region in (convolution(64, 64, 28), convolution(3, 32, 56)):
        chosen, *others = alternatives(region, avx2)
        assert others
        assert [way.family for way in distinct_ways(region, chosen, others, avx2, 1.0)] == [chosen]
        alone = assign([(region, chosen)], ["x"], ["y"], region.types, avx2)
        assert assign([(region, chosen)], ["x"], ["y"], region.types, avx2, {"r": others}) == alone
    region = convolution(24, 8, 56)
    chosen, *others = alternatives(region, machine("avx512"))
    assert len(distinct_ways(region, chosen, others, machine("avx512"), 0.0)) == 1


def test_measured_ways_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    target, region = CpuTarget("avx512"), convolution(24, 8, 56)
    assert len(target.ways(region)) > 1
    times = {family.name: 1.0 + number for number, family in enumerate(target.ways(region))}
    monkeypatch.setattr(target, "_tuned", Tuned({region_key(region): times}))
    assert [family.name for family in target.ways(region)] == [next(iter(times))]


def test_another_way_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ways made cheap, so that one is taken on every machine."""
    monkeypatch.setattr(ways, "MARGIN", 0.01)
    block = machine("native").lanes("float32")
    random = np.random.default_rng(0)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4, name="conv")],
        "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 2 * block - 4, 30, 30))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 16, 30, 30))],
        [weight(random, "w", 16, 2 * block - 4, 3, 3)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = random.standard_normal((1, 2 * block - 4, 30, 30)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with nestc.compile(model, targets=["cpu"], threads=1) as executable:
        (found,) = executable.run({"x": x}).values()
        report = executable.bundle.partitions[0].artifact.metadata
    np.testing.assert_allclose(found, session.run(None, {"x": x})[0], rtol=0, atol=1e-4)
    if block == 8:  # Winograd alone, for 12 channels
        assert (report["layouts"]["other_ways"], list(report["ways"].values())) == (1, ["conv"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_what_was_there_is_kept_where_nothing_costs_less(
    problem: tuple[list[list[Option]], list[str], list[str], dict[str, TensorType]],
) -> None:
    options, inputs, outputs, types = problem
    best = cheapest(options, inputs, outputs, types)
    start = [each.index(option) for each, option in zip(options, best.options, strict=True)]
    assert cheapest(options, inputs, outputs, types, start).options == best.options
    last = [len(each) - 1 for each in options]
    assert cheapest(options, inputs, outputs, types, last).seconds == pytest.approx(best.seconds, abs=1e-12)
