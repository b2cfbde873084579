"""A layer for AiM: what is computed, in float, before anything is mapped to banks.

A partition is a list of layers on values by name. Matrix products run in the memory; what lies between them (gates of a
recurrent cell, activation functions that the memory does not apply) runs on the host in float32, see `recurrent`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

ACTIVATIONS = ("relu", "sigmoid", "tanh", "gelu")

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class MatrixVector:
    """output[v] = activation(weights @ inputs[v] + bias) for `vectors` vectors.

    ``weights``: float (m, k); ``bias``: float (m,) or None; ``activation``: one of `ACTIVATIONS` or None. ``inputs``
    names a value of `vectors` x k numbers, ``output`` one of `vectors` x m. ``origin`` names the ONNX nodes.
    """

    name: str
    weights: Array
    bias: Array | None
    activation: str | None
    inputs: str
    output: str
    vectors: int = 1
    origin: tuple[str, ...] = ()

    @property
    def m(self) -> int:
        """Length of a result."""
        return int(self.weights.shape[0])

    @property
    def k(self) -> int:
        """Length of an input vector."""
        return int(self.weights.shape[1])
