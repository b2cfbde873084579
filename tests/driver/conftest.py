"""A target that takes only what it is told to, and runs it in the reference evaluator."""

from __future__ import annotations

from collections.abc import Callable

from nestc.targets.api import Artifact, Constraint, Device, Machine, Offer, Partition
from nestc.targets.host import HostTarget


class Only:
    """Offers these operators (in regions for which `holds`), and is otherwise like `host`."""

    def __init__(self, name: str, *ops: str, where: Constraint | None = None) -> None:
        self.name = name
        self.machine = Machine(name, (), ("float32",))
        self.offers = (Offer("only", frozenset(ops), where=(where,) if where else ()),)
        self.compiled: list[str] = []

    def compile(self, partition: Partition, emit: Callable[[str, str, str], None] | None = None) -> Artifact:
        self.compiled.append(partition.name)
        return HostTarget().compile(partition, emit)

    def open(self) -> Device:
        return HostTarget().open()
