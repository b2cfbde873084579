"""The node tests of the `onnx` package with dense inputs and outputs, written once to the cache, one file pair a case.

The package generates the cases by running its reference code (about ten seconds), so workers read files instead.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CACHE = Path(__file__).resolve().parent / ".zoo" / f"node-tests-{onnx.__version__}"

# Operators whose values are random by definition: only shape and type of the outputs can be judged.
RANDOM_OPS = frozenset(
    {"Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"}
)


@dataclass(frozen=True)
class NodeCase:
    """One node test: `file` is the model, `op` the operator it is about, tolerances as the package states them."""

    name: str
    op: str
    domain: str
    rtol: float
    atol: float
    random: bool

    @property
    def file(self) -> Path:
        """The ONNX model."""
        return CACHE / f"{self.name}.onnx"

    def data(self) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """Inputs by name and expected outputs in order (ml_dtypes arrays for types that numpy lacks)."""
        tensors: list[TensorProto] = []
        content = (CACHE / f"{self.name}.data").read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            tensors.append(TensorProto.FromString(content[8 : 8 + size]))
            content = content[8 + size :]
        graph = onnx.load(str(self.file)).graph
        arrays = [numpy_helper.to_array(tensor) for tensor in tensors]
        return dict(zip((v.name for v in graph.input), arrays)), arrays[len(graph.input) :]


def load_cases() -> list[NodeCase]:
    """All cases, in the package's order; generated into the cache on first use."""
    index = CACHE / "cases.json"
    if not index.exists():
        _generate()
    return [NodeCase(**entry) for entry in json.loads(index.read_text())]


def _generate() -> None:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own reference code divides by zero on purpose
        tests = load_model_tests(kind="node")
    part = CACHE.with_name(CACHE.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    cases = [(test.name, test.model, test.data_sets, test.rtol, test.atol) for test in tests]
    about: dict[str, tuple[str, str]] = {}
    for name, model, *_ in cases:
        node = model.graph.node[0] if model is not None and model.graph.node else None
        about[name] = (node.op_type, node.domain) if node is not None else ("", "")
    entries: list[dict[str, object]] = []
    for name, model, data_sets, rtol, atol in cases:
        if model is None or data_sets is None or len(data_sets) != 1:
            continue
        values = [*model.graph.input, *model.graph.output]
        if not all(value.type.HasField("tensor_type") for value in values):
            continue
        inputs, outputs = data_sets[0]
        tensors = [_tensor(array, value) for array, value in zip([*inputs, *outputs], values, strict=True)]
        (part / f"{name}.onnx").write_bytes(model.SerializeToString())
        blobs = [tensor.SerializeToString() for tensor in tensors]
        (part / f"{name}.data").write_bytes(b"".join(len(b).to_bytes(8, "little") + b for b in blobs))
        # An expanded case is the same operator's function body.
        op, domain = about.get(name.split("_expanded")[0], about[name])
        random = _is_random(model, inputs)
        entries.append({"name": name, "op": op, "domain": domain, "rtol": rtol, "atol": atol, "random": random})
    (part / "cases.json").write_text(json.dumps(entries))
    shutil.rmtree(CACHE, ignore_errors=True)
    part.rename(CACHE)


def _tensor(value: object, info: onnx.ValueInfoProto) -> TensorProto:
    """A test's value as a TensorProto of the declared type."""
    if isinstance(value, TensorProto):
        return value
    array = np.asarray(value)
    declared = info.type.tensor_type.elem_type
    if declared != TensorProto.STRING and array.dtype != helper.tensor_dtype_to_np_dtype(declared):
        raise ValueError(f"test value for {info.name} has type {array.dtype}, the model declares {declared}")
    return numpy_helper.from_array(array, info.name)


def _is_random(model: onnx.ModelProto, inputs: Sequence[object]) -> bool:
    """True for random operators, and for Dropout in training mode with a ratio other than zero."""
    for node in model.graph.node:
        if node.op_type in RANDOM_OPS:
            return True
        if node.op_type == "Dropout" and len(node.input) == 3:
            names = [value.name for value in model.graph.input]
            ratio = np.asarray(inputs[names.index(node.input[1])]) if node.input[1] in names else np.array(0.5)
            training = np.asarray(inputs[names.index(node.input[2])]) if node.input[2] in names else np.array(True)
            if bool(training) and float(ratio) != 0.0:
                return True
    return False
