"""ncnn and MNN as engines to compare with: both use Winograd convolutions, set up in float32 as their makers advise."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from nestc.errors import Error
from nestc.measure.convert import NcnnPort, mnn_file, ncnn_files
from nestc.measure.packages import package

Arrays = Mapping[str, np.ndarray]

TRIAL_SECONDS = 0.3
"""For about so long each setting of MNN is tried."""

TRIAL_RUNS = 3
"""Runs of each setting at least."""


class NcnnEngine:
    """ncnn: float32 alone (no fp16 or bf16 storage), Winograd, packed layouts, light mode, and pools of memory that are
    kept between runs, as its own benchmark has it. Inputs are in ncnn's layout before a run begins.
    """

    name = "ncnn"

    def __init__(self, model: Path, inputs: Arrays, threads: int) -> None:
        ncnn = package("ncnn")
        self.version = importlib.metadata.version("ncnn")
        files = ncnn_files(model, inputs)
        unknown = _unknown_layers(ncnn, files.param)
        if unknown:
            raise Error(f"ncnn has no layer for {', '.join(unknown)}, which pnnx left in {model.name}")
        self._pools = ncnn.UnlockedPoolAllocator(), ncnn.PoolAllocator()
        self._net = ncnn.Net()
        options = self._net.opt
        options.num_threads = threads
        options.lightmode = True
        options.use_vulkan_compute = False
        options.use_packing_layout = True
        options.use_winograd_convolution = options.use_sgemm_convolution = True
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
        options.use_bf16_packed = options.use_bf16_storage = False
        options.blob_allocator, options.workspace_allocator = self._pools
        with _silenced() as said:
            if self._net.load_param(str(files.param)) or self._net.load_model(str(files.weights)):
                raise Error(f"ncnn cannot load what pnnx made of {model.name}{said()}")
            self._inputs = [(port.name, _mat(ncnn, inputs[name], port)) for name, port in files.inputs.items()]
            self._outputs = files.outputs
            try:
                self.run()
            except Error as error:
                raise Error(f"{error}{said()}") from None

    def __del__(self) -> None:
        # The network gives its memory back to the pools, so it must go first.
        if hasattr(self, "_net"):
            del self._net

    def run(self) -> list[Any]:
        """One inference into matrices of ncnn's own."""
        extractor = self._net.create_extractor()
        for name, mat in self._inputs:
            extractor.input(name, mat)
        results: list[Any] = []
        for port in self._outputs:
            status, mat = extractor.extract(port.name)
            if status:
                raise Error(f"ncnn fails in a layer before {port.name}, with status {status}")
            results.append(mat)
        return results

    def outputs(self) -> list[np.ndarray]:
        """Copies of the outputs of one inference."""
        found: list[np.ndarray] = []
        for port, mat in zip(self._outputs, self.run(), strict=True):
            view = mat.numpy() if port.batch_axis is None else mat.numpy(batch_index=port.batch_axis)
            found.append(np.array(view))
        return found


def _mat(ncnn: Any, array: np.ndarray, port: NcnnPort) -> Any:
    """The array in ncnn's own memory, rows of channels aligned; integers have 32 bits there."""
    given = np.ascontiguousarray(array.astype(np.int32) if array.dtype.kind in "iu" else array)
    mat = ncnn.Mat(given) if port.batch_axis is None else ncnn.Mat(given, batch_index=port.batch_axis)
    return mat.clone()


def _unknown_layers(ncnn: Any, param: Path) -> list[str]:
    """Types of layers in an ncnn network that ncnn does not have: what pnnx could not translate."""
    types = dict.fromkeys(line.split()[0] for line in param.read_text().splitlines()[2:] if line.strip())
    return [name for name in types if ncnn.layer_to_index(name) < 0]


class MnnEngine:
    """MNN: precision "high" (float32), memory "normal", its module interface, sizes worked out once. Weights are laid
    out when loading or not, whichever is faster here: it saves time, but some convolutions then go without Winograd.
    """

    name = "mnn"

    def __init__(self, model: Path, inputs: Arrays, threads: int) -> None:
        with _silenced() as said:
            package("MNN")
            nn, expr = package("MNN.nn"), package("MNN.expr")
            self.version = importlib.metadata.version("mnn")
            file = mnn_file(model, inputs)
            outputs = [value.name for value in onnx.load(str(model), load_external_data=False).graph.output]
            self._inputs = [_variable(expr, name, array) for name, array in inputs.items()]
            best = float("inf")
            for rearrange in (False, True):
                runtime = nn.create_runtime_manager(
                    ({"backend": "CPU", "numThread": threads, "precision": "high", "memory": "normal"},)
                )
                module = nn.load_module_from_file(
                    str(file), list(inputs), outputs, runtime_manager=runtime, shape_mutable=False, rearrange=rearrange
                )
                took = self._try(module)
                if took < best:
                    best, self._module, self._runtime = took, module, runtime
                del module, runtime
                gc.collect()  # the slower one's weights
            if best == float("inf"):
                raise Error(f"MNN gives no output for {model.name}{said()}")

    def _try(self, module: Any) -> float:
        """Seconds of the fastest of some runs; infinite where there is no output."""
        if not all(np.size(value.read()) for value in module.forward(self._inputs)):
            return float("inf")
        times: list[float] = []
        while len(times) < TRIAL_RUNS or sum(times) < TRIAL_SECONDS:
            start = time.perf_counter()
            _ = [value.read() for value in module.forward(self._inputs)]
            times.append(time.perf_counter() - start)
        return min(times)

    def run(self) -> list[Any]:
        """One inference; reading is what computes it."""
        return [value.read() for value in self._module.forward(self._inputs)]

    def outputs(self) -> list[np.ndarray]:
        """Copies of the outputs of one inference."""
        return [np.array(value) for value in self.run()]


def _variable(expr: Any, name: str, array: np.ndarray) -> Any:
    """The array as MNN's variable; integers have 32 bits there."""
    if array.dtype.name not in ("float32", "int32", "int64"):
        raise Error(f"MNN takes no input of type {array.dtype.name}, as {name!r} is")
    whole = array.dtype.kind == "i"
    variable = expr.placeholder(list(array.shape), expr.NCHW, expr.int if whole else expr.float)
    variable.write(np.ascontiguousarray(array.astype(np.int32) if whole else array))
    return variable


@contextmanager
def _silenced() -> Iterator[Any]:
    """Keep what native code prints out of our output; gives a function that tells its last line that names an error."""
    if sys.platform == "win32":
        yield lambda: ""
        return
    flush = ctypes.CDLL(None).fflush  # C has buffers of its own
    with tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        sys.stderr.flush()
        flush(None)
        kept = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

        def said() -> str:
            flush(None)
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            telling = [line.strip() for line in lines if re.search(r"error|fail|not |invalid", line, re.IGNORECASE)]
            return f": {telling[-1][:200]}" if telling else ""

        try:
            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            flush(None)
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            for number in kept:
                os.close(number)
