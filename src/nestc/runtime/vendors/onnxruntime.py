"""The device "onnxruntime": runs artifacts of that kind, ONNX models, in an ONNX Runtime session."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from nestc.bundle.artifact import Artifact, Elapsed
from nestc.errors import TargetError
from nestc.runtime.arrays import address
from nestc.runtime.vendors.common import byte_sums_saturate, carried, failed, package

KIND = "onnxruntime"
CPU = "CPUExecutionProvider"

QUIET = 4
"""Severity "fatal": whatever goes wrong is an exception, and nothing else is worth a line on stderr."""

BOUND_BYTES = 500_000
"""From this many bytes on, binding given outputs (25 us a call) is quicker than copying results to them."""


@lru_cache(maxsize=1)
def runtime() -> Any:
    """The package onnxruntime, told to be quiet. Raises TargetError if it is not installed."""
    found = package("onnxruntime")
    found.set_default_logger_severity(QUIET)
    return found


def provider_called(name: str) -> str:
    """The full name of an execution provider, from its short or full one in any case.

    Raises TargetError if this installation does not have it.
    """
    here = [found for found in runtime().get_available_providers() if not found.startswith("Azure")]
    wanted = name.lower().removesuffix("executionprovider")
    by_short = {short(found).lower(): found for found in here}
    if wanted not in by_short:
        raise TargetError(f"onnxruntime has no provider {name!r} here; it has {', '.join(map(short, here))}")
    return by_short[wanted]


def short(provider: str) -> str:
    """``CUDA`` of ``CUDAExecutionProvider``."""
    return provider.removesuffix("ExecutionProvider")


class OnnxRuntimeDevice:
    """ONNX Runtime on whatever its execution provider drives."""

    name = KIND

    def load(self, artifact: Artifact, threads: int) -> OnnxRuntimeProgram:
        """A session for the artifact's model. Raises TargetError if the runtime or its provider refuses it."""
        return OnnxRuntimeProgram(artifact, threads)


class OnnxRuntimeProgram:
    """A partition in a session, which several threads may run at once."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self._about = carried(artifact)
        provider = provider_called(str(self._about.options.get("provider", CPU)))
        ort = runtime()
        try:
            self._session: Any = ort.InferenceSession(
                self._about.model, _options(ort, provider, threads), providers=[provider]
            )
        except Exception as error:  # its errors have no base class of their own
            raise failed("load", KIND, self._about.partition, error) from error
        if provider not in self._session.get_providers():
            raise TargetError(f"onnxruntime could not start its provider {short(provider)}; are its drivers installed?")
        self._names = [port.name for port in self._about.outputs]

    def __call__(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Elapsed]:
        begin = time.perf_counter()
        try:
            results = self._bound(inputs, outputs) if _large(outputs) else self._plain(inputs, outputs)
        except Exception as error:  # as above
            raise failed("run", KIND, self._about.partition, error) from error
        return results, Elapsed(time.perf_counter() - begin, "measured")

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def _plain(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """A run into new arrays, which are the caller's, copied to those given."""
        feeds = {port.name: array for port, array in zip(self._about.inputs, inputs, strict=True)}
        results = [np.asarray(found) for found in self._session.run(self._names, feeds)]
        for number, given in enumerate(outputs):
            if given is not None:
                given[...] = results[number]
                results[number] = given
        return results

    def _bound(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """A run that writes where it is told."""
        results = [port.place(given) for port, given in zip(self._about.outputs, outputs, strict=True)]
        binding = self._session.io_binding()
        for port, array in zip(self._about.inputs, inputs, strict=True):
            binding.bind_input(port.name, "cpu", 0, port.dtype.type, array.shape, address(array))
        for port, array in zip(self._about.outputs, results, strict=True):
            binding.bind_output(port.name, "cpu", 0, port.dtype.type, array.shape, address(array))
        self._session.run_with_iobinding(binding)
        return results


def _large(outputs: Sequence[np.ndarray | None]) -> bool:
    """Whether all outputs are given, hold numbers, and are worth binding."""
    given = [array for array in outputs if array is not None and not array.dtype.hasobject]
    return len(given) == len(outputs) and sum(array.nbytes for array in given) >= BOUND_BYTES


def _options(ort: Any, provider: str, threads: int) -> Any:
    """One run at a time on `threads` threads, which stop spinning when it ends: other devices use the same cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = QUIET
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if byte_sums_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if provider != CPU:
        # What the provider does not take would run on the CPU unseen, and be measured as the provider's.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options
