"""The command line, called in this process, for tests anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from nestc.cli import status


class Result(NamedTuple):
    """What a command left: exit status, stdout, stderr."""

    status: int
    out: str
    err: str


@pytest.fixture
def nestc(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call the command line with these arguments."""

    def call(*arguments: object) -> Result:
        code = status([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call
