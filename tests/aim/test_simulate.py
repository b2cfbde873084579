from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.errors import TargetError
from nestc.runtime.aim import activation
from nestc.runtime.aim import commands as c
from nestc.runtime.aim.machine import preset
from nestc.runtime.aim.simulate import NUMBERS, Machine, multiply_accumulate, narrow, widen

CHANNELS = 2
SMALL = replace(preset("gddr6_aim"), channels=CHANNELS, gprs=512)
ALL = (1 << CHANNELS) - 1
FORMATS = pytest.mark.parametrize("number", NUMBERS)


def numbers(rng, shape, number):
    return rng.standard_normal(shape).astype(NUMBERS[number])


def sum_in_order(accumulator, products):
    """The accumulator after `products` (columns, 16), one float32 addition after the other."""
    for column in products:
        level = [np.float32(p) for p in column]
        while len(level) > 1:
            level = [np.float32(a + b) for a, b in zip(level[0::2], level[1::2])]
        accumulator = np.float32(accumulator + level[0])
    return accumulator


@FORMATS
def test_widening_is_exact(number):
    bits = np.arange(1 << 16, dtype=np.uint16)
    exponent = 0x7F80 if number == "bfloat16" else 0x7C00
    finite = bits[bits & exponent != exponent].view(NUMBERS[number])
    assert widen(finite).dtype == np.float32
    assert np.array_equal(widen(finite), finite.astype(np.float64))


def test_narrowing_rounds_to_the_nearest_even():
    half = np.float32(1 + 2**-8)  # between 1 and the next bfloat16
    assert narrow(
        np.array([half, half + np.float32(2**-20), 1 + 3 * 2**-8], np.float32), NUMBERS["bfloat16"]
    ).tolist() == [
        1.0,
        1.0078125,
        1.015625,
    ]


@FORMATS
def test_order_and_rounding_of_a_mac_unit(number):
    rng = np.random.default_rng(1)
    weights, vector = widen(numbers(rng, (3, 5, 16), number)), widen(numbers(rng, (5, 16), number))
    start = rng.standard_normal(3).astype(np.float32)
    found = multiply_accumulate(start, weights, vector)
    for bank in range(3):
        assert found[bank] == sum_in_order(start[bank], weights[bank] * vector)


@FORMATS
def test_all_banks_multiply_with_the_global_buffer(number):
    rng = np.random.default_rng(2)
    machine = Machine(SMALL, number, rows=3)
    machine.memory[:] = numbers(rng, machine.memory.shape, number)
    machine.gpr[:] = numbers(rng, machine.gpr.shape, number)
    machine.run([c.WrBias(100, ALL), c.WrGb(6, 10, ALL, 2), c.MacAbk(4, ALL, 2, 3), c.RdMac(200, ALL), c.Eoc()])
    for channel in range(CHANNELS):
        for bank in range(16):
            products = widen(machine.memory[channel, bank, 2, 3:7]) * widen(machine.gpr[11:15])
            expected = sum_in_order(np.float32(machine.gpr[100 + channel, bank]), products)
            assert machine.accumulator[channel, bank] == expected
            assert machine.gpr[200 + channel, bank] == expected.astype(NUMBERS[number])


def test_one_bank_of_some_channels():
    rng = np.random.default_rng(3)
    machine = Machine(SMALL, rows=1)
    machine.memory[:] = numbers(rng, machine.memory.shape, "bfloat16")
    machine.gpr[:4] = numbers(rng, (4, 16), "bfloat16")
    machine.run([c.WrGb(4, 0, ALL), c.MacSbk(4, 0b10, 7, 0), c.Eoc()])
    products = widen(machine.memory[1, 7, 0, :4]) * widen(machine.gpr[:4])
    assert machine.accumulator[1, 7] == sum_in_order(np.float32(0), products)
    assert np.count_nonzero(machine.accumulator) == 1


def test_the_vector_may_come_from_the_next_bank():
    rng = np.random.default_rng(4)
    machine = Machine(SMALL, rows=1)
    machine.memory[:] = numbers(rng, machine.memory.shape, "bfloat16")
    machine.run([c.WriteCfr(c.CFR_BROADCAST, 1), c.MacAbk(2, ALL, 0), c.Eoc()])
    for bank in range(0, 16, 2):
        products = widen(machine.memory[0, bank, 0, :2]) * widen(machine.memory[0, bank + 1, 0, :2])
        assert machine.accumulator[0, bank] == sum_in_order(np.float32(0), products)
    assert not machine.accumulator[:, 1::2].any()
    machine.accumulator[:] = 0
    machine.run([c.MacSbk(2, 1, 3, 0), c.Eoc()])
    products = widen(machine.memory[0, 3, 0, :2]) * widen(machine.memory[0, 4, 0, :2])
    assert machine.accumulator[0, 3] == sum_in_order(np.float32(0), products)


