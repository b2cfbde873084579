"""Networks whose trained weights come in a package without a graph: written to ONNX around those weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import load_file

from netbuilder import NetBuilder, Value
from nets_attention import bert
from torch_file import read_state_dict

# expand ratio, output channels, repeats, stride of the first, kernel (Tan and Le 2019, table 1; lite0 drops squeeze
# and excitation and uses ReLU6).
LITE0_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip
LITE0_EPSILON = 1e-3


def efficientnet_lite0(weights: Path, batch: int = 1) -> onnx.ModelProto:
    """EfficientNet-Lite0 at 224x224 with TensorFlow's "same" padding; batch norms stay nodes of their own."""
    state = read_state_dict(weights)
    net = NetBuilder("efficientnet_lite0")
    x = net.input("input", (batch, 3, 224, 224))
    x = _conv_norm(net, x, state, "_conv_stem", "_bn0", 3, 2)
    index = 0
    for expand, _, repeats, first_stride, kernel in LITE0_STAGES:
        for repeat in range(repeats):
            prefix = f"_blocks.{index}."
            index += 1
            y = x
            if expand > 1:
                y = _conv_norm(net, y, state, f"{prefix}_expand_conv", f"{prefix}_bn0", 1)
            stride = first_stride if repeat == 0 else 1
            y = _conv_norm(net, y, state, f"{prefix}_depthwise_conv", f"{prefix}_bn1", kernel, stride, y.shape[1])
            y = _conv_norm(net, y, state, f"{prefix}_project_conv", f"{prefix}_bn2", 1, activation=None)
            x = net.add(x, y) if repeat else y
    x = _conv_norm(net, x, state, "_conv_head", "_bn1", 1)
    x = net.flatten(net.global_pool(x))
    net.output(net.gemm(x, 1000, weight=state["_fc.weight"], bias=state["_fc.bias"]), "output")
    return net.model()


def _conv_norm(
    net: NetBuilder,
    x: Value,
    state: Mapping[str, np.ndarray],
    conv: str,
    norm: str,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: str | None = "relu6",
) -> Value:
    """Convolution, batch norm and activation, with the odd pixel of "same" padding at the bottom and right."""
    pads = [max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:]]
    begin = [pad // 2 for pad in pads]
    weight = state[f"{conv}.weight"]
    y = net.conv(
        x, weight.shape[0], kernel, stride, groups=groups, weight=weight,
        pads=(begin[0], begin[1], pads[0] - begin[0], pads[1] - begin[1]),
    )  # fmt: skip
    parts = (state[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
    return net.activate(net.batch_norm(y, *parts, epsilon=LITE0_EPSILON), activation)


def minilm_l6_v2(weights: Path) -> onnx.ModelProto:
    """all-MiniLM-L6-v2 with symbolic batch and sequence, up to the last hidden state."""
    return bert("minilm_l6_v2", 6, 384, 12, state=load_file(weights))
