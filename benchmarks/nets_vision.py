"""Convolutional networks of the literature, written to ONNX with random weights; sizes follow the cited papers.

Each function returns a checked model with input "input" [batch, 3, H, W] and output "output" [batch, 1000] logits.
"""

from __future__ import annotations

import onnx

from netbuilder import NetBuilder, Value


def _start(name: str, size: int, batch: int, seed: int = 0) -> tuple[NetBuilder, Value]:
    net = NetBuilder(name, seed)
    return net, net.input("input", (batch, 3, size, size))


def _head(net: NetBuilder, x: Value, classes: int = 1000) -> onnx.ModelProto:
    """Global pooling and the classifier; the gain makes up for the variance that averaging takes away."""
    pooled = net.flatten(net.global_pool(x))
    net.output(net.gemm(pooled, classes, gain=2.0), "output")
    return net.model()


def resnet18(batch: int = 1) -> onnx.ModelProto:
    """ResNet-18 (He et al. 2016, arXiv:1512.03385)."""
    return _basic_blocks("resnet18", (2, 2, 2, 2), batch)


def resnet34(batch: int = 1) -> onnx.ModelProto:
    """ResNet-34 (He et al. 2016, arXiv:1512.03385)."""
    return _basic_blocks("resnet34", (3, 4, 6, 3), batch)


def _basic_blocks(name: str, blocks: tuple[int, int, int, int], batch: int) -> onnx.ModelProto:
    """A residual network of so many blocks of two 3x3 convolutions in each stage."""
    net, x = _start(name, 224, batch)
    x = net.pool(net.conv(x, 64, 7, 2, activation="relu"), "max", 3, 2, 1)
    for stage, (channels, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True)):
        for block in range(count):
            stride = 2 if stage and not block else 1
            y = net.conv(x, channels, 3, stride, activation="relu")
            y = net.conv(y, channels, 3, gain=0.5)
            x = x if x.shape == y.shape else net.conv(x, channels, 1, stride)
            x = net.activate(net.add(y, x), "relu")
    return _head(net, x)


