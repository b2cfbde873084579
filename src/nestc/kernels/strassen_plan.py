"""Strassen's sums, and how a product by them is cut in register tiles and items, and what it costs by the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from nestc.kernels.api import CpuMachine
from nestc.kernels.choices import below
from nestc.kernels.position_products import Plan
from nestc.kernels.winograd_plan import L3, MEMORY, TILE, step_cycles, tile, together

POSITIONS = 7

# S. Winograd's form of Strassen's algorithm: N. J. Higham, "Accuracy and Stability of Numerical Algorithms" (2nd ed.,
# 2002), section 23.1.1; its seven products in another order, so that the last three of the weights' sums can be made of
# the first four. Quarters are counted 11, 12, 21, 22.
INPUTS = ((1, 0, 0, 0), (0, 1, 0, 0), (1, 1, -1, -1), (0, 0, 1, 1), (-1, 0, 1, 1), (1, 0, -1, 0), (0, 0, 0, 1))
WEIGHTS = ((1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (-1, 1, 0, 0), (1, -1, 0, 1), (0, -1, 0, 1), (1, -1, -1, 1))
OUTPUTS = ((1, 1, 0, 0, 0, 0, 0), (1, 0, 1, 1, 1, 0, 0), (1, 0, 0, 0, 1, 1, -1), (1, 0, 0, 1, 1, 1, 0))

_QUARTERS = 4  # stored sums from which the others can be made
_MOST_BYTES = 2 << 20  # of weights of which all sums are stored; larger ones take no more memory so


@dataclass(frozen=True)
class Halves:
    """Products of `items` matrices (rows, inputs) by one of (inputs, outputs), all of them halved."""

    items: int
    rows: int
    inputs: int
    outputs: int
    machine: CpuMachine

    @property
    def lanes(self) -> int:
        """Elements of a vector."""
        return self.machine.lanes("float32")

    @property
    def whole(self) -> bool:
        """Whether halves of inputs and outputs are whole vectors, and there are two rows."""
        return self.rows > 1 and self.inputs % (2 * self.lanes) == 0 and self.outputs % (2 * self.lanes) == 0

    @property
    def pairs(self) -> int:
        """Pairs of rows of all items; the last one of each may lack its second row."""
        return self.items * ceil(self.rows / 2)

    @property
    def blocks(self) -> int:
        """Vectors of half of the inputs."""
        return self.inputs // (2 * self.lanes)

    @property
    def vectors(self) -> int:
        """Vectors of half of the outputs."""
        return self.outputs // (2 * self.lanes)

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return 4 * self.inputs * self.outputs

    @property
    def stored(self) -> int:
        """Sums of weights that are stored: all of them, or those from which the others are made while running, which
        costs some 4 % of the time and saves three quarters of the weights' memory."""
        return POSITIONS if self.bytes <= _MOST_BYTES else _QUARTERS

    def groups(self, cut: Plan) -> int:
        """Register tiles' pairs in all."""
        return ceil(self.pairs / cut.mr)

    def steps(self, cut: Plan) -> int:
        """Chunks of outputs."""
        return ceil(ceil(self.vectors / cut.nr) / cut.columns)


_ITEMS = 8  # so many or more balance between a few workers; then each may add up its inputs itself
_LEAST_GROUPS = 6  # of an item, for which its weights are read
_FUSED_PAIRS = 48  # pairs of rows of such an item: so often is a weight used that was read from L3
_SPLIT_PAIRS = 100  # of an item whose inputs were added up before, at most
_PRODUCTS = 4  # share of L2 that M may take, which is read soon after it was written: one part in so many

# Of the cycles that the model counts (measured on a Zen 3 with layers of BERT, ViT and ResNet-50, one core).
_INPUT, _OUTPUT = 12.0, 20.0  # cycles of the sums of a pair of rows: a block of inputs, a vector of outputs
_PHASE = 8000.0  # cycles that a kernel more takes
_MAKING = 1.04  # times the products take where sums of weights are made while running
_DIRECT = 0.94  # share of the peak that direct kernels reach


@lru_cache(maxsize=1024)
def plan(h: Halves, fused: bool | None = None) -> Plan:
    """A cut by sizes alone; `fused` may be given."""
    mr, nr = tile(h.pairs, h.vectors, h.blocks * h.lanes, h.machine.tile_registers)
    if fused is None:
        fused = h.pairs >= _ITEMS * _FUSED_PAIRS
    count = ceil(h.pairs / mr)
    columns = ceil(h.vectors / nr)
    chunks = ceil(count / max(1, (_FUSED_PAIRS if fused else _SPLIT_PAIRS) // mr))
    if not fused:
        chunks = max(chunks, min(ceil(_ITEMS / columns), count // _LEAST_GROUPS))
    groups = ceil(count / chunks)
    most = max(1, h.machine.l2_bytes // _PRODUCTS // (4 * POSITIONS * groups * mr * nr * h.lanes))
    return Plan(mr, nr, groups, below(columns, min(most, max(1, columns * chunks // _ITEMS))), fused, True)


@lru_cache(maxsize=1024)
def cycles(h: Halves, cut: Plan) -> float:
    """Modelled cycles on one core, its weights in memory; only comparisons with `direct_cycles` mean something."""
    tiles = h.groups(cut) * ceil(h.vectors / cut.nr)
    products = POSITIONS * tiles * (h.blocks * h.lanes * step_cycles(cut.mr, cut.nr) + TILE)
    if h.stored < POSITIONS:
        products *= _MAKING
    sums = h.pairs * (h.blocks * _INPUT + h.vectors * _OUTPUT)
    apart = 0.0
    if not cut.fused:
        inputs = 4.0 * POSITIONS * h.pairs * h.blocks * h.lanes
        apart = _PHASE + (inputs / L3 if inputs > h.machine.l2_bytes else 0.0)
    return sums + apart + together(products, h.bytes * h.stored / _QUARTERS / MEMORY)


def direct_cycles(h: Halves) -> float:
    """Modelled cycles of the direct kernel on the same terms."""
    return together(h.items * h.rows * h.inputs * h.outputs / (2 * h.lanes) / _DIRECT, h.bytes / MEMORY)
