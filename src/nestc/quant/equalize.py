"""Cross-layer equalization: scale channels between layers so that all of them use the integers of their tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from nestc.graph.kinds import is_constant
from nestc.graph.model import Model, static_shape
from nestc.graph.passes.rewrite import array, operand, scalar
from nestc.quant.choose import Assignment, data_inputs
from nestc.quant.insert import constant, follow
from nestc.quant.profile import Histogram, Profile, TensorStats
from nestc.quant.scheme import Scheme
from nestc.quant.threshold import squared_errors, thresholds
from nestc.quant.tools import Context, Tool

Floats = NDArray[np.float64]

POWERS = ((0.0, 0.25), (0.0, 0.5), (0.0, 0.75), (0.5, 0.5), (0.5, 0.0), (1.0, 0.0))
"""Exponents (v, w) that are tried. The fourth is equation 11 of Nagel et al.; the first three are all that can help
where weights have a scale a channel, since these do not mind how large they are as a whole."""

ROUNDED = 0.5
"""Error of weights relative to that of rounding to the nearest: other tools round them better afterwards."""

ROUNDS = 3
"""Passes over the network."""

SMALLEST = 1.0 / 64.0
"""Least relative range of weights that counts."""

FACTORS = 2.0 ** (np.arange(16) / 16)
"""Common factors of a tensor that are tried where scales are powers of two; a whole power of two changes nothing."""

_PASSING = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "Relu"})
"""Operators that may scale each channel of the result instead of the input by the same positive number."""


@dataclass
class Group:
    """Tensors whose channels (axis 1) must be scaled alike, the layers that make them and those that read them."""

    channels: int
    tensors: list[ir.Value] = field(default_factory=list[ir.Value])
    makers: list[ir.Node] = field(default_factory=list[ir.Node])
    readers: list[ir.Node] = field(default_factory=list[ir.Node])
    clips: list[ir.Node] = field(default_factory=list[ir.Node])


def equalize(prepared: Model, profile: Profile, context: Context) -> Profile:
    """Scale channels between layers, which leaves the float results as they are; returns the changed model's profile.

    Nagel et al., "Data-free quantization through weight equalization and bias correction", ICCV 2019 (arXiv
    1906.04721), section 4.1, in these ways more: a residual sum is scaled as one with all that is added to it; ranges
    of activations, which the profile knows, count beside those of weights; a Clip gets a bound a channel (Min with a
    constant behind it), so that ReLU6 stays exact. Where scales are powers of two, each tensor is also scaled as a
    whole, so that its range becomes what a power of two covers.
    """
    scheme = context.assignment.scheme
    if scheme.activation is None or scheme.activation.is_float:
        context.notes.append(f"equalize: nothing to do, scheme {scheme.name} keeps activations in float")
        return profile
    names = quantized_tensors(prepared, context.assignment)
    groups = scalable_groups(prepared)
    factors = channel_factors(groups, profile, names, scheme)
    scaled = rescale(prepared, groups, factors)
    if not scaled:
        profile = dataclasses.replace(profile, model_hash=prepared.hash)
    elif context.calibrate is not None:
        profile = context.calibrate(prepared)
    else:
        changed = {
            name: (name, factor)
            for group, factor in zip(groups, factors, strict=True)
            for value in group.tensors
            if (name := value.name or "") in profile.tensors and profile.tensors[name].channel_axis == 1
        }
        profile = stretched(prepared, profile, changed)
        context.notes.append("equalize: no data to calibrate again with, so scaled histograms are estimated")
    if scheme.activation.pow2:
        groups = scalable_groups(prepared)
        whole = [np.full(group.channels, fitting_factor(group, profile, names, scheme)) for group in groups]
        fitted = rescale(prepared, groups, whole)
        profile = _scaled_profile(prepared, profile, groups, whole)
        context.notes.append(f"equalize: {fitted} of {len(groups)} sets of tensors between layers fit powers of two")
    context.notes.append(
        f"equalize: {scaled} of {len(groups)} sets of tensors between layers scaled channel by channel"
    )
    return profile


EQUALIZE = Tool("equalize", "before", equalize)


def quantized_tensors(prepared: Model, assignment: Assignment) -> frozenset[str]:
    """Names of the activations that the assignment rounds."""
    names: set[str] = set()
    for node in prepared.ir.graph:
        if assignment.of(node).role in ("product", "active", "moving"):
            operands = (operand(node, index) for index in data_inputs(node))
            names |= {value.name or "" for value in operands if value is not None and not is_constant(value)}
    return frozenset(names)


def scalable_groups(model: Model) -> list[Group]:
    """Sets of tensors that lie between layers with constant weights, and can be scaled there channel by channel."""
    union = _Union()
    makers: dict[ir.Value, ir.Node] = {}
    readers: list[tuple[ir.Value, ir.Node]] = []
    clips: list[ir.Node] = []
    for value in (*model.ir.graph.inputs, *model.ir.graph.outputs):
        union.pin(value)
    for node in model.ir.graph.all_nodes():
        if node.graph is not model.ir.graph:  # in the body of another
            for value in node.inputs:
                union.pin(value)
    for node in model.ir.graph:
        source, result = operand(node, 0), node.outputs[0]
        if node.domain or source is None or result.dtype != ir.DataType.FLOAT:
            for value in (*node.inputs, *node.outputs):
                union.pin(value)
        elif _is_layer(node):
            makers[result] = node
            readers.append((source, node))
            union.add(result)
            union.add(source)
        elif _bounds(node) is not None or _limit(node) is not None:
            clips.append(node)
            union.join(source, result)
        elif (node.op_type in _PASSING and len(node.outputs) == 1) or _drops_pixels(node):
            union.join(source, result)
        elif node.op_type in ("Add", "Sub") and _same_shapes(node):
            for value in node.inputs:
                union.join(value, result)
        else:
            for value in (*node.inputs, *node.outputs):
                union.pin(value)
    groups: dict[ir.Value, Group] = {}
    for value in union.members():
        channels = _channels(value)
        root = union.root(value)
        if root not in union.pinned and channels is not None:
            group = groups.setdefault(root, Group(channels))
            group.tensors.append(value)
            if value in makers:
                group.makers.append(makers[value])
    for value, node in readers:
        group = groups.get(union.root(value))
        if group is not None:
            group.readers.append(node)
    for node in clips:
        group = groups.get(union.root(node.outputs[0]))
        if group is not None:
            group.clips.append(node)
    whole = (group for group in groups.values() if all(_channels(value) == group.channels for value in group.tensors))
    return [group for group in whole if group.makers and group.readers]


def channel_factors(groups: list[Group], profile: Profile, names: frozenset[str], scheme: Scheme) -> list[Floats]:
    """The factor of each channel of each group.

    With V the range of the weights that make a channel and W that of the weights that read it, those of W^w / V^v that
    `POWERS` lists are tried, and 1; what leaves the layers that read the group the least error is taken. Factors of
    neighbours change each other's weights, hence the rounds.

    Ranges of single channels of activations are left alone: bringing those that calibration has seen to one range cuts
    off what it has not seen. With 30 images on EfficientNet-Lite0 (int8-pow2, activations only) that gave 23.4 dB on
    these images, and 10.8 dB on others, where activations scaled as a whole have 21.8 and 22.6 dB.

    Where weights have a scale a channel, tensors with bounds (Relu6) are left alone, too: a bound a channel is one
    operator more, which not every device has, and brings nothing (EfficientNet-Lite0, int8-pow2, 200 images: 21.3 dB
    with, 21.5 dB without). With one scale a tensor it does (18.3 and 13.4 dB).
    """
    state = _State(profile, names, scheme)
    factors = [np.ones(group.channels) for group in groups]
    free = [index for index, group in enumerate(groups) if not (scheme.weight.per_channel and _has_bounds(group))]
    for _ in range(ROUNDS):
        for index in free:
            group = groups[index]
            factor = state.best(group)
            state.scale(group, factor)
            factors[index] = factors[index] * factor
    return factors


def _has_bounds(group: Group) -> bool:
    """Whether scaling the channels of a group takes a bound a channel."""
    found = [_bounds(node) for node in group.clips]
    return any(each is None or any(np.isfinite(bound) and bound != 0.0 for bound in each) for each in found)


@dataclass
class _Weights:
    """The largest weight and the sum of squares over the kernel, by group, output and input: (G, O / G, I / G)."""

    largest: Floats
    squares: Floats
    taps: int


@dataclass
class _Range:
    """Of each channel of a tensor: the largest magnitude that it may have, and the mean square.

    ``width`` is the range of the tensor over its largest magnitude: 1 if it has one sign, 2 if both sides are alike.
    """

    reach: Floats
    powers: Floats
    width: float


class _State:
    """Weights and activations as they are with the factors chosen so far, and the errors that rounding them makes.

    A rounding error is taken to be uniform over a step, and a step to be the range of what shares it over the levels;
    squared errors here are 12 times as large.
    """

    def __init__(self, profile: Profile, names: frozenset[str], scheme: Scheme) -> None:
        assert scheme.activation is not None
        self._format, self._weight = scheme.activation, scheme.weight
        self._profile, self._names = profile, names
        self._weights: dict[ir.Node, _Weights] = {}
        self._ranges: dict[ir.Value, _Range | None] = {}

    def best(self, group: Group) -> Floats:
        """The factors of least error for a group, all 1 if none is better."""
        same = np.ones(group.channels)
        readers = [node for node in group.readers if self._range(operand(node, 0)) is not None]
        active = [found for value in group.tensors if (found := self._range(value)) is not None]
        if not readers or not active:
            return same
        reach = np.max([each.reach / each.reach.max() for each in active], axis=0)
        read = np.maximum(np.max([self._columns(node) for node in readers], axis=0), SMALLEST)
        made = np.maximum(np.max([self._rows(node) for node in group.makers], axis=0), SMALLEST)
        usual = [max(self._error(group, node, same), 1e-30) for node in readers]
        chosen, least = same, 1.0
        for v, w in POWERS[: 3 if self._weight.per_channel else None]:
            factor = read**w / made**v
            factor /= (factor * reach).max()
            errors = [self._error(group, node, factor) for node in readers]
            relative = float(np.mean(np.divide(errors, usual)))
            if relative < least:
                chosen, least = factor, relative
        return chosen

    def scale(self, group: Group, factor: Floats) -> None:
        """Take the factors of a group as given."""
        for node in group.makers:
            weights = self._of(node)
            rows = factor.reshape(*weights.largest.shape[:2], 1)
            self._weights[node] = _Weights(weights.largest * rows, weights.squares * rows**2, weights.taps)
        for node in group.readers:
            weights = self._of(node)
            columns = factor.reshape(weights.largest.shape[0], 1, -1)
            self._weights[node] = _Weights(weights.largest / columns, weights.squares / columns**2, weights.taps)
        for value in group.tensors:
            found = self._range(value)
            if found is not None:
                self._ranges[value] = _Range(found.reach * factor, found.powers * factor**2, found.width)

    def _error(self, group: Group, node: ir.Node, factor: Floats) -> float:
        """The squared error summed over a reader's outputs if the group's channels were multiplied by `factor`."""
        source, weights = self._range(operand(node, 0)), self._of(node)
        assert source is not None
        reach = float((source.reach * factor).max())
        step = reach / self._format.high if self._format.symmetric else reach * source.width / self._format.levels
        noise = step**2
        if not self._weight.per_channel:
            noise += sum(self._making(maker, factor) for maker in group.makers)
        columns = factor.reshape(weights.largest.shape[0], 1, -1)
        powers = (source.powers * factor**2).reshape(columns.shape).sum(axis=2, keepdims=True)
        steps = self._steps(weights.largest / columns)
        return noise * float((weights.squares / columns**2).sum()) + ROUNDED * weights.taps * float(
            (steps**2 * powers).sum()
        )

    def _making(self, node: ir.Node, factor: Floats) -> float:
        """The mean squared error of what a maker computes, from rounding its weights."""
        weights, source = self._of(node), self._range(operand(node, 0))
        if source is None:
            return 0.0
        steps = self._steps(weights.largest * factor.reshape(*weights.largest.shape[:2], 1))
        powers = source.powers.reshape(weights.largest.shape[0], 1, -1).sum(axis=2, keepdims=True)
        return ROUNDED * weights.taps * float((steps**2 * powers).mean())

    def _steps(self, largest: Floats) -> Floats:
        """The step of each output channel's weights, (G, O / G, 1)."""
        each = largest.max(axis=2, keepdims=True)
        return (each if self._weight.per_channel else np.full_like(each, each.max())) / self._weight.high

    def _columns(self, node: ir.Node) -> Floats:
        """The largest weight that reads each channel, relative to the largest that shares its scale."""
        largest = self._of(node).largest
        return (largest / np.maximum(self._steps(largest), 1e-30)).max(axis=1).reshape(-1) / self._weight.high

    def _rows(self, node: ir.Node) -> Floats:
        """The largest weight that makes each channel, relative to the largest of all."""
        largest = self._of(node).largest
        return largest.max(axis=2).reshape(-1) / max(float(largest.max()), 1e-30)

    def _of(self, node: ir.Node) -> _Weights:
        if node not in self._weights:
            self._weights[node] = _weights(node)
        return self._weights[node]

    def _range(self, value: ir.Value | None) -> _Range | None:
        """What the profile knows of a rounded tensor's channels; None if it is not rounded, or of no use."""
        if value is None:
            return None
        if value not in self._ranges:
            stats = self._profile.tensors.get(value.name or "") if value.name in self._names else None
            self._ranges[value] = None if stats is None else _range(stats, _channels(value))
        return self._ranges[value]


