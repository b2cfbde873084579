"""The public faces of the quantizer, which hand it the compiler: `calibrate` and `quantize`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from nestc.bundle.dtypes import numpy_dtype
from nestc.driver import Source
from nestc.driver import compile as compile_model
from nestc.errors import DataError, QuantizationError, ShapeError
from nestc.graph.bind import bind
from nestc.graph.model import Model
from nestc.importers.onnx import load
from nestc.partition.cut import find_cuts
from nestc.quant import quantize as stage
from nestc.quant.choose import Wishes, require_float
from nestc.quant.devices import ELSEWHERE, by_devices
from nestc.quant.observe import observe
from nestc.quant.overrides import overrides_of, read_overrides
from nestc.quant.prepare import prepare
from nestc.quant.profile import Profile
from nestc.quant.run import Batch, Compiler, Progress, Runner
from nestc.quant.scheme import DEVICES, Scheme, scheme_named
from nestc.quant.threshold import parse_method
from nestc.quant.toolbox import tools_named, tools_of
from nestc.quant.tools import Tool
from nestc.targets import resolve
from nestc.targets.api import Target

Overrides = Mapping[str, str | Scheme | None] | str | os.PathLike[str]


def calibrate(
    model: Source,
    batches: Iterable[Batch],
    method: str = "mse",
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Run a float model over calibration data and keep the statistics of its tensors, for `nestc.quantize`.

    ``batches`` gives one array for each input, by name; it is read once, one batch at a time, in bounded memory. A
    batch larger than a model of fixed batch takes is fed in parts. ``method`` is how ranges are to be chosen:
    ``minmax``, ``percentile`` (of which ``percentile:99.9`` gives the percentage), ``mse`` or ``entropy``. The first
    axis of the inputs counts samples. Raises ShapeError for a name, shape or dtype that does not fit, DataError for
    no data or data with NaN or infinite values, QuantizationError for an unknown method or a quantized model.
    """
    parse_method(method)
    bound = bind(model if isinstance(model, Model) else load(model), shapes, dims)
    require_float(bound)
    prepared = prepare(bound)
    return observe(prepared, checked(prepared, batches), compiler(threads), method, progress)


def quantize(
    model: Source,
    profile: Profile | str | os.PathLike[str] | None,
    scheme: str | Scheme = "int8",
    *,
    overrides: Overrides | None = None,
    tools: Sequence[str | Tool] | None = None,
    data: Iterable[Batch] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    threads: int | None = None,
    labels: Sequence[int] | np.ndarray | None = None,
    accuracy_budget: float | None = None,
    targets: Sequence[str | Target] | None = None,
    progress: Progress | None = None,
) -> Model:
    """Quantize a float model by its profile; the result is standard ONNX with QuantizeLinear and DequantizeLinear.

    ``profile``: of `calibrate`, or its file; None does for schemes that round no activations to integers. ``scheme``:
    one of `nestc.quant.scheme.SCHEMES`, perhaps with options (``int8:granularity=tensor``). ``overrides``: node name or
    pattern -> scheme or ``float``, or a file of them. ``tools``: accuracy tools by name, in order; None for those that
    the scheme brings, an empty list for none. ``data``: the calibration batches, for tools that need them, iterated as
    often as they need. `shapes` and `dims` are those of calibration.

    ``scheme="auto"`` (``auto:`` and a scheme mixes that with float, as ``auto:int8-pow2``) searches the fastest mix
    whose loss on `data` is at most `accuracy_budget` (0.01 if not given): a fraction of top-1 with ``labels``, one a
    sample, else of the float model's decisions. With `targets` times are those of the fastest device of each node, in
    the format that it asks for. `nestc.autoscheme.auto` tells more of what it found.

    ``scheme="devices"`` gives each node the format that an offer of `targets` asks for (`nestc.quant.devices`), and
    int8 to what none of them takes; after a colon stands another scheme for that, or ``float``.

    Raises QuantizationError, also for a budget that cannot be met, and ModelError for a profile of another model.
    """
    require_repeatable(data)
    bound = bind(model if isinstance(model, Model) else load(model), shapes, dims)
    if isinstance(scheme, str) and scheme.partition(":")[0].strip() == "auto":
        from nestc.autoscheme import auto  # it needs this module

        return auto(
            bound, profile, scheme.partition(":")[2] or "int8", data, accuracy_budget,
            labels=labels, overrides=overrides, tools=tools, targets=targets, threads=threads, progress=progress,
        ).model  # fmt: skip
    if labels is not None or accuracy_budget is not None:
        raise QuantizationError("labels and an accuracy budget are for scheme auto; nestc.evaluate judges a model")
    seen = Profile.load(profile) if isinstance(profile, str | os.PathLike) else profile
    given = read_overrides(overrides) if isinstance(overrides, str | os.PathLike) else overrides_of(overrides or {})
    wishes: Wishes | None = None
    kind, _, elsewhere = scheme.partition(":") if isinstance(scheme, str) else (scheme.name, "", "")
    by_device = kind.strip() == DEVICES
    if by_device:
        if targets is None:
            raise QuantizationError("scheme devices asks targets for their formats; name them (--target vta)")
        prepared = prepare(bound)
        if seen is not None:
            seen.require(prepared.hash)
        asked = resolve(targets, {"threads": threads})
        formats = by_devices(prepared, seen, asked, elsewhere or ELSEWHERE, given, find_cuts)
        wanted, wishes = formats.scheme, formats.wishes
    elif targets is not None:
        raise QuantizationError("targets are for the schemes devices and auto; others are the same for all")
    else:
        wanted = scheme_named(scheme) if isinstance(scheme, str) else scheme
    quantized = quantize_as(
        bound, seen, wanted, given, wishes, tools=tools, data=data, threads=threads, progress=progress
    )
    if by_device:
        quantized.ir.metadata_props["nestc.scheme"] = DEVICES
    return quantized


