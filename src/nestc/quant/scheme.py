"""Number formats, and schemes: which formats activations and weights get, and which operators are computed in them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from nestc.errors import QuantizationError
from nestc.quant.profile import METHODS

Dtype = Literal["int4", "int8", "uint8", "int16", "bfloat16"]
Granularity = Literal["tensor", "channel", "block"]

RANGES: Mapping[str, tuple[int, int]] = {
    "int4": (-8, 7),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
}
"""Smallest and largest integer of each element type."""


@dataclass(frozen=True)
class Format:
    """How a tensor is stored: real value = (stored - zero point) * scale, or bfloat16 without either.

    ``symmetric``: the zero point is 0. ``narrow``: the most negative integer is not used, so that the range is the
    same to both sides. ``per_channel``: a scale for each slice along the channel axis; ``block``: a scale for so many
    elements along the axis that is summed over (0: none). ``pow2``: scales are powers of two. ``bits``: only so many
    bits of the element type are used (0: all), the same range to both sides of 0.
    """

    dtype: Dtype
    symmetric: bool = True
    per_channel: bool = False
    pow2: bool = False
    block: int = 0
    narrow: bool = False
    bits: int = 0

    @property
    def is_float(self) -> bool:
        """Whether values are only rounded (bfloat16), without scale and zero point."""
        return self.dtype == "bfloat16"

    @property
    def low(self) -> int:
        """The smallest integer used."""
        return -self.high if self.bits else RANGES[self.dtype][0] + (1 if self.narrow else 0)

    @property
    def high(self) -> int:
        """The largest integer used."""
        return (1 << (self.bits - 1)) - 1 if self.bits else RANGES[self.dtype][1]

    @property
    def levels(self) -> int:
        """Steps between the smallest and the largest integer used."""
        return self.high - self.low

    @property
    def granularity(self) -> Granularity:
        """What shares a scale."""
        return "block" if self.block else "channel" if self.per_channel else "tensor"


@dataclass(frozen=True)
class Scheme:
    """Formats of activations and weights, and how thresholds are chosen.

    ``activation`` None: only weights are quantized. ``method`` None: thresholds of activations by the profile's own
    method; ``weight_method``: those of weights. ``ops``: the operators that the scheme computes in its format.
    ``tools``: the accuracy tools that run unless others are asked for, those that need calibration data only with them.
    """

    name: str
    activation: Format | None
    weight: Format
    ops: frozenset[str]
    description: str
    method: str | None = None
    weight_method: str = "minmax"
    tools: tuple[str, ...] = ()

    @property
    def weight_only(self) -> bool:
        """Whether activations stay float."""
        return self.activation is None

    @property
    def integer(self) -> bool:
        """Whether both operands of a product are integers, so that the product can be computed on integers."""
        return self.activation is not None and not self.activation.is_float


WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Products; MatMul also of two activations."""

RECURRENT = frozenset({"GRU", "LSTM"})
"""Products with the same weights at every step of time; bfloat16 is the one format they are rounded to."""

MOVING = frozenset(
    """DepthToSpace Flatten Gather Identity MaxPool Pad Reshape Resize Slice SpaceToDepth Split Squeeze Transpose
    Unsqueeze""".split()
)
"""Operators whose elements are elements of their first input, so that both sides share scale and zero point."""

ACTIVE = frozenset(
    """Add AveragePool Clip Concat Elu Gelu GlobalAveragePool HardSigmoid HardSwish LeakyRelu Mish Mul ReduceMean Relu
    Sigmoid Sub Swish Tanh""".split()
)
"""Other operators that are computed on quantized activations, where they stand between products."""

CURVES = frozenset({"Elu", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Sigmoid", "Swish", "Tanh"})
"""Those of them that shifts, maxima and minima do not make."""

INTEGER_OPS = WEIGHTED | MOVING | ACTIVE

_WEIGHT8 = Format("int8", per_channel=True, narrow=True)

SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "int8",
            Format("uint8", symmetric=False),
            _WEIGHT8,
            INTEGER_OPS,
            "weights int8, symmetric per channel; activations uint8, asymmetric per tensor",
            tools=("squant", "bias-correction"),
        ),
        Scheme(
            "int8-symmetric",
            Format("int8"),
            _WEIGHT8,
            INTEGER_OPS,
            "weights int8, symmetric per channel; activations int8, symmetric per tensor",
            tools=("squant", "bias-correction"),
        ),
        Scheme(
            "int8-pow2",
            Format("int8", pow2=True),
            dataclasses.replace(_WEIGHT8, pow2=True),
            INTEGER_OPS,
            "int8-symmetric with scales that are powers of two, chosen by least squared error",
            method="mse",
            weight_method="mse",
            tools=("equalize", "squant", "bias-correction"),
        ),
        # Weights of 16 bits too: with 8 they would limit the result to what int8 reaches (EfficientNet-Lite0: 20.0 dB
        # with int16 activations, 19.1 dB with uint8). ONNX Runtime runs both. Hardware that multiplies 16 by 8 bits
        # (TFLite's and Arm's 16x8) takes int16:weight=int8.
        Scheme(
            "int16",
            Format("int16"),
            dataclasses.replace(_WEIGHT8, dtype="int16"),
            INTEGER_OPS,
            "weights int16, symmetric per channel; activations int16, symmetric per tensor",
        ),
        Scheme(
            "bf16",
            Format("bfloat16"),
            Format("bfloat16"),
            WEIGHTED | RECURRENT,
            "weights and activations of products rounded to bfloat16, sums in float32",
        ),
        Scheme(
            "weight-int8",
            None,
            _WEIGHT8,
            frozenset({"Gemm", "MatMul"}),
            "weights of MatMul and Gemm int8, symmetric per channel; activations float",
        ),
        Scheme(
            "weight-int4",
            None,
            Format("int4", block=32),
            frozenset({"Gemm", "MatMul"}),
            "weights of MatMul and Gemm int4, symmetric in blocks of 32; activations float",
            weight_method="mse",
        ),
    )
}
"""The schemes by name, most exact integers first; ``auto`` (a search over them) and ``devices`` (a mix of them) are
not among these."""

