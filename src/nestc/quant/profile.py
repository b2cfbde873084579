"""What calibration has seen of each tensor: ranges, histograms, what was not a number; saved as readable JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestc.errors import Error, ModelError

KIND = "nestc profile"

VERSION = 1
"""Version of the file; a reader refuses any other."""

METHODS = ("minmax", "percentile", "mse", "entropy")
"""How a range is chosen from a histogram (`nestc.quant.threshold`)."""

SHOWN_PERCENTILES = (0.01, 0.1, 1.0, 50.0, 99.0, 99.9, 99.99)
"""Percentiles written for each tensor, for whoever reads the file; they are computed, and not read back."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Histogram:
    """Counts over bins of one width, a power of two: bin i holds the values in [(first + i) * width, ... + width).

    Bins lie on multiples of the width, so zero is an edge, and merging pairs of bins is exact.
    """

    width: float
    first: int
    counts: Counts

    @property
    def edges(self) -> Floats:
        """The edges of the bins, one more than there are bins."""
        return (self.first + np.arange(len(self.counts) + 1, dtype=np.float64)) * self.width

    @property
    def total(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    def percentile(self, percent: float) -> float:
        """The value below which `percent` of the counted values lie, interpolated inside its bin (0 if none)."""
        total = self.total
        if total == 0:
            return 0.0
        below = np.concatenate([[0], np.cumsum(self.counts)]) / total * 100.0
        filled = np.flatnonzero(self.counts)
        low, high = filled[0], filled[-1] + 1
        return float(np.interp(percent, below[low : high + 1], self.edges[low : high + 1]))


@dataclass(frozen=True)
class TensorStats:
    """What one tensor held over all samples.

    ``min``, ``max`` and the channels' (along ``channel_axis``) are exact, over finite values (0 if there are none).
    ``histogram`` counts every finite value. ``count`` is the number of elements, of which ``nan`` were NaN and ``inf``
    infinite.
    """

    min: float
    max: float
    histogram: Histogram
    channel_axis: int | None
    channel_min: Floats
    channel_max: Floats
    count: int
    nan: int = 0
    inf: int = 0

    @property
    def constant(self) -> bool:
        """Whether every value was the same."""
        return self.min == self.max

    def percentile(self, percent: float) -> float:
        """The value below which `percent` of the values lie, as the histogram knows it, inside the exact range."""
        return min(max(self.histogram.percentile(percent), self.min), self.max)


@dataclass(frozen=True)
class Nonfinite:
    """Where values that are not numbers first appear: a node whose inputs were finite, or a graph input."""

    node: str
    tensor: str
    nan: int
    inf: int

    def __str__(self) -> str:
        what = " and ".join(f"{n} {word}" for n, word in ((self.nan, "NaN"), (self.inf, "infinite values")) if n)
        return f"node {self.node!r} makes {what} in {self.tensor!r}"


@dataclass(frozen=True)
class Profile:
    """The statistics of a model's tensors over calibration data, by the tensors' names in ``prepare(model)``.

    ``model_hash`` is that of the prepared model, ``method`` the way ranges are to be chosen from the histograms,
    ``samples`` the number of samples seen, ``nonfinite`` the nodes that made NaN or infinite values.
    """

    model_hash: str
    method: str
    samples: int
    tensors: Mapping[str, TensorStats]
    nonfinite: tuple[Nonfinite, ...] = ()
    version: int = field(default=VERSION)

    def require(self, model_hash: str, source: str = "the profile") -> None:
        """Raise ModelError if this is the profile of another prepared model than the one of `model_hash`."""
        if self.model_hash != model_hash:
            raise ModelError(
                f"{source} was made of another model (hash {self.model_hash[:12]}, this one has {model_hash[:12]}); "
                "calibrate this model, with the same --shape and --dim"
            )

    def stats(self, tensor: str) -> TensorStats:
        """The statistics of one tensor. Raises ModelError if it was not observed."""
        if tensor not in self.tensors:
            raise ModelError(f"the profile has no tensor {tensor!r}; calibrate again with this version of nestc")
        return self.tensors[tensor]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, a line a field; the file appears when it is complete. Raises `nestc.Error`."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(_written(self), encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise Error(f"cannot write the profile to {target}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], model_hash: str | None = None) -> Profile:
        """Read a profile; with `model_hash`, raise ModelError unless it is of that prepared model.

        Raises ModelError for a file that is not a profile of this version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelError(f"cannot read the profile {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ModelError(f"{path} is not a profile (not JSON: {error}); make one with nestc calibrate") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:  # pyright: ignore[reportUnknownMemberType]
            raise ModelError(f"{path} is not a profile; make one with nestc calibrate")
        profile = _read(content, path)  # pyright: ignore[reportUnknownArgumentType]
        if model_hash is not None:
            profile.require(model_hash, f"profile {path}")
        return profile


def _written(profile: Profile) -> str:
    """The JSON text: indented, but with lists of numbers on one line each."""
    head: dict[str, Any] = {
        "kind": KIND,
        "version": profile.version,
        "model_hash": profile.model_hash,
        "method": profile.method,
        "samples": profile.samples,
        "nonfinite": [vars(found) for found in profile.nonfinite],
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    tensors: list[str] = []
    for name, stats in profile.tensors.items():
        fields = [f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in _fields(stats).items()]
        tensors.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(fields) + "\n    }")
    lines.append('  "tensors": {\n' + ",\n".join(tensors) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _fields(stats: TensorStats) -> dict[str, Any]:
    """One tensor as JSON; percentiles are for people and are not read back."""
    return {
        "min": stats.min,
        "max": stats.max,
        "count": stats.count,
        "nan": stats.nan,
        "inf": stats.inf,
        "percentiles": {str(percent): stats.percentile(percent) for percent in SHOWN_PERCENTILES},
        "channel_axis": stats.channel_axis,
        "channel_min": stats.channel_min.tolist(),
        "channel_max": stats.channel_max.tolist(),
        "histogram": {
            "width": stats.histogram.width,
            "first": stats.histogram.first,
            "counts": stats.histogram.counts.tolist(),
        },
    }


def _read(content: dict[str, Any], path: str | os.PathLike[str]) -> Profile:
    """A profile from its JSON. Raises ModelError for another version or a missing or wrong field."""
    if content.get("version") != VERSION:
        raise ModelError(
            f"profile {path} has version {content.get('version')!r}, this nestc reads {VERSION}; calibrate again"
        )
    try:
        profile = Profile(
            model_hash=str(content["model_hash"]),
            method=str(content["method"]),
            samples=int(content["samples"]),
            tensors={str(name): _stats(fields) for name, fields in content["tensors"].items()},
            nonfinite=tuple(Nonfinite(**found) for found in content["nonfinite"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"profile {path} is damaged ({type(error).__name__}: {error}); calibrate again") from error
    if profile.method.partition(":")[0] not in METHODS:
        raise ModelError(f"profile {path} has the unknown method {profile.method!r}; calibrate again")
    return profile


def _stats(fields: dict[str, Any]) -> TensorStats:
    histogram = fields["histogram"]
    stats = TensorStats(
        min=float(fields["min"]),
        max=float(fields["max"]),
        histogram=Histogram(
            width=float(histogram["width"]),
            first=int(histogram["first"]),
            counts=np.asarray(histogram["counts"], np.int64),
        ),
        channel_axis=None if fields["channel_axis"] is None else int(fields["channel_axis"]),
        channel_min=np.asarray(fields["channel_min"], np.float64),
        channel_max=np.asarray(fields["channel_max"], np.float64),
        count=int(fields["count"]),
        nan=int(fields["nan"]),
        inf=int(fields["inf"]),
    )
    if not (math.isfinite(stats.min) and stats.min <= stats.max and math.isfinite(stats.max)):
        raise ValueError(f"a range from {stats.min} to {stats.max}")
    if not (stats.histogram.width > 0 and stats.histogram.counts.ndim == 1 and (stats.histogram.counts >= 0).all()):
        raise ValueError("a histogram without width or with negative counts")
    return stats
