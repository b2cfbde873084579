"""Measures what one core (or several) can do at most: independent chains of one arithmetic instruction, no memory.

fp32: fused multiply-add at the machine's vector width. bf16 (VDPBF16PS, BFMMLA) and int8 (VPDPBUSD, SMMLA/SDOT): None
where the processor has no such instruction; but with AVX2 alone int8 is what exact products of bytes widened to 16 bits
reach, a VPMADDWD and a VPADDD at a time.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding as llvm

from nestc.measure.machine import usable_cores

SECONDS = 0.05
TRIES = 7


@dataclass(frozen=True)
class Probe:
    """One instruction: vector type of its accumulator, assembly (or None for llvm.fma), and operations it does."""

    vector: str
    operations: int
    chains: int
    assembly: tuple[str, str] | None = None


@lru_cache(maxsize=1)
def host() -> tuple[str, str, Mapping[str, bool]]:
    """Triple, processor name and features of this machine."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    return llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features()


def probes(triple: str, features: Mapping[str, bool]) -> dict[str, Probe | None]:
    """The widest instruction of each kind that these features allow.

    Chains: enough to hide four cycles of latency on two or more units, and no more than there are registers.
    """

    def has(name: str) -> bool:
        return bool(features.get(name))

    if triple.startswith(("x86_64", "i686")):
        constraint = "=v,0,v,v"
        if has("avx512f"):
            fp32 = Probe("<16 x float>", 32, 24)
        elif has("fma"):
            fp32 = Probe("<8 x float>", 16, 12)
        else:
            fp32 = Probe("<4 x float>", 8, 12)
        bf16 = Probe("<16 x i32>", 64, 24, ("vdpbf16ps $3, $2, $0", constraint)) if has("avx512bf16") else None
        int8 = None
        if has("avx512vnni"):
            int8 = Probe("<16 x i32>", 128, 24, ("vpdpbusd $3, $2, $0", constraint))
        elif has("avxvnni"):
            int8 = Probe("<8 x i32>", 64, 12, ("{vex} vpdpbusd $3, $2, $0", "=x,0,x,x"))
        elif has("avx2"):
            pair = "vpmaddwd $3, $2, %ymm15; vpaddd %ymm15, $0, $0"
            int8 = Probe("<8 x i32>", 32, 12, (pair, "=x,0,x,x,~{ymm15}"))
        return {"fp32": fp32, "bf16": bf16, "int8": int8}
    if triple.startswith(("aarch64", "arm64")):
        constraint = "=w,0,w,w"
        bf16 = Probe("<4 x i32>", 32, 24, ("bfmmla $0.4s, $2.8h, $3.8h", constraint)) if has("bf16") else None
        int8 = None
        if has("i8mm"):
            int8 = Probe("<4 x i32>", 64, 24, ("smmla $0.4s, $2.16b, $3.16b", constraint))
        elif has("dotprod"):
            int8 = Probe("<4 x i32>", 32, 24, ("sdot $0.4s, $2.16b, $3.16b", constraint))
        return {"fp32": Probe("<4 x float>", 8, 24), "bf16": bf16, "int8": int8}
    return {"fp32": Probe("<4 x float>", 8, 12), "bf16": None, "int8": None}


