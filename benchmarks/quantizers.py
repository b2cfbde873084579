"""How the other quantizers are called, each as its makers advise, on the same model and the same calibration data."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import version_converter

from nestc.errors import Error

Batch = Mapping[str, np.ndarray]

ORT_METHODS = ("MinMax", "Entropy", "Percentile")

NNCF_PRESETS = ("mixed", "performance")
"""mixed: weights symmetric, activations asymmetric; performance: both symmetric."""


def onnxruntime_static(
    model: Path, batches: Iterable[Batch], target: Path, method: str = "MinMax", symmetric: bool = False
) -> None:
    """onnxruntime.quantization's static QDQ: weights s8 per channel, activations u8, or s8 with `symmetric`."""
    ort = _package("onnxruntime.quantization")
    kinds = ort.QuantType
    with _quietly():
        ort.quantize_static(
            str(model),
            str(target),
            _Reader(iter(batches)),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            weight_type=kinds.QInt8,
            activation_type=kinds.QInt8 if symmetric else kinds.QUInt8,
            calibrate_method=getattr(ort.CalibrationMethod, method),
            extra_options={"ActivationSymmetric": symmetric},
        )


def onnxruntime_prepare(model: Path, batch: Batch, target: Path) -> None:
    """What onnxruntime advises before it quantizes: shapes as the batch has them, inferred, and the graph optimized."""
    _package("onnxruntime.quantization")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    proto = onnx.load(str(model))
    if next(entry.version for entry in proto.opset_import if not entry.domain) < 13:
        # Scales a channel came with opset 13; onnxruntime would write them into older models, which it then refuses.
        proto = version_converter.convert_version(proto, 13)
    for value in proto.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, batch[value.name].shape if value.name in batch else ()):
            dim.dim_value = size
    # As a file: given the model itself, onnxruntime takes its weights out and trips over their absence afterwards.
    shaped = target.with_name(f"shaped-{target.name}")
    onnx.save(proto, str(shaped))
    with _quietly():
        quant_pre_process(str(shaped), str(target), skip_symbolic_shape=True)
    shaped.unlink()


class _Reader:
    """onnxruntime asks for batches one by one, and for None at the end."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else dict(batch)


def nncf_onnx(
    model: Path, batches: list[Batch], target: Path, preset: str = "mixed", transformer: bool = False
) -> None:
    """nncf.quantize on the ONNX model, written as ONNX."""
    proto = onnx.load(str(model))
    onnx.save(_nncf(proto, batches, preset, transformer), str(target))


def nncf_openvino(
    model: Path, batches: list[Batch], target: Path, preset: str = "mixed", transformer: bool = False
) -> None:
    """nncf.quantize on openvino's own form of the model, written as `target` (.xml) and weights beside it."""
    ov = _package("openvino")
    network = ov.Core().read_model(str(model))
    network.reshape({name: list(array.shape) for name, array in batches[0].items()})
    with _quietly():
        ov.save_model(_nncf(network, batches, preset, transformer), str(target), compress_to_fp16=False)


def _nncf(model: Any, batches: list[Batch], preset: str, transformer: bool) -> Any:
    nncf = _package("nncf")
    nncf.set_log_level(logging.ERROR)
    with _quietly():
        return nncf.quantize(
            model,
            nncf.Dataset(batches, dict),
            preset=nncf.QuantizationPreset.MIXED if preset == "mixed" else nncf.QuantizationPreset.PERFORMANCE,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            subset_size=len(batches),
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Both draw bars and log on stdout, where the JSON belongs."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            yield
        finally:
            logging.disable(level)


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Error(f"{name} is not installed; pip install 'nestc[bench]' brings it") from error
