"""The generated SPMD program of a partition: a step table, and the native loop in which all workers walk it.

Every worker runs ``<prefix>_main``; nothing returns to Python between steps. The code is the same for every model; the
model is in the constant tables (steps, and the place of every argument), so hundreds of steps compile in milliseconds.

Exported functions (i64 = 64-bit integer):

- ``void <prefix>_main(ptr table, ptr, i64, i64)``: all steps in the caller's thread; only `table` is read.
- ``void <prefix>_run(ptr ctx, ptr table)``: what the caller's thread runs: starts the workers and is worker 0.
- ``void <prefix>_worker(ptr ctx, i64 tid)``: what every other thread runs until ``<prefix>_stop(ptr ctx)``.
- ``void <prefix>_profile(ptr table, ptr ns)``: all steps on one thread; writes the nanoseconds of each (i64).

`ctx` is zeroed, 64-byte aligned memory of ``CONTEXT_BYTES + nthreads * thread_bytes`` with the number of threads at
``CONTEXT_THREADS`` and, at ``CONTEXT_SPINS``, how often a worker looks before it sleeps: in a run, and between runs
(two i64; 0 where there are fewer cores than threads). If the pointer at ``CONTEXT_TRACE`` is not null, worker t writes
the CLOCK_MONOTONIC nanoseconds of the begin and end of its share of step s to ``trace[t][s]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestc.codegen.objects import cached_object
from nestc.codegen.schedule import PARALLEL, Alias, Loop, Schedule, Step, schedule
from nestc.codegen.spmd import emit
from nestc.codegen.spmd_wait import CONTEXT_BYTES, CONTEXT_SPINS, CONTEXT_THREADS, CONTEXT_TRACE
from nestc.graph.region import TensorType
from nestc.kernels.api import CpuMachine

__all__ = ["Alias", "Loop", "Main", "Step", "build_main"]

LAYOUT_VERSION = 1
"""Version of the table, the context and the metadata; `runtime.native` reads exactly this one."""


@dataclass(frozen=True)
class Main:
    """The object file with the exported functions, its LLVM IR, the schedule, and what the runtime must know."""

    object: bytes
    llvm: str
    schedule: Schedule
    metadata: Mapping[str, Any]


def build_main(
    steps: Sequence[Step],
    *,
    inputs: Mapping[str, TensorType],
    outputs: Mapping[str, TensorType],
    constants: Sequence[str],
    sizes: Mapping[str, int],
    machine: CpuMachine,
    aliases: Mapping[str, Alias] | None = None,
    loops: Sequence[Loop] = (),
    scratch_bytes: int = 0,
    threads: int = 1,
    prefix: str = "nestc",
) -> Main:
    """Schedule `steps` and generate the program of a partition; see `schedule` for `sizes`,
    `aliases`, `loops` and `threads`.

    `constants` are names of the artifact's weights. The object for the kernels and ``Main.object`` go into
    ``Artifact.files`` (names ending in ``.o``) and ``Main.metadata`` is ``Artifact.metadata``. Raises ValueError if the
    steps do not fit together, and nestc.Error if LLVM cannot make code for the machine.
    """
    plan = schedule(
        steps,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        constants=constants,
        sizes=sizes,
        aliases=aliases,
        loops=loops,
        scratch_bytes=scratch_bytes,
        threads=threads,
    )
    text = emit(plan, machine.triple, prefix)
    metadata: dict[str, Any] = {
        "layout": LAYOUT_VERSION,
        "triple": machine.triple,
        "cpu": machine.cpu,
        "features": [name[1:] for name in machine.features.split(",") if name.startswith("+")],
        "prefix": prefix,
        "inputs": [_spec(name, type_) for name, type_ in inputs.items()],
        "outputs": [_spec(name, type_) for name, type_ in outputs.items()],
        "constants": list(constants),
        "arena_bytes": plan.arena_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "context": {
            "bytes": CONTEXT_BYTES,
            "thread_bytes": plan.thread_bytes,
            "threads": CONTEXT_THREADS,
            "trace": CONTEXT_TRACE,
            "spins": CONTEXT_SPINS,
        },
        "worth_threads": plan.worth_threads,
        "steps": [
            {
                "symbol": item.step.symbol,
                "origin": list(item.step.origin),
                "extent": item.step.extent,
                "grain": item.grain,
                "parallel": item.lane == PARALLEL,
                "barrier": item.barrier,
                "cost": item.step.cost,
            }
            for item in plan.steps
        ],
    }
    return Main(cached_object(text, machine), text, plan, metadata)


def _spec(name: str, type_: TensorType) -> dict[str, Any]:
    return {"name": name, "dtype": type_.dtype, "shape": list(type_.shape)}
