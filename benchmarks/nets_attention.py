"""Transformers written to ONNX the way PyTorch's exporter scatters them, with random or given weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from netbuilder import NetBuilder, Value


def _attention(net: NetBuilder, x: Value, heads: int, weights: Mapping[str, np.ndarray], mask: Value | None) -> Value:
    """Multi-head self-attention up to and including its output projection; `weights` may be empty (random)."""
    batch, length, width = x.shape
    depth = width // heads

    def project(role: str, source: Value, gain: float) -> Value:
        return net.linear(
            source, width, gain=gain, weight=weights.get(f"{role}.weight"), bias=weights.get(f"{role}.bias")
        )

    def heads_of(value: Value) -> Value:
        split = net.reshape(value, (0, 0, heads, depth), (batch, length, heads, depth))
        return net.transpose(split, (0, 2, 1, 3))

    query, key, value = (heads_of(project(role, x, 1.0)) for role in ("query", "key", "value"))
    scores = net.op("MatMul", [query, net.transpose(key, (0, 1, 3, 2))], (batch, heads, length, length))
    scores = net.op("Div", [scores, net.scalar(math.sqrt(depth))], scores.shape)
    if mask is not None:
        scores = net.add(scores, mask)
    attention = net.op("Softmax", [scores], scores.shape, axis=-1)
    mixed = net.op("MatMul", [attention, value], (batch, heads, length, depth))
    merged = net.reshape(net.transpose(mixed, (0, 2, 1, 3)), (0, 0, width), (batch, length, width))
    return project("output", merged, 2.0)


def vit_s16(batch: int = 1) -> onnx.ModelProto:
    """ViT-S/16 at 224x224 (Dosovitskiy et al. 2021, arXiv:2010.11929; width 384, 12 layers, 6 heads), 1000 classes."""
    net = NetBuilder("vit_s16")
    width, tokens = 384, 196
    x = net.conv(net.input("input", (batch, 3, 224, 224)), width, 16, 16, pad=0)
    x = net.transpose(net.reshape(x, (0, 0, -1), (batch, width, tokens)), (0, 2, 1))
    first = net.constant(np.tile(net.random.standard_normal((1, 1, width), dtype=np.float32), (batch, 1, 1)), "class")
    x = net.concat([first, x], axis=1)
    x = net.add(x, net.normal((1, tokens + 1, width), 0.5, "position"))
    for _ in range(12):
        x = net.add(x, _attention(net, net.layer_norm(x, 1e-6), 6, {}, None))
        hidden = net.linear(net.layer_norm(x, 1e-6), 4 * width, "gelu")
        x = net.add(x, net.linear(hidden, width, gain=0.5))
    x = net.layer_norm(x, 1e-6)
    x = net.op("Gather", [x, net.constant(np.array(0, dtype=np.int64), "index")], (batch, width), axis=1)
    net.output(net.gemm(x, 1000), "output")
    return net.model()


def bert(
    name: str,
    layers: int,
    width: int,
    heads: int,
    vocabulary: int = 30522,
    length: int = 128,
    batch: int = 1,
    state: Mapping[str, np.ndarray] | None = None,
    positions: int = 512,
) -> onnx.ModelProto:
    """A BERT encoder (Devlin et al. 2019, arXiv:1810.04805) for token ids [batch, length].

    With `state` (arrays under Hugging Face's names) the weights are those, and both axes stay symbolic in the file
    ("batch", "sequence", as its exporter leaves them); otherwise weights are random and shapes are static.
    """
    net = NetBuilder(name)
    dims = ("batch", "sequence") if state is not None else (batch, length)
    names = ("input_ids", "attention_mask", "token_type_ids")
    ids, attention, types = (net.input(n, (batch, length), TensorProto.INT64, dims) for n in names)
    shape = (batch, length, width)

    def array(key: str, transpose: bool = False) -> np.ndarray | None:
        if state is None:
            return None
        return np.ascontiguousarray(state[key].T) if transpose else state[key]

    def table(key: str, rows: int) -> Value:
        found = array(f"embeddings.{key}.weight")
        return net.normal((rows, width), 0.6, "embedding") if found is None else net.constant(found, "embedding")

    position_table = table("position_embeddings", positions)
    if state is None:
        index = net.constant(np.arange(length, dtype=np.int64)[None], "positions")
    else:
        end = net.op("Shape", [ids], (1,), start=1, end=2)
        index = net.op(
            "Slice", [net.constant(np.arange(positions, dtype=np.int64)[None], "positions"), net.integers(0), end,
                      net.integers(1)], (1, length),
        )  # fmt: skip
    x = net.op("Gather", [table("word_embeddings", vocabulary), ids], shape)
    x = net.add(x, net.op("Gather", [table("token_type_embeddings", 2), types], shape))
    x = net.add(x, net.op("Gather", [position_table, index], (1, length, width)))
    x = net.layer_norm(x, 1e-12, array("embeddings.LayerNorm.weight"), array("embeddings.LayerNorm.bias"))

    mask = net.op("Unsqueeze", [attention, net.integers(1, 2)], (batch, 1, 1, length))
    mask = net.op("Cast", [mask], mask.shape, to=TensorProto.FLOAT)
    mask = net.op("Sub", [net.scalar(1.0), mask], mask.shape)
    mask = net.op("Mul", [mask, net.scalar(float(np.finfo(np.float32).min))], mask.shape)

    roles = {
        "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
        "output": "attention.output.dense",
    }  # fmt: skip
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}."
        weights: dict[str, np.ndarray] = {}
        for role, key in roles.items():
            weight, bias = array(f"{prefix}{key}.weight", transpose=True), array(f"{prefix}{key}.bias")
            if weight is not None and bias is not None:
                weights |= {f"{role}.weight": weight, f"{role}.bias": bias}

        def norm(value: Value, key: str, prefix: str = prefix) -> Value:
            scale, bias = (array(f"{prefix}{key}.LayerNorm.{part}") for part in ("weight", "bias"))
            return net.layer_norm(value, 1e-12, scale, bias)

        def dense(value: Value, features: int, key: str, activation: str | None = None, prefix: str = prefix) -> Value:
            weight, bias = array(f"{prefix}{key}.dense.weight", True), array(f"{prefix}{key}.dense.bias")
            return net.linear(value, features, activation, weight=weight, bias=bias)

        x = norm(net.add(x, _attention(net, x, heads, weights, mask)), "attention.output")
        hidden = dense(x, 4 * width, "intermediate", "gelu")
        x = norm(net.add(x, dense(hidden, width, "output")), "output")
    net.output(x, "last_hidden_state", (*dims, width))
    return net.model()


def bert_base(batch: int = 1) -> onnx.ModelProto:
    """BERT-base at sequence length 128, random weights."""
    return bert("bert_base", 12, 768, 12, batch=batch)


def minilm(batch: int = 1) -> onnx.ModelProto:
    """MiniLM-L6 (width 384, 12 heads) at sequence length 128, random weights."""
    return bert("minilm", 6, 384, 12, batch=batch)


def gpt2_step(
    layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257, past: int = 127
) -> onnx.ModelProto:
    """One step of GPT-2's decoder (Radford et al. 2019; the defaults are its smallest size), batch 1, random weights.

    Inputs: `token` [1] and `position` [1], int64; keys and values of the tokens before, [layers, heads, past, depth].
    Outputs: `logits` [1, vocabulary], and the new token's `keys` and `values` [layers, heads, 1, depth]. The table of
    tokens is the last layer's matrix as well.
    """
    net = NetBuilder("gpt2_step")
    depth = width // heads
    token, position = (net.input(name, (1,), TensorProto.INT64) for name in ("token", "position"))
    cache = [net.input(name, (layers, heads, past, depth)) for name in ("past_keys", "past_values")]
    tokens = net.normal((vocabulary, width), 0.5, "embedding")
    x = net.op("Gather", [tokens, token], (1, width))
    x = net.add(x, net.op("Gather", [net.normal((1024, width), 0.2, "positions"), position], (1, width)))
    made: tuple[list[Value], list[Value]] = ([], [])
    for layer in range(layers):
        normal = net.layer_norm(x, 1e-5)
        parts = [net.linear(normal, width) for _ in range(3)]
        query, key, value = (net.reshape(part, (heads, 1, depth), (heads, 1, depth)) for part in parts)
        for new, known in zip((key, value), made):
            known.append(net.op("Unsqueeze", [new, net.integers(0)], (1, heads, 1, depth)))
        index = net.constant(np.array(layer, np.int64), "layer")
        every = [
            net.concat([net.op("Gather", [old, index], (heads, past, depth), axis=0), new], axis=1)
            for old, new in zip(cache, (key, value))
        ]
        turned = net.transpose(every[0], (0, 2, 1))
        scores = net.op("MatMul", [query, turned], (heads, 1, past + 1))
        scores = net.op("Div", [scores, net.scalar(math.sqrt(depth))], scores.shape)
        attention = net.op("Softmax", [scores], scores.shape, axis=-1)
        mixed = net.op("MatMul", [attention, every[1]], (heads, 1, depth))
        x = net.add(x, net.linear(net.reshape(mixed, (1, width), (1, width)), width))
        hidden = net.linear(net.layer_norm(x, 1e-5), 4 * width, "gelu")
        x = net.add(x, net.linear(hidden, width, gain=0.5))
    x = net.layer_norm(x, 1e-5)
    net.output(net.op("Gemm", [x, tokens], (1, vocabulary), transB=1, alpha=1.0), "logits")
    for name, known in zip(("keys", "values"), made):
        net.output(net.concat(known, axis=0), name)
    return net.model()


def lstm(width: int = 512, inputs: int = 256, steps: int = 8, layers: int = 2) -> onnx.ModelProto:
    """A stacked LSTM (Hochreiter and Schmidhuber 1997) written out step by step, random weights.

    Input `x` [steps, inputs]; output `y` [steps, width]. Gates are one product with the input and one with the state
    for each step, as PyTorch's LSTMCell is exported.
    """
    net = NetBuilder("lstm")
    sequence = net.input("x", (steps, inputs))
    rows = [
        net.op("Gather", [sequence, net.constant(np.array([step], np.int64), "step")], (1, inputs), axis=0)
        for step in range(steps)
    ]
    for _ in range(layers):
        size = rows[0].shape[1]
        weights = {n: net.normal((4 * width, k), 1 / math.sqrt(k)) for n, k in (("input", size), ("state", width))}
        biases = {name: net.normal((4 * width,), 0.1, "bias") for name in weights}
        zero = net.constant(np.zeros((1, width), np.float32), "zero")
        state, cell = zero, zero
        for step, row in enumerate(rows):
            products = {
                name: net.op("Gemm", [value, weights[name], biases[name]], (1, 4 * width), transB=1)
                for name, value in (("input", row), ("state", state))
            }
            both = net.add(products["input"], products["state"])
            gates = [
                net.op(
                    "Slice", [both, net.integers(i * width), net.integers((i + 1) * width), net.integers(1)], (1, width)
                )
                for i in range(4)
            ]
            enter, forget, leave = (net.activate(gates[i], "sigmoid") for i in (0, 1, 3))
            fresh = net.op("Mul", [enter, net.op("Tanh", [gates[2]], (1, width))], (1, width))
            cell = net.add(net.op("Mul", [forget, cell], (1, width)), fresh)
            state = net.op("Mul", [leave, net.op("Tanh", [cell], (1, width))], (1, width))
            rows[step] = state
    net.output(net.concat(rows, axis=0), "y")
    return net.model()
