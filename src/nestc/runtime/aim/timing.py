"""How long a stream of AiM requests takes, in ticks, as the public simulator counts them; always modelled time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.aim.channel import Burst, Channel
from nestc.runtime.aim.commands import (
    CFR_AF,
    CFR_START,
    Af,
    Command,
    CopyBkGb,
    CopyGbBk,
    Eoc,
    EwMul,
    MacAbk,
    MacSbk,
    RdAf,
    RdMac,
    RdSbk,
    ReadMem,
    Sync,
    WrAbk,
    WrBias,
    WrGb,
    WriteCfr,
    WriteMem,
    WrSbk,
    channels_of,
    check,
)
from nestc.runtime.aim.constraints import AIM_COMMANDS, table
from nestc.runtime.aim.machine import AimMachine

_LAST_COMMAND: dict[type[Command], str] = {
    WrGb: "WRGB",
    WrBias: "WRMAC16",
    RdMac: "RDMAC16",
    RdAf: "RDAF16",
    CopyBkGb: "RDCP",
    CopyGbBk: "WRCP",
    MacSbk: "MAC",
    MacAbk: "MAC16",
    Af: "AF16",
    EwMul: "EWMUL16",
    WrAbk: "WRA16",
}
"""The DRAM command that a request asks for, once a column; rows are opened for it as needed."""
_AF_ROW = 1 << 29
"""Tables of activation functions are in rows of their own (aim_DRAM_system.cpp): an AF closes what is open."""


@dataclass(frozen=True, eq=False)
class Report:
    """Modelled execution of a stream.

    ``ticks``: until EOC is answered. ``start``: the tick at which the host takes up each request, int64 in stream
    order; ``end``: at which its last command is done in its last channel. ``issued``: DRAM commands by name,
    summed over channels; ``active``: channel-ticks with a row open. ``machine``: the one that was modelled.
    """

    ticks: int
    start: np.ndarray
    end: np.ndarray
    issued: dict[str, int]
    active: int
    machine: AimMachine

    @property
    def seconds(self) -> float:
        """Modelled time at the clock of the machine."""
        return self.machine.seconds(self.ticks)

    @property
    def bandwidth_fraction(self) -> float:
        """Bytes that MACs read from banks, over what the banks could deliver in that time."""
        columns = self.issued["MAC16"] * self.machine.banks + self.issued["MAC"]
        possible = self.ticks / self.machine.timing["nCCDS"] * self.machine.outputs
        return columns / possible if possible else 0.0

    def between(self, first: int, last: int) -> int:
        """Ticks from when request `first` is taken up until request `last` is, or until the end."""
        stop = int(self.start[last]) if last < len(self.start) else self.ticks + 1
        return stop - int(self.start[first])


def simulate_timing(commands: Sequence[Command], machine: AimMachine, refresh: bool = False) -> Report:
    """The modelled execution of a stream that ends with EOC.

    The host decodes one request a tick, sends its column commands to the channels' queues, and goes on when all are
    in; if the request is blocking, when all channels have answered (aim_DRAM_system.cpp). Channels that get the same
    requests do the same, so that one of them is computed.

    Args:
        commands: the stream; `commands.check` must accept it.
        machine: of the family ``aim``.
        refresh: also refresh all banks every nREFI ticks, which the public simulator does not do.

    Raises:
        TargetError: a stream that `commands.check` refuses, or a machine of another family.
    """
    if machine.family != "aim":
        raise TargetError(f"machine '{machine.name}' does not take AiM requests; its family is '{machine.family}'")
    check(commands, machine)
    rules = table(machine)
    members, groups = _alike(commands, machine)
    channels = [Channel(machine, rules, refresh) for _ in groups]
    start, end = np.zeros(len(commands), np.int64), np.zeros(len(commands), np.int64)
    cfr = dict(CFR_START)
    tick = 1
    for index, command in enumerate(commands):
        start[index] = end[index] = sent = tick
        if isinstance(command, (Sync, Eoc)):
            answers = [channel.finish(tick) for channel in channels]
            sent = max(answer for _, answer in answers)
            end[index] = sent
        elif isinstance(command, WriteCfr):
            cfr[command.cfr] = command.value
        elif isinstance(command, (WriteMem, ReadMem)):
            channel = channels[groups[command.channel]]
            sent = channel.access(isinstance(command, WriteMem), command.bank, command.row, tick)
        elif isinstance(command, (WrSbk, RdSbk)):
            write = isinstance(command, WrSbk)
            sent = max(channels[g].access(write, command.bank, command.row, tick) for g in members[command.mask])
        elif type(command) in _LAST_COMMAND:
            burst = _burst(command, cfr)
            for g in members[_mask(command)]:
                entered, done = channels[g].send(burst, tick)
                if command.blocking:
                    entered = done = channels[g].read_answer(done)
                sent = max(sent, entered)
                end[index] = max(end[index], done)
        tick = sent + 1
    ticks = tick - 1
    for channel in channels:
        channel.close(ticks)
    counts = np.bincount(np.array(groups), minlength=len(channels)).tolist()
    issued = {
        name: sum(count * channel.rows.issued[place] for count, channel in zip(counts, channels, strict=True))
        for place, name in enumerate(AIM_COMMANDS)
    }
    active = sum(count * channel.rows.active_until(ticks) for count, channel in zip(counts, channels, strict=True))
    return Report(ticks, start, end, issued, active, machine)


def _mask(command: Command) -> int:
    return int(getattr(command, "mask", 0))


def _burst(command: Command, cfr: dict[int, int]) -> Burst:
    row = _AF_ROW + cfr[CFR_AF] if isinstance(command, Af) else int(getattr(command, "row", 0))
    bank = int(getattr(command, "bank", -1))
    count = int(getattr(command, "size", 1))
    place = AIM_COMMANDS.index(_LAST_COMMAND[type(command)])
    return Burst(place, bank, row, count, command.register_mode)


def _alike(commands: Sequence[Command], machine: AimMachine) -> tuple[dict[int, list[int]], list[int]]:
    """Groups of channels that get the same requests: the groups that a mask names, and the group of each channel."""
    masks = {_mask(command) for command in commands} | {
        1 << command.channel for command in commands if isinstance(command, (WriteMem, ReadMem))
    }
    masks.discard(0)
    ordered = sorted(masks)
    signatures = [tuple(mask >> channel & 1 for mask in ordered) for channel in range(machine.channels)]
    found: dict[tuple[int, ...], int] = {}
    groups = [found.setdefault(signature, len(found)) for signature in signatures]
    return {mask: sorted({groups[channel] for channel in channels_of(mask)}) for mask in ordered}, groups