def quantize_as(
    model: Model,
    profile: Profile | None,
    scheme: Scheme,
    overrides: Mapping[str, Scheme | None],
    wishes: Wishes | None = None,
    *,
    tools: Sequence[str | Tool] | None = None,
    data: Iterable[Batch] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Model:
    """`quantize` with everything that it has to find out first: schemes by node, and sizes bound."""
    chosen = tools_of(scheme, data is not None) if tools is None else tools_named(tools)
    run = compiler(threads)
    batches = None if data is None else checked(model, data)

    def again(changed: Model) -> Profile:
        return observe(changed, batches or (), run, "mse" if profile is None else profile.method, progress)

    return stage.quantize(
        model, profile, scheme, overrides, chosen, wishes=wishes,
        batches=batches, compiler=run, calibrate=None if batches is None else again, progress=progress,
    )  # fmt: skip


def require_repeatable(data: Iterable[Batch] | None) -> None:
    """Raise DataError for an iterator, which is used up after one pass over the data."""
    if isinstance(data, Iterator):
        raise DataError("the data can be read only once, and are needed several times; give a list or a data set")


def compiler(threads: int | None = None) -> Compiler:
    """A compiler for the quantizer: nestc's own, for the CPU; sizes left open are compiled at the call."""

    def compiled(model: Model) -> Runner:
        return compile_model(model, threads=threads).run

    return compiled


def checked(model: Model, batches: Iterable[Batch]) -> Iterable[Batch]:
    """The batches, each checked when its turn comes, and cut to the model's batch where that is fixed.

    Iterating raises ShapeError or DataError with the number of the batch. It has a length if `batches` has one.
    """
    return _Checked(model, batches)


class _Checked:
    def __init__(self, model: Model, batches: Iterable[Batch]) -> None:
        self._inputs = {name: (numpy_dtype(dtype), shape) for name, (dtype, shape) in model.inputs.items()}
        self._unranked = {value.name for value in model.ir.graph.inputs if value.shape is None}
        self._batches = batches
        firsts = {shape[0] for _, shape in self._inputs.values() if shape}
        self._fixed = next(iter(firsts)) if len(firsts) == 1 else None

    def __len__(self) -> int:
        return len(self._batches) if hasattr(self._batches, "__len__") else 0  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self._batches, Mapping | np.ndarray | str):
            raise DataError("calibration data are an iterable of {input: array}; put a single batch into a list")
        for number, batch in enumerate(self._batches):
            if not isinstance(batch, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] - a caller's mistake
                raise DataError(f"batch {number} of the calibration data is no {{input: array}}")
            yield from self._parts(self._ready(batch, number), number)

    def _ready(self, batch: Batch, number: int) -> dict[str, np.ndarray]:
        where = f"batch {number} of the calibration data"
        listed = ", ".join(self._inputs) or "none"
        unknown = next((name for name in batch if name not in self._inputs), None)
        if unknown is not None:
            raise ShapeError(f"{where} names {unknown!r}, which is no input of the model; the inputs are {listed}")
        ready: dict[str, np.ndarray] = {}
        for name, (dtype, _) in self._inputs.items():
            if name not in batch:
                raise ShapeError(f"{where} lacks input {name!r}; the inputs are {listed}")
            array = np.asarray(batch[name])
            if array.dtype != dtype:
                raise ShapeError(f"{where}: input {name!r} takes {dtype}, not {array.dtype}; convert it")
            if array.size == 0:
                raise DataError(f"{where}: input {name!r} is empty (shape {array.shape})")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                nan, inf = int(np.isnan(array).sum()), int(np.isinf(array).sum())
                raise DataError(f"{where}: input {name!r} holds {nan} NaN and {inf} infinite values; leave it out")
            ready[name] = array
        return ready

    def _parts(self, batch: dict[str, np.ndarray], number: int) -> Iterator[Batch]:
        """A batch as it is, or cut along the first axis where the model's batch is fixed and smaller."""
        sizes = {array.shape[0] for array in batch.values() if array.ndim}
        size, fixed = next(iter(sizes), 1), self._fixed
        cut = isinstance(fixed, int) and len(sizes) == 1 and size > fixed > 0 and size % fixed == 0
        parts = size // fixed if cut and isinstance(fixed, int) else 1
        for index in range(parts):
            part = {name: _part(array, index, parts) for name, array in batch.items()}
            for name, (_, shape) in self._inputs.items():
                self._check_shape(name, shape, part[name].shape, number)
            yield part

    def _check_shape(self, name: str, wanted: tuple[int | str, ...], given: tuple[int, ...], number: int) -> None:
        if name in self._unranked:
            return
        fits = all(isinstance(size, str) or size < 0 or size == got for size, got in zip(wanted, given, strict=False))
        if len(wanted) != len(given) or not fits:
            listed = ", ".join(map(str, wanted))
            raise ShapeError(
                f"batch {number} of the calibration data: input {name!r} takes shape ({listed}), not {given}"
            )


def _part(array: np.ndarray, index: int, parts: int) -> np.ndarray:
    if parts == 1 or not array.ndim:
        return array
    size = array.shape[0] // parts
    return array[index * size : (index + 1) * size]
