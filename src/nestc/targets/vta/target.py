"""The VTA target: integer regions become instruction streams of one or several VTA devices, which are simulated."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nestc.errors import TargetError
from nestc.graph.region import Region
from nestc.runtime.vta.config import PRESETS, VtaConfig, load, preset
from nestc.runtime.vta.energy import HOROWITZ_45NM, Energy
from nestc.targets.api import Artifact, Device, Link, Machine, Memory, Offer, Partition
from nestc.targets.power import require_figure
from nestc.targets.vta.cost import seconds
from nestc.targets.vta.layer import Layer
from nestc.targets.vta.layers import Alias, layers_of, needs_rows
from nestc.targets.vta.offers import offers
from nestc.targets.vta.rows import row_values

if TYPE_CHECKING:
    from nestc.targets.vta.compiler import Network

MOST_DEVICES = 64
"""More devices than any layer has blocks of channels or rows to share are a slip of the pen."""


class VtaTarget:
    """VTA accelerators (tvm-vta), in modelled time. Options: ``config`` (a preset or a JSON file in VTA's own keys),
    ``count`` (devices that share each layer), ``clock_mhz`` and ``bus_bits`` (in place of the configuration's),
    ``energy``, a JSON file of picojoules an operation in place of those of `runtime.vta.energy`, ``unroll`` (false:
    images of few channels are packed like any other value, and their first convolution multiplies mostly padding), and
    of the border to the host, both assumed: ``launch_us`` (the driver writes registers and polls) and ``link_mb_s``
    (the host packs values into blocks; default: as fast as the bus, its width times the clock)."""

    name = "vta"

    def __init__(
        self,
        config: str = "pynq_1x16x16",
        count: int = 1,
        clock_mhz: float | None = None,
        bus_bits: int | None = None,
        energy: str | None = None,
        unroll: bool = True,
        launch_us: float = 50.0,
        link_mb_s: float | None = None,
    ) -> None:
        self.config = _configuration(config, clock_mhz, bus_bits)
        self.energy = HOROWITZ_45NM if energy is None else _energy(energy)
        if not 1 <= count <= MOST_DEVICES:
            raise TargetError(f"target vta runs on 1 to {MOST_DEVICES} devices, not {count}; write vta:count=N")
        self.count = count
        self.unroll = unroll
        rate = self.config.bus_bits / 8 * self.config.clock_hz if link_mb_s is None else link_mb_s * 1e6
        link = Link(
            launch_seconds=require_figure(launch_us, "launch_us", self.name) * 1e-6,
            bytes_per_second=require_figure(rate, "link_mb_s", self.name, above=True),
            kind="estimated",
        )
        self.machine = machine(self.config, count, self.energy, link)
        self.offers: tuple[Offer, ...] = offers(self.config, self.cost)

    def cost(self, region: Region) -> float:
        """Modelled seconds of a region, roughly; those of a compiled partition are in its artifact."""
        return seconds(region, self.config, self.count)

    def compile(self, partition: Partition, emit: Callable[[str, str, str], None] | None = None) -> Artifact:
        """Streams, micro-ops and constants of a partition, verified and timed; `emit` gets levels tensor, commands."""
        return self._compiled(partition, emit, prove=True)

    def compile_unproven(self, partition: Partition) -> Artifact:
        """The same without being verified, for its timing only."""
        return self._compiled(partition, None, prove=False)

    def _compiled(self, partition: Partition, emit: Callable[[str, str, str], None] | None, *, prove: bool) -> Artifact:
        from nestc.targets.vta.compiler import compile_network

        net = network(partition, self.config)
        return compile_network(net, self.config, self.count, emit, self.energy, unroll=self.unroll, prove=prove)

    def commands(self, partition: str, artifact: Artifact) -> Mapping[str, bytes]:
        """Files from which another VTA simulator replays a partition; see `targets.vta.commands`."""
        from nestc.targets.vta.commands import files

        return files(partition, artifact)

    def open(self) -> Device:
        """Simulated VTA devices in this process."""
        from nestc.runtime.devices import device_for

        return device_for("vta")


def network(partition: Partition, config: VtaConfig) -> Network:
    """The regions of a partition as exact integer arithmetic on blocks. Raises UnsupportedOp if one is no layer."""
    from nestc.targets.vta.compiler import Network

    layers: list[Layer] = []
    aliases: dict[str, str] = {}
    rows = row_values(partition.regions, lambda region: needs_rows(region, config))
    for region in partition.regions:
        for made in layers_of(region, config, rows):
            if isinstance(made, Alias):
                aliases[made.name] = made.source
            else:
                layers.append(made)
    inputs, outputs = (
        {name: partition.types[name].shape for name in names} for names in (partition.inputs, partition.outputs)
    )
    return Network(partition.name, layers, aliases, inputs, outputs, rows)


def machine(config: VtaConfig, count: int, energy: Energy, link: Link) -> Machine:
    """What a configuration says of its machine, behind `link`."""
    sizes = {"uop": 4, "inp": config.inp_bytes, "wgt": config.wgt_bytes, "acc": config.acc_bytes}
    return Machine(
        name=config.name,
        memories=tuple(
            Memory(f"sram.{name}", getattr(config, f"{name}_depth") * size, size) for name, size in sizes.items()
        ),
        dtypes=("int8", "int32"),
        facts={
            "count": count,
            "clock_hz": config.clock_hz,
            "bus_bits": config.bus_bits,
            "batch": config.batch,
            "block": config.block,
            "macs_per_cycle": config.batch * config.block**2,
            "times_and_energies": "modelled",
            **{f"{key}_pj": joules * 1e12 for key, joules in dataclasses.asdict(energy).items()},
            **config.to_json(),
        },
        link=link,
    )


def _energy(file: str) -> Energy:
    """Energies an operation, in picojoules under the names of `Energy`'s fields and ``_pj``. Raises TargetError."""
    keys = {f"{item.name}_pj": item.name for item in dataclasses.fields(Energy)}
    try:
        data: object = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetError(f"energies of target vta cannot be read from {file!r}: {error}") from error
    given = cast("dict[str, object]", data) if isinstance(data, dict) else {}
    wrong = sorted(set(keys) ^ set(given))
    if wrong:
        raise TargetError(f"{file!r} must hold {', '.join(keys)} and nothing else; look at {wrong[0]!r}")
    for key, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise TargetError(f"{file!r}: {key} is {value!r}; it must be a number of picojoules")
    return Energy(**{keys[key]: float(cast(float, value)) * 1e-12 for key, value in given.items()})


def _configuration(name: str, clock_mhz: float | None, bus_bits: int | None) -> VtaConfig:
    """A preset, or what a file says, with another clock and bus if given. Raises TargetError."""
    is_file = name not in PRESETS and (name.endswith(".json") or "/" in name or Path(name).exists())
    config = load(name) if is_file else preset(name)
    if clock_mhz is not None:
        if not (math.isfinite(clock_mhz) and clock_mhz > 0):
            raise TargetError(f"the clock of target vta is {clock_mhz} MHz; it must be above 0")
        config = dataclasses.replace(config, clock_hz=clock_mhz * 1e6)
    return config if bus_bits is None else dataclasses.replace(config, bus_bits=bus_bits)
