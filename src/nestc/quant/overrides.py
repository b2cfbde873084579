"""Read which nodes get another scheme than the rest from a file: a mapping in the simplest part of YAML, or in JSON.

    # node or pattern: scheme or float
    stem_conv: float
    "blocks.*.project*": int16
    classifier: int8:granularity=tensor,method=percentile

One pair a line; ``*`` stands for any text and ``?`` for any letter; a name given as it is goes before patterns, a later
pattern before an earlier one. A key that begins with one of YAML's signs, or holds ``: `` or `` #``, stands in quotes.
No YAML package is needed for that, and every YAML package reads it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from nestc.errors import QuantizationError
from nestc.quant.scheme import FLOAT, Scheme, scheme_named

Overrides = dict[str, Scheme | None]

_PAIR = re.compile(
    r"""^(?: "(?P<double>(?:[^"\\]|\\.)*)" | '(?P<single>(?:[^']|'')*)' | (?P<plain>[^\s"'].*?) )
        \s*:\s+(?P<value>.*?)\s*$""",
    re.VERBOSE,
)
_COMMENT = re.compile(r"""^((?:[^"'#]|"(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|(?<=\S)["'#])*?)(?:(?:^|\s)\#.*)?$""")
_SIGNS = "*&!|>%@`[]{},?-"


def read_overrides(path: str | os.PathLike[str]) -> Overrides:
    """The overrides in a file: node name or pattern -> scheme, None for ``float``. Raises QuantizationError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise QuantizationError(f"cannot read the overrides {os.fspath(path)}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise QuantizationError(f"the overrides {os.fspath(path)} are not text in UTF-8: {error.reason}") from error
    return overrides_of(parse(text, os.fspath(path)), os.fspath(path))


def overrides_of(pairs: Mapping[str, str | Scheme | None], where: str = "overrides") -> Overrides:
    """Schemes from their names; ``float`` and None keep a node as it is. Raises QuantizationError."""
    found: Overrides = {}
    for key, value in pairs.items():
        if value is None or isinstance(value, Scheme):
            found[key] = value
            continue
        try:
            found[key] = None if value == FLOAT else scheme_named(value)
        except QuantizationError as error:
            raise QuantizationError(f"{where}, {key!r}: {error}, or {FLOAT}") from error
    return found


def parse(text: str, where: str = "overrides") -> dict[str, str]:
    """The pairs of the text. Raises QuantizationError with the line that is wrong."""
    if text.lstrip().startswith("{"):
        return _parse_json(text, where)
    pairs: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, value = _pair(line, f"{where}, line {number}")
        if key is None:
            continue
        if key in pairs:
            raise QuantizationError(f"{where}, line {number}: {key!r} stands there twice")
        pairs[key] = value
    return pairs


def _pair(line: str, where: str) -> tuple[str | None, str]:
    """Key and value of a line; the key is None if the line says nothing."""
    comment = _COMMENT.match(line)
    content = (comment.group(1) if comment else line).rstrip()
    if not content.strip() or content in ("---", "..."):
        return None, ""
    match = _PAIR.match(content)
    if match is None or not match["value"]:
        raise QuantizationError(f"{where}: {content.strip()!r} is not of the form `node: scheme`, without indentation")
    if match["plain"] is not None and match["plain"][0] in _SIGNS:
        raise QuantizationError(f"{where}: a key that begins with {match['plain'][0]!r} has to stand in quotes")
    key = match["plain"]
    if match["double"] is not None:
        key = re.sub(r"\\(.)", r"\1", match["double"])
    elif match["single"] is not None:
        key = match["single"].replace("''", "'")
    value = match["value"]
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return key, value


def _parse_json(text: str, where: str) -> dict[str, str]:
    try:
        content: object = json.loads(text)
    except ValueError as error:
        raise QuantizationError(f"{where} begins like JSON and is none: {error}") from error
    assert isinstance(content, dict)
    pairs: dict[str, str] = {}
    for key, value in content.items():  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(value, str):
            raise QuantizationError(f"{where}, {key!r}: the scheme has to be a text, such as int8 or {FLOAT}")
        pairs[str(key)] = value  # pyright: ignore[reportUnknownArgumentType]
    return pairs
