"""Scheme ``auto``: the fastest mix of quantized and float nodes whose loss, checked on data, stays inside a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from nestc.errors import QuantizationError
from nestc.graph.model import Model, static_shape
from nestc.quant.choose import Assignment, Wishes, choose
from nestc.quant.profile import Profile
from nestc.quant.run import Batch, Compiler, Progress
from nestc.quant.scheme import RECURRENT, WEIGHTED, Scheme
from nestc.quant.score import Judge, Score
from nestc.quant.sensitivity import Sensitivity, sensitivity

Overrides = dict[str, Scheme | None]
Quantizer = Callable[[Profile, Scheme, Mapping[str, Scheme | None]], Model]
"""Quantizes the model by a profile (whose method chooses the ranges), a scheme and overrides."""

METHODS = ("mse", "minmax", "percentile:99.99", "entropy")
"""Ways to choose ranges that are tried, besides the profile's own, before any node goes back to float."""

TRIALS = 8
"""Mixes of quantized and float nodes that are run on the data."""

ESTIMATED_SPEEDUP = 2.0
"""What integers are taken to gain where nothing is measured: without VNNI twice as many products a cycle as float32."""


@dataclass(frozen=True)
class Costs:
    """Time of each node in float and quantized, node -> (float, quantized), in one unit: of the devices that may
    compute it in that format, the least.

    ``measured``: in microseconds, of kernels that ran. ``modelled``: the same, some by simulators. ``estimated``: in
    multiply-accumulates, of float32.
    """

    kind: Literal["measured", "modelled", "estimated"]
    nodes: Mapping[str, tuple[float, float]]

    def saved(self, node: str) -> float:
        """What quantizing the node saves; negative if it costs."""
        before, after = self.nodes.get(node, (0.0, 0.0))
        return before - after

    def total(self, quantized: set[str]) -> float:
        """Time of all nodes when these are quantized."""
        return sum(times[1 if node in quantized else 0] for node, times in self.nodes.items())


@dataclass(frozen=True)
class Step:
    """One assignment that was run on the data."""

    method: str
    quantized: int
    predicted_loss: float | None
    score: Score
    cost: float


@dataclass(frozen=True)
class Found:
    """The assignment chosen: its model, what it loses, which nodes went back to float, and all that was tried."""

    model: Model
    score: Score
    scheme: Scheme
    method: str
    overrides: Overrides
    costs: Costs
    cost: float
    cost_float: float
    cost_quantized: float
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        kept = f", {len(self.overrides)} nodes float" if self.overrides else ""
        return (
            f"auto: {self.scheme.name}, ranges by {self.method}{kept}: loses {self.score.loss:.4f} of "
            f"{self.score.measure} on {self.score.samples} samples; {self.costs.kind} cost "
            f"{self.cost / self.cost_float:.2f} of float (all quantized {self.cost_quantized / self.cost_float:.2f}); "
            f"{len(self.steps)} assignments tried"
        )


def estimate_costs(prepared: Model, assignment: Assignment) -> Costs:
    """Costs from multiply-accumulates of products, and elements of other quantized operators; not measured."""
    nodes: dict[str, tuple[float, float]] = {}
    for node in prepared.ir.graph:
        if assignment.of(node).role in ("product", "active", "moving"):
            work = macs(node)
            nodes[node.name or ""] = (work, work / ESTIMATED_SPEEDUP)
    return Costs("estimated", nodes)


