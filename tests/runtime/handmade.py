"""Bundles made of a few hand-written LLVM kernels, so that the runtime is tested without the compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import llvmlite.binding as llvm
import numpy as np

from nestc.bundle.artifact import Artifact
from nestc.bundle.bundle import Bundle, BundlePartition, TensorSpec
from nestc.codegen.main import Alias, Main, Step, build_main
from nestc.codegen.objects import compile_ir
from nestc.graph.region import TensorType
from nestc.kernels.api import CpuMachine

# for i in [begin, end): out[i] = a[i] OP b[i], float32
_BINARY = """
define void @NAME(ptr %a, ptr %b, ptr %out, ptr %scratch, i64 %begin, i64 %end) {
entry:
  br label %head
head:
  %i = phi i64 [ %begin, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %done
body:
  %pa = getelementptr float, ptr %a, i64 %i
  %pb = getelementptr float, ptr %b, i64 %i
  %po = getelementptr float, ptr %out, i64 %i
  %x = load float, ptr %pa, align 4
  %y = load float, ptr %pb, align 4
  %z = OP float %x, %y
  store float %z, ptr %po, align 4
  %next = add i64 %i, 1
  br label %head
done:
  ret void
}
"""
# out[0] = sum of a[0 .. N), through the scratch memory; serial
_SUM = """
declare float @llvm.fabs.f32(float)
declare float @expf(float)
define void @NAME(ptr %a, ptr %out, ptr %scratch, i64 %begin, i64 %end) {
entry:
  store float 0.0, ptr %scratch, align 64
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, COUNT
  br i1 %more, label %body, label %done
body:
  %pa = getelementptr float, ptr %a, i64 %i
  %x = load float, ptr %pa, align 4
  %s = load float, ptr %scratch, align 64
  %t = fadd float %s, %x
  store float %t, ptr %scratch, align 64
  %next = add i64 %i, 1
  br label %head
done:
  %r = load float, ptr %scratch, align 64
  %e = call float @expf(float 0.0)
  %m = fmul float %r, %e
  store float %m, ptr %out, align 4
  ret void
}
"""


def host_machine(threads: int = 1) -> CpuMachine:
    """This machine, with the vector width of SSE: the hand-written kernels do not look at it."""
    return CpuMachine(
        name="host",
        triple=llvm.get_process_triple(),
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        vector_bytes=16,
        vector_registers=16,
        fma=True,
        l1_bytes=1 << 15,
        l2_bytes=1 << 19,
        l3_bytes=1 << 23,
    )


def kernel(name: str, text: str) -> bytes:
    """Object code of one kernel."""
    return compile_ir(text.replace("NAME", name), host_machine()).code


def binary(name: str, operator: str) -> bytes:
    """Object code of ``out[i] = a[i] OP b[i]`` over float32 (fadd, fsub, fmul)."""
    return kernel(name, _BINARY.replace("OP", operator))


def total(name: str, count: int) -> bytes:
    """Object code of ``out[0] = sum(a)``, serial, using scratch memory and libm."""
    return kernel(name, _SUM.replace("COUNT", str(count)))


OBJECTS = {"add": ("fadd", np.add), "sub": ("fsub", np.subtract), "mul": ("fmul", np.multiply)}


def f32(*shape: int) -> TensorType:
    """The type of a float32 value."""
    return TensorType("float32", shape)


def artifact(main: Main, objects: Mapping[str, bytes], weights: Mapping[str, np.ndarray]) -> Artifact:
    """The artifact of a native partition."""
    return Artifact("cpu-native", {"main.o": main.object, **objects}, weights, main.metadata)


def specs(types: Mapping[str, TensorType]) -> tuple[TensorSpec, ...]:
    """Border values as a bundle describes them."""
    return tuple(TensorSpec(name, type_.dtype, type_.shape) for name, type_ in types.items())


def native_bundle(
    steps: Sequence[Step],
    inputs: Mapping[str, TensorType],
    outputs: Mapping[str, TensorType],
    sizes: Mapping[str, int],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    threads: int = 1,
    aliases: Mapping[str, Alias] | None = None,
    objects: Mapping[str, bytes] | None = None,
    name: str = "handmade",
) -> Bundle:
    """A bundle of one native partition; the kernels add, sub and mul are there unless `objects` are given."""
    weights = weights or {}
    main = build_main(
        steps,
        inputs=inputs,
        outputs=outputs,
        constants=list(weights),
        sizes=sizes,
        aliases=aliases,
        machine=host_machine(),
        scratch_bytes=4,
        threads=threads,
    )
    if objects is None:
        used = {step.symbol for step in steps}
        objects = {f"{symbol}.o": binary(symbol, OBJECTS[symbol][0]) for symbol in sorted(used)}
    partition = BundlePartition(
        "p0", "cpu", tuple(inputs), specs(outputs), artifact(main, objects, weights), ("region",)
    )
    return Bundle(name, specs(inputs), specs(outputs), (partition,), b"graph", threads, {"note": "handmade"})


def chain(length: int, count: int, threads: int, grain: int = 8) -> Bundle:
    """``t = x; t = t * w + x`` repeated `length` times over `count` elements: every step depends on the one before."""
    steps: list[Step] = []
    value = "x"
    for number in range(length):
        last = number == length - 1
        steps.append(Step("mul", (value, "w", f"m{number}"), (False, False, True), count, grain, 1e-4, ("Mul:m",)))
        value = "y" if last else f"a{number}"
        steps.append(Step("add", (f"m{number}", "x", value), (False, False, True), count, grain, 1e-4, ("Add:a",)))
    sizes = {name: 4 * count for number in range(length) for name in (f"m{number}", f"a{number}")}
    weights = {"w": np.linspace(-1, 1, count, dtype=np.float32)}
    return native_bundle(steps, {"x": f32(count)}, {"y": f32(count)}, sizes, weights, threads=threads)


def chain_result(length: int, x: np.ndarray) -> np.ndarray:
    """What `chain` computes."""
    w = np.linspace(-1, 1, x.size, dtype=np.float32)
    t = x
    for _ in range(length):
        t = t * w + x
    return t
