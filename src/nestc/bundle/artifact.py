"""What a target's compiler hands to a bundle, and what a device makes of it; imported by both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np


@dataclass(frozen=True)
class Artifact:
    """A compiled partition: named blobs (code, text), constant arrays, and what the device needs to run it.

    ``files`` go into the bundle as they are, ``weights`` as safetensors (each padded to 64 bytes), and
    ``metadata`` (JSON values only) into the manifest.
    """

    kind: str
    files: Mapping[str, bytes]
    weights: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any]


class Elapsed(NamedTuple):
    """Time that a program took, in seconds, and how it is known."""

    seconds: float
    kind: Literal["measured", "modelled"]


class Program(Protocol):
    """A loaded artifact. Called with C-contiguous arrays in partition order; writes into `outputs`."""

    def __call__(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None]
    ) -> tuple[Sequence[np.ndarray], Elapsed]: ...

    def close(self) -> None: ...


class Device(Protocol):
    """The run side of a target."""

    name: str

    def load(self, artifact: Artifact, threads: int) -> Program: ...
