"""Sums and products of values in registers and banks: bit by bit what 16-bit arithmetic gives, from layers to networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aim_nets import BFLOAT16, Net, regions
from hypothesis import given, settings
from hypothesis import strategies as st
from machines_small import small
from onnx import TensorProto

import nestc
from nestc.bundle.artifact import Artifact
from nestc.errors import BundleError, TargetError
from nestc.graph.region import Op, Region, TensorType
from nestc.runtime.aim.commands import EwAdd, EwMul, RdSbk, ReadGpr, Sync, WrSbk
from nestc.runtime.aim.device import BANKS, AimDevice
from nestc.runtime.aim.machine import AimMachine, preset
from nestc.runtime.aim.simulate import NUMBERS, Machine
from nestc.runtime.aim.timing import simulate_timing
from nestc.targets.aim.compiler import ElementLaunch, Program, compile_layers
from nestc.targets.aim.cost import element_ticks
from nestc.targets.aim.elementwise import Elementwise, Step, plan
from nestc.targets.aim.gates import MOST_ELEMENTS, read_elements
from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.mapping import Mapping as Chosen
from nestc.targets.aim.offers import offers
from nestc.targets.aim.regions import Refused
from nestc.tensor import interp

HALF = TensorProto.FLOAT16


def expected(layer: Elementwise, inputs: Mapping[str, np.ndarray], number: str) -> dict[str, np.ndarray]:
    """The outputs in numpy's arithmetic of 16 bits, where each operation is rounded once."""
    form = NUMBERS[number]
    values = {name: array.astype(form) for name, array in (*inputs.items(), *layer.constants.items())}
    for step in layer.steps:
        a, b = values[step.left], values[step.right]
        values[step.result] = a * b if step.op == "mul" else a + b
    return {name: values[name] for name in layer.outputs}


def run(launch: ElementLaunch, program: Program, machine: AimMachine, number: str, inputs: Any) -> list[np.ndarray]:
    state = Machine(machine, number, memory=program.memory.copy())
    state.gpr[: len(program.registers)] = program.registers
    writes = launch.layout.pack([inputs[name] for name in launch.layer.inputs])
    return launch.layout.unpack(state.run(launch.commands, writes))


def require_legal(launch: ElementLaunch, machine: AimMachine) -> None:
    """What RD_SBK brings is waited for before it is used, and products are not read before they are there."""
    coming: set[int] = set()
    for command in launch.commands:
        used: set[int] = set()
        count = command.mask.bit_count() if isinstance(command, (WrSbk, RdSbk)) else 1
        if isinstance(command, (WrSbk, ReadGpr)):
            used = set(range(command.gpr, command.gpr + count))
        elif isinstance(command, EwAdd):
            used = {command.gpr, command.other}
        elif isinstance(command, Sync):
            coming.clear()
        assert not used & coming
        if isinstance(command, RdSbk):
            coming |= set(range(command.gpr, command.gpr + count))
        if isinstance(command, (WrSbk, RdSbk, EwMul)):
            assert launch.row <= command.row < launch.row + launch.rows


@st.composite
def layers(draw: st.DrawFn) -> Elementwise:
    """Any steps on inputs, constants and results before; any results are read, and all that nothing else uses."""
    elements = draw(st.integers(1, 200))
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    names = [f"x{i}" for i in range(draw(st.integers(1, 3)))]
    constants = {
        f"k{i}": generator.standard_normal(elements).astype(np.float32) for i in range(draw(st.integers(0, 2)))
    }
    known, steps = [*names, *constants], list[Step]()
    for index in range(draw(st.integers(1, 6))):
        left = draw(st.sampled_from([name for name in known if name not in constants]))
        steps.append(Step(draw(st.sampled_from(["mul", "add"])), left, draw(st.sampled_from(known)), f"r{index}"))
        if draw(st.booleans()):
            steps[-1] = replace(steps[-1], left=steps[-1].right, right=left)
        known.append(f"r{index}")
    read = {name for step in steps for name in (step.left, step.right)}
    wanted = tuple(s.result for s in steps if s.result not in read or draw(st.booleans()))
    used = tuple(name for name in names if name in read)
    kept = {name: values for name, values in constants.items() if name in read}
    return Elementwise("values", tuple(steps), used, kept, draw(st.permutations(wanted).map(tuple)), elements)


