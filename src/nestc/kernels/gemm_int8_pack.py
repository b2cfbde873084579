"""The right operand of an integer product without its zero point: widened when compiling, or by a kernel of its own."""

from __future__ import annotations

from math import ceil, prod

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import Launch
from nestc.kernels.gemm_shape import Product
from nestc.kernels.operands import Operands
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, less, load
from nestc.tensor.ir import Binary, Cast, Expr, Shuffle, Store, Var
from nestc.tensor.rewrite import select
from nestc.tensor.vectorize import vectorize

_GROUP = 2


def matrices(product: Product, array: np.ndarray) -> np.ndarray:
    """The right operand as (batch, k, n), a view."""
    batch = prod(product.b_batch)
    array = array.reshape(batch, product.k, 1) if product.vector_b else array.reshape(batch, *array.shape[-2:])
    return array.transpose(0, 2, 1) if product.transposed_b else array


def constant_weights(product: Product, region: Region, zero: np.ndarray | str) -> np.ndarray | None:
    """A constant right operand as (batch, k, n) less its zero point (a number, or one a column): int8 if that fits,
    else int16. None if anything about it is known only while running."""
    array = region.constant(product.b)
    if array is None or isinstance(zero, str):
        return None
    wide = matrices(product, array.astype(np.int16)) - zero.astype(np.int16)
    fits = wide.size == 0 or (wide.min() >= -128 and wide.max() <= 127)
    return wide.astype(np.int8) if fits else wide


def named_zero(operands: Operands, name: str, zero: np.ndarray | str) -> str:
    """The value that holds a zero point: its own if it is one, else a constant of this name; declared as parameter."""
    if isinstance(zero, str):
        name = zero
    else:
        array = zero.astype(np.int32).reshape(-1)
        operands.constants[name] = array
        operands.define(name, TensorType("int32", array.shape))
    operands.buffer(name)
    return name


def zero_at(operands: Operands, name: str, column: Expr | None = None, mask: Expr | None = None) -> Expr:
    """The zero point as int32, of a column if there is one for each."""
    shape = operands.type(name).shape
    own = (column,) if prod(shape) > 1 and column is not None else (ix.const(0),) * len(shape)
    return Cast(operands.load(name, own, mask), "int32")


def pack_launch(
    product: Product, region: Region, zero: np.ndarray | str, name: str, shape: tuple[int, int, int]
) -> tuple[Launch, dict[str, np.ndarray], TensorType]:
    """A kernel that writes the right operand less its zero point to the temporary `name`, its constants, and the type:
    int16, ordered as `panels.to_panels` does, one parallel item a panel.

    `shape` is (columns of a panel, depth along k with its padding, columns to work on at a time).
    """
    width, depth, lanes = shape
    batch, panels = prod(product.b_batch), ceil(product.n / width)
    type_ = TensorType("int16", (batch * panels, depth // _GROUP, width * _GROUP))
    k = Builder("pack_b_int16")
    operands = Operands(k, region, {})
    operands.define(name, type_)
    operands.buffer(product.b)
    zero_name = named_zero(operands, f"{product.b}.zero", zero)
    out = operands.buffer(name)

    def element(n: Expr, row: Expr, column: Expr) -> Expr:
        """An element as int16, 0 beside the matrix."""
        inside = None if product.n % width == 0 else less(column, product.n)
        index = product.b_index(ix.unflatten(n, product.b_batch), row, column)
        zero_point = Cast(zero_at(operands, zero_name, column, inside), "int16")
        value = Binary("sub", Cast(operands.load(product.b, index, inside), "int16"), zero_point)
        return value if inside is None else select(inside, value, constant(0, "int16"))

    rows = k.regs("row", (_GROUP,), lanes, "int16")
    with k.parallel("item", batch, panels) as (n, panel):
        which = ix.add(ix.mul(n, panels), panel)
        first = ix.mul(panel, width)
        with k.loop("pair", product.k // _GROUP) as pair, k.loop("column", width // lanes) as v:
            start = ix.mul(v, lanes)
            for g in range(_GROUP):
                lane = Var(f"lane{g}", lanes)
                value = element(n, ix.add(ix.mul(pair, _GROUP), g), ix.add(first, start, lane))
                k.emit(vectorize((Store(rows, (ix.const(g), lane), value),), lane, ix.const(0), lanes))
            even, odd = (load(rows, g, 0, lanes=lanes) for g in range(_GROUP))
            picks = tuple(i + g * lanes for i in range(lanes) for g in range(_GROUP))
            k.store(out, (which, pair, ix.mul(start, _GROUP)), Shuffle(even, odd, picks))
        if product.k % _GROUP:
            with k.loop("last_column", width) as j:
                row = product.k - 1
                k.store(out, (which, row // 2, ix.mul(j, 2)), element(n, ix.const(row), ix.add(first, j)))
                k.store(out, (which, row // 2, ix.add(ix.mul(j, 2), 1)), constant(0, "int16"))
        used = ceil(product.k / _GROUP)
        with k.loop("padding", depth // _GROUP - used) as s, k.loop("padded", width * _GROUP) as j:
            k.store(out, (which, ix.add(s, used), j), constant(0, "int16"))
    return operands.launch(), operands.constants, type_
