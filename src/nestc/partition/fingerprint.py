"""What a measured time depends on, as two hashes: of the region, whatever its values are called, and of the device."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

from nestc import __version__
from nestc.errors import TargetError
from nestc.graph.region import Region
from nestc.graph.structure import digest, plain, structure
from nestc.targets.api import Target

MODELLED = "times_and_energies"
"""A machine fact: "modelled" for a target whose times come from a simulator and so are the same on every machine."""

FEW = 16
"""So many floating numbers may be limits, exponents or sizes, which decide what is computed; more are parameters."""

_SCALED = ("QuantizeLinear", "DequantizeLinear")
"""Operators whose scales decide how numbers are rounded, and so which instructions do it."""

_NO_PART = ("resource", "link", "watts", "capacity_bytes")
"""Of a machine: what is no part of a region's time."""

_HUBS = ("nestc", "nestc.targets", "nestc.runtime", "nestc.runtime.devices")
"""Modules that lead to every target: what they import says nothing about one of them."""

_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)|import[ \t]+([\w., \t]+))", re.MULTILINE
)


def region_hash(region: Region, body: bytes = b"") -> str:
    """A hash of operators, attributes, types and how values connect; what values, nodes and the region are called does
    not count.

    Constants count by their contents, since kernels are chosen by them (limits of a Clip, scales, whether sums of
    integer weights saturate), except floating parameters of more than `FEW` elements, which count by type and shape:
    layers of one geometry take one time. `body` stands for graphs inside control flow operators, which a Region does
    not hold.
    """
    by_contents = _by_contents(region)

    def contents(name: str) -> Any:
        return plain(region.constants[name]()) if name in by_contents else "parameter"

    return digest([*structure(region, contents), hashlib.sha256(body).hexdigest()])


def chain_hash(hashes: Sequence[str], regions: Sequence[Region], outputs: Iterable[str]) -> str:
    """A hash of regions, with the hashes given, that run as one partition in this order: how they connect.

    `outputs` are the values that something outside needs.
    """
    numbers: dict[str, int] = {}

    def number(names: Iterable[str]) -> list[int]:
        return [numbers.setdefault(name, len(numbers)) for name in names]

    listed = [
        [text, number(region.inputs), number(region.outputs)] for text, region in zip(hashes, regions, strict=True)
    ]
    return digest([listed, sorted(number(outputs))])


def is_modelled(target: Target) -> bool:
    """Whether a simulator tells what a target takes, the same every time."""
    return target.machine.facts.get(MODELLED) == "modelled"


def device_fingerprint(target: Target, threads: int) -> str:
    """A hash of what a time on `target` depends on besides the region.

    These are the target's class and options, the machine's facts, the code of nestc (or of another package) that the
    target and its runtime consist of, versions of what that code imports and, unless times are modelled, this
    processor, the cores that this process may use and `threads`. Names do not count: two devices of one kind share
    their times.
    """
    machine = {
        item.name: plain(getattr(target.machine, item.name))
        for item in dataclasses.fields(target.machine)
        if item.name not in _NO_PART
    }
    options = {
        key: plain(value)
        for key, value in vars(target).items()
        if not key.startswith("_") and key not in ("name", "machine", "offers") and _is_option(value)
    }
    about: dict[str, Any] = {
        "class": f"{type(target).__module__}.{type(target).__qualname__}",
        "machine": machine,
        "options": options,
        "nestc": __version__,
        "code": _code_of(_modules_of(target)),
    }
    if not is_modelled(target):
        about |= {"host": host_facts(), "threads": threads}
    return digest(about)


@lru_cache(maxsize=1)
def host_facts() -> Mapping[str, Any]:
    """This processor as the system describes it, and the cores that this process may use; nothing is measured."""
    facts: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version_tuple()[:2],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    }
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {**facts, "processor": platform.processor()}
    first: dict[str, str] = {}
    for line in described.splitlines():
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    wanted = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    flags = sorted(first.get("flags", first.get("Features", "")).split())
    return {**facts, **{key: first[key] for key in wanted if key in first}, "flags": flags}


def _by_contents(region: Region) -> set[str]:
    """The constants that count by their contents."""
    scales = {name for op in region.ops if op.op_type in _SCALED for name in op.inputs[1:]}
    return {
        name
        for name in region.constants
        if name in scales
        or not region.types[name].dtype.startswith(("float", "bfloat"))
        or prod(region.types[name].shape) <= FEW
    }


def _is_option(value: object) -> bool:
    """Whether an attribute of a target is a choice; what can be changed in place is work in progress."""
    if dataclasses.is_dataclass(value):
        return True
    return value is None or isinstance(value, str | bytes | int | float | Path | tuple)


def _modules_of(target: Target) -> tuple[str, ...]:
    """The modules of a target's compile side and, if the device is here, of its run side."""
    found = [type(target).__module__]
    with contextlib.suppress(TargetError):  # not here: its times are estimates, which the run side has no part in
        found.append(type(target.open()).__module__)
    return tuple(dict.fromkeys(found))


@lru_cache(maxsize=64)
def _code_of(modules: tuple[str, ...]) -> str:
    """A digest of the source of modules, of everything that they import from nestc and from their own packages, and of
    the versions of other packages they import."""
    own = {"nestc", *(module.partition(".")[0] for module in modules)}
    waiting, sources, others = list(modules), dict[str, str](), set[str]()
    while waiting:
        module = waiting.pop()
        path = _file_of(module)
        if module in sources or module in _HUBS or path is None:
            continue
        try:
            sources[module] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # compiled, or inside an archive: its package's version has to do
        for imported in _imports(sources[module]):
            top = imported.partition(".")[0]
            if top in own:
                waiting.append(imported)
            else:
                others.add(top)
    texts = {module: hashlib.sha256(text.encode()).hexdigest() for module, text in sources.items()}
    return digest([texts, {name: _version(name) for name in sorted(others - sys.stdlib_module_names)}])


def _imports(source: str) -> set[str]:
    """Modules that a source imports, also inside functions; names imported from a package may be modules of it."""
    found: set[str] = set()
    for package, names, alone in _IMPORT.findall(source):
        if alone:
            found |= {each.split()[0] for each in alone.split(",") if each.strip()}
            continue
        found.add(package)
        found |= {f"{package}.{each.split()[0]}" for each in names.strip("()").split(",") if each.strip()}
    return found


def _file_of(module: str) -> Path | None:
    """Where a module's source lies, without importing anything; None if it is no module."""
    loaded: ModuleType | None = sys.modules.get(module)
    if loaded is not None and getattr(loaded, "__file__", None):
        return Path(str(loaded.__file__))
    top, _, rest = module.partition(".")
    package = sys.modules.get(top)
    for folder in getattr(package, "__path__", ()):
        base = Path(folder).joinpath(*rest.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def _version(name: str) -> str:
    """The installed version of a package that a module is imported from, where the two have one name."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
