"""Residual networks with normalization and activation in front of each convolution, with random weights.

He et al. 2016, "Identity mappings in deep residual networks" (arXiv:1603.05027), in the layout of MXNet's model zoo
(gluon ``resnet18_v2`` and so on), which is what the VTA project measured: the input is normalized, strides are in the
first convolution of a basic block and in the 3x3 one of a bottleneck, and a stage's shortcut reads the activated sum.
"""

from __future__ import annotations

import numpy as np
import onnx

from netbuilder import NetBuilder, Value

_GAIN = 0.5
"""Standard deviation of what a block adds to the residual sum, which grows by its square with each block."""


def resnet18_v2(batch: int = 1) -> onnx.ModelProto:
    """ResNet-18 with pre-activation."""
    return _network("resnet18_v2", (2, 2, 2, 2), False, batch)


def resnet34_v2(batch: int = 1) -> onnx.ModelProto:
    """ResNet-34 with pre-activation."""
    return _network("resnet34_v2", (3, 4, 6, 3), False, batch)


def resnet50_v2(batch: int = 1) -> onnx.ModelProto:
    """ResNet-50 with pre-activation."""
    return _network("resnet50_v2", (3, 4, 6, 3), True, batch)


def resnet101_v2(batch: int = 1) -> onnx.ModelProto:
    """ResNet-101 with pre-activation."""
    return _network("resnet101_v2", (3, 4, 23, 3), True, batch)


def _network(name: str, blocks: tuple[int, int, int, int], bottleneck: bool, batch: int) -> onnx.ModelProto:
    net = NetBuilder(name)
    x = _norm(net, net.input("input", (batch, 3, 224, 224)), 1.0, affine=False)
    x = _norm(net, net.conv(x, 64, 7, 2, gain=1.0, has_bias=False), 1.0)
    x = net.pool(net.activate(x, "relu"), "max", 3, 2, 1)
    # Of the largest of nine rectified normal numbers that hang together somewhat.
    mean, variance = 1.2, 0.5
    for stage, (channels, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True)):
        width = 4 * channels if bottleneck else channels
        for block in range(count):
            stride = 2 if stage and not block else 1
            before = net.activate(_norm(net, x, variance, mean), "relu")
            y = _bottleneck(net, before, channels, stride) if bottleneck else _basic(net, before, channels, stride)
            if x.shape != y.shape:
                x, mean, variance = net.conv(before, width, 1, stride, gain=2.0**0.5, has_bias=False), 0.0, 1.0
            x = net.add(y, x)
            variance += _GAIN**2
    x = net.activate(_norm(net, x, variance, mean), "relu")
    net.output(net.gemm(net.flatten(net.global_pool(x)), 1000, gain=2.0), "output")
    return net.model()


def _basic(net: NetBuilder, x: Value, channels: int, stride: int) -> Value:
    y = net.conv(x, channels, 3, stride, gain=2.0**0.5, has_bias=False)
    return net.conv(net.activate(_norm(net, y, 1.0), "relu"), channels, 3, gain=_GAIN * 2.0**0.5, has_bias=False)


def _bottleneck(net: NetBuilder, x: Value, channels: int, stride: int) -> Value:
    y = net.conv(x, channels, 1, gain=2.0**0.5, has_bias=False)
    y = net.conv(net.activate(_norm(net, y, 1.0), "relu"), channels, 3, stride, gain=2.0**0.5, has_bias=False)
    y = net.activate(_norm(net, y, 1.0), "relu")
    return net.conv(y, 4 * channels, 1, gain=_GAIN * 2.0**0.5, has_bias=False)


def _norm(net: NetBuilder, x: Value, variance: float, mean: float = 0.0, affine: bool = True) -> Value:
    """BatchNormalization that makes values of this mean and variance about standard normal, each channel a bit off."""
    channels = x.shape[1]
    scatter = [net.random.standard_normal(channels, dtype=np.float32) * np.float32(0.1) for _ in range(4)]
    scale = 1.0 + scatter[0] if affine else np.ones(channels, np.float32)
    bias = scatter[1] if affine else np.zeros(channels, np.float32)
    return net.batch_norm(
        x, scale, bias, np.float32(mean) + scatter[2], np.float32(variance) * np.exp(scatter[3]), 1e-5
    )
