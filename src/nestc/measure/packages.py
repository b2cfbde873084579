"""Imports of packages that are compared with, which may be missing."""

from __future__ import annotations

import importlib
from typing import Any

from nestc.errors import Error


def package(name: str) -> Any:
    """The module called `name`. Raises Error with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Error(f"{name} is not installed; pip install 'nestc[bench]' brings it") from error
