"""What AiM offers: regions read as products, in every form that ONNX has for them, and the reasons that users read."""

from __future__ import annotations

import numpy as np
import pytest
from aim_nets import BFLOAT16, Net, on_cpu, products, regions
from onnx import TensorProto

import nestc
from nestc.graph.region import Region
from nestc.runtime.aim import host
from nestc.runtime.aim.machine import preset
from nestc.targets.aim.cost import rows_needed, seconds, ticks
from nestc.targets.aim.offers import offers
from nestc.targets.aim.regions import Product, Refused, read

MACHINE = preset("gddr6_aim")


def refusal(region: Region, number: str = "bfloat16") -> str | None:
    from nestc.partition.match import best_reason

    reasons = [offer.refusal(region) for offer in offers(MACHINE, number)]
    return None if None in reasons else best_reason([str(reason) for reason in reasons])


def evaluate(product: Product, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A product and what follows it, in plain numpy."""
    values = {**values, **product.constants}
    flat = np.append(values[product.source].reshape(-1).astype(np.float32), np.float32(0))
    vectors = flat[:-1].reshape(product.rows, product.k) if product.take is None else flat[product.take]
    results = vectors @ product.weights().astype(np.float32).T
    if product.bias is not None:
        results = results + product.bias
    if product.activation is not None:
        operator = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "gelu": "Gelu"}[product.activation]
        results = host.OPERATORS[operator]([results], {})
    flat = results.reshape(-1)
    values[product.result] = (flat if product.order is None else flat[product.order]).reshape(product.result_shape)
    for op in product.host:
        values[op.output] = host.evaluate(op, [values[name] if name else None for name in op.inputs])
    return values


def check(net: Net, *outputs: str, shapes: dict[str, tuple[int, ...]]) -> list[Product]:
    """The products of a net; all of it computed through them equals the CPU target's result."""
    model = net.model(*outputs)
    random = np.random.default_rng(1)
    inputs = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    expected = on_cpu(model, inputs)
    values: dict[str, np.ndarray] = dict(inputs)
    found: list[Product] = []
    for region in regions(model):
        if refusal(region) is None:
            found.append(read(region))
            values = evaluate(found[-1], values)
            continue
        for op in region.ops:  # Cast and views, which the host target's operators have too
            type_ = region.types[op.outputs[0]]
            step = host.HostOp(op.op_type, op.inputs[:1], op.outputs[0], type_.dtype, type_.shape, {})
            values[op.outputs[0]] = host.evaluate(step, [values[op.inputs[0]]])
    for name in outputs:
        assert values[name].dtype == expected[name].dtype
        np.testing.assert_allclose(values[name], expected[name], rtol=2e-5, atol=2e-5)
    return found


def test_the_offer_names_scheme_operators_and_cost() -> None:
    offer, recurrent, elementwise = offers(MACHINE, "bfloat16", lambda region: 1e-3)
    assert recurrent.anchors == {"LSTM", "GRU"} and elementwise.anchors == {None}
    assert offer.quant is not None and offer.quant.scheme == "bf16"
    assert offer.anchors == {"Gemm", "MatMul", "Conv"} and {"Relu", "Add", "Gelu"} <= offer.ops
    assert offer.cost is not None and all(rule.reason for rule in offer.where)


def test_a_layer_has_its_bias_and_activation() -> None:
    net = Net()
    x = net.input((1, 40))
    y = net.node("Relu", net.node("Gemm", x, net.matrix(24, 40), net.constant(np.arange(24) / 8), transB=1))
    (product,) = check(net, y, shapes={x: (1, 40)})
    assert (product.rows, product.m, product.k) == (1, 24, 40)
    assert product.activation == "relu" and not product.host
    np.testing.assert_array_equal(product.bias, np.arange(24, dtype=np.float32) / 8)
    assert product.weights().dtype == BFLOAT16 and product.weights().shape == (24, 40)


@pytest.mark.parametrize("activation", ["Sigmoid", "Tanh", "Gelu"])
def test_a_bias_of_its_own_and_curves(activation: str) -> None:
    net = Net()
    x = net.input((2, 3, 40))
    y = net.node(activation, net.node("Add", net.node("MatMul", x, net.matrix(40, 24)), net.matrix(24)))
    (product,) = check(net, y, shapes={x: (2, 3, 40)})
    assert product.rows == 6 and product.bias is not None and not product.host
    assert product.activation == activation.lower()


def test_what_the_banks_do_not_have_is_left_to_the_host() -> None:
    net = Net()
    x, residual = net.input((1, 40)), net.input((1, 24))
    y = net.node("Add", net.node("MatMul", x, net.matrix(40, 24)), residual)
    y = net.node("LeakyRelu", net.node("Mul", y, net.constant(0.5)), alpha=0.25)
    (product,) = check(net, y, shapes={x: (1, 40), residual: (1, 24)})
    assert [op.op for op in product.host] == ["Add", "Mul", "LeakyRelu"]
    assert product.bias is None and product.activation is None


def test_gelu_by_tanh_is_exact_on_the_host() -> None:
    net = Net()
    x = net.input((1, 40))
    y = net.node("Gelu", net.node("MatMul", x, net.matrix(40, 24)), approximate="tanh")
    (product,) = check(net, y, shapes={x: (1, 40)})
    assert [op.op for op in product.host] == ["Gelu"] and product.activation is None


def test_numbers_between_layers_are_rounded_by_the_host() -> None:
    net = Net()
    x = net.input((1, 40))
    h = net.node("Relu", net.node("MatMul", x, net.matrix(40, 24)))
    y = net.node("MatMul", h, net.matrix(24, 8))
    first, second = check(net, y, shapes={x: (1, 40)})
    assert [op.op for op in first.host] == ["Cast"] and first.host[0].dtype == "bfloat16"
    assert second.source == first.host[0].output


def test_the_matrix_on_the_left() -> None:
    net = Net()
    x = net.input((40, 3))
    y = net.node("MatMul", net.matrix(24, 40), x)
    y = net.node("Add", y, net.matrix(24, 1))
    (product,) = check(net, net.node("Sigmoid", y), shapes={x: (40, 3)})
    assert (product.rows, product.m, product.k) == (3, 24, 40)
    assert product.bias is not None and product.activation == "sigmoid"


def test_the_matrix_on_the_left_of_a_batch() -> None:
    net = Net()
    x = net.input((2, 40, 3))
    (product,) = check(net, net.node("MatMul", net.matrix(24, 40), x), shapes={x: (2, 40, 3)})
    assert (product.rows, product.m, product.k) == (6, 24, 40)
    assert product.take is not None and product.order is not None


def test_gemm_with_all_its_attributes() -> None:
    net = Net()
    x = net.input((40, 5))
    y = net.node("Gemm", x, net.matrix(40, 24), net.matrix(5, 24), transA=1, alpha=0.3, beta=0.7)
    (product,) = check(net, y, shapes={x: (40, 5)})
    assert product.rows == 5 and product.bias is None
    assert [op.op for op in product.host] == ["Mul", "Mul", "Add"]
    net = Net()
    x = net.input((2, 40))
    (product,) = check(net, net.node("Gemm", x, net.matrix(40, 24), alpha=0.3), shapes={x: (2, 40)})
    assert [op.op for op in product.host] == ["Mul", "Identity"]


@pytest.mark.parametrize(
    ("image", "kernel", "attributes"),
    [
        ((1, 24, 1, 1), (40, 24, 1, 1), {}),
        ((2, 8, 3, 2), (16, 8, 1, 1), {}),
        ((1, 8, 4, 5), (16, 8, 3, 2), {"pads": [1, 0, 1, 1], "strides": [2, 2], "dilations": [1, 2]}),
        ((1, 8, 9), (16, 8, 3), {"pads": [2, 1], "strides": [2]}),
        ((1, 8, 6), (16, 8, 3), {"auto_pad": "SAME_UPPER"}),
    ],
)
def test_convolutions_with_few_positions(
    image: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, list[int]]
) -> None:
    net = Net()
    x = net.input(image)
    y = net.node("Relu", net.node("Conv", x, net.matrix(*kernel), net.matrix(kernel[0]), **attributes))
    (product,) = check(net, y, shapes={x: image})
    assert product.activation == "relu" and product.bias is not None


