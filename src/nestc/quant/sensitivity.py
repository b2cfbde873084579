"""Rank the nodes of a model by what quantizing each adds to the noise, from two passes over the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nestc.graph.kinds import is_constant
from nestc.graph.model import Model
from nestc.quant.apply import apply
from nestc.quant.choose import Assignment, data_inputs
from nestc.quant.derive import derive
from nestc.quant.observe import with_outputs
from nestc.quant.profile import Profile
from nestc.quant.run import Batch, Compiler, Progress
from nestc.quant.score import sqnr_db


@dataclass(frozen=True)
class Sensitivity:
    """The noise of one quantized node's result.

    ``sqnr_db`` is its signal-to-noise ratio against the float model, all noise from before included. ``added`` is the
    noise power over the signal's that the node adds to what the noisiest of its operands brings, 0 if it adds none.
    """

    node: str
    op: str
    sqnr_db: float
    added: float


def sensitivity(
    prepared: Model,
    profile: Profile,
    assignment: Assignment,
    compiler: Compiler,
    batches: Iterable[Batch],
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """The quantized nodes of an assignment, the most harmful first.

    Two passes over the data are enough for all nodes at once, one of the float model and one of the model quantized
    as a whole, batch by batch: the local metric of QuantuneV2 (Kim et al., 2025, arXiv 2501.07161), here the
    signal-to-noise ratio at each node, of which only what the node adds counts against it.
    """
    quantized = apply(prepared, assignment, derive(prepared, profile, assignment))
    results = _results(prepared, assignment)
    kept = {value.name for node in quantized.ir.graph for value in node.outputs}
    names = [name for name in dict.fromkeys(results.values()) if name in kept]
    exact, rounded = compiler(with_outputs(prepared, names)), compiler(with_outputs(quantized, names))
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    inputs = {name: [0.0, 0.0] for name in prepared.inputs}
    for number, batch in enumerate(batches):
        expected, got = exact(batch), rounded(batch)
        for name in names:
            power, error = _powers(expected[name], got[name])
            signal[name] += power
            noise[name] += error
        for name, sums in inputs.items():
            sums[0] += float(np.square(batch[name].astype(np.float64)).sum())
        if progress is not None:
            progress(f"sensitivity, batch {number + 1}", 0.0)

    found: list[Sensitivity] = []
    ratio: dict[str, float] = dict.fromkeys(inputs, 0.0)  # noise over signal of every tensor, as far as known
    for node in prepared.ir.graph:
        operands = [node.inputs[index] for index in data_inputs(node) if index < len(node.inputs)]
        before = max(
            (ratio.get(value.name or "", 0.0) for value in operands if value and not is_constant(value)), default=0.0
        )
        name = results.get(node.name or "")
        if name is None or name not in signal:
            for value in node.outputs:
                ratio[value.name or ""] = before
            continue
        after = noise[name] / signal[name] if signal[name] > 0.0 else 0.0
        for value in node.outputs:
            ratio[value.name or ""] = after
        if assignment.of(node).role in ("product", "active"):
            added = max(after - before, 0.0)
            found.append(Sensitivity(node.name or "", node.op_type, sqnr_db(signal[name], noise[name]), added))
    return sorted(found, key=lambda each: -each.added)


def _results(prepared: Model, assignment: Assignment) -> dict[str, str]:
    """Node -> the tensor that shows its noise: of a product that behind its tail, of any other its own result."""
    shown: dict[str, str] = {}
    nodes = list(prepared.ir.graph)
    for node in nodes:
        if assignment.of(node).role not in ("product", "active", "tail"):
            continue
        if node.outputs[0].name:  # a recurrent node may leave its first result out
            shown[node.name or ""] = node.outputs[0].name
    # From the end, so that a tail of several operators is followed to its last.
    for node in reversed(nodes):
        readers = [use.node for use in node.outputs[0].uses()]
        if len(readers) == 1 and assignment.of(readers[0]).role == "tail" and (node.name or "") in shown:
            shown[node.name or ""] = shown.get(readers[0].name or "", shown[node.name or ""])
    return shown


def _powers(expected: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Sums of squares of the expected values and of the differences, over what is finite in both."""
    a, b = expected.astype(np.float64).reshape(-1), got.astype(np.float64).reshape(-1)
    difference = a - b
    if not np.isfinite(difference).all():
        good = np.isfinite(difference)
        a, difference = a[good], difference[good]
    return float(a @ a), float(difference @ difference)
