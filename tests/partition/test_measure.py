"""The meter: what it runs and how often, what it makes of the times, and what it does where nothing can be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import ANY

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

import nestc
from nestc.errors import TargetError, UnsupportedOp
from nestc.graph import pipeline
from nestc.graph.region import Op, Region, TensorType
from nestc.graph.regions import form, regions, submodel
from nestc.partition.costs import Chain
from nestc.partition.draw import CannotDraw, draw
from nestc.partition.match import takes
from nestc.partition.measure import Meter, attribute
from nestc.partition.repeat import LEAST_SECONDS, Effort, together
from nestc.partition.store import Entry, Key, ProfileStore
from nestc.targets import make
from nestc.targets.api import Artifact, Elapsed, Link, Machine, Offer, Partition, Target

QUICK = Effort(runs=5, seconds=0.0, longest=5.0)
US = 1e-6


@dataclass
class Step:
    """A row of a profile."""

    us: float
    origin: tuple[str, ...]
    team_us: float | None = None


class Scripted:
    """A target whose times are told: `seconds` a run of one region, by operator; a chain takes their sum less a third.

    ``_faults``: what to raise at compile, load, run or open. The elementwise operators of the tests are all it takes.
    """

    def __init__(
        self,
        seconds: Mapping[str, float | Iterator[float]] | None = None,
        *,
        name: str = "fake",
        watts: float = 0.0,
        kind: Literal["measured", "modelled"] = "measured",
        timing: Mapping[str, Any] | None = None,
        cost: Callable[[Region], float] | None = None,
        faults: Mapping[str, Exception] | None = None,
        steps: Sequence[Step] | None = None,
        facts: Mapping[str, Any] | None = None,
        ops: str = "Relu Neg Abs Gather",
    ) -> None:
        link = Link(7e-6, kind="estimated")
        self.name = name
        self.machine = Machine(name, (), ("float32",), facts or {}, link=link, watts=watts)
        self.offers = (Offer("all", frozenset(ops.split()), cost=cost),)
        self._seconds = dict(seconds or {})
        self._kind = kind
        self._timing = timing
        self._faults = dict(faults or {})
        self._steps = steps
        self._compiled: list[tuple[str, ...]] = []
        self._runs = 0
        self._closed = 0

    def compile(self, partition: Partition, emit: object = None) -> Artifact:
        ops = tuple(op.op_type for region in partition.regions for op in region.ops)
        self._compiled.append(ops)
        self._raise("compile", ops)
        metadata: dict[str, Any] = {"ops": ops, "inputs": len(partition.inputs), "outputs": len(partition.outputs)}
        if self._timing is not None:
            metadata["timing"] = self._timing
        return Artifact("fake", {}, {"w": np.zeros(10 * len(ops), np.float32)}, metadata)

    def open(self) -> Device:
        self._raise("open", ())
        return Device(self)

    def _raise(self, when: str, ops: tuple[str, ...]) -> None:
        fault = self._faults.get(when)
        if fault is not None and ops != ("Relu",):  # the smallest partition is always taken
            raise fault
        if f"{when} anything" in self._faults:
            raise self._faults[f"{when} anything"]


@dataclass
class Device:
    """The run side of a scripted target."""

    target: Scripted
    name: str = "fake"

    def load(self, artifact: Artifact, threads: int) -> Program:
        self.target._raise("load", artifact.metadata["ops"])
        return (Program if self.target._steps is None else Profiled)(self.target, artifact)


@dataclass
class Program:
    """Takes the time that it is told."""

    target: Scripted
    artifact: Artifact
    rows: list[int] = field(default_factory=list[int])

    def __call__(self, inputs: Sequence[np.ndarray], outputs: Sequence[object]) -> tuple[Sequence[np.ndarray], Elapsed]:
        target, ops = self.target, self.artifact.metadata["ops"]
        assert len(inputs) == self.artifact.metadata["inputs"] and len(outputs) == self.artifact.metadata["outputs"]
        target._runs += 1
        target._raise("run", ops)
        times = [target._seconds.get(op, US) for op in ops]
        seconds = sum(next(each) if isinstance(each, Iterator) else each for each in times)
        return [], Elapsed(seconds if len(ops) == 1 else seconds * 2 / 3, target._kind)

    def close(self) -> None:
        self.target._closed += 1


class Profiled(Program):
    """Can tell what its steps take."""

    def profile(self, inputs: Sequence[np.ndarray], runs: int) -> list[Step]:
        return list(self.target._steps or ())


def unary(op: str, x: str, y: str, type_: TensorType | None = None) -> Region:
    """A region of one operator; `type_` is that of its input."""
    types = {x: type_ or TensorType("float32", (2, 3)), y: TensorType("float32", (2, 3))}
    return Region(f"r_{op}_{y}", None, (Op(op, (x,), (y,), name=f"n_{y}"),), (x,), (y,), types, {})


def models(*given: Region) -> Callable[[Sequence[str]], ir.Model]:
    """The ONNX model of some of the regions given; what nobody of these reads is an output."""

    def model(names: Sequence[str]) -> ir.Model:
        chosen = [region for region in given if region.name in names]
        values = {
            name: ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((2, 3)))
            for region in chosen
            for name in region.types
        }
        nodes = [
            ir.Node("", op.op_type, [values[x] for x in op.inputs], outputs=[values[y] for y in op.outputs])
            for region in chosen
            for op in region.ops
        ]
        made = {name for region in chosen for name in region.outputs}
        read = {name for region in chosen for name in region.inputs}
        taken, left = [values[x] for x in sorted(read - made)], [values[y] for y in sorted(made - read)]
        return ir.Model(ir.Graph(taken, left, nodes=nodes, opset_imports={"": 24}), ir_version=10)

    return model


CHAIN = (unary("Relu", "x", "a"), unary("Neg", "a", "b"), unary("Abs", "b", "c"))


def meter(path: Path, **options: Any) -> Meter:
    return Meter(ProfileStore(path / "profiles.sqlite"), effort=QUICK, **options)


def measure(path: Path, target: Scripted, region: Region) -> Entry:
    return meter(path).region(target, region, models(region))


NEG = unary("Neg", "x", "y")


def test_the_median_of_runs_after_two_that_warm_up(tmp_path: Path) -> None:
    times = iter([9e-3, 8e-3, 5 * US, 1 * US, 3 * US, 4 * US, 2 * US, *[3 * US] * 100])
    target = Scripted({"Neg": times}, watts=20.0)
    told: list[str] = []
    found = meter(tmp_path, progress=told.append).region(target, NEG, models(NEG))
    # The first try has a spread of 2 of 3 us, so it is measured again, this time without.
    assert (found.seconds, found.spread, found.runs, found.kind) == (3 * US, 0.0, 5, "measured")
    assert (found.joules, found.energy_kind, found.bytes) == (pytest.approx(60 * US), "estimated", 40)
    assert told == [f"measure {NEG.name} on fake"]
    assert (target._runs, target._closed) == (13, 1)


def test_the_steadiest_of_three_tries_is_kept(tmp_path: Path) -> None:
    spreads = (4.0, 1.5, 2.0)
    times = [each * US for s in spreads for each in (5, 5 - s / 2, 5 - s / 2, 5, 5 + s / 2, 5 + s / 2)]
    target = Scripted({"Neg": iter([5 * US, *times])})
    found = measure(tmp_path, target, NEG)
    assert found.seconds == 5 * US
    assert found.spread == pytest.approx(1.5 * US)
    steadier = Scripted({"Neg": iter([each * US for each in (5, 5, 4.5, 4.5, 5, 5.5, 5.5)])})
    assert measure(tmp_path / "other", steadier, NEG).spread == pytest.approx(US)
    assert steadier._runs == 7


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    target = Scripted()
    first = meter(tmp_path)
    found = first.region(target, NEG, models(NEG))
    renamed = unary("Neg", "p", "q")
    assert first.region(target, renamed, models(renamed)) == found
    assert len(target._compiled) == 1
    later = Scripted()
    again = measure(tmp_path, later, renamed)
    assert (again.seconds, again.runs) == (found.seconds, found.runs) and again.at
    assert later._compiled == []
    assert measure(tmp_path, later, unary("Abs", "x", "y")).seconds == US
    assert later._compiled == [("Abs",)]
    second = Scripted(name="fake_2")
    second.machine = later.machine
    assert measure(tmp_path, second, NEG).at and second._compiled == []  # a second device of one kind


def test_programs_take_turns() -> None:
    order: list[str] = []

    def program(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return seconds

        return run

    found = together([program("a", 2.0), program("b", US), program("c", 3.0)], Effort(runs=3, seconds=0.0))
    assert [(each.seconds, each.spread, each.runs) for each in found] == [(2.0, 0.0, 3), (US, 0.0, 3), (3.0, 0.0, 3)]
    # Every first block begins with a run that does not count, and so does each of a program that caches help.
    assert "".join(order) == "aabbcc" + "bbca" + "cabb"
    assert together([], Effort()) == []


def test_devices_are_measured_side_by_side(tmp_path: Path) -> None:
    targets = [Scripted({"Neg": 2 * US}, name="one"), Scripted({"Neg": 3 * US}, name="two", ops="Neg")]
    targets[1].machine = Machine("two", (), ("float32",))
    measured = meter(tmp_path)
    known = measured.region(targets[0], NEG, models(NEG))
    found = measured.regions(targets, NEG, models(NEG))
    assert {name: entry.seconds for name, entry in found.items()} == {"one": 2 * US, "two": 3 * US}
    assert found["one"] == known and targets[0]._compiled == [("Neg",)]
    chains = measured.chains([(targets[0], CHAIN), (targets[1], CHAIN[1:]), (targets[1], CHAIN[1:2])], models(*CHAIN))
    assert [sum(entry.seconds for entry in chain.values()) for chain in chains] == pytest.approx(
        [8 / 3 * US, 8 / 3 * US, 3 * US]
    )
    assert measured.chain(targets[0], CHAIN, models(*CHAIN)) == chains[0]
    assert sum(len(ops) > 1 for target in targets for ops in target._compiled) == 2


def test_a_device_that_refuses_does_not_hinder_others(tmp_path: Path) -> None:
    refusing = Scripted(name="one", faults={"run": TargetError("out of memory")}, facts={"another": True})
    modelled = Scripted(name="three", timing={"seconds": 1e-3}, facts={"a third": True})
    targets = [refusing, Scripted(name="two"), modelled]
    found = meter(tmp_path).regions(targets, NEG, models(NEG))
    assert [entry.refusal for entry in found.values()] == ["out of memory", None, None]
    assert [entry.kind for entry in found.values()][1:] == ["measured", "modelled"]
    assert [target._closed for target in targets] == [1, 1, 0]


def test_a_time_that_the_clock_does_not_see_is_not_zero(tmp_path: Path) -> None:
    assert measure(tmp_path, Scripted({"Neg": 0.0}), NEG).seconds == LEAST_SECONDS


def test_a_run_that_takes_long_is_the_only_one(tmp_path: Path) -> None:
    target = Scripted({"Neg": 3.0})
    slow = Meter(ProfileStore(tmp_path / "profiles.sqlite"), effort=Effort(runs=5, seconds=0.0, longest=0.0))
    found = slow.region(target, NEG, models(NEG))
    assert (found.seconds, found.runs, target._runs) == (3.0, 1, 1)


@pytest.mark.parametrize("when", ["compile", "load", "run"])
@pytest.mark.parametrize("error", [TargetError("it has no such thing"), UnsupportedOp("it has no such thing")])
def test_refusals_are_kept_with_their_words(tmp_path: Path, when: str, error: Exception) -> None:
    target = Scripted(faults={when: error}, cost=lambda region: 1.0)
    found = measure(tmp_path, target, NEG)
    assert found.refusal == "it has no such thing"
    assert found.kind != "estimated"
    later = Scripted()
    assert measure(tmp_path, later, NEG).refusal == "it has no such thing"
    assert later._compiled == []
    assert target._closed == {"compile": 0, "load": 1, "run": 1}[when]


@pytest.mark.parametrize("when", ["open", "load anything"])
def test_a_device_that_is_not_here_is_estimated_and_marked(tmp_path: Path, when: str) -> None:
    target = Scripted(faults={when: TargetError("no card")}, cost=lambda region: 3e-3, watts=2.0)
    found = measure(tmp_path, target, NEG)
    assert (found.seconds, found.kind, found.joules, found.refusal) == (3e-3, "estimated", 6e-3, None)
    assert "not here: no card" in found.note
    # The device may be here next time, so nothing was stored.
    assert measure(tmp_path, Scripted({"Neg": 5 * US}), NEG).seconds == 5 * US


def test_a_device_that_is_not_here_and_says_nothing_is_refused(tmp_path: Path) -> None:
    found = measure(tmp_path, Scripted(faults={"open": TargetError("no card")}), NEG)
    assert found.refusal is not None and "no card" in found.refusal and "no cost" in found.refusal
    assert measure(tmp_path, Scripted({"Neg": 5 * US}), NEG).refusal is None


def test_what_the_compiler_modelled_is_taken_and_nothing_runs(tmp_path: Path) -> None:
    target = Scripted(timing={"seconds": 4e-5, "energy_joules": 3e-9}, watts=50.0)
    found = measure(tmp_path, target, NEG)
    assert (found.seconds, found.kind, found.joules, found.energy_kind) == (4e-5, "modelled", 3e-9, "modelled")
    assert (found.bytes, target._runs) == (40, 0)
    assert measure(tmp_path, Scripted(), NEG).kind == "modelled"


def test_a_simulator_runs_once(tmp_path: Path) -> None:
    target = Scripted({"Neg": 4e-5}, kind="modelled")
    found = measure(tmp_path, target, NEG)
    assert (found.seconds, found.kind, target._runs) == (4e-5, "modelled", 1)


def test_a_chain_is_shared_by_what_its_steps_take(tmp_path: Path) -> None:
    seconds = {"Relu": 6 * US, "Neg": 6 * US, "Abs": 3 * US}  # 10 us in all
    steps = [
        Step(1, ("Identity:layout_0_8",)),
        Step(1, ("Relu:n_a",), team_us=0.5),
        Step(2, ("Neg:n_b", "Abs:elsewhere")),
        Step(1, ("Identity:layout_8_0",)),
        Step(0.25, ("Abs:n_c",)),
        Step(0.25, ("Identity:layout_0_8",)),
    ]
    target = Scripted(seconds, steps=steps, watts=10.0)
    found = meter(tmp_path).chain(target, CHAIN, models(*CHAIN))
    assert [entry.seconds for entry in found.values()] == pytest.approx([3 * US, 4 * US, 3 * US])
    assert sum(entry.joules or 0.0 for entry in found.values()) == pytest.approx(100 * US)
    assert list(found) == [region.name for region in CHAIN]
    assert target._compiled == [("Relu", "Neg", "Abs")]
    later = Scripted(seconds, watts=20.0)
    again = meter(tmp_path).chain(later, CHAIN, models(*CHAIN))
    assert [entry.seconds for entry in again.values()] == [entry.seconds for entry in found.values()]
    assert sum(entry.joules or 0.0 for entry in again.values()) == pytest.approx(200 * US)
    assert later._compiled == []


def test_a_chain_is_shared_by_times_alone_where_steps_are_not_known(tmp_path: Path) -> None:
    target = Scripted({"Relu": 6 * US, "Neg": 6 * US, "Abs": 3 * US})
    found = meter(tmp_path).chain(target, CHAIN, models(*CHAIN))
    assert [entry.seconds for entry in found.values()] == pytest.approx([4 * US, 4 * US, 2 * US])
    assert sorted(target._compiled) == sorted([("Relu", "Neg", "Abs"), ("Relu",), ("Neg",), ("Abs",)])


def test_a_modelled_chain_sums_to_its_artifacts_time(tmp_path: Path) -> None:
    target = Scripted(timing={"seconds": 6e-5, "energy_joules": 3e-9})
    found = meter(tmp_path).chain(target, CHAIN, models(*CHAIN))
    assert [(entry.seconds, entry.kind) for entry in found.values()] == [(pytest.approx(2e-5), "modelled")] * 3
    assert sum(entry.joules or 0.0 for entry in found.values()) == pytest.approx(3e-9)


def test_a_chain_of_one_is_the_region_alone(tmp_path: Path) -> None:
    measured = meter(tmp_path)
    target = Scripted({"Neg": 2 * US})
    assert measured.chain(target, (NEG,), models(NEG)) == {NEG.name: measured.region(target, NEG, models(NEG))}
    assert target._compiled == [("Neg",)]


def test_what_leaves_a_chain_makes_it_another(tmp_path: Path) -> None:
    target = Scripted()
    measured = meter(tmp_path)
    other = unary("Neg", "a", "d")  # reads what the chain computes inside, and is not in it
    measured.chain(target, CHAIN[:2], models(*CHAIN[:2]))
    measured.chain(target, CHAIN[:2], lambda names: models(*CHAIN[:2])(names))
    before = len(target._compiled)

    def both(names: Sequence[str]) -> ir.Model:
        model = models(*CHAIN[:2], other)(names)
        model.graph.outputs.append(next(value for node in model.graph for value in node.outputs if value.name == "a"))
        return model

    measured.chain(target, CHAIN[:2], both)
    assert target._compiled[before:] == [("Relu", "Neg")]


def test_a_chain_that_is_refused_is_refused_for_each(tmp_path: Path) -> None:
    target = Scripted(faults={"compile": TargetError("too long")})
    found = meter(tmp_path).chain(target, CHAIN, models(*CHAIN))
    assert [entry.refusal for entry in found.values()] == ["too long"] * 3
    later = Scripted()
    meter(tmp_path).chain(later, CHAIN, models(*CHAIN))
    assert later._compiled == []


def test_a_chain_on_a_device_that_is_not_here_is_estimated_region_by_region(tmp_path: Path) -> None:
    cost = {"Relu": 1e-3, "Neg": 2e-3, "Abs": 3e-3}
    target = Scripted(faults={"open": TargetError("no card")}, cost=lambda region: cost[region.ops[0].op_type])
    found = meter(tmp_path).chain(target, CHAIN, models(*CHAIN))
    assert [(entry.seconds, entry.kind) for entry in found.values()] == [
        (1e-3, "estimated"),
        (2e-3, "estimated"),
        (3e-3, "estimated"),
    ]


def test_steps_of_nodes_that_share_a_name_go_with_the_next() -> None:
    twice = [unary("Neg", "x", "y"), unary("Neg", "y", "z")]
    twice = [Region(r.name, None, (Op("Neg", r.inputs, r.outputs),), r.inputs, r.outputs, r.types, {}) for r in twice]
    steps = [Step(1, ("Neg:",)), Step(2, ("Abs:n_c",))]
    assert attribute(steps, [*twice, CHAIN[2]]) == pytest.approx((0.0, 0.0, 3 * US))
    assert attribute(steps[:1], twice) == (0.0, 0.0)


def test_a_launch_is_what_the_call_takes_beside_the_program(tmp_path: Path) -> None:
    target = Scripted({"Relu": 0.0})
    measured = meter(tmp_path)
    found = measured.launch(target)
    assert 0 < found.seconds < 1e-2 and found.kind == "measured" and found.runs >= 5
    assert measured.launch(target) == found
    assert target._compiled == [("Relu",)]
    later = Scripted()
    assert meter(tmp_path).launch(later).seconds == found.seconds and later._compiled == []


@pytest.mark.parametrize(
    "target",
    [
        Scripted(faults={"open": TargetError("no card")}),
        Scripted(ops="Conv"),
        Scripted(facts={"times_and_energies": "modelled"}),
        Scripted(timing={"seconds": 1e-5}),
        Scripted(kind="modelled"),
    ],
)
def test_a_launch_that_cannot_be_measured_is_what_the_link_says(tmp_path: Path, target: Scripted) -> None:
    found = meter(tmp_path).launch(target)
    assert (found.seconds, found.kind) == (7e-6, "estimated")


def partition(*given: Region) -> Partition:
    types = {name: type_ for region in given for name, type_ in region.types.items()}
    inputs = tuple(name for region in given for name in region.inputs)
    return Partition("p", "fake", given, inputs, given[-1].outputs, types, lambda: models(*given)([]))


def test_inputs_are_of_their_types_and_valid_where_they_index() -> None:
    types = {
        "data": TensorType("float32", (5, 7)),
        "index": TensorType("int64", (400,)),
        "out": TensorType("float32", (5, 400)),
    }
    gather = Region(
        "g", None, (Op("Gather", ("data", "index"), ("out",), {"axis": 1}),), ("data", "index"), ("out",), types, {}
    )
    (data, index), sure = draw(partition(gather))
    assert sure and data.dtype == np.float32 and abs(float(data.mean())) < 1
    assert set(index.tolist()) == set(range(7))
    again, _ = draw(partition(gather))
    assert np.array_equal(again[0], data)
    for dtype, least, most, certain in (("int8", -128, 127, True), ("uint8", 0, 255, True), ("int64", 1, 2, False)):
        region = unary("Neg", "x", "y", TensorType(dtype, (3000,)))
        (array,), sure = draw(partition(region))
        assert (array.dtype, int(array.min()), int(array.max()), sure) == (np.dtype(dtype), least, most, certain)
    (array,), _ = draw(partition(unary("Neg", "x", "y", TensorType("bfloat16", (4,)))))
    assert array.dtype.name == "bfloat16"
    (array,), _ = draw(partition(unary("Neg", "x", "y", TensorType("bool", (4,)))))
    assert array.dtype == np.bool_


def test_indices_that_are_computed_first_are_zero() -> None:
    types = {"i": TensorType("int64", (3,)), "j": TensorType("int64", (3,)), "d": TensorType("float32", (2,))}
    ops = (Op("Abs", ("i",), ("j",)), Op("Gather", ("d", "j"), ("o",)))
    region = Region("g", None, ops, ("i", "d"), ("o",), {**types, "o": TensorType("float32", (3,))}, {})
    (index, _), _ = draw(partition(region))
    assert index.tolist() == [0, 0, 0]


@pytest.mark.parametrize("type_", [TensorType("float32", (2, -1)), TensorType("sequence(float32)", ())])
def test_inputs_that_cannot_be_made_up_leave_an_estimate(tmp_path: Path, type_: TensorType) -> None:
    region = unary("Neg", "x", "y", type_)
    with pytest.raises(CannotDraw, match="'x'"):
        draw(partition(region))
    target = Scripted(cost=lambda region: 2e-3, facts={"dynamic_shapes": True})
    found = measure(tmp_path, target, region)
    assert (found.seconds, found.kind) == (2e-3, "estimated") and "'x'" in found.note


def test_values_that_may_not_suit_are_no_reason_to_refuse(tmp_path: Path) -> None:
    region = unary("Neg", "x", "y", TensorType("int64", (4,)))
    found = measure(tmp_path, Scripted(faults={"run": TargetError("out of range")}), region)
    assert (found.kind, found.refusal) == ("estimated", None)
    assert found.seconds > 0 and "out of range" in found.note


def small_net() -> nestc.Model:
    """A convolution with Relu, a mean over places, and a matrix product, in float32."""
    random = np.random.default_rng(0)
    arrays = {
        "w": random.standard_normal((16, 16, 3, 3)) / 12,
        "b": random.standard_normal(16) / 4,
        "m": random.standard_normal((16, 64)) / 4,
    }
    nodes = [
        oh.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1] * 4),
        oh.make_node("Relu", ["c"], ["r"], "relu"),
        oh.make_node("GlobalAveragePool", ["r"], ["g"], "mean"),
        oh.make_node("Flatten", ["g"], ["f"], "flatten"),
        oh.make_node("MatMul", ["f", "m"], ["y"], "product"),
    ]
    weights = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    ends = [oh.make_tensor_value_info("x", 1, (1, 16, 8, 8))], [oh.make_tensor_value_info("y", 1, (1, 64))]
    graph = oh.make_graph(nodes, "net", *ends, weights)
    return nestc.load(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 20)], ir_version=9))


def quantized(scheme: str) -> nestc.Model:
    net = small_net()
    if scheme == "bf16":
        return nestc.quantize(net, None, scheme=scheme)
    images = [{"x": np.random.default_rng(seed).standard_normal((1, 16, 8, 8)).astype(np.float32)} for seed in range(4)]
    return nestc.quantize(net, nestc.calibrate(net, images), scheme=scheme)


@pytest.mark.parametrize(
    ("text", "scheme", "kind"),
    [("cpu:threads=1", "int8-pow2", "measured"), ("vta", "int8-pow2", "modelled"), ("aim", "bf16", "modelled")],
)
def test_a_network_is_measured_where_its_regions_are_taken(tmp_path: Path, text: str, scheme: str, kind: str) -> None:
    target: Target = make(text)
    formed = form(pipeline.optimize(quantized(scheme)))
    taken = [region for region in regions(formed) if takes(target, region)]
    assert taken

    def models(names: Sequence[str]) -> ir.Model:
        return submodel(formed, names)

    measured = meter(tmp_path)
    alone = {region.name: measured.region(target, region, models) for region in taken}
    for region in taken:
        entry = alone[region.name]
        assert entry.refusal is None and entry.kind == kind and entry.seconds > 0
        if kind == "modelled":  # a value that only gets another shape takes none
            assert entry.energy_kind == "modelled" and entry.joules is not None
            assert entry.joules > 0 or entry.seconds == LEAST_SECONDS
        else:
            assert entry.energy_kind == "estimated" and (entry.joules or 0.0) == target.machine.watts * entry.seconds
        assert entry.bytes > 0 or not region.constants
    launch = measured.launch(target)
    assert launch.kind == "measured" if kind == "measured" else launch.kind != "measured"
    if text.startswith("cpu"):
        chain = measured.chain(target, taken, models)
        assert list(chain) == list(alone) and all(entry.seconds > 0 for entry in chain.values())
        assert len(taken) == len(regions(formed))
    again = meter(tmp_path)
    kept = [again.store.get(Key(again._hash(region, models), again._fingerprint(target))) for region in taken]
    assert [entry and entry.seconds for entry in kept] == [alone[region.name].seconds for region in taken]


def test_the_rest_of_a_network_goes_through_the_caches_before_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[int] = []
    monkeypatch.setattr("nestc.partition.measure.evict", touched.append)
    target = Scripted({"Neg": iter([US, *[2 * US] * 6, *[3 * US] * 99])})
    measured = meter(tmp_path)
    alone = measured.region(target, NEG, models(NEG), network=100_000)
    assert (alone.seconds, set(touched)) == (2 * US, {0})
    touched.clear()
    beside = measured.region(target, NEG, models(NEG), network=3 << 20)  # another measurement
    assert (beside.seconds, set(touched)) == (3 * US, {2 << 20})
    touched.clear()
    again = meter(tmp_path)  # from the store: a network of about the same size is the same measurement
    assert again.region(target, NEG, models(NEG), network=(4 << 20) - 1).seconds == 3 * US
    assert again.region(target, NEG, models(NEG)).seconds == 2 * US
    assert touched == []
    measured.chain(target, CHAIN, models(*CHAIN), network=5 << 20)
    measured.launch(target, network=40 << 20)
    assert set(touched) == {4 << 20, 16 << 20}


def test_a_simulator_has_no_caches_to_be_evicted(tmp_path: Path) -> None:
    target = Scripted(timing={"seconds": 1e-3}, facts={"times_and_energies": "modelled"})
    measured = meter(tmp_path)
    found = [measured.region(target, NEG, models(NEG), network) for network in (0, 1 << 20, 1 << 30)]
    assert found[0] == found[1] == found[2] and target._compiled == [("Neg",)]


def test_partitions_of_several_plans_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def told(name: str) -> Iterator[float]:
        while True:
            order.append(name)
            yield {"n": 2 * US, "r": 4 * US}[name]

    target = Scripted({"Neg": told("n"), "Relu": told("r"), "Abs": US})
    chains = [Chain(target, CHAIN[:1], models(*CHAIN), 0), Chain(target, CHAIN[1:], models(*CHAIN), 0)]
    measured = meter(tmp_path)
    found = measured.compare(chains)
    assert [each.seconds for each in found] == pytest.approx([4 * US, 2 * US])
    turns = "".join(order)
    assert "rn" in turns and "nr" in turns
    assert [each.seconds for each in measured.chain(target, CHAIN[:1], models(*CHAIN)).values()] == [4 * US]
    order.clear()
    assert meter(tmp_path).compare(chains) == [replace(each, at=ANY, version=ANY) for each in found]  # from the store
    assert order == []
    meter(tmp_path).compare(chains[:1])  # beside others it is another measurement
    assert order


def test_of_several_rounds_the_fastest_counts() -> None:
    def program(times: Sequence[float]) -> Callable[[], float]:
        left = iter(times)
        return lambda: next(left)

    # Each round begins with a run that warms up.
    times = [9.0, 5.0, 5.0, 5.0, 9.0, 3.0, 3.0, 3.0, 9.0, 4.0, 4.0, 4.0]
    (found,) = together([program(times)], Effort(runs=3, seconds=0.0, rounds=3))
    assert (found.seconds, found.runs) == (3.0, 3)