def test_columns_move_between_banks_buffers_and_registers():
    rng = np.random.default_rng(5)
    machine = Machine(SMALL, rows=2)
    machine.gpr[:20] = numbers(rng, (20, 16), "bfloat16")
    data = machine.gpr.copy()
    machine.run(
        [
            c.WrSbk(0, ALL, 3, 1, 9),
            c.CopyBkGb(1, 0b01, 3, 1, 9),
            c.CopyGbBk(1, 0b01, 5, 0, 9),
            c.RdSbk(300, 0b01, 5, 0, 9),
            c.WrAbk(7, 0b10, 0, 2),
            c.EwAdd(2, 10, 12),
            c.Eoc(),
        ]
    )
    assert np.array_equal(machine.memory[0, 3, 1, 9], data[0]) and np.array_equal(machine.memory[1, 3, 1, 9], data[1])
    assert np.array_equal(machine.global_buffer[0, 9], data[0]) and not machine.global_buffer[1].any()
    assert np.array_equal(machine.gpr[300], data[0])
    assert all(np.array_equal(machine.memory[1, bank, 0, 2], data[7]) for bank in range(16))
    assert np.array_equal(machine.gpr[10:12], (widen(data[10:12]) + widen(data[12:14])).astype(data.dtype))


@pytest.mark.parametrize(("groups", "value"), [(4, 1), (1, 0)])
def test_products_of_banks_element_by_element(groups, value):
    rng = np.random.default_rng(6)
    machine = Machine(SMALL, rows=1)
    machine.memory[:] = numbers(rng, machine.memory.shape, "bfloat16")
    before = machine.memory.copy()
    machine.run([c.WriteCfr(c.CFR_EWMUL, value), c.EwMul(3, 0b01, 0, 1), c.Eoc()])
    changed = (machine.memory != before).any(axis=(2, 3, 4))
    assert sorted(zip(*np.nonzero(changed))) == [(0, 4 * group + 2) for group in range(groups)]
    product = widen(before[0, 0, 0, 1:4]) * widen(before[0, 1, 0, 1:4])
    assert np.array_equal(machine.memory[0, 2, 0, 1:4], product.astype(before.dtype))
    assert np.array_equal(machine.memory[0, 2, 0, 4:], before[0, 2, 0, 4:])


def test_the_host_writes_and_reads_in_turn():
    machine = Machine(SMALL, rows=1)
    first, second = np.arange(16.0), np.arange(16.0) + 100
    reads = machine.run(
        [c.WriteGpr(3), c.WriteMem(1, 2, 0, 4), c.ReadMem(1, 2, 0, 4), c.ReadGpr(3), c.ReadCfr(0), c.Sync(), c.Eoc()],
        [first, second],
    )
    assert [item.astype(float).tolist() for item in reads] == [second.tolist(), first.tolist()]


# How far the lines of a table with entries of 16 bits are from the function, in units of the format.
@FORMATS
@pytest.mark.parametrize("name", activation.FUNCTIONS)
def test_activation_functions_are_near_the_exact_ones(name, number):
    x = np.linspace(-12, 12, 4801).astype(np.float32)
    found = activation.apply(name, x, NUMBERS[number])
    exact = activation.exact(name, x)
    bound = 0 if name in ("relu", "identity") else 2**-8 if number == "bfloat16" else 2**-10
    assert (np.abs(found - exact) <= bound * np.maximum(1, np.abs(exact))).all()


def test_activation_functions_of_infinities_and_nans():
    x = np.array([-np.inf, np.inf, np.nan], np.float32)
    expected = {
        "relu": [0, np.inf],
        "sigmoid": [0, 1],
        "tanh": [-1, 1],
        "gelu": [0, np.inf],
        "identity": [-np.inf, np.inf],
    }
    for name, values in expected.items():
        found = activation.apply(name, x, NUMBERS["bfloat16"])
        assert found[:2].tolist() == values and np.isnan(found[2])


@pytest.mark.parametrize("function", range(len(activation.FUNCTIONS)))
def test_activation_results_are_read_from_their_registers(function):
    rng = np.random.default_rng(7)
    machine = Machine(SMALL, rows=1)
    machine.gpr[:2] = numbers(rng, (2, 16), "bfloat16")
    machine.run([c.WrBias(0, ALL), c.WriteCfr(c.CFR_AF, function), c.Af(ALL), c.RdAf(5, ALL), c.Eoc()])
    exact = activation.exact(activation.FUNCTIONS[function], machine.gpr[:2].astype(np.float64))
    assert np.allclose(machine.gpr[5:7].astype(np.float64), exact, rtol=2**-8, atol=2**-8)


