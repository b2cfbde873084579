"""Which nodes are quantized, and the reason of each."""

from __future__ import annotations

import numpy as np
import pytest
from qdq_support import HEAD, calibrated, net, samples
from quant_nets import parsed

import nestc
from nestc.errors import QuantizationError
from nestc.quant.choose import choose
from nestc.quant.overrides import overrides_of
from nestc.quant.prepare import prepare
from nestc.quant.scheme import scheme_named

RESIDUAL = """g (float[1,3,8,8] x) => (float[1,4] y) {
    [conv1] a = Conv <pads=[1,1,1,1]> (x, w1, b1)  [relu1] r = Relu (a)
    [conv2] c = Conv <pads=[1,1,1,1]> (r, w2)      [add] s = Add (c, r)
    [pool] m = MaxPool <kernel_shape=[2,2]> (s)    [mean] p = GlobalAveragePool (m)
    [flat] f = Flatten (p)                         [fc] h = Gemm (f, w3, b3)
    [soft] y = Softmax (h) }"""
SHAPES = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 6, 3, 3), "w3": (6, 4), "b3": (4,)}


def roles(model: nestc.Model, scheme: str, **overrides: str) -> dict[str, str]:
    found = choose(prepare(model), scheme_named(scheme), overrides_of(overrides))
    return {name: each.role for name, each in found.decisions.items()}


def reason(model: nestc.Model, scheme: str, node: str, **overrides: str) -> str:
    return choose(prepare(model), scheme_named(scheme), overrides_of(overrides)).decisions[node].reason


def test_integer_schemes_take_products_and_what_connects_them() -> None:
    model = net(RESIDUAL, **SHAPES)
    expected = {
        "conv1": "product", "relu1": "tail", "conv2": "product", "add": "active", "pool": "moving", "mean": "active",
        "flat": "moving", "fc": "product", "soft": "float",
    }  # fmt: skip
    for scheme in ("int8", "int8-symmetric", "int8-pow2", "int16"):
        assert roles(model, scheme) == expected
    found = choose(prepare(model), scheme_named("int8"))
    assert found.quantized_ops == {"Conv": 2, "Add": 1, "MaxPool": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert found.kept_float == ["soft"]
    assert found.decisions["conv1"].reason == "activations uint8, weights int8 with a scale a channel"
    assert found.decisions["relu1"].reason == "computed on the result of 'conv1' before that is rounded"
    assert found.decisions["pool"].reason == "moves int8 numbers without changing them"
    assert found.decisions["soft"].reason == "scheme int8 computes Softmax in float"


def test_other_schemes_take_only_products() -> None:
    model = net(RESIDUAL, **SHAPES)
    bf16 = {name: role for name, role in roles(model, "bf16").items() if role != "float"}
    assert bf16 == {"conv1": "product", "conv2": "product", "fc": "product"}
    assert reason(model, "bf16", "fc") == "operands rounded to bfloat16, sums in float32"
    assert {name for name, role in roles(model, "weight-int4").items() if role == "product"} == {"fc"}
    assert reason(model, "weight-int4", "fc") == "weights int4, a scale for 32; activations float"
    assert reason(model, "weight-int4", "conv1") == "scheme weight-int4 computes Conv in float"


def test_nothing_is_quantized_for_itself() -> None:
    model = net("g (float[4] x) => (float[4] y) { [add] a = Add (x, x)  [tanh] y = Tanh (a) }")
    assert roles(model, "int8") == {"add": "float", "tanh": "float"}
    assert reason(model, "int8", "add") == "its result reaches no quantized product"
    last = net("""g (float[1,3,4,4] x) => (float[1,2,1,1] y) {
        [conv] c = Conv (x, w)  [mean] y = GlobalAveragePool (c) }""", w=(2, 3, 1, 1))  # fmt: skip
    assert roles(last, "int8") == {"conv": "product", "mean": "float"}


def test_an_activation_of_a_value_that_others_read_stands_alone() -> None:
    model = net("""g (float[2,4] x) => (float[2,4] y) {
        [p] a = MatMul (x, w1)  [s] b = HardSigmoid (a)  [m] c = Mul (a, b)  [q] y = MatMul (c, w2) }""",
        w1=(4, 4), w2=(4, 4))  # fmt: skip
    assert roles(model, "int8") == {"p": "product", "s": "active", "m": "active", "q": "product"}


def test_products_of_activations() -> None:
    model = net("g (float[2,4,4] x, float[2,4,4] z) => (float[2,4,4] y) { [p] y = MatMul (x, z) }")
    assert reason(model, "int8", "p") == "both operands uint8"
    assert reason(model, "weight-int8", "p") == "it has no constant weight on the right"


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        ("[n] y = Conv (x, k)", "its weight 'k' is not a constant"),
        ("[n] y = ConvTranspose (x, bad)", "its weight holds NaN"),
    ],
)
def test_what_integers_cannot_say(graph: str, why: str) -> None:
    bad = np.full((2, 2, 1, 1), np.nan, np.float32)
    text = f"{HEAD} g (float[1,2,4,4] x, float[2,2,1,1] k) => (float[1,2,4,4] y) {{ {graph} }}"
    assert why in reason(parsed(text, bad=bad), "int8", "n")


