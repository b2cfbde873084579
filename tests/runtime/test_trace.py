"""Timelines as traces."""

import json

import pytest
from scripted import bundle, part, scripted, x

from nestc.bundle.bundle import DeviceSpec
from nestc.errors import Error
from nestc.runtime import Executable
from nestc.runtime.trace import trace

pytestmark = pytest.mark.usefixtures("scripted")

__all__ = ["scripted"]


def row(device: str, region: str, start: float, end: float, request: int = 0, **more: object) -> dict[str, object]:
    return {
        "device": device,
        "region": region,
        "start_us": start,
        "end_us": end,
        "kind": "modelled",
        "request": request,
        **more,
    }


def test_every_row_is_a_bar_on_its_track(tmp_path):
    parts = [part("A", "a", "x", "t", 1.0), part("B", "cpu", "t", "y", 2.0)]
    with Executable(bundle(parts, "y", [DeviceSpec("a", "a", 0.0, 0.5, 0.0, 0.0, "estimated")])) as executable:
        list(executable.map([x(), x()]))
        executable.trace(tmp_path / "t.json")
        timeline = executable.timeline()
        with pytest.raises(Error, match=r"cannot write the trace .*none/t\.json: No such file"):
            executable.trace(tmp_path / "none" / "t.json")
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(names.values()) == [
        "a (modelled)",
        "cpu (modelled)",
        "host memory->a (estimated)",
        "host memory->a (estimated), 2",  # the inputs of both requests come at once
        "a->cpu (estimated)",
    ]
    (process,) = [event for event in events if event["name"] == "process_name"]
    assert process["args"] == {"name": "scripted"}
    bars = [event for event in events if event["ph"] == "X"]
    found = sorted((names[bar["tid"]].split(" (")[0], bar["name"], bar["ts"], bar["ts"] + bar["dur"]) for bar in bars)
    assert found == sorted((each["device"], each["region"], each["start_us"], each["end_us"]) for each in timeline)
    assert {bar["cat"] for bar in bars if "bytes" in bar["args"]} == {"transfer"}
    assert bars[0]["args"] == {"request": 0, "kind": "modelled"}


def test_tracks_never_overlap_and_say_what_is_modelled():
    rows = [
        row("a->b", "t", 0, 4, bytes=8),
        row("a->b", "u", 1, 2, bytes=8),
        row("a->b", "v", 2, 3, bytes=8),
        row("a->b", "w", 3.5, 5, bytes=8),
        row("b", "B", 4, 6) | {"kind": "measured"},
        row("b", "C", 6, 7, instead_of="c"),
    ]
    events = trace(rows)
    bars = {event["name"]: event for event in events if event["ph"] == "X"}
    assert [bars[name]["tid"] for name in "BCtuvw"] == [0, 0, 1, 2, 2, 2]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["b (measured and modelled)", "a->b (modelled)", "a->b (modelled), 2"]
    assert bars["C"]["args"]["instead_of"] == "c"
    assert [event for event in events if event["ph"] in "stf"] == []
    assert len(trace([])) == 1


def test_arrows_follow_each_request():
    rows = [
        row("a", "A", 0, 1),
        row("b", "B", 1, 2),
        row("a", "C", 2, 3),
        row("a", "A", 1, 2, 1),
        row("b", "B", 2, 3, 1),
    ]
    arrows = [event for event in trace(rows) if event["ph"] in "stf"]
    assert [(event["id"], event["ph"], event["ts"], event["tid"]) for event in arrows] == [
        (0, "s", 0, 0),
        (0, "t", 1, 1),
        (0, "f", 2, 0),
        (1, "s", 1, 0),
        (1, "f", 2, 1),
    ]
    assert {event["bp"] for event in arrows} == {"e"}
