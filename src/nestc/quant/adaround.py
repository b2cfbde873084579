"""Adaptive rounding: round each weight up or down so that the layer's results change least on calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestc.graph.model import Model
from nestc.graph.passes.rewrite import array, operand
from nestc.quant.bias import corrected, has_bias, mean_error
from nestc.quant.layers import Layer, Moments, input_moments, integer_layers
from nestc.quant.parameters import Weight
from nestc.quant.profile import Profile
from nestc.quant.tools import Context, Tool

Array = NDArray[np.float32]

POSITIONS = 64
"""Output positions of each sample whose input windows are used."""

SAMPLES = 128
"""Samples used at the most: more rows than a layer has inputs, in time that does not grow with the data."""

ITERATIONS = 40
"""Steps of Adam, 10 000 in the paper. They see all rows at once, through the Gram matrix, and `settle` follows them."""

ZETA, GAMMA = 1.1, -0.1
"""Stretch of the rectified sigmoid (arXiv 2004.10568, section 4.1)."""

LAMBDA = 0.03
"""Weight of the regulariser (section 5.1 of the paper), where the loss is in squared steps of a mean input."""

BETA = (20.0, 2.0)
"""The regulariser's exponent at the start and at the end of annealing."""

WARMUP = 0.2
"""Part of the steps without the regulariser."""

RATE = 0.2
"""Of Adam; the paper has 0.01, for many more steps."""

SWEEPS = 4
"""Most passes of single changes over the weights afterwards."""

BLOCK = 64
"""Inputs whose weights change before what they do to all others is computed, as one matrix product."""

DAMPING = 0.1
"""Part of the mean square input, times inputs / rows, added to each input: few rows say little of new ones."""


@dataclass(frozen=True)
class Problem:
    """Round ``weights`` (G, O, K) to ``steps`` (broadcastable, > 0) times integers in ``low``..``high``.

    What is to be small is the mean of (x @ (w - w')^T)^2 over rows x, which is d H d^T for each row d of w - w' with
    H = ``gram`` = E[x x^T], (G, K, K).
    """

    weights: Array
    steps: Array
    low: int
    high: int
    gram: Array

    def losses(self, integers: Array) -> NDArray[np.float64]:
        """The mean squared error of each output, (G, O)."""
        lost = (integers * self.steps - self.weights).astype(np.float64)
        return (np.matmul(lost, self.gram) * lost).sum(axis=2)

    def nearest(self) -> Array:
        """Rounded to the nearest."""
        return np.clip(np.rint(self.weights / self.steps), self.low, self.high).astype(np.float32)


def adaround(prepared: Model, profile: Profile, context: Context) -> Profile:
    """Replace the integers of weights by those that adaptive rounding finds, layer by layer.

    Nagel et al., "Up or down? Adaptive rounding for post-training quantization", ICML 2020 (arXiv 2004.10568). Each
    layer is rounded for the inputs that it has in the float model, so that all are measured in one pass. Where a layer
    has a bias, that takes the mean of the error, and the weights are rounded for what varies.
    """
    parameters = context.parameters
    assert parameters is not None
    layers = integer_layers(prepared, context.assignment)
    if not layers:
        context.notes.append("adaround: there is no product with a constant weight")
        return profile
    moments = input_moments(
        prepared, {layer.node: layer.tensor for layer in layers}, layers, context.data("adaround"),
        context.compile("adaround"), gram=True, limit=POSITIONS, samples=SAMPLES, progress=context.progress,
        label="adaround, inputs",
    )  # fmt: skip
    nodes = {node.name: node for node in prepared.ir.graph}
    total = sum(parameters.weights[layer.node, 1].values.size for layer in layers)
    done = 0
    before = after = 0.0
    for layer in layers:
        weight = parameters.weights[layer.node, 1]
        values = array(operand(nodes[layer.node], 1))
        assert values is not None
        seen, node = moments.pop(layer.node), nodes[layer.node]
        biased = has_bias(node, parameters)
        problem = problem_of(layer, values, weight, seen, biased)
        integers = rounded(problem)
        weight.values = layer.weight(integers).astype(weight.values.dtype)
        if biased:
            parameters.biases[layer.node] = corrected(node, mean_error(layer, values, weight.real(), seen))
        scale = max(float(_power(problem).sum()), 1e-30)
        before += float(problem.losses(problem.nearest()).sum()) / scale
        after += float(problem.losses(integers).sum()) / scale
        done += weight.values.size
        if context.progress is not None:
            context.progress(f"adaround, {layer.node}", done / total)
    gain = 10 * np.log10(max(before, 1e-30) / max(after, 1e-30))
    context.notes.append(f"adaround: {len(layers)} products rounded, error of their results {gain:.1f} dB lower")
    return profile


ADAROUND = Tool("adaround", "weights", adaround, data=True)


