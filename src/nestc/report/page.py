"""Makes the page of a report: one HTML file with its style, its scripts and the data inside, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from nestc.errors import Error
from nestc.report.data import collect
from nestc.report.observe import Inputs
from nestc.report.schema import AccuracyData, ReportData

if TYPE_CHECKING:
    from nestc.runtime.executable import Executable

SCRIPTS = ("base.js", "graph.js", "charts.js", "table.js", "page.js", "selftest.js")
"""In the order in which they are run; together they are one function."""


def render(data: ReportData) -> str:
    """The page. Its security policy allows the scripts and the style it holds, by their hashes, and nothing else."""
    style = _asset("page.css")
    script = "(() => {\n'use strict';\n" + "".join(map(_asset, SCRIPTS)) + "})();\n"
    texts = {
        "TITLE": html.escape(f"{data.model} - nestc report"),
        "POLICY": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        "STYLE": style,
        "SCRIPT": script,
        "DATA": block(data.to_json()),
    }
    # All at once: a name in the data that looks like a key is left alone.
    return re.sub(f"@({'|'.join(texts)})@", lambda found: texts[found[1]], _asset("page.html"))


def block(data: object) -> str:
    """JSON that can stand inside a script element: ASCII, and none of the characters with which HTML begins."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write(
    executable: Executable,
    path: str | os.PathLike[str],
    runs: int = 10,
    inputs: Inputs | None = None,
    accuracy: Sequence[AccuracyData] = (),
    requests: int = 1,
) -> ReportData:
    """Run an executable and write its report; the file appears only when it is complete.

    Raises what `collect` raises, and Error if the file cannot be written.
    """
    data = collect(executable, runs, inputs, accuracy, requests)
    save(data, path)
    return data


def save(data: ReportData, path: str | os.PathLike[str]) -> None:
    """Write the page of a report. Raises Error if it cannot be written."""
    destination = Path(path)
    temporary = destination.with_name(f"{destination.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(render(data), encoding="utf-8")
        temporary.replace(destination)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Error(f"cannot write the report to {destination}: {error.strerror or error}") from error


def _asset(name: str) -> str:
    return (resources.files("nestc.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a security policy names what is inline: the SHA-256 of its bytes."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
