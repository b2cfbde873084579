"""Losses: negative log likelihood, and cross entropy through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nestc.graph.region import Op
from nestc.kernels.compute import Body, clamped
from nestc.kernels.ops.attributes import text
from nestc.kernels.ops.normal import log_sum
from nestc.kernels.ops.reduction import mean, work_dtype
from nestc.tensor import index as ix
from nestc.tensor.build import binary, constant
from nestc.tensor.ir import Binary, Expr, Unary, Var
from nestc.tensor.rewrite import cast, select

Axes = tuple[Var, ...]


def _likelihood(body: Body, op: Op, source: str, target: str, weight: str, out: str) -> None:
    """out = -weight * source at the target's class, reduced as the operator says; `source` is in the work dtype."""
    shape, labels = body.shape(source), body.shape(target)
    dtype, work = body.dtype(out), body.dtype(source)
    ignored = op.attributes.get("ignore_index")
    reduction = text(op, "reduction", "mean")

    def counted(index: tuple[Expr, ...]) -> tuple[Expr, Expr, Expr]:
        """Whether a sample counts, its class, and its weight."""
        label = cast(body.read(target, index), "int64")
        chosen = clamped(label, shape[1])
        w = cast(body.read(weight, (chosen,)), work) if weight else constant(1, work)
        if not isinstance(ignored, int):
            return constant(True, "bool"), chosen, w
        keep = Unary("not", binary("eq", label, ix.const(ignored)))
        return keep, chosen, select(keep, w, constant(0, work))

    def loss(index: tuple[Expr, ...]) -> Expr:
        keep, chosen, w = counted(index)
        x = body.read(source, (index[0], chosen, *index[1:]))
        return select(keep, Binary("mul", Unary("neg", x), w), constant(0, work))

    if reduction == "none":
        body.map(out, lambda axes: cast(loss(axes), dtype))
        return
    if reduction == "sum" or (not weight and not isinstance(ignored, int)):
        count = 1
        for n in labels:
            count *= n
        last: Callable[[Expr], Expr] = (lambda t: t) if reduction == "sum" else (lambda t: mean(t, count))
        body.combine(out, labels, "add", lambda axes, reduced: loss(reduced), lambda t: cast(last(t), dtype))
        return
    total, divisor = body.temporary(work, ()), body.temporary(work, ())
    body.combine(total, labels, "add", lambda axes, reduced: loss(reduced))
    body.combine(divisor, labels, "add", lambda axes, reduced: counted(reduced)[2])
    body.map(out, lambda axes: cast(Binary("div", body.read(total, ()), body.read(divisor, ())), dtype))


def _negative_log_likelihood(body: Body, op: Op) -> None:
    source = op.inputs[0]
    work = work_dtype(body.dtype(source))
    wide = body.temporary(work, body.shape(source))
    body.map(wide, lambda axes: cast(body.read(source, axes), work))
    _likelihood(body, op, wide, op.inputs[1], op.input(2), op.outputs[0])


def _cross_entropy(body: Body, op: Op) -> None:
    source, log_probability = op.inputs[0], op.output(1)
    shape, dtype = body.shape(source), body.dtype(source)
    work = work_dtype(dtype)
    top, total = log_sum(body, source, (1,))
    logits = body.temporary(work, shape)

    def value(axes: Axes) -> Expr:
        own = (axes[0], ix.const(0), *axes[2:])
        x = Binary("sub", cast(body.read(source, axes), work), body.read(top, own))
        return Binary("sub", x, Unary("log", body.read(total, own)))

    body.map(logits, value)
    _likelihood(body, op, logits, op.inputs[1], op.input(2), op.outputs[0])
    if log_probability:
        body.map(log_probability, lambda axes: cast(body.read(logits, axes), dtype))


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "NegativeLogLikelihoodLoss": _negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": _cross_entropy,
}