def macs(node: ir.Node) -> float:
    """Multiply-accumulates of a product, elements of the result of anything else; 1 for a size that is not known."""
    shape = static_shape(node.outputs[0]) or _known(node.outputs[0])
    elements = float(math.prod(shape))
    if node.op_type in RECURRENT and node.inputs[0] is not None:
        weights = sum(math.prod(_known(value)) for value in node.inputs[1:3] if value is not None)
        return float(math.prod(_known(node.inputs[0])[:2]) * weights)
    if node.op_type not in WEIGHTED or node.inputs[1] is None:
        return elements
    weight = static_shape(node.inputs[1]) or _known(node.inputs[1])
    if node.op_type == "Conv":
        return elements * math.prod(weight[1:])
    if node.op_type == "ConvTranspose" and node.inputs[0] is not None:
        return float(math.prod(_known(node.inputs[0]))) * math.prod(weight[1:])
    data = _known(node.inputs[0]) if node.inputs[0] is not None else ()
    across = node.op_type == "Gemm" and node.attributes.get_int("transA", 0)
    return elements * (data[0 if across else -1] if data else 1)


def require_budget(budget: float) -> float:
    """The budget as it is. Raises QuantizationError if it is no fraction."""
    if not 0.0 <= budget <= 1.0:
        raise QuantizationError(f"the accuracy budget is a fraction of the samples, 0 to 1, not {budget:g}")
    return budget


def search(
    prepared: Model,
    profile: Profile,
    scheme: Scheme,
    overrides: Mapping[str, Scheme | None],
    budget: float,
    quantizer: Quantizer,
    compiler: Compiler,
    judge: Judge,
    batches: Iterable[Batch],
    costs: Costs | Callable[[Model], Costs] | None = None,
    progress: Progress | None = None,
    faster: Sequence[Scheme] = (),
    wishes: Wishes | None = None,
) -> Found:
    """The fastest mix of `scheme` and float whose loss on the judge's data is at most `budget` (a fraction, 0 to 1).

    Schemes that run `faster` on the machine, fastest first, are tried before it, with everything quantized.

    First everything is quantized, by one method of choosing ranges after the other, until one holds the budget; all of
    these cost the same. If none does, nodes of the best go back to float: those that add most noise for the time that
    they save (`sensitivity`, on `batches`), as many as a loss in proportion to the noise asks for. The mix is run on
    the data; after that their number is halved between one that held and one that did not.
    `overrides` stand; `wishes` are schemes of single nodes, which `quantizer` knows, too. `costs` are estimated if they
    are not given; a function gets the quantized model. Raises QuantizationError, with the best that was found, if no
    mix with a quantized product holds the budget.
    """
    require_budget(budget)
    tell = progress or _silent
    steps: list[Step] = []
    tried: list[tuple[Score, Profile, Model]] = []
    assignment = choose(prepared, scheme, overrides, profile, wishes)
    products = _products(assignment)
    if not products:
        raise QuantizationError(
            "scheme auto finds no product that could be quantized; nestc quantize tells why of each"
        )

    for quick in faster:
        tell(f"auto: all of {quick.name}, ranges by {profile.method}", 0.0)
        model = quantizer(profile, quick, overrides)
        score = judge.score(compiler(model))
        steps.append(Step(f"{profile.method} ({quick.name})", len(products), None, score, math.nan))
        if score.loss <= budget:
            known = costs(model) if callable(costs) else costs or estimate_costs(prepared, assignment)
            float_cost, cost = known.total(set()), known.total(set(known.nodes))
            steps = [dataclasses.replace(step, cost=cost) for step in steps]
            return Found(
                model, score, quick, profile.method, {}, known, cost, float_cost, cost, tuple(steps)
            )  # fmt: skip

    # Every method gives a model of the same speed, so the first that holds the budget is as good as any.
    for method in dict.fromkeys((profile.method, *METHODS)) if scheme.method is None else (scheme.method,):
        tell(f"auto: all of {scheme.name}, ranges by {method}", len(steps) / (TRIALS + len(METHODS)))
        by_method = dataclasses.replace(profile, method=method)
        model = quantizer(by_method, scheme, overrides)
        score = judge.score(compiler(model))
        tried.append((score, by_method, model))
        steps.append(Step(method, len(products), None, score, math.nan))
        if score.loss <= budget:
            break
    score, profile, model = min(tried, key=lambda each: (each[0].loss, -each[0].sqnr_db))
    known = costs(model) if callable(costs) else costs or estimate_costs(prepared, assignment)
    everything = set(known.nodes)
    steps = [dataclasses.replace(step, cost=known.total(everything)) for step in steps]
    ends = (known.total(set()), known.total(everything))
    if score.loss <= budget:
        return Found(model, score, scheme, profile.method, {}, known, ends[1], *ends, tuple(steps))

    tell("auto: sensitivity of the nodes", 0.4)
    whole = choose(prepared, scheme, overrides, profile, wishes)
    ranking = sensitivity(prepared, profile, whole, compiler, batches)
    order = restore_order(ranking, known)
    # Loss falls as more of the order goes back to float, so the least that holds the budget is found by halving between
    # what failed (at first nothing back) and what held (at first all products back, which is no quantized model).
    failed, holding = 0, max(place for place, name in enumerate(order, 1) if name in set(products))
    count, worst, held = _predicted_count(order, ranking, budget / score.loss), score.loss, None
    for _ in range(TRIALS):
        if holding - failed < 2:
            break
        count = min(max(count, failed + 1), holding - 1)
        floats = order[:count]
        mixed: Overrides = {**overrides, **dict.fromkeys(floats, None)}
        quantized = _products(choose(prepared, scheme, mixed, profile, wishes))
        tell(f"auto: {count} nodes in float", (len(steps) + 1) / (TRIALS + len(METHODS) + 1))
        model = quantizer(profile, scheme, mixed)
        score = judge.score(compiler(model))
        cost = known.total(everything - set(floats))
        steps.append(Step(profile.method, len(quantized), worst * _noise_left(ranking, floats), score, cost))
        if score.loss <= budget:
            holding = count
            if held is None or cost < held.cost:
                added: Overrides = dict.fromkeys((name for name in floats if name not in overrides), None)
                held = Found(model, score, scheme, profile.method, added, known, cost, *ends, tuple(steps))
        else:
            failed = count
        count = (failed + holding) // 2
    if held is None:
        best = min(steps, key=lambda step: step.score.loss)
        raise QuantizationError(
            f"no mix of {scheme.name} and float stays inside the accuracy budget of {budget:g}: the best of "
            f"{len(steps)} loses {best.score.loss:.4f} of {best.score.measure} on {best.score.samples} samples, with "
            f"{best.quantized} of {len(products)} products quantized and ranges by {best.method}"
        )
    return dataclasses.replace(held, steps=tuple(steps))