@settings(max_examples=40, deadline=None)
@given(layers(), st.sampled_from(["bfloat16", "float16"]), st.integers(1, 4), st.integers(1, 4), st.data())
def test_any_steps_are_those_of_16_bit_arithmetic(
    layer: Elementwise, number: str, channels: int, groups: int, data: st.DataObject
) -> None:
    """Also in several chunks, beside a matrix with constants in registers, and beside the same with other constants."""
    machine = replace(small(channels, data.draw(st.integers(1, 6)), groups), gprs=data.draw(st.integers(60, 200)))
    weights = np.ones((machine.banks, machine.lanes), np.float32)
    product = MatrixVector("p", weights, np.ones(machine.banks, np.float32), None, "x", "y")
    with_product = data.draw(st.booleans())
    other = replace(layer, name="b", constants={name: -values for name, values in layer.constants.items()})
    try:
        program = compile_layers(
            [product] if with_product else [], machine, number, lambda *_: Chosen(1), [layer, other]
        )
    except TargetError as problem:
        assert "registers" in str(problem) or "do not hold" in str(problem)
        return
    generator = np.random.default_rng(layer.elements)
    inputs = {name: generator.standard_normal(layer.elements).astype(np.float32) for name in layer.inputs}
    for launch in program.elements:
        require_legal(launch, machine)
        wanted = expected(launch.layer, inputs, number)
        found = run(launch, program, machine, number, inputs)
        for name, values in zip(layer.outputs, found, strict=True):
            np.testing.assert_array_equal(values, wanted[name].astype(np.float32))


@settings(max_examples=15, deadline=None)
@given(layers(), st.integers(1, 3), st.integers(1, 2), st.data())
def test_kernels_mean_what_requests_do(layer: Elementwise, channels: int, groups: int, data: st.DataObject) -> None:
    machine = replace(small(channels, data.draw(st.integers(1, 5)), groups), gprs=data.draw(st.integers(40, 200)))
    layer = replace(layer, elements=min(layer.elements, 60), constants={k: v[:60] for k, v in layer.constants.items()})
    try:
        program = compile_layers([], machine, elements=[layer])
    except TargetError:
        return
    (launch,) = program.elements
    generator = np.random.default_rng(3)
    inputs = [generator.standard_normal(layer.elements).astype(np.float32) for _ in layer.inputs]
    reads = Machine(machine, memory=program.memory.copy()).run(launch.commands, launch.layout.pack(inputs))
    lines, banks, results = launch.kernel.params
    packed = launch.layout.pack(inputs)
    moved = np.moveaxis(program.memory[:, :, launch.row : launch.row + max(launch.rows, 1)], (2, 3), (0, 1))
    arrays = {
        lines.name: packed if len(packed) else np.zeros(lines.shape, BFLOAT16),
        banks.name: np.ascontiguousarray(moved).reshape(banks.shape),
        results.name: np.zeros(results.shape, BFLOAT16),
    }
    interp.run(launch.kernel, arrays)
    np.testing.assert_array_equal(arrays[results.name].view(np.uint16), np.stack(reads).view(np.uint16))


def test_ticks_of_sums_and_products() -> None:
    """A register a tick for the host; EWADD a register a tick; products wait for rows and the bus."""
    machine = preset("gddr6_aim")
    add = Elementwise("a", (Step("add", "x", "y", "z"),), ("x", "y"), {}, ("z",), 4096)
    product = replace(add, steps=(Step("mul", "x", "y", "z"),))
    constant = replace(product, inputs=("x",), constants={"y": np.zeros(4096, np.float32)})
    found = {name: element_ticks(layer, "bfloat16", machine) for name, layer in zip("apk", (add, product, constant))}
    assert found["a"] == 4 * 256 + 2
    assert 3 * 256 < found["p"] < 3 * 256 + 200 and 2 * 256 < found["k"] < 2 * 256 + 180
    program = compile_layers([], machine, elements=[add, product, constant])
    exact = [simulate_timing(launch.commands, machine).ticks for launch in program.elements]
    assert exact == list(found.values())
    assert [launch.rows for launch in program.elements] == [0, 1, 1] and program.memory.shape[2] == 2


