"""The device "openvino": runs artifacts of that kind, ONNX models, compiled by OpenVINO for one of its devices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from nestc.bundle.artifact import Artifact, Elapsed
from nestc.errors import TargetError
from nestc.runtime.vendors.common import Port, byte_sums_saturate, carried, failed, package

KIND = "openvino"

PRECISIONS = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}
"""Formats that float32 may be computed in, and what OpenVINO calls the capability."""


@lru_cache(maxsize=1)
def core() -> Any:
    """OpenVINO's entry, one a process. Raises TargetError if the package is not installed."""
    return package("openvino").Core()


def device_called(name: str) -> str:
    """A device as OpenVINO writes it (``CPU``, ``GPU.1``, ``NPU``), from its name in any case.

    Raises TargetError if there is none of that name here.
    """
    here: list[str] = list(core().available_devices)
    numbered = {device.partition(".")[0].lower(): device for device in reversed(here)}  # GPU is the first of them
    by_name = {**numbered, **{device.lower(): device for device in here}}
    if name.lower() not in by_name:
        raise TargetError(f"openvino has no device {name!r} here; it has {', '.join(here) or 'none'}")
    return by_name[name.lower()]


def require_precision(device: str, precision: str) -> None:
    """Raise TargetError unless `device` computes in `precision`."""
    if precision not in PRECISIONS:
        raise TargetError(f"openvino computes in {', '.join(PRECISIONS)}, not in {precision!r}")
    able = core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    if PRECISIONS[precision] not in able:
        here = [name for name, capability in PRECISIONS.items() if capability in able]
        raise TargetError(f"openvino's device {device} does not compute in {precision}; it does in {', '.join(here)}")


class OpenVinoDevice:
    """OpenVINO on one of the devices that it drives."""

    name = KIND

    def load(self, artifact: Artifact, threads: int) -> OpenVinoProgram:
        """The artifact's model, compiled. Raises TargetError if OpenVINO refuses it."""
        return OpenVinoProgram(artifact, threads)


class OpenVinoProgram:
    """A partition compiled by OpenVINO; each thread that is inside at once has an inference request of its own."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self._about = about = carried(artifact)
        device = device_called(str(about.options.get("device", "CPU")))
        precision = str(about.options.get("precision", "f32"))
        require_precision(device, precision)
        self._package = package("openvino")
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # else its threads sit on cores that other devices' threads use too
            "LOG_LEVEL": "LOG_NONE",
        }
        try:
            network = core().read_model(about.model, b"")
            inputs, outputs = _indices(network.inputs), _indices(network.outputs)
            known = core().get_property(device, "SUPPORTED_PROPERTIES")
            wanted = {key: value for key, value in settings.items() if key in known}
            if device == "CPU" and byte_sums_saturate():
                wanted["LP_TRANSFORMS_MODE"] = False  # quantized regions are computed in float32 then, to the same sums
            self._compiled: Any = core().compile_model(network, device, wanted)
            self._inputs = [(inputs[port.name], port) for port in about.inputs]
            self._outputs = [(outputs[port.name], port) for port in about.outputs]
            _require_shapes(self._compiled.inputs, self._inputs)
            _require_shapes(self._compiled.outputs, self._outputs)
            self._idle: list[Any] = [self._compiled.create_infer_request()]
        except Exception as error:  # RuntimeError mostly, and whatever its bindings raise
            raise failed("load", KIND, about.partition, error) from error

    def __call__(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Elapsed]:
        begin = time.perf_counter()
        try:
            request = self._idle.pop()
        except IndexError:  # all are at work in other threads
            request = self._compiled.create_infer_request()
        try:
            results = [port.place(given) for (_, port), given in zip(self._outputs, outputs, strict=True)]
            # The request knows addresses only: these lists keep the memory until it has run.
            taken = [self._tensor(port, array) for (_, port), array in zip(self._inputs, inputs, strict=True)]
            made = [self._tensor(port, array) for (_, port), array in zip(self._outputs, results, strict=True)]
            for (index, _), tensor in zip(self._inputs, taken, strict=True):
                request.set_input_tensor(index, tensor)
            for (index, _), tensor in zip(self._outputs, made, strict=True):
                request.set_output_tensor(index, tensor)
            request.infer()
        except Exception as error:  # as above; the request is not used again
            raise failed("run", KIND, self._about.partition, error) from error
        self._idle.append(request)
        return results, Elapsed(time.perf_counter() - begin, "measured")

    def close(self) -> None:
        """Free the requests and the compiled model."""
        self._idle.clear()
        self._compiled = None

    def _tensor(self, port: Port, array: np.ndarray) -> Any:
        """An array as OpenVINO's tensor, on the same memory, which it only takes if that may be written."""
        if not array.flags.writeable:
            array = array.copy()
        if port.dtype.name != "bfloat16":
            return self._package.Tensor(array, shared_memory=True)
        return self._package.Tensor(array.view(np.uint16), list(array.shape), self._package.Type.bf16)


def _indices(ports: Sequence[Any]) -> dict[str, int]:
    """The number of each port by all of its names."""
    return {name: index for index, port in enumerate(ports) for name in port.get_names()}


def _require_shapes(ports: Sequence[Any], wanted: Sequence[tuple[int, Port]]) -> None:
    """Raise ValueError unless ports have the shapes wanted: OpenVINO would write beyond an array that is too small."""
    for index, port in wanted:
        shape = ports[index].partial_shape
        if port.shape is None or shape.is_dynamic or tuple(shape.to_shape()) != port.shape:
            raise ValueError(f"{port.name!r} is {shape} there, not {list(port.shape or ())}")
