"""Regions that treat every image of a batch on its own: which values have the batch as axis 0, and the same region for
fewer images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.elementwise import is_elementwise
from nestc.kernels.ops.attributes import integer, integers


@dataclass(frozen=True)
class Batch:
    """A region computes the images of a batch independently of each other.

    ``values``: those of the region whose axis 0 counts the ``images``. All others are the same for every image.
    """

    images: int
    values: frozenset[str]


class _Role(Enum):
    """What an operand is to an operator: one entry an image, the same for all images, or whichever its shape says (as
    operands that are broadcast)."""

    BATCH = "batch"
    SHARED = "shared"
    BROADCAST = "broadcast"


def batch_of(region: Region) -> Batch | None:
    """How a region treats a batch; None where images depend on each other, where that is not known, or where there is
    but one."""
    shapes = [region.types[name].shape for name in region.outputs]
    if not shapes or any(not shape or 0 in shape or shape[0] != shapes[0][0] for shape in shapes):
        return None
    images = shapes[0][0]
    values = _Roles(region, images).run() if images > 1 else None
    if values is None or not values.intersection(region.inputs) or not values.issuperset(region.outputs):
        return None
    return Batch(images, values)


def of_images(region: Region, batch: Batch, images: int) -> Region:
    """The region for so many images."""
    return replace(region, types=types_of(region.types, batch.values, images))


def types_of(types: Mapping[str, TensorType], values: frozenset[str], images: int) -> dict[str, TensorType]:
    """Types, those of `values` for so many images."""
    return {
        name: TensorType(type_.dtype, (images, *type_.shape[1:])) if name in values else type_
        for name, type_ in types.items()
    }


class _Roles:
    """Goes over the operators of a region in order and notes of each value whether axis 0 is the batch."""

    def __init__(self, region: Region, images: int) -> None:
        self.region = region
        self.images = images
        self.batched: dict[str, bool] = dict.fromkeys(region.constants, False)

    def run(self) -> frozenset[str] | None:
        for op in self.region.ops:
            if not self.one(op):
                return None
        return frozenset(name for name, batched in self.batched.items() if batched)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.region.types[name].shape

    def one(self, op: Op) -> bool:
        """Note the operands and results of an operator; False if its images may depend on each other."""
        given = [name for name in op.inputs if name]
        results = [name for name in op.outputs if name]
        if given and all(self.batched.get(name) is False for name in given):
            self.batched.update(dict.fromkeys(results, False))
            return True
        if any(name not in self.region.types for name in (*given, *results)):
            return False
        if any(self.shape(name)[:1] != (self.images,) for name in results):
            return False
        roles = _roles(op, self.region)
        if roles is None:
            return False
        rank = len(self.shape(results[0]))
        for place, name in enumerate(op.inputs):
            if name and not self.fits(name, roles[place] if place < len(roles) else roles[-1], rank):
                return False
        self.batched.update(dict.fromkeys(results, True))
        return any(self.batched[name] for name in given)

    def fits(self, name: str, role: _Role, rank: int) -> bool:
        """Whether an operand is what it has to be; the first operator that reads an input of the region says what it
        is."""
        shape = self.shape(name)
        deep = len(shape) == rank and shape[:1] == (self.images,)
        if role is _Role.BROADCAST:
            if not deep and len(shape) >= rank and shape[:1] != (1,):
                return False
            role = _Role.BATCH if deep else _Role.SHARED
        if role is _Role.BATCH and shape[:1] != (self.images,):
            return False
        wanted = role is _Role.BATCH
        return self.batched.setdefault(name, wanted) == wanted


_FIRST = (_Role.BATCH, _Role.SHARED)
"""Data first, then what is the same for all images."""

_ALL = (_Role.BATCH,)

_WINDOWS = frozenset(
    "Conv ConvTranspose AveragePool LpPool MaxPool GlobalAveragePool GlobalMaxPool GlobalLpPool BatchNormalization"
    " InstanceNormalization GroupNormalization LRN DepthToSpace SpaceToDepth".split()
)
"""Data [N, C, ...] first; all else belongs to channels or to the operator."""

_ALONG = {
    "Softmax": -1,
    "LogSoftmax": -1,
    "Hardmax": -1,
    "LayerNormalization": -1,
    "RMSNormalization": -1,
    "LpNormalization": -1,
    "ArgMax": 0,
    "ArgMin": 0,
    "Concat": 0,
    "Split": 0,
    "Gather": 0,
}
"""Operators that work along an axis, and which one that is if they do not say."""

_RESHAPES = frozenset("Flatten Reshape Squeeze Unsqueeze".split())


def _roles(op: Op, region: Region) -> Sequence[_Role] | None:
    """What the operands of an operator are (the last one's holds for those that follow); None if not known."""
    if op.domain not in ("", "ai.onnx"):
        return None
    if op.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return _FIRST if is_elementwise(op) and _scales(op, region) else None
    if is_elementwise(op):
        return (_Role.BROADCAST,)
    shape = region.types[op.inputs[0]].shape if op.inputs and op.inputs[0] else ()
    if not shape:
        return None
    if op.op_type in _WINDOWS:
        # Indices of maxima count through all images; training reads the mean of them.
        return None if len([name for name in op.outputs if name]) > 1 or integer(op, "training_mode", 0) else _FIRST
    if op.op_type in _RESHAPES:
        # Row-major order of the elements stays, so what belongs to an image does.
        return _FIRST
    if op.op_type in _ALONG:
        if integer(op, "axis", _ALONG[op.op_type]) % len(shape) == 0:
            return None
        return _ALL if op.op_type == "Concat" else _FIRST
    if op.op_type == "Transpose":
        return _ALL if (integers(op, "perm") or (None,))[0] == 0 else None
    rule = _RULES.get("Reduce" if op.op_type.startswith("Reduce") else op.op_type)
    return None if rule is None else rule(op, region)


def _scales(op: Op, region: Region) -> bool:
    """Whether scale and zero point are the same for all images."""
    data, scale = (region.types[name].shape for name in op.inputs[:2])
    return prod(scale) == 1 or (len(scale) == 1 and integer(op, "axis", 1) % max(1, len(data)) != 0)


def _numbers(op: Op, region: Region, place: int) -> list[int] | None:
    array = region.constant(op.input(place))
    return None if array is None else [int(v) for v in array.reshape(-1)]


def _reduce(op: Op, region: Region) -> Sequence[_Role] | None:
    axes = integers(op, "axes") or _numbers(op, region, 1)
    rank = len(region.types[op.inputs[0]].shape)
    return None if not axes or any(axis % rank == 0 for axis in axes) else _FIRST


def _cumulate(op: Op, region: Region) -> Sequence[_Role] | None:
    axis = _numbers(op, region, 1)
    return None if axis is None or axis[0] % len(region.types[op.inputs[0]].shape) == 0 else _FIRST


def _slice(op: Op, region: Region) -> Sequence[_Role] | None:
    shape = region.types[op.inputs[0]].shape
    starts, ends = _numbers(op, region, 1), _numbers(op, region, 2)
    axes = _numbers(op, region, 3) if op.input(3) else list(range(len(starts or ())))
    if starts is None or ends is None or axes is None:
        return None
    return None if any(axis % len(shape) == 0 for axis in axes) else _FIRST


def _pad(op: Op, region: Region) -> Sequence[_Role] | None:
    rank = len(region.types[op.inputs[0]].shape)
    amounts = _numbers(op, region, 1)
    axes = _numbers(op, region, 3) if op.input(3) else list(range(rank))
    if amounts is None or axes is None:
        return None
    padded = [axis % rank for axis, *ends in zip(axes, amounts, amounts[len(axes) :], strict=False) if any(ends)]
    return None if 0 in padded else _FIRST


def _resize(op: Op, region: Region) -> Sequence[_Role] | None:
    scales = region.constant(op.input(2))
    if op.input(1) or op.input(3) or scales is None or integers(op, "axes"):
        return None
    return _FIRST if scales.size and scales.reshape(-1)[0] == 1 else None


def _product(op: Op, region: Region) -> Sequence[_Role] | None:
    left, right = (len(region.types[name].shape) for name in op.inputs[:2])
    if left < 2 or right < 2:
        return None
    return (_Role.BATCH, _Role.BROADCAST if left > 2 else _Role.SHARED) if left >= right else None


def _gemm(op: Op, region: Region) -> Sequence[_Role] | None:
    return None if integer(op, "transA", 0) else (_Role.BATCH, _Role.SHARED, _Role.BROADCAST)


_RULES: Mapping[str, Callable[[Op, Region], Sequence[_Role] | None]] = {
    "CumSum": _cumulate,
    "Gemm": _gemm,
    "MatMul": _product,
    "MeanVarianceNormalization": _reduce,
    "Pad": _pad,
    "Reduce": _reduce,
    "Resize": _resize,
    "Slice": _slice,
}
