"""How nestc and onnxruntime stand a busy machine: two threads alone, with one core taken, and two programs at once.

    python benchmarks/threads.py --models mobilenetv2,resnet18

Each line is a situation; every engine of it is called in blocks that take turns, and times are milliseconds a call:
median and the 90th percentile. "One core taken" runs a process that never sleeps, pinned to the second core or not
pinned. "Two at once" calls two executables (or sessions) from two Python threads, each made for two threads; "a call"
is the wall time of all calls over their number. Ratios are of onnxruntime's median to nestc's in the same turns.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.synchronize import Event

import numpy as np
import onnxruntime

import nestc
import zoo
from nestc.measure.timing import SETTLE_SECONDS

Call = Callable[[], object]
_BLOCK = 5  # calls


def session(path: str, inputs: Mapping[str, np.ndarray], threads: int) -> Call:
    """A call of onnxruntime with so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    made = onnxruntime.InferenceSession(path, options)
    return lambda: made.run(None, dict(inputs))


def executable(path: str, inputs: Mapping[str, np.ndarray], threads: int) -> Call:
    """A call of nestc with so many threads."""
    made = nestc.compile(path, targets=["cpu"], threads=threads)
    arrays = list(inputs.values())
    return lambda: made(*arrays)


def in_turns(calls: Mapping[str, Call], runs: int) -> dict[str, list[float]]:
    """Milliseconds of `runs` calls of each, in blocks that take turns.

    A block begins with idle time, in which the other engine's threads stop looking for more work, and a call that does
    not count (see nestc.measure.timing).
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(math.ceil(runs / _BLOCK)):
        for name, call in calls.items():
            time.sleep(SETTLE_SECONDS)
            call()
            for _ in range(_BLOCK):
                begin = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def at_once(first: Call, second: Call, runs: int) -> float:
    """Milliseconds a call, of two callers at the same time."""
    gate = threading.Barrier(3)

    def work(call: Call) -> None:
        call()
        gate.wait()
        for _ in range(runs):
            call()

    callers = [threading.Thread(target=work, args=(call,)) for call in (first, second)]
    for caller in callers:
        caller.start()
    gate.wait()
    begin = time.perf_counter()
    for caller in callers:
        caller.join()
    return 1e3 * (time.perf_counter() - begin) / (2 * runs)


def _burn(core: int | None, stop: Event) -> None:
    if core is not None:
        os.sched_setaffinity(0, [core])
    while not stop.is_set():
        for _ in range(100_000):
            pass


@contextmanager
def taken(core: int | None) -> Iterator[None]:
    """A process that never sleeps, on `core` or wherever the system puts it."""
    stop = multiprocessing.Event()
    process = multiprocessing.Process(target=_burn, args=(core, stop))
    process.start()
    time.sleep(0.3)
    try:
        yield
    finally:
        stop.set()
        process.join()


def show(label: str, times: Mapping[str, list[float]]) -> None:
    """Print one line of a situation."""
    cells = [f"{name} {statistics.median(all_):7.2f} ({np.percentile(all_, 90):7.2f})" for name, all_ in times.items()]
    ratios = [
        f"{n} {statistics.median(times[f'onnxruntime {n}']) / statistics.median(times[f'nestc {n}']):.2f}"
        for n in (1, 2)
    ]
    print(f"  {label:24} {'  '.join(cells)}  ratio by threads: {', '.join(ratios)}", flush=True)


def main() -> None:
    """Parse the options and print the situations of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mobilenetv2", help="names of the zoo, by commas")
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print one JSON object (times in ms) instead of the lines")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    told: dict[str, dict[str, object]] = {}
    for name in options.models.split(","):
        path, inputs = str(zoo.path(name)), zoo.inputs(name)
        makers = {"nestc": executable, "onnxruntime": session}
        calls = {f"{engine} {n}": make(path, inputs, n) for engine, make in makers.items() for n in (1, 2)}
        situations = {"alone": in_turns(calls, options.runs)}
        for label, core in (("one core taken", cores[-1]), ("a busy process anywhere", None)):
            with taken(core):
                situations[label] = in_turns(calls, options.runs)
        both = {
            engine: at_once(make(path, inputs, 2), make(path, inputs, 2), options.runs)
            for engine, make in makers.items()
        }
        told[name] = {**situations, "two at once": both}
        if not options.json:
            print(f"{name}: ms a call, median (90th percentile), by threads")
            for label, times in situations.items():
                show(label, times)
            for engine, took in both.items():
                print(f"  two at once: {engine} {took:.2f} ms a call", flush=True)
    if options.json:
        print(json.dumps(told))


if __name__ == "__main__":
    main()
