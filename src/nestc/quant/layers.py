"""Products with constant weights as plain matrix products, and what their inputs look like over calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nestc.errors import DataError
from nestc.graph.kinds import is_constant
from nestc.graph.model import Model
from nestc.graph.passes.rewrite import array, ints, operand
from nestc.quant.choose import Assignment
from nestc.quant.observe import samples_of, with_outputs
from nestc.quant.run import Batch, Compiler, Progress

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """A Conv, Gemm or MatMul whose weight is a constant, as ``groups`` products of rows: y[g] = x[g] @ w[g].T.

    ``x[g]`` is (positions, K) with K = input channels of a group x kernel taps, ``w[g]`` is (O, K). ``tensor`` is the
    input's name, ``shape`` the weight's. ``window`` is None for Gemm and MatMul, whose weight is stored as (K, O) if
    ``transposed``.
    """

    node: str
    op: str
    tensor: str
    shape: tuple[int, ...]
    groups: int
    window: Window | None
    transposed: bool

    def rows(self, weight: np.ndarray) -> np.ndarray:
        """The weight as (G, O, K)."""
        if self.window is None:
            return (weight.T if self.transposed else weight)[None]
        return weight.reshape(self.groups, self.shape[0] // self.groups, -1)

    def weight(self, rows: np.ndarray) -> np.ndarray:
        """(G, O, K) as the weight is stored."""
        if self.window is None:
            return np.ascontiguousarray(rows[0].T if self.transposed else rows[0])
        return rows.reshape(self.shape)

    def patches(self, x: Array, limit: int, random: np.random.Generator) -> Array:
        """Rows that the weights are multiplied with, at most `limit` positions of each sample: (G, positions, K)."""
        if self.window is not None:
            return self.window.patches(x, self.groups, limit, random)
        flat = x.reshape(-1, x.shape[-1])
        most = limit * (x.shape[0] if x.ndim > 2 else len(flat))
        return flat[None] if len(flat) <= most else flat[None, np.sort(random.choice(len(flat), most, replace=False))]


@dataclass(frozen=True)
class Window:
    """How a convolution's kernel moves; ``pads`` None: found from the input's size by ``auto_pad``."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    auto_pad: str

    def begins_ends(self, sizes: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Padding before and after each spatial axis of these sizes."""
        rank = len(self.kernel)
        return (self.pads[:rank], self.pads[rank:]) if self.pads is not None else self._automatic(sizes)

    def _automatic(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        totals = [
            max(0, (ceil(n / s) - 1) * s + d * (k - 1) + 1 - n)
            for n, s, d, k in zip(sizes, self.strides, self.dilations, self.kernel, strict=True)
        ]
        less = [total // 2 for total in totals]
        more = [total - half for total, half in zip(totals, less, strict=True)]
        return (less, more) if self.auto_pad == "SAME_UPPER" else (more, less)

    def patches(self, x: Array, groups: int, limit: int, random: np.random.Generator) -> Array:
        """Input windows of at most `limit` output positions of each sample, chosen at random: (G, positions, K)."""
        sizes = x.shape[2:]
        begin, end = self.begins_ends(sizes)
        counts = [
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, before, after, s, d, k in zip(
                sizes, begin, end, self.strides, self.dilations, self.kernel, strict=True
            )
        ]
        total = int(np.prod(counts))
        taken: list[Array] = []
        for sample in x:
            chosen = np.arange(total) if total <= limit else np.sort(random.choice(total, limit, replace=False))
            index: list[np.ndarray] = []
            inside = np.ones((len(chosen), *self.kernel), np.bool_)
            for axis, place in enumerate(np.unravel_index(chosen, counts)):
                tap = np.arange(self.kernel[axis]) * self.dilations[axis] - begin[axis]
                shape = [len(chosen)] + [1] * len(self.kernel)
                shape[1 + axis] = -1
                grid = (place[:, None] * self.strides[axis] + tap).reshape(shape)
                inside &= (grid >= 0) & (grid < sizes[axis])
                index.append(np.clip(grid, 0, sizes[axis] - 1))
            windows = sample[(slice(None), *index)]  # (C, positions, taps...)
            if not inside.all():
                windows = windows * inside
            grouped = windows.reshape(groups, sample.shape[0] // groups, len(chosen), -1)
            taken.append(grouped.transpose(0, 2, 1, 3).reshape(groups, len(chosen), -1))
        return np.concatenate(taken, axis=1)


def integer_layers(prepared: Model, assignment: Assignment) -> list[Layer]:
    """The products with constant weights that the assignment computes on integers, in execution order."""
    found: list[Layer] = []
    for node in prepared.ir.graph:
        decision = assignment.of(node)
        if decision.role != "product" or decision.scheme is None or not decision.scheme.integer:
            continue
        layer = as_layer(node)
        if layer is not None:
            found.append(layer)
    return found


def as_layer(node: ir.Node) -> Layer | None:
    """The node as a `Layer`; None for other operators, two activations, or a form that is no plain product of rows."""
    source, weight = operand(node, 0), operand(node, 1)
    if node.domain or source is None or is_constant(source) or not source.name:
        return None
    values = array(weight) if node.op_type in ("Conv", "Gemm", "MatMul") else None
    if values is None:
        return None
    name, shape = node.name or "", tuple(values.shape)
    if node.op_type != "Conv":
        gemm = node.op_type == "Gemm"
        if len(shape) != 2 or (gemm and node.attributes.get_int("transA", 0)):
            return None
        transposed = not (gemm and node.attributes.get_int("transB", 0))
        return Layer(name, node.op_type, source.name, shape, 1, None, transposed)
    rank = len(shape) - 2
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    pads = ints(node, "pads", (0,) * (2 * rank)) if automatic in ("NOTSET", "VALID") else None
    ones = (1,) * rank
    window = Window(
        shape[2:], ints(node, "strides", ones), ints(node, "dilations", ones),
        (0,) * (2 * rank) if automatic == "VALID" else pads, automatic,
    )  # fmt: skip
    return Layer(name, "Conv", source.name, shape, node.attributes.get_int("group", 1), window, False)


@dataclass
class Moments:
    """Moments of a layer's input rows: ``mean`` E[x] is (G, K), ``gram`` E[x x^T] is (G, K, K), or None."""

    rows: int
    mean: NDArray[np.float64]
    gram: Array | None


def input_moments(
    model: Model,
    sources: Mapping[str, str],
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    compiler: Compiler,
    *,
    gram: bool,
    limit: int,
    samples: int,
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "",
) -> dict[str, Moments]:
    """Moments of the inputs of layers, by the layer's node, over the first `samples` samples run through `model`.

    `sources` gives the tensor of `model` that each layer reads. Of each sample at most `limit` positions are taken, by
    a generator of `seed`; memory is that of one batch and of the moments. Raises DataError if there are no data.
    """
    given = set(model.inputs)
    runner = compiler(with_outputs(model, sorted({sources[layer.node] for layer in layers} - given)))
    random = np.random.default_rng(seed)
    moments: dict[str, Moments] = {}
    seen = 0
    total = min(samples, len(batches)) if hasattr(batches, "__len__") else samples  # pyright: ignore[reportArgumentType]
    for batch in batches:
        found = {**batch, **runner(batch)}
        for layer in layers:
            patches = layer.patches(np.asarray(found[sources[layer.node]], np.float32), limit, random)
            _add(moments, layer.node, patches, gram)
        seen += samples_of(model, batch)
        if progress is not None:
            progress(label, min(seen / max(total, 1), 1.0))
        if seen >= samples:
            break
    if not moments:
        raise DataError("the calibration data hold no sample, or can be read only once; give a list or a data set")
    for each in moments.values():
        each.mean /= max(each.rows, 1)
        if each.gram is not None:
            each.gram /= np.float32(max(each.rows, 1))
    return moments


def _add(moments: dict[str, Moments], node: str, patches: Array, gram: bool) -> None:
    """Add rows to the sums of a layer."""
    squares = np.matmul(patches.transpose(0, 2, 1), patches) if gram else None
    sums = patches.sum(axis=1, dtype=np.float64)
    known = moments.get(node)
    if known is None:
        moments[node] = Moments(patches.shape[1], sums, squares)
        return
    known.rows += patches.shape[1]
    known.mean += sums
    if known.gram is not None and squares is not None:
        known.gram += squares