def product(weights, vector, number, slice_of=1024):
    """weights @ vector on the machine: a bank a row, sums of slices of K added by the host in float32."""
    m, k = weights.shape
    passes, slices = -(-m // (16 * CHANNELS)), -(-k // slice_of)
    padded = np.zeros((passes * CHANNELS * 16, slices * 1024), NUMBERS[number])
    for s in range(slices):
        part = weights[:, s * slice_of : (s + 1) * slice_of]
        padded[:m, s * 1024 : s * 1024 + part.shape[1]] = part
    image = padded.reshape(passes, CHANNELS, 16, slices, 64, 16).transpose(1, 2, 0, 3, 4, 5)
    machine = Machine(SMALL, number, memory=np.ascontiguousarray(image.reshape(CHANNELS, 16, -1, 64, 16)))
    sums = np.zeros(passes * CHANNELS * 16, np.float32)
    for s in range(slices):
        part = vector[s * slice_of : (s + 1) * slice_of]
        machine.gpr[:64] = np.pad(part, (0, 1024 - len(part))).reshape(64, 16)
        size = -(-len(part) // 16)
        stream = [c.WrGb(size, 0, ALL)]
        for p in range(passes):
            where = 100 + p * CHANNELS
            stream += [c.WrBias(64, ALL), c.MacAbk(size, ALL, p * slices + s), c.RdMac(where, ALL)]
        machine.run([*stream, c.Eoc()])
        sums += widen(machine.gpr[100 : 100 + passes * CHANNELS]).reshape(-1)
    return sums[:m]


@FORMATS
@given(st.integers(1, 70), st.integers(1, 2500), st.integers(0, 2**32))
@settings(deadline=None, max_examples=15)
def test_products_are_as_near_to_the_exact_ones_as_numpy_is(number, m, k, seed):
    rng = np.random.default_rng(seed)
    weights, vector = numbers(rng, (m, k), number), numbers(rng, (k,), number)
    found = product(weights, vector, number)
    exact = weights.astype(np.float64) @ vector.astype(np.float64)
    numpy = np.zeros(m, np.float64)
    for s in range(0, k, 1024):
        part = weights[:, s : s + 1024].astype(np.float32) @ vector[s : s + 1024].astype(np.float32)
        numpy += part.astype(NUMBERS[number]).astype(np.float64)
    scale = np.abs(weights.astype(np.float64)) @ np.abs(vector.astype(np.float64))
    # The sums agree to float32; what both round to 16 bits may then fall to the two sides of a half.
    unit = 2.0 ** (-8 if number == "bfloat16" else -11)
    slices = -(-k // 1024)
    assert np.all(
        np.abs(found - exact) <= np.abs(numpy - exact) + 2 * unit * slices * np.abs(scale) * 2**-10 + scale * unit
    )
    assert np.linalg.norm(found - exact) <= np.linalg.norm(numpy - exact) * 1.05 + np.linalg.norm(scale) * 1e-5


def test_sums_before_rounding_are_as_near_as_float32():
    rng = np.random.default_rng(8)
    machine = Machine(SMALL, rows=1)
    machine.memory[:] = numbers(rng, machine.memory.shape, "bfloat16")
    machine.gpr[:64] = numbers(rng, (64, 16), "bfloat16")
    machine.run([c.WrGb(64, 0, ALL), c.MacAbk(64, ALL, 0), c.Eoc()])
    weights = machine.memory[:, :, 0].astype(np.float64).reshape(CHANNELS, 16, -1)
    vector = machine.gpr[:64].astype(np.float64).reshape(-1)
    error = np.abs(machine.accumulator - weights @ vector) / (np.abs(weights) @ np.abs(vector))
    straight = np.zeros((CHANNELS, 16), np.float32)
    for element in range(1024):
        straight += (weights[..., element] * vector[element]).astype(np.float32)
    plain = np.abs(straight - weights @ vector) / (np.abs(weights) @ np.abs(vector))
    assert error.max() <= 2**-23
    assert np.linalg.norm(error) <= np.linalg.norm(plain)


def test_overflow_is_infinite():
    machine = Machine(SMALL, "float16", rows=1)
    machine.memory[:] = 60000
    machine.gpr[:1] = 60000
    machine.run([c.WrGb(1, 0, ALL), c.MacAbk(1, ALL, 0), c.RdMac(1, ALL), c.Eoc()])
    assert np.isinf(machine.gpr[1].astype(np.float32)).all()
    assert np.isfinite(machine.accumulator).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(TargetError, match="has no numbers of format 'int8'"):
        Machine(SMALL, "int8")
    with pytest.raises(TargetError, match="20000 cannot be kept"):
        Machine(SMALL, memory=np.broadcast_to(np.zeros((), ml_dtypes.bfloat16), (2, 16, 20000, 64, 16)))
    with pytest.raises(TargetError, match="have a shape like"):
        Machine(SMALL, memory=np.zeros((2, 16, 1, 32, 16), ml_dtypes.bfloat16))
    machine = Machine(SMALL, rows=1)
    with pytest.raises(TargetError, match=r"request 0 \(MAC_ABK\): row 1 is not among 1 kept"):
        machine.run([c.MacAbk(1, ALL, 1), c.Eoc()])
    with pytest.raises(TargetError, match="request 1: the host has nothing left to write"):
        machine.run([c.WriteGpr(0), c.WriteGpr(1)], [np.zeros(16)])
    with pytest.raises(TargetError, match="CFR_AF selects function 7; there are 5"):
        machine.run([c.WriteCfr(c.CFR_AF, 7), c.Af(1), c.Eoc()])
    with pytest.raises(TargetError, match="needs the host"):
        machine.execute(c.ReadGpr(0))
