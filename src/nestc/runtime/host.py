"""The device "host": runs artifacts of kind ``host-onnx``, operators without generated code, by ``onnx.reference``."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from nestc.bundle.artifact import Artifact, Elapsed
from nestc.errors import BundleError, TargetError

KIND = "host-onnx"
MODEL = "model.onnx"


class HostDevice:
    """Python on the machine that runs everything else."""

    name = "host"

    def load(self, artifact: Artifact, threads: int) -> HostProgram:
        """Parse the model. Raises BundleError if it is not ONNX; `threads` is not used."""
        return HostProgram(artifact)


class HostProgram:
    """A partition in the reference evaluator. Weights of the artifact are fed as inputs of those names."""

    def __init__(self, artifact: Artifact) -> None:
        # Imported here because only bundles with a host partition need onnx at all.
        import onnx
        from google.protobuf.message import DecodeError
        from onnx.reference import ReferenceEvaluator

        from nestc.runtime.host_loops import Loop, Scan

        try:
            model = onnx.load_model_from_string(artifact.files[MODEL])
        except (KeyError, DecodeError) as error:
            raise BundleError(f"a host partition has no readable {MODEL}: {error}") from error
        self._inputs = tuple(artifact.metadata.get("inputs") or (value.name for value in model.graph.input))
        self._outputs = list(artifact.metadata.get("outputs") or (value.name for value in model.graph.output))
        self._weights = dict(artifact.weights)
        self._evaluator = ReferenceEvaluator(model, new_ops=[Loop, Scan])

    def __call__(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Elapsed]:
        feeds = {**self._weights, **dict(zip(self._inputs, inputs, strict=True))}
        begin = time.perf_counter()
        try:
            found = self._evaluator.run(self._outputs, feeds)
        except Exception as error:  # the evaluator raises whatever numpy does inside an operator
            raise TargetError(f"onnx.reference cannot run a host partition: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - begin
        results: list[np.ndarray] = []
        for given, value in zip(outputs, found, strict=True):
            result = np.asarray(value)
            if given is not None:
                given[...] = result.reshape(given.shape)
            results.append(np.ascontiguousarray(result).reshape(result.shape) if given is None else given)
        return results, Elapsed(seconds, "measured")

    def close(self) -> None:
        """Nothing is held that Python does not free."""
