"""Choose which nodes are quantized, in which scheme, and say why of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from nestc.errors import QuantizationError
from nestc.graph.kinds import BROADCASTING, UNARY, is_constant
from nestc.graph.model import Model
from nestc.graph.passes.affine_convolutions import is_affine
from nestc.graph.passes.rewrite import array, only_use, operand, scalar
from nestc.quant.profile import Profile
from nestc.quant.scheme import CURVES, MOVING, RECURRENT, WEIGHTED, Scheme, nearest

Role = Literal["product", "active", "moving", "tail", "float"]

QUANTIZED_OPS = frozenset(
    """ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QGemm QLinearAdd QLinearAveragePool
    QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearMatMul QLinearMul QLinearSigmoid QuantizeLinear""".split()
)
"""Operators of models that are quantized already."""

MANY = frozenset({"Add", "Concat", "Mul", "Sub"})
"""Operators of which every input is data; of the others only the first is."""


@dataclass(frozen=True)
class Decision:
    """What happens to one node, and why in words.

    ``product``: computed on quantized operands, with a weight or of two activations. ``active``, ``moving``: computed
    on quantized activations, the latter without changing elements. ``tail``: computed on the result of the node in
    front of it before that is quantized. ``scheme`` is that of the node (of a tail: of the node in front of it), None
    for ``float``.
    """

    node: str
    op: str
    role: Role
    scheme: Scheme | None
    reason: str


@dataclass(frozen=True)
class Wishes:
    """What nodes get instead of the scheme asked for where no override names them, each with the reason.

    ``schemes``: None is float. ``forced``: nodes that are quantized even where integers come from nowhere and lead
    nowhere. ``stored``: nodes whose results are rounded to integers even where no integer operator reads them.
    """

    schemes: Mapping[str, Scheme | None] = field(default_factory=dict[str, "Scheme | None"])
    forced: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()
    because: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Assignment:
    """The decision of every node of the main graph, by name, in execution order; ``scheme`` is the one asked for.

    ``stored``: nodes whose results (behind their tails) are rounded to integers whoever reads them.
    """

    scheme: Scheme
    decisions: Mapping[str, Decision] = field(default_factory=dict[str, Decision])
    stored: frozenset[str] = frozenset()

    def of(self, node: ir.Node) -> Decision:
        """The decision of a node; a node that is not listed (of a body, or added later) stays float."""
        found = self.decisions.get(node.name or "")
        if found is None or found.op != node.op_type:
            return Decision(node.name or "", node.op_type, "float", None, "not part of the model that was quantized")
        return found

    def result(self, node: ir.Node) -> ir.Value:
        """What is computed of a node before it is rounded: its first output, or that of the last of its tails."""
        value = node.outputs[0]
        while not value.is_graph_output():
            readers = [use.node for use in value.uses()]
            if len(readers) != 1 or self.of(readers[0]).role != "tail":
                break
            value = readers[0].outputs[0]
        return value

    @property
    def quantized_ops(self) -> dict[str, int]:
        """How many nodes of each operator are computed in a scheme's format (tails not counted), most first."""
        taken = (each.op for each in self.decisions.values() if each.role in ("product", "active", "moving"))
        return dict(Counter(taken).most_common())

    @property
    def kept_float(self) -> list[str]:
        """Names of the nodes that stay float."""
        return [name for name, each in self.decisions.items() if each.role == "float"]


def require_float(model: Model) -> None:
    """Raise QuantizationError if the model is quantized already."""
    for node in model.ir.graph.all_nodes():
        if node.op_type in QUANTIZED_OPS:
            raise QuantizationError(
                f"the model is quantized already (node {node.name!r} is {node.op_type}); give the float model"
            )


