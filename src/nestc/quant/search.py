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
from nestc.quant.choose import Assignment, choose
from nestc.quant.profile import Profile
from nestc.quant.run import Batch, Compiler, Progress
from nestc.quant.scheme import WEIGHTED, Scheme
from nestc.quant.score import Judge, Score
from nestc.quant.sensitivity import Sensitivity, sensitivity

Overrides = dict[str, Scheme | None]
Quantizer = Callable[[Profile, Scheme, Mapping[str, Scheme | None]], Model]
"""Quantizes the model by a profile (whose method chooses the ranges), a scheme and overrides."""

METHODS = ("mse", "minmax", "percentile:99.99", "entropy")
"""Ways to choose ranges that are tried, besides the profile's own, before any node goes back to float."""

TRIALS = 6
"""Mixes of quantized and float nodes that are run on the data."""

ESTIMATED_SPEEDUP = 2.0
"""What integers are taken to gain where nothing is measured: without VNNI twice as many products a cycle as float32."""


@dataclass(frozen=True)
class Costs:
    """Time of each node in float and quantized, node -> (float, quantized), in one unit.

    ``measured``: in microseconds, of kernels that ran. ``estimated``: in multiply-accumulates, of float32.
    """

    kind: Literal["measured", "estimated"]
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
) -> Found:
    """The fastest mix of `scheme` and float whose loss on the judge's data is at most `budget` (a fraction, 0 to 1).

    First everything is quantized, by one method of choosing ranges after the other, until one holds the budget; all of
    these cost the same. If none does, nodes go back to float from the best: those that add most noise for the time that
    they save (`sensitivity`, on `batches`), as many as a loss in proportion to the noise asks for. The mix is run on
    the data; what it loses narrows the share of the noise that may stay, between one that held and one that did not.
    `overrides` stand. `costs` are estimated if they are not given; a function gets the quantized model. Raises
    QuantizationError, with the best that was found, if no mix with a quantized product holds the budget.
    """
    require_budget(budget)
    tell = progress or _silent
    steps: list[Step] = []
    tried: list[tuple[Score, Profile, Model]] = []
    assignment = choose(prepared, scheme, overrides, profile)
    products = _products(assignment)
    if not products:
        raise QuantizationError(
            "scheme auto finds no product that could be quantized; nestc quantize tells why of each"
        )

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
    ranking = sensitivity(prepared, profile, choose(prepared, scheme, overrides, profile), compiler, batches)
    worst, held = score, None
    allowed, low, high = budget / score.loss, 0.0, 1.0  # the share of the noise that may stay; between held and not
    for trial in range(TRIALS):
        floats = restore(ranking, known, allowed)
        mixed: Overrides = {**overrides, **dict.fromkeys(floats, None)}
        quantized = _products(choose(prepared, scheme, mixed, profile))
        if not quantized:
            low = allowed
            if held is not None or trial == TRIALS - 1 or high - low < 1e-3:
                break
            allowed = (low + high) / 2
            continue
        tell(f"auto: {len(floats)} nodes in float", (len(steps) + 1) / (TRIALS + len(METHODS) + 1))
        model = quantizer(profile, scheme, mixed)
        score = judge.score(compiler(model))
        cost = known.total(everything - set(floats))
        steps.append(Step(profile.method, len(quantized), worst.loss * allowed, score, cost))
        tried.append((score, profile, model))
        if score.loss <= budget:
            if held is None or cost < held.cost:
                added = {name: scheme for name, scheme in mixed.items() if name not in overrides}
                held = Found(model, score, scheme, profile.method, added, known, cost, *ends, tuple(steps))
            low = allowed
        else:
            high = allowed
        if high - low < 0.02:
            break
        # Once it has held, halve what is between; before, shrink as far as the loss measured says, and a bit more.
        allowed = (low + high) / 2 if held is not None else allowed * min(0.7, 0.8 * budget / score.loss)
    if held is None:
        best = min(steps, key=lambda step: step.score.loss)
        raise QuantizationError(
            f"no mix of {scheme.name} and float stays inside the accuracy budget of {budget:g}: the best of "
            f"{len(steps)} loses {best.score.loss:.4f} of {best.score.measure} on {best.score.samples} samples, with "
            f"{best.quantized} of {len(products)} products quantized and ranges by {best.method}"
        )
    return dataclasses.replace(held, steps=tuple(steps))


def restore(ranking: Sequence[Sensitivity], costs: Costs, allowed: float) -> list[str]:
    """The nodes to keep in float so that at most the share `allowed` of the noise added stays, at the least cost.

    A knapsack, filled greedily: most noise for the time lost first, then whatever turned out not to be needed is taken
    back, the most expensive first. Nodes that quantizing makes slower are always among them.
    """
    total = sum(each.added for each in ranking)
    slower = [each for each in ranking if costs.saved(each.node) < 0.0]
    chosen = {each.node: each for each in slower}
    excess = total * (1.0 - allowed) - sum(each.added for each in slower)
    candidates = [each for each in ranking if each.node not in chosen]
    candidates.sort(key=lambda each: -each.added / max(costs.saved(each.node), 1e-9))
    for each in candidates:
        if excess <= 1e-12 * total:
            break
        chosen[each.node] = each
        excess -= each.added
    for each in sorted(chosen.values(), key=lambda each: -costs.saved(each.node)):
        if costs.saved(each.node) > 0.0 and each.added <= -excess:
            del chosen[each.node]
            excess += each.added
    return [each.node for each in ranking if each.node in chosen]


def _products(assignment: Assignment) -> list[str]:
    return [name for name, decision in assignment.decisions.items() if decision.role == "product"]


def _known(value: ir.Value) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else 1 for size in value.shape or ())


def _silent(what: str, fraction: float) -> None:
    """Progress that nobody watches."""
