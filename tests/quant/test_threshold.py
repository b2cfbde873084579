"""Ranges: what each method chooses, against sums over the values themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.errors import QuantizationError
from nestc.quant.observe import _State
from nestc.quant.profile import METHODS, TensorStats
from nestc.quant.scheme import SCHEMES, Format
from nestc.quant.threshold import scale_zero_point, squared_errors, thresholds

UINT8 = Format("uint8", symmetric=False)
INT8 = Format("int8")
INT16 = Format("int16")
POWER = Format("int8", pow2=True)
FORMATS = (UINT8, INT8, INT16, POWER, Format("uint8", symmetric=False, pow2=True), Format("int8", narrow=True))


def stats_of(values: np.ndarray) -> TensorStats:
    state = _State(None)
    state.add(values.astype(np.float32))
    return state.stats()


def rounded(values: np.ndarray, low: float, high: float, format: Format) -> np.ndarray:
    """The values as the format's integers hold them."""
    scale, zero = scale_zero_point(low, high, format)
    integers = np.clip(np.rint(values / float(scale)) + zero, format.low, format.high)
    return (integers - zero) * float(scale)


def distribution(kind: str, size: int = 50_000, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    drawn = {
        "normal": lambda: generator.standard_normal(size),
        "relu": lambda: np.maximum(generator.standard_normal(size), 0),
        "laplace": lambda: generator.laplace(size=size),
        "outlier": lambda: np.append(generator.standard_normal(size), [80.0]),
        "negative": lambda: -np.abs(generator.standard_normal(size)),
        "shifted": lambda: generator.standard_normal(size) + 20,
        "swish": lambda: (lambda x: x / (1 + np.exp(-x)))(3 * generator.standard_normal(size)),
    }
    return drawn[kind]().astype(np.float32)


KINDS = ("normal", "relu", "laplace", "outlier", "negative", "shifted", "swish")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_range_holds_zero_and_lies_about_what_was_seen(kind: str, method: str, format: Format) -> None:
    values = distribution(kind)
    low, high = thresholds(stats_of(values), format, method)
    assert low <= 0.0 <= high and low < high
    scale, zero = scale_zero_point(low, high, format)
    assert scale > 0 and format.low <= zero <= format.high and (zero == 0 or not format.symmetric)
    if format.pow2:
        assert math.log2(float(scale)) == int(math.log2(float(scale)))
    # The integers cover little more than the values: at most twice as much, for powers of two.
    span = 2 * np.abs(values).max() if format.symmetric else max(values.max(), 0) - min(values.min(), 0)
    assert high - low <= span * (2.05 if format.pow2 else 1.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_minmax_clips_nothing(kind: str, format: Format) -> None:
    values = distribution(kind)
    low, high = thresholds(stats_of(values), format, "minmax")
    scale, _ = scale_zero_point(low, high, format)
    assert np.abs(rounded(values, low, high, format) - values).max() <= float(scale) * 1.0001


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(KINDS),
    st.floats(0.02, 1.0),
    st.floats(0.02, 1.0),
    st.sampled_from((UINT8, INT8)),
    st.integers(0, 9),
)
def test_the_estimated_error_is_that_of_the_values(kind: str, lower: float, upper: float, format: Format, seed) -> None:
    values = distribution(kind, 20_000, seed)
    stats = stats_of(values)
    low, high = min(stats.min, 0.0) * lower, max(stats.max, 0.0) * upper
    if format.symmetric:
        high = max(high, -low * 127 / 128)
        low = -high * 128 / 127
    estimated = squared_errors(stats.histogram, np.array([low]), np.array([high]), format)[0]
    actual = np.mean((rounded(values, low, high, format) - values) ** 2)
    assert estimated == pytest.approx(actual, rel=0.15, abs=(stats.histogram.width / 2) ** 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", [UINT8, INT8, POWER], ids=str)
def test_mse_is_no_worse_than_any_other_method(kind: str, format: Format) -> None:
    values = distribution(kind)
    stats = stats_of(values)

    def error(method: str) -> float:
        return float(np.mean((rounded(values, *thresholds(stats, format, method), format) - values) ** 2))

    least = error("mse")
    for method in ("minmax", "percentile:99.99", "percentile:99.9", "entropy"):
        assert least <= error(method) * 1.03, method


def test_mse_leaves_out_a_lone_outlier_and_keeps_a_uniform_range() -> None:
    few = distribution("outlier", 50_000)
    many = np.append(np.tile(few[:-1], 40), [80.0])
    assert thresholds(stats_of(many), UINT8, "mse")[1] < 40
    uniform = np.random.default_rng(0).uniform(-1, 1, 50_000)
    low, high = thresholds(stats_of(uniform), UINT8, "mse")
    assert low == pytest.approx(-1, abs=0.02) and high == pytest.approx(1, abs=0.02)


def test_percentile_leaves_out_what_it_says() -> None:
    values = distribution("normal", 200_000)
    low, high = thresholds(stats_of(values), UINT8, "percentile:99")
    assert np.mean((values < low) | (values > high)) == pytest.approx(0.01, abs=0.002)
    assert thresholds(stats_of(values), UINT8, "percentile:100") == (values.min(), values.max())


def test_entropy_clips_a_long_tail_and_nothing_of_few_values() -> None:
    values = distribution("outlier", 200_000)
    high = thresholds(stats_of(values), INT8, "entropy")[1]
    assert 2.0 < high < 40.0
    small = np.linspace(0, 1, 100)
    assert thresholds(stats_of(small), INT16, "entropy")[1] >= 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-42])