def choose(
    prepared: Model,
    scheme: Scheme,
    overrides: Mapping[str, Scheme | None] | None = None,
    profile: Profile | None = None,
    wishes: Wishes | None = None,
) -> Assignment:
    """Decide about each node of a prepared model.

    Products are quantized wherever their operands allow it; other operators (and convolutions that only scale and shift
    each channel) only between quantized ones and products, where integers need not become floats in between;
    elementwise operators behind them before the result is rounded.
    `overrides` gives nodes (by name or by a pattern with ``*`` and ``?``) another scheme, or None for float; `wishes`
    go before `scheme` and behind `overrides`. With `profile`, nodes whose inputs were not observed stay float. Raises
    QuantizationError for an override that names no node, or asks for what cannot be.
    """
    asked = _asked(prepared, overrides or {})
    wanted_else = wishes or Wishes()
    nodes = list(prepared.ir.graph)
    roles: dict[ir.Node, Role] = {}
    reasons: dict[ir.Node, str] = {}
    schemes: dict[ir.Node, Scheme | None] = {}
    for node in nodes:
        wanted, key = asked.get(node.name or "", (wanted_else.schemes.get(node.name or "", scheme), None))
        schemes[node] = wanted
        if wanted is None:
            roles[node], reasons[node] = "float", "float" if key is None else f"float by the override {key!r}"
            continue
        refusal = _refusal(node, wanted, profile)
        if refusal is None:
            roles[node] = _role(node)
            continue
        if key == node.name and not _may_be_tail(node):
            raise QuantizationError(f"override of node {node.name!r} ({node.op_type}) to {wanted.name}: {refusal}")
        roles[node], reasons[node] = "float", refusal

    forced = {
        node
        for node in nodes
        if schemes[node] is not None
        and (
            asked[node.name or ""][1] == node.name
            if (node.name or "") in asked
            else (node.name or "") in wanted_else.forced and roles[node] != "float"
        )
    }
    leads = _leads(nodes, roles, schemes)
    decisions: dict[str, Decision] = {}
    settled: dict[ir.Node, Role] = {}
    for node in nodes:
        role, reason = _settle(node, roles[node], schemes, settled, leads, node in forced, reasons.get(node, ""))
        settled[node] = role
        if role == "tail":
            front = _data_producer(node)
            assert front is not None
            schemes[node] = schemes[front]
        chosen = None if role == "float" else schemes[node]
        unasked = (node.name or "") not in asked and role not in ("tail", "float")
        because = None if not unasked else wanted_else.because.get(node.name or "")
        told = reason if because is None else f"{reason}; {because}"
        decisions[node.name or ""] = Decision(node.name or "", node.op_type, role, chosen, told)
    return Assignment(scheme, decisions, wanted_else.stored)


def data_inputs(node: ir.Node) -> tuple[int, ...]:
    """Indices of the inputs whose elements are data that may be quantized (bias, bounds, axes and sizes are not)."""
    if node.op_type in MANY:
        return tuple(range(len(node.inputs)))
    if node.op_type in RECURRENT:
        return (0, 1, 2)  # the input, and the weights for it and for the state
    return (0, 1) if node.op_type in WEIGHTED else (0,)


def overridden(prepared: Model, overrides: Mapping[str, Scheme | None]) -> frozenset[str]:
    """Names of the nodes that overrides name, alone or by a pattern; raises as `choose` does."""
    return frozenset(_asked(prepared, overrides))


def _asked(prepared: Model, overrides: Mapping[str, Scheme | None]) -> dict[str, tuple[Scheme | None, str]]:
    """Node name -> (scheme, the override's key): a name of its own before patterns, a later pattern before others."""
    names = [node.name or "" for node in prepared.ir.graph]
    asked: dict[str, tuple[Scheme | None, str]] = {}
    for key, scheme in sorted(overrides.items(), key=lambda item: item[0] in names):
        pattern = re.escape(key).replace(r"\*", ".*").replace(r"\?", ".")
        matching = [key] if key in names else [name for name in names if re.fullmatch(pattern, name)]
        if not matching:
            what = "matches no node" if "*" in key or "?" in key else "names no node"
            raise QuantizationError(
                f"override {key!r} {what} of the prepared model{nearest(key, names)}; nestc explain lists them"
            )
        asked.update((name, (scheme, key)) for name in matching)
    return asked


