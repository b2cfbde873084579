"""A plain model of the AiM memory system that looks at every tick; what the event-driven one is checked against."""

from collections import deque
from dataclasses import dataclass, field

from nestc.runtime.aim.commands import (
    Af,
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
)
from nestc.runtime.aim.constraints import AIM_LATENCIES, AIM_RULES, CHANNEL, GROUP, evaluate

FINAL = {
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
    Sync: "SYNC",
    Eoc: "EOC",
    WrSbk: "WR",
    WriteMem: "WR",
    RdSbk: "RD",
    ReadMem: "RD",
}
SINGLE = ("RD", "WR", "MAC", "RDCP", "WRCP")
ALL = ("MAC16", "AF16", "EWMUL16", "WRA16")


@dataclass(eq=False)
class Item:
    final: str
    bank: int | None
    row: int
    host: int
    blocking: bool
    register: bool
    arrive: int = 0
    depart: int = 0

    @property
    def kind(self):
        return {"RD": "read", "WR": "write"}.get(self.final, "aim")


@dataclass(eq=False)
class Controller:
    machine: object
    refresh: bool
    answer: object
    now: int = 0
    rows: list = field(default_factory=list)
    history: dict = field(default_factory=dict)
    counts: dict = field(default_factory=dict)
    aim: list = field(default_factory=list)
    reads: list = field(default_factory=list)
    writes: list = field(default_factory=list)
    opened: list = field(default_factory=list)
    priority: list = field(default_factory=list)
    pending_reads: deque = field(default_factory=deque)
    pending_writes: list = field(default_factory=list)
    register: bool = False
    write_turn: bool = False
    active: int = 0

    def __post_init__(self):
        self.rows = [None] * self.machine.banks
        self.rules = {}
        for rule in AIM_RULES:
            ticks = evaluate(rule.ticks, self.machine.timing)
            for after in rule.after.split():
                self.rules.setdefault(after, []).append((rule.level, rule.before.split(), ticks))

    def send(self, item):
        if item.kind == "aim" and (self.reads or self.writes):
            return False
        if item.kind != "aim" and self.aim:
            return False
        if item.kind == "read" and self.writes:
            item.depart = self.now + 1
            self.pending_reads.append(item)
            return True
        queue = {"aim": self.aim, "read": self.reads, "write": self.writes}[item.kind]
        if len(queue) >= self.machine.queue:
            return False
        item.arrive = self.now
        queue.append(item)
        return True

    def needed(self, item):
        if item.final in SINGLE:
            found = self.rows[item.bank]
            return "ACT" if found is None else item.final if found == item.row else "PRE"
        if item.final in ALL:
            if any(row not in (None, item.row) for row in self.rows):
                return "PREA"
            return "ACT16" if None in self.rows else item.final
        if item.final == "REFab" and any(row is not None for row in self.rows):
            return "PREA"
        return item.final

    def ready(self, command, bank):
        """No rule is broken by `command` now, judged from when each command was last issued to each bank."""
        per = self.machine.banks_per_group
        for level, before, ticks in self.rules.get(command, ()):
            for name in before:
                for where, at in self.history.get(name, {}).items():
                    if self.now >= at + ticks:
                        continue
                    if level == CHANNEL:
                        return False
                    if bank is None or where is None:
                        continue
                    if where // per == bank // per if level == GROUP else where == bank:
                        return False
        return True

    def best(self, queue):
        found = None
        for item in queue:
            key = (not self.ready(self.needed(item), item.bank), item.arrive)
            if found is None or key < found[0]:
                found = (key, item)
        return None if found is None else found[1]

    def schedule(self):
        chosen = None
        item = self.best(self.opened)
        if item is not None and self.ready(self.needed(item), item.bank):
            chosen = (item, self.opened)
        if chosen is None and self.priority:
            item = self.priority[0]
            if not self.ready(self.needed(item), item.bank):
                return None
            chosen = (item, self.priority)
        if chosen is None and self.aim:
            item = self.aim[0]
            if item.final in ("SYNC", "EOC"):
                return item, self.aim
            if self.ready(self.needed(item), item.bank):
                chosen = (item, self.aim)
        elif chosen is None:
            limit = self.machine.queue - 1
            if not self.write_turn:
                self.write_turn = len(self.writes) > 0.8 * limit or not self.reads
            elif len(self.writes) < 0.2 * limit and self.reads:
                self.write_turn = False
            queue = self.writes if self.write_turn else self.reads
            item = self.best(queue)
            if item is not None and self.ready(self.needed(item), item.bank):
                chosen = (item, queue)
        if chosen is not None and self.needed(chosen[0]) == "PRE":
            if any(other.bank == chosen[0].bank for other in self.opened):
                return None
        return chosen

    def issue(self, command, item):
        self.history.setdefault(command, {})[item.bank] = self.now
        self.counts[command] = self.counts.get(command, 0) + 1
        if command == "ACT":
            self.rows[item.bank] = item.row
        elif command == "ACT16":
            self.rows = [item.row] * len(self.rows)
        elif command == "PRE":
            self.rows[item.bank] = None
        elif command in ("PREA", "WRA16"):
            self.rows = [None] * len(self.rows)

    def tick(self):
        self.now += 1
        if self.pending_reads and self.pending_reads[0].depart <= self.now:
            item = self.pending_reads[0]
            if item.final not in ("EOC", "SYNC") or not self.pending_writes:
                self.pending_reads.popleft()
                if item.blocking:
                    self.answer(item)
        self.pending_writes = [item for item in self.pending_writes if item.depart > self.now]
        if self.refresh and self.now % self.machine.timing["nREFI"] == 0:
            self.priority.append(Item("REFab", None, 0, -1, False, False))
        chosen = self.schedule()
        if chosen is not None:
            item, queue = chosen
            command = self.needed(item)
            if item.final in ("SYNC", "EOC"):
                item.depart = self.now
                self.pending_reads.append(item)
                queue.remove(item)
            elif self.register != item.register:
                self.register = not self.register
                self.issue("TMOD", item)
            else:
                self.issue(command, item)
                if command == item.final:
                    queue.remove(item)
                    item.depart = self.now + evaluate(AIM_LATENCIES.get(command, "1"), self.machine.timing)
                    if item.final == "RD" or item.blocking:
                        self.pending_reads.append(item)
                    elif item.final != "REFab":
                        self.pending_writes.append(item)
                elif command == "ACT" and item.kind != "aim":
                    queue.remove(item)
                    self.opened.append(item)
        self.active += any(row is not None for row in self.rows)


