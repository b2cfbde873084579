import numpy as np
import onnx
import onnxruntime as ort
import pytest


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


def test_tracked_shapes_are_those_onnx_infers() -> None:
    from netbuilder import NetBuilder

    net = NetBuilder("shapes")
    x = net.input("x", (1, 3, 13, 17))
    values = [net.conv(x, 6, (3, 1), 2, activation="silu")]
    values += [net.pool(values[-1], "max", 3, 2, ceil=True), net.pool(values[-1], "average", 3, 2, 1)]
    values += [net.concat([values[1], values[1]]), net.flatten(values[1])]
    values += [net.gemm(values[-1], 5, "gelu"), net.transpose(values[0], (0, 2, 3, 1))]
    values += [net.layer_norm(net.linear(values[-1], 4), 1e-5), net.global_pool(values[0])]
    for number, value in enumerate(values):
        net.output(value, f"y{number}")
    model = net.model()
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = [tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in inferred.graph.output]
    assert shapes == [value.shape for value in values]


@pytest.mark.parametrize("name", ["mobilenetv2", "shufflenetv2"])
def test_networks_run_with_activations_of_moderate_size(name: str) -> None:
    import nets_vision

    model = getattr(nets_vision, name)()
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    (output,) = run(model, {"input": image})
    assert output.shape == (1, 1000)
    assert 0.1 < output.std() < 10


def test_same_seed_same_weights() -> None:
    import nets_vision

    assert nets_vision.shufflenetv2().SerializeToString() == nets_vision.shufflenetv2().SerializeToString()


def test_encoder_from_a_state_dict_keeps_symbolic_axes_and_masks_padding() -> None:
    import nets_attention

    random = np.random.default_rng(1)
    width, layers = 8, 1

    def table(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    state = {
        "embeddings.word_embeddings.weight": table(20, width),
        "embeddings.position_embeddings.weight": table(16, width),
        "embeddings.token_type_embeddings.weight": table(2, width),
        "embeddings.LayerNorm.weight": np.ones(width, np.float32),
        "embeddings.LayerNorm.bias": np.zeros(width, np.float32),
    }
    prefix = "encoder.layer.0."
    for key in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
        state |= {f"{prefix}{key}.weight": table(width, width), f"{prefix}{key}.bias": table(width)}
    state |= {f"{prefix}intermediate.dense.weight": table(4 * width, width)}
    state |= {f"{prefix}intermediate.dense.bias": table(4 * width)}
    state |= {f"{prefix}output.dense.weight": table(width, 4 * width), f"{prefix}output.dense.bias": table(width)}
    for key in ("attention.output", "output"):
        state |= {f"{prefix}{key}.LayerNorm.weight": np.ones(width, np.float32)}
        state |= {f"{prefix}{key}.LayerNorm.bias": np.zeros(width, np.float32)}
    model = nets_attention.bert("tiny", layers, width, 2, state=state, positions=16)
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "sequence"]

    def hidden(ids: list[int], mask: list[int]) -> np.ndarray:
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": [0] * len(ids)}
        return run(model, {key: np.array([value], np.int64) for key, value in feeds.items()})[0]

    short = hidden([3, 4, 5], [1, 1, 1])
    padded = hidden([3, 4, 5, 7, 7], [1, 1, 1, 0, 0])
    np.testing.assert_allclose(padded[:, :3], short, rtol=1e-5, atol=1e-5)


def test_flops_of_each_counted_operator() -> None:
    from onnx import helper

    from work import node_flops

    shapes = {
        "x": (1, 8, 10, 10), "w": (16, 2, 3, 3), "y": (1, 16, 5, 5),
        "a": (4, 6), "b": (6, 5), "c": (4, 5),
        "s": (7, 2, 3), "W": (1, 40, 3), "R": (1, 40, 10), "o": (7, 1, 2, 10),
    }  # fmt: skip
    assert node_flops(helper.make_node("Conv", ["x", "w"], ["y"], group=4), shapes) == 2 * 400 * 18
    assert node_flops(helper.make_node("Gemm", ["a", "b"], ["c"]), shapes) == 2 * 20 * 6
    assert node_flops(helper.make_node("MatMul", ["a", "b"], ["c"]), shapes) == 2 * 20 * 6
    lstm = helper.make_node("LSTM", ["s", "W", "R"], ["o"], hidden_size=10)
    assert node_flops(lstm, shapes) == 2 * 7 * 2 * 40 * 13