def test_values_in_chunks_cost_about_what_they_take() -> None:
    layer = Elementwise("a", (Step("mul", "x", "y", "z"),), ("x", "y"), {}, ("z",), 20000)
    machine = replace(preset("gddr6_aim"), gprs=1024)
    (launch,) = compile_layers([], machine, elements=[layer]).elements
    assert launch.layout.chunks == 3
    exact = simulate_timing(launch.commands, machine).ticks
    assert element_ticks(layer, "bfloat16", machine) == pytest.approx(exact, rel=0.05)


def test_registers_that_do_not_suffice_are_told() -> None:
    layer = Elementwise("sum", (Step("add", "x", "y", "z"),), ("x", "y"), {}, ("z",), 10)
    with pytest.raises(TargetError, match="sum: 1 registers do not hold 2 values"):
        plan(layer, small(), "bfloat16", 1)
    with pytest.raises(TargetError, match="no third bank for EWMUL"):
        plan(layer, replace(small(), bank_groups=2, banks_per_group=2), "bfloat16", 10)


# Networks.


def aim_parts(executable: nestc.Executable) -> list[Artifact]:
    return [part.artifact for part in executable.bundle.partitions if part.device == "aim"]


def gates(net: Net, shape: tuple[int, ...]) -> tuple[str, str]:
    """The cell and state of an LSTM from sums of its gates."""
    i, f, g, o, c = (net.input(shape, HALF) for _ in range(5))
    cell = net.node(
        "Add",
        net.node("Mul", net.node("Sigmoid", f), c),
        net.node("Mul", net.node("Sigmoid", i), net.node("Tanh", g)),
    )
    return cell, net.node("Mul", net.node("Sigmoid", o), net.node("Tanh", cell))