def _role(node: ir.Node) -> Role:
    if node.op_type in WEIGHTED | RECURRENT:
        return "product"
    return "moving" if node.op_type in MOVING else "active"


def _refusal(node: ir.Node, scheme: Scheme, profile: Profile | None) -> str | None:
    """Why the scheme cannot compute a node, None if it can."""
    if node.domain or node.op_type not in scheme.ops:
        what = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        if node.outputs and node.outputs[0].dtype not in (ir.DataType.FLOAT, None):
            return f"{what} computes no float32 numbers"
        return f"scheme {scheme.name} computes {what} in float"
    first = operand(node, 0)
    if first is None or first.dtype != ir.DataType.FLOAT:
        kind = "an unknown type" if first is None or first.dtype is None else first.dtype.name.lower()
        return f"its input is of {kind}, not float32"
    if is_affine(node) and not scheme.integer:
        return f"scheme {scheme.name} computes a scale and a shift a channel in float"
    refusal = _operand_refusal(node, scheme)
    if refusal is not None or scheme.weight_only:
        return refusal
    observed = [value for index in data_inputs(node) if (value := operand(node, index)) and not is_constant(value)]
    if not observed:
        return "all its operands are constants"
    if profile is None or not scheme.integer:
        return None
    for value in observed:
        stats = profile.tensors.get(value.name or "")
        if stats is None:
            return f"tensor {value.name!r} is not in the profile"
        if stats.count <= stats.nan + stats.inf:
            return f"tensor {value.name!r} held no finite number while calibrating"
    return None


def _operand_refusal(node: ir.Node, scheme: Scheme) -> str | None:
    """What is wrong with the operands of a node for any narrow form of it."""
    weight = operand(node, 1)
    if node.op_type in RECURRENT:
        constants = [array(operand(node, index)) for index in (1, 2)]
        if any(each is None for each in constants) or is_constant(operand(node, 0)):
            return "its weights are no constants, or its input is one"
        if any(each is not None and not np.isfinite(each).all() for each in constants):
            return "its weights hold NaN or infinite values"
        return None
    if node.op_type in WEIGHTED:
        constants = [index for index in (0, 1) if is_constant(operand(node, index))]
        if node.op_type != "MatMul" and (not is_constant(weight) or 0 in constants):
            return f"its weight {weight.name if weight else ''!r} is not a constant, or its input is one"
        if scheme.weight_only and constants != [1]:
            return "it has no constant weight on the right"
        if scheme.weight_only and (weight is None or weight.shape is None or len(weight.shape) < 2):
            return "its weight is a vector"
        if len(constants) == 2:
            return "all its operands are constants"
        values = [array(operand(node, index)) for index in constants]
        if any(each is not None and not np.isfinite(each).all() for each in values):
            return "its weight holds NaN or infinite values"
        return None
    if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest":
        return "interpolation is computed in float"
    if node.op_type == "Pad" and scalar(operand(node, 2)) not in (None, 0.0):
        return "it pads with a number other than 0"
    if node.op_type == "Pad" and operand(node, 2) is not None and not is_constant(operand(node, 2)):
        return "it pads with a number known only at run time"
    if node.op_type == "MaxPool" and len(node.outputs) > 1:
        return "it gives indices of elements"
    return None


def _may_be_tail(node: ir.Node) -> bool:
    """Whether the node is elementwise with one input that is no constant, of float32."""
    if node.domain or node.op_type not in UNARY | BROADCASTING or len(node.outputs) != 1:
        return False
    varying = [value for value in node.inputs if value is not None and not is_constant(value)]
    same = all(value.dtype == ir.DataType.FLOAT for value in (*varying, *node.outputs))
    return len(varying) == 1 and same and varying[0].shape == node.outputs[0].shape


def _data_producer(node: ir.Node) -> ir.Node | None:
    """The node that computes the one input of a tail."""
    varying = next((value for value in node.inputs if value is not None and not is_constant(value)), None)
    return None if varying is None else varying.producer()


