"""The accuracy tools by the names that users give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from nestc.errors import QuantizationError
from nestc.graph.model import Model
from nestc.quant.adaround import ADAROUND
from nestc.quant.bias import BIAS_CORRECTION
from nestc.quant.derive import derive
from nestc.quant.equalize import EQUALIZE
from nestc.quant.profile import Profile
from nestc.quant.scheme import Scheme, nearest
from nestc.quant.smooth import SMOOTHQUANT
from nestc.quant.squant import SQUANT
from nestc.quant.tools import Context, Tool


def _folded(prepared: Model, profile: Profile, context: Context) -> Profile:
    """Batch norms are folded by `nestc.quant.prepare`, before anything is measured; say how many could not be."""
    left = sum(node.op_type == "BatchNormalization" for node in prepared.ir.graph)
    context.notes.append(f"bn-fold: done when the model was prepared, {left} batch normalizations left")
    return profile


def _least_error(prepared: Model, profile: Profile, context: Context) -> Profile:
    """Choose the thresholds of activations and of weights anew, by the least squared error."""
    assignment = context.assignment
    decisions = {
        name: decision
        if decision.scheme is None
        else dataclasses.replace(
            decision, scheme=dataclasses.replace(decision.scheme, method="mse", weight_method="mse")
        )
        for name, decision in assignment.decisions.items()
    }
    scheme = dataclasses.replace(assignment.scheme, method="mse", weight_method="mse")
    context.assignment = dataclasses.replace(assignment, scheme=scheme, decisions=decisions)
    context.parameters = derive(prepared, profile, context.assignment)
    context.notes.append("mse: thresholds of activations and weights chosen by the least squared error")
    return profile


BN_FOLD = Tool("bn-fold", "before", _folded)
MSE = Tool("mse", "weights", _least_error)

TOOLS: Mapping[str, Tool] = {
    tool.name: tool for tool in (BN_FOLD, SMOOTHQUANT, EQUALIZE, MSE, SQUANT, ADAROUND, BIAS_CORRECTION)
}
"""In the order in which they work: thresholds before weights are rounded, and biases by what the weights became."""


def tools_named(names: Sequence[str | Tool]) -> tuple[Tool, ...]:
    """The tools of these names, in the order of `TOOLS`, tools that are given as such after them.

    Raises QuantizationError with the nearest known name.
    """
    for name in names:
        if isinstance(name, str) and name not in TOOLS:
            known = ", ".join(TOOLS)
            raise QuantizationError(f"there is no accuracy tool {name!r}{nearest(name, TOOLS)}; there are {known}")
    return (
        *(tool for name, tool in TOOLS.items() if name in names),
        *(tool for tool in names if isinstance(tool, Tool)),
    )


def tools_of(scheme: Scheme, data: bool) -> tuple[Tool, ...]:
    """The tools that a scheme brings; without calibration data those of them that need none."""
    return tuple(tool for tool in tools_named(scheme.tools) if data or not tool.data)