def test_values_shared_by_several_products_arrive_narrow() -> None:
    net = Net()
    x = net.input((1, 40))
    weights = net.matrix(40, 24)
    y = [net.node("MatMul", x, net.matrix(40, 24)), net.node("MatMul", x, weights)]
    z = net.node("MatMul", net.node("Reshape", x, net.constant([1, 1, 40], np.int64)), weights)
    found = check(net, *y, z, shapes={x: (1, 40)})
    assert len(found) == 3 and found[0].source == found[1].source


def test_what_the_tail_reads_of_the_vectors_is_widened_again() -> None:
    net = Net()
    x = net.input((1, 24))
    h = net.node("Relu", net.node("MatMul", x, net.matrix(24, 24)))
    y = net.node("Add", net.node("MatMul", h, net.matrix(24, 24)), h)
    check(net, y, shapes={x: (1, 24)})


def test_float16_models_need_a_target_of_that_format() -> None:
    net = Net()
    x = net.input((1, 40), TensorProto.FLOAT16)
    model = net.float_model(net.node("MatMul", x, net.matrix(40, 24, dtype=np.float16)), dtype=TensorProto.FLOAT16)
    (region,) = products(model)
    assert read(region).number == "float16"
    assert refusal(region, "float16") is None
    assert "write aim:number=float16" in str(refusal(region))


