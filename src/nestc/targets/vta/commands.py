"""What another VTA simulator needs to replay a partition: instructions, micro-ops, memory, inputs and outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nestc.bundle.artifact import Artifact
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.device import configuration, initial_memory, pack, unpack
from nestc.runtime.vta.encode import decode
from nestc.runtime.vta.simulate import simulate
from nestc.targets.emitted import npz
from nestc.targets.vta.memory import START

FORMAT = "nestc-vta-commands"
VERSION = 1
"""Raised when a reader of these files would have to change."""

SEED = 0
INSTRUCTION_BYTES, UOP_BYTES = 16, 4


def files(partition: str, artifact: Artifact) -> dict[str, bytes]:
    """``<partition>.insn.bin``, ``.uop.bin``, ``.dram.bin``, ``.json``, ``.inputs.npz`` and ``.outputs.npz``.

    Inputs are random (seed 0); the outputs are what the functional simulator computes from them.
    """
    about = artifact.metadata
    config = configuration(about)
    generator = np.random.default_rng(SEED)
    inputs = {value["name"]: generator.integers(-128, 128, value["shape"]).astype(np.int8) for value in about["inputs"]}
    memory = _filled(artifact, inputs, config)
    image = memory[START:].tobytes()
    for stream in _streams(about):
        simulate(decode(artifact.files[stream["insn"]], config), config, memory)
    outputs = {value["name"]: unpack(memory, value, config) for value in about["outputs"]}
    return {
        f"{partition}.insn.bin": b"".join(artifact.files[stream["insn"]] for stream in _streams(about)),
        f"{partition}.uop.bin": b"".join(artifact.files[each["file"]] for each in about["uops"]),
        f"{partition}.dram.bin": image,
        f"{partition}.json": _description(partition, artifact, config).encode(),
        f"{partition}.inputs.npz": _npz(inputs, about["inputs"], np.frombuffer(bytes(START) + image, np.uint8)),
        f"{partition}.outputs.npz": _npz(outputs, about["outputs"], memory),
    }


def _filled(artifact: Artifact, inputs: Mapping[str, np.ndarray], config: VtaConfig) -> np.ndarray:
    """DRAM from address 0 on before the first instruction: constants, micro-ops, instructions, inputs, and zeros."""
    memory = initial_memory(artifact)
    for stream in _streams(artifact.metadata):
        data = np.frombuffer(artifact.files[stream["insn"]], np.uint8)
        memory[stream["address"] : stream["address"] + data.size] = data
    for value in artifact.metadata["inputs"]:
        pack(memory, value, inputs[value["name"]], config)
    return memory


def _streams(about: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every instruction stream, in an order in which they may run one after another."""
    for launch in about["launches"]:
        yield from launch


def _description(partition: str, artifact: Artifact, config: VtaConfig) -> str:
    """The JSON file: everything that is not bytes."""
    about = artifact.metadata
    inp, wgt, acc = [config.batch, config.block], [config.block, config.block], [config.batch, config.block]
    layout = f"[N/{config.batch}][C/{config.block}][H][W][{config.batch}][{config.block}]"
    uops = about["uops"]
    streams = list(_streams(about))
    constants = [_constant(each, artifact.weights[each["name"]]) for each in about["constants"]]

    def border(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
        extra = {"dtype": "int8", "element": "inp"}
        size = config.inp_bytes
        return [
            {**value, **extra, "layout": layout + _unrolled(value), "elements": value["bytes"] // size}
            for value in values
        ]

    return json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "partition": partition,
            "preset": about["preset"],
            "config": about["config"],
            "clock_hz": about["clock_hz"],
            "bus_bits": about["bus_bits"],
            "elements": {
                "uop": {"bytes": UOP_BYTES, "dtype": "uint32", "shape": []},
                "inp": {"bytes": config.inp_bytes, "dtype": "int8", "shape": inp},
                "wgt": {"bytes": config.wgt_bytes, "dtype": "int8", "shape": wgt},
                "acc": {"bytes": config.acc_bytes, "dtype": "int32", "shape": acc},
                "out": {"bytes": config.inp_bytes, "dtype": "int8", "shape": inp},
            },
            "dram": {
                "file": f"{partition}.dram.bin",
                "address": START,
                "bytes": about["dram_bytes"] - START,
                "holds": "weights, biases, constants, micro-ops, instructions and the random inputs; zeros elsewhere",
            },
            "instructions": {
                "file": f"{partition}.insn.bin",
                "bytes": INSTRUCTION_BYTES,
                "count": sum(stream["count"] for stream in streams),
                "launches": [
                    [{"address": stream["address"], "count": stream["count"]} for stream in launch]
                    for launch in about["launches"]
                ],
            },
            "uops": {
                "file": f"{partition}.uop.bin",
                "address": uops[0]["address"] if uops else START,
                "count": sum(len(artifact.files[each["file"]]) for each in uops) // UOP_BYTES,
            },
            "inputs": border(about["inputs"]),
            "outputs": border(about["outputs"]),
            "weights": [each for each in constants if each["role"] == "weights"],
            "biases": [each for each in constants if each["role"] == "bias"],
            "constants": [each for each in constants if each["role"] not in ("weights", "bias")],
            "simulated": about["timing"],
            "replay": [
                f"addresses are in bytes; copy {partition}.dram.bin to address {START}",
                "run the streams of each launch, one launch after the other, from their addresses; the streams of one "
                "launch are one a device, on the same memory, and may run in any order",
                "then the bytes of every output equal those of <name>@dram in the outputs",
                "in the arrays of .inputs.npz and .outputs.npz, <name> is the ONNX tensor and <name>@dram its bytes in "
                "memory; lanes beyond the last channel or batch are undefined",
            ],
        },
        indent=1,
    )


def _unrolled(value: Mapping[str, Any]) -> str:
    """What is said of an input whose rows are unrolled."""
    if "columns" not in value:
        return ""
    channels = value["shape"][1]
    return (
        f" of the image unrolled along its rows: channel k * {channels} + c at column x is channel c of the image at"
        " column x * columns.stride + columns.offsets[k], or 0 outside of it"
    )


def _constant(about: Mapping[str, Any], array: np.ndarray) -> dict[str, Any]:
    """A constant, the memory that it is loaded to, and how it lies."""
    element = "acc" if array.dtype == np.int32 else "inp" if about["role"] == "unit" else "wgt"
    layouts = {
        (
            "weights",
            "wgt",
        ): "[pairs of output and input block, sorted][taps, row by row][out][in]; one is kept where all"
        " pairs or all taps are alike",
        ("bias", "wgt"): "[output block][digit][out][in]: multiplied with the constant vta/unit, digits add up",
        ("bias", "acc"): "[output block][batch][out]",
        ("shift", "acc"): "[output block][batch][out]: right shifts",
    }
    return {
        **about,
        "dtype": array.dtype.name,
        "element": element,
        "elements": array.shape[0],
        "shape": list(array.shape),
        "layout": layouts.get((about["role"], element), "one element"),
    }


def _npz(arrays: Mapping[str, np.ndarray], values: list[dict[str, Any]], memory: np.ndarray) -> bytes:
    """An .npz of each value as ONNX has it, and as its bytes in memory."""
    both: dict[str, np.ndarray] = {}
    for value in values:
        both[value["name"]] = arrays[value["name"]]
        both[f"{value['name']}@dram"] = memory[value["address"] : value["address"] + value["bytes"]]
    return npz(both)
