"""A modelled execution as trace events for Perfetto or chrome://tracing: a track an engine, a bar an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from nestc.runtime.vta.isa import ENGINES, Alu, Finish, Instruction, Load, Store
from nestc.runtime.vta.report import Report

Event: TypeAlias = dict[str, object]


def trace(report: Report, instructions: Sequence[Instruction], device: int = 0) -> list[Event]:
    """Events in the Trace Event Format; ``ts`` and ``dur`` are microseconds of modelled time.

    ``device`` is the process of the events, so that those of several devices can be joined in one list.
    """
    events: list[Event] = [
        {"name": "process_name", "ph": "M", "pid": device, "args": {"name": f"vta {device} (modelled)"}}
    ]
    for e, name in enumerate(ENGINES):
        events.append({"name": "thread_name", "ph": "M", "pid": device, "tid": e, "args": {"name": name}})
    microsecond = report.config.clock_hz / 1e6
    for i, instruction in enumerate(instructions):
        start, end = int(report.start[i]), int(report.end[i])
        name, details = _describe(instruction)
        events.append(
            {
                "name": name,
                "ph": "X",
                "pid": device,
                "tid": int(report.engine[i]),
                "ts": start / microsecond,
                "dur": (end - start) / microsecond,
                "args": {"instruction": i, "start": start, "cycles": end - start, **details},
            }
        )
    return events


def _describe(instruction: Instruction) -> tuple[str, Event]:
    if isinstance(instruction, (Load, Store)):
        memory = instruction.memory.name.lower() if isinstance(instruction, Load) else "out"
        verb = "load" if isinstance(instruction, Load) else "store"
        name = f"{verb} {memory}" if instruction.x_size else f"wait {memory}"
        details: Event = {"rows": instruction.y_size, "elements": instruction.x_size, "sram": instruction.sram}
        return name, details | {"dram": instruction.dram}
    if isinstance(instruction, Finish):
        return "finish", {}
    count = (instruction.uop_end - instruction.uop_begin) * instruction.iter_out * instruction.iter_in
    if isinstance(instruction, Alu):
        return instruction.op.name.lower(), {"micro_ops": count, "immediate": instruction.use_imm}
    return "reset" if instruction.reset else "gemm", {"micro_ops": count}
