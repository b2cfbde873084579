"""Layers become streams of requests and an image of the banks: AiM's pipeline, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from nestc.errors import TargetError
from nestc.runtime.aim.commands import Command, Eoc, ReadGpr, WriteGpr, check
from nestc.runtime.aim.elements import ElementLayout
from nestc.runtime.aim.layout import Array, Layout
from nestc.runtime.aim.machine import AimMachine
from nestc.runtime.aim.simulate import NUMBERS
from nestc.targets.aim import elementwise
from nestc.targets.aim.elementwise import ElementPlan, Elementwise
from nestc.targets.aim.emit import Addresses, emit
from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.lower import bias_registers, lower
from nestc.targets.aim.mapping import Mapping, Plan, plan, write_weights
from nestc.tensor.ir import Kernel
from nestc.tensor.verify import verify

Choose = Callable[[MatrixVector, AimMachine, str], Mapping]
"""Which mapping a layer gets on a machine, in a 16-bit format."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One layer on the machine; it may be executed any number of times. Equal layers on other values share the rest.

    ``commands`` end with EOC; the host writes ``layout.pack(x)`` and reads what ``layout.unpack`` takes. ``row``: first
    of the layer's ``rows`` of every bank.
    """

    layer: MatrixVector
    mapping: Mapping
    layout: Layout
    kernel: Kernel
    commands: tuple[Command, ...]
    row: int
    rows: int


@dataclass(frozen=True, eq=False)
class ElementLaunch:
    """Sums and products of values on the machine; the host writes ``layout.pack(inputs)`` and reads what
    ``layout.unpack`` takes. ``row``: first of the layer's ``rows`` of every bank, which it may write to."""

    layer: Elementwise
    layout: ElementLayout
    kernel: Kernel
    commands: tuple[Command, ...]
    row: int
    rows: int


@dataclass(frozen=True, eq=False)
class Program:
    """Launches that share one memory; ``elements`` are those on values, element by element.

    ``memory``: (channels, banks, rows, columns, lanes), 16 bits, what banks hold from row 0 on. ``registers``: (n,
    lanes), 16 bits, constants in registers 0 and on. Both are written once.
    """

    launches: tuple[Launch, ...]
    memory: Array
    registers: Array
    elements: tuple[ElementLaunch, ...] = ()


def compile_layers(
    layers: Sequence[MatrixVector],
    machine: AimMachine,
    number: str = "bfloat16",
    choose: Choose | None = None,
    elements: Sequence[Elementwise] = (),
) -> Program:
    """Map, lower and emit layers; rows are given out in order. Layers with the same weights share their rows.

    Args:
        layers: in any order; each is a launch.
        machine: of the family ``aim``.
        number: ``bfloat16`` or ``float16``.
        choose: gives a layer its mapping; the search if not given.
        elements: sums and products of values; those without constants work in one row that they share.

    Raises:
        TargetError: weights do not fit in the banks, or constants and vectors in the registers.
    """
    from nestc.targets.aim.search import best

    choose = choose or best
    mappings = [_safe(choose(layer, machine, number), layer, number) for layer in layers]
    plans = [plan(layer, each, machine, number) for layer, each in zip(layers, mappings, strict=True)]
    homes, registers = _constants(layers, plans, machine, number)
    vectors = max((found.layout.inputs for found in plans), default=0) + machine.channels
    vectors = max([vectors, *(_least_registers(layer, machine) for layer in elements)])
    if len(registers) > machine.gprs - vectors:
        # Biases of all layers do not fit in registers beside a vector and its results: the host adds them.
        plans = [plan(layer, found.mapping, machine, number, bias_inside=False) for layer, found in zip(layers, plans)]
        homes, registers = _constants(layers, plans, machine, number)
    bases, rows = _rows(layers, plans)
    values = [elementwise.plan(layer, machine, number, machine.gprs - len(registers)) for layer in elements]
    value_rows, rows = _value_rows(elements, values, rows)
    if rows > machine.rows:
        raise TargetError(
            f"the weights take {rows} rows of every bank, and {machine.name} has {machine.rows}: place fewer layers "
            "there (a plan, or placement by cost), or give it more channels or rows"
        )
    memory = np.zeros((machine.channels, machine.banks, max(rows, 1), machine.columns, machine.lanes), NUMBERS[number])
    launches: list[Launch] = []
    written: set[int] = set()
    known: dict[tuple[int, int, Plan], Launch] = {}
    for layer, found, home, base in zip(layers, plans, homes, bases, strict=True):
        if base not in written:
            write_weights(memory, base, layer, found)
            written.add(base)
        same = known.get((base, home, found))
        if same is None:
            same = _launch(layer, found, Addresses(base, len(registers), home), machine)
            known[base, home, found] = same
        launches.append(replace(same, layer=layer))
    made: list[ElementLaunch] = []
    for layer, found, base in zip(elements, values, value_rows, strict=True):
        elementwise.write_constants(memory, base, layer, found, machine)
        kernel = elementwise.lower(layer, found, machine)
        commands = _commands(kernel, Addresses(base, len(registers), 0), machine)[0]
        made.append(ElementLaunch(layer, found.layout, kernel, commands, base, found.rows))
    return Program(tuple(launches), memory, registers, tuple(made))


