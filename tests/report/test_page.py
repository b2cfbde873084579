"""The page: well-formed, loads nothing, and no name in a model can break out of the data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import nestc
from nestc.report import collect, render, write
from nestc.report.page import block, save

Make = Callable[..., Any]
NASTY = "</script><script>alert(1)</script> & \"'<!-- \u2028 \u4f60 @DATA@"
VOID = {"meta", "input", "link", "br", "img", "hr"}


class Nesting(HTMLParser):
    """Checks that every element is closed in order; keeps ids, inline contents and links."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.contents: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [
            given[key] or "" for key in ("href", "src", "action", "data", "srcset", "poster") if key in given
        ]
        assert "style" not in given and not any(key.startswith("on") for key in given)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.contents:
            self.contents[self.open[-1]].append(data)


def parsed(page: str) -> Nesting:
    parser = Nesting()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def test_the_page_is_well_formed_and_loads_nothing(played: Make) -> None:
    page = render(collect(played()))
    found = parsed(page)
    assert len(found.ids) == len(set(found.ids))
    assert found.links and all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    outside = page.replace(found.contents["script"][0], "")
    namespace = "http://www.w3.org/2000/svg"  # a name, which is never fetched
    assert re.findall(r"(?:https?:)?//[\w.]+[^\s'\"]*", outside.replace(namespace, "")) == []
    assert re.findall(r"url\((?!#)|@import|\bfetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon", outside) == []


def test_the_policy_allows_what_is_inline_by_its_hash_and_nothing_else(played: Make) -> None:
    found = parsed(render(collect(played())))

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    _, script = found.contents["script"]
    assert found.policy.split("; ") == [
        "default-src 'none'",
        f"style-src {hashed(found.contents['style'][0])}",
        f"script-src {hashed(script)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def test_names_cannot_break_out(played: Make) -> None:
    from dataclasses import replace

    data = collect(played())
    nasty = replace(data, model=NASTY, regions=(replace(data.regions[0], name=NASTY, reason=NASTY), *data.regions[1:]))
    page = render(nasty)
    found = parsed(page)
    assert found.contents["title"] == [f"{NASTY} - nestc report"]
    assert len(found.contents["script"]) == 2
    held = json.loads(found.contents["script"][0])
    assert held["model"] == NASTY and held["regions"][0]["name"] == NASTY
    assert "alert(1)</script>" not in page


def test_a_data_block_is_ascii_without_markup() -> None:
    text = block({"a": NASTY, "b": "\ud800"})
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == {"a": NASTY, "b": "\ud800"}
    with pytest.raises(ValueError):
        block(float("nan"))


def test_a_report_is_written_whole_or_not_at_all(played: Make, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    data = write(played(), path, runs=1)
    assert path.read_text(encoding="utf-8") == render(data)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(nestc.Error, match="cannot write the report"):
        save(data, tmp_path / "no" / "such" / "r.html")
    with pytest.raises(nestc.Error, match="cannot write the report"):
        save(data, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