def problem_of(layer: Layer, values: np.ndarray, weight: Weight, moments: Moments, centred: bool) -> Problem:
    """The rounding of one layer's weight; `centred` leaves the mean of the error out, which a bias can take.

    The Gram matrix is damped for how few rows it was made of.
    """
    assert moments.gram is not None
    rows = layer.rows(values).astype(np.float32)
    steps = layer.rows(np.broadcast_to(weight.expanded(), weight.values.shape)).astype(np.float32)
    gram = moments.gram.astype(np.float64)
    if centred:
        gram -= moments.mean[:, :, None] * moments.mean[:, None, :]
    inputs = gram.shape[1]
    mean = np.trace(moments.gram, axis1=1, axis2=2) / inputs
    damping = np.maximum(DAMPING * inputs / max(moments.rows, 1) * mean, 1e-12)
    diagonal = np.arange(inputs)
    gram[:, diagonal, diagonal] += damping[:, None]
    return Problem(rows, steps, weight.format.low, weight.format.high, gram.astype(np.float32))


def rounded(problem: Problem) -> Array:
    """The integers of AdaRound, improved by single changes until none helps (or `SWEEPS` passes are over)."""
    return settle(problem, relax(problem))


def relax(problem: Problem, iterations: int = ITERATIONS) -> Array:
    """AdaRound: w' = step * (floor(w / step) + h(V)) with V by Adam, h a rectified sigmoid pushed to 0 or 1.

    Equations 21 to 24 of the paper. The loss is that of `Problem`, in units of the squared step of a mean input.
    """
    scaled = problem.weights / problem.steps
    floor = np.clip(np.floor(scaled), problem.low, problem.high)
    share = np.clip((np.clip(scaled - floor, 0, 1) - GAMMA) / (ZETA - GAMMA), 1e-4, 1 - 1e-4)
    v = np.log(share / (1 - share)).astype(np.float32)
    first, second = np.zeros_like(v), np.zeros_like(v)
    unit = np.trace(problem.gram, axis1=1, axis2=2)[:, None, None] / problem.gram.shape[1]
    gram = (problem.gram / np.maximum(unit, 1e-30)).astype(np.float32)
    start = int(WARMUP * iterations)
    # Steps are the same along a row in all formats that integer products have, so they cancel from loss and gradient.
    for step in range(iterations):
        sigmoid = 1 / (1 + np.exp(-v))
        h = np.clip(sigmoid * (ZETA - GAMMA) + GAMMA, 0, 1)
        gradient = 2 * np.matmul(floor + h - scaled, gram)
        if step >= start:
            along = (step - start) / max(iterations - start, 1)
            beta = BETA[1] + 0.5 * (BETA[0] - BETA[1]) * (1 + np.cos(np.pi * along))
            away = 2 * h - 1
            gradient -= LAMBDA * 2 * beta * np.sign(away) * np.abs(away) ** (beta - 1)
        gradient *= (ZETA - GAMMA) * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
        first += 0.1 * (gradient - first)
        second += 0.001 * (gradient * gradient - second)
        rate = RATE / (1 - 0.9 ** (step + 1))
        v -= rate * first / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
    return np.clip(floor + (v >= 0), problem.low, problem.high).astype(np.float32)


def settle(problem: Problem, integers: Array, sweeps: int = SWEEPS) -> Array:
    """Change one weight after the other to the integer of least loss, all others fixed, until nothing changes.

    Coordinate descent on d H d^T, as in Behdin et al., "QuantEase", arXiv 2309.01885, section 3; each change lowers the
    loss. Blocks of inputs share one matrix product (the "lazy batches" of GPTQ, arXiv 2210.17323, section 3.3).
    """
    scaled = problem.weights / problem.steps
    chosen = integers.astype(np.float32)
    gram = problem.gram
    inputs = gram.shape[1]
    for _ in range(sweeps):
        slope = np.matmul(chosen - scaled, gram)
        changes = 0
        for start in range(0, inputs, BLOCK):
            part = slice(start, min(start + BLOCK, inputs))
            inner = np.ascontiguousarray(gram[:, part, part])
            local = np.ascontiguousarray(slope[:, :, part])
            moved = np.zeros_like(local)
            for k in range(local.shape[2]):
                best = np.rint(chosen[:, :, start + k] - local[:, :, k] / inner[:, None, k, k])
                change = np.clip(best, problem.low, problem.high) - chosen[:, :, start + k]
                if not change.any():
                    continue
                changes += int(np.count_nonzero(change))
                chosen[:, :, start + k] += change
                moved[:, :, k] = change
                local += change[:, :, None] * inner[:, None, k]
            if moved.any():
                slope += np.matmul(moved, gram[:, part])
        if not changes:
            break
    return chosen


def _power(problem: Problem) -> NDArray[np.float64]:
    """The mean square of each output, (G, O)."""
    wide = problem.weights.astype(np.float64)
    return (np.matmul(wide, problem.gram) * wide).sum(axis=2)
