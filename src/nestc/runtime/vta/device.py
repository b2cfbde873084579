"""The device "vta": runs artifacts of kind ``vta`` on the functional machine; its times are modelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nestc.bundle.artifact import Artifact, Elapsed
from nestc.errors import BundleError, TargetError
from nestc.runtime.vta import layout
from nestc.runtime.vta.config import VtaConfig, from_json
from nestc.runtime.vta.encode import decode
from nestc.runtime.vta.isa import Instruction
from nestc.runtime.vta.simulate import Machine, legal_order

KIND = "vta"

_ADDRESS_LIMIT = 1 << 32
"""Addresses are physical addresses of 32 bits (tvm-vta ``driver.h``)."""


class VtaDevice:
    """VTA accelerators, simulated."""

    name = "vta"

    def load(self, artifact: Artifact, threads: int) -> VtaProgram:
        """Decode streams and lay out the memory; `threads` is not used. Raises BundleError if something is amiss."""
        return VtaProgram(artifact)


class VtaProgram:
    """A loaded partition. May be called from several threads: each call has a memory of its own."""

    def __init__(self, artifact: Artifact) -> None:
        try:
            metadata = artifact.metadata
            self._config = configuration(metadata)
            self._image: np.ndarray | None = initial_memory(artifact)
            self._launches = [[_stream(artifact, each, self._config) for each in one] for one in metadata["launches"]]
            self.inputs, self.outputs = (
                [_checked(item, metadata, self._config) for item in metadata[side]] for side in ("inputs", "outputs")
            )
            self.seconds = _seconds(metadata, self._launches, self._config)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"the metadata of a VTA partition is not complete: {error!r}") from error
        except TargetError as error:
            raise BundleError(f"a VTA partition cannot be run: {error}") from error

    def __call__(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Elapsed]:
        if self._image is None:
            raise TargetError("this executable is closed")
        memory = self._image.copy()
        for item, array in zip(self.inputs, inputs, strict=True):
            if array.dtype != np.int8 or array.shape != tuple(item["shape"]):
                wanted, found = list(item["shape"]), list(array.shape)
                raise TargetError(
                    f"code for VTA was compiled for {item['name']!r} as int8{wanted}, not {array.dtype}{found}"
                )
            pack(memory, item, array, self._config)
        for launch in self._launches:
            # The devices of a launch do not touch what another one writes, so they may as well run one after the other.
            for stream in launch:
                machine = Machine(self._config, memory)
                for number in stream.order:
                    machine.execute(number, stream.instructions[number])
        results: list[np.ndarray] = []
        for item, given in zip(self.outputs, outputs, strict=True):
            result = unpack(memory, item, self._config)
            if given is not None:
                given[...] = result
            results.append(result if given is None else given)
        return results, Elapsed(self.seconds, "modelled")

    def close(self) -> None:
        """Let go of the memory; later calls raise TargetError."""
        self._image = None


@dataclass(frozen=True, eq=False)
class _Stream:
    """Instructions of one device in one launch, and an order in which its engines may execute them."""

    instructions: Sequence[Instruction]
    order: Sequence[int]


def configuration(metadata: Mapping[str, Any]) -> VtaConfig:
    """The machine that an artifact was compiled for. Raises TargetError, or KeyError if something is missing."""
    config = from_json(metadata["config"], metadata["preset"])
    return replace(config, clock_hz=metadata["clock_hz"], bus_bits=metadata["bus_bits"])


def initial_memory(artifact: Artifact) -> np.ndarray:
    """DRAM before the first instruction, without inputs: constants and micro-ops in it, zeros elsewhere; flat uint8."""
    metadata = artifact.metadata
    size = metadata["dram_bytes"]
    if not 0 < size <= _ADDRESS_LIMIT:
        raise TargetError(f"a memory of {size} bytes cannot be addressed with 32 bits")
    memory = np.zeros(size, np.uint8)
    for constant in metadata["constants"]:
        array = np.ascontiguousarray(artifact.weights[constant["name"]])
        _put(memory, constant["name"], constant["address"], array.reshape(-1).view(np.uint8))
    for image in metadata["uops"]:
        _put(memory, image["file"], image["address"], np.frombuffer(artifact.files[image["file"]], np.uint8))
    return memory


def pack(memory: np.ndarray, item: Mapping[str, Any], array: np.ndarray, config: VtaConfig) -> None:
    """Write the value `item` (an entry of ``inputs``) into DRAM; `array` is int8 of the ONNX shape."""
    columns = layout.columns_from_json(item.get("columns"))
    array = array if columns is None else columns.apply(array)
    _put(memory, item["name"], item["address"], layout.pack(array, item["map"], config, bool(item.get("rows"))))


def unpack(memory: np.ndarray, item: Mapping[str, Any], config: VtaConfig) -> np.ndarray:
    """Read the value `item` (an entry of ``inputs`` or ``outputs``) from DRAM: a new int8 array of the ONNX shape."""
    size = layout.map_bytes(item["map"], config)
    data = memory[item["address"] : item["address"] + size]
    return layout.unpack(data, item["map"], item["shape"], config, bool(item.get("rows")))


def _put(memory: np.ndarray, name: str, address: int, data: np.ndarray) -> None:
    _check_place(memory.size, name, address, data.size)
    memory[address : address + data.size] = data


def _check_place(total: int, name: str, address: int, size: int) -> None:
    if not 0 <= address <= total - size:
        raise TargetError(f"{name!r} ({size} bytes at {address:#x}) does not lie in a memory of {total:#x} bytes")


def _checked(item: Mapping[str, Any], metadata: Mapping[str, Any], config: VtaConfig) -> Mapping[str, Any]:
    """`item`, an input or output, if its map holds its shape and lies in memory."""
    size = layout.map_bytes(item["map"], config)
    if item["bytes"] != size:
        raise TargetError(f"{item['name']!r} has {item['bytes']} bytes, but a map of {list(item['map'])} takes {size}")
    columns = layout.columns_from_json(item.get("columns"))
    layout.channels_first(item["shape"] if columns is None else columns.shape(item["shape"]), item["map"])
    _check_place(metadata["dram_bytes"], item["name"], item["address"], size)
    return item


def _stream(artifact: Artifact, about: Mapping[str, Any], config: VtaConfig) -> _Stream:
    instructions = decode(artifact.files[about["insn"]], config)
    if len(instructions) != about["count"]:
        raise TargetError(f"{about['insn']} holds {len(instructions)} instructions, not {about['count']}")
    return _Stream(instructions, legal_order(instructions))


def _seconds(metadata: Mapping[str, Any], launches: Sequence[Sequence[_Stream]], config: VtaConfig) -> float:
    """Modelled time: the compiler's, or else of each launch that of its slowest device."""
    timing: Mapping[str, Any] = metadata.get("timing") or {}
    if "seconds" in timing:
        return float(timing["seconds"])
    from nestc.runtime.vta.timing import simulate_timing_many  # only for artifacts not timed when compiled

    total = 0
    for launch in launches:
        reports = simulate_timing_many([stream.instructions for stream in launch], config)
        total += max((report.cycles for report in reports), default=0)
    return total / config.clock_hz
