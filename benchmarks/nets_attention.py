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
