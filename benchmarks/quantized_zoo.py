"""Models of the zoo in int8, by each quantizer: made on first use and kept in the user's cache directory.

Calibrated on seeded random inputs, since speed does not depend on what these were: nothing is said about accuracy.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import onnx

import nestc
import quantizers
import zoo
from isolated import Lost, run_isolated
from nestc.errors import Error

SAMPLES = 16

MODELS = ("resnet50", "mobilenetv2", "efficientnet_lite0", "minilm", "ppocr_rec")
"""What is measured in int8 where no models are named."""

SCHEMES = {
    "nestc": "int8",
    "nestc-7": "int8:weight-bits=7",
    "nestc-bf16": "bf16",
    "nestc-pow2": "int8-pow2",
    "nestc-pow2-tensor": "int8-pow2:granularity=tensor",
}
"""What our own quantizer is asked for, by the name of the file."""

SUFFIX = {**dict.fromkeys(SCHEMES, ".onnx"), "onnxruntime": ".onnx", "openvino": ".xml"}

_PACKAGES = {
    **dict.fromkeys(SCHEMES, ("nestc",)),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino", "nncf"),
}


def path(name: str, engine: str, timeout: float = 1800.0) -> Path:
    """The int8 form of a zoo model for an engine: nestc's (also with weights of 7 bits, and with powers of two as
    scales), onnxruntime's static QDQ, openvino's by NNCF.

    Raises Error if it cannot be made.
    """
    target = cache_folder() / f"{name}-{engine}-{_key(name, engine)}" / f"model{SUFFIX[engine]}"
    if not target.exists():
        # In a process of its own: NNCF and onnxruntime's quantizer leave much behind in the one they ran in.
        ((_, answer),) = run_isolated(_make, [(name, engine, str(target.parent))], 1, timeout)
        if isinstance(answer, Lost) or answer:
            reason = answer.reason if isinstance(answer, Lost) else answer
            raise Error(f"{engine} cannot quantize {name}: {reason}")
    return target


def cache_folder() -> Path:
    """Where quantized models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nestc" / "quantized"


def _key(name: str, engine: str) -> str:
    """A hash over what the quantized model depends on: the float model, the samples, and the quantizer."""
    digest = hashlib.sha256(zoo.path(name).read_bytes())
    digest.update(f"{SAMPLES} {[importlib.metadata.version(package) for package in _PACKAGES[engine]]}".encode())
    home = Path(nestc.__file__).parent
    ours = [*home.glob("quant*/**/*.py"), *home.glob("graph/**/*.py"), *home.glob("quant*.py")]
    for file in [Path(__file__), Path(quantizers.__file__), *(sorted(ours) if engine in SCHEMES else ())]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _make(task: tuple[str, str, str]) -> str:
    """A worker's task: quantize into a folder, which appears when it is complete. Gives what failed, or nothing."""
    name, engine, folder = task
    final = Path(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent))
    try:
        _quantize(name, engine, temporary / f"model{SUFFIX[engine]}")
        if not final.exists():
            temporary.replace(final)
    except Exception as error:  # noqa: BLE001 - the table shows what failed and goes on
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ""


def _quantize(name: str, engine: str, target: Path) -> None:
    batches = [zoo.inputs(name, seed) for seed in range(1, SAMPLES + 1)]
    transformer = any(node.op_type == "Softmax" for node in onnx.load(str(zoo.path(name))).graph.node)
    if engine in SCHEMES:
        model = nestc.load(zoo.path(name), shapes={key: list(shape) for key, shape in zoo.get(name).shapes.items()})
        nestc.quantize(model, nestc.calibrate(model, batches), scheme=SCHEMES[engine]).save(target)
    elif engine == "onnxruntime":
        prepared = target.with_name("prepared.onnx")
        quantizers.onnxruntime_prepare(zoo.path(name), batches[0], prepared)
        quantizers.onnxruntime_static(prepared, batches, target)
        prepared.unlink()
    else:
        quantizers.nncf_openvino(zoo.path(name), batches, target, transformer=transformer)