def _weights(node: ir.Node) -> _Weights:
    weight = array(operand(node, 1))
    assert weight is not None
    if node.op_type == "Gemm":
        wide = (weight if node.attributes.get_int("transB", 0) else weight.T)[None, :, :, None]
    else:
        groups = node.attributes.get_int("group", 1)
        wide = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    wide = wide.astype(np.float64)
    return _Weights(np.abs(wide).max(axis=3), np.square(wide).sum(axis=3), wide.shape[3])


def _range(stats: TensorStats, channels: int | None) -> _Range | None:
    """A tensor's channels; their mean squares are taken to go with the squares of their ranges."""
    if stats.channel_axis != 1 or stats.channel_max.size != channels or not stats.histogram.total:
        return None
    sizes = np.maximum(np.abs(stats.channel_min), np.abs(stats.channel_max))
    if not sizes.max() > 0:
        return None
    squared = np.square(sizes)
    edges = stats.histogram.edges
    power = float(np.square((edges[1:] + edges[:-1]) / 2) @ stats.histogram.counts) / stats.histogram.total
    powers = squared * power / max(float(squared.mean()), 1e-30)
    width = (max(stats.max, 0.0) - min(stats.min, 0.0)) / float(sizes.max())
    return _Range(np.full(sizes.shape, sizes.max()), powers, width)