def refused(net: Net, y: str, quantized: bool = True) -> str:
    (region,) = products(net.model(y) if quantized else net.float_model(y))
    with pytest.raises(Refused) as reason:
        read(region)
    assert refusal(region) == str(reason.value)
    assert not all(rule.holds(region) for rule in offers(MACHINE)[0].where)
    return str(reason.value)


def test_refusals_say_what_to_do() -> None:
    net = Net()
    y = net.node("MatMul", net.input((1, 40)), net.matrix(40, 24))
    assert refused(net, y, quantized=False) == (
        "MatMul (node 'n_matmul0') multiplies float32 and AiM multiplies bfloat16 or float16: quantize the model with "
        "scheme bf16 (or have operands rounded with aim:round=true)"
    )
    net = Net()
    y = net.node("MatMul", net.input((17, 40)), net.matrix(40, 24))
    assert "with 17 vectors; AiM reads the matrix again for each, so that it takes no more than 16" in refused(net, y)
    net = Net()
    y = net.node("MatMul", net.input((1, 40)), net.input((40, 24)))
    assert "multiplies two values that the model computes" in refused(net, y)
    net = Net()
    y = net.node("MatMul", net.input((2, 1, 40)), net.matrix(2, 40, 24))
    assert "multiplies with several matrices" in refused(net, y)
    net = Net()
    y = net.node("Conv", net.input((1, 8, 2, 2)), net.matrix(8, 4, 1, 1), group=2)
    assert "has groups" in refused(net, y)
    net = Net()
    y = net.node("Conv", net.input((1, 8, 1, 1)), net.matrix(8, 8, 1, 1))
    assert "multiplies float32" in refused(net, y, quantized=False)


def test_regions_without_a_product_and_integers_are_refused() -> None:
    net = Net()
    (region,) = regions(net.model(net.node("Relu", net.input((1, 40)))))
    assert "no product or sum of two values" in str(refusal(region))
    net = Net()
    model = net.float_model(net.node("MatMul", net.input((1, 40)), net.matrix(40, 24)))
    batches = [{"x0": np.ones((1, 40), np.float32)}]
    import nestc

    model = nestc.quantize(model, nestc.calibrate(model, batches), scheme="int8")
    reasons = [refusal(region) for region in products(model)]
    assert any("quantize the model with scheme bf16" in str(reason) for reason in reasons)


def test_costs_are_those_of_the_mapping_that_is_chosen() -> None:
    """Shapes whose compiled launch has no other products in it: equal for one vector, and for more within 3 %."""
    for m, k, rows in ((4096, 1024, 1), (24, 72, 1), (130, 300, 1), (130, 300, 9), (700, 64, 16)):
        net = Net()
        model = net.model(net.node("Relu", net.node("MatMul", net.input((rows, k)), net.matrix(k, m))))
        (region,) = products(model)
        (artifact,) = [p.artifact for p in nestc.compile(model, targets=["aim"]).bundle.partitions if p.device == "aim"]
        compiled = artifact.metadata["timing"]["seconds"]
        assert seconds(region, MACHINE) == pytest.approx(compiled, rel=1e-9 if rows == 1 else 0.03)
    assert ticks(4096, 1024, 3, MACHINE) < 3 * ticks(4096, 1024, 1, MACHINE)
    assert rows_needed(4096, 1024, MACHINE) == 8 and rows_needed(513, 1025, MACHINE) == 3


def test_an_addend_that_differs_from_vector_to_vector_is_no_bias() -> None:
    net = Net()
    x = net.input((3, 40))
    y = net.node("Gemm", x, net.matrix(40, 24), net.matrix(3, 24))
    (product,) = check(net, y, shapes={x: (3, 40)})
    assert product.bias is None and [op.op for op in product.host] == ["Add"]
