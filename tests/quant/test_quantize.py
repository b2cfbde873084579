"""Models in each scheme: their text, that they compute what their numbers say, and input that cannot be quantized."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qdq_support import HEAD, calibrated, constant, drawn, lines, net, proto, quantized, run, samples
from quant_nets import parsed

import nestc
from nestc.errors import ModelError, QuantizationError
from nestc.quant.explain import in_words, kept_float, reasons
from nestc.quant.scheme import SCHEMES, Format
from nestc.quant.squant import balanced
from nestc.quant.weights import round_weights, weight_scales

NET = """g (float[1,3,8,8] x) => (float[1,4] y) {
    [conv1] a = Conv <pads=[1,1,1,1]> (x, w1, b1)  [relu] r = Relu (a)
    [conv2] c = Conv <pads=[1,1,1,1]> (r, w2)      [add] s = Add (c, r)
    [pool] m = MaxPool <kernel_shape=[2,2]> (s)    [mean] p = GlobalAveragePool (m)
    [flat] f = Flatten (p)                         [fc] y = Gemm (f, w3, b3) }"""
SHAPES = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 6, 3, 3), "w3": (6, 4), "b3": (4,)}
SIGNAL_TO_NOISE = {
    "int8": 30, "int8-symmetric": 28, "int8-pow2": 20, "int16": 57, "bf16": 40, "weight-int8": 38, "weight-int4": 14,
}  # fmt: skip
"""dB that each scheme reaches at least on the network above; what it reached when written, less about five."""


def decibels(expected: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(expected.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(expected, dtype=np.float64).sum() / noise)) if noise else np.inf


def test_text_of_int8() -> None:
    assert lines(quantized(net(NET, **SHAPES))) == [
        "x_QuantizeLinear:uint8 = QuantizeLinear(x, x_scale, x_zero_point:uint8)",
        "x_DequantizeLinear = DequantizeLinear(x_QuantizeLinear:uint8, x_scale, x_zero_point:uint8)",
        "w1_DequantizeLinear = DequantizeLinear(w1_quantized:int8, w1_scale, w1_zero_point:int8)",
        "b1_DequantizeLinear = DequantizeLinear(b1_quantized:int32, b1_scale)",
        "a = Conv(x_DequantizeLinear, w1_DequantizeLinear, b1_DequantizeLinear)",
        "r = Relu(a)",
        "r_QuantizeLinear:uint8 = QuantizeLinear(r, r_scale, r_zero_point:uint8)",
        "r_DequantizeLinear = DequantizeLinear(r_QuantizeLinear:uint8, r_scale, r_zero_point:uint8)",
        "w2_DequantizeLinear = DequantizeLinear(w2_quantized:int8, w2_scale, w2_zero_point:int8)",
        "c = Conv(r_DequantizeLinear, w2_DequantizeLinear)",
        "c_QuantizeLinear:uint8 = QuantizeLinear(c, c_scale, c_zero_point:uint8)",
        "c_DequantizeLinear = DequantizeLinear(c_QuantizeLinear:uint8, c_scale, c_zero_point:uint8)",
        "s = Add(c_DequantizeLinear, r_DequantizeLinear)",
        "s_QuantizeLinear:uint8 = QuantizeLinear(s, s_scale, s_zero_point:uint8)",
        "s_DequantizeLinear = DequantizeLinear(s_QuantizeLinear:uint8, s_scale, s_zero_point:uint8)",
        "m = MaxPool(s_DequantizeLinear)",
        "m_QuantizeLinear:uint8 = QuantizeLinear(m, m_scale, m_zero_point:uint8)",
        "m_DequantizeLinear = DequantizeLinear(m_QuantizeLinear:uint8, m_scale, m_zero_point:uint8)",
        "p = GlobalAveragePool(m_DequantizeLinear)",
        "p_QuantizeLinear:uint8 = QuantizeLinear(p, p_scale, p_zero_point:uint8)",
        "p_DequantizeLinear = DequantizeLinear(p_QuantizeLinear:uint8, p_scale, p_zero_point:uint8)",
        "f = Flatten(p_DequantizeLinear)",
        "f_QuantizeLinear:uint8 = QuantizeLinear(f, f_scale, f_zero_point:uint8)",
        "f_DequantizeLinear = DequantizeLinear(f_QuantizeLinear:uint8, f_scale, f_zero_point:uint8)",
        "w3_DequantizeLinear = DequantizeLinear(w3_quantized:int8, w3_scale, w3_zero_point:int8)",
        "b3_DequantizeLinear = DequantizeLinear(b3_quantized:int32, b3_scale)",
        "y = Gemm(f_DequantizeLinear, w3_DequantizeLinear, b3_DequantizeLinear)",
    ]


@pytest.mark.parametrize(
    ("scheme", "activation", "weight"),
    [("int8-symmetric", "int8", "int8"), ("int8-pow2", "int8", "int8"), ("int16", "int16", "int16")],
)
def test_text_of_symmetric_schemes(scheme: str, activation: str, weight: str) -> None:
    text = lines(quantized(net(NET, **SHAPES), scheme))
    assert text[0] == f"x_QuantizeLinear:{activation} = QuantizeLinear(x, x_scale, x_zero_point:{activation})"
    assert text[2] == f"w1_DequantizeLinear = DequantizeLinear(w1_quantized:{weight}, w1_scale, w1_zero_point:{weight})"
    assert text[3] == "b1_DequantizeLinear = DequantizeLinear(b1_quantized:int32, b1_scale)"
    assert len(text) == 27


def test_text_of_bf16() -> None:
    assert lines(quantized(net(NET, **SHAPES), "bf16"))[:8] == [
        "x_bfloat16:bfloat16 = Cast(x)",
        "x_float32 = Cast(x_bfloat16:bfloat16)",
        "w1_float32 = Cast(w1_quantized:bfloat16)",
        "a = Conv(x_float32, w1_float32, b1)",
        "r = Relu(a)",
        "r_bfloat16:bfloat16 = Cast(r)",
        "r_float32 = Cast(r_bfloat16:bfloat16)",
        "w2_float32 = Cast(w2_quantized:bfloat16)",
    ]


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_text_of_weight_only(bits: str) -> None:
    made = quantized(net(NET, **SHAPES), f"weight-{bits}")
    assert lines(made)[-2:] == [
        f"w3_DequantizeLinear = DequantizeLinear(w3_quantized:{bits}, w3_scale, w3_zero_point:{bits})",
        "y = Gemm(f, w3_DequantizeLinear, b3)",
    ]
    assert sum("DequantizeLinear(" in line for line in lines(made)) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_is_near_float_and_ours_is_onnx_runtimes(scheme: str, tmp_path: Path) -> None:
    model = net(NET, **SHAPES)
    made = nestc.quantize(model, calibrated(model), scheme)
    path = tmp_path / "quantized.onnx"
    made.save(path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    inputs = samples(model, 4)[3]
    expected = run(made, inputs)
    assert decibels(run(model, inputs)["y"], expected["y"]) > SIGNAL_TO_NOISE[scheme]
    ours = nestc.compile(path, threads=1).run(inputs)
    assert made.outputs == model.outputs
    np.testing.assert_allclose(ours["y"], expected["y"], rtol=1e-5, atol=1e-5)
    # And ONNX Runtime's own integer kernels come to the same, but for roundings that fall otherwise.
    assert decibels(expected["y"], run(made, inputs, exact=False)["y"]) > 35


@pytest.mark.parametrize("scheme", ["int8", "int8-symmetric", "int8-pow2", "int16"])
def test_every_quantized_tensor_is_onnx_runtimes_within_one(scheme: str) -> None:
    made = quantized(net(NET, **SHAPES), scheme)
    inner = proto(made)
    tensors = [node.output[0] for node in inner.graph.node if node.op_type == "QuantizeLinear"]
    dtype = {"int8": onnx.TensorProto.UINT8, "int16": onnx.TensorProto.INT16}.get(scheme, onnx.TensorProto.INT8)
    inner.graph.output.extend(onnx.helper.make_tensor_value_info(name, dtype, None) for name in tensors)
    shown = nestc.load(inner)
    inputs = samples(shown, 3)[2]
    expected, found = run(shown, inputs), nestc.compile(shown, threads=1).run(inputs)
    for name in tensors:
        apart = np.abs(found[name].astype(np.int64) - expected[name].astype(np.int64))
        assert apart.max() <= 1 and (apart == 0).mean() >= 0.99, name


def test_both_sides_of_what_only_moves_share_parameters() -> None:
    made = quantized(net(NET, **SHAPES))
    for one, other in (("s", "m"), ("p", "f")):
        assert constant(made, f"{one}_scale") == constant(made, f"{other}_scale")
        assert constant(made, f"{one}_zero_point") == constant(made, f"{other}_zero_point")


def test_operands_of_concat_share_parameters_unless_a_bit_is_lost() -> None:
    graph = """g (float[1,2,4,4] x) => (float[1,2,4,4] y) {
        [a] a = Conv (x, w1)  [b] b = Conv (x, w2)  [c] c = Concat <axis=1> (a, b)  [d] y = Conv (c, w3) }"""
    weights = drawn(w1=(2, 2, 1, 1), w3=(2, 4, 1, 1))
    made = quantized(parsed(f"{HEAD} {graph}", w2=1.5 * weights["w1"], **weights))
    assert constant(made, "a_scale") == constant(made, "b_scale") == constant(made, "c_scale")
    made = quantized(parsed(f"{HEAD} {graph}", w2=2.5 * weights["w1"], **weights))
    assert constant(made, "a_scale") < constant(made, "c_scale") / 2


def test_the_bias_has_the_scale_of_the_sums() -> None:
    model = net(NET, **SHAPES)
    made = quantized(model)
    scale = constant(made, "x_scale") * constant(made, "w1_scale")
    np.testing.assert_array_equal(constant(made, "b1_scale"), scale)
    bias = model.ir.graph.initializers["b1"].const_value
    assert bias is not None
    np.testing.assert_allclose(constant(made, "b1_quantized") * scale, bias.numpy(), atol=scale.max() / 2)


def test_power_of_two_scales() -> None:
    made = quantized(net(NET, **SHAPES), "int8-pow2")
    for name in ("x_scale", "w1_scale", "b1_scale", "s_scale", "w3_scale"):
        np.testing.assert_array_equal(np.frexp(constant(made, name))[0], 0.5)


def test_a_channel_without_weights_keeps_its_bias() -> None:
    weights = drawn(**SHAPES)
    weights["w1"][2], weights["b1"][2] = 0.0, 123.456
    # And one of so small weights that its bias, in units of their scale, does not fit int32.
    weights["w1"][3] *= 1e-8
    model = parsed(f"{HEAD} {NET}", **weights)
    made = quantized(model)
    assert np.isfinite(constant(made, "w1_scale")).all() and (constant(made, "w1_scale") > 0).all()
    bias = constant(made, "b1_quantized").astype(np.float64) * constant(made, "b1_scale")
    np.testing.assert_allclose(bias, weights["b1"], rtol=1e-3, atol=1e-4)
    inputs = samples(model)[0]
    assert decibels(run(model, inputs)["y"], run(made, inputs)["y"]) > 30


def test_constant_tensors_have_a_scale() -> None:
    model = net("""g (float[1,2,4,4] x) => (float[1,2,4,4] y) {
        z = Constant <value_float=0.0> ()  [m] a = Mul (x, z)  [c] y = Conv (a, w, b) }""", w=(2, 2, 1, 1), b=(2,))  # fmt: skip
    made = quantized(model)
    inputs = samples(model)[0]
    np.testing.assert_allclose(run(made, inputs)["y"], run(model, inputs)["y"], atol=1e-6)


def test_one_tensor_in_two_formats() -> None:
    graph = """g (float[2,4] x) => (float[2,4] y, float[2,4] z) {
        [a] y = MatMul (x, w1)  [b] z = MatMul (x, w2) }"""
    made = quantized(net(graph, w1=(4, 4), w2=(4, 4)), "int8", overrides={"b": "int16"})
    text = lines(made)
    assert "x_QuantizeLinear:int16 = QuantizeLinear(x, x_scale, x_zero_point:int16)" in text
    assert "x_QuantizeLinear.1:uint8 = QuantizeLinear(x, x_scale.1, x_zero_point.1:uint8)" in text
    assert "y = MatMul(x_DequantizeLinear.1, w1_DequantizeLinear)" in text
    inputs = samples(made)[0]
    assert set(run(made, inputs)) == {"y", "z"}


def test_a_float_operator_reads_what_an_integer_one_has_rounded() -> None:
    graph = """g (float[2,4] x) => (float[2,4] y, float[2,4] z) {
        [a] t = MatMul (x, w1)  [soft] y = Softmax (t)  [b] z = MatMul (t, w2) }"""
    text = lines(quantized(net(graph, w1=(4, 4), w2=(4, 4))))
    assert "y = Softmax(t_DequantizeLinear)" in text
    graph = "g (float[2,4] x) => (float[2,4] y, float[2,4] z) { [soft] y = Softmax (x)  [b] z = MatMul (x, w) }"
    assert "y = Softmax(x)" in lines(quantized(net(graph, w=(4, 4))))


@pytest.mark.parametrize("inner", [32, 40, 7])
def test_blocks_along_the_sum(inner: int) -> None:
    model = net(f"g (float[2,{inner}] x) => (float[2,3] y) {{ [a] y = MatMul (x, w) }}", w=(inner, 3))
    made = quantized(model, "weight-int4")
    assert constant(made, "w_scale").shape == (-(-inner // 32), 3)
    (dequantize,) = (node for node in made.ir.graph if node.op_type == "DequantizeLinear")
    assert dequantize.attributes["axis"].as_int() == 0
    assert dequantize.attributes["block_size"].as_int() == min(32, inner)
    inputs = samples(model)[0]
    assert decibels(run(model, inputs)["y"], run(made, inputs)["y"]) > 12
    ours = nestc.compile(made, threads=1).run(inputs)["y"]
    np.testing.assert_allclose(ours, run(made, inputs)["y"], rtol=1e-5, atol=1e-5)


def test_reasons_survive_in_the_file(tmp_path: Path) -> None:
    made = quantized(net(NET, **SHAPES), overrides={"conv2": "float"})
    made.save(tmp_path / "q.onnx")
    found = reasons(nestc.load(tmp_path / "q.onnx"))
    assert [each.node for each in found] == ["conv1", "relu", "conv2", "add", "pool", "mean", "flat", "fc"]
    assert "float by the override 'conv2'" in {each.reason for each in found}
    assert kept_float(found) == ["conv2"]
    assert "int8   Conv conv1: activations uint8, weights int8 with a scale a channel" in in_words(found)
    assert reasons(net(NET, **SHAPES)) == []


def test_granularity_can_be_a_tensor() -> None:
    made = quantized(net(NET, **SHAPES), "int8:granularity=tensor")
    assert constant(made, "w1_scale").shape == () and constant(made, "b1_scale").shape == ()


def test_models_that_cannot_be_quantized() -> None:
    model = net(NET, **SHAPES)
    profile = calibrated(model)
    with pytest.raises(QuantizationError, match="quantized already"):
        nestc.quantize(quantized(model), profile)
    with pytest.raises(ModelError, match="another model"):
        nestc.quantize(net(NET, seed=1, **SHAPES), profile)
    with pytest.raises(QuantizationError, match="there is no scheme 'int88', did you mean 'int8'"):
        nestc.quantize(model, profile, "int88")
    with pytest.raises(QuantizationError, match="scheme int8 needs a profile"):
        nestc.quantize(model, None)
    with pytest.raises(QuantizationError, match="there is no accuracy tool 'skuant', did you mean 'squant'"):
        nestc.quantize(model, profile, tools=["skuant"])
    assert nestc.quantize(model, None, "weight-int8").outputs == model.outputs


def test_the_model_given_is_left_alone() -> None:
    model = net(NET, **SHAPES)
    before = model.hash
    quantized(model)
    assert model.hash == before


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.sampled_from([4, 8]), st.integers(0, 2**31),
)  # fmt: skip
def test_squant_cancels_errors(channels: int, kernels: int, elements: int, bits: int, seed: int) -> None:
    high = 2 ** (bits - 1) - 1
    real = np.random.default_rng(seed).uniform(-high, high, (channels, kernels, elements)).astype(np.float32)
    rounded = balanced(real, -high, high)
    assert np.abs(rounded - real).max() < 1.0 and np.array_equal(rounded, np.rint(rounded))
    nearest = np.clip(np.rint(real), -high, high)
    for axes in ((2,), (1, 2)) if kernels == 1 else ((1, 2),):
        before, after = (np.abs((each - real).sum(axis=axes)) for each in (nearest, rounded))
        assert (after <= np.maximum(before, 0.5) + 1e-3).all()


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["tensor", "channel", "block"]), st.booleans(), st.sampled_from(["minmax", "mse"]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_weights_are_rounded_within_their_scale(granularity: str, pow2: bool, method: str, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((6, 10)).astype(np.float32)
    format = Format("int8", per_channel=granularity == "channel", pow2=pow2, block=4 if granularity == "block" else 0)
    scale = weight_scales(values, format, 1, method)
    assert scale.shape == {"tensor": (), "channel": (10,), "block": (6, 3)}[granularity]
    wide = np.repeat(scale, 4, 1)[:, :10] if format.block else scale
    real = round_weights(values, wide, format).astype(np.float32) * wide
    full = weight_scales(values, format, 1, "minmax")
    wide_full = np.repeat(full, 4, 1)[:, :10] if format.block else full
    nearest = round_weights(values, wide_full, format) * wide_full
    assert np.square(real - values).sum() <= np.square(nearest - values).sum() * (1 + 1e-5)
    if method == "minmax":
        assert (np.abs(real - values) <= wide / 2 * (1 + 1e-5)).all()
    with pytest.raises(dataclasses.FrozenInstanceError):
        format.pow2 = not pow2  # pyright: ignore[reportAttributeAccessIssue]
