"""Runs the node tests of the `onnx` package through nestc, and through ONNX Runtime with the same harness.

    python benchmarks/conformance.py
    python benchmarks/conformance.py --op Conv,MaxPool --list-failures

A case is "native" (right, all of it generated code), "fallback" (right, but an interpreter ran some operator),
"unsupported" (nestc.UnsupportedOp), "wrong" (another value, shape or type), or "crash" (any other error, a dead
process, a timeout). Values are compared with the tolerances that the tests state (for bfloat16 two units in the last
place, as the package's own runner does); outputs that are random by definition are compared in shape and type only.
For float16, float32 and float64 the absolute tolerance is at least four units in the last place of the expected
output's largest element, for both engines: what should be zero in a Fourier transform is rounding noise of that size
in the expected values themselves.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from isolated import Lost, run_isolated
from nestc.errors import Error
from nestc.measure import context
from node_cases import NodeCase, load_cases

if TYPE_CHECKING:
    from onnxruntime import OrtValue

Status = Literal["native", "fallback", "unsupported", "wrong", "crash"]
STATUSES: tuple[Status, ...] = ("native", "fallback", "unsupported", "wrong", "crash")
ENGINES = ("nestc", "onnxruntime")


@dataclass(frozen=True)
class Result:
    """Verdict on one case by one engine; ONNX Runtime's passes count as native. `detail` says why it is not native."""

    name: str
    op: str
    engine: str
    status: Status
    detail: str = ""

    @property
    def passed(self) -> bool:
        """True if the outputs are right."""
        return self.status in ("native", "fallback")


def run_case(name: str, engine: str = "nestc", threads: int = 1) -> Result:
    """Run one case in this process on `threads` threads; every exception becomes a verdict."""
    case = _case(name)
    try:
        inputs, expected = case.data()
        if engine == "nestc":
            outputs, interpreted = _run_nestc(case, inputs, threads)
        else:
            outputs, interpreted = _run_onnxruntime(case, inputs, threads), {}
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is its verdict
        kind = type(error).__name__
        status: Status = "unsupported" if kind in ("UnsupportedOp", "NotImplemented") else "crash"
        return Result(name, case.op, engine, status, f"{kind}: {' '.join(str(error).split())}"[:500])
    difference = compare(case, expected, outputs)
    if difference:
        return Result(name, case.op, engine, "wrong", difference)
    if interpreted:
        return Result(name, case.op, engine, "fallback", "interpreted: " + ", ".join(sorted(interpreted)))
    return Result(name, case.op, engine, "native")


_CASES: dict[str, NodeCase] = {}


def _case(name: str) -> NodeCase:
    if not _CASES:
        _CASES.update((case.name, case) for case in load_cases())
    if name not in _CASES:
        raise Error(f"the onnx package has no node test {name!r} with dense inputs and outputs")
    return _CASES[name]


def _run_nestc(
    case: NodeCase, inputs: Mapping[str, np.ndarray], threads: int
) -> tuple[list[np.ndarray], Mapping[str, int]]:
    import nestc

    executable = nestc.compile(case.file, targets=["cpu"], threads=threads)
    outputs = executable.run(inputs)
    return list(outputs.values()), executable.fallback_ops


