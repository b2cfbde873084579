"""What is timed: nestc's executable and the runtimes it is compared with, each set up as its makers advise."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from nestc.errors import Error
from nestc.measure.mobile import MnnEngine, NcnnEngine
from nestc.measure.packages import package

Arrays = Mapping[str, np.ndarray]


class Executable(Protocol):
    """The part of `nestc.Executable` that measuring needs."""

    def run(self, inputs: Arrays) -> Mapping[str, np.ndarray]:
        """Run with named arrays."""
        ...

    def timeline(self) -> list[dict[str, Any]]:
        """The last run, partition by partition."""
        ...


class Engine(Protocol):
    """One side of a comparison. `run` computes into wherever the engine likes; `outputs` gives copies of one run."""

    name: str
    version: str

    def run(self) -> object:
        """One inference on the inputs given at construction."""
        ...

    def outputs(self) -> list[np.ndarray]:
        """Outputs of one inference, in graph order."""
        ...


class NestcEngine:
    """An executable, called as a user calls it."""

    name = "nestc"

    def __init__(self, executable: Executable, inputs: Arrays) -> None:
        self.version = importlib.metadata.version("nestc")
        self._executable = executable
        self._inputs = inputs

    def run(self) -> object:
        """One inference."""
        return self._executable.run(self._inputs)

    def outputs(self) -> list[np.ndarray]:
        """Outputs of one inference."""
        return list(self._executable.run(self._inputs).values())


class OnnxRuntimeEngine:
    """onnxruntime: all graph optimizations, sequential, symbolic dimensions fixed to the inputs' sizes.

    ``exact``: sums of byte products do not saturate. By default onnxruntime lets them, on x86 processors without VNNI.
    """

    name = "onnxruntime"

    def __init__(self, model: Path, inputs: Arrays, threads: int, exact: bool = False) -> None:
        ort = package("onnxruntime")
        self.version: str = ort.__version__
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        for name, size in symbolic_sizes(model, inputs).items():
            options.add_free_dimension_override_by_name(name, size)
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._inputs = dict(inputs)

    def run(self) -> object:
        """One inference; its interface returns new arrays, as ours does."""
        return self._session.run(None, self._inputs)

    def outputs(self) -> list[np.ndarray]:
        """Outputs of one inference."""
        return list(self._session.run(None, self._inputs))


class OpenVinoEngine:
    """openvino: latency hint, one infer request used again, tensors shared without a copy.

    ``precision``: what it is asked to compute in, ``f32`` or ``bf16``.
    """

    name = "openvino"

    def __init__(self, model: Path, inputs: Arrays, threads: int, precision: str = "f32") -> None:
        ov = package("openvino")
        self.version = importlib.metadata.version("openvino")
        core = ov.Core()
        network = core.read_model(str(model))
        self._inputs: dict[int, np.ndarray] = {}
        shapes: dict[Any, list[int]] = {}
        for index, port in enumerate(network.inputs):
            name = next((name for name in port.get_names() if name in inputs), None)
            if name is None:
                raise Error(f"openvino renamed an input of {model.name}, which therefore cannot be compared with it")
            self._inputs[index] = inputs[name]
            shapes[port] = list(inputs[name].shape)
        network.reshape(shapes)
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
        }
        compiled = core.compile_model(network, "CPU", settings)
        self._count = len(compiled.outputs)
        self._request = compiled.create_infer_request()

    def run(self) -> object:
        """One inference into the request's own tensors."""
        return self._request.infer(self._inputs, share_inputs=True, share_outputs=True)

    def outputs(self) -> list[np.ndarray]:
        """Copies of the outputs of one inference."""
        results = self._request.infer(self._inputs, share_inputs=True, share_outputs=False)
        return [np.array(results[index]) for index in range(self._count)]


PEERS: dict[str, Callable[[Path, Arrays, int], Engine]] = {
    OnnxRuntimeEngine.name: OnnxRuntimeEngine,
    OpenVinoEngine.name: OpenVinoEngine,
    NcnnEngine.name: NcnnEngine,
    MnnEngine.name: MnnEngine,
}


def open_peer(name: str, model: Path, inputs: Arrays, threads: int) -> Engine:
    """The peer called `name`, ready to run. Raises Error if it is unknown, not installed, or refuses the model."""
    if name not in PEERS:
        raise Error(f"there is nothing called {name!r} to compare with; choose from {', '.join(PEERS)}")
    try:
        return PEERS[name](model, inputs, threads)
    except Error:
        raise
    except Exception as error:
        raise Error(f"{name} cannot run {model.name}: {' '.join(str(error).split())[:300]}") from error


def symbolic_sizes(model: Path, inputs: Arrays) -> dict[str, int]:
    """Size of each named open dimension of the model's inputs, as the arrays have it."""
    sizes: dict[str, int] = {}
    for value in onnx.load(str(model), load_external_data=False).graph.input:
        if value.name not in inputs:
            continue
        for dim, size in zip(value.type.tensor_type.shape.dim, inputs[value.name].shape):
            if dim.dim_param:
                sizes[dim.dim_param] = size
    return sizes