def values_for(net: Net, shapes: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(11)
    names = [value.name for value in net.inputs]
    return {n: generator.standard_normal(s).astype(np.float16) for n, s in zip(names, shapes, strict=True)}


@pytest.mark.parametrize("shape", [(1, 128), (3, 77)])
def test_gates_of_a_recurrent_cell(shape: tuple[int, ...]) -> None:
    """Curves on the host, products and the sum in the memory; each rounded to float16 once, as the model says."""
    net = Net()
    cell, state = gates(net, shape)
    model = net.float_model(cell, state, dtype=HALF)
    inputs = values_for(net, [shape] * 5)
    executable = nestc.compile(model, targets=["aim:number=float16"])
    i, f, g, o, c = (inputs[f"x{n}"].astype(np.float32) for n in range(5))

    def half(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float16)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return half(1 / (1 + np.exp(-x)))

    wanted = sigmoid(f) * half(c) + sigmoid(i) * half(np.tanh(g))
    found = executable.run(inputs)
    assert np.abs(found[cell].astype(np.float64) - wanted).max() <= 2.0**-9
    np.testing.assert_allclose(found[state], sigmoid(o) * half(np.tanh(found[cell].astype(np.float32))), rtol=2e-3)
    (artifact,) = aim_parts(executable)
    steps = [step["kind"] for step in artifact.metadata["steps"]]
    assert steps.count("elements") == 2 and steps[0] == "host"
    (first, second) = artifact.metadata["timing"]["layers"]
    assert first["elements"] == second["elements"] == shape[0] * shape[1]
    assert first["commands"]["EWMUL"] == 2 and second["commands"]["EWMUL"] == 1 and "EWADD" not in second["commands"]


def test_constants_and_broadcasts() -> None:
    net = Net()
    x, scale = net.input((2, 5, 40), HALF), net.input((2, 1, 40), HALF)
    weight, bias = net.matrix(40, dtype=np.float16), net.matrix(5, 1, dtype=np.float16)
    y = net.node("Mul", x, weight)
    z = net.node("Add", net.node("Mul", y, scale), bias)
    model = net.float_model(z, dtype=HALF)
    inputs = values_for(net, [(2, 5, 40), (2, 1, 40)])
    executable = nestc.compile(model, targets=["aim:number=float16,channels=3"])
    k = [net.weights[0], net.weights[1]]
    w, b = (np.frombuffer(each.raw_data, np.float16).reshape(tuple(each.dims)) for each in k)
    found = executable.run(inputs)[z]
    np.testing.assert_array_equal(found, inputs[x] * w * inputs[scale] + b)
    (artifact,) = aim_parts(executable)
    before = artifact.weights[BANKS].copy()
    np.testing.assert_array_equal(found, executable.run(inputs)[z])
    assert before.any()
    np.testing.assert_array_equal(artifact.weights[BANKS], before)  # calls have copies of the rows that they work in
    (launch,) = [step for step in artifact.metadata["steps"] if step["kind"] == "elements"]
    used = before[:, 2::4, launch["row"] : launch["row"] + launch["rows"]]
    assert not used.any()  # where products go


def test_numbers_that_are_rounded_on_request() -> None:
    """float32 with ``round``: operands and results of every step are bfloat16."""
    net = Net()
    a, b = net.input((1, 300)), net.input((1, 300))
    y = net.node("Add", net.node("Mul", a, b), b)
    model = net.float_model(y)
    generator = np.random.default_rng(2)
    x = {name: generator.standard_normal((1, 300)).astype(np.float32) for name in (a, b)}
    executable = nestc.compile(model, targets=["aim:round=true"])
    assert len(aim_parts(executable)) == 1
    first, second = (x[name].astype(BFLOAT16) for name in (a, b))
    np.testing.assert_array_equal(executable.run(x)[y], (first * second + second).astype(np.float32))
    plain = nestc.compile(model, targets=["aim"])
    assert not aim_parts(plain)
    assert "which the scheme bf16 leaves as it is" in plain.plan.explain()


def test_casts_between_steps_are_nothing_in_the_memory() -> None:
    """bfloat16 that is widened, multiplied and added in float32, and narrowed after each: one launch, same bits."""
    net = Net()
    a, b = (net.input((3, 50), TensorProto.BFLOAT16) for _ in range(2))

    def wide(name: str) -> str:
        return net.node("Cast", name, to=TensorProto.FLOAT)

    def narrow(name: str) -> str:
        return net.node("Cast", name, to=TensorProto.BFLOAT16)

    product = narrow(net.node("Mul", wide(a), wide(b)))
    total = net.node("Add", wide(product), wide(a))
    seen = net.node("Tanh", wide(product))  # the host needs the product, too
    model = net.float_model(wide(narrow(total)), seen)
    generator = np.random.default_rng(5)
    x = {name: generator.standard_normal((3, 50)).astype(BFLOAT16) for name in (a, b)}
    executable = nestc.compile(model, targets=["aim"])
    found = list(executable.run(x).values())
    wanted = x[a] * x[b]
    np.testing.assert_array_equal(found[0].astype(np.float32), (wanted + x[a]).astype(np.float32))
    np.testing.assert_allclose(found[1], np.tanh(wanted.astype(np.float32)), rtol=1e-6)
    (artifact,) = aim_parts(executable)
    launches = [step for step in artifact.metadata["steps"] if step["kind"] == "elements"]
    assert launches[0]["sources"] == [a, b] and len(launches) <= 2


def test_a_gated_unit_beside_its_matrices() -> None:
    net = Net()
    x = net.input((1, 64), HALF)
    up, gate, down = (net.matrix(*s, dtype=np.float16) for s in ((64, 96), (64, 96), (96, 64)))
    both = net.node("MatMul", x, up), net.node("MatMul", x, gate)
    y = net.node("Add", net.node("MatMul", net.node("Mul", *both), down), x)
    model = net.float_model(y, dtype=HALF)
    inputs = values_for(net, [(1, 64)])
    executable = nestc.compile(model, targets=["aim:number=float16"])
    assert [part.device for part in executable.bundle.partitions] == ["aim"]
    found = executable.run(inputs)[y].astype(np.float64)
    w = [np.frombuffer(t.raw_data, np.float16).reshape(tuple(t.dims)).astype(np.float64) for t in net.weights]
    v = inputs[x].astype(np.float64)
    wanted = (v @ w[0]) * (v @ w[1]) @ w[2] + v
    assert np.linalg.norm(found - wanted) <= 2.0**-9 * np.linalg.norm(wanted)


def region_of(*ops: tuple[str, int, int], dtype: int = HALF, shape: tuple[int, ...] = (1, 8)) -> Any:
    net = Net()
    names = [net.input(shape, dtype), net.input(shape, dtype)]
    for op, left, right in ops:
        names.append(net.node(op, *((names[left], names[right]) if right >= 0 else (names[left],))))
    (region,) = regions(net.float_model(names[-1], dtype=dtype))
    return region


@pytest.mark.parametrize(
    ("region", "words"),
    [
        (region_of(("Relu", 0, -1)), "no product or sum of two values, and"),
        (region_of(("Add", 0, 1), ("Max", 2, 0)), "Max .* is not among what AiM computes element by element"),
        (region_of(("Add", 0, 1), dtype=TensorProto.FLOAT), "aim:round=true"),
        (region_of(("Add", 0, 1), shape=(1, MOST_ELEMENTS + 1)), "no product or sum"),
    ],
)
def test_regions_that_are_refused(region: Any, words: str) -> None:
    with pytest.raises(Refused, match=words):
        read_elements(region)


def test_steps_of_another_shape_are_another_launch() -> None:
    """The result of the first is broadcast by the host."""
    types = {name: TensorType("float16", (1, 8)) for name in ("a", "b", "p")}
    types |= {name: TensorType("float16", (3, 8)) for name in ("c", "s", "t")}
    ops = (
        Op("Mul", ("a", "b"), ("p",)),
        Op("Add", ("p", "c"), ("s",)),
        Op("Mul", ("s", "c"), ("t",)),
    )
    first, second = read_elements(Region("r", None, ops, ("a", "b", "c"), ("t",), types, {}))
    assert first.layer is not None and second.layer is not None
    assert (first.shape, first.layer.outputs, first.layer.elements) == ((1, 8), ("p",), 8)
    assert (second.shape, second.layer.inputs, second.layer.elements) == ((3, 8), ("p", "c"), 24)
    assert [step.op for step in second.layer.steps] == ["add", "mul"] and first.layer.name != second.layer.name


def test_the_format_must_be_that_of_the_machine() -> None:
    region = region_of(("Mul", 0, 1))
    *_, offer = offers(preset("gddr6_aim"))
    assert "write aim:number=float16" in str(offer.refusal(region))
    *_, offer = offers(preset("gddr6_aim"), "float16")
    assert offer.refusal(region) is None


def test_damaged_launches_are_refused_in_words() -> None:
    net = Net()
    a, b = net.input((1, 40), HALF), net.input((1, 40), HALF)
    model = net.float_model(net.node("Mul", a, b), dtype=HALF)
    (artifact,) = aim_parts(nestc.compile(model, targets=["aim:number=float16"]))
    (step,) = artifact.metadata["steps"]

    def load(**changes: Any) -> None:
        AimDevice().load(replace(artifact, metadata={**artifact.metadata, "steps": [{**step, **changes}]}), 1)

    load()
    with pytest.raises(BundleError, match="for row 0, of rows 1 to 2"):
        load(row=1)
    with pytest.raises(BundleError, match="other values than its layout"):
        load(shape=[1, 41])
    with pytest.raises(BundleError, match="other values than its layout"):
        load(outputs=[])
    with pytest.raises(BundleError, match="write 6 registers and read 3, where its layout has 8 and 4"):
        load(layout={**step["layout"], "registers": 4})
    with pytest.raises(BundleError, match="not complete"):
        load(layout={**step["layout"], "reads": [1]})
    with pytest.raises(BundleError, match="not complete"):
        load(layout={**step["layout"], "elements": 4000})
