"""A partition becomes instruction streams, micro-ops, constants and a plan of memory: VTA's pipeline, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nestc.bundle.artifact import Artifact
from nestc.errors import TargetError
from nestc.runtime.vta.assembly import disassemble
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.encode import encode, encode_uops
from nestc.runtime.vta.energy import HOROWITZ_45NM, Energy
from nestc.runtime.vta.isa import Finish, Load, MemoryId, Store, Stream
from nestc.runtime.vta.layout import Columns
from nestc.targets.vta.concat import Part, join
from nestc.targets.vta.emit import Piece, emit
from nestc.targets.vta.layer import FeatureMap, Init, Layer
from nestc.targets.vta.layers_values import feature_map
from nestc.targets.vta.link import link
from nestc.targets.vta.lower import lower
from nestc.targets.vta.memory import Dram, Value
from nestc.targets.vta.model import whole
from nestc.targets.vta.rewrite import rewritten
from nestc.targets.vta.schedule import choose
from nestc.targets.vta.shape import elements
from nestc.targets.vta.split import choose_split
from nestc.targets.vta.timed import timed
from nestc.targets.vta.unroll import unroll_inputs
from nestc.targets.vta.verify import Region, verify
from nestc.tensor.ir import Kernel
from nestc.tensor.text import kernel_text
from nestc.tensor.verify import verify as verify_kernel

Emit = Callable[[str, str, str], None]
UOP_BYTES = 4


@dataclass(frozen=True, eq=False)
class _Lowered:
    """A layer as one kernel a device, and its constants by parameter name."""

    layer: Layer
    kernels: tuple[Kernel, ...]
    constants: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class _Program:
    """A stream of one device, and for each layer in it the number of its last instruction."""

    stream: Stream
    last: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Network:
    """What a partition computes: layers in order, the source of each value that is only a view, and the border.

    ``inputs`` and ``outputs``: ONNX shapes by name. ``rows``: values of three axes that lie as rows of a matrix.
    """

    name: str
    layers: Sequence[Layer]
    aliases: Mapping[str, str]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]
    rows: frozenset[str] = frozenset()


def compile_network(
    net: Network,
    config: VtaConfig,
    count: int = 1,
    emit_form: Emit | None = None,
    energy: Energy = HOROWITZ_45NM,
    *,
    unroll: bool = True,
    prove: bool = True,
) -> Artifact:
    """The artifact of kind ``vta``, which `runtime.vta.device` runs if it was proven to be safe.

    With `count` above 1 every layer is a launch of its own, shared among up to as many devices. With `unroll` images of
    few channels are unrolled along their rows when they come in. Raises TargetError if
    a layer has no tiling, or memory does not suffice.
    """
    # Images of few channels come in unrolled, so that their first convolution fills the blocks.
    fixed = (*net.outputs, *net.aliases, *net.aliases.values())
    layers, columns = unroll_inputs(net.layers, net.inputs if unroll else {}, fixed, config)

    # Layers that compute the same in fewer cycles; what somebody else sees stays what it is.
    net = replace(net, layers=rewritten(layers, {*net.inputs, *fixed}, config))
    maps = _maps(net)

    # What is concatenated is written in its place at once, where blocks of channels allow it.
    layers, parts = join(net.layers, (*net.inputs, *net.aliases, *net.aliases.values()), config)
    home = _Home(net.aliases, parts)

    # Each layer is cut to fit the SRAMs, and becomes one Tensor IR kernel a device.
    lowered = [_lower(layer, config, count) for layer in layers]
    for each in lowered:
        for device, kernel in enumerate(each.kernels):
            if prove:
                verify_kernel(kernel)
            if emit_form is not None:
                part = f".{device}" if len(each.kernels) > 1 else ""
                emit_form("tensor", f"{net.name}_{kernel.name}{part}", kernel_text(kernel))

    # Addresses of everything whose size is known by now; micro-ops and instructions follow it.
    dram = _place_values(net, layers, maps, home, config)
    constants = _unique_constants(lowered)
    for name, array in constants.items():
        dram.place(name, array.nbytes)

    # Statements become instructions; linking gives them micro-ops and tokens; nothing unproven is there to be run.
    groups = [[each] for each in lowered] if count > 1 else [lowered]
    uop_address = uop_end = dram.end
    launches: list[list[_Program]] = []
    known = {home.of(name) for name in net.inputs}
    for group in groups:
        launch: list[_Program] = []
        written = {home.of(each.layer.output.name) for each in group}
        regions = _regions(maps, constants, dram, config, known, written)
        known |= written
        for device in range(max((len(each.kernels) for each in group), default=0)):
            kernels = [each.kernels[device] for each in group if device < len(each.kernels)]
            program = _assemble(kernels, dram.addresses, config, uop_end // UOP_BYTES, regions if prove else None)
            uop_end += len(program.stream.uops) * UOP_BYTES
            launch.append(program)
        if prove:
            _require_apart(launch, config)
        launches.append(launch)
    dram.place("micro-ops", uop_end - uop_address)
    if emit_form is not None:
        for name, program in _named(launches):
            emit_form("commands", f"{net.name}{name}", _text(program, config))

    # Bytes, and what they mean.
    files: dict[str, bytes] = {}
    described: list[list[dict[str, Any]]] = []
    for number, launch in enumerate(launches):
        described.append([])
        for device, program in enumerate(launch):
            file = f"{number}.{device}.insn.bin"
            files[file] = encode(program.stream.instructions, config)
            address = dram.place(file, len(files[file]))
            described[-1].append({"insn": file, "count": len(program.stream.instructions), "address": address})
    uops = [program.stream.uops for launch in launches for program in launch]
    files["uop.bin"] = b"".join(encode_uops(each, config) for each in uops)
    roles = {name: _role(name, lowered) for name in constants}
    metadata = {
        "config": config.to_json(),
        "preset": config.name,
        "clock_hz": config.clock_hz,
        "bus_bits": config.bus_bits,
        "count": count,
        "dram_bytes": dram.end,
        "launches": described,
        "inputs": [
            _border(name, shape, net, maps, dram, config, columns.get(name)) for name, shape in net.inputs.items()
        ],
        "outputs": [_border(name, shape, net, maps, dram, config) for name, shape in net.outputs.items()],
        "constants": [
            {"name": name, "address": dram.addresses[name], "bytes": array.nbytes, "role": roles[name]}
            for name, array in constants.items()
        ],
        "uops": [{"file": "uop.bin", "address": uop_address}],
        "timing": timed(
            [[program.stream for program in launch] for launch in launches],
            [launch[0].last if launch else {} for launch in launches],
            config,
            count,
            energy,
        ),
    }
    return Artifact("vta", files, constants, metadata)


def _maps(net: Network) -> dict[str, FeatureMap]:
    """How every value lies in memory. Raises TargetError if two layers see one value in different layouts."""
    maps: dict[str, FeatureMap] = {}
    for layer in net.layers:
        for map_ in (*layer.sources.values(), layer.output):
            known = maps.setdefault(root(map_.name, net.aliases), map_)
            if _layout(known) != _layout(map_):
                raise TargetError(f"layer {layer.name} reads {map_.name!r} as {map_}, but it lies in memory as {known}")
            maps.setdefault(map_.name, map_)
    for name, shape in net.inputs.items():
        maps.setdefault(name, feature_map(name, shape))  # an input that only views read
    return maps


def _layout(map_: FeatureMap) -> tuple[int, int, int]:
    """Maps alike in these lie alike in memory."""
    return map_.batch, map_.channels, map_.height * map_.width


def root(name: str, aliases: Mapping[str, str]) -> str:
    """The value that is really stored under a name."""
    while name in aliases:
        name = aliases[name]
    return name


def _lower(layer: Layer, config: VtaConfig, count: int) -> _Lowered:
    kernels: list[Kernel] = []
    constants: dict[str, np.ndarray] = {}
    for share in choose_split(layer, count, config) if count > 1 else [whole(layer, config)]:
        kernel, needed = lower(layer, share, choose(layer, share, config), config)
        kernels.append(kernel)
        constants.update(needed)
    return _Lowered(layer, tuple(kernels), constants)


def _unique_constants(lowered: Sequence[_Lowered]) -> dict[str, np.ndarray]:
    """Constants of all layers; those that layers share have one name."""
    constants: dict[str, np.ndarray] = {}
    for each in lowered:
        constants.update(each.constants)
    return constants


class _Home:
    """Which value really has the memory of another: a view has its source's, a part of a concatenation its whole's."""

    def __init__(self, aliases: Mapping[str, str], parts: Mapping[str, Part]) -> None:
        self.aliases, self.parts = aliases, parts

    def place(self, name: str) -> tuple[str, int]:
        """The value that has the memory, and how many bytes behind its beginning `name` lies."""
        offset = 0
        while name in self.aliases or name in self.parts:
            if name in self.aliases:
                name = self.aliases[name]
            else:
                offset += self.parts[name].bytes
                name = self.parts[name].whole
        return name, offset

    def of(self, name: str) -> str:
        """The value that has the memory."""
        return self.place(name)[0]


def _place_values(
    net: Network, layers: Sequence[Layer], maps: Mapping[str, FeatureMap], home: _Home, config: VtaConfig
) -> Dram:
    """Addresses of all feature maps: inputs and outputs keep their memory, what is between shares it."""
    dram = Dram(config)
    border = dict.fromkeys(home.of(name) for name in (*net.inputs, *net.outputs))
    for name in border:
        dram.place(name, elements(maps[name], config) * config.inp_bytes)
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for number, layer in enumerate(layers):
        first.setdefault(home.of(layer.output.name), number)
        for name in (*layer.sources, layer.output.name):
            last[home.of(name)] = number
    dram.place_intermediate(
        [
            Value(name, elements(maps[name], config) * config.inp_bytes, number, last[name])
            for name, number in first.items()
            if name not in border
        ]
    )
    dram.place_inside({name: home.place(name) for name in (*net.aliases, *home.parts)})
    return dram


def _regions(
    maps: Mapping[str, FeatureMap],
    constants: Mapping[str, np.ndarray],
    dram: Dram,
    config: VtaConfig,
    known: set[str],
    written: set[str],
) -> list[Region]:
    """What a launch may touch: values `known` before it, those that it writes, and constants."""
    found = [Region(name, dram.addresses[name], array.nbytes) for name, array in constants.items()]
    for name in sorted(known | written):
        size = elements(maps[name], config) * config.inp_bytes
        found.append(Region(name, dram.addresses[name], size, name in known, name in written))
    return found


def _assemble(
    kernels: Sequence[Kernel],
    addresses: Mapping[str, int],
    config: VtaConfig,
    uop_base: int,
    regions: Sequence[Region] | None,
) -> _Program:
    """The stream of some kernels; proven to be safe within `regions`, if they are given."""
    pieces: list[Piece] = []
    ends: dict[str, int] = {}
    for kernel in kernels:
        pieces += emit(kernel, addresses, config)
        ends[kernel.name] = len(pieces)
    stream = link(pieces, config, uop_base)
    if regions is not None:
        verify(stream, config, regions)
    # Linking adds only LOADs of micro-ops, tokens among them, and the end; the others are the pieces, in order.
    ours = [number for number, instruction in enumerate(stream.instructions) if not _is_added(instruction)]
    return _Program(stream, {name: ours[end - 1] for name, end in ends.items()})


def _require_apart(launch: Sequence[_Program], config: VtaConfig) -> None:
    """Raise TargetError if two devices of a launch store to the same bytes; each stream is verified by itself."""
    rows = [
        (store.dram + row * store.x_stride, store.x_size, device)
        for device, program in enumerate(launch)
        for store in program.stream.instructions
        if isinstance(store, Store) and len(launch) > 1
        for row in range(store.y_size)
    ]
    end, owner = 0, 0
    for start, size, device in sorted(rows):
        if start < end and device != owner:
            where = f"byte {start * config.inp_bytes:#x}"
            raise TargetError(f"devices {owner} and {device} of one launch both store to {where}")
        if start + size > end:
            end, owner = start + size, device


def _is_added(instruction: object) -> bool:
    return isinstance(instruction, Finish) or (isinstance(instruction, Load) and instruction.memory == MemoryId.UOP)


def _named(launches: Sequence[Sequence[_Program]]) -> list[tuple[str, _Program]]:
    """Every stream with what tells it apart from the others of the partition; the only one needs nothing."""
    every = [(number, device, each) for number, launch in enumerate(launches) for device, each in enumerate(launch)]
    return [("" if len(every) == 1 else f".{number}.{device}", program) for number, device, program in every]


def _text(program: _Program, config: VtaConfig) -> str:
    """The disassembly of a stream, in which each layer's name stands above its first instruction."""
    notes: dict[int, str] = {}
    first = 0
    for name, last in program.last.items():
        notes[first] = f"layer {name}"
        first = last + 1
    return disassemble(program.stream, config, notes)


def _border(
    name: str,
    shape: tuple[int, ...],
    net: Network,
    maps: Mapping[str, FeatureMap],
    dram: Dram,
    config: VtaConfig,
    columns: Columns | None = None,
) -> dict[str, Any]:
    """An input or output: where it lies, and how."""
    map_ = maps[root(name, net.aliases)]
    about: dict[str, Any] = {
        "name": name,
        "address": dram.addresses[name],
        "bytes": elements(map_, config) * config.inp_bytes,
        "shape": list(shape),
        "map": [map_.batch, map_.channels, map_.height, map_.width],
    }
    if name in net.rows:
        about["rows"] = True
    return about if columns is None else {**about, "columns": columns.to_json()}


def _role(name: str, lowered: Sequence[_Lowered]) -> str:
    """What a constant is for: weights, bias, shift (amounts), unit (biases are multiplied with it) or identity."""
    prefix, _, last = name.rpartition("/")
    kind = last.rstrip("0123456789")
    if kind != "vector":
        return kind
    layer = next(each.layer for each in lowered if each.layer.name == prefix)
    return "bias" if isinstance(layer.steps[int(last.removeprefix(kind))], Init) else "shift"
