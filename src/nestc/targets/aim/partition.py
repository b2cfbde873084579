"""A partition becomes an artifact: request streams and banks, what the host does between them, modelled times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nestc.bundle.artifact import Artifact
from nestc.runtime.aim.device import BANKS, MACHINE_FILE, REGISTERS
from nestc.runtime.aim.encode import encode
from nestc.runtime.aim.machine import AimMachine, format_machine
from nestc.runtime.aim.trace import format_trace
from nestc.targets.aim.compiler import ElementLaunch, Launch, compile_layers
from nestc.targets.aim.gates import Part, read_parts
from nestc.targets.aim.group import Group, grouped
from nestc.targets.aim.regions import Product
from nestc.targets.aim.timed import timed
from nestc.targets.api import Partition
from nestc.tensor.text import kernel_text

Emit = Callable[[str, str, str], None]


def compile_partition(
    partition: Partition,
    machine: AimMachine,
    number: str = "bfloat16",
    emit: Emit | None = None,
    rounded: str | None = None,
) -> Artifact:
    """The artifact of kind ``aim``, which `runtime.aim.device` runs. Raises TargetError if the banks do not suffice.

    `emit` gets the levels tensor (a kernel a layer) and commands (the trace of a layer). ``rounded``: the format that
    float32 operands are rounded to, if they may be.
    """
    # Products with the same vectors are one launch, which comes where the first of them stands.
    parts = [(part, region.origin) for region in partition.regions for part in read_parts(region, rounded)]
    pairs = [(part, origin) for part, origin in parts if isinstance(part, Product)]
    groups = grouped([product for product, _ in pairs], [origin for _, origin in pairs])
    layers = [group.layer() for group in groups]
    launched = {group.members[0].name: index for index, group in enumerate(groups)}
    values = [part.layer for part, _ in parts if isinstance(part, Part) and part.layer is not None]
    program = compile_layers(layers, machine, number, elements=values)
    elements = {launch.layer.name: launch for launch in program.elements}

    # Bytes, and what they mean.
    files: dict[str, bytes] = {MACHINE_FILE: format_machine(machine).encode()}
    weights: dict[str, np.ndarray] = {
        BANKS: np.ascontiguousarray(program.memory).view(np.uint16),
        REGISTERS: np.ascontiguousarray(program.registers).view(np.uint16),
    }
    for index, launch in enumerate((*program.launches, *program.elements)):
        files[f"{index}.aim.bin"] = encode(launch.commands)
        if emit is not None:
            emit("tensor", f"{partition.name}_{launch.layer.name}", kernel_text(launch.kernel))
            emit("commands", f"{partition.name}_{launch.layer.name}", format_trace(launch.commands))
    constants: dict[str, str] = {}
    steps: list[dict[str, Any]] = []
    for part, _ in parts:
        if isinstance(part, Part) and part.layer is not None:
            launch = elements[part.layer.name]
            index = len(program.launches) + program.elements.index(launch)
            steps.append(_element_step(index, part, launch))
        elif isinstance(part, Product) and part.name in launched:
            index = launched[part.name]
            steps.append(_step(index, groups[index], program.launches[index], weights))
        for name, array in part.constants.items():
            constants[name] = f"host.{len(constants)}"
            weights[constants[name]] = np.ascontiguousarray(array).reshape(array.shape)
        steps += [{"kind": "host", **op.to_json()} for op in part.host]
    metadata = {
        "machine": machine.name,
        "inputs": _border(partition, partition.inputs),
        "outputs": _border(partition, partition.outputs),
        "rows": int(program.memory.shape[2]),
        "steps": steps,
        "constants": constants,
        "timing": timed(
            [(launch.layer.name, launch.commands, launch.layout) for launch in (*program.launches, *program.elements)],
            [op for part, _ in parts for op in part.host],
            machine,
        ),
    }
    return Artifact("aim", files, weights, metadata)


def _element_step(index: int, part: Part, launch: ElementLaunch) -> dict[str, Any]:
    """A launch on values, element by element, as JSON values."""
    return {
        "kind": "elements",
        "layer": launch.layer.name,
        "file": f"{index}.aim.bin",
        "sources": list(launch.layer.inputs),
        "outputs": list(launch.layer.outputs),
        "shape": list(part.shape),
        "layout": launch.layout.to_json(),
        "row": launch.row,
        "rows": launch.rows,
    }


def _step(index: int, group: Group, launch: Launch, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """A launch as JSON values; arrays that it needs are added to ``weights``."""
    first = group.members[0]

    def keep(key: str, array: np.ndarray | None) -> str | None:
        if array is None:
            return None
        weights[f"{index}.{key}"] = np.ascontiguousarray(array)
        return f"{index}.{key}"

    return {
        "kind": "launch",
        "layer": launch.layer.name,
        "file": f"{index}.aim.bin",
        "source": first.source,
        "outputs": [
            {
                "name": member.result,
                "shape": list(member.result_shape),
                "first": begin,
                "count": member.m,
                "order": keep(f"order.{number}", member.order),
            }
            for number, (member, begin) in enumerate(zip(group.members, group.first_outputs, strict=True))
        ],
        "mapping": launch.mapping.to_json(),
        "layout": launch.layout.to_json(),
        "bias": keep("bias", None if launch.layout.bias_inside else launch.layer.bias),
        "take": keep("take", first.take),
    }


def _border(partition: Partition, names: Sequence[str]) -> list[Mapping[str, Any]]:
    found = ((name, partition.types[name]) for name in names)
    return [{"name": name, "dtype": type_.dtype, "shape": list(type_.shape)} for name, type_ in found]