def test_interpolation_and_padding_with_other_numbers_stay_float() -> None:
    model = net("""g (float[1,2,4,4] x) => (float[1,2,9,9] y) {
        s = Constant <value_floats=[1.0, 1.0, 2.0, 2.0]> ()
        [a] c = Conv (x, w1)  [r] u = Resize <mode="linear"> (c, , s)
        p = Constant <value=int64[8] {0,0,0,0,0,0,1,1}> ()  one = Constant <value_float=1.0> ()
        [d] v = Pad (u, p, one)  [b] y = Conv (v, w2) }""", w1=(2, 2, 1, 1), w2=(2, 2, 1, 1))  # fmt: skip
    assert reason(model, "int8", "r") == "interpolation is computed in float"
    assert reason(model, "int8", "d") == "it pads with a number other than 0"


def test_overrides_by_name_and_pattern() -> None:
    model = net(RESIDUAL, **SHAPES)
    found = choose(
        prepare(model), scheme_named("int8"), overrides_of({"conv1": "int16", "conv*": "float", "add": "float"})
    )
    by_name = {name: each.scheme and each.scheme.name for name, each in found.decisions.items()}
    assert by_name["conv1"] == "int16" and by_name["relu1"] == "int16" and by_name["conv2"] is None
    assert found.decisions["conv2"].reason == "float by the override 'conv*'"
    # What follows a float Add is no longer fed with integers.
    assert found.decisions["pool"].reason == "none of its inputs comes from a quantized operator"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"conv3": "float"}, "override 'conv3' names no node of the prepared model, did you mean 'conv2'?"),
        ({"x*": "float"}, "override 'x*' matches no node"),
        ({"soft": "int8"}, "override of node 'soft' (Softmax) to int8: scheme int8 computes Softmax in float"),
    ],
)
def test_overrides_that_cannot_be(overrides: dict[str, str], said: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        choose(prepare(net(RESIDUAL, **SHAPES)), scheme_named("int8"), overrides_of(overrides))
    assert said in str(caught.value)


def test_a_tensor_that_was_not_observed_keeps_its_node_float() -> None:
    model = net(RESIDUAL, **SHAPES)
    profile = calibrated(model)
    del profile.tensors["r"]  # pyright: ignore[reportIndexIssue] - a dict in fact
    prepared = prepare(model)
    found = choose(prepared, scheme_named("int8"), profile=profile)
    assert found.decisions["conv2"].reason == "tensor 'r' is not in the profile"
    assert found.decisions["conv1"].role == "product"
    made = nestc.quantize(model, profile, tools=())
    assert nestc.compile(made).run(samples(model)[0])["y"].shape == (1, 4)
