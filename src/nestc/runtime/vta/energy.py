"""Energy that a stream takes by part of the machine: counts of operations times published energies, never measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from nestc.runtime.vta.report import UOP_BYTES, Report


@dataclass(frozen=True)
class Energy:
    """Joules an operation; the defaults are those of a 45 nm process at 0.9 V.

    Source: M. Horowitz, "Computing's Energy Problem (and what we can do about it)", ISSCC 2014, figure 1.1.9: int8
    multiplication 0.2 pJ, int32 addition 0.1 pJ, 64 bits from a memory on the chip of 8 KB 10 pJ, 32 KB 20 pJ, 1 MB
    100 pJ, 64 bits from DRAM 1.3 to 2.6 nJ (here the lower end). Clock, control and leakage are not counted.
    """

    multiply: float = 0.2e-12
    """An int8 multiplication."""
    add: float = 0.1e-12
    """An int32 addition, comparison or shift."""
    sram_word: float = 10e-12
    """64 bits to or from a bank of 8 KB; others in proportion to the root of their size (at most 13 % off)."""
    dram_word: float = 1.3e-9
    """64 bits to or from DRAM."""

    def sram_byte(self, bank_bytes: int) -> float:
        """A byte to or from a bank of `bank_bytes`."""
        return self.sram_word / 8 * sqrt(bank_bytes / 8192)


HOROWITZ_45NM = Energy()


def joules(report: Report, energy: Energy = HOROWITZ_45NM) -> dict[str, float]:
    """Modelled energy by part: ``mac``, ``alu``, ``sram`` and ``dram``, and their sum ``total``.

    SRAMs are banks of 64 bits, as deep as the buffer has elements, which is how the RTL builds them (TensorLoad).
    """
    config, work = report.config, report.work
    lanes = config.batch * config.block
    macs = work.gemm * lanes * config.block
    alu = (work.alu_immediate + work.alu_tensor) * lanes

    def access(elements: int, size: int, depth: int) -> float:
        return elements * size * energy.sram_byte(depth * min(size, 8))

    ops = work.gemm + work.reset + work.alu_immediate + work.alu_tensor
    # A micro-op reads its operands; all but a reset read an accumulator, all write one and its low bits to the output.
    acc = 2 * ops - work.reset + work.alu_tensor + work.read["acc"] // config.acc_bytes
    out = ops + work.written // config.inp_bytes
    sram = (
        access(ops + work.read["uop"] // UOP_BYTES, UOP_BYTES, config.uop_depth)
        + access(work.gemm + work.read["inp"] // config.inp_bytes, config.inp_bytes, config.inp_depth)
        + access(work.gemm + work.read["wgt"] // config.wgt_bytes, config.wgt_bytes, config.wgt_depth)
        + access(acc, config.acc_bytes, config.acc_depth)
        + access(out, config.inp_bytes, config.acc_depth)
    )
    parts = {
        "mac": macs * (energy.multiply + energy.add),
        "alu": alu * energy.add,
        "sram": sram,
        "dram": (work.bus_read + work.bus_written) / 8 * energy.dram_word,
    }
    return parts | {"total": sum(parts.values())}
