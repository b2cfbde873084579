"""The CPU target: regions become kernels, kernels become objects, and one native program walks them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NoReturn

import numpy as np

from nestc.bundle.artifact import Artifact, Device
from nestc.codegen.llvm import Code, print_kernel
from nestc.codegen.llvm_types import width
from nestc.codegen.main import build_main
from nestc.codegen.objects import compile_ir, compile_kernel, kernel_key, known_kernel
from nestc.codegen.schedule import Alias, Step
from nestc.errors import UnsupportedOp
from nestc.graph.region import Region, TensorType
from nestc.host import available_cpus
from nestc.kernels import generic
from nestc.kernels.api import PLAIN, CpuMachine, Family, Layout, Lowered, physical_shape
from nestc.kernels.elementwise import STORED
from nestc.kernels.families import alternatives, choose
from nestc.runtime.arrays import aligned
from nestc.targets.api import Machine, Memory, Offer, Partition, constraint
from nestc.targets.cpu.address import Copy, address, nbytes
from nestc.targets.cpu.assign import Assignment, assign
from nestc.targets.cpu.cost import seconds
from nestc.targets.cpu.layout import VIEW, Action, Convert, Lower, actions_of, stored
from nestc.targets.cpu.machine import machine as machine_called
from nestc.targets.cpu.shuffle import merge_shuffles
from nestc.targets.power import cpu_watts
from nestc.tensor.ir import Kernel, written
from nestc.tensor.math import expand
from nestc.tensor.text import kernel_text
from nestc.tensor.verify import verify
from nestc.tune.store import ChoiceStore


@constraint
def _dense(region: Region) -> bool:
    """an element type has no place in a kernel (strings, complex numbers, sequences)"""
    return all(type_.dtype in STORED for type_ in region.types.values())


@constraint
def _lowered(region: Region) -> bool:
    """no kernel family takes the operator in this form"""
    return _is_view(region) or choose(region)[0] is not None


def _is_view(region: Region) -> bool:
    """Whether the region needs no kernel: its output is its input under another shape. A constant has to be copied."""
    return region.anchor == VIEW and bool(region.inputs)


class CpuTarget:
    """Generated machine code for CPUs. Options: ``arch`` (`native`, `avx512_vnni`, `avx512`, `avx2`, `sse2`, `neon`,
    `neon_dotprod`), ``threads``, ``watts``, what the processor draws while it runs (assumed if not given), from
    which energies of measured times are estimated, and ``exact``: no kernels that change the order of arithmetic beyond
    what a direct sum does (Winograd's convolutions)."""

    name = "cpu"

    def __init__(
        self,
        arch: str = "native",
        threads: int | None = None,
        watts: float | None = None,
        exact: bool = False,
    ) -> None:
        self.arch = arch
        self.cpu: CpuMachine = machine_called(arch)
        self.threads = threads or available_cpus()
        self.exact = exact
        self._tuned = ChoiceStore().tuned(self.cpu, self.threads)
        # Times of regions depend on the ways they are computed, so this is part of the device's fingerprint.
        self.tuned = self._tuned.digest
        self.machine = Machine(
            name=self.cpu.name,
            memories=(Memory("ram", 0, 64),),
            dtypes=tuple(sorted(STORED)),
            facts={
                "triple": self.cpu.triple,
                "cpu": self.cpu.cpu,
                "vector_bits": self.cpu.vector_bytes * 8,
                "vector_registers": self.cpu.vector_registers,
                "fma": self.cpu.fma,
                "l1_bytes": self.cpu.l1_bytes,
                "l2_bytes": self.cpu.l2_bytes,
                "l3_bytes": self.cpu.l3_bytes,
            },
            resource="cpu",
            watts=cpu_watts(watts, self.threads, self.name),
        )
        self.offers: tuple[Offer, ...] = (
            Offer("kernels", generic.SUPPORTED_OPS | _FAMILY_OPS, where=(_dense, _lowered), cost=self.cost),
        )

    def cost(self, region: Region) -> float:
        """Modelled seconds of a region on one core."""
        return seconds(region)

    def compile(self, partition: Partition, emit: Callable[[str, str, str], None] | None = None) -> Artifact:
        """Kernels for every region, one object a distinct kernel, and the program that runs them in order."""
        return _Compiler(self.cpu, partition, emit, self.threads).run(self.way)

    def way(self, region: Region) -> Family | None:
        """The family that computes a region: what was measured to be fastest, else what is expected to be.

        None if nobody lowers it.
        """
        ways = alternatives(region, self.cpu, self.exact)
        return self._tuned.pick(region, ways) if ways else None

    def borders(self, partition: Partition) -> dict[str, Mapping[str, Layout]]:
        """The layouts in which the kernels of each region find their inputs and leave their outputs, by region name;
        regions that need no kernel are left out."""
        return _Compiler(self.cpu, partition, None, self.threads).borders(self.way)

    def compile_alone(self, region: Region, way: Family, borders: Mapping[str, Layout]) -> Artifact:
        """A program of one region whose inputs and outputs lie in the layouts of its `borders`, for measurements.

        It includes conversions only where the way wants other layouts than that. Its inputs have physical shapes.
        """
        ends = (*region.inputs, *region.outputs)
        values = {stored(name, borders.get(name, PLAIN)): name for name in ends}
        types = {
            end: TensorType(region.types[name].dtype, physical_shape(region.types[name], borders.get(name, PLAIN)))
            for end, name in values.items()
        }
        inputs, outputs = (
            tuple(end for end, name in values.items() if name in names) for names in (region.inputs, region.outputs)
        )
        alone = Partition("alone", self.name, (region,), inputs, outputs, types, no_model)
        return _Compiler(self.cpu, alone, None, self.threads).run_alone(way, borders)

    def open(self) -> Device:
        """This machine's CPU."""
        from nestc.runtime.devices import device_for

        return device_for("cpu-native")


def no_model() -> NoReturn:
    """Stands for the ONNX model of a partition that is none."""
    raise ValueError("a region that is measured alone is no model")


# Operators that a family lowers although the generic lowering does not know them.
_FAMILY_OPS = frozenset(
    "Conv ConvTranspose MatMul Gemm MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool Resize"
    " Upsample LSTM GRU RNN Softmax LogSoftmax LayerNormalization RMSNormalization InstanceNormalization"
    " GroupNormalization LpNormalization MeanVarianceNormalization BatchNormalization LRN Attention"
    " RotaryEmbedding".split()
)


class _Compiler:
    def __init__(
        self, machine: CpuMachine, partition: Partition, emit: Callable[[str, str, str], None] | None, threads: int
    ) -> None:
        self.machine = machine
        self.partition = partition
        self.emit = emit
        self.threads = threads
        self.steps: list[Step] = []
        self.sizes: dict[str, int] = {}
        self.aliases: dict[str, Alias] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.objects: dict[str, Future[bytes]] = {}
        self.scratch = 0
        self.codes: dict[str, Code] = {}
        self.assignment: Assignment | None = None

    def borders(self, way: Callable[[Region], Family | None]) -> dict[str, Mapping[str, Layout]]:
        """The layouts of the inputs and outputs of each region that is lowered, by its name."""
        actions, _ = self.plan(way)
        return {action.region.name: action.layouts for action in actions if isinstance(action, Lower)}

    def run(self, way: Callable[[Region], Family | None]) -> Artifact:
        """Lower every region the way that `way` says."""
        actions, types = self.plan(way)
        p = self.partition
        with self.pool() as pool:
            addressed = address(actions, p.inputs, p.outputs, types)
            self.aliases.update(addressed.aliases)
            self.sizes.update(addressed.sizes)
            for step in addressed.steps:
                if isinstance(step, Lower):
                    self.add_region(step, pool)
                elif isinstance(step, Convert):
                    self.add_conversion(step, types[step.value], pool)
                else:
                    self.add_copy(step, pool)
        ways = {action.region.name: action.family.name for action in actions if isinstance(action, Lower)}
        return self.program({name: types[name] for name in (*p.inputs, *p.outputs)}, ways)

    def run_alone(self, family: Family, borders: Mapping[str, Layout]) -> Artifact:
        """The partition's only region, between values in the layouts of its `borders`."""
        p = self.partition
        region = p.regions[0]
        incoming = {name: borders.get(name, PLAIN) for name in region.inputs}
        layouts = family.layouts(region, self.machine, incoming)
        with self.pool() as pool:
            for name, layout in incoming.items():
                if layouts.get(name, PLAIN) != layout:
                    self.add_conversion(Convert(name, layout, layouts.get(name, PLAIN)), region.types[name], pool)
            self.add_region(Lower(region, family, layouts), pool)
            for name in region.outputs:
                made, wanted = layouts.get(name, PLAIN), borders.get(name, PLAIN)
                if made != wanted:
                    self.add_conversion(Convert(name, made, wanted), region.types[name], pool)
        return self.program(p.types, {region.name: family.name})

    def plan(self, way: Callable[[Region], Family | None]) -> tuple[list[Action], dict[str, TensorType]]:
        """What is to be done for the regions, each computed the way that `way` says, and the types of all values.

        Raises UnsupportedOp for a region that no family lowers.
        """
        p = self.partition
        pairs: list[tuple[Region, Family | None]] = []
        types: dict[str, TensorType] = dict(p.types)
        for region in merge_shuffles(p.regions, p.outputs, self.machine):
            family = None if _is_view(region) else way(region)
            if family is None and not _is_view(region):
                raise UnsupportedOp(f"region {region.name}: no CPU kernel for {', '.join(region.origin)}")
            pairs.append((region, family))
            types.update(region.types)
        self.assignment = assign(pairs, p.inputs, p.outputs, types, self.machine)
        return actions_of(self.assignment.options, p.inputs, p.outputs), types

    def pool(self) -> ThreadPoolExecutor:
        """Threads that compile kernels."""
        return ThreadPoolExecutor(max(1, min(self.threads, 8)))

    def program(self, types: Mapping[str, TensorType], ways: Mapping[str, str]) -> Artifact:
        """What the steps so far make, with border values of these `types`; `ways` go into the metadata."""
        p = self.partition
        objects = {symbol: future.result() for symbol, future in self.objects.items()}
        main = build_main(
            self.steps,
            inputs={name: types[name] for name in p.inputs},
            outputs={name: types[name] for name in p.outputs},
            constants=tuple(self.weights),
            sizes=self.sizes,
            machine=self.machine,
            aliases=self.aliases,
            scratch_bytes=self.scratch,
            threads=self.threads,
        )
        if self.emit is not None:
            self.emit("llvm", f"{p.name}_main", main.llvm)
        files = {f"{symbol}.o": code for symbol, code in objects.items()}
        metadata = {**main.metadata, "ways": dict(ways)}
        if self.assignment is not None:
            metadata["layouts"] = self.assignment.report()
        return Artifact("cpu-native", {**files, "main.o": main.object}, self.weights, metadata)

    def add_region(self, action: Lower, pool: ThreadPoolExecutor) -> None:
        region, layouts = action.region, action.layouts
        lowered = action.family.lower(region, self.machine, layouts)
        names = {name: stored(name, layouts.get(name, PLAIN)) for name in (*region.inputs, *region.outputs)}
        for name in region.outputs:
            self.size(names[name], region.types[name], layouts.get(name, PLAIN))
        self.add_launches(lowered, names, region.name, seconds(region), pool)

    def add_conversion(self, action: Convert, type_: TensorType, pool: ThreadPoolExecutor) -> None:
        """A conversion kernel; its region names the value ``source`` before and ``target`` after."""
        lowered = generic.convert(type_, action.source, action.target, self.machine)
        target = stored(action.value, action.target)
        names = {"source": stored(action.value, action.source), "target": target}
        self.size(target, type_, action.target)
        self.add_launches(lowered, names, f"{action.value}.layout", 0.0, pool)

    def add_copy(self, step: Copy, pool: ThreadPoolExecutor) -> None:
        """A kernel that copies bytes to where they have to lie."""
        lowered = generic.convert(step.elements, PLAIN, PLAIN, self.machine)
        names = {"source": step.source, "target": step.target}
        self.add_launches(lowered, names, f"{step.target}.copy", 0.0, pool)

    def size(self, name: str, type_: TensorType, layout: Layout) -> None:
        if name in self.partition.inputs or name in self.partition.outputs:
            return
        self.sizes[name] = nbytes(type_, layout)

    def add_launches(
        self, lowered: Lowered, names: Mapping[str, str], prefix: str, cost: float, pool: ThreadPoolExecutor
    ) -> None:
        names = dict(names)
        for name, type_ in lowered.temporaries.items():
            names[name] = f"{prefix}/{name}"
            self.size(names[name], type_, PLAIN)
        for name, array in lowered.constants.items():
            names[name] = f"{prefix}/{name}"
            self.weights[names[name]] = aligned(array)
        heaviest = max((_extent(launch.kernel) for launch in lowered.launches), default=1)
        for launch in lowered.launches:
            kernel = launch.kernel
            symbol = self.add_kernel(kernel, pool)
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

    def add_kernel(self, kernel: Kernel, pool: ThreadPoolExecutor) -> str:
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
        self.objects[symbol] = pool.submit(compile_kernel, code.text, code.scratch_bytes, self.machine, key)
        if self.emit is not None:
            self.emit("tensor", symbol, kernel_text(kernel))
            self.emit("llvm", symbol, code.text)
            self.emit("asm", symbol, compile_ir(code.text, self.machine, assembly=True).assembly)
        return symbol


def _extent(kernel: Kernel) -> int:
    return kernel.parallel.extent if kernel.parallel is not None else 1
