"""A target whose times are told, regions of one operator, and a meter that is quick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from nestc.graph.region import Op, Region, TensorType
from nestc.partition.measure import Meter
from nestc.partition.repeat import Effort
from nestc.partition.store import Entry, ProfileStore
from nestc.targets.api import Artifact, Elapsed, Link, Machine, Offer, Partition

QUICK = Effort(runs=5, seconds=0.0, longest=5.0)

US = 1e-6


@dataclass
class Step:
    """A row of a profile."""

    us: float
    origin: tuple[str, ...]
    team_us: float | None = None


class Scripted:
    """A target whose times are told: `seconds` a run of one region, by operator; a chain takes their sum less a third.

    ``_faults``: what to raise at compile, load, run or open. The elementwise operators of the tests are all it takes.
    """

    def __init__(
        self,
        seconds: Mapping[str, float | Iterator[float]] | None = None,
        *,
        name: str = "fake",
        watts: float = 0.0,
        kind: Literal["measured", "modelled"] = "measured",
        timing: Mapping[str, Any] | None = None,
        cost: Callable[[Region], float] | None = None,
        faults: Mapping[str, Exception] | None = None,
        steps: Sequence[Step] | None = None,
        facts: Mapping[str, Any] | None = None,
        ops: str = "Relu Neg Abs Gather",
    ) -> None:
        link = Link(7e-6, kind="estimated")
        self.name = name
        self.machine = Machine(name, (), ("float32",), facts or {}, link=link, watts=watts)
        self.offers = (Offer("all", frozenset(ops.split()), cost=cost),)
        self._seconds = dict(seconds or {})
        self._kind = kind
        self._timing = timing
        self._faults = dict(faults or {})
        self._steps = steps
        self._compiled: list[tuple[str, ...]] = []
        self._runs = 0
        self._closed = 0

    def compile(self, partition: Partition, emit: object = None) -> Artifact:
        ops = tuple(op.op_type for region in partition.regions for op in region.ops)
        self._compiled.append(ops)
        self._raise("compile", ops)
        metadata: dict[str, Any] = {"ops": ops, "inputs": len(partition.inputs), "outputs": len(partition.outputs)}
        if self._timing is not None:
            metadata["timing"] = self._timing
        return Artifact("fake", {}, {"w": np.zeros(10 * len(ops), np.float32)}, metadata)

    def open(self) -> Device:
        self._raise("open", ())
        return Device(self)

    def _raise(self, when: str, ops: tuple[str, ...]) -> None:
        fault = self._faults.get(when)
        if fault is not None and ops != ("Relu",):  # the smallest partition is always taken
            raise fault
        if f"{when} anything" in self._faults:
            raise self._faults[f"{when} anything"]


@dataclass
class Device:
    """The run side of a scripted target."""

    target: Scripted
    name: str = "fake"

    def load(self, artifact: Artifact, threads: int) -> Program:
        self.target._raise("load", artifact.metadata["ops"])
        return (Program if self.target._steps is None else Profiled)(self.target, artifact)


@dataclass
class Program:
    """Takes the time that it is told."""

    target: Scripted
    artifact: Artifact
    rows: list[int] = field(default_factory=list[int])

    def __call__(self, inputs: Sequence[np.ndarray], outputs: Sequence[object]) -> tuple[Sequence[np.ndarray], Elapsed]:
        target, ops = self.target, self.artifact.metadata["ops"]
        assert len(inputs) == self.artifact.metadata["inputs"] and len(outputs) == self.artifact.metadata["outputs"]
        target._runs += 1
        target._raise("run", ops)
        times = [target._seconds.get(op, US) for op in ops]
        seconds = sum(next(each) if isinstance(each, Iterator) else each for each in times)
        return [], Elapsed(seconds if len(ops) == 1 else seconds * 2 / 3, target._kind)

    def close(self) -> None:
        self.target._closed += 1


class Profiled(Program):
    """Can tell what its steps take."""

    def profile(self, inputs: Sequence[np.ndarray], runs: int) -> list[Step]:
        return list(self.target._steps or ())


def unary(op: str, x: str, y: str, type_: TensorType | None = None) -> Region:
    """A region of one operator; `type_` is that of its input."""
    types = {x: type_ or TensorType("float32", (2, 3)), y: TensorType("float32", (2, 3))}
    return Region(f"r_{op}_{y}", None, (Op(op, (x,), (y,), name=f"n_{y}"),), (x,), (y,), types, {})


def models(*given: Region) -> Callable[[Sequence[str]], ir.Model]:
    """The ONNX model of some of the regions given; what nobody of these reads is an output."""

    def model(names: Sequence[str]) -> ir.Model:
        chosen = [region for region in given if region.name in names]
        values = {
            name: ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((2, 3)))
            for region in chosen
            for name in region.types
        }
        nodes = [
            ir.Node("", op.op_type, [values[x] for x in op.inputs], outputs=[values[y] for y in op.outputs])
            for region in chosen
            for op in region.ops
        ]
        made = {name for region in chosen for name in region.outputs}
        read = {name for region in chosen for name in region.inputs}
        taken, left = [values[x] for x in sorted(read - made)], [values[y] for y in sorted(made - read)]
        return ir.Model(ir.Graph(taken, left, nodes=nodes, opset_imports={"": 24}), ir_version=10)

    return model


CHAIN = (unary("Relu", "x", "a"), unary("Neg", "a", "b"), unary("Abs", "b", "c"))

NEG = unary("Neg", "x", "y")


def meter(path: Path, **options: Any) -> Meter:
    return Meter(ProfileStore(path / "profiles.sqlite"), effort=QUICK, **options)


def measure(path: Path, target: Scripted, region: Region) -> Entry:
    return meter(path).region(target, region, models(region))
