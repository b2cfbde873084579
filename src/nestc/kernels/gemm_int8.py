"""Products of 8-bit integers: MatMul and Gemm between DequantizeLinear and QuantizeLinear, and MatMulInteger.

Sums are exact in int32. Where the machine multiplies 8-bit factors in fours (`Dot` on bytes), constant weights are used
as they are and the activations' zero point is made up for by the columns' sums, where a sum starts; so they are where
pmaddubsw cannot saturate. Elsewhere both sides are widened to int16 with their zero points subtracted, which pmaddwd
multiplies without saturation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Launch, Layout, Lowered
from nestc.kernels.byte_pairs import PairedUnits, Pairing
from nestc.kernels.conv_pack import PAIRED, PAIRED_TILE, WAYS, paired_tile
from nestc.kernels.gemm_int8_pack import constant_weights, named_zero, pack_launch, zero_at
from nestc.kernels.gemm_shape import Product, Tile, product_of
from nestc.kernels.operands import Operands
from nestc.kernels.paired_steps import PairedSteps
from nestc.kernels.panels import PAIRS, Numbers, Panels, to_panels
from nestc.kernels.quantized import Quantized, QuantizedAnchor, prologue, quantized_anchor
from nestc.kernels.requantize import Requantize
from nestc.kernels.small import INTEGERS
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import constant, less, load, splat
from nestc.tensor.ir import Binary, Bitcast, Buffer, Cast, Dot, Expr, PairSum, Stmt
from nestc.tensor.rewrite import cast

_BYTES = frozenset({"int8", "uint8"})
_WEIGHTS = _BYTES | frozenset(INTEGERS)
_ROWS = 6  # least rows for which it pays that weights are read in an order of their own
_BOUND = 128  # of two weights of one sign whose products with bytes are summed in 16 bits: 255 * 128 < 2**15
HALVES = Numbers("uint8", "int8", 4, "int32", 3, 1)
"""Bytes in fours, two of which pmaddubsw adds in 16 bits, pmaddwd with ones both, and an addition."""


@dataclass(frozen=True)
class Integers:
    """An integer product as the kernel sees it.

    ``product`` names the integer values. ``a_zero`` and ``b_zero`` are arrays (scalars, or `b_zero` a number a column)
    or names of values of the region. ``scale``, a number or one a column, is None where int32 is what is wanted.
    """

    op: Op
    product: Product
    a_zero: np.ndarray | str
    b_zero: np.ndarray | str
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None


class GemmInt8Family:
    """MatMul and Gemm on 8-bit integers, MatMulInteger."""

    name = "gemm_int8"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        found = _read(region)
        return found if isinstance(found, str) else tail_refusal(region, found.op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Everything row-major."""
        return dict.fromkeys((*region.inputs, *region.outputs), PLAIN)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One launch, after one that packs `b` where it is not constant."""
        found = _read(region)
        assert isinstance(found, Integers)
        weights = constant_weights(found.product, region, found.b_zero)
        paired = _paired(weights, found.product.m, machine)
        if paired is not None:
            return _PairedPanels(region, found, machine, weights, *paired).lower()
        return _IntegerPanels(region, found, machine, weights).lower()


def _read(region: Region) -> Integers | str:
    """The integer product of a region, or why it is none."""
    if region.anchor == "MatMulInteger" and not prologue(region):
        return _read_integer(region)
    if region.anchor not in ("MatMul", "Gemm"):
        return "its anchor is none of MatMul, Gemm and MatMulInteger"
    anchor = quantized_anchor(region)
    if anchor is None:
        return "its operands do not come from DequantizeLinear with constant parameters"
    return _read_quantized(region, anchor)


def _read_quantized(region: Region, anchor: QuantizedAnchor) -> Integers | str:
    op, where = anchor.op, f"{anchor.op.op_type} (node {anchor.op.name!r})"
    a, b, c = anchor.operand(0), anchor.operand(1), anchor.operand(2)
    if a is None or b is None:
        return f"an operand of {where} is not quantized"
    product = replace(product_of(op, region), a=a.name, b=b.name)
    if a.dtype not in _BYTES or a.scale.ndim or a.zero_point.ndim:
        return f"the left operand of {where} is not of 8 bits with one scale"
    if b.dtype not in (_WEIGHTS if b.name in region.constants else _BYTES) or b.block:
        return f"the right operand of {where} is not of 8 bits"
    rank = len(region.types[b.name].shape)
    if (b.scale.ndim or b.zero_point.ndim) and b.axis != rank - (2 if product.transposed_b else 1):
        return f"the scales of the right operand of {where} do not follow its columns"
    if product.vector_b and b.scale.ndim:
        return f"the right operand of {where} is a vector with several scales"
    problem = _size_problem(region, product, where, _largest(b, region))
    if problem:
        return problem
    bias = None
    if product.c:
        values = _addend(region, op.inputs[2], c)
        if values is None:
            return f"what {where} adds is not constant"
        if values.size not in (1, product.n) or (values.ndim and values.shape[-1] != values.size):
            return f"what {where} adds is not a number a column"
        bias = product.beta * values.astype(np.float64).reshape(-1)
    scale = product.alpha * np.asarray(a.scale, np.float64) * b.scale.astype(np.float64)
    plain = replace(product, alpha=1.0, beta=1.0, c="")
    return Integers(op, plain, a.zero_point, b.zero_point, scale, bias)


def _addend(region: Region, name: str, operand: Quantized | None) -> np.ndarray | None:
    """The constant that a Gemm adds, as real numbers."""
    array = region.constant(name if operand is None else operand.name)
    return array if array is None or operand is None else operand.values(array)


def _read_integer(region: Region) -> Integers | str:
    op = region.ops[0]
    where = f"{op.op_type} (node {op.name!r})"
    product = product_of(op, region)
    if any(region.types[name].dtype not in _BYTES for name in op.inputs[:2]):
        return f"the operands of {where} are not of 8 bits"
    zeros: list[np.ndarray | str] = []
    for position in (2, 3):
        name = op.input(position)
        size = prod(region.types[name].shape) if name else 1
        if size != 1 and not (position == 3 and region.types[name].shape == (product.n,)):
            return f"zero point {name!r} of {where} is neither a number nor one a column"
        array = region.constant(name)
        if name and array is None:
            zeros.append(name)
        else:
            zeros.append(np.zeros((), np.int32) if array is None else array.astype(np.int32).reshape(-1))
    problem = _size_problem(region, product, where, 0)
    return problem or Integers(op, product, zeros[0], zeros[1])


def _size_problem(region: Region, product: Product, where: str, largest: int) -> str | None:
    """Why sums of products of factors up to 255 and `largest` (0: wrapping is as good) cannot be made."""
    if 0 in region.types[product.a].shape or 0 in region.types[product.b].shape:
        return f"{where} has an axis of size 0"
    if product.k * 255 * largest >= 1 << 31:
        return f"sums of {where} over {product.k} products do not fit in 32 bits"
    return None


def _largest(operand: Quantized, region: Region) -> int:
    """Largest magnitude of the operand less its zero point."""
    if operand.name not in region.constants or operand.dtype in ("uint8", "int8"):
        return 128 if operand.dtype == "int8" and not operand.zero_point.any() else 255
    return 31


def _pairs_fit(weights: np.ndarray | None) -> bool:
    """Whether no sum of two products of a byte and an int8 weight (batch, k, n), neighbours along k from an even place
    on, leaves 16 bits."""
    if weights is None or weights.size == 0:
        return False
    if weights.min() >= -64 and weights.max() <= 64:
        return True
    even, odd = weights[:, 0::2].astype(np.int16), weights[:, 1::2]
    return bool(np.abs(even[:, : odd.shape[1]] + odd).max(initial=0) <= _BOUND)


def _paired(weights: np.ndarray | None, m: int, machine: CpuMachine) -> tuple[PairedUnits, Tile] | None:
    """The steps for int8 weights (batch, k, n) and a register tile, where they are expected to be faster than int16."""
    if weights is None or weights.dtype != np.int8 or weights.size == 0 or m < _ROWS:
        return None
    if machine.dot_group == 4 or machine.dot_bytes < 32 or _pairs_fit(weights):
        return None
    batch, k, n = weights.shape
    lanes, units = machine.lanes("int32"), ceil(k / 4)
    vectors = ceil(n / lanes)
    rows, together = paired_tile(vectors, m, machine.vector_registers)
    # Two register columns a panel, so that narrow results are stored in longer pieces.
    wide = together * min(2, ceil(vectors / together))
    whole = np.zeros((batch, k, ceil(n / (wide * lanes)) * wide * lanes), np.int8)
    whole[..., :n] = weights
    pairing = Pairing(to_panels(whole, together * lanes, 4, units * 4))
    if float((pairing.counts @ PAIRED + PAIRED_TILE).sum()) * together >= WAYS[0, 0] * units * batch * vectors:
        return None
    return pairing.pack(machine.l1_bytes * 3 // 4), Tile(rows, wide)


class _IntegerPanels(Panels):
    """The kernel. ``quads``: 8-bit factors in fours, else pairs of int16. Where there is no instruction for fours,
    pmaddubsw makes sums of two (``halves``), if none of them can saturate: then all weights have 7 bits, or nearly."""

    def __init__(
        self,
        region: Region,
        integers: Integers,
        machine: CpuMachine,
        weights: np.ndarray | None,
        tile: Tile | None = None,
    ) -> None:
        self.integers, self.weights = integers, weights
        self.zero = integers.a_zero if isinstance(integers.a_zero, str) else f"{integers.product.a}.zero"
        narrow = weights is not None and weights.dtype == np.int8
        fit = tile is not None or (machine.dot_bytes >= 32 and _pairs_fit(weights))
        self.halves = narrow and machine.dot_group != 4 and fit
        self.quads = self.halves or (narrow and machine.dot_group == 4)
        fours = HALVES if self.halves else Numbers(*machine.dot_dtypes, 4, "int32", 1, 5)
        numbers = fours if self.quads else PAIRS
        super().__init__("gemm_int8", region, integers.op, integers.product, machine, numbers, tile)
        self.staged = self.staged and self.weights is not None and not self.quads

    def declare(self) -> tuple[tuple[Launch, ...], Mapping[str, TensorType]]:
        """Panels are of int8 (int16 where zero points make weights too large), those packed while running of int16."""
        integers, p, operands = self.integers, self.product, self.operands
        launches: tuple[Launch, ...] = ()
        temporaries: dict[str, TensorType] = {}
        if self.quads and self.apart:  # where sums start
            named_zero(operands, self.zero, integers.a_zero)
        if self.weights is None:
            name = f"{p.b}.panels"
            shape = (self.width, self.depth, self.lanes * (2 if self.tile.vectors % 2 == 0 else 1))
            launch, constants, type_ = pack_launch(p, self.region, integers.b_zero, name, shape)
            launches, temporaries = (launch,), {name: type_}
            operands.constants.update(constants)
            operands.define(name, type_)
            self.b = operands.buffer(name)
        else:
            self.pack_weights(self.weights)
        if self.quads:
            assert self.weights is not None
            sums = self.weights.sum(axis=1, dtype=np.int32)[:, None, :]
            self.sums = self.define("sums", to_panels(sums, self.width, 1, 1).reshape(-1, self.width))
        self.tail: Tail | Requantize
        if integers.scale is None:
            self.tail = Tail(operands, self.op)
        else:
            many = max(integers.scale.size, 1 if integers.bias is None else integers.bias.size) > 1
            axis = len(self.region.types[self.op.outputs[0]].shape) - 1 if many else None
            self.tail = Requantize(operands, self.region, self.op, integers.scale, axis, integers.bias)
        self.tail.declare()
        return launches, temporaries

    def pack_weights(self, weights: np.ndarray) -> None:
        """Declare constant weights."""
        self.b = self.define("panels", to_panels(weights, self.width, self.numbers.group, self.depth))

    def declare_a(self, operands: Operands) -> None:
        operands.buffer(self.product.a)
        named_zero(operands, self.zero, self.integers.a_zero)

    def define(self, label: str, array: np.ndarray) -> Buffer:
        """A constant of this kernel as its parameter."""
        name = f"{self.product.b}.{label}"
        self.operands.constants[name] = array
        self.operands.define(name, TensorType(str(array.dtype), array.shape))
        return self.operands.buffer(name)

    def a_value(self, operands: Operands, batch: tuple[Expr, ...], row: Expr, k: Expr) -> Expr:
        value = operands.load(self.product.a, self.product.a_index(batch, row, k))
        if not self.quads:
            return Binary("sub", Cast(value, "int16"), Cast(zero_at(operands, self.zero), "int16"))
        if value.dtype == self.numbers.a:
            return value
        # The other kind of byte: 128 more or less has the same bits but the highest.
        bits = Bitcast(value, self.numbers.a)
        return Binary("xor", bits, constant(-128 if self.numbers.a == "int8" else 128, self.numbers.a))

    def b_vector(self, batch: tuple[Expr, ...], panel: Expr, step: Expr, c: int) -> Expr:
        wide = self.lanes * self.numbers.group
        value = load(self.b, self.matrix_panel(batch, panel), step, c * wide, lanes=wide)
        return cast(value, "int8" if self.quads else "int16")

    def added(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        if not self.halves:
            return super().added(acc, a, b)
        sums = PairSum(a, b)
        return Dot(acc, sums, constant(1, "int16", sums.lanes))

    def start(self, batch: tuple[Expr, ...], row: Expr, panel: Expr, c: int) -> Expr:
        if not self.quads:
            return super().start(batch, row, panel, c)
        return self.start_at(self.matrix_panel(batch, panel), ix.const(c * self.lanes))

    def start_at(self, which: Expr, column: Expr) -> Expr:
        """What the sums of the columns of a panel from `column` on start from: the zero point of the rows taken off."""
        zero: Expr = zero_at(self.operands, self.zero)
        if self.region.types[self.product.a].dtype != self.numbers.a:
            zero = Binary("add", zero, constant(-128 if self.numbers.a == "int8" else 128, "int32"))
        negative = splat(Binary("sub", constant(0, "int32"), zero), self.lanes)
        return Binary("mul", negative, load(self.sums, which, column, lanes=self.lanes))

    def stores(self, batch: tuple[Expr, ...], row: Expr, column: Expr, value: Expr) -> tuple[Stmt, ...]:
        return self.tail.stores(self.product.out_index(batch, row, column), value)


class _PairedPanels(_IntegerPanels):
    """The kernel on steps of `byte_pairs`: a panel's register columns one after another, so that a tile has many
    rows."""

    def __init__(
        self,
        region: Region,
        integers: Integers,
        machine: CpuMachine,
        weights: np.ndarray | None,
        paired: PairedUnits,
        tile: Tile,
    ) -> None:
        super().__init__(region, integers, machine, weights, tile)
        units = ceil(integers.product.k / 4)
        self.paired, self.together = paired, paired.vectors.shape[-1] // (4 * self.lanes)
        self.cut(paired.chunks, ceil(units / paired.chunks))
        self.stream = PairedSteps(self.k, paired, self.together, paired.numbers * 4, units * 4 - 4, self.define)
        self.stride = max(self.stride, self.stream.reach + 64)

    def pack_weights(self, weights: np.ndarray) -> None:
        self.stream.declare()
        offset = self.paired.offset.astype(np.int32)
        self.offset = self.define("offset", offset.reshape(-1, self.width))

    def row_tile(self, batch: tuple[Expr, ...], panel: Expr, part: Expr, row: Expr, slot: Expr, rows: int) -> None:
        k, lanes = self.k, self.lanes
        places = [(r, c) for r in range(rows) for c in range(self.together)]
        apart = self.tile.vectors // self.together
        which = self.matrix_panel(batch, panel)
        base = ix.add(ix.mul(self.a_matrix(batch), self.product.m), row) if self.apart else ix.const(0)
        with k.loop("apart", apart) as h:
            column, first = ix.add(ix.mul(which, apart), h), ix.mul(h, self.together * lanes)
            for c in range(self.together):
                at = ix.add(first, c * lanes)
                start = Binary("add", self.start_at(which, at), load(self.offset, which, at, lanes=lanes))
                for r in range(rows):
                    k.store(self.acc, (r, c, 0), start)
            if self.parts > 1:
                with k.when(less(0, part)):
                    for r, c in places:
                        value = load(self.partial, slot, r, ix.add(first, c * lanes), lanes=lanes)
                        k.store(self.acc, (r, c, 0), value)
            self.stream.prefetch(column, part, slot, self.down + 1)
            self.stream.add(
                column, part, rows, self.acc, lambda r, place: load(self.a, ix.add(base, r), place, lanes=4)
            )
            if self.parts > 1:
                with k.when(less(part, self.parts - 1)):
                    for r, c in places:
                        value = load(self.acc, r, c, 0, lanes=lanes)
                        k.store(self.partial, (slot, r, ix.add(first, c * lanes)), value)
            with k.when(less(self.parts - 2, part)):
                for r, c in places:
                    k.store(self.done, (r, ix.add(first, c * lanes)), load(self.acc, r, c, 0, lanes=lanes))
        with k.when(less(self.parts - 2, part)):
            self.finish(batch, panel, row, rows)


GEMM_INT8 = GemmInt8Family()
