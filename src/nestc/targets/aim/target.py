"""The AiM target: products of constant matrices with a few vectors, done inside the banks of a simulated DRAM."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from nestc.errors import TargetError
from nestc.graph.region import Region
from nestc.runtime.aim.machine import AimMachine, load
from nestc.targets.aim.cost import seconds
from nestc.targets.aim.offers import offers
from nestc.targets.aim.regions import MOST_VECTORS, NUMBERS
from nestc.targets.api import Artifact, Device, Link, Machine, Memory, Offer, Partition
from nestc.targets.power import require_figure


class AimTarget:
    """DRAM with multipliers in its banks (SK hynix GDDR6-AiM), in modelled time. Options: ``machine`` (a preset or a
    YAML file), ``channels`` in place of the machine's, and ``number``, the format of all it holds: bfloat16 or float16.
    With ``round`` it also takes float32 regions, whose operands are then rounded to that. ``launch_us``, assumed, is
    what the host does before the first request; what it writes and reads are requests of the stream, so that nothing
    is copied beside it."""

    name = "aim"

    def __init__(
        self,
        machine: str = "gddr6_aim",
        channels: int | None = None,
        number: str = "bfloat16",
        round: bool = False,
        launch_us: float = 1.0,
    ) -> None:
        found = load(machine)
        if found.family != "aim":
            raise TargetError(
                f"machine {found.name!r} has the command set {found.family!r}: its times can be modelled "
                "(benchmarks/aim.py), but no code is generated for it; take gddr6_aim"
            )
        if channels is not None:
            if not 1 <= channels <= 32:
                raise TargetError(f"target aim runs on 1 to 32 channels, not {channels}")
            found = dataclasses.replace(found, channels=channels)
        if number not in NUMBERS:
            raise TargetError(f"target aim holds numbers as {' or '.join(NUMBERS)}, not as {number!r}")
        self.config, self.number = found, number
        self.rounded = number if round else None
        link = Link(launch_seconds=require_figure(launch_us, "launch_us", self.name) * 1e-6, kind="estimated")
        self.machine = facts(found, number, link)
        self.offers: tuple[Offer, ...] = offers(found, number, self.cost, round)

    def cost(self, region: Region) -> float:
        """Modelled seconds of a region, roughly; those of a compiled partition are in its artifact."""
        return seconds(region, self.config, self.rounded)

    def compile(self, partition: Partition, emit: Callable[[str, str, str], None] | None = None) -> Artifact:
        """Streams, banks and what the host does between, timed; `emit` gets the levels tensor and commands."""
        from nestc.targets.aim.partition import compile_partition

        return compile_partition(partition, self.config, self.number, emit, self.rounded)

    def commands(self, partition: str, artifact: Artifact) -> Mapping[str, bytes]:
        """Files from which another AiM simulator replays a partition; see `targets.aim.commands`."""
        from nestc.targets.aim.commands import files

        return files(partition, artifact)

    def open(self) -> Device:
        """A simulated memory in this process."""
        from nestc.runtime.devices import device_for

        return device_for("aim")


def facts(machine: AimMachine, number: str, link: Link) -> Machine:
    """What a configuration says of its machine, behind `link`."""
    row = machine.row_elements * 2
    return Machine(
        name=machine.name,
        memories=(
            Memory("banks", machine.channels * machine.banks * machine.rows * row, row),
            Memory("global_buffers", machine.channels * machine.global_buffer_columns * machine.lanes * 2, row),
            Memory("registers", machine.gprs * machine.lanes * 2, machine.lanes * 2),
        ),
        dtypes=(number, "float32"),
        facts={
            "clock_hz": machine.clock_hz,
            "channels": machine.channels,
            "banks": machine.banks,
            "rows": machine.rows,
            "columns": machine.columns,
            "lanes": machine.lanes,
            "macs_per_second": machine.peak_bytes_per_second / 2,
            "internal_bytes_per_second": machine.peak_bytes_per_second,
            "most_vectors": MOST_VECTORS,
            "times_and_energies": "modelled",
            **machine.timing,
        },
        link=link,
        capacity_bytes=machine.channels * machine.banks * machine.rows * row,
    )
