"""The steps, buffers and objects of a native program, put together of what is to be done for the regions."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from nestc.codegen.llvm import print_kernel
from nestc.codegen.llvm_types import width
from nestc.codegen.objects import compile_ir, compile_kernel, kernel_key, known_kernel
from nestc.codegen.schedule import SPREAD_SECONDS, Alias, Loop, Step
from nestc.graph.region import TensorType
from nestc.kernels import generic
from nestc.kernels.api import PLAIN, CpuMachine, Launch, Layout, Lowered
from nestc.runtime.arrays import aligned
from nestc.targets.cpu import address
from nestc.targets.cpu.cost import seconds
from nestc.targets.cpu.layout import Convert, Lower, Program, Turns, stored
from nestc.tensor.ir import Kernel, written
from nestc.tensor.math import expand
from nestc.tensor.text import kernel_text
from nestc.tensor.verify import verify

ITERATIONS = 2
"""Of the parallel loop of a kernel that each thread should have; with fewer, one thread often waits for another."""


class Assembler:
    """Collects what `codegen.main` makes a program of. `border`: inputs and outputs of the partition, which others
    make and keep. Kernels are compiled in `pool`; ``objects`` has the code of each as soon as that is done. ``narrow``
    names the regions in loops that give `threads` too little to do at a time."""

    def __init__(
        self,
        machine: CpuMachine,
        border: Sequence[str],
        emit: Callable[[str, str, str], None] | None,
        pool: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        self.machine = machine
        self.border = frozenset(border)
        self.emit = emit
        self.pool = pool
        self.threads = threads
        self.steps: list[Step] = []
        self.loops: list[Loop] = []
        self.sizes: dict[str, int] = {}
        self.aliases: dict[str, Alias] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.objects: dict[str, Future[bytes]] = {}
        self.scratch = 0
        self.narrow: set[str] = set()
        self.made: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}  # temporaries by kernel and what it read
        self.parts: dict[str, str] = {}  # of buffers at the border of the loop at hand: the slice of one turn

    def add(
        self, program: Program, inputs: Sequence[str], outputs: Sequence[str], types: Mapping[str, TensorType]
    ) -> None:
        """Lower all actions in order. `inputs` and `outputs`: the buffers that others make and read."""
        addressed = address.address(program, inputs, outputs, types)
        self.aliases.update(
            {name: replace(each, value=self.place(each.value)) for name, each in addressed.aliases.items()}
        )
        self.sizes.update(addressed.sizes)
        for step in addressed.steps:
            if isinstance(step, Lower):
                self.add_region(step)
            elif isinstance(step, Convert):
                self.add_conversion(step, types[step.value])
            elif isinstance(step, Turns):
                self.add_turns(step)
            else:
                self.add_copy(step)

    def place(self, buffer: str) -> str:
        """The buffer, or in a loop the slice of it."""
        return self.parts.get(buffer, buffer)

    def add_turns(self, turns: Turns) -> None:
        """A loop over slices; its kernels are lowered once."""
        first = len(self.steps)
        self.made = {}
        self.parts = {buffer: f"{buffer}/{len(self.loops)}" for buffer in turns.parts}
        for buffer, size in turns.parts.items():
            self.aliases[self.parts[buffer]] = Alias(buffer, 0, size)
            self.sizes[self.parts[buffer]] = size
        self.sizes.update({buffer: size for buffer, size in turns.sizes.items() if buffer not in self.border})
        self.add(turns.actions, turns.inputs, turns.outputs, turns.types)
        self.parts, self.made = {}, {}
        if len(self.steps) > first:
            self.loops.append(Loop(first, len(self.steps), turns.count))

    def add_region(self, action: Lower) -> None:
        """The kernels of a region."""
        region, layouts = action.region, action.layouts
        lowered = action.family.lower(region, self.machine, layouts)
        names = {name: self.place(stored(name, layouts.get(name, PLAIN))) for name in (*region.inputs, *region.outputs)}
        for name in region.outputs:
            self.size(names[name], region.types[name], layouts.get(name, PLAIN))
        first = len(self.steps)
        self.add_launches(lowered, names, region.name, seconds(region))
        if self.parts and any(self.starves(step) for step in self.steps[first:]):
            self.narrow.add(region.name)

    def starves(self, step: Step) -> bool:
        """Whether a step takes long enough to be shared, but has too few iterations for it."""
        return self.threads > 1 and step.cost >= SPREAD_SECONDS and step.extent < ITERATIONS * self.threads

    def add_conversion(self, action: Convert, type_: TensorType) -> None:
        """A conversion kernel; its region names the value ``source`` before and ``target`` after."""
        lowered = generic.convert(type_, action.source, action.target, self.machine)
        target = self.place(stored(action.value, action.target))
        names = {"source": self.place(stored(action.value, action.source)), "target": target}
        self.size(target, type_, action.target)
        self.add_launches(lowered, names, f"{action.value}.layout", 0.0)

    def add_copy(self, step: address.Copy) -> None:
        """A kernel that copies bytes to where they have to lie."""
        lowered = generic.convert(step.elements, PLAIN, PLAIN, self.machine)
        names = {"source": self.place(step.source), "target": self.place(step.target)}
        self.add_launches(lowered, names, f"{step.target}.copy", 0.0)

    def size(self, name: str, type_: TensorType, layout: Layout) -> None:
        """Note what a buffer takes, unless others make it."""
        if name not in self.border:
            self.sizes[name] = address.nbytes(type_, layout)

    def add_launches(self, lowered: Lowered, names: Mapping[str, str], prefix: str, cost: float) -> None:
        """The kernels of what was lowered. `names`: the buffers of its inputs and outputs; `prefix` names what is its
        own; `cost`: modelled seconds. A temporary that another region's kernel has made already is not made again (the
        same sums of inputs for three projections of a value)."""
        own = {name: f"{prefix}/{name}" for name in (*lowered.temporaries, *lowered.constants)}
        names = {**names, **own}
        for name, array in lowered.constants.items():
            self.weights[names[name]] = aligned(array)
        heaviest = max((_extent(launch.kernel) for launch in lowered.launches), default=1)
        writes_of = [_writes(launch) for launch in lowered.launches]
        writers = Counter(name for writes in writes_of for name in writes)
        for launch, writes in zip(lowered.launches, writes_of, strict=True):
            kernel = launch.kernel
            symbol = self.add_kernel(kernel)
            if all(name in lowered.temporaries and writers[name] == 1 for name in writes):
                reads = tuple(names[name] for name in launch.args if name not in writes)
                made = self.made.setdefault((symbol, reads), tuple(names[name] for name in writes))
                if made[0] != names[writes[0]]:
                    names.update(zip(writes, made, strict=True))
                    continue
            stores = written(kernel)
            moved = sum(b.size * width(b.dtype) // 8 for b in kernel.params)
            share = cost if _extent(kernel) == heaviest else 0.0
            self.steps.append(
                Step(
                    symbol,
                    tuple(names[arg] for arg in launch.args),
                    tuple(b.name in stores for b in kernel.params),
                    _extent(kernel),
                    0,
                    max(share, moved / 10e9),
                    kernel.origin,
                )
            )
        for name, type_ in lowered.temporaries.items():
            if names[name] == own[name]:
                self.size(names[name], type_, PLAIN)

    def add_kernel(self, kernel: Kernel) -> str:
        """The symbol of `kernel`, which is compiled once however often a model uses it."""
        plain = Kernel(kernel.name, kernel.params, kernel.body, kernel.locals)
        text = kernel_text(plain)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        symbol = f"{re.sub(r'[^A-Za-z0-9_]', '_', kernel.name)}_{digest}"
        if symbol in self.objects:
            return symbol
        key = kernel_key(text, self.machine)
        known = known_kernel(key) if self.emit is None else None
        if known is not None:
            self.scratch = max(self.scratch, known.scratch_bytes)
            self.objects[symbol] = Future()
            self.objects[symbol].set_result(known.code)
            return symbol
        verify(plain)
        code = print_kernel(expand(plain, self.machine), symbol, self.machine)
        self.scratch = max(self.scratch, code.scratch_bytes)
        self.objects[symbol] = self.pool.submit(compile_kernel, code.text, code.scratch_bytes, self.machine, key)
        if self.emit is not None:
            self.emit("tensor", symbol, kernel_text(kernel))
            self.emit("llvm", symbol, code.text)
            self.emit("asm", symbol, compile_ir(code.text, self.machine, assembly=True).assembly)
        return symbol


def _writes(launch: Launch) -> list[str]:
    """The values that a launch writes."""
    stores = written(launch.kernel)
    both = zip(launch.args, launch.kernel.params, strict=True)
    return list(dict.fromkeys(name for name, buffer in both if buffer.name in stores))


def _extent(kernel: Kernel) -> int:
    return kernel.parallel.extent if kernel.parallel is not None else 1
