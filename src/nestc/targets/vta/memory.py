"""The DRAM plan of a partition: where its values, constants, micro-ops and instructions lie in one address space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nestc.codegen.arena import Buffer, plan_arena
from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig

START = 0x1000
"""The first address: what the simulator of tvm-vta gives to the first allocation of a process (its page 0 is empty)."""

PAGE = 4096
"""Every buffer begins at a multiple of this many bytes, as allocations do there, and of its largest element."""

LIMIT = 1 << 32
"""Addresses are physical addresses of 32 bits (tvm-vta ``driver.h``)."""

DISTANCE = 2
"""Layers between the last use of an intermediate value and the reuse of its memory: nobody has to wait for it then."""


@dataclass(frozen=True)
class Value:
    """A feature map in DRAM: written by layer `first` and read last by layer `last` (numbers in execution order)."""

    name: str
    bytes: int
    first: int
    last: int


class Dram:
    """Hands out addresses, in order; `end` is the first that is free."""

    def __init__(self, config: VtaConfig) -> None:
        self.alignment = max(PAGE, config.wgt_bytes, config.acc_bytes)
        self.end = _up(START, self.alignment)
        self.addresses: dict[str, int] = {}

    def place(self, name: str, nbytes: int) -> int:
        """The address of a buffer that keeps its memory for itself. Raises TargetError if memory is used up."""
        address = self.end
        self._extend(nbytes)
        self.addresses[name] = address
        return address

    def place_intermediate(self, values: Sequence[Value]) -> None:
        """Addresses of values that share memory where they do not live at the same time."""
        plan = plan_arena(
            [Buffer(value.name, value.bytes, value.first, value.last + DISTANCE) for value in values], self.alignment
        )
        for name, offset in plan.offsets.items():
            self.addresses[name] = self.end + offset
        self._extend(plan.nbytes)

    def place_inside(self, places: Mapping[str, tuple[str, int]]) -> None:
        """Give each key an address inside a value that has one: so many bytes behind its beginning."""
        for name, (whole, offset) in places.items():
            self.addresses[name] = self.addresses[whole] + offset

    def _extend(self, nbytes: int) -> None:
        self.end = _up(self.end + nbytes, self.alignment)
        if self.end > LIMIT:
            raise TargetError(
                f"a VTA partition needs {self.end} bytes of memory, but its addresses have 32 bits; use a smaller batch"
            )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
