"""How good a compiled model is on data: top-1 and top-5 with confidence, and how near it comes to a reference model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from nestc.datasets import Dataset, open_data
from nestc.errors import DataError, ModelError, ShapeError
from nestc.images import Preprocess

if TYPE_CHECKING:
    from nestc.driver import Source

METRICS = ("top1", "top5", "cosine", "sqnr")

Batch = Mapping[str, np.ndarray]
Progress = Callable[[str, float], None]

Z_95 = 1.959963984540054
"""Half the width, in standard deviations, of the middle 95 % of a normal distribution."""


class Runs(Protocol):
    """The part of `nestc.Executable` that evaluating needs."""

    @property
    def inputs(self) -> Mapping[str, tuple[str, tuple[int | str, ...]]]:
        """Element type and shape of every input, by name."""
        ...

    def run(self, inputs: Batch) -> Mapping[str, np.ndarray]:
        """Run with named arrays."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """How many of the samples were classified rightly."""

    correct: int
    samples: int

    @property
    def value(self) -> float:
        """The fraction of samples that is right, 0 to 1."""
        return self.correct / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence interval of the fraction, at 95 %."""
        return wilson(self.correct, self.samples)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` has found.

    ``value``: of top1 and top5 the fraction of samples, 0 to 1; of cosine the mean over samples, of sqnr in dB over all
    of them, each of the worst output (infinite where nothing differs). ``accuracy`` and ``reference`` (of `against`)
    belong to top1 and top5, ``outputs`` (value by output) to cosine and sqnr. ``disagreements`` counts the samples
    whose decision (class of the highest score in the first output) is not the reference's; None without a reference,
    or where outputs are no scores.
    """

    metric: str
    value: float
    samples: int
    seconds: float
    accuracy: Accuracy | None = None
    reference: Accuracy | None = None
    outputs: Mapping[str, float] | None = None
    disagreements: int | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values, as ``nestc evaluate --json`` prints them; an infinite sqnr is null."""
        shown: dict[str, Any] = {"metric": self.metric, "value": _finite(self.value), "samples": self.samples}
        if self.accuracy is not None:
            shown |= {"correct": self.accuracy.correct, "interval": list(self.accuracy.interval)}
        if self.accuracy is not None and self.reference is not None:
            shown["reference"] = {
                "value": self.reference.value,
                "correct": self.reference.correct,
                "interval": list(self.reference.interval),
            }
            shown["loss"] = self.reference.value - self.accuracy.value
        if self.outputs is not None:
            shown["outputs"] = {name: _finite(value) for name, value in self.outputs.items()}
        if self.disagreements is not None:
            shown["disagreements"] = self.disagreements
        return shown | {"seconds": round(self.seconds, 3)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def evaluate(
    model: Source | Runs,
    data: str | os.PathLike[str] | Dataset | Iterable[Batch],
    labels: str | os.PathLike[str] | Sequence[int] | np.ndarray | None = None,
    metric: str = "top1",
    against: Source | Runs | None = None,
    *,
    preprocess: str | Preprocess | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch: int = 1,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a model on data and judge it: `metric` is top1, top5 (they need `labels`), cosine or sqnr (these `against`).

    `model` and `against`, a reference, usually the float model, are executables, bundle files (``.nest``), or anything
    that `nestc.compile` takes, which is then compiled for the CPU with `threads`. `data` is a path as `open_data` takes
    it (as are `preprocess`, `split`, `limit` and `batch`), a Dataset, or batches {input: array}. `progress(what,
    fraction)` is told how far it is. Raises DataError and ShapeError for data, labels or outputs that do not fit.
    """
    if metric not in METRICS:
        raise DataError(f"there is no metric {metric!r}; choose {', '.join(METRICS)}")
    if metric in ("cosine", "sqnr") and against is None:
        raise DataError(f"{metric} compares with a reference model; give one (against, --against)")
    ours = _executable(model, threads)
    reference = None if against is None else _executable(against, threads)
    if reference is not None and list(reference.inputs) != list(ours.inputs):
        raise ShapeError(
            f"the reference has the inputs {', '.join(reference.inputs)}, but the model {', '.join(ours.inputs)}"
        )
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        told = Path(labels) if isinstance(labels, os.PathLike) else labels
        batches: Iterable[Batch] = open_data(
            path, ours.inputs, preprocess=preprocess, labels=told, split=split, limit=limit, batch=batch
        )
    elif preprocess is not None or split is not None or limit is not None:
        raise DataError("preprocess, split and limit are for data in files; these batches are made already")
    else:
        batches = cast("Iterable[Batch]", data)
    if isinstance(batches, Dataset) and (batches is not data or labels is None):
        numbers = batches.labels
    else:
        numbers = None if labels is None else _labels(labels)
    if metric in ("top1", "top5") and numbers is None:
        raise DataError(f"{metric} needs labels; give them (labels, --labels)")
    total = batches.samples if isinstance(batches, Dataset) else None
    judge = _Judge(metric, numbers, reference is not None)
    begin = time.perf_counter()
    for arrays in batches:
        judge.add(ours.run(arrays), None if reference is None else reference.run(arrays))
        if progress is not None:
            rate = judge.samples / (time.perf_counter() - begin)
            told = f"evaluate, {judge.samples} samples, {rate:.1f} a second"
            progress(told, judge.samples / total if total else 0.0)
    return judge.result(time.perf_counter() - begin)


def _executable(model: Source | Runs, threads: int | None) -> Runs:
    """An executable as it is, a bundle opened, anything else compiled."""
    if hasattr(model, "run") and hasattr(model, "inputs"):
        return cast(Runs, model)
    if isinstance(model, str | os.PathLike) and Path(model).suffix == ".nest":
        from nestc.runtime import open as open_bundle

        return open_bundle(model, threads=threads)
    from nestc.driver import compile as compile_model

    return compile_model(cast("Source", model), threads=threads)


def _labels(labels: str | os.PathLike[str] | Sequence[int] | np.ndarray) -> np.ndarray:
    if isinstance(labels, str | os.PathLike):
        raise DataError("a file of labels goes with data in files; give batches their labels as a sequence of integers")
    numbers = np.asarray(labels)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise DataError(f"labels must be one integer a sample, not {numbers.dtype} of shape {list(numbers.shape)}")
    return numbers


class _Judge:
    """Takes outputs batch by batch and keeps only sums."""

    def __init__(self, metric: str, labels: np.ndarray | None, compared: bool) -> None:
        self._metric = metric
        self._labels = labels
        self._compared = compared
        self._correct = self._reference_correct = 0
        self._disagreements: int | None = 0 if compared else None
        self._distances: dict[str, Distance] = {}
        self.samples = 0

    def add(self, outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray] | None) -> None:
        """Judge the outputs of one call."""
        _require_numbers(outputs, "model", self.samples)
        if reference is not None:
            _require_numbers(reference, "reference", self.samples)
            _require_alike(outputs, reference)
        name, first = next(iter(outputs.items()))
        if self._metric in ("top1", "top5"):
            scores = class_scores(first)
            if scores is None:
                raise ShapeError(
                    f"{self._metric} needs scores [samples, classes], but output {name!r} is {list(first.shape)}"
                )
            self._classify(scores, None if reference is None else class_scores(next(iter(reference.values()))))
            return
        assert reference is not None
        for name, expected in reference.items():
            self._distances.setdefault(name, Distance()).add(expected, outputs[name])
        scores, expected = class_scores(first), class_scores(next(iter(reference.values())))
        if scores is None or expected is None:
            self._disagreements = None
        else:
            self._disagree(scores, expected)
        self.samples += len(first) if first.ndim else 1

    def _classify(self, scores: np.ndarray, reference: np.ndarray | None) -> None:
        assert self._labels is not None
        count, classes = scores.shape
        labels = self._labels[self.samples : self.samples + count]
        if len(labels) < count:
            raise DataError(f"there are {len(self._labels)} labels, but more samples")
        wrong = next((int(label) for label in labels if not 0 <= label < classes), None)
        if wrong is not None:
            raise DataError(f"the label {wrong} is no class of the model, which has {classes} (0 to {classes - 1})")
        k = 1 if self._metric == "top1" else 5
        self._correct += int(within_top(scores, labels, k).sum())
        if reference is not None:
            self._reference_correct += int(within_top(reference, labels, k).sum())
            self._disagree(scores, reference)
        self.samples += count

    def _disagree(self, scores: np.ndarray, reference: np.ndarray) -> None:
        if self._disagreements is not None:
            self._disagreements += int((scores.argmax(1) != reference.argmax(1)).sum())

    def result(self, seconds: float) -> Evaluation:
        """What all samples together say."""
        if not self.samples:
            raise DataError("there are no samples to evaluate on")
        if self._metric in ("top1", "top5"):
            assert self._labels is not None
            if len(self._labels) != self.samples:
                raise DataError(f"there are {len(self._labels)} labels for {self.samples} samples")
            accuracy = Accuracy(self._correct, self.samples)
            reference = Accuracy(self._reference_correct, self.samples) if self._compared else None
            return Evaluation(
                self._metric, accuracy.value, self.samples, seconds, accuracy, reference,
                disagreements=self._disagreements,
            )  # fmt: skip
        outputs = {
            name: each.sqnr_db if self._metric == "sqnr" else each.cosine for name, each in self._distances.items()
        }
        worst = min(outputs.values())
        return Evaluation(
            self._metric, worst, self.samples, seconds, outputs=outputs, disagreements=self._disagreements
        )


def _require_numbers(outputs: Mapping[str, np.ndarray], whose: str, samples: int) -> None:
    for name, array in outputs.items():
        if array.dtype.kind not in "biufV":
            raise ShapeError(f"output {name!r} of the {whose} is {array.dtype}, which no metric judges")
        if array.dtype.kind in "fV" and np.isnan(np.asarray(array, np.float32)).any():
            raise ModelError(
                f"the {whose} gives NaN in output {name!r} after {samples} samples, so nothing can be said"
            )


def _require_alike(outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> None:
    for name, expected in reference.items():
        if name not in outputs:
            raise ShapeError(f"the reference has the output {name!r}, the model only {', '.join(outputs)}")
        if outputs[name].shape != expected.shape:
            raise ShapeError(
                f"output {name!r} is {list(outputs[name].shape)}, but the reference's is {list(expected.shape)}"
            )


# --- metrics ---


def class_scores(output: np.ndarray) -> np.ndarray | None:
    """An output as scores [samples, classes], float64; None if it has not one score for each of several classes."""
    if output.ndim < 2 or output.shape[1] < 2 or any(size != 1 for size in output.shape[2:]):
        return None
    return np.asarray(output.reshape(output.shape[:2]), np.float64)


def within_top(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """For each sample whether its label's score is among the k highest; of equal scores the lower class comes first."""
    own = np.take_along_axis(scores, labels[:, None], 1)
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    return before.sum(1) < k


def wilson(correct: int, samples: int, z: float = Z_95) -> tuple[float, float]:
    """Confidence interval of a fraction (Wilson 1927: the score interval, which holds near 0 and 1 too)."""
    fraction = correct / samples
    spread = z * math.sqrt(fraction * (1 - fraction) / samples + z * z / (4 * samples * samples))
    centre = fraction + z * z / (2 * samples)
    scale = 1 + z * z / samples
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


class Distance:
    """Sums over pairs of an expected array and another, first axis = samples."""

    def __init__(self) -> None:
        self._signal = self._noise = self._cosines = 0.0
        self._samples = 0

    def add(self, expected: np.ndarray, other: np.ndarray) -> None:
        """Take in a batch. Values are widened to float64."""
        count = len(expected) if expected.ndim else 1
        a = np.asarray(expected, np.float64).reshape(count, -1)
        b = np.asarray(other, np.float64).reshape(count, -1)
        signal, own = (a * a).sum(1), (b * b).sum(1)
        self._signal += float(signal.sum())
        self._noise += float(((a - b) ** 2).sum())
        norms = np.sqrt(signal * own)
        # Two vectors of zeros point the same way; one alone points nowhere.
        cosines = np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1.0), (signal == own).astype(float))
        self._cosines += float(cosines.sum())
        self._samples += count

    @property
    def sqnr_db(self) -> float:
        """10 log10 of the expected array's energy over that of the difference; infinite if nothing differs."""
        if self._noise == 0:
            return math.inf
        return 10 * math.log10(self._signal / self._noise) if self._signal else -math.inf

    @property
    def cosine(self) -> float:
        """Mean over the samples of the cosine between the two, flattened."""
        return self._cosines / self._samples if self._samples else math.nan
