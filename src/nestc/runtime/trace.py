"""A timeline as trace events for Perfetto (ui.perfetto.dev) or chrome://tracing: a track a device and one a link."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from nestc.errors import Error

Row: TypeAlias = Mapping[str, Any]
Event: TypeAlias = dict[str, Any]

_PROCESS = 0


def trace(timeline: Sequence[Row], name: str = "nestc") -> list[Event]:
    """Events in the Trace Event Format for the rows of `Executable.timeline`; ``ts`` and ``dur`` are microseconds.

    One process; tracks of devices stand before those of links, each named with how its times are known. What overlaps
    on a track (a link carries any number of tensors at once) gets one more track. Arrows lead through the stages of
    each request where there are several.
    """
    events: list[Event] = [{"name": "process_name", "ph": "M", "pid": _PROCESS, "args": {"name": name}}]
    rows = sorted(timeline, key=lambda row: ("bytes" in row, row["start_us"], row["end_us"]))
    bars: list[Event] = []
    tracks = 0
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        kinds = " and ".join(dict.fromkeys(row["kind"] for row in own))
        lanes = _lanes(own)
        for lane in range(max(lanes) + 1):
            label = f"{device} ({kinds})" if lane == 0 else f"{device} ({kinds}), {lane + 1}"
            about = {"pid": _PROCESS, "tid": tracks + lane}
            events.append({"name": "thread_name", "ph": "M", **about, "args": {"name": label}})
            events.append({"name": "thread_sort_index", "ph": "M", **about, "args": {"sort_index": tracks + lane}})
        bars.extend(_bar(row, tracks + lane) for row, lane in zip(own, lanes, strict=True))
        tracks += max(lanes) + 1
    return events + bars + _arrows(bars)


def write_trace(timeline: Sequence[Row], path: str | os.PathLike[str], name: str = "nestc") -> None:
    """Write the trace of a timeline as JSON. Raises Error if the file cannot be written."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({"traceEvents": trace(timeline, name), "displayTimeUnit": "ns"}), "utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Error(f"cannot write the trace {target}: {error.strerror or error}") from error


def _lanes(rows: Sequence[Row]) -> list[int]:
    """For rows in the order of their begin, the first track where nothing else is at the time."""
    ends: list[float] = []
    found: list[int] = []
    for row in rows:
        lane = next((lane for lane, end in enumerate(ends) if end <= row["start_us"]), len(ends))
        ends[lane : lane + 1] = [row["end_us"]]
        found.append(lane)
    return found


def _bar(row: Row, track: int) -> Event:
    details = {key: row[key] for key in ("request", "kind", "bytes", "instead_of") if key in row}
    return {
        "name": row["region"],
        "cat": "transfer" if "bytes" in row else "partition",
        "ph": "X",
        "pid": _PROCESS,
        "tid": track,
        "ts": row["start_us"],
        "dur": row["end_us"] - row["start_us"],
        "args": details,
    }


def _arrows(bars: Sequence[Event]) -> list[Event]:
    """Flow events from bar to bar of each request, if there are several requests."""
    requests = sorted({bar["args"]["request"] for bar in bars})
    if len(requests) < 2:
        return []
    arrows: list[Event] = []
    for request in requests:
        own = sorted((bar for bar in bars if bar["args"]["request"] == request), key=lambda bar: bar["ts"])
        for number, bar in enumerate(own):
            phase = "s" if number == 0 else "t" if number < len(own) - 1 else "f"
            place = {"pid": bar["pid"], "tid": bar["tid"], "ts": bar["ts"]}
            arrows.append(
                {"name": f"request {request}", "cat": "request", "ph": phase, "id": request, "bp": "e", **place}
            )
    return arrows
