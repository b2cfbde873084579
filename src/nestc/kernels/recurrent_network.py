"""What a recurrent node computes: its sizes, attributes and activation functions, read once from ONNX."""

from __future__ import annotations

from dataclasses import dataclass

from nestc.graph.region import Op, Region
from nestc.kernels.api import CpuMachine
from nestc.tensor import index as ix
from nestc.tensor.build import constant
from nestc.tensor.ir import Expr, Fma, Unary
from nestc.tensor.math import sigmoid
from nestc.tensor.rewrite import binary, select

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
# Default alpha and beta of each activation function (ONNX's and, where it gives none, ONNX Runtime's).
_PARAMETERS: dict[str, tuple[float, ...]] = {
    "relu": (),
    "tanh": (),
    "sigmoid": (),
    "softsign": (),
    "softplus": (),
    "affine": (1.0, 0.0),
    "leakyrelu": (0.01,),
    "thresholdedrelu": (1.0,),
    "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0,),
}


def like(value: float, x: Expr) -> Expr:
    """A constant of the dtype and lanes of `x`."""
    return constant(value, x.dtype, x.lanes)


def _activate(name: str, alpha: float, beta: float, x: Expr) -> Expr:
    """One of ONNX's activation functions for recurrent operators."""
    zero, a, b = like(0, x), like(alpha, x), like(beta, x)
    if name == "sigmoid":
        return sigmoid(x)
    if name == "tanh":
        return Unary("tanh", x)
    if name == "relu":
        return binary("max", zero, x)
    if name == "affine":
        return Fma(a, x, b)
    if name == "leakyrelu":
        return select(binary("lt", x, zero), binary("mul", a, x), x)
    if name == "thresholdedrelu":
        return select(binary("ge", x, a), x, zero)
    if name == "scaledtanh":
        return binary("mul", a, Unary("tanh", binary("mul", b, x)))
    if name == "hardsigmoid":
        return binary("min", like(1, x), binary("max", zero, Fma(a, x, b)))
    if name == "elu":
        return select(binary("lt", x, zero), binary("mul", a, binary("sub", Unary("exp", x), like(1, x))), x)
    if name == "softsign":
        return binary("div", x, binary("add", like(1, x), Unary("abs", x)))
    # softplus: log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), which cannot overflow
    small = Unary("exp", Unary("neg", Unary("abs", x)))
    return binary("add", binary("max", zero, x), Unary("log", binary("add", like(1, x), small)))


@dataclass(frozen=True)
class Network:
    """Sizes and attributes of one recurrent node. ``chunks`` vectors of ``lanes`` hold the hidden units."""

    op: Op
    gates: int
    steps: int
    batch: int
    inputs: int
    hidden: int
    directions: int
    reverse: bool
    batch_first: bool
    dtype: str
    lanes: int
    activations: tuple[tuple[str, float, float], ...]
    clip: float | None
    input_forget: bool
    linear_before_reset: bool

    @property
    def chunks(self) -> int:
        """Vectors that hold the hidden units of one sequence."""
        return -(-self.hidden // self.lanes)

    @property
    def reset_first(self) -> bool:
        """Whether a GRU's reset is applied to the state before its product, so that a step takes two sweeps."""
        return self.op.op_type == "GRU" and not self.linear_before_reset

    def clipped(self, x: Expr) -> Expr:
        """The input of an activation limited to +-clip."""
        if self.clip is None:
            return x
        return binary("min", binary("max", x, like(-self.clip, x)), like(self.clip, x))

    def activate(self, which: int, x: Expr) -> Expr:
        """Activation function number `which` of the node's list."""
        name, alpha, beta = self.activations[which]
        return _activate(name, alpha, beta, self.clipped(x))

    def bare(self, which: int, x: Expr) -> Expr:
        """The same without the clip (what leaves an LSTM's cell)."""
        name, alpha, beta = self.activations[which]
        return _activate(name, alpha, beta, x)

    def state(self, direction: Expr, row: Expr, unit: Expr) -> tuple[Expr, Expr, Expr]:
        """Index into initial and final states."""
        return (row, direction, unit) if self.batch_first else (direction, row, unit)

    def place(self, step: Expr, direction: Expr, row: Expr, unit: Expr) -> tuple[Expr, Expr, Expr, Expr]:
        """Index into Y."""
        return (row, step, direction, unit) if self.batch_first else (step, direction, row, unit)

    def sample(self, step: Expr, row: Expr) -> Expr:
        """Row of X, seen as a matrix, that holds one step of one sequence."""
        outer, inner, count = (row, step, self.steps) if self.batch_first else (step, row, self.batch)
        return ix.add(ix.mul(outer, count), inner)


def anchor(region: Region) -> Op | None:
    """The recurrent node of a region."""
    return next((op for op in region.ops if op.op_type in GATES and op.domain in ("", "ai.onnx")), None)


def activations_of(op: Op, directions: int) -> tuple[tuple[str, float, float], ...] | str:
    """The functions of one direction with their parameters, or why they are not to be had."""
    defaults = _ACTIVATIONS[op.op_type]
    given = op.attributes.get("activations")
    names = [str(v) for v in given] if isinstance(given, tuple) and given else list(defaults) * directions
    alphas, betas = (
        iter(v) if isinstance(v := op.attributes.get(key), tuple) else iter(())
        for key in ("activation_alpha", "activation_beta")
    )
    found: list[tuple[str, float, float]] = []
    for name in names:
        default = _PARAMETERS.get(name.lower())
        if default is None:
            return f"{op.op_type} (node {op.name!r}) uses the activation {name!r}"
        alpha = float(next(alphas, default[0])) if default else 0.0
        beta = float(next(betas, default[1])) if len(default) > 1 else 0.0
        found.append((name.lower(), alpha, beta))
    count = len(defaults)
    if len(found) != count * directions:
        return f"{op.op_type} (node {op.name!r}) has {len(found)} activations for {directions} directions"
    if any(found[:count] != found[i : i + count] for i in range(0, len(found), count)):
        return f"{op.op_type} (node {op.name!r}) has different activations in its two directions"
    return tuple(found[:count])


def network(op: Op, region: Region, machine: CpuMachine) -> Network:
    """Read a node that `Recurrent.refusal` accepts."""
    x, w, r = (region.types[name] for name in op.inputs[:3])
    batch_first = bool(op.attributes.get("layout", 0))
    batch, steps = x.shape[:2] if batch_first else x.shape[1::-1]
    activations = activations_of(op, w.shape[0])
    assert not isinstance(activations, str)
    clip = op.attributes.get("clip")
    dtype = "float64" if x.dtype == "float64" else "float32"
    return Network(
        op=op,
        gates=GATES[op.op_type],
        steps=steps,
        batch=batch,
        inputs=x.shape[2],
        hidden=r.shape[2],
        directions=w.shape[0],
        reverse=op.attributes.get("direction", "forward") == "reverse",
        batch_first=batch_first,
        dtype=dtype,
        lanes=machine.lanes(dtype),
        activations=activations,
        clip=float(clip) if isinstance(clip, (int, float)) and clip > 0 else None,
        input_forget=bool(op.attributes.get("input_forget", 0)),
        linear_before_reset=bool(op.attributes.get("linear_before_reset", 0)),
    )