def source(probe: Probe, triple: str) -> str:
    """LLVM IR of ``void probe(i64 rounds, ptr operands, ptr sink)``: each round advances every chain by one."""
    vector = probe.vector
    lines = [f'target triple = "{triple}"']
    suffix = f"v{vector[1:].split(' ')[0]}f32"
    if probe.assembly is None:
        lines.append(f"declare {vector} @llvm.fma.{suffix}({vector}, {vector}, {vector})")
    lines += [
        "define void @probe(i64 %rounds, ptr %operands, ptr %sink) {",
        "entry:",
        f"  %a = load {vector}, ptr %operands, align 4",
        f"  %q = getelementptr {vector}, ptr %operands, i64 1",
        f"  %b = load {vector}, ptr %q, align 4",
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [ 0, %entry ], [ %next, %loop ]",
    ]
    chains = range(probe.chains)
    lines += [f"  %p{c} = phi {vector} [ %a, %entry ], [ %r{c}, %loop ]" for c in chains]
    for c in chains:
        if probe.assembly is None:
            lines.append(f"  %r{c} = call {vector} @llvm.fma.{suffix}({vector} %a, {vector} %b, {vector} %p{c})")
        else:
            text, constraint = probe.assembly
            lines.append(
                f'  %r{c} = call {vector} asm "{text}", "{constraint}"({vector} %p{c}, {vector} %a, {vector} %b)'
            )
    lines += [
        "  %next = add i64 %i, 1",
        "  %more = icmp ult i64 %next, %rounds",
        "  br i1 %more, label %loop, label %done",
        "done:",
    ]
    for c in chains:
        lines.append(f"  %s{c} = getelementptr {vector}, ptr %sink, i64 {c}")
        lines.append(f"  store {vector} %r{c}, ptr %s{c}, align 4")
    return "\n".join([*lines, "  ret void", "}"])


def compile_probe(probe: Probe, triple: str, cpu: str, features: Mapping[str, bool]) -> llvm.ExecutionEngine:
    """Machine code of a probe for this machine."""
    listed = ",".join(f"{'+' if on else '-'}{name}" for name, on in features.items())
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=listed, opt=2)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(source(probe, triple)), machine)
    engine.finalize_object()
    return engine


class Meter:
    """A compiled probe that can be run again and again, beside what is compared with it."""

    def __init__(self, probe: Probe, threads: int = 1, seconds: float = SECONDS) -> None:
        self.probe = probe
        self.threads = threads
        self._engine = compile_probe(probe, *host())
        # A plain C function: ctypes lets go of the interpreter's lock while it runs.
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)(
            self._engine.get_function_address("probe")
        )
        rounds = 1000
        while (took := _once(self._function, rounds, 1)) < seconds / 4:
            rounds *= 4
        self._rounds = max(1, int(rounds * seconds / took))

    def once(self) -> float:
        """Billions of operations per second that the cores do together at this moment."""
        took = _once(self._function, self._rounds, self.threads)
        return self.threads * self._rounds * self.probe.chains * self.probe.operations / took / 1e9


def meter_of(kind: str, threads: int = 1, seconds: float = 0.004) -> Meter | None:
    """A meter of the peak of a number format (``fp32``, ``bf16``, ``int8``) that takes some milliseconds a reading;
    None where there is no such instruction."""
    triple, _, features = host()
    probe = probes(triple, features)[kind]
    return None if probe is None else Meter(probe, threads, seconds)


def measure(probe: Probe, threads: int = 1) -> float:
    """Billions of operations per second that `threads` cores do together; the best of some tries."""
    meter = Meter(probe, threads)
    return max(meter.once() for _ in range(TRIES))


def _once(function: Callable[[int, int, int], None], rounds: int, threads: int) -> float:
    """Seconds from the moment all threads begin until the last has ended, each on a core of its own."""
    cores = usable_cores()[-threads:]
    gate = threading.Barrier(threads)
    spans: list[tuple[float, float]] = []

    def work(core: int) -> None:
        # Zeros: fused multiply-adds of zeros neither overflow nor become denormal, and cost what others cost.
        operands, sink = (ctypes.c_float * 64)(), (ctypes.c_float * 2048)()
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, [core])
        gate.wait()
        begin = time.perf_counter()
        function(rounds, ctypes.addressof(operands), ctypes.addressof(sink))
        spans.append((begin, time.perf_counter()))

    workers = [threading.Thread(target=work, args=(core,)) for core in cores]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(end for _, end in spans) - min(begin for begin, _ in spans)


@lru_cache(maxsize=8)
def peaks(threads: int = 1) -> dict[str, float | None]:
    """Measured peaks by number format, in GFLOP/s (GOP/s for int8); None where there is no such instruction."""
    triple, _, features = host()
    found = probes(triple, features)
    return {kind: None if probe is None else measure(probe, threads) for kind, probe in found.items()}


def fp32_peak(threads: int = 1) -> float:
    """Measured fp32 peak of `threads` cores in GFLOP/s."""
    value = peaks(threads)["fp32"]
    assert value is not None
    return value
