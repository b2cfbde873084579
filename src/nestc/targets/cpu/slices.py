"""Which runs of regions compute a batch slice by slice, so that what lies between them stays in the caches.

A kernel for a whole batch writes all images before the next one reads the first. Where these are more bytes than the
caches hold, a run of regions that treat images on their own is better executed a few images at a time; but then it
reads its weights again for every slice. The run that pays is found by counting the bytes that come from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nestc.codegen.llvm_types import width
from nestc.codegen.schedule import BARRIER_SECONDS
from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine
from nestc.kernels.small import storage
from nestc.targets.cpu.address import nbytes
from nestc.targets.cpu.cost import seconds
from nestc.targets.cpu.images import Batch, batch_of, of_images
from nestc.targets.cpu.layout import VIEW

MEMORY_BYTES_PER_SECOND = 30e9
"""What beyond the caches costs where kernels stream it: 28 to 31 GB/s a core were seen on Zen 3."""

CACHE_PART = 0.125
"""Part of the last cache that a run counts on: a core's, where eight share it. Counting on a half, a quarter, an eighth
and a sixteenth of 32 MiB, eight images took 0.99, 0.97, 0.97 and 1.0 of what they take whole in ResNet-50, 0.95, 0.93,
0.92 and 0.92 in MobileNetV2, 0.96, 0.93, 0.91 and 0.89 in EfficientNet-B0 (measured on one core of Zen 3)."""

CALL_SECONDS = 0.5e-6
"""What issuing a kernel once more takes on one thread; on several, workers also meet and leave the last chunk unevenly
(twice what a barrier costs)."""

LEAST_SECONDS = 100e-6
LEAST_PART = 0.01
"""Modelled gain below which the batch stays whole, in seconds and as part of what the run takes: less than what the
model neglects."""

MOST_CALLS = 1024
"""Of the kernels of one run, turns counted: the program lists each, some 200 bytes."""

TRANSFORMED = 4.0
"""Bytes of the weights of a 3x3 convolution as Winograd's kernels read them, over what they have (36 for 9)."""


@dataclass(frozen=True)
class Slices:
    """The regions [first, end) run `turns` times, each time for so many ``images`` of the batch.

    ``batches`` has what each of them treats as batch; ``seconds`` is the modelled gain.
    """

    first: int
    end: int
    images: int
    turns: int
    batches: tuple[Batch, ...]
    seconds: float

    @property
    def values(self) -> frozenset[str]:
        """The values that come in slices."""
        return frozenset[str]().union(*(batch.values for batch in self.batches))

    def small(self, regions: Sequence[Region]) -> dict[str, Region]:
        """The regions of the run for one slice, by name."""
        run = regions[self.first : self.end]
        return {each.name: of_images(each, batch, self.images) for each, batch in zip(run, self.batches, strict=True)}


