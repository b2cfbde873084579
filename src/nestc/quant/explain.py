"""Why each node of a quantized model is quantized or not, kept in the metadata of its nodes and so in its file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from nestc.graph.model import Model
from nestc.quant.choose import Decision

ROLE, SCHEME, REASON = "nestc.role", "nestc.scheme", "nestc.reason"
FLOAT = "float"


@dataclass(frozen=True)
class Reason:
    """One node of a quantized model: its role (of `Decision`), its scheme (``float`` if none) and the reason."""

    node: str
    op: str
    role: str
    scheme: str
    reason: str


def annotate(node: ir.Node, decision: Decision) -> None:
    """Write a decision into the metadata of the node."""
    node.metadata_props[ROLE] = decision.role
    node.metadata_props[SCHEME] = FLOAT if decision.scheme is None else decision.scheme.name
    node.metadata_props[REASON] = decision.reason


def reasons(model: Model) -> list[Reason]:
    """The reasons that a quantized model carries, in execution order; empty for other models."""
    return [
        Reason(
            node.name or "",
            node.op_type,
            node.metadata_props[ROLE],
            node.metadata_props.get(SCHEME, FLOAT),
            node.metadata_props.get(REASON, ""),
        )
        for node in model.ir.graph
        if ROLE in node.metadata_props
    ]


def quantized_ops(found: Sequence[Reason]) -> dict[str, int]:
    """How many nodes of each operator are computed in a scheme's format (tails not counted), most first."""
    return dict(Counter(each.op for each in found if each.role not in ("float", "tail")).most_common())


def kept_float(found: Sequence[Reason]) -> list[str]:
    """Names of the nodes that stay float."""
    return [each.node for each in found if each.role == "float"]


def in_words(found: Sequence[Reason]) -> list[str]:
    """A line a node, for people."""
    width = max((len(each.scheme) for each in found), default=0)
    return [f"{each.scheme:<{width}}  {each.op} {each.node}: {each.reason}" for each in found]