def rescale(model: Model, groups: list[Group], factors: list[Floats]) -> int:
    """Multiply the channels of each group by its factors, by other weights, biases and bounds; how many changed."""
    rows: dict[ir.Node, Floats] = {}
    columns: dict[ir.Node, Floats] = {}
    for group, factor in zip(groups, factors, strict=True):
        rows.update((node, factor) for node in group.makers)
        columns.update((node, factor) for node in group.readers)
        for clip in group.clips:
            _scale_bounds(model, clip, factor)
    for node in list(dict.fromkeys((*rows, *columns))):
        _scale_weights(model, node, rows.get(node), columns.get(node))
    common.RemoveUnusedNodesPass()(model.ir)
    return sum(bool(np.any(factor != 1.0)) for factor in factors)


def fitting_factor(group: Group, profile: Profile, names: frozenset[str], scheme: Scheme) -> float:
    """The factor in [1, 2) at which powers of two as scales round the group's tensors with the least relative error."""
    format = scheme.activation
    assert format is not None
    totals = np.zeros(len(FACTORS))
    for value in group.tensors:
        stats = profile.tensors.get(value.name or "")
        if stats is None or value.name not in names or not stats.histogram.total:
            continue
        power = float(np.square(stats.histogram.edges[1:]) @ stats.histogram.counts) / stats.histogram.total
        for index, factor in enumerate(FACTORS):
            scaled = _scaled_stats(stats, float(factor))
            low, high = thresholds(scaled, format, scheme.method or profile.method)
            error = squared_errors(scaled.histogram, np.array([low]), np.array([high]), format)[0]
            totals[index] += float(error) / max(power * factor**2, 1e-30)
    return float(FACTORS[int(totals.argmin())])


