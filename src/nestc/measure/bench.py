"""`nestc bench`: times an executable, alone or in turns with the runtimes people use instead."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nestc.errors import Error
from nestc.measure.compare import Difference, difference
from nestc.measure.engines import Engine, Executable, NestcEngine, open_peer
from nestc.measure.machine import peak_rss_mb, pinned, usable_cores
from nestc.measure.timing import Timing, interleave
from nestc.runtime.session import modelled_ms

SIMULATING_SECONDS = 20.0
"""No further run of an executable with a simulated device is begun after so long: the modelled part never varies."""


def bench(
    executable: Executable,
    inputs: Mapping[str, np.ndarray],
    model_path: Path | None = None,
    vs: Sequence[str] = (),
    threads: int = 1,
    runs: int = 30,
    load_ms: float | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Measure `executable` on `inputs` and, interleaved with it, each of `vs` on the ONNX file `model_path`.

    Everything runs on the same `threads` cores, with as many threads each. Returns the JSON object of `nestc bench`:
    times are medians over `runs` blocks, `ratio` is the peer's median over ours, differences are the largest against
    any peer (None without one), ``peak_rss_mb`` is this process's peak before any peer was loaded, and ``load_ms`` is
    what the caller measured. Raises Error where a peer is missing or there are too few cores.

    Where a simulated device takes part, ``nestc`` holds ``modelled_ms`` by device, which is part of its times (the time
    that the simulator takes is not), and no ratio is given: the peers' times are measured ones.
    """
    if runs < 1 or threads < 1:
        raise Error("the numbers of runs and of threads must be at least 1")
    if threads > len(usable_cores()):
        raise Error(f"{threads} threads are asked for, but this process may use only {len(usable_cores())} cores")
    if vs and model_path is None:
        raise Error("comparing needs the ONNX file that the bundle was made of; give the model instead of the bundle")
    with pinned(threads):
        ours = NestcEngine(executable, inputs)
        outputs = ours.outputs()
        peak = peak_rss_mb()
        engines: dict[str, Engine] = {ours.name: ours}
        apart = [Difference(0.0, 0.0)]
        for peer in vs:
            assert model_path is not None
            engines[peer] = open_peer(peer, model_path, inputs, threads)
            apart.append(difference(engines[peer].outputs(), outputs))
        modelled = modelled_ms(executable.timeline())
        if modelled:
            del engines[ours.name]
            own = _modelled_timing(executable, ours, runs)
            timings = interleave({key: engine.run for key, engine in engines.items()}, runs) if engines else {}
        else:
            timings = interleave({key: engine.run for key, engine in engines.items()}, runs)
            own = timings[ours.name]
    return {
        "model": name or (model_path.name if model_path is not None else ""),
        "threads": threads,
        "nestc": {
            "median_ms": own.median_ms,
            "min_ms": own.min_ms,
            "runs": len(own.samples_ms),
            **({"modelled_ms": modelled} if modelled else {}),
        },
        "vs": {
            peer: {
                "version": engines[peer].version,
                "median_ms": timings[peer].median_ms,
                "ratio": None if modelled else timings[peer].median_ms / own.median_ms,
            }
            for peer in vs
        },
        "max_abs_diff": max(each.max_abs for each in apart) if vs else None,
        "max_rel_diff": max(each.max_rel for each in apart) if vs else None,
        "peak_rss_mb": peak,
        "load_ms": load_ms,
    }


def _modelled_timing(executable: Executable, engine: Engine, runs: int) -> Timing:
    """Times of an executable with a simulated device: when its timeline ends, in which the simulator's work is not."""
    samples: list[float] = []
    begin = time.perf_counter()
    while not samples or (len(samples) < runs and time.perf_counter() - begin < SIMULATING_SECONDS):
        engine.run()
        samples.append(max(mark["end_us"] for mark in executable.timeline()) / 1e3)
    return Timing(tuple(samples), min(samples))
