"""Energy that a stream takes, by part of the machine: counts of commands times published energies, never measured."""

from __future__ import annotations

from collections.abc import Mapping

from nestc.runtime.aim.machine import AimMachine
from nestc.runtime.aim.newton import NewtonReport
from nestc.runtime.aim.timing import Report

# What is counted how often: aim_simulator, scripts/cellar_power_calculator.py (power_calculator). Beyond it, MACs read
# the global buffer. Not counted: the chip beside the memory (its RISC-V cores, SRAMs and PCIe), and refresh.
_TRANSFERS = ("RD", "WR", "WRGB", "RDMAC16", "RDAF16", "WRMAC16", "WRA16")
_REQUESTS = (*_TRANSFERS, "MAC", "MAC16", "AF16", "EWMUL16", "RDCP", "WRCP")
_PICO, _MILLI = 1e-12, 1e-3


def joules(report: Report) -> dict[str, float]:
    """Modelled energy in joules: ``activate``, ``mac``, ``column``, ``transfer``, ``buffer``, ``control``,
    ``background``, and their sum ``total``.

    ``column``: reads and writes of banks that are no MACs, and of registers; ``transfer``: between channels and
    controller; ``control``: the controller's; ``background``: what banks and buffers take all the time.
    """
    machine, count = report.machine, report.issued
    e = machine.energies
    banks = machine.banks
    reads = count["RD"] + count["RDCP"] + banks * count["AF16"] + count["RDMAC16"] + count["RDAF16"]
    writes = count["WR"] + count["WRCP"] + count["WRMAC16"] + banks * count["WRA16"]
    # An EWMUL works on a bank group with the power of its banks (the script's quarter).
    macs = count["MAC"] / banks + count["MAC16"] + count["EWMUL16"] / machine.bank_groups
    picojoules = {
        "activate": e.activate_bank * (count["ACT"] + banks * count["ACT16"]),
        "mac": e.mac_all_banks * macs,
        "column": e.read_column * reads + e.write_column * writes,
        "transfer": e.transfer * _sum(count, _TRANSFERS),
        "buffer": e.global_buffer_read * (count["WRCP"] + count["MAC16"] + count["MAC"])
        + e.global_buffer_write * (count["WRGB"] + count["RDCP"]),
        "control": e.command * sum(count.values()) + e.request * _sum(count, _REQUESTS),
    }
    parts = {name: value * _PICO for name, value in picojoules.items()}
    parts["background"] = _background(machine, report.ticks, report.active)
    return parts | {"total": sum(parts.values())}


def joules_newton(report: NewtonReport) -> dict[str, float]:
    """The same parts for Newton, whose rows are taken to be open all the time."""
    machine, count = report.machine, report.issued
    e = machine.energies
    opened = machine.banks_per_group * sum(n for name, n in count.items() if name.startswith("G_ACT"))
    buffer_columns = machine.global_buffer_columns * count["GWRITE"]
    columns = count["COMP"]
    picojoules = {
        "activate": e.activate_bank * opened,
        "mac": e.mac_all_banks * columns,
        "column": e.read_column * count["READRES"],
        "transfer": e.transfer * (buffer_columns + count["READRES"]),
        "buffer": e.global_buffer_read * columns + e.global_buffer_write * buffer_columns,
        "control": e.command * sum(count.values()) + e.request * (columns + buffer_columns + count["READRES"]),
    }
    parts = {name: value * _PICO for name, value in picojoules.items()}
    parts["background"] = _background(machine, report.ticks, report.ticks * machine.channels)
    return parts | {"total": sum(parts.values())}


def _sum(count: Mapping[str, int], names: tuple[str, ...]) -> int:
    return sum(count[name] for name in names)


def _background(machine: AimMachine, ticks: int, active: int) -> float:
    """Standby of channels with a row open for `active` channel-ticks, of the others, and of the global buffers."""
    e = machine.energies
    total = ticks * machine.channels
    milliwatt_ticks = e.active_mw * active + e.precharged_mw * (total - active) + e.global_buffer_mw * total
    return milliwatt_ticks * _MILLI / machine.clock_hz
