"""Emitted files run by another executor: one in C, whose compiler lays out the instructions' bit-fields itself."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from qdq_nets import residual
from reference import run_qdq

import nestc
from nestc.targets.vta.target import VtaTarget

COMPILER = shutil.which("cc") or shutil.which("gcc")
SOURCE = Path(__file__).parent / "replay.c"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine")


def machine(config: dict[str, int], folder: Path) -> Path:
    """The executor for a configuration."""
    assert COMPILER is not None
    program = folder / "replay"
    sizes = [f"-D{key}={value}" for key, value in config.items()]
    subprocess.run([COMPILER, "-O2", "-std=c11", *sizes, "-o", program, SOURCE], check=True, capture_output=True)
    return program


@pytest.mark.parametrize("options", [{}, {"config": "1x32x32"}, {"count": 3}], ids=str)
def test_another_executor_computes_the_same_whichever_engine_goes_first(tmp_path: Path, options: dict) -> None:
    path = residual(tmp_path / "m.onnx")
    target = VtaTarget(**options)
    (part,) = nestc.compile(path, targets=[target]).bundle.partitions
    made = target.commands(part.name, part.artifact)
    about = json.loads(made["vta_0.json"])
    (tmp_path / "memory").write_bytes(made["vta_0.dram.bin"])
    streams = [stream for launch in about["instructions"]["launches"] for stream in launch]
    numbers = [str(number) for stream in streams for number in (stream["address"], stream["count"])]
    with np.load(io.BytesIO(made["vta_0.inputs.npz"])) as held:
        wanted = run_qdq(nestc.load(path), {"x": held["x"]})["y"]
    with np.load(io.BytesIO(made["vta_0.outputs.npz"])) as held:
        np.testing.assert_array_equal(held["y"], wanted)
        expected = held["y@dram"]

    program = machine(about["config"], tmp_path)
    (output,) = about["outputs"]
    for order in ("lcs", "scl", "csl"):
        command = [program, tmp_path / "memory", str(about["dram"]["address"]), tmp_path / "after", order, *numbers]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        memory = np.fromfile(tmp_path / "after", np.uint8)
        found = memory[output["address"] : output["address"] + output["bytes"]]
        np.testing.assert_array_equal(found, expected)
