"""How an integer Winograd convolution is cut, and what it and the direct kernel cost by the model."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, prod

from nestc.kernels.choices import below
from nestc.kernels.position_products import Plan
from nestc.kernels.winograd_int8_transform import IntegerTransform
from nestc.kernels.winograd_tiles import Tiles

_FUSED_TILES = 40  # tiles from which on there are enough items for each to transform its inputs itself
_LEAST_TILES, _MOST_TILES = 10, 42  # of an item: so often is a weight used that was read from L3 or memory
_PRODUCTS = 8  # share of L2 that the products may take, which are read soon after: one part in so many

# Of the cycles that the model counts (measured on a Zen 3 with layers of ResNet-50, one core).
_OPERATIONS = 4.2  # a cycle, of all that a register tile does
_TRANSFORM = 0.5  # cycles of an instruction of the transforms
_TILE = 12.0  # cycles that a register tile takes beside its products
_MEMORY = 4.5  # bytes a cycle that weights come from memory with
_EXPOSED = 0.25  # part of the shorter of two things that are done at once, and which is not hidden by the longer one
_DIRECT = {True: 0.55, False: 1.45}  # cycles of four channels and one accumulator of the direct kernel, by `vnni`
_SEVEN_BITS = 0.85  # the same where weights have 7 bits and there is no such instruction


class IntegerTiling(Tiles[IntegerTransform]):
    """The tiles of a convolution of integers; two blocks of channels are a *pair*, which fills an int16 vector."""

    @property
    def pairs(self) -> int:
        """Pairs of blocks of input channels, of which the last one may be half for nothing."""
        return ceil(self.blocks / 2)


@lru_cache(maxsize=1024)
def plan(t: IntegerTiling, fused: bool | None = None) -> Plan:
    """A cut for `t` by sizes alone; `fused` may be given."""
    mr, nr = tile(t)
    fused = t.count >= _FUSED_TILES if fused is None else fused
    count = ceil(t.count / mr)
    columns = ceil(t.vectors / nr)
    least, most = ceil(_LEAST_TILES / mr), max(1, _MOST_TILES // mr)
    if fused:
        groups = min(range(min(count, least), min(count, most) + 1), key=lambda groups: _waiting(count, groups))
    else:
        groups = ceil(count / ceil(count / most))
    chunk = max(1, t.machine.l2_bytes // _PRODUCTS // (4 * t.positions * groups * mr * nr * t.lanes))
    return Plan(mr, nr, groups, below(columns, chunk), fused)


def _waiting(count: int, groups: int) -> float:
    """Relative time of `count` groups of tiles in items of `groups`: two or four workers wait for the last item; a
    weight is read once an item, and used `groups` times."""
    items = ceil(count / groups)
    waiting = sum(share * ceil(items / n) * n * groups / count for n, share in ((1, 0.5), (2, 0.35), (4, 0.15)))
    return waiting + 0.5 / groups


def tile(t: IntegerTiling) -> tuple[int, int]:
    """Tiles and vectors of outputs of a register tile: beside accumulators there are one input, one product and the
    weights of two steps in registers. All are as wide, so that the last one may be in part for nothing."""
    registers = t.machine.vector_registers
    best, best_cost = (1, 1), float("inf")
    for nr in range(1, min(4, t.vectors) + 1):
        for mr in range(1, min(t.count, registers) + 1):
            if mr * nr + 2 * nr + registers // 8 > registers:
                break
            cost = ceil(t.count / mr) * ceil(t.vectors / nr) * (t.pairs * t.lanes * step_cycles(t, mr, nr) + _TILE)
            if cost < best_cost - 1e-9:
                best, best_cost = (mr, nr), cost
    return best


def step_cycles(t: IntegerTiling, mr: int, nr: int) -> float:
    """Cycles of two input channels of a register tile: multiplications, all operations, or latency."""
    operations = 1 if t.machine.vnni else 2
    return max(mr * nr / 2, (operations * mr * nr + mr + nr) / _OPERATIONS, 4.0 if t.machine.vnni else 2.0)


@lru_cache(maxsize=1024)
def cycles(t: IntegerTiling, cut: Plan) -> float:
    """Modelled cycles on one core, its weights in memory; only comparisons with `direct_cycles` mean something."""
    rows, columns = t.axes
    tiles = t.groups(cut) * ceil(t.vectors / cut.nr)
    products = t.positions * tiles * (t.pairs * t.lanes * step_cycles(t, cut.mr, cut.nr) + _TILE)
    into = columns.n * (5 * rows.n + _input_steps(rows)) + rows.n * (2 * columns.n + _input_steps(columns))
    back = columns.n * (rows.n + rows.m + _output_steps(rows))
    back += rows.m * (columns.n + 10 * columns.m + _output_steps(columns))
    transforms = _TRANSFORM * t.count * (t.pairs * into + t.vectors * back)
    weights = 2.0 * t.positions * 2 * t.pairs * t.lanes * t.vectors * t.lanes / _MEMORY
    return transforms + _together(products, weights)


def direct_cycles(t: IntegerTiling, seven_bits: bool) -> float:
    """Modelled cycles of the direct kernel on the same terms; `seven_bits`: of the weights, at most."""
    s, machine = t.shape, t.machine
    fast = machine.vnni or machine.dotprod
    rate = _SEVEN_BITS if seven_bits and not fast else _DIRECT[fast]
    products = s.flops / 2 / (4 * t.lanes) * rate
    weights = prod(s.kernel) * s.in_channels * s.out_channels / _MEMORY
    return _together(products, weights)


def _together(a: float, b: float) -> float:
    """Cycles of two things that are done at once."""
    return max(a, b) + _EXPOSED * min(a, b)


def _input_steps(t: IntegerTransform) -> int:
    """Arithmetic instructions of an input transform along one axis."""
    return {1: 0, 4: 4}.get(t.n, 19)


def _output_steps(t: IntegerTransform) -> int:
    """Arithmetic instructions of an output transform along one axis."""
    pairs = len(t.points)
    return 2 * pairs + 2 * t.m * (pairs - 1) + 2 if pairs else 0
