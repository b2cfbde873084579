"""What a MatMul or Gemm computes, and how its product is cut in register tiles, panels and parallel items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from nestc.graph.region import Op, Region
from nestc.kernels.api import CpuMachine
from nestc.kernels.conv_shape import spilling
from nestc.kernels.operands import Operands
from nestc.kernels.tail import Tail
from nestc.tensor import index as ix
from nestc.tensor.build import constant, less, splat
from nestc.tensor.ir import Binary, Expr, Ramp, Stmt
from nestc.tensor.rewrite import cast

ITEM_PRODUCTS = 1 << 18  # multiply-adds of a parallel item that is worth a claim: some 5 us
_PART = 1024
ITEMS = 128  # no more items are needed for 64 workers


@dataclass(frozen=True)
class Product:
    """``out[batch, m, n] = alpha * sum_k a[batch, m, k] * b[batch, k, n] + beta * c``.

    ``a_batch`` and ``b_batch`` are aligned to ``batch``, 1 where broadcast. ``fold`` are the axes that were merged
    into the rows (`m` counts all of them): the output's batch and row axes when `b` is one matrix.
    """

    a: str
    b: str
    c: str
    alpha: float
    beta: float
    batch: tuple[int, ...]
    a_batch: tuple[int, ...]
    b_batch: tuple[int, ...]
    m: int
    n: int
    k: int
    transposed_a: bool = False
    transposed_b: bool = False
    vector_a: bool = False
    vector_b: bool = False
    fold: tuple[int, ...] = ()
    a_rank: int = 2
    b_rank: int = 2

    def a_index(self, batch: Sequence[Expr], row: Expr, k: Expr) -> tuple[Expr, ...]:
        """Index of an element of `a`."""
        if self.vector_a:
            return (k,)
        rows = ix.unflatten(row, self.fold) if self.fold else (row,)
        lead = () if self.fold else _own(batch, self.a_batch, self.a_rank - 2)
        return (*lead, k, row) if self.transposed_a else (*lead, *rows[-(self.a_rank - 1 - len(lead)) :], k)

    def b_index(self, batch: Sequence[Expr], k: Expr, column: Expr) -> tuple[Expr, ...]:
        """Index of an element of `b`."""
        if self.vector_b:
            return (k,)
        zeros = (ix.const(0),) * (self.b_rank - 2)
        lead = zeros if self.fold else _own(batch, self.b_batch, self.b_rank - 2)
        return (*lead, column, k) if self.transposed_b else (*lead, k, column)

    def b_matrix(self, batch: Sequence[Expr]) -> Expr:
        """Which of the matrices of `b` an index over `batch` means, counted over the batch axes of `b` alone."""
        own = tuple(ix.const(0) if n == 1 else i for n, i in zip(self.b_batch, batch))
        return ix.flatten(own, self.b_batch)

    def out_index(self, batch: Sequence[Expr], row: Expr, column: Expr) -> tuple[Expr, ...]:
        """Index of an element of the output."""
        lead = ix.unflatten(row, self.fold) if self.fold else (*batch, *(() if self.vector_a else (row,)))
        return lead if self.vector_b else (*lead, column)


def _own(batch: Sequence[Expr], shape: tuple[int, ...], rank: int) -> tuple[Expr, ...]:
    aligned = tuple(ix.const(0) if n == 1 else i for i, n in zip(batch, shape))
    return aligned[len(aligned) - rank :]


def product_of(op: Op, region: Region) -> Product:
    """The product that a MatMul or Gemm node stands for, with batch axes merged into rows where that is possible."""
    a, b = op.inputs[0], op.inputs[1]
    a_shape, b_shape = region.types[a].shape, region.types[b].shape
    if op.op_type == "Gemm":
        transposed_a, transposed_b = bool(op.attributes.get("transA", 0)), bool(op.attributes.get("transB", 0))
        m, k = a_shape[::-1] if transposed_a else a_shape
        n = b_shape[0] if transposed_b else b_shape[1]
        alpha, beta = (_number(op, name) for name in ("alpha", "beta"))
        c = op.input(2) if beta != 0 else ""
        return Product(a, b, c, alpha, beta, (), (), (), m, n, k, transposed_a, transposed_b)
    vector_a, vector_b = len(a_shape) == 1, len(b_shape) == 1
    a_lead, b_lead = a_shape[:-2], b_shape[:-2]
    rank = max(len(a_lead), len(b_lead))
    a_batch = (1,) * (rank - len(a_lead)) + a_lead
    b_batch = (1,) * (rank - len(b_lead)) + b_lead
    batch = tuple(max(x, y) for x, y in zip(a_batch, b_batch))
    m = 1 if vector_a else a_shape[-2]
    n = 1 if vector_b else b_shape[-1]
    result = Product(a, b, "", 1.0, 1.0, batch, a_batch, b_batch, m, n, a_shape[-1])
    result = replace(
        result, vector_a=vector_a, vector_b=vector_b, a_rank=max(2, len(a_shape)), b_rank=max(2, len(b_shape))
    )
    if prod(b_batch) == 1 and a_batch == batch and batch and not vector_a:
        return replace(result, batch=(), a_batch=(), b_batch=(), m=prod(batch) * m, fold=(*batch, m))
    return result


def _number(op: Op, name: str) -> float:
    value = op.attributes.get(name, 1.0)
    return float(value) if isinstance(value, (int, float)) else 1.0


@dataclass(frozen=True)
class Tile:
    """A register tile: ``rows`` x ``vectors`` accumulators, `split` times (for alternate k)."""

    rows: int
    vectors: int
    split: int = 1


def choose_tile(m: int, n: int, lanes: int, machine: CpuMachine) -> Tile:
    """The register tile with the least modelled cycles for an m x n product.

    For each k a tile of r x v accumulators issues r * v multiply-adds (two a cycle) and r + v loads (two a cycle), and
    it cannot be faster than the latency of one multiply-add (4 cycles). Vectors of `b` weigh more: they come from L2.
    """
    return choose_tiles(m, n, lanes, machine)[0]


def choose_tiles(m: int, n: int, lanes: int, machine: CpuMachine) -> list[Tile]:
    """For each number of vectors the tile with the least modelled cycles, the best of all first."""
    vectors = ceil(n / lanes)
    found: list[tuple[float, int, Tile]] = []
    registers = machine.tile_registers
    for rows in range(1, min(m, registers) + 1):
        for wide in range(1, min(vectors, 8) + 1):
            # The accumulators, the operand that is kept for a step, and what streams by.
            factor = spilling(max(rows, wide), min(rows, wide), registers)
            if factor is None:
                continue
            full, rest = divmod(m, rows)
            cycles = ceil(vectors / wide) * (
                full * _step_cycles(rows, wide) + (_step_cycles(rest, wide) if rest else 0)
            )
            found.append((factor * cycles, -rows * wide, Tile(rows, wide, split_of(rows, wide, machine))))
    ranked = [tile for _, _, tile in sorted(found, key=lambda each: each[:2])]
    return [tile for index, tile in enumerate(ranked) if all(tile.vectors != each.vectors for each in ranked[:index])]


def _step_cycles(rows: int, vectors: int) -> float:
    work = max(rows * vectors / 2, (rows + vectors) / 2)
    return max(work, 2.0 if rows == 1 else 4.0) + 0.07 * rows + 0.12 * vectors


def split_of(rows: int, vectors: int, machine: CpuMachine) -> int:
    """Sets of accumulators: enough chains to hide the latency when a tile is small."""
    split = 1
    while rows * vectors * split < 8 and (rows * vectors * 2 * split + 3) <= machine.vector_registers and split < 4:
        split *= 2
    return split


@dataclass(frozen=True)
class Blocks:
    """An item of the parallel loop has ``tiles`` register tiles of rows and ``panels`` panels of columns."""

    tiles: int
    panels: int


def choose_blocks(product: Product, tile: Tile, lanes: int, size: int, machine: CpuMachine) -> Blocks:
    """Cut tiles and panels in equal items: enough of them to balance, each with its part of `b` within half of L2."""
    tiles, panels = max(1, product.m // tile.rows), ceil(product.n / (tile.vectors * lanes))
    batch = prod(product.batch)
    wanted = max(1, min(ITEMS, batch * product.m * product.n * product.k // ITEM_PRODUCTS))
    room = max(1, machine.l2_bytes // 2 // (product.k * tile.vectors * lanes * size))
    best: tuple[tuple[bool, bool, float], Blocks] | None = None
    for down in divisors(tiles):
        for across in divisors(panels):
            items = batch * (tiles // down) * (panels // across)
            traffic = product.m * (panels // across) + product.n * (tiles // down)
            key = (items < wanted, across > room, float(traffic))
            if best is None or key < best[0]:
                best = (key, Blocks(down, across))
    assert best is not None
    return best[1]


def choose_parts(k: int, step: int) -> int:
    """How many equal parts, of whole steps, k is summed in: a tile's rows of a part stay in L1. 1 if none fit."""
    fitting = (d for d in divisors(k) if k // d <= _PART and (k // d) % step == 0 and k // d >= _PART // 3)
    return next(fitting, 1)


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def accumulation_dtype(dtype: str) -> str:
    """The type that products of `dtype` are summed in."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def lanes_below(start: Expr, limit: int, lanes: int) -> Expr:
    """Which of the lanes at start, start + 1, ... are below `limit`."""
    return Binary("lt", Ramp(start, 1, lanes), splat(ix.const(limit), lanes))


def scaled_stores(
    product: Product,
    operands: Operands,
    tail: Tail,
    place: tuple[tuple[Expr, ...], Expr, Expr],
    value: Expr,
    scale: float,
) -> tuple[Stmt, ...]:
    """The stores of ``scale * value + beta * c`` at (batch, row, column), through the tail."""
    batch, row, column = place
    index = product.out_index(batch, row, column)
    if scale != 1:
        value = Binary("mul", value, constant(scale, value.dtype))
    if product.c:
        addend = cast(operands.broadcast(product.c, index, less(column, product.n)), value.dtype)
        if product.beta != 1:
            addend = Binary("mul", addend, constant(product.beta, value.dtype))
        value = Binary("add", value, addend)
    return tail.stores(index, cast(value, operands.type(tail.anchor.outputs[0]).dtype))
