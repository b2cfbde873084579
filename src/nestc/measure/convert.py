"""ONNX files in the formats of ncnn and MNN, made once by their own converters and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from nestc.cache import cache_folder
from nestc.errors import Error

TIMEOUT = 600
"""Seconds that a converter may take."""

PNNX_TYPES = {"float32": "f32", "float64": "f64", "int32": "i32", "int64": "i64"}
"""Element types as pnnx names them."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class NcnnPort:
    """An input or output of an ncnn network, and the axis of the ONNX value that it leaves out (None: it has all)."""

    name: str
    batch_axis: int | None


@dataclass(frozen=True)
class NcnnFiles:
    """An ncnn network: its two files, its inputs by the names they have in the ONNX file, its outputs in graph order.

    ``frozen``: inputs that are constants of the network, since pnnx could not convert it otherwise.
    """

    param: Path
    weights: Path
    inputs: Mapping[str, NcnnPort]
    outputs: tuple[NcnnPort, ...]
    frozen: tuple[str, ...]


def ncnn_files(model: Path, inputs: Arrays) -> NcnnFiles:
    """`model` converted by pnnx for these shapes, weights in float32. Raises Error in the converter's words.

    pnnx runs the model on small random integers, of which some are no valid ids, so where it fails with all inputs it
    is tried again with the integer ones behind the first (masks, kinds of tokens) fixed to their values here.
    """
    folder = _kept(model, inputs, "pnnx", _convert_ncnn)
    about = json.loads((folder / "names.json").read_text())
    text = (folder / "model_ncnn.py").read_text()
    return NcnnFiles(
        folder / "model.ncnn.param",
        folder / "model.ncnn.bin",
        {name: NcnnPort(f"in{number}", _axis(text, f"in{number}")) for number, name in enumerate(about["inputs"])},
        tuple(NcnnPort(f"out{number}", _axis(text, f"out{number}")) for number in range(about["outputs"])),
        tuple(about["frozen"]),
    )


def mnn_file(model: Path, inputs: Arrays) -> Path:
    """`model` converted by MNN with its defaults, weights in float32. Raises Error in the converter's words."""
    return _kept(model, inputs, "mnn", _convert_mnn) / "model.mnn"


def _axis(text: str, name: str) -> int | None:
    """The axis that pnnx leaves out of a value, as the script beside its files says."""
    found = re.search(rf"\b{name}\.numpy\((?:\),\s*)?batch_index=(\d+)", text)
    return None if found is None else int(found.group(1))


def _convert_ncnn(model: Path, inputs: Arrays, folder: Path) -> None:
    found = importlib.util.find_spec("pnnx")
    places = None if found is None else found.submodule_search_locations
    if not places:
        raise Error("pnnx is not installed, which ncnn needs to read ONNX; pip install --no-deps pnnx brings it")
    program = Path(places[0]) / ("pnnx.exe" if sys.platform == "win32" else "pnnx")
    proto = onnx.load(str(model))
    graph_inputs = [value.name for value in proto.graph.input if value.name in inputs]
    extra = tuple(name for name in graph_inputs[1:] if inputs[name].dtype.kind in "iu")
    failure: str | None = None
    for frozen in ((), extra) if extra else ((),):
        shown = [name for name in graph_inputs if name not in frozen]
        onnx.save(_freeze(proto, {name: inputs[name] for name in frozen}), str(folder / "model.onnx"))
        sizes = ",".join(f"[{','.join(map(str, inputs[name].shape))}]{_pnnx_type(inputs[name])}" for name in shown)
        failure = _run([str(program), "model.onnx", f"inputshape={sizes}", "fp16=0"], folder, "model.ncnn.param")
        if failure is None:
            about = {"inputs": shown, "outputs": len(proto.graph.output), "frozen": frozen}
            (folder / "names.json").write_text(json.dumps(about))
            for kept in folder.iterdir():
                if kept.name not in ("names.json", "model.ncnn.param", "model.ncnn.bin", "model_ncnn.py"):
                    kept.unlink()
            return
    raise Error(f"pnnx does not convert it to ncnn: {failure}")


def _pnnx_type(array: np.ndarray) -> str:
    name = array.dtype.name
    if name not in PNNX_TYPES:
        raise Error(f"pnnx takes no input of type {name}")
    return PNNX_TYPES[name]


def _freeze(proto: onnx.ModelProto, values: Arrays) -> onnx.ModelProto:
    """A copy in which these inputs are constants."""
    if not values:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    kept = [value for value in copy.graph.input if value.name not in values]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    copy.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in values.items())
    return copy


def _convert_mnn(model: Path, inputs: Arrays, folder: Path) -> None:
    # The converter itself, not the `mnnconvert` around it, which installs a package and reports to its makers.
    program = [sys.executable, "-c", "import sys, _tools; _tools.mnnconvert(sys.argv)"]
    given = ["-f", "ONNX", "--modelFile", str(model.resolve()), "--MNNModel", "model.mnn", "--bizCode", "nestc"]
    failure = _run([*program, *given], folder, "model.mnn")
    if failure is not None:
        raise Error(f"mnnconvert does not convert it: {failure}")


def _run(command: Sequence[str], folder: Path, product: str) -> str | None:
    """Run a converter in `folder`; None if it made `product`, else what it said, shortened, or how it ended."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT} s"
    if done.returncode == 0 and (folder / product).exists():
        return None
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in (done.stdout + done.stderr).splitlines()]
    telling = [line for line in lines if re.search(r"error|fail|invalid|unsupported|not support", line, re.IGNORECASE)]
    ended = f"it died of signal {-done.returncode}" if done.returncode < 0 else f"it ended with {done.returncode}"
    return f"{ended}; {telling[-1][:200]}" if telling else ended


def _kept(model: Path, inputs: Arrays, package: str, convert: Callable[[Path, Arrays, Path], None]) -> Path:
    """The folder with what `convert` made of a model for these shapes; it appears when it is complete."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in _files(model):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    digest.update(repr([(name, array.shape, array.dtype.name) for name, array in inputs.items()]).encode())
    # Integers may become constants of the converted network.
    digest.update(b"".join(array.tobytes() for array in inputs.values() if array.dtype.kind in "iu"))
    try:
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    except importlib.metadata.PackageNotFoundError:
        pip = "pip install --no-deps pnnx brings it" if package == "pnnx" else "pip install 'nestc[bench]' brings it"
        raise Error(f"{package} is not installed; {pip}") from None
    home = cache_folder() / "peers"
    final = home / f"{model.stem}-{package}-{digest.hexdigest()[:16]}"
    if final.exists():
        return final
    home.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=home))
    try:
        convert(model, inputs, temporary)
        try:
            os.replace(temporary, final)
        except OSError:
            if not final.exists():  # unless another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _files(model: Path) -> list[Path]:
    """A model's file and those with its weights."""
    from nestc.importers.external import external_files

    return [model, *external_files(model)]
