"""Products of several matrices with the same vectors become one: the vectors are written once, and rows are filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.regions import Array, Product


@dataclass(frozen=True, eq=False)
class Group:
    """Products that are one launch, in order; ``origins`` are the ONNX nodes of each."""

    members: tuple[Product, ...]
    origins: tuple[tuple[str, ...], ...]

    @property
    def first_outputs(self) -> tuple[int, ...]:
        """Where each member's outputs begin among those of all."""
        return tuple(int(n) for n in np.cumsum([0, *(member.m for member in self.members[:-1])]))

    def layer(self) -> MatrixVector:
        """Their matrices one below the other."""
        first = self.members[0]
        single = len(self.members) == 1
        return MatrixVector(
            name="+".join(member.name for member in self.members),
            weights=first.weights() if single else np.concatenate([member.weights() for member in self.members]),
            bias=self._bias(),
            activation=first.activation,
            inputs=first.source,
            output="+".join(member.result for member in self.members),
            vectors=first.rows,
            origin=tuple(node for origin in self.origins for node in origin),
        )

    def _bias(self) -> Array | None:
        if all(member.bias is None for member in self.members):
            return None
        zeros = (np.zeros(member.m, np.float32) for member in self.members)
        return np.concatenate(
            [zero if member.bias is None else member.bias for member, zero in zip(self.members, zeros, strict=True)]
        )


def grouped(products: Sequence[Product], origins: Sequence[tuple[str, ...]]) -> list[Group]:
    """Products by the vectors that they multiply and the activation that follows, in the order of their first ones.

    All that a member needs is there when the first one runs: the vectors, and constants.
    """
    found: list[list[int]] = []
    for index, product in enumerate(products):
        for group in found:
            if _together(products[group[0]], product):
                group.append(index)
                break
        else:
            found.append([index])
    return [Group(tuple(products[i] for i in group), tuple(origins[i] for i in group)) for group in found]


def _together(first: Product, other: Product) -> bool:
    if (first.source, first.rows, first.k, first.activation) != (other.source, other.rows, other.k, other.activation):
        return False
    if first.take is None or other.take is None:
        return first.take is other.take
    return bool(np.array_equal(first.take, other.take))
