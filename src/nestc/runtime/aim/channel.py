"""One channel against time: which DRAM command each request needs next, and when it may be issued."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass

from nestc.runtime.aim.constraints import AIM_COMMANDS, NO_BANK, Ready, Table
from nestc.runtime.aim.machine import AimMachine

_CODE = {name: place for place, name in enumerate(AIM_COMMANDS)}
ACT, PRE, ACT16, PREA, TMOD, REFAB = (_CODE[name] for name in ("ACT", "PRE", "ACT16", "PREA", "TMOD", "REFab"))
_WRA16 = _CODE["WRA16"]
_ONE_BANK = frozenset(_CODE[name] for name in ("RD", "WR", "MAC", "RDCP", "WRCP"))
_ALL_BANKS = frozenset(_CODE[name] for name in ("MAC16", "AF16", "EWMUL16", "WRA16"))
_CLOSED = -1


@dataclass(frozen=True, slots=True)
class Burst:
    """`count` column commands of one request: ``command`` is a place in AIM_COMMANDS; `bank` -1 for all or none."""

    command: int
    bank: int
    row: int
    count: int
    register_mode: bool


@dataclass(slots=True, eq=False)
class _Access:
    """An ordinary read or write that waits."""

    command: int
    bank: int
    row: int
    arrive: int


class Rows(Ready):
    """Open rows of the banks of a channel, beside the first tick at which each command may be issued."""

    def __init__(self, machine: AimMachine, table: Table) -> None:
        super().__init__(machine, table)
        self.open = [_CLOSED] * machine.banks
        self.active = 0
        """Ticks with a row open, up to the last time that all were closed."""
        self._open_since = -1

    def needed(self, command: int, bank: int, row: int) -> int:
        """`command`, or the one that must come before it, with the rows that are open."""
        if command in _ONE_BANK:
            found = self.open[bank]
            return command if found == row else ACT if found == _CLOSED else PRE
        if command in _ALL_BANKS:
            if any(found not in (row, _CLOSED) for found in self.open):
                return PREA
            return ACT16 if _CLOSED in self.open else command
        if command == REFAB and any(found != _CLOSED for found in self.open):
            return PREA
        return command

    def issue(self, command: int, bank: int, row: int, tick: int, count: int = 1) -> None:
        """`command` is issued, for the last of `count` times at `tick`."""
        self.record(command, bank, tick, count)
        if command in (ACT, ACT16):
            if command == ACT:
                self.open[bank] = row
            else:
                self.open = [row] * len(self.open)
            if self._open_since < 0:
                self._open_since = tick
        elif command in (PREA, _WRA16, PRE):
            if command == PRE:
                self.open[bank] = _CLOSED
            else:
                self.open = [_CLOSED] * len(self.open)
            if self._open_since >= 0 and all(found == _CLOSED for found in self.open):
                self.active += tick - self._open_since
                self._open_since = -1

    def active_until(self, tick: int) -> int:
        """Ticks with a row open, up to `tick`."""
        return self.active + (tick + 1 - self._open_since if self._open_since >= 0 else 0)


class Channel:
    """The controller of one channel: requests wait in order, ordinary reads and writes by readiness and age.

    Each tick issues at most one command. Computed from event to event: ticks at which nothing can happen are skipped.
    """

    def __init__(self, machine: AimMachine, table: Table, refresh: bool) -> None:
        self.rows = Rows(machine, table)
        self._table = table
        self._queue = machine.queue
        self._interval = machine.timing["nREFI"] if refresh else 0
        self._next_refresh = self._interval
        self._register_mode = False
        self._clock = 0
        """The last tick that has been looked at."""
        self._removed: deque[tuple[int, int, int]] = deque()
        """Removals from the queue: number of the first, its tick, ticks between it and the next."""
        self._count = 0
        self._last_removed = 0
        self._last_answer = 0
        self._writes_done = 0
        self._reads: list[_Access] = []
        self._writes: list[_Access] = []
        self._opened: list[_Access] = []
        """Accesses whose row was opened for them; they go before all others."""
        self._write_turn = False
        self._end = sys.maxsize

    def send(self, burst: Burst, tick: int) -> tuple[int, int]:
        """The host has a burst of PIM commands from `tick` on.

        Returns:
            The tick at which the last one enters the queue, and that at which the last one is done.
        """
        tick = self._accesses_gone(tick)
        start = max(tick, self._clock + 1)
        left, issued = burst.count, start
        while left:
            issued, count = self._issue(burst, start, left)
            left -= count
            start = issued + 1
        done = issued + self._table.latency[burst.command]
        self._writes_done = max(self._writes_done, done)
        return max(tick, self._room()), done

    def read_answer(self, done: int) -> int:
        """The tick at which the host has what a read, done at `done`, answers: one answer a tick, in order."""
        self._last_answer = max(done, self._last_answer + 1)
        return self._last_answer

    def finish(self, tick: int) -> tuple[int, int]:
        """SYNC or EOC, which the host has from `tick` on: when it enters the queue, and when all before it is done."""
        tick = self._accesses_gone(tick)
        found = self._refreshed(max(tick, self._clock + 1))
        while self._opened and self._next_opened(self._clock + 1) <= found:
            self._issue_opened(self._next_opened(self._clock + 1))
            found = max(found, self._clock + 1)
        self._look(found)
        self._remove(found, 1, 1)
        answer = max(found + 1, self._last_answer + 1, self._writes_done + 1)
        while self._opened and self._next_opened(self._clock + 1) < answer:
            self._issue_opened(self._next_opened(self._clock + 1))
            answer = max(answer, self._writes_done + 1)
        self._last_answer = answer
        return max(tick, self._room()), answer

    def access(self, write: bool, bank: int, row: int, tick: int) -> int:
        """An ordinary write or read of a column, from `tick` on; the tick at which it enters its queue."""
        entered = max(tick, self._last_removed + 1)
        if not (self._reads or self._writes or self._opened) and entered > self._clock + 1:
            self._write_turn = True  # as every tick without reads decides
        self._accesses_until(entered - 1)
        if not write and self._writes:
            # The simulator takes any waiting write for one to the same place, and answers from it.
            self.read_answer(entered)
            return entered
        queue = self._writes if write else self._reads
        while len(queue) >= self._queue:
            entered += 1
            self._accesses_until(entered - 1)
        command = _CODE["WR"] if write else _CODE["RD"]
        queue.append(_Access(command, bank, row, entered))
        return entered

    def close(self, tick: int) -> None:
        """Nothing more comes; what is under way goes on until `tick`, the last one."""
        self._end = tick
        self._accesses_until(tick)

    # Requests in order.

    def _issue(self, burst: Burst, tick: int, left: int) -> tuple[int, int]:
        """Issue what a burst needs from `tick` on, and as many of its commands as follow each other regularly."""
        rows = self.rows
        while True:
            command = rows.needed(burst.command, burst.bank, burst.row)
            tick = max(tick, self._clock + 1, rows.earliest(command, burst.bank))
            if self._opened:
                ready = self._next_opened(self._clock + 1)
                held = command == PRE and any(access.bank == burst.bank for access in self._opened)
                if ready <= tick or held:
                    self._issue_opened(ready)
                    continue
            if self._interval and self._next_refresh <= tick:
                self._refresh()
                continue
            if self._register_mode != burst.register_mode:
                self._change_mode(tick)
                continue
            if command != burst.command:
                rows.issue(command, burst.bank, burst.row, tick)
                self._look(tick)
                continue
            break
        gap = self._table.gap(command)
        count = left
        if self._opened or command == _WRA16:
            count = 1
        elif self._interval:
            count = min(left, (self._next_refresh - 1 - tick) // gap + 1)
        last = tick + (count - 1) * gap
        rows.issue(command, burst.bank, burst.row, last, count)
        self._look(last)
        self._remove(tick, count, gap)
        return last, count

    def _change_mode(self, tick: int) -> None:
        self.rows.issue(TMOD, NO_BANK, 0, tick)
        self._register_mode = not self._register_mode
        self._look(tick)

    def _look(self, tick: int) -> None:
        self._clock = max(self._clock, tick)

    def _remove(self, tick: int, count: int, gap: int) -> None:
        """`count` requests leave the queue, `gap` ticks apart, the first at `tick`."""
        self._removed.append((self._count, tick, gap))
        self._count += count
        self._last_removed = tick + (count - 1) * gap

    def _room(self) -> int:
        """The first tick at which there was room for the last request so far."""
        number = self._count - 1 - self._queue
        if number < 0:
            return 0
        removed = self._removed
        while len(removed) > 1 and removed[1][0] <= number:
            removed.popleft()
        first, tick, gap = removed[0]
        return tick + (number - first) * gap + 1

    # Refresh: a request that goes before all others.

    def _refreshed(self, tick: int) -> int:
        """`tick`, or the first after it at which no refresh is due."""
        while self._interval and self._next_refresh <= tick:
            self._refresh()
            tick = max(tick, self._clock + 1)
        return tick

    def _refresh(self) -> None:
        rows = self.rows
        tick = self._next_refresh
        while True:
            command = rows.needed(REFAB, NO_BANK, 0)
            tick = max(tick, self._clock + 1, rows.earliest(command, NO_BANK))
            if min([tick, *(self._ready(access) for access in self._opened)]) > self._end:
                self._interval = 0
                return
            if self._opened and self._next_opened(self._clock + 1) <= tick:
                self._issue_opened(self._next_opened(self._clock + 1))
            elif self._register_mode:
                self._change_mode(tick)
            else:
                rows.issue(command, NO_BANK, 0, tick)
                self._look(tick)
                if command == REFAB:
                    self._next_refresh += self._interval
                    return

    # Ordinary accesses. They do not mix with requests: either waits until the other's queues are empty.

    def _accesses_gone(self, tick: int) -> int:
        """The first tick from `tick` on at which no ordinary access waits, but for those with an open row."""
        if self._reads or self._writes or self._opened:
            self._accesses_until(tick - 1)
            while self._reads or self._writes:
                tick = max(tick, self._clock + 1) + 1
                self._accesses_until(tick - 1)
        return tick

    def _accesses_until(self, last: int) -> None:
        """Let ordinary accesses go on up to tick `last`, with no request in the queue."""
        while (self._reads or self._writes or self._opened) and self._clock < last:
            tick = self._clock + 1
            if self._opened and self._next_opened(tick) == tick:
                self._issue_opened(tick)
                continue
            if self._interval and self._next_refresh <= tick:
                self._refresh()
                continue
            self._take_turns()
            queue = self._writes if self._write_turn else self._reads
            best = self._best(queue, tick)
            if best is not None:
                command = self.rows.needed(best.command, best.bank, best.row)
                if command != PRE or all(access.bank != best.bank for access in self._opened):
                    self._issue_access(best, queue, command, tick)
                    continue
            times = [self._ready(access) for access in (*queue, *self._opened)]
            later = min((time for time in times if time > tick), default=last + 1)
            if self._interval:
                later = min(later, max(self._next_refresh, tick + 1))
            self._clock = min(later - 1, last)
        self._refreshed(last)
        self._look(last)

    def _take_turns(self) -> None:
        """Writes have their turn when many wait or no reads do (watermarks of 80 and 20 %)."""
        limit = self._queue - 1
        if not self._write_turn:
            self._write_turn = len(self._writes) > 0.8 * limit or not self._reads
        elif len(self._writes) < 0.2 * limit and self._reads:
            self._write_turn = False

    def _ready(self, access: _Access) -> int:
        return self.rows.earliest(self.rows.needed(access.command, access.bank, access.row), access.bank)

    def _best(self, queue: list[_Access], tick: int) -> _Access | None:
        """The oldest access that can issue something at `tick`."""
        ready = [access for access in queue if self._ready(access) <= tick]
        return min(ready, key=lambda access: access.arrive, default=None)

    def _next_opened(self, tick: int) -> int:
        return max(tick, min(self._ready(access) for access in self._opened))

    def _issue_opened(self, tick: int) -> None:
        best = self._best(self._opened, tick)
        if best is None:
            raise AssertionError("an access with an open row was to be ready")
        self._issue_access(best, self._opened, self.rows.needed(best.command, best.bank, best.row), tick)

    def _issue_access(self, access: _Access, queue: list[_Access], command: int, tick: int) -> None:
        if self._register_mode:
            self._change_mode(tick)
            return
        self.rows.issue(command, access.bank, access.row, tick)
        self._look(tick)
        if command == access.command:
            queue.remove(access)
            done = tick + self._table.latency[command]
            if command == _CODE["RD"]:
                self.read_answer(done)
            else:
                self._writes_done = max(self._writes_done, done)
        elif command == ACT:
            queue.remove(access)
            self._opened.append(access)