def resnet50(batch: int = 1) -> onnx.ModelProto:
    """ResNet-50 with the stride in the 3x3 convolution ("v1.5", as torchvision has it)."""
    net, x = _start("resnet50", 224, batch)
    x = net.pool(net.conv(x, 64, 7, 2, activation="relu"), "max", 3, 2, 1)
    for stage, (channels, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = net.conv(x, channels, 1, activation="relu")
            y = net.conv(y, channels, 3, stride, activation="relu")
            y = net.conv(y, 4 * channels, 1, gain=0.5)
            x = x if x.shape == y.shape else net.conv(x, 4 * channels, 1, stride)
            x = net.activate(net.add(y, x), "relu")
    return _head(net, x)


def mobilenetv2(batch: int = 1) -> onnx.ModelProto:
    """MobileNetV2 1.0 (Sandler et al. 2018, arXiv:1801.04381)."""
    net, x = _start("mobilenetv2", 224, batch)
    x = net.conv(x, 32, 3, 2, activation="relu6")
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, channels, repeats, first_stride in stages:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            hidden = x.shape[1] * expand
            y = net.conv(x, hidden, 1, activation="relu6") if expand > 1 else x
            y = net.conv(y, hidden, 3, stride, groups=hidden, activation="relu6")
            y = net.conv(y, channels, 1, gain=0.7 if repeat else 1.0)
            x = net.add(x, y) if repeat else y
    return _head(net, net.conv(x, 1280, 1, activation="relu6"))


def squeezenet11(batch: int = 1) -> onnx.ModelProto:
    """SqueezeNet 1.1 (Iandola et al. 2016, arXiv:1602.07360)."""
    net, x = _start("squeezenet11", 224, batch)
    x = net.conv(x, 64, 3, 2, pad=0, activation="relu")
    for item in ("pool", 16, 16, "pool", 32, 32, "pool", 48, 48, 64, 64):
        if isinstance(item, str):
            x = net.pool(x, "max", 3, 2, ceil=True)
            continue
        squeezed = net.conv(x, item, 1, activation="relu")
        x = net.concat(
            [net.conv(squeezed, item * 4, 1, activation="relu"), net.conv(squeezed, item * 4, 3, activation="relu")]
        )
    x = net.conv(x, 1000, 1, activation="relu")
    net.output(net.flatten(net.global_pool(x)), "output")
    return net.model()


def shufflenetv2(batch: int = 1) -> onnx.ModelProto:
    """ShuffleNetV2 1.0x (Ma et al. 2018, arXiv:1807.11164)."""
    net, x = _start("shufflenetv2", 224, batch)
    x = net.pool(net.conv(x, 24, 3, 2, activation="relu"), "max", 3, 2, 1)
    for channels, blocks in ((116, 4), (232, 8), (464, 4)):
        half = channels // 2
        for block in range(blocks):
            if block:
                left, right = _halves(net, x)
                stride = 1
            else:
                left = net.conv(net.conv(x, x.shape[1], 3, 2, groups=x.shape[1]), half, 1, activation="relu")
                right, stride = x, 2
            right = net.conv(right, half, 1, activation="relu")
            right = net.conv(net.conv(right, half, 3, stride, groups=half), half, 1, activation="relu")
            x = _shuffle(net, net.concat([left, right]), 2)
    return _head(net, net.conv(x, 1024, 1, activation="relu"))


def _halves(net: NetBuilder, x: Value) -> tuple[Value, Value]:
    """Split the channels in two."""
    n, c, h, w = x.shape
    half = (n, c // 2, h, w)
    name = net.fresh("split")
    left, right = Value(f"{name}_left", half), Value(f"{name}_right", half)
    net.nodes.append(
        onnx.helper.make_node(
            "Split", [x.name, net.integers(c // 2, c // 2).name], [left.name, right.name], name=name, axis=1
        )
    )
    return left, right


def _shuffle(net: NetBuilder, x: Value, groups: int) -> Value:
    """Interleave the channels of `groups` groups."""
    n, c, h, w = x.shape
    split = (n, groups, c // groups, h, w)
    turned = net.transpose(net.reshape(x, split, split), (0, 2, 1, 3, 4))
    return net.reshape(turned, x.shape, x.shape)


def efficientnet_b0(batch: int = 1) -> onnx.ModelProto:
    """EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946), padding symmetric as torchvision has it."""
    net, x = _start("efficientnet_b0", 224, batch)
    x = net.conv(x, 32, 3, 2, activation="silu")
    stages = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )  # fmt: skip
    for expand, channels, repeats, first_stride, kernel in stages:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            squeeze = max(1, x.shape[1] // 4)
            hidden = x.shape[1] * expand
            y = net.conv(x, hidden, 1, activation="silu") if expand > 1 else x
            y = net.conv(y, hidden, kernel, stride, groups=hidden, activation="silu")
            gate = net.conv(net.conv(net.global_pool(y), squeeze, 1, activation="silu"), hidden, 1)
            y = net.op("Mul", [y, net.activate(gate, "sigmoid")], y.shape)
            # The gate halves the amplitude, hence more than the usual gain.
            y = net.conv(y, channels, 1, gain=1.0 if repeat else 1.6)
            x = net.add(x, y) if repeat else y
    return _head(net, net.conv(x, 1280, 1, activation="silu"))


def vgg16(batch: int = 1) -> onnx.ModelProto:
    """VGG-16 (Simonyan and Zisserman 2015, arXiv:1409.1556)."""
    net, x = _start("vgg16", 224, batch)
    for channels, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            x = net.conv(x, channels, 3, activation="relu")
        x = net.pool(x, "max", 2, 2)
    x = net.gemm(net.gemm(net.flatten(x), 4096, "relu"), 4096, "relu")
    net.output(net.gemm(x, 1000), "output")
    return net.model()


def googlenet(batch: int = 1) -> onnx.ModelProto:
    """GoogLeNet (Szegedy et al. 2015, arXiv:1409.4842) with 3x3 in place of 5x5, as torchvision has it."""
    net, x = _start("googlenet", 224, batch)

    def inception(x: Value, c1: int, r3: int, c3: int, r5: int, c5: int, pool: int) -> Value:
        return net.concat(
            [
                net.conv(x, c1, 1, activation="relu"),
                net.conv(net.conv(x, r3, 1, activation="relu"), c3, 3, activation="relu"),
                net.conv(net.conv(x, r5, 1, activation="relu"), c5, 3, activation="relu"),
                net.conv(net.pool(x, "max", 3, 1, 1, ceil=True), pool, 1, activation="relu"),
            ]
        )

    x = net.pool(net.conv(x, 64, 7, 2, activation="relu"), "max", 3, 2, ceil=True)
    x = net.conv(net.conv(x, 64, 1, activation="relu"), 192, 3, activation="relu")
    x = net.pool(x, "max", 3, 2, ceil=True)
    x = inception(x, 64, 96, 128, 16, 32, 32)
    x = net.pool(inception(x, 128, 128, 192, 32, 96, 64), "max", 3, 2, ceil=True)
    for sizes in (
        (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),
    ):  # fmt: skip
        x = inception(x, *sizes)
    x = net.pool(x, "max", 2, 2, ceil=True)
    x = inception(x, 256, 160, 320, 32, 128, 128)
    return _head(net, inception(x, 384, 192, 384, 48, 128, 128))


def inception_v3(batch: int = 1) -> onnx.ModelProto:
    """Inception v3 at 299x299 (Szegedy et al. 2016, arXiv:1512.00567), blocks named as in torchvision."""
    net, x = _start("inception_v3", 299, batch)

    def conv(x: Value, channels: int, kernel: int | tuple[int, int], stride: int = 1, pad: int | None = None) -> Value:
        return net.conv(x, channels, kernel, stride, pad, activation="relu")

    def average(x: Value) -> Value:
        return net.pool(x, "average", 3, 1, 1)

    def block_a(x: Value, pool: int) -> Value:
        double = conv(conv(conv(x, 64, 1), 96, 3), 96, 3)
        return net.concat([conv(x, 64, 1), conv(conv(x, 48, 1), 64, 5), double, conv(average(x), pool, 1)])

    def block_b(x: Value) -> Value:
        double = conv(conv(conv(x, 64, 1), 96, 3), 96, 3, 2, 0)
        return net.concat([conv(x, 384, 3, 2, 0), double, net.pool(x, "max", 3, 2)])

    def block_c(x: Value, c: int) -> Value:
        seven = conv(conv(conv(x, c, 1), c, (1, 7)), 192, (7, 1))
        double = conv(conv(conv(conv(conv(x, c, 1), c, (7, 1)), c, (1, 7)), c, (7, 1)), 192, (1, 7))
        return net.concat([conv(x, 192, 1), seven, double, conv(average(x), 192, 1)])

    def block_d(x: Value) -> Value:
        seven = conv(conv(conv(conv(x, 192, 1), 192, (1, 7)), 192, (7, 1)), 192, 3, 2, 0)
        return net.concat([conv(conv(x, 192, 1), 320, 3, 2, 0), seven, net.pool(x, "max", 3, 2)])

    def block_e(x: Value) -> Value:
        three = conv(x, 384, 1)
        three = net.concat([conv(three, 384, (1, 3)), conv(three, 384, (3, 1))])
        double = conv(conv(x, 448, 1), 384, 3)
        double = net.concat([conv(double, 384, (1, 3)), conv(double, 384, (3, 1))])
        return net.concat([conv(x, 320, 1), three, double, conv(average(x), 192, 1)])

    x = conv(conv(conv(x, 32, 3, 2, 0), 32, 3, 1, 0), 64, 3)
    x = net.pool(x, "max", 3, 2)
    x = net.pool(conv(conv(x, 80, 1), 192, 3, 1, 0), "max", 3, 2)
    x = block_b(block_a(block_a(block_a(x, 32), 64), 64))
    x = block_c(block_c(block_c(block_c(x, 128), 160), 160), 192)
    return _head(net, block_e(block_e(block_d(x))))


def ds_cnn() -> onnx.ModelProto:
    """DS-CNN of MLPerf Tiny's keyword spotting (Banbury et al. 2021, arXiv:2106.07597; Zhang et al. 2017,
    arXiv:1711.07128), batch norms folded: input "input" [1, 1, 49, 10], output "output" [1, 12], probabilities.
    """
    net = NetBuilder("ds_cnn")
    x = net.input("input", (1, 1, 49, 10))
    # TensorFlow's "same" padding, which puts the odd row at the end.
    x = net.conv(x, 64, (10, 4), 2, pads=(4, 1, 5, 1), activation="relu")
    for _ in range(4):
        x = net.conv(x, 64, 3, groups=64, activation="relu")
        x = net.conv(x, 64, 1, activation="relu")
    logits = net.gemm(net.flatten(net.global_pool(x)), 12, gain=2.0)
    net.output(net.op("Softmax", [logits], logits.shape, axis=-1), "output")
    return net.model()