def choose_slices(
    regions: Sequence[Region],
    outputs: Sequence[str],
    machine: CpuMachine,
    threads: int,
    whole: frozenset[str] = frozenset(),
) -> list[Slices]:
    """The runs of `regions` that should be sliced, in order. `outputs`: what is read outside of them; regions named in
    `whole` take part in no run."""
    cache = _cache_bytes(machine)
    found: list[Slices] = []
    for first, batches in _segments(regions, whole, cache):
        segment = regions[first : first + len(batches)]
        later = {name for region in regions[first + len(batches) :] for name in region.inputs}
        model = _Model(segment, batches, later.union(outputs), cache, threads)
        found += [
            Slices(first + a, first + b, images, batches[0].images // images, tuple(batches[a:b]), gain)
            for a, b, images, gain in model.best()
        ]
    return found


def report(slices: Sequence[Slices], regions: Sequence[Region]) -> list[dict[str, str | int | float]]:
    """What to tell of them, as JSON values; seconds are modelled."""
    return [
        {
            "first": regions[each.first].name,
            "last": regions[each.end - 1].name,
            "regions": each.end - each.first,
            "images": each.images,
            "turns": each.turns,
            "modelled_gain_seconds": each.seconds,
        }
        for each in slices
    ]


def _cache_bytes(machine: CpuMachine) -> float:
    return max(CACHE_PART * machine.l3_bytes, machine.l2_bytes)


def _segments(regions: Sequence[Region], whole: frozenset[str], cache: float) -> list[tuple[int, list[Batch]]]:
    """The longest runs of regions with equal batches: first region, and the batch of each. None if all activations are
    small."""
    if not any(_large(region, cache) for region in regions):
        return []
    found: list[tuple[int, list[Batch]]] = []
    sliced: set[str] = set()
    shared: set[str] = set()
    for number, region in enumerate(regions):
        batch = None if region.name in whole else batch_of(region)
        if batch is None or not _whole_bytes(region, batch):
            sliced, shared = set(), set()
            continue
        parts = batch.values.intersection((*region.inputs, *region.outputs))
        same = set(region.inputs) - parts
        # A value that one region reads image by image and another one as a whole ends a run.
        if not sliced or same & sliced or parts & shared or found[-1][1][0].images != batch.images:
            sliced, shared = set(), set()
            found.append((number, []))
        found[-1][1].append(batch)
        sliced |= parts
        shared |= same
    return found


def _large(region: Region, cache: float) -> bool:
    shapes = [region.types[name] for name in (*region.inputs, *region.outputs)]
    return any(type_.shape[:1] > (1,) for type_ in shapes) and sum(map(_bytes, shapes)) > cache / 2


def _bytes(type_: TensorType) -> float:
    return nbytes(type_, PLAIN)


def _whole_bytes(region: Region, batch: Batch) -> bool:
    """Whether slices of all values begin at bytes."""
    return all(width(storage(region.types[name].dtype)) % 8 == 0 for name in batch.values)


def _weights(region: Region) -> float:
    """Bytes of the constants of a region, as its kernels read them."""
    total = sum(_bytes(region.types[name]) for name in region.constants if name in region.types)
    wide = sum(_bytes(region.types[op.inputs[1]]) for op in region.ops if _transformable(op, region))
    return total + (TRANSFORMED - 1) * wide


def _transformable(op: Op, region: Region) -> bool:
    if op.op_type != "Conv" or op.attributes.get("group", 1) != 1:
        return False
    strides = op.attributes.get("strides") or (1,)
    return region.types[op.inputs[1]].shape[2:] == (3, 3) and isinstance(strides, tuple) and set(strides) == {1}


@dataclass
class _Value:
    """Bytes of a value an image, and the regions of the segment (counted from 0) that touch it.

    A maker of -1 and readers beyond the last region are outside.
    """

    nbytes: float
    maker: int
    readers: list[int] = field(default_factory=list[int])


class _Model:
    """Bytes from memory of a segment of regions, whole and in slices."""

    def __init__(
        self, segment: Sequence[Region], batches: Sequence[Batch], outside: set[str], cache: float, threads: int
    ) -> None:
        self.count = len(segment)
        self.images = batches[0].images
        self.cache = cache
        self.call = CALL_SECONDS if threads == 1 else CALL_SECONDS + 2 * BARRIER_SECONDS
        self.weights = np.array([0.0 if region.anchor == VIEW else _weights(region) for region in segment])
        values = self.values(segment, batches, outside)
        self.moved = np.zeros(self.count)
        self.coming = np.zeros(self.count + 1)  # what is made before a cut and read after it, an image
        for value in values:
            touching = [value.maker, *value.readers]
            for number in {each for each in touching if 0 <= each < self.count}:
                self.moved[number] += value.nbytes
            self.coming[value.maker + 1 : max(touching) + 1] += value.nbytes
        self.work = np.array([region.anchor != VIEW for region in segment], float)
        self.least = LEAST_PART * np.array([seconds(region) for region in segment])

    def values(self, segment: Sequence[Region], batches: Sequence[Batch], outside: set[str]) -> list[_Value]:
        """The values in slices; views are the values that they look at."""
        found: dict[str, _Value] = {}
        for number, (region, batch) in enumerate(zip(segment, batches, strict=True)):
            for name in region.inputs:
                if name in batch.values:
                    value = found.setdefault(name, _Value(_bytes(region.types[name]) / self.images, -1))
                    if region.anchor != VIEW:
                        value.readers.append(number)
            for name in region.outputs:
                if region.anchor == VIEW:
                    found[name] = found[region.inputs[0]]
                else:
                    found[name] = _Value(_bytes(region.types[name]) / self.images, number)
        for name, value in found.items():
            if name in outside:
                value.readers.append(self.count)
        return list({id(value): value for value in found.values()}.values())

    def part(self, nbytes: np.ndarray) -> np.ndarray:
        """The part of so many bytes in turn that is not found in the cache."""
        return np.clip((nbytes - self.cache) / self.cache, 0.0, 1.0)

    def gains(self, first: int, images: int) -> np.ndarray:
        """Modelled seconds that the runs from `first` up to each region (that one included) save in slices; minus
        infinity where that is not enough or not possible."""
        n, turns = self.images, self.images // images
        moved, weights = self.moved[first:], self.weights[first:]
        whole = n * moved * self.part(n * moved + weights)
        sliced = n * moved * self.part(images * moved + weights)
        total = np.cumsum(weights)
        again = (turns - 1) * total * self.part(total + images * np.maximum.accumulate(moved))
        border = n * (self.coming[first] + self.coming[first + 1 :])
        border = border * self.part(border)
        calls = (turns - 1) * np.cumsum(self.work[first:])
        saved = (np.cumsum(whole - sliced) - again - border) / MEMORY_BYTES_PER_SECOND - calls * self.call
        issued = turns * np.cumsum(self.work[first:])
        enough = saved >= np.maximum(LEAST_SECONDS, np.cumsum(self.least[first:]))
        return np.where(enough & (issued >= 2 * turns) & (issued <= MOST_CALLS), saved, -np.inf)

    def best(self) -> list[tuple[int, int, int, float]]:
        """The runs that save most together: first region, end, images of a slice, and the modelled seconds saved."""
        slices = [images for images in range(1, self.images) if self.images % images == 0]
        table = np.array([[self.padded(first, images) for images in slices] for first in range(self.count)])
        chosen, gain = table.argmax(1), table.max(1)
        most = np.zeros(self.count + 1)
        before = np.full(self.count + 1, -1)
        for end in range(1, self.count + 1):
            most[end] = most[end - 1]
            reached = most[:end] + gain[:end, end - 1]
            first = int(reached.argmax())
            if reached[first] > most[end]:
                most[end], before[end] = reached[first], first
        found: list[tuple[int, int, int, float]] = []
        end = self.count
        while end > 0:
            first = int(before[end])
            if first < 0:
                end -= 1
                continue
            found.append((first, end, slices[chosen[first, end - 1]], float(gain[first, end - 1])))
            end = first
        return found[::-1]

    def padded(self, first: int, images: int) -> np.ndarray:
        """`gains`, by the number of the last region."""
        return np.concatenate([np.full(first, -np.inf), self.gains(first, images)])


__all__ = ["Slices", "choose_slices", "report"]