def _run_onnxruntime(case: NodeCase, inputs: Mapping[str, np.ndarray], threads: int) -> list[np.ndarray]:
    """Its Python interface has only numpy's types: inputs of others become constants, outputs are read as raw bits."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    model = onnx.load(str(case.file))
    odd = {name for name, array in inputs.items() if not _in_numpy(array.dtype)}
    kept = [value for value in model.graph.input if value.name not in odd]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(inputs[name], name) for name in odd)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {name: array for name, array in inputs.items() if name not in odd}
    declared = [value.type.tensor_type.elem_type for value in model.graph.output]
    if all(_in_numpy(helper.tensor_dtype_to_np_dtype(element)) for element in declared):
        return [np.asarray(output) for output in session.run(None, feeds)]
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for value in model.graph.output:
        binding.bind_output(value.name)
    session.run_with_iobinding(binding)
    return [_from_bits(value) for value in binding.get_outputs()]


def _in_numpy(dtype: np.dtype[np.generic]) -> bool:
    return dtype.isbuiltin == 1  # 2: registered by a package such as ml_dtypes


def _from_bits(value: OrtValue) -> np.ndarray:
    """An output of any element type, by way of a TensorProto, which knows how small types are packed."""
    element, shape = value.element_type(), value.shape()
    if _in_numpy(helper.tensor_dtype_to_np_dtype(element)):
        return value.numpy()
    count = int(np.prod(shape))
    bits = numpy_helper.from_array(np.zeros(count, helper.tensor_dtype_to_np_dtype(element))).raw_data
    return numpy_helper.to_array(
        helper.make_tensor("", element, shape, ctypes.string_at(value.data_ptr(), len(bits)), raw=True)
    )


def compare(case: NodeCase, expected: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> str:
    """What differs between expected and actual outputs, in words; empty if nothing does."""
    if len(expected) != len(outputs):
        return f"{len(outputs)} outputs where {len(expected)} are expected"
    for index, (want, got) in enumerate(zip(expected, outputs, strict=True)):
        if want.shape != got.shape:
            return f"output {index} has shape {got.shape}, expected {want.shape}"
        texts = want.dtype == object and got.dtype.kind in "OUT"  # numpy has several ways to hold strings
        if want.dtype != got.dtype and not texts:
            return f"output {index} has type {got.dtype}, expected {want.dtype}"
        if case.random:
            continue
        if texts:
            if want.tolist() != got.tolist():
                return f"output {index} has other strings"
            continue
        rtol = case.rtol
        if want.dtype == ml_dtypes.bfloat16:
            rtol = max(rtol, 2.0**-6)
        a, b = (want, got) if _in_numpy(want.dtype) else (want.astype(np.float32), got.astype(np.float32))
        close = np.isclose(b, a, rtol=rtol, atol=max(case.atol, _noise(want)), equal_nan=True)
        if not close.all():
            worst = int(np.argmax(~close))
            return (
                f"output {index} differs in {int((~close).sum())} of {close.size} elements, "
                f"first {b.flat[worst]} where {a.flat[worst]} is expected"
            )
    return ""


def _noise(expected: np.ndarray) -> float:
    """Four units in the last place of the largest finite element of floats that numpy has, else 0."""
    if expected.dtype.kind != "f" or not _in_numpy(expected.dtype):
        return 0.0
    finite = np.abs(expected[np.isfinite(expected)])
    return 4 * float(np.spacing(finite.max())) if finite.size else 0.0


def _run_task(task: tuple[str, str, int]) -> Result:
    return run_case(*task)


def run_all(
    cases: Sequence[NodeCase],
    engines: Sequence[str],
    jobs: int,
    timeout: float,
    tell: Callable[[str], None],
    threads: int = 1,
) -> Iterator[Result]:
    """Verdicts of all cases by all engines, each case isolated from the others."""
    ops = {case.name: case.op for case in cases}
    tasks = [(case.name, engine, threads) for engine in engines for case in cases]
    for count, (task, answer) in enumerate(run_isolated(_run_task, tasks, jobs, timeout), 1):
        name, engine, _ = task
        yield Result(name, ops[name], engine, "crash", answer.reason) if isinstance(answer, Lost) else answer
        if count % 100 == 0:
            tell(f"{count} of {len(tasks)}")


def summarize(results: Sequence[Result], cases: Sequence[NodeCase]) -> dict[str, object]:
    """The JSON object of the contract."""
    ours = [r for r in results if r.engine == "nestc"]
    theirs = {r.name for r in results if r.engine == "onnxruntime" and r.passed}
    counts = Counter(r.status for r in ours)
    by_op: dict[str, dict[str, int]] = {}
    for case in cases:
        row = by_op.setdefault(case.op, {**dict.fromkeys(STATUSES, 0), "total": 0, "onnxruntime": 0})
        row["total"] += 1
        row["onnxruntime"] += case.name in theirs
    for result in ours:
        by_op[result.op][result.status] += 1
    return {
        **{status: counts[status] for status in STATUSES},
        "total": len(cases),
        "onnxruntime": {"pass": len(theirs)},
        "by_op": dict(sorted(by_op.items())),
        "failures": [
            {"name": r.name, "op": r.op, "status": r.status, "detail": r.detail}
            for r in ours
            if r.status not in ("native", "fallback")
        ],
        "context": context(data=f"node tests of onnx {onnx.__version__}, dense tensors only", seed=None),
    }


def print_table(summary: Mapping[str, object]) -> None:
    """One line an operator, then the sums."""
    by_op: Mapping[str, Mapping[str, int]] = summary["by_op"]  # type: ignore[assignment]
    head = (*STATUSES, "total", "onnxruntime")
    print(f"{'operator':28}" + "".join(f"{column:>12}" for column in head))
    for op, row in by_op.items():
        print(f"{op:28}" + "".join(f"{row[column]:>12}" for column in head))
    sums = {column: sum(row[column] for row in by_op.values()) for column in head}
    print(f"{'all':28}" + "".join(f"{sums[column]:>12}" for column in head))
    total = max(1, sums["total"])
    print(f"{'%':28}" + "".join(f"{100 * sums[column] / total:>12.1f}" for column in head))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases asked for and print the table."""
    parser = argparse.ArgumentParser(
        description="ONNX node tests through nestc and ONNX Runtime.",
        epilog="example: python benchmarks/conformance.py --op Conv,Resize --list-failures",
    )
    parser.add_argument("--op", help="comma-separated operators; default: all")
    parser.add_argument("--models", help="comma-separated case names (test_...); default: all")
    parser.add_argument("--engine", choices=(*ENGINES, "both"), default="both")
    parser.add_argument("--threads", type=int, default=1, help="threads a case runs on (default 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes (default: CPUs)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one case (default 60)")
    parser.add_argument("--list-failures", action="store_true", help="name every case that does not pass, and why")
    parser.add_argument("--list-fallbacks", action="store_true", help="name every case that an interpreter helps with")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    cases = load_cases()
    if options.op:
        wanted = {op.strip() for op in options.op.split(",")}
        cases = [case for case in cases if case.op in wanted]
    if options.models:
        wanted = {name.strip() for name in options.models.split(",")}
        cases = [case for case in cases if case.name in wanted]
    if not cases:
        print("error: no node test is about what --op or --models names", file=sys.stderr)
        return 2
    engines = ENGINES if options.engine == "both" else (options.engine,)
    tell = (lambda text: print(text, file=sys.stderr)) if sys.stderr.isatty() else (lambda text: None)
    results = list(run_all(cases, engines, options.jobs, options.timeout, tell, options.threads))
    summary = summarize(results, cases)
    if options.json:
        print(json.dumps(summary))
        return 0
    print_table(summary)
    listed = {status for status in STATUSES[2:] if options.list_failures}
    listed |= {"fallback"} if options.list_fallbacks else set()
    for result in sorted(results, key=lambda r: (r.engine, r.status, r.op, r.name)):
        if result.status in listed:
            print(f"{result.engine:12} {result.status:12} {result.name}: {result.detail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
