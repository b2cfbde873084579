"""AiM's requests as Tensor IR intrinsics: what each does to its operands, and what an encoder needs to know.

Memories of a kernel: ``aim.gb`` are the global buffers (columns, channels, lanes), ``aim.mac`` the accumulators
(1, channels, banks), ``aim.af`` the results of activation functions, ``aim.gpr`` the registers (registers, lanes).
Banks are a parameter (rows x columns, channels, banks, lanes), so that an element is one column of every bank; so are
registers that hold constants, and what the host writes and reads. Operands are windows whose first index is an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from nestc.runtime.aim import activation
from nestc.runtime.aim.commands import CFR_AF, channels_of
from nestc.runtime.aim.machine import AimMachine
from nestc.tensor import index as ix
from nestc.tensor.build import constant
from nestc.tensor.ir import (
    Binary,
    Block,
    Buffer,
    Call,
    Cast,
    Expr,
    For,
    Intrinsic,
    Load,
    Shuffle,
    Stmt,
    Store,
    Unary,
    Var,
)

GB, MAC, AF, GPR = "aim.gb", "aim.mac", "aim.af", "aim.gpr"
_ZERO = ix.const(0)


@dataclass(frozen=True, eq=False)
class Column(Intrinsic):
    """A request on columns of banks or global buffers of the channels in ``mask``.

    Operands: ``WR_GB`` (global buffer, registers), ``MAC_ABK`` (accumulators, banks, global buffer), ``EWMUL`` (banks).
    """

    request: str = ""
    size: int = 1
    mask: int = 0


@dataclass(frozen=True, eq=False)
class Register(Intrinsic):
    """A request on accumulators and registers: ``WR_BIAS`` (accumulators, registers), ``RD_MAC`` (registers,
    accumulators), ``AF`` (results, accumulators), ``RD_AF`` (registers, results)."""

    request: str = ""
    mask: int = 0


@dataclass(frozen=True, eq=False)
class Bank(Intrinsic):
    """One column of one bank: ``WR_SBK`` (banks, registers), ``RD_SBK`` (registers, banks)."""

    request: str = ""
    mask: int = 0
    bank: int = 0


@dataclass(frozen=True, eq=False)
class Add(Intrinsic):
    """EWADD of `size` registers: operands (registers, registers), the first of which become the sums."""

    size: int = 1


@dataclass(frozen=True, eq=False)
class Wait(Intrinsic):
    """SYNC; no operands."""


@dataclass(frozen=True, eq=False)
class Host(Intrinsic):
    """The host writes a register: operands (registers, host), or reads one: (host, registers)."""

    write: bool = True


@dataclass(frozen=True, eq=False)
class Configure(Intrinsic):
    """Write a configuration register; no operands."""

    cfr: int = 0
    value: int = 0


@dataclass(frozen=True)
class Set:
    """The intrinsics of a machine for one 16-bit format."""

    machine: AimMachine
    number: str

    # --- buffers

    def buffers(self) -> Buffer:
        """The global buffers."""
        m = self.machine
        return Buffer("gb", self.number, (m.global_buffer_columns, m.channels, m.lanes), GB)

    def accumulators(self) -> Buffer:
        """The accumulators."""
        return Buffer("mac", "float32", (1, self.machine.channels, self.machine.banks), MAC)

    def results(self) -> Buffer:
        """The results of activation functions."""
        return Buffer("af", self.number, (1, self.machine.channels, self.machine.banks), AF)

    def registers(self, count: int) -> Buffer:
        """The first `count` registers that a kernel may write."""
        return Buffer("gpr", self.number, (count, self.machine.lanes), GPR)

    def lines(self, name: str, count: int) -> Buffer:
        """A parameter of `count` elements of a register's size: constant registers, or numbers of the host."""
        return Buffer(name, self.number, (count, self.machine.lanes))

    def banks(self, name: str, rows: int) -> Buffer:
        """A parameter: `rows` rows of every bank."""
        m = self.machine
        return Buffer(name, self.number, (rows * m.columns, m.channels, m.banks, m.lanes))

    # --- requests

    def write_buffer(self, size: int, mask: int) -> Column:
        """WR_GB: `size` registers to columns of the global buffers, the same to every channel."""
        m = self.machine
        gb = Buffer("gb", self.number, (size, m.channels, m.lanes))
        gpr = Buffer("gpr", self.number, (size, m.lanes))
        column = Var("column", size)
        value = Load(gpr, (column, _ZERO), m.lanes)
        body = For(column, tuple(Store(gb, (column, ix.const(c), _ZERO), value) for c in channels_of(mask)))
        return Column(f"wr_gb[{size}, {mask:#x}]", (gb, gpr), (body,), "WR_GB", size, mask)

    def multiply(self, size: int, mask: int) -> Column:
        """MAC_ABK: accumulators += columns of banks times columns of global buffers, one column after the other.

        The 16 products are added in pairs, in float32 (see `runtime.aim.simulate.multiply_accumulate`).
        """
        m = self.machine
        mac = Buffer("mac", "float32", (1, m.channels, m.banks))
        weights = Buffer("banks", self.number, (size, m.channels, m.banks, m.lanes))
        gb = Buffer("gb", self.number, (size, m.channels, m.lanes))
        column, bank = Var("column", size), Var("bank", m.banks)
        steps: list[Stmt] = []
        for c in map(ix.const, channels_of(mask)):
            w = Cast(Load(weights, (column, c, bank, _ZERO), m.lanes), "float32")
            x = Cast(Load(gb, (column, c, _ZERO), m.lanes), "float32")
            place = (_ZERO, c, bank)
            total = Binary("add", Load(mac, place), _tree(Binary("mul", w, x)))
            steps.append(Store(mac, place, total))
        body = For(column, (For(bank, tuple(steps)),))
        return Column(f"mac_abk[{size}, {mask:#x}]", (mac, weights, gb), (body,), "MAC_ABK", size, mask)

    def open_row(self, mask: int) -> Column:
        """EWMUL of one column in the first bank group: bank 2 = bank 0 * bank 1. It opens the row on the way."""
        return self.multiply_banks(1, mask, 1)

    def multiply_banks(self, size: int, mask: int, groups: int) -> Column:
        """EWMUL of `size` columns in the first `groups` bank groups: bank 2 of each = bank 0 * bank 1."""
        m = self.machine
        banks = Buffer("banks", self.number, (size, m.channels, m.banks, m.lanes))
        column = Var("column", size)
        steps: list[Stmt] = []
        for c in map(ix.const, channels_of(mask)):
            for group in range(0, groups * m.banks_per_group, m.banks_per_group):
                places = [(column, c, ix.const(group + bank), _ZERO) for bank in range(3)]
                first, second = (Cast(Load(banks, place, m.lanes), "float32") for place in places[:2])
                steps.append(Store(banks, places[2], Cast(Binary("mul", first, second), self.number)))
        name = f"ewmul[{mask:#x}]" if (size, groups) == (1, 1) else f"ewmul[{size}, {mask:#x}, {groups}]"
        return Column(name, (banks,), (For(column, tuple(steps)),), "EWMUL", size, mask)

    def write_bank(self, mask: int, bank: int) -> Bank:
        """WR_SBK: a column of `bank` of the i-th channel of the mask = register i."""
        return self._bank("wr_sbk", mask, bank)

    def read_bank(self, mask: int, bank: int) -> Bank:
        """RD_SBK: register i = a column of `bank` of the i-th channel of the mask."""
        return self._bank("rd_sbk", mask, bank)

    def _bank(self, name: str, mask: int, bank: int) -> Bank:
        m = self.machine
        channels = channels_of(mask)
        banks = Buffer("banks", self.number, (1, m.channels, m.banks, m.lanes))
        gpr = Buffer("gpr", self.number, (len(channels), m.lanes))
        write = name == "wr_sbk"
        steps: list[Stmt] = []
        for i, c in enumerate(channels):
            column, register = (_ZERO, ix.const(c), ix.const(bank), _ZERO), (ix.const(i), _ZERO)
            if write:
                steps.append(Store(banks, column, Load(gpr, register, m.lanes)))
            else:
                steps.append(Store(gpr, register, Load(banks, column, m.lanes)))
        params = (banks, gpr) if write else (gpr, banks)
        return Bank(f"{name}[{mask:#x}, {bank}]", params, tuple(steps), name.upper(), mask, bank)

    def add_registers(self) -> Add:
        """EWADD of one register: it += the other, rounded to the format."""
        lanes = self.machine.lanes
        gpr, other = Buffer("gpr", self.number, (1, lanes)), Buffer("other", self.number, (1, lanes))
        place = (_ZERO, _ZERO)
        first, second = (Cast(Load(each, place, lanes), "float32") for each in (gpr, other))
        body: Block = (Store(gpr, place, Cast(Binary("add", first, second), self.number)),)
        return Add("ewadd[1]", (gpr, other), body, 1)

    def write_bias(self, mask: int) -> Register:
        """WR_BIAS: accumulators of the i-th channel of the mask = register i."""
        m = self.machine
        channels = channels_of(mask)
        mac = Buffer("mac", "float32", (1, m.channels, m.banks))
        gpr = Buffer("gpr", self.number, (len(channels), m.lanes))
        body = tuple(
            Store(mac, (_ZERO, ix.const(c), _ZERO), Cast(Load(gpr, (ix.const(i), _ZERO), m.banks), "float32"))
            for i, c in enumerate(channels)
        )
        return Register(f"wr_bias[{mask:#x}]", (mac, gpr), body, "WR_BIAS", mask)

    def read_sums(self, mask: int, results: bool = False) -> Register:
        """RD_MAC, or RD_AF for `results`: register i = accumulators of the i-th channel, rounded to 16 bits."""
        m = self.machine
        channels = channels_of(mask)
        dtype = self.number if results else "float32"
        source = Buffer("source", dtype, (1, m.channels, m.banks))
        gpr = Buffer("gpr", self.number, (len(channels), m.lanes))
        steps: list[Stmt] = []
        for i, c in enumerate(channels):
            value: Expr = Load(source, (_ZERO, ix.const(c), _ZERO), m.banks)
            value = value if results else Cast(value, self.number)
            steps.append(Store(gpr, (ix.const(i), _ZERO), value))
        request = "RD_AF" if results else "RD_MAC"
        return Register(f"{request.lower()}[{mask:#x}]", (gpr, source), tuple(steps), request, mask)

    def apply(self, name: str, mask: int) -> Register:
        """AF: results = the activation function `name` of accumulators.

        The body is the exact function (``relu`` is exact in the machine, too); the machine interpolates in a table.
        """
        m = self.machine
        af = Buffer("af", self.number, (1, m.channels, m.banks))
        mac = Buffer("mac", "float32", (1, m.channels, m.banks))
        steps = tuple(
            Store(af, place, Cast(_curve(name, Load(mac, place, m.banks)), self.number))
            for place in ((_ZERO, ix.const(c), _ZERO) for c in channels_of(mask))
        )
        return Register(f"af.{name}[{mask:#x}]", (af, mac), steps, "AF", mask)

    def write_register(self) -> Host:
        """W GPR: a register = a line of the host's."""
        return self._move("w_gpr", "gpr", "host", True)

    def read_register(self) -> Host:
        """R GPR: a line of the host's = a register."""
        return self._move("r_gpr", "host", "gpr", False)

    def _move(self, name: str, to: str, source: str, write: bool) -> Host:
        lanes = self.machine.lanes
        a, b = Buffer(to, self.number, (1, lanes)), Buffer(source, self.number, (1, lanes))
        body: Block = (Store(a, (_ZERO, _ZERO), Load(b, (_ZERO, _ZERO), lanes)),)
        return Host(name, (a, b), body, write)


