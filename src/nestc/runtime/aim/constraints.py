"""Which ticks must lie between DRAM commands: tables of rules in the machine's parameters, one a command set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nestc.runtime.aim.machine import AimMachine

CHANNEL, GROUP, BANK = 0, 1, 2
"""Where a rule holds: between commands to the same channel, to the same bank group, to the same bank."""

NO_BANK = -1
"""Stands for a bank where a command is for none, or for all."""


@dataclass(frozen=True)
class Rule:
    """After any of `before`, any of `after` waits at least ``ticks``: a sum of parameters and numbers, as text."""

    level: int
    before: str
    after: str
    ticks: str


# Commands of the family "aim" that requests can lead to. ACT, PRE and the column commands RD to WRCP are for one bank,
# WRGB and TMOD (change between register mode and normal mode) for none, the others for all banks of the channel.
AIM_COMMANDS: tuple[str, ...] = tuple(
    "ACT PRE RD WR MAC RDCP WRCP ACT16 PREA MAC16 AF16 EWMUL16 WRA16 WRGB WRMAC16 RDMAC16 RDAF16 TMOD REFab".split()
)
_ACTIVATE = "ACT ACT16"
_ALL_BUT_TMOD = " ".join(name for name in AIM_COMMANDS if name != "TMOD")
_BUS_READS, _BUS_WRITES = "RD RDMAC16 RDAF16", "WR WRA16 WRGB WRMAC16"

# Source: aim_simulator, src/dram/impl/GDDR6.cpp, set_timing_vals at 0f28a07, without commands that no request leads to
# (ACT4, PRE4, RDA, WRA, REFpb). The reasons: nBL data bus; nCCD columns; nRCD activate to column; nRTP, nWR column to
# precharge; nRAS activate to precharge; nRP precharge to activate; nRRD activate to activate; nWTR write to read.
AIM_RULES = (
    # The bus between channel and controller, and the bus that bank groups share.
    Rule(CHANNEL, _BUS_READS, _BUS_READS, "nBL"),
    Rule(CHANNEL, _BUS_WRITES, _BUS_WRITES, "nBL"),
    Rule(CHANNEL, f"{_BUS_READS} MAC MAC16 RDCP", f"{_BUS_READS} MAC MAC16 RDCP", "nCCDS"),
    Rule(CHANNEL, f"{_BUS_WRITES} WRCP", f"{_BUS_WRITES} WRCP", "nCCDS"),
    # Commands for all banks use the bus inside every bank group.
    Rule(CHANNEL, "RD MAC RDCP RDMAC16 RDAF16 MAC16 EWMUL16", "RDMAC16 RDAF16 MAC16 EWMUL16", "nCCDL"),
    Rule(CHANNEL, "RDMAC16 RDAF16 MAC16 EWMUL16", "RD MAC RDCP RDMAC16 RDAF16 MAC16 EWMUL16", "nCCDL"),
    Rule(CHANNEL, "WR WRCP WRA16 WRMAC16 EWMUL16", "WRA16 WRMAC16 EWMUL16", "nCCDL"),
    Rule(CHANNEL, "WRA16 WRMAC16 EWMUL16", "WR WRCP WRA16 WRMAC16 EWMUL16", "nCCDL"),
    # Read to write: the external bus turns around.
    Rule(CHANNEL, "RD", "WR WRA16", "nCL + nBL + 3 - nCWL + nWPRE"),
    Rule(CHANNEL, "RD", "WRGB", "nCL + nBL + 3 - nCWLGB + nWPRE"),
    Rule(CHANNEL, "RD", "WRMAC16", "nCL + nBL + 3 - nCWLREG + nWPRE"),
    Rule(CHANNEL, "RDMAC16 RDAF16", "WR WRA16", "nCLREG + nBL + 3 - nCWL + nWPRE"),
    Rule(CHANNEL, "RDMAC16 RDAF16", "WRGB", "nCLREG + nBL + 3 - nCWLGB + nWPRE"),
    Rule(CHANNEL, "RDMAC16 RDAF16", "WRMAC16", "nCLREG + nBL + 3 - nCWLREG + nWPRE"),
    # Write to read.
    Rule(CHANNEL, "WR", "RD", "nCWL + nBL + nWTRS"),
    Rule(CHANNEL, "WR", "RDMAC16 RDAF16", "nCWL + nBL + nWTRL"),
    Rule(CHANNEL, "WRA16", _BUS_READS, "nCWL + nBL + nWTRL"),
    Rule(CHANNEL, "WRGB", _BUS_READS, "nCWLGB + nBL + nWTRS"),
    Rule(CHANNEL, "WRMAC16", _BUS_READS, "nCWLREG + nBL + nWTRL"),
    # Column to precharge.
    Rule(CHANNEL, "RD RDCP MAC MAC16 AF16 EWMUL16", "PREA", "nRTP"),
    Rule(CHANNEL, "MAC16 AF16 EWMUL16", "PRE", "nRTP"),
    Rule(CHANNEL, "WR WRCP", "PREA", "nCWL + nBL + nWR"),
    Rule(CHANNEL, "EWMUL16", "PRE PREA", "nCWL + nWR"),
    # Rows.
    Rule(CHANNEL, "ACT", "ACT", "nRRDS"),
    Rule(CHANNEL, "ACT", "ACT16", "nRRDL"),
    Rule(CHANNEL, "ACT16", _ACTIVATE, "nRRDS"),
    Rule(CHANNEL, "ACT16", _ACTIVATE, "nRRDL"),
    Rule(CHANNEL, _ACTIVATE, "PREA", "nRAS"),
    Rule(CHANNEL, "ACT16", "PRE", "nRAS"),
    Rule(CHANNEL, "PRE", "PRE PREA ACT16", "nRP"),
    Rule(CHANNEL, "PREA", f"PRE PREA {_ACTIVATE}", "nRP"),
    Rule(CHANNEL, _ACTIVATE, "MAC16", "nRCDRDMAC"),
    Rule(CHANNEL, _ACTIVATE, "AF16", "nRCDRDAF"),
    Rule(CHANNEL, _ACTIVATE, "EWMUL16", "nRCDEWMUL"),
    Rule(CHANNEL, _ACTIVATE, "WRA16", "nRCDWR"),
    Rule(CHANNEL, "ACT16", "MAC", "nRCDRDMAC"),
    Rule(CHANNEL, "ACT16", "RDCP", "nRCDRDCP"),
    Rule(CHANNEL, "ACT16", "RD", "nRCDRD"),
    Rule(CHANNEL, "ACT16", "WRCP", "nRCDWRCP"),
    Rule(CHANNEL, "ACT16", "WR", "nRCDWR"),
    Rule(CHANNEL, "WRA16", f"{_ACTIVATE} REFab", "nCWL + nBL + nWR + nRP"),
    # Refresh of all banks.
    Rule(CHANNEL, _ACTIVATE, "REFab", "nRC"),
    Rule(CHANNEL, "PRE PREA", "REFab", "nRP"),
    Rule(CHANNEL, "REFab", f"{_ACTIVATE} REFab", "nRFC"),
    Rule(CHANNEL, "TMOD", _ALL_BUT_TMOD, "nMODCH"),
    # Inside a bank group.
    Rule(GROUP, "RD MAC RDCP", "RD MAC RDCP", "nCCDL"),
    Rule(GROUP, "WR WRCP", "WR WRCP", "nCCDL"),
    Rule(GROUP, "WR", "RD", "nCWL + nBL + nWTRL"),
    Rule(GROUP, "RD RDCP MAC", "PRE", "nRTP"),
    Rule(GROUP, "WR WRCP", "PRE", "nCWL + nBL + nWR"),
    Rule(GROUP, "ACT", "ACT", "nRRDL"),
    # Inside a bank.
    Rule(BANK, "ACT", "MAC", "nRCDRDMAC"),
    Rule(BANK, "ACT", "RDCP", "nRCDRDCP"),
    Rule(BANK, "ACT", "RD", "nRCDRD"),
    Rule(BANK, "ACT", "WRCP", "nRCDWRCP"),
    Rule(BANK, "ACT", "WR", "nRCDWR"),
    Rule(BANK, "ACT", "PRE", "nRAS"),
    Rule(BANK, "PRE", "ACT", "nRP"),
)

# Ticks from a request's last command until the controller calls it done; the same function. MAC16 and the others that
# move no data off the chip take one.
AIM_LATENCIES: Mapping[str, str] = {
    "WR": "nCWL + nBL",
    "WRGB": "nCWLGB + nBL",
    "WRMAC16": "nCWLREG + nBL",
    "RDMAC16": "nCLREG + nBL",
    "RDAF16": "nCLREG + nBL",
    "RD": "nCL + nBL",
    "WRA16": "nCWL + nBL + nRP",
}

NEWTON_COMMANDS: tuple[str, ...] = tuple("GWRITE G_ACT0 G_ACT1 G_ACT2 G_ACT3 COMP READRES PREA REF".split())
_G_ACTS = "G_ACT0 G_ACT1 G_ACT2 G_ACT3"

# Source: PIMFlow_ramulator, src/GDDR6.cpp, init_timing. A G_ACT opens the rows of a bank group, without a precharge.
NEWTON_RULES = (
    Rule(CHANNEL, "GWRITE", f"GWRITE {_G_ACTS}", "nGACT"),
    Rule(CHANNEL, "GWRITE", "COMP", "nRC + nGCOMP"),
    Rule(CHANNEL, "G_ACT0", "G_ACT1", "nFAW"),
    Rule(CHANNEL, "G_ACT1", "G_ACT2", "nFAW"),
    Rule(CHANNEL, "G_ACT2", "G_ACT3", "nFAW"),
    Rule(CHANNEL, _G_ACTS, "COMP", "nRCDR"),
    Rule(CHANNEL, "COMP", "COMP", "nCCDS"),
    Rule(CHANNEL, "COMP", "READRES", "nREADRES"),
    Rule(CHANNEL, "READRES", "GWRITE", "nRTG"),
    Rule(CHANNEL, "PREA", "G_ACT0 REF", "nRP"),
    Rule(CHANNEL, "REF", "G_ACT0 REF", "nRFC"),
)
NEWTON_LATENCIES: Mapping[str, str] = {"READRES": "nCL + nBL"}


@dataclass(frozen=True)
class Table:
    """Rules in ticks.

    ``following[level][c]``: pairs of a command and the ticks that it waits after command ``c``; commands are places in
    ``commands``. ``latency[c]``: ticks until a request is done after its last command.
    """

    commands: tuple[str, ...]
    following: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    latency: tuple[int, ...]

    def gap(self, command: int) -> int:
        """Ticks from a command to the same one again, to the same bank; at least 1, since a tick issues one command."""
        waits = [ticks for level in self.following for after, ticks in level[command] if after == command]
        return max([1, *waits])


class Ready:
    """The first tick at which the rules allow each command, in one channel, after what was issued so far."""

    def __init__(self, machine: AimMachine, table: Table) -> None:
        commands = len(table.commands)
        self._following = table.following
        self._per_group = machine.banks_per_group
        self._channel = [0] * commands
        self._group = [[0] * commands for _ in range(machine.bank_groups)]
        self._bank = [[0] * commands for _ in range(machine.banks)]
        self.issued = [0] * commands
        """How often each command was issued."""

    def earliest(self, command: int, bank: int = NO_BANK) -> int:
        """The first tick for `command`, to one bank or to none or all."""
        tick = self._channel[command]
        if bank != NO_BANK:
            tick = max(tick, self._group[bank // self._per_group][command], self._bank[bank][command])
        return tick

    def record(self, command: int, bank: int, tick: int, count: int = 1) -> None:
        """`command` was issued `count` times, the last time at `tick`."""
        self.issued[command] += count
        places = [self._channel]
        if bank != NO_BANK:
            places += [self._group[bank // self._per_group], self._bank[bank]]
        for level, ready in enumerate(places):
            for after, ticks in self._following[level][command]:
                ready[after] = max(ready[after], tick + ticks)


def rules(machine: AimMachine) -> tuple[Rule, ...]:
    """The rules of the machine's family."""
    return AIM_RULES if machine.family == "aim" else NEWTON_RULES


def table(machine: AimMachine) -> Table:
    """The rules of a machine in ticks; where several hold, the longest wait."""
    aim = machine.family == "aim"
    names = AIM_COMMANDS if aim else NEWTON_COMMANDS
    latencies = AIM_LATENCIES if aim else NEWTON_LATENCIES
    waits: list[list[dict[int, int]]] = [[{} for _ in names] for _ in (CHANNEL, GROUP, BANK)]
    for rule in rules(machine):
        ticks = evaluate(rule.ticks, machine.timing)
        for before in rule.before.split():
            into = waits[rule.level][names.index(before)]
            for after in rule.after.split():
                place = names.index(after)
                into[place] = max(into.get(place, 0), ticks)
    return Table(
        names,
        tuple(tuple(tuple(one.items()) for one in level) for level in waits),
        tuple(evaluate(latencies.get(name, "1"), machine.timing) for name in names),
    )


def evaluate(terms: str, timing: Mapping[str, int]) -> int:
    """The value of a sum such as ``nCL + nBL + 3 - nCWL``."""
    total, sign = 0, 1
    for word in terms.split():
        if word in "+-":
            sign = 1 if word == "+" else -1
        else:
            total += sign * (int(word) if word.isdigit() else timing[word])
    return total
