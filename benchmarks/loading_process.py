"""One fresh process of loading.py: imports a runtime, loads a model, calls it; prints milliseconds and MiB as JSON.

    python benchmarks/loading_process.py nestc MODEL.nest INPUTS.npz 1

Nothing but the standard library is imported before the clock starts.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any


def peak_mib() -> float:
    """The most memory this process has had resident, in MiB: mapped files as well as its own."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


def main(engine: str, file: str, inputs: str, threads: int) -> dict[str, float]:
    """Milliseconds of importing and loading, of the first call and of the second, and the peak of memory."""
    begin = time.perf_counter()
    import numpy as np

    run: Any
    if engine == "nestc":
        import nestc

        run = nestc.open(file, threads=threads).run
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        run = partial(session.run, None)
    loaded = time.perf_counter()
    with np.load(inputs) as stored:
        arrays = {name: stored[name] for name in stored.files}
    given = time.perf_counter()
    run(arrays)
    first = time.perf_counter()
    run(arrays)
    second = time.perf_counter()
    return {
        "load_ms": (loaded - begin) * 1e3,
        "first_ms": (first - given) * 1e3,
        "second_ms": (second - first) * 1e3,
        "peak_mib": peak_mib(),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
