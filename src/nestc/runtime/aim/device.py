"""The device "aim": runs artifacts of kind ``aim`` on the functional memory; its times are modelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from nestc.bundle.artifact import Artifact, Elapsed
from nestc.bundle.dtypes import numpy_dtype
from nestc.errors import BundleError, TargetError
from nestc.runtime.aim import elements, host, layout
from nestc.runtime.aim.commands import (
    Command,
    CopyBkGb,
    CopyGbBk,
    EwMul,
    MacAbk,
    MacSbk,
    RdSbk,
    ReadGpr,
    ReadMem,
    WrAbk,
    WriteGpr,
    WriteMem,
    WrSbk,
    check,
)
from nestc.runtime.aim.elements import ElementLayout
from nestc.runtime.aim.encode import decode
from nestc.runtime.aim.host import HostOp
from nestc.runtime.aim.layout import Layout
from nestc.runtime.aim.machine import AimMachine, parse
from nestc.runtime.aim.simulate import NUMBERS, Machine

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

MACHINE_FILE = "machine.yaml"
BANKS = "banks"
"""The constant that holds the banks' rows: 16-bit patterns (channels, banks, rows, columns, lanes)."""

REGISTERS = "registers"
"""The constant that holds what registers 0 and on hold: 16-bit patterns (n, lanes)."""

_WITH_ROW = (WrSbk, WrAbk, RdSbk, CopyBkGb, CopyGbBk, MacSbk, MacAbk, EwMul, WriteMem, ReadMem)
_WRITING = (WrSbk, WrAbk, CopyGbBk, EwMul, WriteMem)
"""Requests that write to banks."""


class AimDevice:
    """A memory that computes, simulated."""

    name = "aim"

    def load(self, artifact: Artifact, threads: int) -> AimProgram:
        """Decode streams and check them; `threads` is not used. Raises BundleError if something is amiss."""
        return AimProgram(artifact)


