"""A processing-in-DRAM machine as data, in a YAML file that a person can edit: geometry, timing, energy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import resources
from pathlib import Path

from nestc.errors import TargetError

FAMILIES = ("aim", "newton")
PRESETS = ("gddr6_aim", "newton_pimflow")

_GEOMETRY = (
    "channels",
    "bank_groups",
    "banks_per_group",
    "rows",
    "columns",
    "lanes",
    "global_buffer_columns",
    "gprs",
)
TIMINGS: Mapping[str, tuple[str, ...]] = {
    "aim": tuple(
        "nBL nCL nRCDRD nRCDRDMAC nRCDEWMUL nRCDRDAF nRCDRDCP nRCDWR nRCDWRCP nRP nRAS nRC nWR nRTP nCWL nCCDS nCCDL "
        "nRRDS nRRDL nWTRS nWTRL nCLREG nCWLREG nCWLGB nWPRE nMODCH nRFC nREFI".split()
    ),
    "newton": tuple("nBL nCCDS nCL nRCDR nRP nRC nFAW nGACT nGCOMP nREADRES nRTG nREFI nRFC".split()),
}
"""Timing parameters by family, in ticks; what they mean is in constraints.py."""


@dataclass(frozen=True)
class Energies:
    """What things cost: picojoules each, or milliwatts a channel (``_mw``)."""

    activate_bank: float
    """Open and close a row of one bank."""
    mac_all_banks: float
    """MACs of one column in all banks of a channel."""
    read_column: float
    write_column: float
    """256 bits inside the device."""
    transfer: float
    """256 bits between a channel and its controller."""
    global_buffer_read: float
    global_buffer_write: float
    command: float
    """A DRAM command on the wires."""
    request: float
    """A column request in the controller."""
    active_mw: float
    precharged_mw: float
    global_buffer_mw: float


@dataclass(frozen=True)
class AimMachine:
    """A machine: `channels` of `bank_groups` x `banks_per_group` banks; a row has `columns` of `lanes` elements.

    ``family``: the command set, ``aim`` or ``newton``. ``queue``: requests that wait in a channel. ``timings``: names
    and ticks, see `timing`. ``clock_hz``: ticks a second.
    """

    name: str
    family: str
    clock_hz: float
    channels: int
    bank_groups: int
    banks_per_group: int
    rows: int
    columns: int
    lanes: int
    global_buffer_columns: int
    gprs: int
    queue: int
    timings: tuple[tuple[str, int], ...]
    energies: Energies

    def __post_init__(self) -> None:
        """Refuses, with a `TargetError`, a machine that cannot be."""
        where = f"machine '{self.name}'"
        if self.family not in FAMILIES:
            raise TargetError(f"{where}: family is '{self.family}'; it must be one of {', '.join(FAMILIES)}")
        if not (math.isfinite(self.clock_hz) and self.clock_hz > 0):
            raise TargetError(f"{where}: clock_hz is {self.clock_hz}; it must be above 0")
        for key in (*_GEOMETRY, "queue"):
            least = 0 if key == "gprs" else 1
            if getattr(self, key) < least:
                raise TargetError(f"{where}: {key} is {getattr(self, key)}; it must be at least {least}")
        if self.family == "aim" and self.channels > 32:
            raise TargetError(f"{where}: channels is {self.channels}; a channel mask has 32 bits, so at most 32")
        if self.family == "aim" and self.lanes != self.banks:
            raise TargetError(
                f"{where}: {self.lanes} lanes and {self.banks} banks; a register holds a lane for each bank, so these "
                "must be equal"
            )
        wanted = TIMINGS[self.family]
        for name, ticks in self.timings:
            if name not in wanted:
                raise TargetError(
                    f"{where}: the family '{self.family}' has no timing {name}; it has {', '.join(wanted)}"
                )
            if ticks < 0:
                raise TargetError(f"{where}: {name} is {ticks}; it must not be negative")
        missing = [name for name in wanted if name not in self.timing]
        if missing:
            raise TargetError(f"{where} lacks the timing {', '.join(missing)}")
        for item in fields(Energies):
            value: float = getattr(self.energies, item.name)
            if not (math.isfinite(value) and value >= 0):
                raise TargetError(f"{where}: energy {item.name} is {value}; it must not be negative")

    @cached_property
    def timing(self) -> Mapping[str, int]:
        """Ticks by name of the parameter."""
        return dict(self.timings)

    @property
    def banks(self) -> int:
        """Banks of a channel."""
        return self.bank_groups * self.banks_per_group

    @property
    def row_elements(self) -> int:
        """Elements in a row of a bank."""
        return self.columns * self.lanes

    @property
    def outputs(self) -> int:
        """Rows of a matrix that one MAC_ABK works on: banks of all channels."""
        return self.banks * self.channels

    @property
    def peak_bytes_per_second(self) -> float:
        """Internal bandwidth: a column of every bank of every channel every nCCDS ticks."""
        return self.outputs * self.lanes * 2 / self.timing["nCCDS"] * self.clock_hz

    def seconds(self, ticks: int) -> float:
        """Modelled time of `ticks`."""
        return ticks / self.clock_hz


def preset(name: str) -> AimMachine:
    """The machine of a name in `PRESETS`.

    Raises:
        TargetError: there is no such name.
    """
    if name not in PRESETS:
        raise TargetError(f"there is no machine '{name}'; there are {', '.join(PRESETS)}, or a YAML file")
    folder = resources.files("nestc.runtime.aim") / "machines"
    return parse((folder / f"{name}.yaml").read_text(encoding="utf-8"), name)


def load(path: str | Path) -> AimMachine:
    """The machine of a preset's name or of a YAML file.

    Raises:
        TargetError: the file cannot be read, or does not describe a machine; the message has the number of the line.
    """
    if str(path) in PRESETS:
        return preset(str(path))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise TargetError(
            f"machine '{path}' cannot be read ({reason}); give one of {', '.join(PRESETS)}, or a YAML file"
        ) from error
    return parse(text, Path(path).stem)


def parse(text: str, name: str) -> AimMachine:
    """The machine that `text` describes: YAML of ``key: value`` lines, with one level of sections.

    Args:
        text: as in the presets' files.
        name: the machine's, if the text gives none; also for messages.

    Raises:
        TargetError: with the number of the line where one is at fault.
    """
    sections = _sections(text, name)
    unknown = [key for key in sections if key not in ("", "geometry", "host", "timing", "energy")]
    if unknown:
        line = min(line for _, line in sections[unknown[0]].values()) - 1 if sections[unknown[0]] else 0
        raise TargetError(
            f"machine '{name}', line {line}: there is no section '{unknown[0]}'; there are geometry, host, "
            "timing and energy"
        )
    top = sections.get("", {})
    _only(top, ("name", "family", "clock_hz"), "", name)
    geometry = _integers(sections.get("geometry", {}), _GEOMETRY, "geometry", name)
    host = _integers(sections.get("host", {}), ("queue",), "host", name)
    family = _text(top, "family", name)
    timing = {key: _integer(value, key, line, name) for key, (value, line) in sections.get("timing", {}).items()}
    wanted = tuple(item.name for item in fields(Energies))
    energy = sections.get("energy", {})
    _only(energy, wanted, "energy", name)
    _all(energy, wanted, "energy", name)
    clock, line = top.get("clock_hz", ("", 0))
    return AimMachine(
        name=top["name"][0] if "name" in top else name,
        family=family,
        clock_hz=_number(clock, "clock_hz", line, name),
        **geometry,
        **host,
        timings=tuple(timing.items()),
        energies=Energies(**{key: _number(value, key, line, name) for key, (value, line) in energy.items()}),
    )


def format_machine(machine: AimMachine) -> str:
    """The YAML text of a machine, which `parse` reads back."""
    lines = [f"name: {machine.name}", f"family: {machine.family}", f"clock_hz: {machine.clock_hz!r}", "", "geometry:"]
    lines += [f"  {key}: {getattr(machine, key)}" for key in _GEOMETRY]
    lines += ["", "host:", f"  queue: {machine.queue}", "", "timing:"]
    lines += [f"  {key}: {value}" for key, value in machine.timings]
    lines += ["", "energy:"]
    lines += [f"  {item.name}: {getattr(machine.energies, item.name)!r}" for item in fields(Energies)]
    return "\n".join(lines) + "\n"


_Section = dict[str, tuple[str, int]]
"""Texts by key, with their lines."""


def _sections(text: str, name: str) -> dict[str, _Section]:
    """Keys and values by section; those before the first section are in ``""``."""
    sections: dict[str, _Section] = {"": {}}
    section = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", 1)[0].rstrip()
        if not line.strip():
            continue
        where = f"machine '{name}', line {number}"
        if "\t" in raw[: len(raw) - len(raw.lstrip())]:
            raise TargetError(f"{where}: it is indented with a tab; use spaces")
        key, colon, value = line.strip().partition(":")
        if not colon or not key or (value and not value.startswith(" ")):
            raise TargetError(f"{where}: '{line.strip()}' is not 'key: value'")
        value = value.strip()
        indented = line[0] == " "
        if indented and not section:
            raise TargetError(f"{where}: '{key}' is indented, but stands under no section")
        if not indented:
            section = "" if value else key
            if not value:
                if key in sections:
                    raise TargetError(f"{where}: the section '{key}' is there twice")
                sections[key] = {}
                continue
        if not value:
            raise TargetError(f"{where}: '{key}' has no value; sections may not stand inside sections")
        target = sections[section if indented else ""]
        if key in target:
            raise TargetError(f"{where}: '{key}' is there twice")
        target[key] = (value.strip("'\""), number)
    return sections


def _only(section: _Section, keys: tuple[str, ...], title: str, name: str) -> None:
    for key, (_, line) in section.items():
        if key not in keys:
            place = f"'{title}' has" if title else "a machine has"
            raise TargetError(f"machine '{name}', line {line}: {place} no key '{key}'; it has {', '.join(keys)}")


def _all(section: _Section, keys: tuple[str, ...], title: str, name: str) -> None:
    missing = [key for key in keys if key not in section]
    if missing:
        raise TargetError(f"machine '{name}': the section '{title}' lacks {', '.join(missing)}")


def _integers(section: _Section, keys: tuple[str, ...], title: str, name: str) -> dict[str, int]:
    _only(section, keys, title, name)
    _all(section, keys, title, name)
    return {key: _integer(value, key, line, name) for key, (value, line) in section.items()}


def _text(section: _Section, key: str, name: str) -> str:
    if key not in section:
        raise TargetError(f"machine '{name}' lacks '{key}'")
    return section[key][0]


def _integer(value: str, key: str, line: int, name: str) -> int:
    try:
        return int(value.replace("_", ""))
    except ValueError as error:
        raise TargetError(f"machine '{name}', line {line}: {key} is '{value}'; it must be a whole number") from error


def _number(value: str, key: str, line: int, name: str) -> float:
    if not line:
        raise TargetError(f"machine '{name}' lacks '{key}'")
    try:
        return float(value)
    except ValueError as error:
        raise TargetError(f"machine '{name}', line {line}: {key} is '{value}'; it must be a number") from error
