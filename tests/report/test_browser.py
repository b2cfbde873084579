"""The page in a browser (headless Chromium): it draws everything, runs without an error, and does what a click asks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import nestc
from nestc.report import ReportData, collect
from nestc.report.page import save

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
).split()

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here to open the page in")


class Dom(HTMLParser):
    """The attributes of every element that the browser has made."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def find(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        """Attributes of all elements of this tag and (if given) class."""
        wanted = set(kind.split())
        return [given for name, given in self.elements if name == tag and wanted <= set(given.get("class", "").split())]


def opened(data: ReportData, folder: Path, part: str = "") -> Dom:
    """The page of a report as a browser has drawn it."""
    assert CHROMIUM is not None
    save(data, folder / "r.html")
    address = (folder / "r.html").as_uri() + part
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", address]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    dom = Dom(result.stdout)
    (page,) = dom.find("html")
    assert "data-error" not in page, page["data-error"]
    assert page["data-drawn"] == "yes"
    return dom


def test_everything_is_drawn_and_can_be_used(played: Callable[..., Any], tmp_path: Path) -> None:
    data = collect(played(), requests=2)
    dom = opened(data, tmp_path, "#test")
    assert [each["data-region"] for each in dom.find("g", "node")] == [region.name for region in data.regions]
    assert len(dom.find("path", "edge")) == len(data.edges) and len(dom.find("path", "edge crosses")) == 1
    assert len(dom.find("rect", "mark")) == 3 and len(dom.find("rect", "mark modelled")) == 1
    assert {each["data-region"] for each in dom.find("tr") if "data-region" in each} == {
        region.name for region in data.regions
    }
    assert len(dom.find("circle", "point")) == 3 + 3  # in the rooflines, and predicted beside observed
    results = json.loads(dom.find("html")[0]["data-test"])
    assert results and all(results.values()), results


def test_a_bundle_of_the_cpu_alone(on_cpu: nestc.Executable, tmp_path: Path) -> None:
    dom = opened(collect(on_cpu, runs=2), tmp_path)
    assert len(dom.find("g", "node")) == 4 and len(dom.find("rect", "mark")) == 1


def test_names_are_text_and_nothing_else(played: Callable[..., Any], tmp_path: Path) -> None:
    nasty = "</script><img src=x onerror=alert(1)>\"'& \u2028\u4f60"
    data = collect(played())
    region = replace(data.regions[0], name=nasty, reason=nasty, nodes=(nasty, nasty), refusals={nasty: nasty})
    partition = replace(data.partitions[0], regions=(nasty, *data.partitions[0].regions[1:]))
    data = replace(
        data, model=nasty, regions=(region, *data.regions[1:]), partitions=(partition, *data.partitions[1:]), edges=()
    )
    dom = opened(data, tmp_path, "#test")
    assert not dom.find("img")
    assert dom.find("g", "node")[0]["data-region"] == nasty
    assert re.search("alert", dom.find("html")[0].get("data-error", "")) is None
