"""Small AiM machines for tests: geometry cut down, timing of the preset."""

from __future__ import annotations

from dataclasses import replace

from nestc.runtime.aim.machine import AimMachine, preset


def small(channels: int = 3, columns: int = 6, groups: int = 1, queue: int = 5) -> AimMachine:
    """A machine of `channels` with `groups` of four banks, as many lanes, and rows of `columns`."""
    return replace(
        preset("gddr6_aim"),
        name="small",
        channels=channels,
        bank_groups=groups,
        lanes=4 * groups,
        rows=256,
        columns=columns,
        global_buffer_columns=columns,
        gprs=512,
        queue=queue,
    )