def test_constant_tensors_have_a_scale(method: str, format: Format, value: float) -> None:
    stats = stats_of(np.full(64, value))
    low, high = thresholds(stats, format, method)
    scale, _ = scale_zero_point(low, high, format)
    assert np.isfinite(scale) and scale > 0
    if value in (3.0, -2.0):
        # One value, at an end of the range: a pure rounding error, or half a step more where zero has been moved.
        assert rounded(np.array([value]), low, high, format)[0] == pytest.approx(value, abs=float(scale))
    if value == 0.0:
        assert scale == 1.0


def test_a_range_of_one_sign_is_widened_to_zero() -> None:
    stats = stats_of(np.linspace(5, 6, 1000))
    assert thresholds(stats, UINT8, "minmax") == (0.0, 6.0)
    scale, zero = scale_zero_point(0.0, 6.0, UINT8)
    assert (float(scale), zero) == (pytest.approx(6 / 255), 0)
    assert scale_zero_point(-6.0, 0.0, UINT8)[1] == 255


def test_scales_as_in_the_standard() -> None:
    # The example of DynamicQuantizeLinear in the ONNX operator documentation: x = [0, 2, -3, -2.5, 1.34, 0.5].
    scale, zero = scale_zero_point(-3.0, 2.0, UINT8)
    assert (float(scale), zero) == (pytest.approx(0.0196078438, rel=1e-6), 153)
    assert scale_zero_point(-1.0, 1.0, INT8) == (np.float32(1 / 127), 0)
    assert scale_zero_point(-1.0, 1.0, POWER) == (np.float32(2**-6), 0)
    assert scale_zero_point(-1.0, 127 / 128, POWER) == (np.float32(2**-7), 0)


def test_thresholds_of_the_schemes() -> None:
    stats = stats_of(distribution("normal"))
    for scheme in SCHEMES.values():
        if scheme.activation is not None and not scheme.activation.is_float:
            assert thresholds(stats, scheme.activation, scheme.method or "minmax")[1] > 1


def test_an_unknown_method() -> None:
    with pytest.raises(QuantizationError, match="did you mean 'percentile'"):
        thresholds(stats_of(np.ones(3)), UINT8, "percentle")
