"""Run compiled code over calibration data and keep statistics of its tensors, in memory that does not grow."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nestc.errors import DataError
from nestc.graph.kinds import UNARY, is_constant
from nestc.graph.model import Model
from nestc.quant.choose import data_inputs
from nestc.quant.profile import Histogram, Nonfinite, Profile, TensorStats
from nestc.quant.run import Batch, Compiler, Progress, Runner
from nestc.quant.scheme import CURVES, INTEGER_OPS, WEIGHTED

BINS = 2048
"""Bins of a histogram; at least half of them, less two, span the values seen. TensorRT uses as many for entropy."""

BLOCK = 1 << 16
"""Elements counted at a time, so that what is computed on the way stays in a core's own cache."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

Floats = NDArray[np.float64]


def observe(
    prepared: Model, batches: Iterable[Batch], compiler: Compiler, method: str, progress: Progress | None = None
) -> Profile:
    """The profile of a prepared model over batches of inputs, which are read once and one at a time.

    The model is compiled with the tensors of `observed` as further outputs. A batch in which one of them is not finite
    is run again with every tensor as an output, to find the nodes that make such values. Raises DataError if there is
    no batch.
    """
    watched = observed(prepared)
    states = {value.name or "": _State(_channel_axis(value)) for value in watched}
    inputs = set(prepared.inputs)
    runner = compiler(with_outputs(prepared, [name for name in states if name not in inputs]))
    culprits = _Culprits(prepared, compiler)
    samples, begun = 0, time.perf_counter()
    total = len(batches) if hasattr(batches, "__len__") else 0  # pyright: ignore[reportArgumentType]
    for index, batch in enumerate(batches):
        found = {**batch, **runner(batch)}
        clean = True
        for name, state in states.items():
            clean &= state.add(found[name])
        if not clean:
            culprits.add(batch)
        samples += samples_of(prepared, batch)
        if progress is not None:
            rate = samples / (time.perf_counter() - begun)
            progress(f"calibrate, {rate:.1f} samples/s", min((index + 1) / total, 1.0) if total else 0.0)
    if not samples:
        raise DataError("there are no calibration data; give at least one batch")
    tensors = {name: state.stats() for name, state in states.items()}
    return Profile(prepared.hash, method, samples, tensors, culprits.found())


def observed(prepared: Model) -> list[ir.Value]:
    """The tensors that may come to be quantized: data operands and results of operators that have an integer form.

    The result of a product that only one unary operator (Relu, Clip ...) reads is left out: that operator is computed
    on the product's sums before anything is rounded. Not so with curves, which devices that shift do not have there.
    """
    chosen: dict[ir.Value, None] = {}
    for node in prepared.ir.graph:
        if node.domain or node.op_type not in INTEGER_OPS:
            continue
        operands = [node.inputs[index] for index in data_inputs(node) if index < len(node.inputs)]
        for value in (*operands, node.outputs[0]):
            if value is not None and not _inside(value):
                chosen.setdefault(value)
    return [value for value in chosen if value.name and value.dtype in FLOATS and not is_constant(value)]


def _inside(value: ir.Value) -> bool:
    """Whether the value is a product's that only one unary operator reads, no curve."""
    producer, readers = value.producer(), [use.node for use in value.uses()]
    if producer is None or producer.op_type not in WEIGHTED or value.is_graph_output():
        return False
    return len(readers) == 1 and not readers[0].domain and readers[0].op_type in UNARY - CURVES


def with_outputs(model: Model, names: Sequence[str]) -> Model:
    """A copy of the model that also returns the tensors of these names."""
    extended = model.clone()
    graph = extended.ir.graph
    values = {value.name: value for node in graph for value in node.outputs}
    given = {value.name for value in graph.outputs}
    graph.outputs.extend(values[name] for name in names if name not in given)
    return extended


def samples_of(model: Model, batch: Batch) -> int:
    """Samples in a batch: the size of the first axis of the first input that has one."""
    return next((batch[name].shape[0] for name in model.inputs if batch[name].ndim), 1)


