"""What is known of the ways to compute regions: the user's tuning store, and behind it what nestc ships."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import cast

from nestc.cache import TuningStore
from nestc.errors import Error
from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine, Family
from nestc.kernels.ways import named
from nestc.tune.key import code_version, machine_key, region_key

Times = Mapping[str, float]
"""Median seconds of each way to compute a region, by its name, the default first; measured side by side, so that they
compare."""

WORTH = 0.97
"""A way replaces the default where it takes at most this part of its time; less is noise."""

SHIPPED_WORTH = 0.95
"""The same for what is shipped, which has to pay on other machines of the kind, too."""

_FORMAT = 1
"""Raised when the meaning of an entry changes, so that older ones are measured anew."""

_SHIPPED = "defaults.json"


class Tuned:
    """The times that are known for one machine and number of threads, as they were when it was made.

    ``digest`` changes whenever another way becomes the fastest of a region: times of whole regions depend on it.
    """

    def __init__(self, times: Mapping[str, Times]) -> None:
        self._times = times
        taken = sorted((key, list(ways)[fastest(list(ways), ways)]) for key, ways in times.items() if ways)
        self.digest = hashlib.sha256(json.dumps(taken).encode()).hexdigest()[:16] if taken else ""

    def times(self, region: Region) -> Times:
        """What is known of a region; empty if nothing is."""
        return self._times.get(region_key(region), {}) if self._times else {}

    def pick(self, region: Region, ways: Sequence[Family]) -> Family:
        """The way that measurements say is fastest; the first one (the default) where they say nothing, or too little.

        Beside `ways` come those with other parameters that a name holds. Other names are ignored: they may be of
        another version, or not allowed here.
        """
        times = self.times(region) if len(ways) > 1 else {}
        if not times:
            return ways[0]
        names = {way.name for way in ways}
        others = (named(name, region) for name in times if name not in names)
        known = [*ways, *(way for way in others if way is not None)]
        return known[fastest([way.name for way in known], times)]


def fastest(names: Sequence[str], times: Times) -> int:
    """Which of some ways to take, the first being the default."""
    if not names or names[0] not in times:
        return 0
    best = min((index for index, name in enumerate(names) if name in times), key=lambda index: times[names[index]])
    return best if times[names[best]] <= WORTH * times[names[0]] else 0


class ChoiceStore:
    """Reads and writes times, in the user's tuning store or in the file given. It only saves time: whatever is wrong
    with it, the defaults are taken; and any number of processes may use it at once."""

    def __init__(self, path: Path | None = None) -> None:
        self._texts = TuningStore(path)

    @property
    def path(self) -> Path:
        """The file."""
        return self._texts.path

    def tuned(self, machine: CpuMachine, threads: int) -> Tuned:
        """Everything that is known for a machine: what was measured here, then what nestc ships."""
        return Tuned({**shipped(machine_key(machine), threads), **self.own(machine, threads)})

    def own(self, machine: CpuMachine, threads: int) -> dict[str, Times]:
        """What was measured with this version of the code, by `region_key`."""
        prefix = _prefix(machine, threads)
        found = ((key[len(prefix) :], _read(text)) for key, text in self._texts.starting(prefix).items())
        return {key: times for key, times in found if times}

    def get(self, key: str, machine: CpuMachine, threads: int) -> Times:
        """What was measured for one region; empty if nothing was."""
        text = self._texts.get(_prefix(machine, threads) + key)
        return {} if text is None else _read(text)

    def put(self, key: str, machine: CpuMachine, threads: int, times: Times) -> None:
        """Keep times that were measured side by side, with those of other ways that are known already.

        Times of another hour are scaled by how the default, the first of `times`, differs: machines drift.
        """
        known = self.get(key, machine, threads)
        default = next(iter(times))
        scale = times[default] / known[default] if default in known else None
        others = {} if scale is None else {name: known[name] * scale for name in known if name not in times}
        self._texts.put(_prefix(machine, threads) + key, json.dumps({**times, **others}))


def _prefix(machine: CpuMachine, threads: int) -> str:
    return f"cpu|{_FORMAT}|{code_version()}|{machine_key(machine)}|{threads}|"


def _read(text: str) -> dict[str, float]:
    """The times that a text holds; none if it holds something else."""
    try:
        return _times(json.loads(text))
    except ValueError:
        return {}


def _times(data: object) -> dict[str, float]:
    given = cast("Mapping[str, object]", data) if isinstance(data, dict) else {}
    return {
        name: float(seconds)
        for name, seconds in given.items()
        if isinstance(seconds, int | float) and math.isfinite(seconds) and seconds > 0
    }


def shipped(machine: str, threads: int) -> dict[str, Times]:
    """What comes with nestc for a kind of machine (`machine_key`), by `region_key`."""
    return _defaults().get(machine, {}).get(str(threads), {})


@lru_cache(maxsize=1)
def _defaults() -> dict[str, dict[str, dict[str, Times]]]:
    data = json.loads((files("nestc.tune") / _SHIPPED).read_text(encoding="utf-8"))
    return {
        machine: {
            threads: {key: _times(times) for key, times in regions.items()} for threads, regions in by_threads.items()
        }
        for machine, by_threads in data["machines"].items()
    }


def export(path: Path, times: Mapping[str, Times], machine: CpuMachine, threads: int) -> int:
    """Add what is clearly better than the default to a file in the format that nestc ships; how many regions that are.

    Raises Error if the file cannot be read or written, or is something else.
    """
    kept = {
        key: {name: float(f"{seconds:.4g}") for name, seconds in ways.items()}
        for key, ways in sorted(times.items())
        if ways and min(ways.values()) <= SHIPPED_WORTH * next(iter(ways.values()))
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machines": {}}
        data["machines"].setdefault(machine_key(machine), {}).setdefault(str(threads), {}).update(kept)
        temporary.write_text(json.dumps(data, indent=1, sort_keys=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Error(f"{path} is no file of tuned choices; give another name to --export") from error
    except OSError as error:
        raise Error(f"cannot write {path}: {error.strerror or error}") from error
    return len(kept)
