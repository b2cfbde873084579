"""Runs bundles; imports no compiler stage."""

from __future__ import annotations

import os

from nestc.bundle.read import read
from nestc.runtime.executable import Executable
from nestc.runtime.session import OnFailure

__all__ = ["Executable", "open"]


def open(path: str | os.PathLike[str], *, threads: int | None = None, on_failure: OnFailure = None) -> Executable:
    """Load the bundle at `path`, ready to run with `threads` threads (by default as many as it was compiled for).

    With `on_failure` "cpu" the CPU runs what a device that fails, or is not here, should have run; the model must have
    been compiled with it. Raises BundleError if the file is not a good bundle, and TargetError if a device of it is not
    here or lacks what the code needs.
    """
    return Executable(read(path), threads=threads, on_failure=on_failure)