def _channel_axis(value: ir.Value) -> int | None:
    """The axis of channels: 1 beside convolutions and pools, the last beside matrix products, None without any."""
    rank = None if value.shape is None else len(value.shape)
    if rank is None or rank < 2:
        return None
    producer = value.producer()
    near = [use.node.op_type for use in value.uses()] + ([] if producer is None else [producer.op_type])
    if "Conv" in near or "ConvTranspose" in near:
        return 1
    if "MatMul" in near or "Gemm" in near:
        return rank - 1
    return 1 if rank >= 4 else rank - 1


class _State:
    """Statistics of one tensor while batches come in.

    The histogram lies on bins whose width is a power of two and whose edges are multiples of it. When a value falls
    outside, the bins are shifted if all values fit, else pairs of them are merged, which is exact: no value is counted
    twice and none is looked at again.
    """

    def __init__(self, channel_axis: int | None) -> None:
        self.axis = channel_axis
        self.count = self.nan = self.inf = 0
        self.low: Floats | None = None
        self.high: Floats | None = None
        self.width = 0.0
        self.first = 0
        self.counts = np.zeros(BINS, np.int64)

    def add(self, array: np.ndarray) -> bool:
        """Take in a batch of the tensor; False if it holds values that are not finite."""
        if array.size == 0:
            return True
        values = array.astype(np.float32) if array.dtype.itemsize < 4 else array
        self.count += values.size
        low, high = self._channels(values)
        finite = bool(np.isfinite(low).all() and np.isfinite(high).all())
        flat = values.reshape(-1)
        if not finite:
            good = np.isfinite(values)
            self.nan += int(np.isnan(values).sum())
            self.inf += int(np.isinf(values).sum())
            low = self._channels(np.where(good, values, np.inf))[0]
            high = self._channels(np.where(good, values, -np.inf))[1]
            flat = values[good]
        if flat.size:
            self._reach(float(low.min()), float(high.max()))
            self._tally(flat)
        if self.low is not None and self.high is not None:
            if self.low.shape != low.shape:  # an open size, so these are no channels
                self.axis = None
                low, high = np.append(low, self.low).min(keepdims=True), np.append(high, self.high).max(keepdims=True)
            else:
                low, high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.low, self.high = low, high
        return finite

    def _channels(self, values: np.ndarray) -> tuple[Floats, Floats]:
        """Minimum and maximum of each channel, or of everything; NaN where there is one."""
        if self.axis is None or self.axis >= values.ndim:
            kept = values.reshape(1, 1, -1)
        else:
            shape = values.shape
            kept = values.reshape(math.prod(shape[: self.axis]), shape[self.axis], -1)
        if kept.shape[2] == 1:  # channels last: one reduction over rows, which is contiguous
            return kept[:, :, 0].min(0).astype(np.float64), kept[:, :, 0].max(0).astype(np.float64)
        return kept.min(2).min(0).astype(np.float64), kept.max(2).max(0).astype(np.float64)

    def _reach(self, low: float, high: float) -> None:
        """Make the bins hold everything from `low` to `high`, besides what they have counted."""
        if not self.width:
            # No finer than 2^-20 of the largest magnitude, so that every index is exact in float32.
            magnitude = max(abs(low), abs(high), 1e-30)
            needed = max((high - low) / (BINS - 2), magnitude * 2.0**-20)
            self.width = 2.0 ** math.ceil(math.log2(needed))
            self.first = math.floor(low / self.width)
        while True:
            lowest, highest = math.floor(low / self.width), math.floor(high / self.width)
            filled = np.flatnonzero(self.counts)
            if filled.size:
                lowest = min(lowest, self.first + int(filled[0]))
                highest = max(highest, self.first + int(filled[-1]))
            if highest - lowest < BINS and max(-lowest, highest) < 1 << 22:
                break
            self._merge()
        if lowest < self.first or highest >= self.first + BINS:
            self._move(lowest - (BINS - 1 - (highest - lowest)) // 2)

    def _merge(self) -> None:
        """Double the width: the bins of indices 2i and 2i + 1 become bin i."""
        odd = self.first % 2
        padded = np.concatenate([np.zeros(odd, np.int64), self.counts, np.zeros(odd, np.int64)])
        halved = padded.reshape(-1, 2).sum(1)
        self.counts = np.zeros(BINS, np.int64)
        self.counts[: len(halved)] = halved
        self.first = (self.first - odd) // 2
        self.width *= 2

    def _move(self, first: int) -> None:
        """Let the bins begin at index `first`; what has been counted lies inside."""
        moved = np.zeros(BINS, np.int64)
        filled = np.flatnonzero(self.counts)
        moved[filled + (self.first - first)] = self.counts[filled]
        self.counts, self.first = moved, first

    def _tally(self, flat: np.ndarray) -> None:
        # Scaling by a power of two, rounding down and shifting by an integer are all exact.
        inverse = flat.dtype.type(1.0 / self.width)
        shift = flat.dtype.type(self.first)
        scaled = np.empty(min(BLOCK, flat.size), flat.dtype)
        for start in range(0, flat.size, BLOCK):
            part = flat[start : start + BLOCK]
            index = np.multiply(part, inverse, out=scaled[: part.size])
            np.floor(index, out=index)
            np.subtract(index, shift, out=index)
            self.counts += np.bincount(index.astype(np.intp), minlength=BINS)

    def stats(self) -> TensorStats:
        """What has been seen; channels without any finite value have the range 0 to 0."""
        low = np.zeros(1) if self.low is None else np.where(np.isfinite(self.low), self.low, 0.0)
        high = np.zeros(1) if self.high is None else np.where(np.isfinite(self.high), self.high, 0.0)
        seen = self.low is not None and np.isfinite(self.low).any()
        least = float(self.low[np.isfinite(self.low)].min()) if seen and self.low is not None else 0.0
        most = float(self.high[np.isfinite(self.high)].max()) if seen and self.high is not None else 0.0
        filled = np.flatnonzero(self.counts)
        start, end = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, 1)
        histogram = Histogram(self.width or 1.0, self.first + start, self.counts[start:end].copy())
        return TensorStats(least, most, histogram, self.axis, low, high, self.count, self.nan, self.inf)


