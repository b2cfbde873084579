"""Newton as PIMFlow drives it: its requests, its trace text, and how many cycles they take; always modelled time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nestc.errors import TargetError
from nestc.runtime.aim.constraints import NEWTON_COMMANDS, NO_BANK, Ready, table
from nestc.runtime.aim.machine import AimMachine

# Source: akothen/PIMFlow_ramulator, src/GDDR6.cpp, Controller.cpp and Refresh.h; trace: yongwonshin/PIMFlow,
# pim/pim_trace.cc.
KINDS = ("GWRITE", "G_ACT0", "G_ACT1", "G_ACT2", "G_ACT3", "COMP", "READRES")
_CODE = {name: place for place, name in enumerate(NEWTON_COMMANDS)}
_PREA, _REF, _READRES = _CODE["PREA"], _CODE["REF"], _CODE["READRES"]

# Bits of an address in a trace: bank group, bank, row, column, byte (pim_trace.cc).
_GROUP, _ROW, _COLUMN = 27, 11, 6


@dataclass(frozen=True, slots=True)
class NewtonRequest:
    """One request: ``kind`` is in KINDS.

    GWRITE writes part ``row`` of the vector to the global buffer; G_ACTg opens ``row`` in bank group g; COMP multiplies
    ``column`` of every bank's row with that of the buffer and adds; READRES reads the sums.
    """

    kind: str
    row: int = 0
    column: int = 0


@dataclass(frozen=True, eq=False)
class NewtonReport:
    """Modelled execution: cycles until the last result is read, and DRAM commands by name."""

    ticks: int
    issued: dict[str, int]
    machine: AimMachine

    @property
    def seconds(self) -> float:
        """Modelled time at the clock of the machine."""
        return self.machine.seconds(self.ticks)


def matrix_vector(rows: int, k: int, machine: AimMachine) -> list[NewtonRequest]:
    """The requests for a matrix of `rows` x `k` times a vector: chunks of a row of elements outside, 16 rows a step."""
    banks, chunk = machine.banks, machine.row_elements
    steps = -(-rows // banks)
    requests: list[NewtonRequest] = []
    for part in range(-(-k // chunk)):
        requests.append(NewtonRequest("GWRITE", part))
        columns = -(-min(chunk, k - part * chunk) // machine.lanes)
        for step in range(steps):
            row = part * steps + step
            left = min(banks, rows - step * banks)
            groups = -(-left // machine.banks_per_group)
            requests += [NewtonRequest(f"G_ACT{group}", row) for group in range(groups)]
            requests += [NewtonRequest("COMP", row, column) for column in range(columns)]
            requests.append(NewtonRequest("READRES"))
    return requests


def simulate_newton(requests: Sequence[NewtonRequest], machine: AimMachine, refresh: bool = True) -> NewtonReport:
    """The modelled execution of a stream that ends with READRES.

    Requests are issued in order, one a cycle at most. A refresh that is due waits for the next READRES, then closes all
    rows and takes nRFC. Nothing else closes rows, and a G_ACT does not ask for it.

    Raises:
        TargetError: a machine of another family, a request that it does not have, or a stream that ends with another.
    """
    if machine.family != "newton":
        raise TargetError(f"machine '{machine.name}' does not take Newton requests; its family is '{machine.family}'")
    if not requests or requests[-1].kind != "READRES":
        raise TargetError("a stream of Newton requests must end with READRES")
    rules = table(machine)
    channel = _Channel(machine, Ready(machine, rules), machine.timing["nREFI"] if refresh else 0)
    for index, request in enumerate(requests):
        if request.kind not in KINDS:
            raise TargetError(f"request {index}: Newton has no '{request.kind}'; it has {', '.join(KINDS)}")
        channel.issue(_CODE[request.kind])
    ticks = channel.clock + rules.latency[_READRES]
    # What is due before the last result is there is still served, and counted.
    while channel.due <= ticks and refresh:
        channel.refresh()
        ticks = max(ticks, channel.clock)
    return NewtonReport(ticks, dict(zip(rules.commands, channel.ready.issued, strict=True)), machine)


@dataclass(slots=True)
class _Channel:
    machine: AimMachine
    ready: Ready
    due: int
    """When the next refresh is due; 0 for never."""
    clock: int = 0
    _open: bool = False
    _after_result: bool = False

    def issue(self, command: int) -> None:
        """The next request, after the refreshes that go before it."""
        while self._after_result and self.due and self.due <= self.clock + 1:
            self.refresh()
        tick = max(self.clock + 1, self.ready.earliest(command))
        self.ready.record(command, NO_BANK, tick)
        self.clock = tick
        self._after_result = command == _READRES
        self._open = self._open or NEWTON_COMMANDS[command].startswith("G_ACT")

    def refresh(self) -> None:
        for command in (_PREA, _REF) if self._open else (_REF,):
            self.clock = max(self.due, self.clock + 1, self.ready.earliest(command))
            self.ready.record(command, NO_BANK, self.clock)
        self._open = False
        self.due += self.machine.timing["nREFI"]


def format_newton(requests: Iterable[NewtonRequest]) -> str:
    """The requests as PIMFlow's trace: an address and a word a line."""
    lines: list[str] = []
    for request in requests:
        if request.kind == "READRES":
            lines.append("READRES")
            continue
        group = int(request.kind[-1]) if request.kind.startswith("G_ACT") else 0
        address = group << _GROUP | request.row << _ROW | request.column << _COLUMN
        lines.append(f"0x{address:08x} {request.kind}{' ' if request.kind == 'GWRITE' else ''}")
    return "\n".join(lines) + "\n"


def parse_newton(text: str) -> list[NewtonRequest]:
    """The requests of a trace.

    Raises:
        TargetError: with the number of the line that is wrong.
    """
    requests: list[NewtonRequest] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if words == ["READRES"]:
            requests.append(NewtonRequest("READRES"))
            continue
        if len(words) != 2 or words[1] not in KINDS or not words[0].startswith("0x"):
            raise TargetError(f"line {number} of the trace: '{line}' is not an address and one of {', '.join(KINDS)}")
        try:
            address = int(words[0], 16)
        except ValueError as error:
            raise TargetError(f"line {number} of the trace: '{words[0]}' is not an address") from error
        row = address >> _ROW & (1 << 14) - 1
        requests.append(NewtonRequest(words[1], row, address >> _COLUMN & 31 if words[1] == "COMP" else 0))
    return requests
