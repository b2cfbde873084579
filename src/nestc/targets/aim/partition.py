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
from nestc.targets.aim.compiler import compile_layers
from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.regions import Product, read
from nestc.targets.aim.timed import timed
from nestc.targets.api import Partition
from nestc.tensor.text import kernel_text

Emit = Callable[[str, str, str], None]


def compile_partition(
    partition: Partition, machine: AimMachine, number: str = "bfloat16", emit: Emit | None = None
) -> Artifact:
    """The artifact of kind ``aim``, which `runtime.aim.device` runs. Raises TargetError if the banks do not suffice.

    `emit` gets the levels tensor (a kernel a layer) and commands (the trace of a layer).
    """
    products = [read(region) for region in partition.regions]
    layers = [_layer(product, region.origin) for product, region in zip(products, partition.regions, strict=True)]
    program = compile_layers(layers, machine, number)
    files: dict[str, bytes] = {MACHINE_FILE: format_machine(machine).encode()}
    weights: dict[str, np.ndarray] = {
        BANKS: np.ascontiguousarray(program.memory).view(np.uint16),
        REGISTERS: np.ascontiguousarray(program.registers).view(np.uint16),
    }
    constants: dict[str, str] = {}
    steps: list[dict[str, Any]] = []
    for index, (product, layer, launch) in enumerate(zip(products, layers, program.launches, strict=True)):
        file = f"{index}.aim.bin"
        files[file] = encode(launch.commands)
        arrays = {
            "bias": None if launch.layout.bias_inside else layer.bias,
            "take": product.take,
            "order": product.order,
        }
        keys = {key: f"{index}.{key}" for key, array in arrays.items() if array is not None}
        weights |= {keys[key]: array for key, array in arrays.items() if array is not None}
        steps.append(
            {
                "kind": "launch",
                "layer": layer.name,
                "file": file,
                "source": product.source,
                "output": product.result,
                "shape": list(product.result_shape),
                "mapping": launch.mapping.to_json(),
                "layout": launch.layout.to_json(),
                **keys,
            }
        )
        if emit is not None:
            emit("tensor", f"{partition.name}_{layer.name}", kernel_text(launch.kernel))
            emit("commands", f"{partition.name}_{layer.name}", format_trace(launch.commands))
        for name, array in product.constants.items():
            constants[name] = f"{index}.host.{len(constants)}"
            weights[constants[name]] = np.ascontiguousarray(array).reshape(array.shape)
        steps += [{"kind": "host", **op.to_json()} for op in product.host]
    metadata = {
        "machine": machine.name,
        "inputs": _border(partition, partition.inputs),
        "outputs": _border(partition, partition.outputs),
        "rows": int(program.memory.shape[2]),
        "steps": steps,
        "constants": constants,
        "timing": timed(
            [
                (layer.name, launch.commands, launch.layout)
                for layer, launch in zip(layers, program.launches, strict=True)
            ],
            [op for product in products for op in product.host],
            machine,
        ),
    }
    return Artifact("aim", files, weights, metadata)


def _layer(product: Product, origin: Sequence[str]) -> MatrixVector:
    return MatrixVector(
        name=product.name,
        weights=product.weights(),
        bias=product.bias,
        activation=product.activation,
        inputs=product.source,
        output=product.result,
        vectors=product.rows,
        origin=tuple(origin),
    )


def _border(partition: Partition, names: Sequence[str]) -> list[Mapping[str, Any]]:
    found = ((name, partition.types[name]) for name in names)
    return [{"name": name, "dtype": type_.dtype, "shape": list(type_.shape)} for name, type_ in found]
