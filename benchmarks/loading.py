"""How long nestc and onnxruntime take until their first answer, and the memory they need at most.

    python benchmarks/loading.py --models resnet50,mnist_conv --rounds 9

Every figure is of a fresh process (loading_process.py): it imports numpy and the runtime, loads the model (a bundle,
compiled before; an ONNX file, which onnxruntime optimizes while it loads) and calls it once. The runtimes take turns;
figures are medians, in milliseconds and MiB. Files are in the system's cache, modules compiled to bytecode (as those of
installed packages are); processes are pinned to the same cores.
Peak memory is all that was resident at once, with what is mapped from files (libraries, a bundle's weights).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nestc
import zoo
from nestc.errors import Error
from nestc.measure import context, pinned, usable_cores

MODELS = ("resnet50", "mobilenetv2", "bert_base", "minilm", "mnist_conv", "silero_vad_16k", "ds_cnn")
ENGINES = ("nestc", "onnxruntime")
_PROCESS = Path(__file__).with_name("loading_process.py")


def measure(name: str, threads: int, rounds: int, folder: Path) -> dict[str, Any]:
    """One row: medians of each runtime, and theirs over ours. Raises Error if a process fails."""
    inputs = folder / f"{name}.npz"
    np.savez(inputs, allow_pickle=False, **zoo.inputs(name))
    bundle = folder / f"{name}.nest"
    shapes = {key: list(array.shape) for key, array in zoo.inputs(name).items()}
    nestc.compile(zoo.path(name), targets=["cpu"], threads=threads, shapes=shapes).save(bundle)
    files = {"nestc": bundle, "onnxruntime": zoo.path(name)}
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    with pinned(threads):
        for number in range(rounds + 1):  # the first round brings files into the system's cache
            for engine in ENGINES:
                seen = _run(engine, files[engine], inputs, threads, folder / "bytecode")
                if number:
                    found[engine].append(seen)
    row: dict[str, Any] = {"model": name, "threads": threads, "rounds": rounds}
    for engine, all_seen in found.items():
        row[engine] = {key: statistics.median(seen[key] for seen in all_seen) for key in all_seen[0]}
        row[engine]["answer_ms"] = statistics.median(seen["load_ms"] + seen["first_ms"] for seen in all_seen)
    row["time_ratio"] = row["onnxruntime"]["answer_ms"] / row["nestc"]["answer_ms"]
    row["memory_ratio"] = row["onnxruntime"]["peak_mib"] / row["nestc"]["peak_mib"]
    return row


def _run(engine: str, file: Path, inputs: Path, threads: int, bytecode: Path) -> dict[str, float]:
    command = [sys.executable, str(_PROCESS), engine, str(file), str(inputs), str(threads)]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Error(f"{engine} fails on {file.name}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def print_row(row: Mapping[str, Any]) -> None:
    """One line of the table."""
    cells = "".join(
        f"{row[engine]['load_ms']:>9.0f}{row[engine]['first_ms']:>9.1f}{row[engine]['peak_mib']:>8.0f}"
        for engine in ENGINES
    )
    print(f"{row['model']:18}{cells}{row['time_ratio']:>9.2f}{row['memory_ratio']:>9.2f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the models asked for."""
    parser = argparse.ArgumentParser(
        description="Time until the first answer, and peak memory, of nestc and onnxruntime.",
        epilog="example: python benchmarks/loading.py --models resnet50,mnist_conv",
    )
    parser.add_argument("--models", default=",".join(MODELS), help=f"names of benchmarks/zoo.py ({','.join(MODELS)})")
    parser.add_argument("--threads", type=int, default=1, help="threads of both (default 1)")
    parser.add_argument("--rounds", type=int, default=7, help="processes of each runtime (default 7)")
    parser.add_argument("--work", type=Path, help="folder for bundles and inputs (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or not 1 <= options.threads <= len(usable_cores()):
        print(f"error: --rounds is at least 1, --threads 1 to {len(usable_cores())} here", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    if not options.json:
        heads = "".join(f"{'load ms':>9}{'call ms':>9}{'MiB':>8}" for _ in ENGINES)
        print(f"{'':18}{'nestc':>26}{'onnxruntime':>26}{'theirs over ours':>18}")
        print(f"{'model':18}{heads}{'time':>9}{'memory':>9}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for model in options.models.split(","):
            try:
                rows.append(measure(model, options.threads, options.rounds, folder))
            except Error as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            if not options.json:
                print_row(rows[-1])
    if options.json:
        facts = context(data="seeded synthetic inputs of benchmarks/zoo.py", seed=0)
        print(json.dumps({"rows": rows, "context": facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