class _Culprits:
    """Finds the nodes that make values which are not finite from values which are."""

    def __init__(self, prepared: Model, compiler: Compiler) -> None:
        self.prepared = prepared
        self.compiler = compiler
        self.runner: Runner | None = None
        self.counts: dict[tuple[str, str], tuple[int, int]] = {}

    def add(self, batch: Batch) -> None:
        """Look through all tensors of one batch."""
        nodes = list(self.prepared.ir.graph)
        if self.runner is None:
            results = [value for node in nodes for value in node.outputs if value.name and value.dtype in FLOATS]
            self.runner = self.compiler(with_outputs(self.prepared, [value.name or "" for value in results]))
        found = {**batch, **self.runner(batch)}
        bad: dict[str, tuple[int, int]] = {}
        for name, array in found.items():
            if array.dtype.kind not in "fV":  # bfloat16 is of kind V
                continue
            wide = array.astype(np.float32) if array.dtype.kind == "V" else array
            if not np.isfinite(wide).all():
                bad[name] = (int(np.isnan(wide).sum()), int(np.isinf(wide).sum()))
        for node in nodes:
            if any(value is not None and value.name in bad for value in node.inputs):
                continue
            for name in [value.name or "" for value in node.outputs if value.name in bad]:
                nan, inf = self.counts.get((node.name or "", name), (0, 0))
                self.counts[node.name or "", name] = (nan + bad[name][0], inf + bad[name][1])

    def found(self) -> tuple[Nonfinite, ...]:
        """The nodes found, in execution order of the batch that showed each first."""
        return tuple(Nonfinite(node, tensor, nan, inf) for (node, tensor), (nan, inf) in self.counts.items())
