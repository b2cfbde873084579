"""Panels of the right operand of a product: packed while compiling if it is constant, else by a kernel of its own."""

from __future__ import annotations

from math import ceil, prod

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import PLAIN, Launch
from nestc.kernels.gemm_shape import Product
from nestc.kernels.operands import Operands
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, less
from nestc.tensor.interp import numpy_dtype
from nestc.tensor.ir import Expr, Store, Var
from nestc.tensor.rewrite import cast
from nestc.tensor.vectorize import vectorize


def panel_shape(product: Product, width: int) -> tuple[int, int, int, int]:
    """Shape of packed panels: (batch of `b`, panels, k, width); the last panel is padded with zeros."""
    return prod(product.b_batch), ceil(product.n / width), product.k, width


def constant_matrices(product: Product, region: Region) -> np.ndarray:
    """The constant `b` as (batch, k, n), a view."""
    b = region.constant(product.b)
    assert b is not None
    batch = prod(product.b_batch)
    b = b.reshape(batch, product.k, 1) if product.vector_b else b.reshape(batch, *b.shape[-2:])
    return b.transpose(0, 2, 1) if product.transposed_b else b


def pack_constant(product: Product, region: Region, width: int, dtype: str) -> np.ndarray:
    """The constant `b` times `alpha` as panels of `dtype`."""
    b = constant_matrices(product, region)
    shape = panel_shape(product, width)
    packed = np.zeros(shape, numpy_dtype(dtype))
    whole, rest = divmod(product.n, width)
    if whole:
        split = b[:, :, : whole * width].reshape(shape[0], product.k, whole, width)
        packed[:, :whole] = split.transpose(0, 2, 1, 3)
    if rest:
        packed[:, whole, :, :rest] = b[:, :, whole * width :]
    return _scaled(packed, product.alpha)


def pack_columns(product: Product, region: Region, dtype: str) -> np.ndarray:
    """The constant `b` times `alpha` transposed: (batch, n, k), so that columns lie in one piece."""
    b = constant_matrices(product, region).transpose(0, 2, 1)
    return _scaled(np.ascontiguousarray(b, numpy_dtype(dtype)), product.alpha)


def _scaled(packed: np.ndarray, alpha: float) -> np.ndarray:
    return packed if alpha == 1 else (packed * alpha).astype(packed.dtype)


def pack_launch(
    product: Product, region: Region, width: int, lanes: int, dtype: str, name: str
) -> tuple[Launch, TensorType]:
    """A kernel that writes `b` as panels of `dtype` to the temporary `name`, one parallel item a panel."""
    shape = panel_shape(product, width)
    batch, panels, depth, _ = shape
    type_ = TensorType(dtype, shape)
    k = Builder("pack_b")
    operands = Operands(k, region, {product.b: PLAIN})
    operands.define(name, type_)
    operands.buffer(product.b)
    out = operands.buffer(name)

    def copy(n: Expr, panel: Expr, row: Expr, place: Expr) -> Store:
        column = ix.add(ix.mul(panel, width), place)
        inside = None if product.n % width == 0 else less(column, product.n)
        index = product.b_index(ix.unflatten(n, product.b_batch), row, column)
        return Store(out, (n, panel, row, place), cast(operands.load(product.b, index, inside), dtype))

    with k.parallel("item", batch, panels) as (n, panel), k.loop("row", depth) as row:
        if product.transposed_b:  # reading down columns, one element at a time is as fast as a gather
            with k.unroll("j", width) as j:
                k.emit((copy(n, panel, row, j),))
        else:
            for start in range(0, width, lanes):
                lane = Var(f"lane{start}", lanes)
                k.emit(vectorize((copy(n, panel, row, ix.add(lane, start)),), lane, ix.const(0), lanes))
    return operands.launch(), type_
