"""How near a quantized model comes to the float one on data, and what it loses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from nestc.errors import DataError, QuantizationError
from nestc.quant.run import Batch, Runner


@dataclass(frozen=True)
class Score:
    """What a model's outputs are against the float model's on the same samples.

    ``agreement`` is the fraction of samples whose best class, by the first output, is the float model's,
    None if that output is no scores (rank 2, more than one column). ``cosine`` is the mean over samples, ``sqnr_db``
    over everything (infinite where nothing differs), each of the worst output. ``top1`` and ``top1_float`` are the
    fractions that is right, None without labels.
    """

    samples: int
    agreement: float | None
    cosine: float
    sqnr_db: float
    top1: float | None = None
    top1_float: float | None = None

    @property
    def loss(self) -> float:
        """The fraction of samples lost: of top-1 with labels, else decisions that differ, else 1 - cosine."""
        if self.top1 is not None and self.top1_float is not None:
            return _fraction(self.top1_float - self.top1)
        return _fraction(1.0 - (self.cosine if self.agreement is None else self.agreement))

    @property
    def measure(self) -> str:
        """What `loss` counts, in words."""
        if self.top1 is not None:
            return "top-1"
        return "1 - cosine" if self.agreement is None else "the float model's decisions"


class Judge:
    """Scores models by the float model's outputs on batches, which are kept; the batches are read again each time.

    ``labels`` are integers, one a sample, in order. Raises DataError for no data or labels of another number than the
    samples, QuantizationError for labels of a model without scores.
    """

    def __init__(self, reference: Runner, batches: Iterable[Batch], labels: np.ndarray | None = None) -> None:
        self.batches = batches
        self.expected = [dict(reference(batch)) for batch in batches]
        if not self.expected:
            raise DataError("there are no samples to judge by; give at least one batch")
        first = next(iter(self.expected[0].values()))
        self.scores = first.ndim == 2 and first.shape[1] > 1
        self.samples = sum(_samples(outputs) for outputs in self.expected)
        self.labels = None if labels is None else np.asarray(labels).reshape(-1)
        if self.labels is not None and not self.scores:
            raise QuantizationError("labels need a model whose first output is scores of classes")
        if self.labels is not None and len(self.labels) != self.samples:
            raise DataError(f"there are {len(self.labels)} labels for {self.samples} samples")

    def score(self, runner: Runner) -> Score:
        """Run a model on all batches. Raises DataError if there are fewer or more batches than before."""
        sums = {name: _Sums() for name in self.expected[0]}
        agreed = right = right_float = place = 0
        for number, batch in enumerate(self.batches):
            if number == len(self.expected):
                raise DataError("the data have more batches than at first; give data that can be read again")
            wanted, got = self.expected[number], runner(batch)
            for name, values in wanted.items():
                sums[name].add(values, got[name])
            if self.scores:
                name = next(iter(wanted))
                decided, ours = wanted[name].argmax(1), got[name].argmax(1)
                agreed += int((decided == ours).sum())
                if self.labels is not None:
                    labels = self.labels[place : place + len(ours)]
                    right += int((ours == labels).sum())
                    right_float += int((decided == labels).sum())
            place += _samples(wanted)
        if place != self.samples:
            raise DataError("the data can be read only once; give a list or a data set")
        return Score(
            self.samples,
            agreed / self.samples if self.scores else None,
            min(each.cosine for each in sums.values()),
            min(each.sqnr_db for each in sums.values()),
            None if self.labels is None else right / self.samples,
            None if self.labels is None else right_float / self.samples,
        )


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio of two powers in dB; infinite without noise, minus infinity without signal."""
    if noise <= 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _fraction(value: float) -> float:
    """Without the last digits, so that 1 - 0.95 is not above a budget of 0.05."""
    return round(value, 9)


def _samples(outputs: Mapping[str, np.ndarray]) -> int:
    first = next(iter(outputs.values()))
    return first.shape[0] if first.ndim else 1


class _Sums:
    """Powers of one output and of its noise, and cosines of its samples."""

    def __init__(self) -> None:
        self.signal = self.noise = self.cosines = 0.0
        self.samples = 0

    def add(self, expected: np.ndarray, got: np.ndarray) -> None:
        a = expected.astype(np.float64).reshape(len(expected) if expected.ndim else 1, -1)
        b = got.astype(np.float64).reshape(a.shape)
        self.signal += float((a * a).sum())
        self.noise += float(((a - b) ** 2).sum())
        norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        same = (a == b).all(1)
        products = (a * b).sum(1) / np.where(norms > 0, norms, 1.0)
        self.cosines += float(np.where(same, 1.0, products).sum())
        self.samples += len(a)

    @property
    def cosine(self) -> float:
        return self.cosines / max(self.samples, 1)

    @property
    def sqnr_db(self) -> float:
        return sqnr_db(self.signal, self.noise)
