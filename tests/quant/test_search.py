"""Sensitivity, scores and the search for a mix of quantized and float nodes."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from quant_nets import batches, chain, parsed

import nestc
from nestc.autoscheme import auto, measure_costs
from nestc.demo.data import INPUT, labelled_images, model_path
from nestc.graph.bind import bind
from nestc.quant.choose import choose
from nestc.quant.prepare import prepare
from nestc.quant.scheme import scheme_named
from nestc.quant.score import Judge, Score
from nestc.quant.search import Costs, estimate_costs, restore_order
from nestc.quant.sensitivity import Sensitivity, sensitivity
from nestc.quantization import calibrate, compiler, quantize
from nestc.targets.cpu.machine import machine

FRAGILE = """
<ir_version: 8, opset_import: ["": 17]>
fragile (float[N, 8] x) => (float[N, 6] y)
<float[8, 8] w1, float[8, 8] wide, float[8, 6] w3>
{
  a = MatMul (x, w1)
  r = Relu (a)
  b = MatMul (r, wide)
  t = Tanh (b)
  y = MatMul (t, w3)
}
"""


def fragile() -> nestc.Model:
    """Three products; the operand of the second has columns of so different sizes that 8 bits lose all but one."""
    generator = np.random.default_rng(3)
    w1 = generator.standard_normal((8, 8)).astype(np.float32)
    wide = generator.standard_normal((8, 8)).astype(np.float32)
    w1[:, 0] *= 4000
    wide[0] /= 4000
    w3 = generator.standard_normal((8, 6)).astype(np.float32)
    return parsed(FRAGILE, w1=w1, wide=wide, w3=w3)


def rows(count: int = 4, size: int = 25) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(8)
    return [{"x": generator.standard_normal((size, 8)).astype(np.float32)} for _ in range(count)]


def test_the_node_that_adds_most_noise_comes_first() -> None:
    model, data = fragile(), rows()
    profile = calibrate(model, data, "minmax")
    prepared = prepare(model)
    assignment = choose(prepared, scheme_named("int8"), None, profile)
    ranking = sensitivity(prepared, profile, assignment, compiler(), data)
    order = [node.name for node in prepared.ir.graph if node.op_type == "MatMul"]
    assert {each.node for each in ranking} >= set(order)
    assert ranking[0].node == order[1] and ranking[0].added > 10 * ranking[1].added
    by_name = {each.node: each for each in ranking}
    assert by_name[order[0]].sqnr_db > 30 > by_name[order[1]].sqnr_db
    assert [each.added for each in ranking] == sorted((each.added for each in ranking), reverse=True)


def test_sensitivity_counts_the_noise_that_numpy_counts() -> None:
    model, data = chain(), batches(3)
    profile = calibrate(model, data, "minmax")
    prepared = prepare(model)
    assignment = choose(prepared, scheme_named("int8"), None, profile)
    last = sensitivity(prepared, profile, assignment, compiler(), data)
    quantized = quantize(model, profile, "int8", tools=[])
    exact, rounded = compiler()(model), compiler()(quantized)
    signal = sum(float((exact(batch)["y"].astype(np.float64) ** 2).sum()) for batch in data)
    noise = sum(float(((exact(batch)["y"] - rounded(batch)["y"]).astype(np.float64) ** 2).sum()) for batch in data)
    product = next(each for each in last if each.op == "MatMul")
    assert product.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=0.5)


def ranked(*added: float) -> list[Sensitivity]:
    return [Sensitivity(f"n{i}", "Conv", 0.0, value) for i, value in enumerate(added)]


def test_what_goes_back_to_float_first_adds_most_noise_for_its_time() -> None:
    ranking = ranked(8.0, 4.0, 2.0, 1.0)
    costs = Costs("measured", {"n0": (100.0, 10.0), "n1": (3.0, 2.0), "n2": (3.0, 1.0), "n3": (2.0, 3.0)})
    assert restore_order(ranking, costs) == ["n3", "n1", "n2", "n0"]  # n3 is slower on integers
    assert costs.total({"n0", "n1"}) == 10 + 2 + 3 + 2 and costs.total(set()) == 108


def test_estimated_costs_are_multiply_accumulates() -> None:
    prepared = prepare(bind(chain(), {"x": [2, 3, 8, 8]}))
    profile = calibrate(bind(chain(), {"x": [2, 3, 8, 8]}), batches(1, size=2))
    costs = estimate_costs(prepared, choose(prepared, scheme_named("int8"), None, profile))
    products = [node for node in prepared.ir.graph if node.op_type in ("Conv", "MatMul")]
    assert costs.kind == "estimated"
    assert [costs.nodes[node.name or ""][0] for node in products] == [2 * 6 * 64 * 27, 2 * 6 * 64 * 6, 2 * 5 * 6]
    assert costs.saved(products[0].name or "") == 2 * 6 * 64 * 27 / 2 and costs.saved("none") == 0.0


def test_measured_costs_name_the_products_of_both_models() -> None:
    model = bind(chain(), {"x": [1, 3, 8, 8]})
    profile = calibrate(model, batches(1))
    prepared = prepare(model)
    costs = measure_costs(prepared, quantize(model, profile, "int8", tools=[]), 1)
    assert costs.kind == "measured"
    for node in prepared.ir.graph:
        if node.op_type in ("Conv", "MatMul"):
            before, after = costs.nodes[node.name or ""]
            assert before > 0 and after > 0


def test_a_generous_budget_quantizes_everything() -> None:
    data = batches(4, size=8)
    found = auto(chain(), calibrate(chain(), data), "int8", data, 1.0)
    assert found.overrides == {} and len(found.steps) == 1 and found.cost == found.cost_quantized
    assert "estimated cost 0.50 of float" in str(found)
    assert found.model.notes[-1] == str(found)


def test_convolutions_get_weights_of_7_bits_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nestc.load(model_path(), shapes={INPUT: [1, 1, 28, 28]})
    images, labels = labelled_images()
    data = [{INPUT: image[None]} for image in images[:60]]
    profile = calibrate(model, data[:20], "minmax")
    machines = {"avx2": "int8:weight-bits=7", "avx512_vnni": "int8"}
    for arch, scheme in machines.items():
        monkeypatch.setattr("nestc.autoscheme.host_machine", lambda arch=arch: machine(arch))
        found = auto(model, profile, "int8", data, 0.05, labels=labels[:60], tools=[])
        assert found.scheme.name == scheme and found.score.loss <= 0.05 and found.costs.kind == "measured"
        weights = [np.abs(value.const_value.numpy()).max() for value in found.model.ir.graph.initializers.values()
                   if value.dtype == ir.DataType.INT8 and value.const_value.numpy().ndim > 1]  # fmt: skip
        assert max(weights) == (63 if "=7" in scheme else 127)


def test_the_mix_holds_the_budget_and_spares_the_fragile_node() -> None:
    model, data = fragile(), rows()
    profile = calibrate(model, data, "minmax")
    whole = quantize(model, profile, "int8", tools=[])
    judge = Judge(compiler()(model), data)
    assert judge.score(compiler()(whole)).loss > 0.1
    found = auto(model, profile, "int8", data, 0.1, tools=[])
    order = [node.name for node in prepare(model).ir.graph if node.op_type == "MatMul"]
    assert found.score.loss <= 0.1 and order[1] in found.overrides and len(found.overrides) < 3
    assert judge.score(compiler()(found.model)).loss == pytest.approx(found.score.loss)
    assert found.cost_quantized <= found.cost < found.cost_float
    assert any(step.predicted_loss is not None for step in found.steps)


def test_a_budget_that_cannot_be_met_states_the_best_found() -> None:
    model, data = fragile(), rows()
    profile = calibrate(model, data, "minmax")
    labels = judge_labels(model, data)
    with pytest.raises(nestc.Error) as caught:
        auto(model, profile, "int8:granularity=tensor,weight=int4", data, 0.0, labels=labels, tools=[])
    message = str(caught.value)
    assert "accuracy budget of 0" in message and "the best of" in message and "of top-1 on 100 samples" in message
    assert "\n" not in message


def judge_labels(model: nestc.Model, data: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([compiler()(model)(batch)["y"].argmax(1) for batch in data])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": None}, "checked on data"),
        ({"accuracy_budget": -0.5}, "0 to 1, not -0.5"),
        ({"accuracy_budget": 2.0}, "0 to 1, not 2"),
        ({"labels": [1, 2, 3]}, "3 labels for 32 samples"),
        ({"data": []}, "no samples to judge by"),
        ({"scheme": "auto:int9"}, "there is no scheme 'int9'"),
        ({"scheme": "int8", "labels": [1]}, "are for scheme auto"),
        ({"overrides": {"*": "float"}}, "finds no product"),
    ],
)
def test_bad_searches(change: dict, said: str) -> None:
    data = batches(4, size=8)
    arguments = {"scheme": "auto", "data": data, "accuracy_budget": 0.5} | change
    if arguments["scheme"] == "int8":
        del arguments["accuracy_budget"]
    with pytest.raises(nestc.Error, match=said) as caught:
        quantize(chain(), calibrate(chain(), data), **arguments)
    assert "\n" not in str(caught.value)


def test_data_that_can_be_read_only_once_are_refused() -> None:
    data = batches(4, size=8)
    with pytest.raises(nestc.DataError, match="can be read only once"):
        auto(chain(), calibrate(chain(), data), "int8", iter(data), 0.5)


def outputs(*rows: list[float]):
    table = np.array(rows, np.float32)
    return lambda batch: {"y": table[batch["x"]]}


def test_scores() -> None:
    exact = outputs([1, 0], [0, 1], [3, 4], [2, 0])
    rounded = outputs([1, 0], [1, 0], [3, 4], [2, 0])
    data = [{"x": np.array([0, 1])}, {"x": np.array([2, 3])}]
    score = Judge(exact, data, np.array([0, 1, 0, 0])).score(rounded)
    assert (score.samples, score.agreement, score.cosine) == (4, 0.75, 0.75)
    assert score.sqnr_db == pytest.approx(10 * math.log10(31 / 2))
    assert (score.top1, score.top1_float) == (0.5, 0.75) and score.loss == 0.25 and score.measure == "top-1"
    same = Judge(exact, data).score(exact)
    assert same == Score(4, 1.0, 1.0, math.inf) and same.loss == 0.0 and "decisions" in same.measure
    assert Score(1, None, 0.9, 3.0).loss == pytest.approx(0.1)
    assert Score(40, 0.95, 1.0, 15.0).loss <= 0.05  # although 1 - 0.95 is above in binary
    with pytest.raises(nestc.Error, match="2 labels for 4 samples"):
        Judge(exact, data, np.array([0, 1]))