def _leads(
    nodes: list[ir.Node], roles: Mapping[ir.Node, Role], schemes: Mapping[ir.Node, Scheme | None]
) -> dict[ir.Node, bool]:
    """Whether a node's result reaches an integer product through operators that can be computed on integers."""
    leads: dict[ir.Node, bool] = {}
    for node in reversed(nodes):
        leads[node] = False
        for value in node.outputs:
            for user, index in value.uses():
                role = roles.get(user, "float")
                if role == "product" and not is_affine(user):
                    scheme = schemes[user]
                    leads[node] |= scheme is not None and scheme.integer and index in data_inputs(user)
                elif role in ("product", "active", "moving") or (schemes.get(user) is not None and _may_be_tail(user)):
                    leads[node] |= leads.get(user, False)
    return leads


def _settle(
    node: ir.Node,
    role: Role,
    schemes: Mapping[ir.Node, Scheme | None],
    settled: Mapping[ir.Node, Role],
    leads: Mapping[ir.Node, bool],
    forced: bool,
    reason: str,
) -> tuple[Role, str]:
    """The final role and the reason, given those of all nodes before this one."""
    scheme = schemes[node]
    if role == "product" and not is_affine(node):
        assert scheme is not None
        return role, _of_product(node, scheme)
    front = _data_producer(node) if _may_be_tail(node) and scheme is not None and not forced else None
    if front is not None and _carries_tail(node, front, schemes, settled) and only_use(_varying(node)):
        return "tail", f"computed on the result of {front.name!r} before that is rounded"
    if role == "float":
        return role, reason
    assert scheme is not None
    fed = [
        value
        for index in data_inputs(node)
        if (value := operand(node, index)) is not None and not is_constant(value) and _is_fed(value, settled, schemes)
    ]
    if not fed and not forced:
        return "float", "none of its inputs comes from a quantized operator"
    if not leads[node] and not forced:
        return "float", "its result reaches no quantized product"
    if role == "product":
        return role, _of_product(node, scheme)
    if role == "moving":
        return role, f"moves {scheme.name} numbers without changing them"
    return role, f"stands between operators in {scheme.name}"


def _varying(node: ir.Node) -> ir.Value:
    return next(value for value in node.inputs if value is not None and not is_constant(value))


def _carries_tail(
    node: ir.Node, front: ir.Node, schemes: Mapping[ir.Node, Scheme | None], settled: Mapping[ir.Node, Role]
) -> bool:
    """Whether `node` can be computed on the result of `front` before that is rounded.

    Scales that are powers of two are for devices that have shifts, maxima and minima behind their sums but no curves:
    there a curve is computed on integers, by whoever has a table, and its product stays on the device.
    """
    scheme = schemes.get(front)
    if settled.get(front) not in ("product", "active", "tail") or scheme is None or not scheme.integer:
        return False
    activation = scheme.activation
    return not (node.op_type in CURVES and activation is not None and activation.pow2)


def _is_fed(value: ir.Value, settled: Mapping[ir.Node, Role], schemes: Mapping[ir.Node, Scheme | None]) -> bool:
    """Whether a value comes from an integer operator, or from outside, where it can be quantized at once."""
    front = value.producer()
    if front is None:
        return True
    scheme = schemes.get(front)
    return settled.get(front, "float") != "float" and scheme is not None and scheme.integer


def _of_product(node: ir.Node, scheme: Scheme) -> str:
    constants = [index for index in (0, 1) if is_constant(operand(node, index))]
    weight = scheme.weight
    each = {"tensor": "a scale a tensor", "channel": "a scale a channel", "block": f"a scale for {weight.block}"}
    if scheme.activation is None:
        return f"weights {weight.dtype}, {each[weight.granularity]}; activations float"
    if weight.is_float:
        return "operands rounded to bfloat16, sums in float32"
    if not constants:
        return f"both operands {scheme.activation.dtype}"
    return f"activations {scheme.activation.dtype}, weights {weight.dtype} with {each[weight.granularity]}"
