"""A row of benchmarks/partition.py: a network placed in every way, compiled, and run; kept in a folder between the two.

Placing and compiling may share the machine with other work; running may not, so that it is a step of its own.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nestc
import partition_observe as observing
import zoo
from nestc import driver
from nestc.errors import Error
from nestc.measure import PEERS, open_peer, pinned
from nestc.partition.evaluate import pipelined
from partition_cases import PUBLISHED, Case, model_of
from partition_observe import Seen
from partition_plans import OURS, Candidates, best_single, candidates, gain, kind_of

Row = dict[str, Any]

ITSELF = " itself"
"""Behind the name of a library that runs the whole network without nestc."""

NOISE = 15
"""Rounds where all is measured by the wall clock."""

SIMULATED = 3
"""Rounds with simulated devices: these take long, and their share never varies."""


@dataclass(frozen=True)
class Job:
    """A row to be made, in the folder `work`; `rounds`: how often plans are run (None: as usual)."""

    case: Case
    work: Path
    rounds: int | None = None

    @property
    def folder(self) -> Path:
        """Where the row and its bundles are kept."""
        return self.work / self.case.slug


def prepare(job: Job) -> Row:
    """The row as predicted, or one that says what failed."""
    return _told(_prepare, job)


def run(job: Job) -> Row:
    """The row as run, after `prepare`, or one that says what failed."""
    return _told(_observe, job)


def _told(step: Callable[[Job], Row], job: Job) -> Row:
    try:
        return step(job)
    except Exception as error:  # noqa: BLE001 - the table shows what failed and goes on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        return {"model": job.case.model, "devices": job.case.label, "objective": job.case.objective, "error": reason}


def known(job: Job) -> Row | None:
    """The row that is kept, if its bundles are complete."""
    file = job.folder / "row.json"
    return json.loads(file.read_text()) if file.exists() else None


def _prepare(job: Job) -> Row:
    """Place by cost and in all other ways, and compile each plan that differs into the folder."""
    case = job.case
    begun = time.perf_counter()
    model = model_of(case, job.work)
    with pinned(case.threads):
        placement = driver.partition(model, case.devices, objective=case.objective, threads=case.threads)
        placed = time.perf_counter() - begun
        kinds = {region.name: kind_of([op.op_type for op in region.ops]) for region in placement.costed.regions}
        found = candidates(placement, kinds)
        row = _predicted(case, placement.problem, found)
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        for name in found.distinct():
            plan = placement.describe(found.solutions[name]).plan
            plan.save(job.folder / f"{name}.yaml")
            executable = nestc.compile(
                model, targets=case.devices, threads=case.threads, objective=case.objective, plan=plan
            )
            executable.save(job.folder / f"{name}.nest")
            executable.close()
    row |= {"place_seconds": round(placed, 1), "all_seconds": round(time.perf_counter() - begun, 1)}
    _keep(job, row)
    return row


def _predicted(case: Case, problem: Any, found: Candidates) -> Row:
    """What is known before anything runs."""
    ours = found.solutions[OURS]
    unit = "mj" if case.objective == "energy" else "ms"
    values = {name: value * 1e3 for name, value in found.values().items()}
    mine = values.pop(OURS)
    bound = ours.lower_bound * 1e3
    row: Row = {
        "model": case.model,
        "devices": case.label,
        "targets": list(case.devices),
        "objective": case.objective,
        "threads": case.threads,
        "scheme": case.scheme or "float32",
        "modelled": list(case.simulated),
        "regions": len(problem.tasks),
        "partitions": len(ours.stages),
        "used": sorted({stage.unit for stage in ours.stages}),
        f"predicted_{unit}": mine,
        f"lower_bound_{unit}": bound,
        "gap_percent": 100 * (mine / bound - 1) if bound else None,
        "optimal": ours.optimal,
        "method": ours.method,
        "baselines": values,
        "refused": dict(found.refused),
        "same": {name: names for name, names in found.distinct().items() if len(names) > 1},
    }
    if case.objective == "throughput":
        steady = pipelined(problem, ours.stages, observing.REQUESTS, observing.IN_FLIGHT)
        row["predicted_in_flight_ms"] = steady.makespan * 1e3 / observing.REQUESTS
    return row | {"predicted": _compared(mine, values, case.model)}


def _compared(ours: float, others: Mapping[str, float], model: str) -> Row:
    """Gains over the baselines in percent, beside published ones."""
    best = best_single(others)
    return {
        "best_single": best[0] if best else None,
        "times_best_single": best[1] / ours if best else None,
        "gains_percent": {name: gain(value, ours) for name, value in others.items()},
        "published_percent": {name: figures[model] for name, figures in PUBLISHED.items() if model in figures},
    }


def _observe(job: Job) -> Row:
    """Run every plan in turns, and libraries by themselves where all is measured; adds to the row that is kept."""
    row = known(job)
    if row is None:
        raise Error(f"{job.case.slug} is not in {job.work}")
    case = job.case
    inputs = case.inputs()
    # Simulators multiply matrices with several threads, which would wait for each other on one core.
    with nullcontext() if case.simulated else pinned(case.threads):
        opened = {file.stem: nestc.open(file, threads=case.threads) for file in sorted(job.folder.glob("*.nest"))}
        try:
            seen = _run(job, opened, inputs)
        finally:
            for executable in opened.values():
                executable.close()
    for first, names in row["same"].items():
        seen |= dict.fromkeys(names, seen[first])
    unit = "mj" if case.objective == "energy" else "ms"
    others = {name: each.median_ms for name, each in seen.items() if name != OURS}
    ours = seen[OURS]
    plans = {name: value for name, value in others.items() if not name.endswith(ITSELF)}
    row |= {
        f"observed_{unit}": ours.median_ms,
        "observed": {name: each.to_json() for name, each in seen.items()},
        "error_percent": 100 * (row[f"predicted_{unit}"] / ours.median_ms - 1),
        "seen": _compared(ours.median_ms, plans, case.model),
    }
    alone = {name: value for name, value in others.items() if name.endswith(ITSELF) or name == "single_cpu"}
    if not case.simulated and alone:
        fastest = min(alone, key=lambda name: alone[name])
        low, middle, high = observing.ratios(ours, seen[fastest])
        row["fastest_alone"] = {"name": fastest, "ms": alone[fastest], "ratio": middle, "quartiles": [low, high]}
    _keep(job, row)
    return row


def _run(job: Job, opened: Mapping[str, nestc.Executable], inputs: Mapping[str, Any]) -> dict[str, Seen]:
    case = job.case
    if case.objective == "throughput":
        return observing.periods(opened, inputs, job.rounds or 1)
    if case.simulated:
        return observing.by_runtime_clock(opened, inputs, job.rounds or SIMULATED, energy=case.objective == "energy")
    runs: dict[str, Callable[[], object]] = {
        name: (lambda executable=executable: executable.run(inputs)) for name, executable in opened.items()
    }
    for name in case.devices:
        if name in PEERS:
            runs[name + ITSELF] = open_peer(name, zoo.path(case.model), inputs, case.threads).run
    return observing.by_wall_clock(runs, job.rounds or NOISE)


def _keep(job: Job, row: Row) -> None:
    temporary = job.folder / "row.json.part"
    temporary.write_text(json.dumps(row, indent=1))
    temporary.replace(job.folder / "row.json")
