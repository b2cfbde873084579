"""What another AiM simulator needs to replay a partition: requests as its trace text, banks, inputs and outputs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from nestc.bundle.artifact import Artifact
from nestc.bundle.dtypes import numpy_dtype
from nestc.runtime.aim import host
from nestc.runtime.aim.device import BANKS, MACHINE_FILE, REGISTERS, ElementLaunch, machine_of, steps
from nestc.runtime.aim.encode import decode
from nestc.runtime.aim.trace import format_trace
from nestc.targets.emitted import npz

FORMAT = "nestc-aim-commands"
VERSION = 1
"""Raised when a reader of these files would have to change."""

SEED = 0


def files(partition: str, artifact: Artifact) -> dict[str, bytes]:
    """``<partition>.aim``, ``.json``, ``.banks.bin``, ``.registers.bin``, ``.machine.yaml``, ``.inputs.npz``,
    ``.outputs.npz``.

    The trace holds the requests of all layers one after the other, and one EOC at the end. Inputs are random (seed 0);
    the outputs are what the functional simulator computes from them. Beside each value of a layer stand its registers:
    ``<layer>@writes``, (registers, lanes) in the order of the trace's W GPR, and ``<layer>@reads`` likewise.
    """
    about = artifact.metadata
    machine = machine_of(artifact)
    generator = np.random.default_rng(SEED)
    values = {name: artifact.weights[key] for name, key in about["constants"].items()}
    inputs = {
        value["name"]: generator.standard_normal(value["shape"]).astype(numpy_dtype(value["dtype"]))
        for value in about["inputs"]
    }
    values |= inputs
    given: dict[str, np.ndarray] = {}
    found: dict[str, np.ndarray] = {}
    image, registers = artifact.weights[BANKS], artifact.weights[REGISTERS]
    banks = image.copy()
    lines: list[str] = []
    told: list[dict[str, Any]] = []
    files_of = {step["layer"]: step["file"] for step in about["steps"] if step["kind"] != "host"}
    for step in steps(artifact, machine):
        if isinstance(step, host.HostOp):
            values[step.output] = host.evaluate(step, [values[name] if name else None for name in step.inputs])
            continue
        if isinstance(step, ElementLaunch):
            writes = step.pack([values[name] for name in step.sources])
        else:
            writes = step.layout.pack(step.vectors(values[step.source]))
        reads = step.execute(writes, machine, banks, registers)
        values |= step.results(reads)
        given[f"{step.layer}@writes"], found[f"{step.layer}@reads"] = writes, np.stack(reads)
        requests = decode(artifact.files[files_of[step.layer]])[:-1]
        first = sum(not line.startswith("#") for line in lines)
        lines += [f"# layer {step.layer}", *format_trace(requests).splitlines()]
        told.append(
            {
                "name": step.layer,
                "first": first,
                "requests": len(requests),
                "writes": len(writes),
                "reads": len(reads),
                "layout": step.layout.to_json(),
            }
        )
    lines.append("AiM EOC")
    outputs = {value["name"]: values[value["name"]].astype(numpy_dtype(value["dtype"])) for value in about["outputs"]}
    return {
        f"{partition}.aim": ("\n".join(lines) + "\n").encode(),
        f"{partition}.json": _description(partition, artifact, told).encode(),
        f"{partition}.banks.bin": image.tobytes(),
        f"{partition}.registers.bin": registers.tobytes(),
        f"{partition}.machine.yaml": artifact.files[MACHINE_FILE],
        f"{partition}.inputs.npz": npz({**inputs, **given}),
        f"{partition}.outputs.npz": npz({**outputs, **found}),
    }


def _description(partition: str, artifact: Artifact, layers: list[dict[str, Any]]) -> str:
    """The JSON file: everything that is neither requests nor numbers."""
    about = artifact.metadata
    return json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "partition": partition,
            "machine": about["machine"],
            "trace": {"file": f"{partition}.aim", "layers": layers},
            "banks": {
                "file": f"{partition}.banks.bin",
                "shape": list(artifact.weights[BANKS].shape),
                "axes": ["channel", "bank", "row", "column", "lane"],
                "bits": 16,
            },
            "registers": {
                "file": f"{partition}.registers.bin",
                "shape": list(artifact.weights[REGISTERS].shape),
                "axes": ["register, from 0 on", "lane"],
                "bits": 16,
            },
            "inputs": about["inputs"],
            "outputs": about["outputs"],
            "steps": [
                {key: value for key, value in step.items() if key not in ("file", "layout", "bias", "take")}
                for step in about["steps"]
            ],
            "simulated": about["timing"],
            "replay": [
                f"the requests are those of {partition}.aim, in the text format of the public AiM simulator; a comment "
                "'# column N' says at which column the request after it starts, where that is not 0",
                f"banks hold {partition}.banks.bin before the first request, rows counted from 0, and "
                f"registers {partition}.registers.bin; with an offset to "
                "all rows the same holds at another place",
                "each W GPR of a layer writes the next row of <layer>@writes in the inputs, each R GPR reads the next "
                "row of <layer>@reads in the outputs",
                "accumulators are float32 and 16 bits where they are read; bit-equal sums need the order of additions "
                "that nestc.runtime.aim.simulate.multiply_accumulate states",
            ],
        },
        indent=1,
    )