def configure(cfr: int, value: int) -> Call:
    """W CFR: a configuration register = `value`."""
    return Call(Configure(f"w_cfr[{cfr}, {value}]", (), (), cfr, value), ())


def wait() -> Call:
    """SYNC: everything before is done."""
    return Call(Wait("sync", (), ()), ())


def select_function(name: str) -> Call:
    """W CFR that selects the activation function of AF."""
    return configure(CFR_AF, activation.FUNCTIONS.index(name))


def _tree(x: Expr) -> Expr:
    """The sum of all lanes, neighbours first."""
    while x.lanes > 1:
        even = tuple(range(0, x.lanes, 2))
        x = Binary("add", Shuffle(x, x, even), Shuffle(x, x, tuple(p + 1 for p in even)))
    return x


def _curve(name: str, x: Expr) -> Expr:
    """An activation function."""
    if name == "relu":
        return Binary("max", x, constant(0, "float32", x.lanes))
    if name == "tanh":
        return Unary("tanh", x)
    one = constant(1, "float32", x.lanes)
    if name == "sigmoid":
        return Binary("div", one, Binary("add", one, Unary("exp", Unary("neg", x))))
    half, root = constant(0.5, "float32", x.lanes), constant(0.5**0.5, "float32", x.lanes)
    return Binary("mul", Binary("mul", half, x), Binary("add", one, Unary("erf", Binary("mul", x, root))))
