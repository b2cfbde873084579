"""Layers through Tensor IR to requests: they compute the product, are legal, and mean what the kernel means."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines_small import small

from nestc.errors import TargetError
from nestc.runtime.aim.commands import (
    Af,
    Command,
    EwMul,
    MacAbk,
    RdAf,
    RdMac,
    ReadGpr,
    WrBias,
    WrGb,
    WriteGpr,
    channels_of,
)
from nestc.runtime.aim.machine import AimMachine, preset
from nestc.runtime.aim.simulate import NUMBERS, Machine
from nestc.runtime.aim.timing import simulate_timing
from nestc.targets.aim.compiler import Launch, Program, compile_layers, without_host
from nestc.targets.aim.emit import Addresses, emit
from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.mapping import Mapping, plan
from nestc.targets.aim.search import mappings
from nestc.tensor import index as ix
from nestc.tensor import interp
from nestc.tensor.ir import Buffer, Call, Kernel, Window


def _layer(m: int, k: int, vectors: int = 1, bias: bool = True, activation: str | None = None) -> MatrixVector:
    rng = np.random.default_rng(m * 1000 + k)
    weights = rng.standard_normal((m, k)).astype(np.float32)
    start = rng.standard_normal(m).astype(np.float32) if bias else None
    return MatrixVector(f"layer{m}x{k}", weights, start, activation, "x", "y", vectors)


def _vectors(layer: MatrixVector) -> np.ndarray:
    return np.random.default_rng(layer.k).standard_normal((layer.vectors, layer.k)).astype(np.float32)


def _state(program: Program, machine: AimMachine, number: str) -> Machine:
    state = Machine(machine, number, memory=program.memory.copy())
    state.gpr[: len(program.registers)] = program.registers
    return state


def _run(launch: Launch, state: Machine, x: np.ndarray) -> np.ndarray:
    return launch.layout.unpack(state.run(launch.commands, launch.layout.pack(x)), launch.layer.bias)


def _error(result: np.ndarray, layer: MatrixVector, x: np.ndarray) -> float:
    """Largest error of any result, relative to the product of absolute values (float64)."""
    exact = x.astype(np.float64) @ layer.weights.astype(np.float64).T
    scale = np.abs(x).astype(np.float64) @ np.abs(layer.weights).astype(np.float64).T
    if layer.bias is not None:
        exact, scale = exact + layer.bias, scale + np.abs(layer.bias)
    return float((np.abs(result - exact) / scale).max())


def _plain(layer: MatrixVector, x: np.ndarray, number: str) -> np.ndarray:
    """The same in numpy: operands and results of 16 bits, sums in float32."""
    form = NUMBERS[number]
    narrow, wide = (a.astype(form).astype(np.float32) for a in (layer.weights, x))
    sums = wide @ narrow.T + (0 if layer.bias is None else layer.bias)
    return sums.astype(form).astype(np.float32)


def _require_legal(commands: tuple[Command, ...], program: Program, machine: AimMachine) -> None:
    """Buffers are filled before MACs, sums are read once and not lost, registers are read before they are used again."""
    filled = np.zeros((machine.channels, machine.columns), bool)
    sums = ["?"] * machine.channels
    registers = ["constant"] * len(program.registers) + ["?"] * (machine.gprs - len(program.registers))
    for command in commands:
        channels = channels_of(getattr(command, "mask", 0))
        if isinstance(command, WriteGpr):
            assert registers[command.gpr] not in ("constant", "result")
            registers[command.gpr] = "vector"
        elif isinstance(command, ReadGpr):
            assert registers[command.gpr] == "result"
            registers[command.gpr] = "?"
        elif isinstance(command, WrGb):
            assert set(registers[command.gpr : command.gpr + command.size]) == {"vector"}
            filled[channels, command.column : command.column + command.size] = True
        elif isinstance(command, WrBias):
            assert set(registers[command.gpr : command.gpr + len(channels)]) == {"constant"}
            for channel in channels:
                assert sums[channel] in ("?", "read")
                sums[channel] = "set"
        elif isinstance(command, MacAbk):
            assert filled[channels, command.column : command.column + command.size].all()
            for channel in channels:
                assert sums[channel] == "set"
                sums[channel] = "sum"
        elif isinstance(command, Af):
            for channel in channels:
                assert sums[channel] == "sum"
                sums[channel] = "applied"
        elif isinstance(command, (RdMac, RdAf)):
            for place, channel in enumerate(channels):
                assert sums[channel] == ("sum" if isinstance(command, RdMac) else "applied")
                sums[channel] = "read"
                assert registers[command.gpr + place] != "result", "results are lost"
                registers[command.gpr + place] = "result"
    assert "result" not in registers and not set(sums) & {"set", "sum", "applied"}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.data())
def test_products_of_any_shape(m: int, k: int, vectors: int, channels: int, bias: bool, data: st.DataObject) -> None:
    """Every mapping of ragged shapes: legal, right the first and the second time, and no less exact than numpy."""
    number = data.draw(st.sampled_from(["bfloat16", "float16"]))
    machine = small(channels, data.draw(st.integers(2, 7)))
    layer = _layer(m, k, vectors, bias)
    mapping = data.draw(st.sampled_from(list(mappings(layer, machine))))
    try:
        program = compile_layers([layer], machine, number, choose=lambda *_: mapping)
    except TargetError as problem:
        assert "do not fit" not in str(problem)
        return
    (launch,) = program.launches
    _require_legal(launch.commands, program, machine)
    x = _vectors(layer)
    state = _state(program, machine, number)
    first, second = _run(launch, state, x), _run(launch, state, x)
    assert np.array_equal(first, second), "what openers write changes nothing"
    assert np.array_equal(state.memory.view(np.uint16), program.memory.view(np.uint16))
    unit = 2.0**-8 if number == "bfloat16" else 2.0**-11
    assert _error(first, layer, x) <= max(2 * _error(_plain(layer, x, number), layer, x), 2 * unit)


def test_norm_of_errors_is_no_worse_than_numpy() -> None:
    """Real sizes: relative error of the whole result against float64, K split over channels.

    Numpy rounds whole sums to 16 bits, the machine partial sums of K, whose errors are smaller, but more. The sum of
    their squares is about the same.
    """
    machine = preset("gddr6_aim")
    for layer, mapping in ((_layer(512, 4096), Mapping(4, opener=True)), (_layer(700, 3000), Mapping(3, even=False))):
        program = compile_layers([layer], machine, choose=lambda *_, chosen=mapping: chosen)
        x = _vectors(layer)
        exact = x.astype(np.float64) @ layer.weights.astype(np.float64).T + layer.bias
        found = _run(program.launches[0], _state(program, machine, "bfloat16"), x)
        mine, plain = (float(np.linalg.norm(y - exact)) for y in (found, _plain(layer, x, "bfloat16")))
        assert mine <= plain * 1.05


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh", "gelu"])
@pytest.mark.parametrize("inside", [True, False])
def test_activations_in_banks_and_beside(activation: str, inside: bool) -> None:
    machine = small(3, 6)
    layer = _layer(30, 20, 2, activation=activation)
    program = compile_layers([layer], machine, choose=lambda *_: Mapping(1, inside=inside))
    (launch,) = program.launches
    _require_legal(launch.commands, program, machine)
    assert any(isinstance(command, RdAf) for command in launch.commands) is inside
    x = _vectors(layer)
    sums = _run_sums(layer, machine, x)
    found = _run(launch, _state(program, machine, "bfloat16"), x)
    curves = {
        "relu": lambda v: np.maximum(v, 0),
        "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
        "tanh": np.tanh,
        "gelu": lambda v: 0.5 * v * (1 + np.vectorize(math.erf)(v / 2**0.5)),
    }
    wanted = curves[activation](sums.astype(np.float64))
    assert np.abs(found - wanted).max() <= (0.02 + 0.01 * np.abs(wanted).max() if inside else 1e-5)


def _run_sums(layer: MatrixVector, machine: AimMachine, x: np.ndarray) -> np.ndarray:
    plain = replace(layer, activation=None)
    program = compile_layers([plain], machine, choose=lambda *_: Mapping(1))
    return _run(program.launches[0], _state(program, machine, "bfloat16"), x)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 30), st.integers(1, 24), st.integers(1, 2), st.integers(1, 3), st.data())
def test_kernels_mean_what_requests_do(m: int, k: int, vectors: int, channels: int, data: st.DataObject) -> None:
    """The interpreter of Tensor IR on the kernel gives, bit by bit, what the simulator gives on the requests."""
    machine = small(channels, data.draw(st.integers(2, 4)))
    layer = _layer(m, k, vectors, data.draw(st.booleans()), data.draw(st.sampled_from([None, "relu"])))
    mapping = data.draw(st.sampled_from(list(mappings(layer, machine))))
    try:
        program = compile_layers([layer], machine, choose=lambda *_: mapping)
    except TargetError:
        return
    (launch,) = program.launches
    x = _vectors(layer)
    written = launch.layout.pack(x)
    reads = _state(program, machine, "bfloat16").run(launch.commands, written)
    lines, banks, constants, results = launch.kernel.params
    arrays = {
        lines.name: replace(launch.layout, writes=()).pack(x),
        banks.name: np.ascontiguousarray(
            np.moveaxis(program.memory[:, :, launch.row : launch.row + launch.rows], (2, 3), (0, 1))
        ).reshape(banks.shape),
        constants.name: program.registers[: constants.shape[0]],
        results.name: np.zeros(results.shape, NUMBERS["bfloat16"]),
    }
    interp.run(launch.kernel, arrays)
    assert np.array_equal(arrays[results.name].view(np.uint16), np.stack(reads).view(np.uint16))


def test_layers_share_one_memory() -> None:
    """Rows are given out one layer after the other; launches may come in any order, again and again."""
    machine = small(3, 6)
    layers = [_layer(30, 20), _layer(9, 50, 2), _layer(30, 21, bias=False)]
    program = compile_layers(layers, machine, choose=lambda layer, *_: Mapping(3 if layer.k == 50 else 1))
    rows = [range(launch.row, launch.row + launch.rows) for launch in program.launches]
    assert sorted(r for each in rows for r in each) == list(range(program.memory.shape[2]))
    state = _state(program, machine, "bfloat16")
    for number in (2, 0, 1, 0):
        launch = program.launches[number]
        x = _vectors(launch.layer)
        assert _error(_run(launch, state, x), launch.layer, x) <= 2.0**-7


def test_equal_weights_are_there_once() -> None:
    """Steps of a recurrent cell: the same matrix, with and without its bias, on different values."""
    machine = small(3, 6)
    layer = _layer(30, 20)
    steps = [layer, replace(layer, name="next", inputs="h"), replace(layer, bias=None), _layer(30, 21)]
    program = compile_layers(steps, machine, choose=lambda *_: Mapping(1, opener=True))
    rows = [launch.row for launch in program.launches]
    assert rows[:3] == [0, 0, 0] and rows[3] == program.launches[0].rows
    assert program.launches[1].commands is program.launches[0].commands and program.launches[1].layer is steps[1]
    x = _vectors(layer)
    state = _state(program, machine, "bfloat16")
    for launch in program.launches[:3]:
        assert _error(_run(launch, state, x), launch.layer, x) <= 2.0**-7


def test_large_weights_have_no_openers() -> None:
    """EWMUL would write infinite products; another way to change rows is taken."""
    machine = small(1, 4)
    layer = MatrixVector("big", np.full((12, 16), 1e4, np.float32), None, None, "x", "y")
    program = compile_layers([layer], machine, "float16", choose=lambda *_: Mapping(1, opener=True))
    assert not program.launches[0].mapping.opener


def test_biases_that_do_not_fit_in_registers() -> None:
    """The host adds them."""
    machine = replace(small(2, 4), gprs=20)
    layer = _layer(60, 12)
    program = compile_layers([layer], machine, choose=lambda *_: Mapping(1))
    assert not program.launches[0].layout.bias_inside and len(program.registers) == 2
    x = _vectors(layer)
    assert _error(_run(program.launches[0], _state(program, machine, "bfloat16"), x), layer, x) <= 2.0**-7


def test_golden_mapping_in_ticks() -> None:
    """Requests that the public simulator times: a pass more costs 286 ticks, 267 with the next row opened before."""
    machine = preset("gddr6_aim")
    ticks: dict[tuple[int, bool], int] = {}
    for m in (1024, 1536):
        for opener in (False, True):
            layer = replace(_layer(m, 1008, bias=False), weights=np.zeros((m, 1008), np.float32))
            program = compile_layers([layer], machine, choose=lambda *_, on=opener: Mapping(1, opener=on))
            ticks[m, opener] = simulate_timing(without_host(program.launches[0].commands), machine).ticks
    assert ticks[1536, False] - ticks[1024, False] == 286 - 2  # rows of 63 columns
    assert ticks[1536, True] - ticks[1024, True] == 267 - 2


def test_openers_come_before_reads() -> None:
    layer = _layer(40, 8, bias=False)
    program = compile_layers([layer], small(2, 4), choose=lambda *_: Mapping(1, opener=True))
    commands = without_host(program.launches[0].commands)
    opened = [command.row for command in commands if isinstance(command, EwMul)]
    assert opened == list(range(program.launches[0].rows))
    for index, command in enumerate(commands):
        if isinstance(command, EwMul) and command.row:
            assert isinstance(commands[index + 1], RdMac) and isinstance(commands[index - 1], MacAbk)


def test_what_is_no_request_is_refused() -> None:
    machine = small(2, 4)
    layer = _layer(8, 8)
    program = compile_layers([layer], machine, choose=lambda *_: Mapping(1))
    kernel = program.launches[0].kernel
    mac = next(s for s in kernel.body if isinstance(s, Call) and s.intrinsic.name.startswith("mac_abk"))
    gb = mac.operands[2]
    shifted = Window(gb.buffer, (ix.add(gb.index[0], 1), *gb.index[1:]))
    wrong = Call(mac.intrinsic, (*mac.operands[:2], shifted))
    with pytest.raises(TargetError, match="not those of the global buffer"):
        emit(_kernel(kernel, wrong), Addresses(0, 0, 0), machine)
    elsewhere = Window(Buffer("other", "bfloat16", mac.operands[1].buffer.shape), mac.operands[1].index)
    with pytest.raises(TargetError, match="not in the banks"):
        emit(_kernel(kernel, Call(mac.intrinsic, (mac.operands[0], elsewhere, gb))), Addresses(0, 0, 0), machine)


def _kernel(kernel: Kernel, statement: Call) -> Kernel:
    return replace(kernel, body=(statement,))


def test_weights_that_do_not_fit_are_refused() -> None:
    machine = small(1, 2)
    with pytest.raises(TargetError, match="rows of every bank"):
        compile_layers([_layer(2000, 8)], machine, choose=lambda *_: Mapping(1))


def test_plans_do_not_depend_on_values() -> None:
    machine = small()
    a, b = (replace(_layer(20, 20), weights=np.full((20, 20), v, np.float32)) for v in (0, 1))
    assert plan(a, Mapping(1), machine).layout == plan(b, Mapping(1), machine).layout
