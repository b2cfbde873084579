"""The accuracy tools by the names that users give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nestc.errors import QuantizationError
from nestc.quant.scheme import nearest
from nestc.quant.squant import SQUANT
from nestc.quant.tools import Tool

TOOLS: Mapping[str, Tool] = {tool.name: tool for tool in (SQUANT,)}


def tools_named(names: Sequence[str | Tool]) -> tuple[Tool, ...]:
    """The tools of these names, in this order. Raises QuantizationError with the nearest known name."""
    found: list[Tool] = []
    for name in names:
        if isinstance(name, str) and name not in TOOLS:
            known = ", ".join(TOOLS)
            raise QuantizationError(f"there is no accuracy tool {name!r}{nearest(name, TOOLS)}; there are {known}")
        found.append(TOOLS[name] if isinstance(name, str) else name)
    return tuple(found)