class _Union:
    """Values that are scaled alike (union by linking), and those that cannot be scaled."""

    def __init__(self) -> None:
        self._parents: dict[ir.Value, ir.Value] = {}
        self.pinned: set[ir.Value] = set()

    def add(self, value: ir.Value) -> None:
        self._parents.setdefault(value, value)

    def pin(self, value: ir.Value | None) -> None:
        if value is not None and not is_constant(value):
            self.add(value)
            self.pinned.add(self.root(value))

    def root(self, value: ir.Value) -> ir.Value:
        while self._parents[value] is not value:
            value = self._parents[value]
        return value

    def join(self, one: ir.Value | None, other: ir.Value) -> None:
        if one is None:
            return
        self.add(one)
        self.add(other)
        first, second = self.root(one), self.root(other)
        self._parents[second] = first
        if second in self.pinned:
            self.pinned.add(first)

    def members(self) -> Iterable[ir.Value]:
        return self._parents


def _channels(value: ir.Value) -> int | None:
    size = value.shape[1] if value.shape is not None and len(value.shape) >= 2 else None
    return size if isinstance(size, int) else None


def _is_layer(node: ir.Node) -> bool:
    """A Conv or Gemm whose float32 weight and bias are constants, with input and output channels along axis 1."""
    weight, bias = operand(node, 1), operand(node, 2)
    if node.op_type not in ("Conv", "Gemm") or weight is None or weight.dtype != ir.DataType.FLOAT:
        return False
    if not is_constant(weight) or is_constant(operand(node, 0)) or (bias is not None and not is_constant(bias)):
        return False
    if node.op_type == "Conv":
        return _channels(node.outputs[0]) is not None
    plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
    flat = bias is None or bias.shape is None or len(bias.shape) == 1
    return plain and flat and not node.attributes.get_int("transA", 0)


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Lower and upper bound of a Clip with constant ones that keeps 0; None otherwise."""
    if node.op_type != "Clip":
        return None
    low, high = operand(node, 1), operand(node, 2)
    values = (-np.inf if low is None else scalar(low), np.inf if high is None else scalar(high))
    if values[0] is None or values[1] is None or not values[0] <= 0.0 <= values[1]:
        return None
    return values[0], values[1]


def _limit(node: ir.Node) -> np.ndarray | None:
    """The constant of a Min or Max with one a channel, as this tool makes them; None otherwise."""
    constant = array(operand(node, 1)) if node.op_type in ("Max", "Min") and len(node.inputs) == 2 else None
    channels = _channels(node.outputs[0])
    shape = node.outputs[0].shape
    if constant is None or channels is None or shape is None:
        return None
    return constant if constant.shape == (channels, *(1,) * (len(shape) - 2)) else None


def _drops_pixels(node: ir.Node) -> bool:
    """Whether (N, C, 1, 1, ...) becomes (N, C)."""
    source = operand(node, 0)
    if node.op_type not in ("Flatten", "Reshape") or source is None:
        return False
    old, new = static_shape(source), static_shape(node.outputs[0])
    return old is not None and new is not None and len(new) == 2 and old[:2] == new and set(old[2:]) <= {1}


def _same_shapes(node: ir.Node) -> bool:
    return all(value is not None and not is_constant(value) for value in node.inputs) and all(
        value is not None and value.shape is not None and value.shape == node.outputs[0].shape for value in node.inputs
    )


def _scale_weights(model: Model, node: ir.Node, rows: Floats | None, columns: Floats | None) -> None:
    """Give a layer weights for scaled output channels (rows) and scaled input channels (columns), and a scaled bias."""
    weight, bias = array(operand(node, 1)), array(operand(node, 2))
    assert weight is not None
    wide = weight.astype(np.float64)
    by_output = node.op_type == "Conv" or bool(node.attributes.get_int("transB", 0))
    if not by_output:
        wide = wide.T
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    taps = (1,) * (wide.ndim - 2)
    if rows is not None:
        wide = wide * rows.reshape(-1, 1, *taps)
    if columns is not None:
        each = columns.reshape(groups, -1)
        wide = wide / np.repeat(each, wide.shape[0] // groups, axis=0).reshape(*wide.shape[:2], *taps)
    name = node.name or ""
    node.replace_input_with(1, constant(model, (wide if by_output else wide.T).astype(np.float32), f"{name}.weight"))
    if bias is not None and rows is not None:
        node.replace_input_with(2, constant(model, (bias * rows).astype(np.float32), f"{name}.bias"))


def _scale_bounds(model: Model, clip: ir.Node, factor: Floats) -> None:
    """Scale the bounds of a Clip; where channels differ, its own become the widest, and Min and Max follow it."""
    if np.all(factor == 1.0):
        return
    result = clip.outputs[0]
    limit = _limit(clip)
    if limit is not None:
        scaled = (limit * factor.reshape(limit.shape)).astype(np.float32)
        clip.replace_input_with(1, constant(model, scaled, f"{clip.name}.bounds"))
        return
    bounds = _bounds(clip)
    assert bounds is not None
    rank = 2 if result.shape is None else len(result.shape)
    clip.resize_inputs(3)
    for index, (bound, op_type) in enumerate(zip(bounds, ("Max", "Min"), strict=True), 1):
        if not np.isfinite(bound) or bound == 0.0:
            continue
        widest = np.float32(bound * factor.max())
        clip.replace_input_with(index, constant(model, np.asarray(widest), f"{clip.name}.bound"))
        if np.any(factor != factor[0]):
            each = (bound * factor).astype(np.float32).reshape(-1, *(1,) * (rank - 2))
            follow(model, clip, op_type, constant(model, each, f"{clip.name}.bounds"))


def _scaled_profile(prepared: Model, profile: Profile, groups: list[Group], factors: list[Floats]) -> Profile:
    """The profile of a model whose tensors were scaled as a whole, each by the one factor of its group."""
    tensors = dict(profile.tensors)
    for group, factor in zip(groups, factors, strict=True):
        for value in group.tensors:
            stats = tensors.get(value.name or "")
            if stats is not None:
                tensors[value.name or ""] = _scaled_stats(stats, float(factor[0]))
    return dataclasses.replace(profile, model_hash=prepared.hash, tensors=tensors)


def _scaled_stats(stats: TensorStats, factor: float) -> TensorStats:
    histogram = dataclasses.replace(stats.histogram, width=stats.histogram.width * factor)
    return dataclasses.replace(
        stats, min=stats.min * factor, max=stats.max * factor, histogram=histogram,
        channel_min=stats.channel_min * factor, channel_max=stats.channel_max * factor,
    )  # fmt: skip


def stretched(prepared: Model, profile: Profile, changed: Mapping[str, tuple[str, Floats]]) -> Profile:
    """The profile of a model whose channels were scaled: new tensor -> (tensor it was made of, factor a channel).

    An estimate: every channel's histogram is taken to be the tensor's, stretched to the range of that channel.
    """
    tensors = dict(profile.tensors)
    for name, (old, factor) in changed.items():
        stats = profile.tensors.get(old)
        if stats is not None and stats.channel_min.shape == factor.shape:
            tensors[name] = _stretch(stats, factor)
    return dataclasses.replace(profile, model_hash=prepared.hash, tensors=tensors)


def _stretch(stats: TensorStats, factor: Floats) -> TensorStats:
    low, high = stats.channel_min * factor, stats.channel_max * factor
    least, most = float(low.min()), float(high.max())
    magnitude = max(abs(stats.min), abs(stats.max))
    if not stats.histogram.total or magnitude == 0.0:
        return dataclasses.replace(stats, min=least, max=most, channel_min=low, channel_max=high)
    edges = stats.histogram.edges
    middles = (edges[:-1] + edges[1:]) / 2
    width = max(max(abs(least), abs(most)) / len(middles), 1e-30)
    reach = np.maximum(np.abs(low), np.abs(high)) / magnitude
    bins = np.floor(np.clip(middles[None, :] * reach[:, None], least, most) / width).astype(np.int64)
    counts = np.broadcast_to(stats.histogram.counts, bins.shape)
    sums = np.bincount((bins - bins.min()).reshape(-1), weights=counts.reshape(-1))
    histogram = Histogram(width, int(bins.min()), np.rint(sums).astype(np.int64))
    return dataclasses.replace(stats, min=least, max=most, histogram=histogram, channel_min=low, channel_max=high)
