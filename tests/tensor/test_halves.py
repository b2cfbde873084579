"""float16 and bfloat16 conversions in machine code, with and without an instruction for them, bit for bit."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from nestc.kernels.testing import Compiled, host_machine
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, load
from nestc.tensor.ir import Cast

HOST = host_machine()
SOFT = dataclasses.replace(HOST, name="soft", f16c=False)
X86 = HOST.triple.startswith("x86_64")
SSE2 = dataclasses.replace(SOFT, cpu="x86-64", features="", vector_bytes=16, fma=False)
MACHINES = [pytest.param(HOST, 8, id="host"), pytest.param(SOFT, 8, id="soft"), pytest.param(SOFT, 1, id="one_lane")]
MACHINES += [pytest.param(SSE2, 4, id="sse2")] if X86 else []


def convert(bits, source, target, machine, lanes):
    """The bits of values of dtype `source`, given by their bits, as dtype `target`; `lanes` at a time."""
    k = Builder("convert")
    x, y = k.param("x", source, bits.shape), k.param("y", target, bits.shape)
    with k.loop("i", bits.size // lanes) as i:
        place = ix.mul(i, lanes)
        k.store(y, (place,), Cast(load(x, place, lanes=lanes), target))
    out = np.empty(bits.shape, np.uint32 if target == "float32" else np.uint16)
    Compiled(k.finish(), machine)([bits, out])
    return out


def many_float32():
    """The bits of 12 million float32 values: every sign and exponent, and fractions at, under and over every tie."""
    upper = np.arange(1 << 22, dtype=np.uint32) << 10
    return np.concatenate([upper, upper + 1, upper + 0x3FF])


@pytest.mark.parametrize(("machine", "lanes"), MACHINES)
def test_every_float16_to_float32(machine, lanes):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16)
    expected = values.astype(np.float32).view(np.uint32)
    nan = np.isnan(values)
    wide = bits[nan].astype(np.uint32)
    expected[nan] = (wide & 0x8000) << 16 | 0x7FC00000 | (wide & 0x3FF) << 13
    np.testing.assert_array_equal(convert(bits, "float16", "float32", machine, lanes), expected)


@pytest.mark.parametrize(("machine", "lanes"), MACHINES)
def test_float32_to_float16(machine, lanes):
    bits = many_float32()
    values = bits.view(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    nan = np.isnan(values)
    expected[nan] = ((bits[nan] >> 16) & 0x8000) | 0x7E00 | ((bits[nan] >> 13) & 0x3FF)
    np.testing.assert_array_equal(convert(bits, "float32", "float16", machine, lanes), expected)


@pytest.mark.parametrize(("machine", "lanes"), MACHINES)
def test_bfloat16_both_ways(machine, lanes):
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(convert(bits, "bfloat16", "float32", machine, lanes), bits.astype(np.uint32) << 16)
    bits = many_float32()
    values = bits.view(np.float32)
    numbers = ~np.isnan(values)
    found = convert(bits, "float32", "bfloat16", machine, lanes)
    np.testing.assert_array_equal(found[numbers], values[numbers].astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.isnan(found[~numbers].view(ml_dtypes.bfloat16)).all()
