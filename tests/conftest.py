"""What tests anywhere use: the command line, called in this process, and a function, called in several at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, NamedTuple

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


@pytest.fixture
def at_once() -> Callable[..., None]:
    """Call a function in processes of their own at once, one for each tuple of arguments; all have to succeed."""

    def call(function: Callable[..., None], *arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=function, args=each) for each in arguments]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
            assert worker.exitcode == 0

    return call