def restore_order(ranking: Sequence[Sensitivity], costs: Costs) -> list[str]:
    """All nodes of the ranking in the order in which they go back to float.

    First those that quantizing makes slower, which cost nothing; then those that add most noise for the time they save:
    the greedy order of a knapsack.
    """

    def worth(each: Sensitivity) -> float:
        return each.added / max(costs.saved(each.node), 1e-9)

    slower = [each for each in ranking if costs.saved(each.node) < 0.0]
    others = [each for each in ranking if costs.saved(each.node) >= 0.0]
    return [each.node for each in (*slower, *sorted(others, key=worth, reverse=True))]


def _predicted_count(order: Sequence[str], ranking: Sequence[Sensitivity], allowed: float) -> int:
    """How many of the order have to go back so that at most a share of the noise stays."""
    return next((n for n in range(len(order)) if _noise_left(ranking, order[:n]) <= allowed), len(order))


def _noise_left(ranking: Sequence[Sensitivity], floats: Sequence[str]) -> float:
    """The share of the noise added by nodes that stay quantized; loss is predicted in proportion to it."""
    total = sum(each.added for each in ranking)
    gone = set(floats)
    return sum(each.added for each in ranking if each.node not in gone) / total if total > 0.0 else 0.0


def _products(assignment: Assignment) -> list[str]:
    return [name for name, decision in assignment.decisions.items() if decision.role == "product"]


def _known(value: ir.Value) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else 1 for size in value.shape or ())


def _silent(what: str, fraction: float) -> None:
    """Progress that nobody watches."""