def _commands(kernel: Kernel, addresses: Addresses, machine: AimMachine) -> tuple[tuple[Command, ...], list[int]]:
    """The requests of a kernel that has been proven to be valid, as they are; and the lines that the host writes."""
    verify(kernel)
    emitted = emit(kernel, addresses, machine)
    commands = (*emitted.commands, Eoc())
    check(commands, machine)
    return commands, emitted.writes


def _launch(layer: MatrixVector, found: Plan, addresses: Addresses, machine: AimMachine) -> Launch:
    """A layer's kernel and requests, each proven to be valid."""
    kernel = lower(layer, found, machine)
    commands, writes = _commands(kernel, addresses, machine)
    layout = replace(found.layout, writes=tuple(writes))
    return Launch(layer, found.mapping, layout, kernel, commands, addresses.row, found.rows)


def without_host(commands: Sequence[Command]) -> list[Command]:
    """A stream without the host's accesses to registers, whose ticks compare with traces that have none."""
    return [command for command in commands if not isinstance(command, (WriteGpr, ReadGpr))]


def _safe(mapping: Mapping, layer: MatrixVector, number: str) -> Mapping:
    """`mapping` without openers if products of two weights, which EWMUL writes, might overflow."""
    if not mapping.opener:
        return mapping
    largest = float(np.abs(layer.weights).max(initial=0))
    return mapping if largest**2 < float(ml_dtypes.finfo(NUMBERS[number]).max) else replace(mapping, opener=False)


def _rows(layers: Sequence[MatrixVector], plans: Sequence[Plan]) -> tuple[list[int], int]:
    """First row of every layer, and rows of all; layers with the same weights in the same places share them."""
    homes: dict[tuple[object, ...], int] = {}
    found: list[int] = []
    end = 0
    for layer, each in zip(layers, plans, strict=True):
        weights = np.ascontiguousarray(layer.weights)
        digest = hashlib.sha256(weights.view(np.uint8).data).digest()
        key = (digest, weights.dtype.str, weights.shape, each.mapping)
        if key not in homes:
            homes[key] = end
            end += each.rows
        found.append(homes[key])
    return found, end


def _least_registers(layer: Elementwise, machine: AimMachine) -> int:
    """Registers that a layer on values should find: all of it, or a full column of every bank group."""
    every = min(-(-layer.elements // machine.lanes), machine.channels * machine.bank_groups)
    return every * (1 + max(action.slot for action in elementwise.actions(layer)))


def _value_rows(elements: Sequence[Elementwise], plans: Sequence[ElementPlan], end: int) -> tuple[list[int], int]:
    """First row of every layer on values, from `end` on, and the end of all; equal constants are there once."""
    homes: dict[tuple[object, ...], int] = {}
    found: list[int] = []
    for layer, each in zip(elements, plans, strict=True):
        digests = [
            hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest() for values in layer.constants.values()
        ]
        shape = (each.layout.chunks, each.layout.registers, each.groups, each.scratch) if digests else ()
        key = (*digests, *shape)
        if each.rows and key not in homes:
            homes[key] = end
            end += each.rows
        found.append(homes[key] if each.rows else 0)
    return found, end


def _constants(
    layers: Sequence[MatrixVector], plans: Sequence[Plan], machine: AimMachine, number: str
) -> tuple[list[int], Array]:
    """First register of every layer's constants, and all of them; layers with the same share them."""
    homes: dict[bytes, int] = {}
    found: list[int] = []
    parts: list[Array] = []
    end = 0
    for layer, each in zip(layers, plans, strict=True):
        narrow = bias_registers(layer, each, machine).astype(NUMBERS[number])
        key = narrow.tobytes()
        if key not in homes:
            homes[key] = end
            parts.append(narrow)
            end += len(narrow)
        found.append(homes[key])
    registers = np.concatenate(parts) if parts else np.zeros((0, machine.lanes), NUMBERS[number])
    return found, registers