def items(command, host, cfr):
    """Channel items of a request: (channel or None for all, item) in the order in which they are sent."""
    final = FINAL.get(type(command))
    if final is None:
        return []
    row = (1 << 29) + cfr.get(2, 0) if final == "AF16" else getattr(command, "row", 0)

    def item():
        return Item(final, getattr(command, "bank", None), row, host, command.blocking, command.register_mode)

    if isinstance(command, (WriteMem, ReadMem)):
        return [(command.channel, item())]
    if isinstance(command, (Sync, Eoc)):
        return [(None, item)]
    return [(channel, item()) for _ in range(getattr(command, "size", 1)) for channel in channels_of(command.mask)]


def run(commands, machine, refresh=False, limit=200_000):
    """Ticks, DRAM commands by name summed over channels, and channel-ticks with a row open."""
    stalled = 0
    place = 0
    now = 0
    finished = False

    def answer(item):
        nonlocal stalled, place, finished
        assert item.host == place
        stalled -= 1
        if stalled == 0:
            finished = item.final == "EOC"
            place += 1

    controllers = [Controller(machine, refresh, answer) for _ in range(machine.channels)]
    remaining = [deque() for _ in controllers]
    cfr = {}
    while not finished:
        now += 1
        assert now < limit, "no end"
        was, left = False, False
        for controller, queue in zip(controllers, remaining):
            while queue:
                was = True
                if not controller.send(queue[0]):
                    left = True
                    break
                queue.popleft()
        if stalled == 0:
            if was:
                place += not left
            elif place < len(commands):
                command = commands[place]
                if isinstance(command, WriteCfr):
                    cfr[command.cfr] = command.value
                sent = True
                for channel, item in items(command, place, cfr):
                    for number in range(machine.channels) if channel is None else (channel,):
                        each = item() if channel is None else item
                        if remaining[number] or not controllers[number].send(each):
                            remaining[number].append(each)
                            sent = False
                        stalled += command.blocking
                place += sent and stalled == 0
        for controller in controllers:
            controller.tick()
    counts = {}
    for controller in controllers:
        for name, count in controller.counts.items():
            counts[name] = counts.get(name, 0) + count
    return now, counts, sum(controller.active for controller in controllers)
