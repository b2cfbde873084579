"""Trains the network of `nestc demo` on Fashion-MNIST and writes src/nestc/demo/model.onnx and images.npz.

    pip install torch==2.13.0
    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    python scripts/train_demo.py --data fashion/usr/share/datasets/fashion-mnist

The network has what bigger ones have: dense 3x3 convolutions, residual blocks, a depthwise separable one, batch norms
and a classifier. Seeds, order of the data and augmentation are fixed; torch gives the same weights again on the same
version and kind of processor with as many threads (--threads 1 here). Takes about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "nestc" / "demo"
SEED = 2026
SHIPPED = 500

log = logging.getLogger("train_demo")


def read_idx(path: Path) -> np.ndarray:
    """Array of a gzipped IDX file (http://yann.lecun.com/exdb/mnist): two zero bytes, type, rank, big-endian sizes."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """relu(x + body(x)), with a 1x1 convolution beside the body where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.body(x) + self.skip(x))


def dense(inputs: int, outputs: int, stride: int) -> Residual:
    """A residual block of two 3x3 convolutions."""
    body = nn.Sequential(convolution(inputs, outputs, 3, stride), nn.ReLU(), convolution(outputs, outputs, 3))
    return Residual(inputs, outputs, stride, body)


def separable(width: int, hidden: int) -> Residual:
    """A residual block of 1x1, depthwise 3x3 and 1x1 convolutions."""
    body = nn.Sequential(
        convolution(width, hidden, 1), nn.ReLU6(), convolution(hidden, hidden, 3, groups=hidden), nn.ReLU6(),
        convolution(hidden, width, 1),
    )  # fmt: skip
    return Residual(width, width, 1, body)


def network() -> nn.Module:
    """The demo's classifier: [batch, 1, 28, 28] in 0..1 to [batch, 10] logits."""
    return nn.Sequential(
        convolution(1, 16, 3), nn.ReLU(), dense(16, 32, 2), separable(32, 96), dense(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def augment(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Random mirror and a shift by up to two pixels, per image."""
    padded = functional.pad(images, (2, 2, 2, 2))
    top, left = (torch.randint(0, 5, (len(images),), generator=random) for _ in range(2))
    rows = (top[:, None] + torch.arange(28))[:, :, None]
    columns = left[:, None] + torch.arange(28)
    mirrored = torch.rand(len(images), generator=random) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)[:, None, :]
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def train_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    images: torch.Tensor,
    labels: torch.Tensor,
    random: torch.Generator,
    batch: int,
) -> float:
    """One pass over the data in random order; returns the mean loss."""
    net.train()
    order = torch.randperm(len(images), generator=random)
    losses: list[float] = []
    for chosen in order[: len(order) // batch * batch].split(batch):
        optimizer.zero_grad()
        logits = net(augment(images[chosen], random))
        loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images classified rightly."""
    net.eval()
    right = sum((net(x).argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500), strict=True))
    return right / len(images)


def load(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 1, 28, 28] in 0..1 and labels of "train" or "t10k"."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return torch.from_numpy(images.astype(np.float32) / 255)[:, None], torch.from_numpy(labels.astype(np.int64))


def train(folder: Path, epochs: int, batch: int = 128) -> tuple[nn.Module, float]:
    """Train on the whole training set; returns the network and its accuracy on the whole test set."""
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    images, labels = load(folder, "train")
    test = load(folder, "t10k")
    net = network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    reached = 0.0
    for epoch in range(epochs):
        loss = train_epoch(net, optimizer, schedule, images, labels, random, batch)
        reached = accuracy(net, *test)
        log.info("epoch %2d: loss %.4f, test accuracy %.4f", epoch + 1, loss, reached)
    return net, reached


def export(net: nn.Module, path: Path) -> None:
    """Write the network as ONNX with a symbolic batch, batch norms folded by nobody: that is the compiler's work."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from netbuilder import NetBuilder, Value, save

    builder = NetBuilder("fashion_mnist_demo", opset=17)
    x = builder.input("image", (1, 1, 28, 28), dims=("N", 1, 28, 28))

    def write(module: nn.Module, x: Value) -> Value:
        if isinstance(module, Residual):
            return builder.activate(builder.add(write(module.body, x), write(module.skip, x)), "relu")
        if isinstance(module, nn.Conv2d):
            return builder.conv(
                x, module.out_channels, module.kernel_size[0], module.stride[0], groups=module.groups,
                weight=module.weight.detach().contiguous().numpy(),
            )  # fmt: skip
        if isinstance(module, nn.BatchNorm2d):
            parts = (module.weight, module.bias, module.running_mean, module.running_var)
            return builder.batch_norm(x, *(p.detach().numpy() for p in parts if p is not None), epsilon=module.eps)
        if isinstance(module, nn.ReLU6):
            return builder.activate(x, "relu6")
        if isinstance(module, nn.ReLU):
            return builder.activate(x, "relu")
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return builder.global_pool(x)
        if isinstance(module, nn.Flatten):
            return builder.flatten(x)
        if isinstance(module, nn.Linear):
            weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
            return builder.gemm(x, module.out_features, weight=weight, bias=bias)
        for child in module.children():
            x = write(child, x)
        return x

    builder.output(write(net, x), "logits", dims=("N", 10))
    save(builder.model(), path)


def ship_images(folder: Path, path: Path) -> None:
    """Write the first SHIPPED test images (uint8) with their labels, compressed."""
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz")[:SHIPPED]
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz")[:SHIPPED]
    np.savez_compressed(path, images=images, labels=labels)


def main() -> int:
    """Train, check, write."""
    parser = argparse.ArgumentParser(description="Train the network of `nestc demo` on Fashion-MNIST.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four *-ubyte.gz files")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    net, reached = train(options.data, options.epochs)
    if reached < 0.88:
        log.error("reached only %.4f, nothing written", reached)
        return 1
    OUTPUT.mkdir(parents=True, exist_ok=True)
    export(net.eval(), OUTPUT / "model.onnx")
    ship_images(options.data, OUTPUT / "images.npz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
