"""MatMul and Gemm of float32 activations and constant weights of 8 or 4 bits or bfloat16, which stay narrow in memory.

A few rows of activations are bound by memory: weights are widened in registers, and what scales and zero points
contribute is added once a block of k. With more rows, a piece of a panel is widened into scratch for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Launch, Layout, Lowered
from nestc.kernels.gemm_int8_pack import matrices
from nestc.kernels.gemm_shape import Product, product_of, scaled_stores
from nestc.kernels.operands import Operands
from nestc.kernels.panels import SINGLES, UNROLL, Numbers, Panels, to_panels
from nestc.kernels.quantized import Quantized, float_region, prologue, quantized_anchor
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import constant, load, splat
from nestc.tensor.ir import Binary, Buffer, Cast, Expr, Fma, Reduce, Stmt
from nestc.tensor.rewrite import cast

_FEW = 4  # rows for which widening in registers is no more work than by way of scratch
_WEIGHTS = frozenset({"int8", "uint8", "int4", "uint4"})


@dataclass(frozen=True)
class Narrow:
    """A product with narrow constant weights.

    ``codes`` (batch, k, n) are int8, uint8 below 16 (to be packed two a byte) or bfloat16. Weights are
    ``(codes + shift) * scale + offset`` with tables (batch, blocks, n) for `block` rows each; ``scale`` is None where
    it is 1, ``offset`` where one `shift` does. ``addend`` is what a Gemm adds if it came through the prologue.
    """

    op: Op
    product: Product
    codes: np.ndarray
    block: int
    scale: np.ndarray | None = None
    shift: int = 0
    offset: np.ndarray | None = None
    addend: np.ndarray | None = None

    @property
    def nibbles(self) -> bool:
        """Whether codes are of 4 bits."""
        return self.codes.dtype == np.uint8


class WeightOnlyFamily:
    """MatMul and Gemm with float activations and constant weights of 8 bits, 4 bits or bfloat16."""

    name = "weight_only"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        found = _form(region)
        return found if isinstance(found, str) else tail_refusal(region, found.op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Everything row-major."""
        return dict.fromkeys((*region.inputs, *region.outputs), PLAIN)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One launch, after one that widens the rows if there are many."""
        form = _form(region)
        assert not isinstance(form, str)
        narrow = _read(region, form)
        both = form.weights is None and region.types[narrow.product.a].dtype == "bfloat16"
        if both and machine.bf16 and machine.dot_bytes:
            return _Bfloat16Panels(region, narrow, machine).lower()
        return _NarrowPanels(region, narrow, machine).lower()


@dataclass(frozen=True)
class _Form:
    """What was recognised; ``weights`` is None for bfloat16."""

    op: Op
    product: Product
    weights: Quantized | None


def _form(region: Region) -> _Form | str:
    """The product of a region with narrow weights, or why it is none; looks at no weights."""
    if region.anchor not in ("MatMul", "Gemm"):
        return "its anchor is neither MatMul nor Gemm"
    before = prologue(region)
    if not before:
        return "its operands are not narrow"
    op = region.ops[len(before)]
    where = f"{op.op_type} (node {op.name!r})"
    narrow = {each.outputs[0]: each.inputs[0] for each in before}
    a, b = op.inputs[0], op.inputs[1]
    if narrow.get(b, "") not in region.constants:
        return f"the weights of {where} are not narrow constants"
    product = replace(product_of(op, region), a=narrow.get(a, a), b=narrow[b])
    if any(0 in region.types[name].shape for name in (a, b)):
        return f"{where} has an axis of size 0"
    if product.c in narrow and narrow[product.c] not in region.constants:
        return f"what {where} adds is narrow and not constant"
    if region.types[op.outputs[0]].dtype != "float32":
        return f"{where} is not on float32"
    if all(each.op_type == "Cast" and region.types[each.inputs[0]].dtype == "bfloat16" for each in before):
        return _Form(op, product, None)
    anchor = quantized_anchor(region)
    weights = None if anchor is None else anchor.operand(1)
    if anchor is None or weights is None or a in narrow:
        return f"the operands of {where} are not float32 activations and weights with constant parameters"
    if weights.dtype not in _WEIGHTS:
        return f"the weights of {where} are {weights.dtype}"
    if weights.block % 2:
        return f"the weights of {where} are in blocks of an odd size"
    if _table(weights, weights.scale, product, region) is None:
        return f"the scales of the weights of {where} are neither one a column nor blocks along k"
    return _Form(op, product, weights)


def _table(weights: Quantized, values: np.ndarray, product: Product, region: Region) -> np.ndarray | None:
    """Scales or zero points as (batch, blocks of k, n), with 1 where they are the same along an axis; None where they
    differ from row to row or in blocks along another axis."""
    shape = region.types[weights.name].shape
    along = len(shape) - (1 if product.transposed_b or product.vector_b else 2)
    if (weights.block or values.ndim) and (weights.axis == along) != bool(weights.block):
        return None
    if not weights.block:
        values = values.reshape([-1 if values.ndim and d == weights.axis else 1 for d in range(len(shape))])
    if product.vector_b:
        return values.reshape(1, -1, 1)
    values = values.reshape(-1, *values.shape[-2:])
    return values.transpose(0, 2, 1) if product.transposed_b else values


def _read(region: Region, form: _Form) -> Narrow:
    """The weights as the kernel wants them."""
    product, weights = form.product, form.weights
    addend = None
    if product.c and product.c not in region.inputs and product.c not in region.constants:
        addend = float_region(region).constant(product.c)
        assert addend is not None
        product = replace(product, c=f"{product.c}.wide")
    array = region.constant(product.b)
    assert array is not None
    if weights is None:
        return Narrow(form.op, product, matrices(product, array), product.k, addend=addend)
    # Codes of 8 bits are kept with a sign, those of 4 bits without.
    shift = {"int8": 0, "uint8": -128, "int4": 8, "uint4": 0}[weights.dtype]
    codes = matrices(product, array.astype(np.int16) + np.int16(shift))
    codes = codes.astype(np.int8 if weights.dtype.endswith("8") else np.uint8)
    scale = _table(weights, weights.scale, product, region)
    zero = _table(weights, weights.zero_point, product, region)
    assert scale is not None and zero is not None
    zero = zero + shift
    shape = (codes.shape[0], scale.shape[1], product.n)
    table = np.broadcast_to(scale, shape).astype(np.float32)
    one = int(zero.flat[0])
    known = Narrow(form.op, product, codes, weights.block or product.k, table, shift=-one, addend=addend)
    if (zero == one).all():
        return known
    return replace(known, shift=0, offset=np.broadcast_to(-zero * scale.astype(np.float64), shape).astype(np.float32))


class _Product(Panels):
    """What kernels on narrow weights have in common: float activations, and a float tail."""

    def __init__(self, name: str, region: Region, narrow: Narrow, machine: CpuMachine, numbers: Numbers) -> None:
        self.narrow = narrow
        super().__init__(name, region, narrow.op, narrow.product, machine, numbers)

    def declare_a(self, operands: Operands) -> None:
        operands.buffer(self.product.a)

    def a_value(self, operands: Operands, batch: tuple[Expr, ...], row: Expr, k: Expr) -> Expr:
        return cast(operands.load(self.product.a, self.product.a_index(batch, row, k)), self.numbers.a)

    def declare_tail(self) -> None:
        """The tail, and what a Gemm adds."""
        if self.narrow.addend is not None:
            self.define(self.product.c, self.narrow.addend)
        self.tail = Tail(self.operands, self.op)
        self.tail.declare()

    def define(self, name: str, array: np.ndarray) -> Buffer:
        """A constant of this kernel as its parameter."""
        self.operands.constants[name] = array
        self.operands.define(name, TensorType(str(array.dtype), array.shape))
        return self.operands.buffer(name)

    def stores(self, batch: tuple[Expr, ...], row: Expr, column: Expr, value: Expr) -> tuple[Stmt, ...]:
        return scaled_stores(self.product, self.operands, self.tail, (batch, row, column), value, self.product.alpha)


class _Bfloat16Panels(_Product):
    """bfloat16 on both sides, on a machine that multiplies them in pairs."""

    def __init__(self, region: Region, narrow: Narrow, machine: CpuMachine) -> None:
        super().__init__("gemm_bf16", region, narrow, machine, Numbers("bfloat16", "bfloat16", 2, "float32", 1, 5))
        self.staged = False

    def declare(self) -> tuple[tuple[Launch, ...], Mapping[str, TensorType]]:
        self.b = self.define(f"{self.product.b}.panels", to_panels(self.narrow.codes, self.width, 2, self.depth))
        self.declare_tail()
        return (), {}

    def b_vector(self, batch: tuple[Expr, ...], panel: Expr, step: Expr, c: int) -> Expr:
        wide = 2 * self.lanes
        return load(self.b, self.matrix_panel(batch, panel), step, c * wide, lanes=wide)


class _NarrowPanels(_Product):
    """Weights that are widened to float32: into scratch, or in registers if there are a `few` rows."""

    def __init__(self, region: Region, narrow: Narrow, machine: CpuMachine) -> None:
        super().__init__("weight_only", region, narrow, machine, SINGLES)
        self.few = self.product.m <= min(_FEW, self.tile.rows)
        self.staged = self.apart = not self.few
        self.shifted = narrow.shift != 0 or narrow.offset is not None
        self.blocks = 1 if narrow.scale is None else narrow.scale.shape[1]
        # One block of all k is made of whole steps.
        self.block = ceil(narrow.block / UNROLL) * UNROLL if self.blocks == 1 else narrow.block
        if self.few:
            self.cut(1, self.blocks * self.block)

    def declare(self) -> tuple[tuple[Launch, ...], Mapping[str, TensorType]]:
        """Panels (batch * panels, k, width), two rows a byte for 4 bits; tables (batch * panels, blocks, width)."""
        narrow, b = self.narrow, self.product.b
        depth = self.depth
        if narrow.nibbles:
            depth += depth % 2
            panels = to_panels(narrow.codes, self.width, 1, depth)
            panels = panels[:, 0::2] | (panels[:, 1::2] << 4)
        else:
            panels = to_panels(narrow.codes, self.width, 1, depth)
        self.b = self.define(f"{b}.panels", panels)
        self.tables: list[Buffer] = []
        for label, table in (("scale", narrow.scale), ("offset", narrow.offset)):
            if table is not None:
                rows = max(self.blocks, ceil(self.depth / self.block))
                self.tables.append(self.define(f"{b}.{label}", to_panels(table, self.width, 1, rows)))
        self.declare_tail()
        if self.few and self.shifted:
            self.sums = self.k.scratch("sums", (self.product.m, self.blocks), "float32")
        return (), {}

    # -- many rows

    def b_vector(self, batch: tuple[Expr, ...], panel: Expr, step: Expr, c: int) -> Expr:
        raise NotImplementedError("panels are widened by `stage` and `block_sums`")

    def stage(self, batch: tuple[Expr, ...], panel: Expr, part: Expr) -> None:
        k, lanes, which = self.k, self.lanes, self.matrix_panel(batch, panel)
        with k.loop("staged", self.steps // 2) as pair:
            for c in range(self.tile.vectors):
                for u, value in enumerate(self.pair(which, ix.add(ix.mul(part, self.steps // 2), pair), c)):
                    step = ix.add(ix.mul(pair, 2), u)
                    block = ix.floordiv(ix.add(ix.mul(part, self.steps), step), self.block)
                    if self.narrow.shift:
                        value = Binary("add", value, constant(self.narrow.shift, "float32", lanes))
                    if self.tables:
                        scale, *offset = (load(t, which, block, c * lanes, lanes=lanes) for t in self.tables)
                        value = Fma(value, scale, offset[0]) if offset else Binary("mul", value, scale)
                    k.store(self.piece, (step, c * lanes), value)

    def pair(self, which: Expr, pair: Expr, c: int) -> tuple[Expr, Expr]:
        """Vector `c` of two rows of a panel as float32, before scale and offset."""
        lanes = self.lanes
        if not self.narrow.nibbles:
            rows = (ix.add(ix.mul(pair, 2), u) for u in range(2))
            low, high = (Cast(load(self.b, which, row, c * lanes, lanes=lanes), "float32") for row in rows)
            return low, high
        self.k.store(self.code, (0,), Cast(load(self.b, which, pair, c * lanes, lanes=lanes), "int32"))
        code = load(self.code, 0, lanes=lanes)
        low = Binary("and", code, constant(15, "int32", lanes))
        high = Binary("shr", code, constant(4, "int32", lanes))
        return Cast(low, "float32"), Cast(high, "float32")

    def build(self) -> None:
        if self.narrow.nibbles:
            self.code = self.k.regs("code", (), self.lanes, "int32")
        if self.few:
            self.pairs = self.k.regs("pair", (self.product.m, 2), self.lanes, "float32")
            self.weight = self.k.regs("weight", (), self.lanes, "float32")
        super().build()

    # -- a few rows

    def prepare(self, operands: Operands, out: Buffer, batch: tuple[Expr, ...], row: Expr, slot: Expr) -> None:
        """With the sums of the blocks of a row, which offsets are multiplied by."""
        super().prepare(operands, out, batch, row, slot)
        if not self.few or not self.shifted:
            return
        k, lanes = self.k, self.lanes
        sums = k.regs("summing", (), lanes, "float32")
        whole = self.block // lanes
        with k.loop("summed", self.blocks) as block:
            first = ix.mul(block, self.block)
            k.store(sums, (0,), constant(0, "float32", lanes))
            with k.loop("vector", whole) as i:
                value = load(out, slot, ix.add(first, ix.mul(i, lanes)), lanes=lanes)
                k.store(sums, (0,), Binary("add", load(sums, 0, lanes=lanes), value))
            total: Expr = Reduce("add", load(sums, 0, lanes=lanes))
            for i in range(whole * lanes, self.block):
                total = Binary("add", total, load(out, slot, ix.add(first, i)))
            k.store(self.sums, (slot, block), total)

    def row_tile(self, batch: tuple[Expr, ...], panel: Expr, part: Expr, row: Expr, slot: Expr, rows: int) -> None:
        """Sums of a block in registers, then scaled and added to those of the row."""
        if not self.few:
            super().row_tile(batch, panel, part, row, slot, rows)
            return
        k, lanes, which = self.k, self.lanes, self.matrix_panel(batch, panel)
        places = [(r, c) for r in range(rows) for c in range(self.tile.vectors)]
        zero = constant(0, "float32", lanes)
        for r, c in places:
            k.store(self.done, (r, c * lanes), zero)
        with k.loop("block", self.blocks) as block:
            for r, c in places:
                k.store(self.acc, (r, c, 0), zero)
            first = ix.mul(block, self.block)
            with k.loop("step", self.block // UNROLL) as s:
                for u in range(0, UNROLL, 2):
                    self.two(which, ix.add(first, ix.mul(s, UNROLL), u), rows)
            for u in range(self.block - self.block % UNROLL, self.block, 2):
                self.two(which, ix.add(first, u), rows)
            for r, c in places:
                total: Expr = load(self.done, r, c * lanes, lanes=lanes)
                sums: Expr = load(self.acc, r, c, 0, lanes=lanes)
                if self.narrow.shift:
                    amount = Binary("mul", load(self.sums, r, block), constant(self.narrow.shift, "float32"))
                    sums = Binary("add", sums, splat(amount, lanes))
                numbers = [load(table, which, block, c * lanes, lanes=lanes) for table in self.tables]
                value = Fma(sums, numbers[0], total) if numbers else Binary("add", total, sums)
                if len(numbers) > 1:
                    value = Fma(splat(load(self.sums, r, block), lanes), numbers[1], value)
                k.store(self.done, (r, c * lanes), value)
        self.finish(batch, panel, row, rows)

    def two(self, which: Expr, at: Expr, rows: int) -> None:
        """Two rows of the panel times two activations of every row."""
        k, lanes = self.k, self.lanes
        pair = ix.floordiv(at, 2)
        if self.narrow.nibbles:
            self.ask_ahead(which, pair)
        else:
            self.ask_ahead(which, at, 2)
        for r in range(rows):
            for u in range(2):
                k.store(self.pairs, (r, u, 0), splat(load(self.a, r, ix.add(at, u)), lanes))
        for c in range(self.tile.vectors):
            for u, value in enumerate(self.pair(which, pair, c)):
                k.store(self.weight, (0,), value)
                for r in range(rows):
                    a, acc = load(self.pairs, r, u, 0, lanes=lanes), load(self.acc, r, c, 0, lanes=lanes)
                    k.store(self.acc, (r, c, 0), Fma(load(self.weight, 0, lanes=lanes), a, acc))


WEIGHT_ONLY = WeightOnlyFamily()