@dataclass(frozen=True, eq=False)
class Output:
    """``count`` results of each vector, from the ``first`` on, as a value of ``shape``.

    ``order``: which of them, vector by vector, stands at each place of the flat value; None: in order.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    count: int
    order: Array | None


@dataclass(frozen=True, eq=False)
class Launch:
    """A matrix times vectors: requests, and what the host writes before and reads after (``layout``).

    ``bias`` is added by the host if the layout says so. ``take``: where in the flat source the vectors' elements are
    (int64 (vectors, k), -1: a zero); None: all of it in order.
    """

    layer: str
    source: str
    outputs: tuple[Output, ...]
    commands: Sequence[Command]
    layout: Layout
    bias: Array | None
    take: Array | None

    @property
    def writes(self) -> frozenset[type[Command]]:
        """Kinds of its requests that write to banks."""
        return frozenset(type(command) for command in self.commands if isinstance(command, _WRITING))

    def vectors(self, source: Array) -> Array:
        """The vectors, (vectors, k) of the 16-bit format, of a source of any float type."""
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(source).reshape(-1).astype(NUMBERS[self.layout.number])
        if self.take is None:
            return flat.reshape(self.layout.vectors, self.layout.k)
        return np.append(flat, np.zeros(1, flat.dtype))[self.take]

    def execute(self, writes: Array, machine: AimMachine, banks: Array, registers: Array) -> list[Array]:
        """What the host reads, (lanes,) each, after it wrote ``writes``; ``banks`` may be written to."""
        number = NUMBERS[self.layout.number]
        memory = Machine(machine, self.layout.number, memory=banks.view(number))
        memory.gpr[: len(registers)] = registers.view(number)
        return memory.run(self.commands, list(writes))

    def results(self, reads: Sequence[Array]) -> dict[str, Array]:
        """The outputs, float32, from the registers that were read."""
        results = self.layout.unpack(reads, self.bias)
        found: dict[str, Array] = {}
        for output in self.outputs:
            flat = results[:, output.first : output.first + output.count].reshape(-1)
            found[output.name] = (flat if output.order is None else flat[output.order]).reshape(output.shape)
        return found


@dataclass(frozen=True, eq=False)
class ElementLaunch:
    """Sums and products of values, which are broadcast to ``shape``, element by element; results have that shape.

    ``rows`` rows of the banks from the ``row``-th on are worked in: each call has its own copy. ``commands`` count
    them from there.
    """

    layer: str
    sources: tuple[str, ...]
    outputs: tuple[str, ...]
    shape: tuple[int, ...]
    commands: Sequence[Command]
    layout: ElementLayout
    row: int
    rows: int

    def pack(self, sources: Sequence[Array]) -> Array:
        """What the host writes, of sources of any float type."""
        return self.layout.pack([np.broadcast_to(array, self.shape) for array in sources])

    def execute(self, writes: Array, machine: AimMachine, banks: Array, registers: Array) -> list[Array]:
        """What the host reads, (lanes,) each, after it wrote ``writes``; ``banks`` stay as they are."""
        number = NUMBERS[self.layout.number]
        own = banks[:, :, self.row : self.row + max(self.rows, 1)].copy()
        return Machine(machine, self.layout.number, memory=own.view(number)).run(self.commands, list(writes))

    def results(self, reads: Sequence[Array]) -> dict[str, Array]:
        """The outputs, float32, from the registers that were read."""
        found = self.layout.unpack(reads)
        return {name: values.reshape(self.shape) for name, values in zip(self.outputs, found, strict=True)}


Step: TypeAlias = Launch | ElementLaunch | HostOp
Execute: TypeAlias = Callable[["Launch | ElementLaunch", Array], list[Array]]


class AimProgram:
    """A loaded partition. May be called from several threads: what a call changes is its own."""

    def __init__(self, artifact: Artifact) -> None:
        try:
            about = artifact.metadata
            self.machine = machine_of(artifact)
            self._steps = steps(artifact, self.machine)
            written = frozenset[type[Command]]().union(
                *(each.writes for each in self._steps if isinstance(each, Launch))
            )
            self._banks: Array | None = artifact.weights[BANKS]
            if written:
                self._banks = self._banks.copy()  # it may be mapped from the bundle
            # An EWMUL of ours only opens a row: what it writes is the same each time, and nothing reads it.
            self._private = bool(written - {EwMul})
            self._registers = artifact.weights[REGISTERS]
            self.inputs, self.outputs = (tuple(_border(each) for each in about[side]) for side in ("inputs", "outputs"))
            self._constants = {name: artifact.weights[key] for name, key in about["constants"].items()}
            self.seconds = float(about["timing"]["seconds"])
            self._rehearse()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError, MemoryError) as error:
            raise BundleError(f"the metadata of an AiM partition is not complete: {error!r}") from error
        except TargetError as error:
            raise BundleError(f"an AiM partition cannot be run: {error}") from error

    def __call__(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Elapsed]:
        if self._banks is None:
            raise TargetError("this executable is closed")
        banks = self._banks.copy() if self._private else self._banks
        values: dict[str, Array] = dict(self._constants)
        for (name, dtype, shape), array in zip(self.inputs, inputs, strict=True):
            if array.dtype != numpy_dtype(dtype) or array.shape != shape:
                raise TargetError(
                    f"code for AiM was compiled for {name!r} as {dtype}{list(shape)}, not {array.dtype}"
                    f"{list(array.shape)}"
                )
            values[name] = array
        found = self._results(values, lambda step, w: step.execute(w, self.machine, banks, self._registers))
        results: list[np.ndarray] = []
        for result, given in zip(found, outputs, strict=True):
            if given is not None:
                given[...] = result
            results.append(result if given is None else given)
        return results, Elapsed(self.seconds, "modelled")

    def _results(self, values: dict[str, Array], execute: Execute) -> list[Array]:
        """The outputs, of values by name; ``execute`` gives what the host reads, of what it writes."""
        for step in self._steps:
            if isinstance(step, HostOp):
                values[step.output] = host.evaluate(step, [values[name] if name else None for name in step.inputs])
                continue
            if isinstance(step, Launch):
                writes = step.layout.pack(step.vectors(values[step.source]))
            else:
                writes = step.pack([values[name] for name in step.sources])
            values |= step.results(execute(step, writes))
        with np.errstate(over="ignore"):
            return [values[name].astype(numpy_dtype(dtype)).reshape(shape) for name, dtype, shape in self.outputs]

    def _rehearse(self) -> None:
        """See at once, not at the first call, that names, shapes and sizes fit each other: all of it on zeros, and
        without the memory. Raises what a call would."""
        machine, banks, registers = self.machine, self._banks, self._registers
        if banks is None or banks.dtype != np.uint16 or registers.dtype != np.uint16:
            raise ValueError("banks and registers are no patterns of 16 bits")
        if (*banks.shape[:2], *banks.shape[3:]) != (machine.channels, machine.banks, machine.columns, machine.lanes):
            raise ValueError(f"banks have the shape {list(banks.shape)}, which is not that of {machine.name}")
        if registers.shape[1:] != (machine.lanes,) or len(registers) > machine.gprs:
            raise ValueError(f"registers have the shape {list(registers.shape)}")

        def nothing(step: Launch | ElementLaunch, writes: Array) -> list[Array]:
            last = max((c.row for c in step.commands if isinstance(c, _WITH_ROW)), default=0)
            first = step.row if isinstance(step, ElementLaunch) else 0
            if first < 0 or first + last >= banks.shape[2]:
                raise ValueError(f"layer {step.layer!r} uses row {first + last}, and there are {banks.shape[2]}")
            if len(writes) != sum(isinstance(command, WriteGpr) for command in step.commands):
                raise ValueError(f"layer {step.layer!r} has {len(writes)} registers to write")
            count = sum(isinstance(command, ReadGpr) for command in step.commands)
            return [np.zeros(machine.lanes, NUMBERS[step.layout.number])] * count

        values = dict(self._constants)
        values |= {name: np.zeros(shape, numpy_dtype(dtype)) for name, dtype, shape in self.inputs}
        self._results(values, nothing)

    def close(self) -> None:
        """Let go of the banks; later calls raise TargetError."""
        self._banks = None
        self._steps = ()


def machine_of(artifact: Artifact) -> AimMachine:
    """The machine that an artifact was compiled for. Raises TargetError, or KeyError if something is missing."""
    return parse(artifact.files[MACHINE_FILE].decode(), artifact.metadata["machine"])


def steps(artifact: Artifact, machine: AimMachine) -> tuple[Step, ...]:
    """What a partition does, in order. Raises BundleError or TargetError if it cannot be done."""
    return tuple(_step(about, artifact, machine) for about in artifact.metadata["steps"])


def _step(about: Mapping[str, Any], artifact: Artifact, machine: AimMachine) -> Step:
    if about["kind"] == "host":
        return host.from_json(about)
    if about["kind"] == "elements":
        return _element_launch(about, artifact, machine)
    return _launch(about, artifact, machine)


def _element_launch(about: Mapping[str, Any], artifact: Artifact, machine: AimMachine) -> ElementLaunch:
    commands = decode(artifact.files[about["file"]])
    check(commands, machine)
    row, rows = int(about["row"]), int(about["rows"])
    made = ElementLaunch(
        layer=about["layer"],
        sources=tuple(about["sources"]),
        outputs=tuple(about["outputs"]),
        shape=tuple(about["shape"]),
        commands=[_shifted(command, row, rows) for command in commands],
        layout=elements.from_json(about["layout"]),
        row=row,
        rows=rows,
    )
    wanted = made.layout.chunks * made.layout.registers
    _require_moves(made.layer, commands, wanted * len(made.layout.writes), wanted * len(made.layout.reads))
    named = len(made.outputs) == len(made.layout.reads) and set(made.layout.writes) == set(range(len(made.sources)))
    if not named or math.prod(made.shape) != made.layout.elements or made.layout.lanes != machine.lanes:
        raise BundleError(f"layer {made.layer!r} of an AiM partition has other values than its layout")
    return made


def _shifted(command: Command, row: int, rows: int) -> Command:
    """A request with its row counted from `row`. Raises BundleError if that is not among `rows`."""
    if not isinstance(command, _WITH_ROW):
        return command
    if not 0 <= command.row - row < rows:
        raise BundleError(f"{command.name} of an AiM partition is for row {command.row}, of rows {row} to {row + rows}")
    return replace(command, row=command.row - row)


def _require_moves(layer: str, commands: Sequence[Command], writes: int, reads: int) -> None:
    """Raises BundleError if a stream does not write and read as many registers as its layout says."""
    written = sum(isinstance(command, WriteGpr) for command in commands)
    read = sum(isinstance(command, ReadGpr) for command in commands)
    if (written, read) != (writes, reads):
        raise BundleError(
            f"the requests of layer {layer!r} of an AiM partition write {written} registers and read {read}, "
            f"where its layout has {writes} and {reads}"
        )


def _launch(about: Mapping[str, Any], artifact: Artifact, machine: AimMachine) -> Launch:
    commands = decode(artifact.files[about["file"]])
    check(commands, machine)

    def array(key: str | None) -> Array | None:
        return None if key is None else artifact.weights[key]

    made = Launch(
        layer=about["layer"],
        source=about["source"],
        outputs=tuple(
            Output(each["name"], tuple(each["shape"]), each["first"], each["count"], array(each["order"]))
            for each in about["outputs"]
        ),
        commands=commands,
        layout=layout.from_json(about["layout"]),
        bias=array(about["bias"]),
        take=array(about["take"]),
    )
    layout.require_activation(made.layout.activation)
    if made.layout.number not in NUMBERS:
        raise BundleError(f"layer {made.layer!r} of an AiM partition holds numbers as {made.layout.number!r}")
    vectors = made.layout.vectors
    _require_moves(made.layer, commands, vectors * made.layout.inputs, vectors * len(made.layout.outputs))
    return made


def _border(about: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    return about["name"], about["dtype"], tuple(about["shape"])
