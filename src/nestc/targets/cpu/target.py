"""The CPU target: regions become kernels, kernels become objects, and one native program walks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

from nestc.bundle.artifact import Artifact, Device
from nestc.codegen.main import build_main
from nestc.errors import UnsupportedOp
from nestc.graph.region import Region, TensorType
from nestc.host import available_cpus
from nestc.kernels import generic
from nestc.kernels.api import PLAIN, CpuMachine, Family, Layout, physical_shape
from nestc.kernels.elementwise import STORED
from nestc.kernels.families import alternatives, choose
from nestc.targets.api import Machine, Memory, Offer, Partition, constraint
from nestc.targets.cpu.assemble import Assembler
from nestc.targets.cpu.assign import Assignment, assign
from nestc.targets.cpu.cost import seconds
from nestc.targets.cpu.layout import VIEW, Convert, Lower, Program, Turns, actions_of, lowered, stored
from nestc.targets.cpu.machine import machine as machine_called
from nestc.targets.cpu.pairs import Merged, merge_pairs
from nestc.targets.cpu.shuffle import merge_shuffles
from nestc.targets.cpu.slices import choose_slices, report
from nestc.targets.cpu.turns import fits, in_turns
from nestc.targets.power import cpu_watts
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
    what a direct sum does (Winograd's convolutions, Strassen's products)."""

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
        return _Compiler(self.cpu, partition, emit, self.threads, self.exact).run(self.ways)

    def way(self, region: Region) -> Family | None:
        """The family that computes a region: what was measured to be fastest, else what is expected to be.

        None if nobody lowers it.
        """
        return next(iter(self.ways(region)), None)

    def ways(self, region: Region) -> tuple[Family, ...]:
        """The family that computes a region (`way`), and behind it those that could instead; none of them if it was
        measured to be fastest. Empty if nobody lowers it."""
        ways = alternatives(region, self.cpu, self.exact)
        if not ways or not self._tuned.times(region):
            return ways
        return (self._tuned.pick(region, ways),)

    def kernels(self, partition: Partition) -> list[tuple[Lower, int]]:
        """The regions that kernels compute, each with its way and layouts, for as many images as it takes at a time,
        and how often it is computed. Neighbours are not joined here."""
        return _Compiler(self.cpu, partition, None, self.threads).kernels(self.ways)

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
        self,
        machine: CpuMachine,
        partition: Partition,
        emit: Callable[[str, str, str], None] | None,
        threads: int,
        exact: bool = False,
    ) -> None:
        self.machine = machine
        self.exact = exact
        self.partition = partition
        self.emit = emit
        self.threads = threads
        self.assignment: Assignment | None = None
        self.firsts: Mapping[str, str] = {}  # of regions that were joined: the first by the second
        self.sliced: list[dict[str, str | int | float]] = []

    def kernels(self, ways: Callable[[Region], tuple[Family, ...]]) -> list[tuple[Lower, int]]:
        """The regions that are lowered, and how often each is computed."""
        program, _ = self.plan(ways, fuse=False)
        turns = {
            each.region.name: action.count
            for action in program
            if isinstance(action, Turns)
            for each in lowered(action.actions)
        }
        return [(action, turns.get(action.region.name, 1)) for action in lowered(program)]

    def run(self, ways: Callable[[Region], tuple[Family, ...]]) -> Artifact:
        """Lower every region in one of the `ways`, the first of which is the best one alone."""
        p = self.partition
        program, types = self.plan(ways)
        with self.pool() as pool:
            assembler = self.assembler(pool)
            assembler.add(program, p.inputs, p.outputs, types)
            whole: set[str] = set()
            while assembler.narrow - whole:
                whole |= assembler.narrow
                program, types = self.plan(ways, whole=frozenset(whole))
                assembler = self.assembler(pool)
                assembler.add(program, p.inputs, p.outputs, types)
        taken = {action.region.name: action.family.name for action in lowered(program)}
        taken.update({first: taken[second] for second, first in self.firsts.items()})
        return self.program(assembler, {name: types[name] for name in (*p.inputs, *p.outputs)}, taken)

    def run_alone(self, family: Family, borders: Mapping[str, Layout]) -> Artifact:
        """The partition's only region, between values in the layouts of its `borders`."""
        p = self.partition
        region = p.regions[0]
        incoming = {name: borders.get(name, PLAIN) for name in region.inputs}
        layouts = family.layouts(region, self.machine, incoming)
        with self.pool() as pool:
            assembler = self.assembler(pool)
            for name, layout in incoming.items():
                if layouts.get(name, PLAIN) != layout:
                    assembler.add_conversion(Convert(name, layout, layouts.get(name, PLAIN)), region.types[name])
            assembler.add_region(Lower(region, family, layouts))
            for name in region.outputs:
                made, wanted = layouts.get(name, PLAIN), borders.get(name, PLAIN)
                if made != wanted:
                    assembler.add_conversion(Convert(name, made, wanted), region.types[name])
        return self.program(assembler, p.types, {region.name: family.name})

    def plan(
        self, ways: Callable[[Region], tuple[Family, ...]], fuse: bool = True, whole: frozenset[str] = frozenset()
    ) -> tuple[Program, dict[str, TensorType]]:
        """What is to be done for the regions, each computed in one of the `ways`, the first of which is the best one
        alone, and the types of all values. With `fuse`, neighbours are joined where that is expected to be faster;
        regions named in `whole` compute the whole batch at a time.

        Raises UnsupportedOp for a region that no family lowers.
        """
        p = self.partition
        types: dict[str, TensorType] = dict(p.types)
        known = _Known(ways)
        regions = merge_shuffles(p.regions, p.outputs, self.machine)
        merged = Merged(regions)
        if fuse:
            merged = merge_pairs(regions, p.outputs, self.machine, self.threads, self.exact, known.first)
        self.firsts = merged.firsts
        for region in merged.regions:
            types.update(region.types)
        while True:
            slices = choose_slices(merged.regions, p.outputs, self.machine, self.threads, whole)
            # What is computed for a slice at a time is computed the way that is best for a slice.
            small = {name: region for each in slices for name, region in each.small(merged.regions).items()}
            pairs: list[tuple[Region, Family | None]] = []
            others: dict[str, Sequence[Family]] = {}
            for region in merged.regions:
                given = small.get(region.name, region)
                family = merged.families.get(region.name) or (None if _is_view(region) else known.first(given))
                if family is None and not _is_view(region):
                    raise UnsupportedOp(f"region {region.name}: no CPU kernel for {', '.join(region.origin)}")
                pairs.append((region, family))
                if given is region and region.name not in merged.families and family is not None:
                    others[region.name] = known.all(region)[1:]
            self.assignment = assign(pairs, p.inputs, p.outputs, types, self.machine, others)
            actions = actions_of(self.assignment.options, p.inputs, p.outputs)
            program = in_turns(actions, slices, merged.regions, p.outputs, types)
            sliced = [each for each in lowered(program) if each.region.name in small]
            misfits = {each.region.name for each in sliced if not fits(each, self.machine)}
            if not misfits:
                self.sliced = report(slices, merged.regions)
                return program, types
            whole |= misfits

    def assembler(self, pool: ThreadPoolExecutor) -> Assembler:
        """What puts a program of this partition together."""
        border = (*self.partition.inputs, *self.partition.outputs)
        return Assembler(self.machine, border, self.emit, pool, self.threads)

    def pool(self) -> ThreadPoolExecutor:
        """Threads that compile kernels."""
        return ThreadPoolExecutor(max(1, min(self.threads, 8)))

    def program(self, assembler: Assembler, types: Mapping[str, TensorType], ways: Mapping[str, str]) -> Artifact:
        """What was put together, with border values of these `types`; `ways` go into the metadata."""
        p = self.partition
        objects = {symbol: future.result() for symbol, future in assembler.objects.items()}
        main = build_main(
            assembler.steps,
            inputs={name: types[name] for name in p.inputs},
            outputs={name: types[name] for name in p.outputs},
            constants=tuple(assembler.weights),
            sizes=assembler.sizes,
            machine=self.machine,
            aliases=assembler.aliases,
            loops=assembler.loops,
            scratch_bytes=assembler.scratch,
            threads=self.threads,
        )
        if self.emit is not None:
            self.emit("llvm", f"{p.name}_main", main.llvm)
        files = {f"{symbol}.o": code for symbol, code in objects.items()}
        metadata = {**main.metadata, "ways": dict(ways)}
        if self.assignment is not None:
            metadata["layouts"] = self.assignment.report()
        if self.sliced:
            metadata["sliced"] = self.sliced
        return Artifact("cpu-native", {**files, "main.o": main.object}, assembler.weights, metadata)


class _Known:
    """Remembers the ways to compute each region: to find them takes a few milliseconds."""

    def __init__(self, ways: Callable[[Region], tuple[Family, ...]]) -> None:
        self.ways = ways
        self.found: dict[int, tuple[Region, tuple[Family, ...]]] = {}  # with the region, so that no other has its id

    def all(self, region: Region) -> tuple[Family, ...]:
        if id(region) not in self.found:
            self.found[id(region)] = region, self.ways(region)
        return self.found[id(region)][1]

    def first(self, region: Region) -> Family | None:
        return next(iter(self.all(region)), None)
