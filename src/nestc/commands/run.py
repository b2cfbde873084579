"""``nestc run``: one inference of a bundle or a model."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestc.commands import common
from nestc.errors import Error

if TYPE_CHECKING:
    import numpy as np


def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle (.nest) or an ONNX file.")],
    input: common.Inputs = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.npz", help="Write the outputs, named, into an .npz.")
    ] = None,
    target: common.Targets = None,
    shape: common.Shapes = None,
    dim: common.Dims = None,
    threads: common.Threads = None,
    on_failure: common.OnFailures = None,
    exact: common.Exact = False,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Run a bundle (or a model, compiled on the spot) once.

    Example: `nestc run resnet50.nest --input data=cat.jpg -o out.npz`

    What a simulated device runs counts with its modelled time, and is named; the simulator's own time counts nowhere.
    """
    from nestc.runtime.session import modelled_ms

    # Inputs that are given say how large open dimensions are.
    executable = common.open_or_compile(
        bundle, target or [], shape or [], dim or [], threads, not input, None if on_failure is None else "cpu", exact
    )
    inputs = common.read_inputs(input or [], executable.inputs) or common.random_inputs(executable.inputs)
    executable.run(inputs)  # the first run also touches memory and wakes the workers: it is not the latency shown
    started = time.perf_counter()
    outputs = executable.run(inputs)
    latency_ms = (time.perf_counter() - started) * 1e3
    timeline = executable.timeline()
    modelled = modelled_ms(timeline)
    if modelled:  # the wall clock would count the simulator's work, too
        latency_ms = max(mark["end_us"] for mark in timeline) / 1e3
    if output is not None:
        save(output, outputs)
    if json:
        report: dict[str, Any] = {
            "outputs": {name: describe(array) for name, array in outputs.items()},
            "latency_ms": round(latency_ms, 4),
            "timeline": timeline,
        }
        common.print_json({**report, "modelled_ms": modelled} if modelled else report)
        return
    for name, array in outputs.items():
        print(f"{name}: {array.dtype}{list(array.shape)} {preview(array)}")
    parts = ", ".join(f"{device} {took:.3g} ms" for device, took in modelled.items())
    said = f"{latency_ms:.3f} ms" + (f" of which modelled or estimated, not measured: {parts}" if modelled else "")
    print(said + (f", outputs in {output}" if output is not None else ""))


def describe(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and a hash over the bytes (C order) of an output."""
    import numpy as np

    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest}


def preview(array: np.ndarray) -> str:
    """The first few values of an output, in a line."""
    values = ", ".join(f"{value:.5g}" if array.dtype.kind == "f" else str(value) for value in array.ravel()[:5])
    return f"{values}, ..." if array.size > 5 else values


def save(path: Path, outputs: Mapping[str, np.ndarray]) -> None:
    """Write outputs as an .npz; the file appears only when it is complete. Raises nestc.Error if it cannot."""
    import numpy as np

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # np.savez takes names as keyword arguments, among which an output called "file" would not fit.
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, array in outputs.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Error(f"cannot write {path}: {error.strerror or error}") from error