AUTO = "auto"
"""The search, where a scheme for the whole model is named."""

DEVICES = "devices"
"""What the targets ask for (`nestc.quant.devices`), where a scheme for the whole model is named."""

FLOAT = "float"
"""In overrides: the node stays as it is."""


def scheme_named(text: str) -> Scheme:
    """The scheme of ``name`` or ``name:option=value,...``. Raises QuantizationError with the nearest known name.

    Options: ``weight`` = int4 | int8 | int16, ``weight-bits`` = how many of its bits are used (7 of int8 make sums of
    byte products fit 16 bits, so that x86 without VNNI multiplies faster and still exactly), ``granularity`` = tensor |
    channel | block:SIZE of the weights, ``method`` = minmax | percentile | mse | entropy of activations,
    ``weight-method`` likewise.
    """
    name, _, options = text.strip().partition(":")
    if name not in SCHEMES:
        listed = ", ".join(SCHEMES)
        if name == AUTO:
            raise QuantizationError(f"scheme auto is a search for a whole model, over a scheme of these: {listed}")
        if name == DEVICES:
            raise QuantizationError(f"scheme devices is for a whole model, with one of these elsewhere: {listed}")
        known = (*SCHEMES, AUTO, DEVICES)
        raise QuantizationError(f"there is no scheme {name!r}{nearest(name, known)}; choose {', '.join(known)}")
    scheme = SCHEMES[name]
    for option in filter(None, (part.strip() for part in options.split(","))):
        key, _, value = (part.strip() for part in option.partition("="))
        if key not in _OPTIONS:
            known = ", ".join(_OPTIONS)
            raise QuantizationError(
                f"scheme {name!r} has no option {key!r}{nearest(key, _OPTIONS)}; there are {known}, as in "
                f"{name}:granularity=tensor"
            )
        scheme = _OPTIONS[key](scheme, value)
    return scheme if not options else dataclasses.replace(scheme, name=text.strip())


def nearest(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest of the known words, or an empty text."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _weight(scheme: Scheme, value: str) -> Scheme:
    if value not in ("int4", "int8", "int16") or scheme.weight.is_float:
        raise QuantizationError(
            f"scheme {scheme.name!r} cannot have weights of type {value!r}; weights of integer schemes are int4, int8 "
            "or int16"
        )
    return dataclasses.replace(scheme, weight=dataclasses.replace(scheme.weight, dtype=cast(Dtype, value)))


def _weight_bits(scheme: Scheme, value: str) -> Scheme:
    form = scheme.weight
    most = 0 if form.is_float else int(form.dtype.lstrip("uint"))
    if not value.isdigit() or not 2 <= int(value) <= most:
        raise QuantizationError(
            f"scheme {scheme.name!r} cannot have weights of {value!r} bits; choose a number from 2 to {most}"
            if most
            else f"scheme {scheme.name!r} has no integer weights whose bits could be chosen"
        )
    bits = 0 if int(value) == most else int(value)
    return dataclasses.replace(scheme, weight=dataclasses.replace(form, bits=bits))


def _granularity(scheme: Scheme, value: str) -> Scheme:
    kind, _, size = value.partition(":")
    block = int(size) if size.isdigit() else 0
    if kind not in ("tensor", "channel", "block") or (kind == "block") != (block >= 2) or scheme.weight.is_float:
        raise QuantizationError(
            f"scheme {scheme.name!r} cannot have weights of granularity {value!r}; choose tensor, channel or "
            "block:SIZE (such as block:32)"
        )
    if block and not scheme.weight_only:
        raise QuantizationError(
            f"scheme {scheme.name!r} cannot have weights in blocks: sums over blocks of different scales are no "
            "integer products; use weight-int8 or weight-int4"
        )
    formed = dataclasses.replace(scheme.weight, per_channel=kind == "channel", block=block)
    return dataclasses.replace(scheme, weight=formed)


def _method(scheme: Scheme, value: str) -> Scheme:
    return dataclasses.replace(scheme, method=_known_method(value))


def _weight_method(scheme: Scheme, value: str) -> Scheme:
    return dataclasses.replace(scheme, weight_method=_known_method(value))


def _known_method(value: str) -> str:
    name, _, percent = value.partition(":")  # percentile:99.9
    if name not in METHODS or (percent and name != "percentile"):
        raise QuantizationError(
            f"there is no calibration method {value!r}{nearest(name, METHODS)}; choose {', '.join(METHODS)}"
        )
    return value


_OPTIONS: Mapping[str, Callable[[Scheme, str], Scheme]] = {
    "weight": _weight,
    "weight-bits": _weight_bits,
    "granularity": _granularity,
    "method": _method,
    "weight-method": _weight_method,
}
