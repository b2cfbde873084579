"""An executable for a model whose sizes are known only at the call: it compiles for each, and keeps the last few."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nestc.bundle.dtypes import numpy_dtype
from nestc.errors import ShapeError
from nestc.graph import pipeline
from nestc.graph.bind import bind
from nestc.graph.kinds import has_body
from nestc.graph.model import Model, require_static
from nestc.graph.shape_operands import shape_operands

if TYPE_CHECKING:
    from nestc.bundle.bundle import Bundle
    from nestc.partition.plan import Plan
    from nestc.runtime import Executable
    from nestc.runtime.executable import Item

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Like = tuple[tuple[int, ...], np.dtype[Any]]
Key = tuple[Shapes, tuple[bytes, ...]]

CAPACITY = 8
"""Specialisations kept: as many as a server's batch sizes usually are; each holds its code and its packed weights."""


def operands_of(model: Model) -> tuple[str, ...]:
    """Inputs of a model with static shapes whose values it must be specialised for, in graph order."""
    # Optimising folds such dependences away, so most models need not be optimised to see that there are none; but it
    # may also take away a branch or a loop that stands between a shape and the inputs it is computed from.
    may_depend = shape_operands(model) or any(has_body(node) for node in model.ir.graph)
    return shape_operands(pipeline.optimize(model)) if may_depend else ()


class Specialised:
    """Compiles a model for the shapes of each call, and for the values of inputs that shapes depend on.

    It has the interface of `nestc.Executable`; what describes a compilation (`plan`, `timeline` ...) is of the last
    one used. The least recently used specialisation is dropped when there are more than `capacity`. May be called
    from several threads; while one compiles, the others wait.
    """

    def __init__(self, model: Model, make: Callable[[Model], Executable], capacity: int = CAPACITY) -> None:
        self._model = model
        self._wanted = {name: (numpy_dtype(dtype), shape) for name, (dtype, shape) in model.inputs.items()}
        self._unranked = frozenset(value.name for value in model.ir.graph.inputs if value.shape is None)
        self._make = make
        self._capacity = capacity
        self._lock = threading.Lock()
        self._ready: OrderedDict[Key, Executable] = OrderedDict()
        self._operands: dict[Shapes, tuple[str, ...]] = {}
        self._last: Executable | None = None
        # What the last call was for, if no shape depends on values: most calls are like the one before.
        self._same: tuple[list[Like], Executable] | None = None

    @property
    def inputs(self) -> Mapping[str, tuple[str, tuple[int | str, ...]]]:
        """(dtype, shape) of each input in graph order; an open dimension is its name."""
        return self._model.inputs

    @property
    def outputs(self) -> Mapping[str, tuple[str, tuple[int | str, ...]]]:
        """(dtype, shape) of each output in graph order; an open dimension is its name."""
        return self._model.outputs

    def __call__(self, *arrays: np.ndarray, out: Any = None) -> Any:
        """Run with arrays in graph-input order; a tuple of arrays, or the array itself if there is one output."""
        same = self._same
        if same is not None and same[0] == _like(arrays):
            self._last = same[1]
            return same[1](*arrays, out=out)
        executable, rest = self._for(self._named(arrays))
        if len(rest) == len(arrays):
            self._same = _like(tuple(rest.values())), executable
        return executable(*rest.values(), out=out)

    def run(
        self, inputs: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Run with named arrays and give named arrays; compiles first where these shapes are new."""
        executable, rest = self._for(inputs)
        return executable.run(rest, out=out)

    def submit(self, *arrays: np.ndarray | Mapping[str, np.ndarray]) -> Future[Any]:
        """Run in the background, see `Executable.submit`; compiles first, in this thread, where shapes are new."""
        by_name = len(arrays) == 1 and isinstance(arrays[0], Mapping)
        executable, rest = self._item(arrays[0] if by_name else cast("tuple[np.ndarray, ...]", arrays))
        return executable.submit(rest) if isinstance(rest, Mapping) else executable.submit(*rest)

    def map(self, iterable: Iterable[Item], in_flight: int = 4) -> Generator[Any, None, None]:
        """Several requests in flight (see `Executable.map`), as long as those that follow each other share shapes."""
        for executable, group in groupby(map(self._item, iterable), key=itemgetter(0)):
            yield from executable.map((rest for _, rest in group), in_flight)

    def save(self, path: str | os.PathLike[str]) -> None:
        """A bundle has fixed shapes, so this raises ShapeError: it names what is open and how to bind it."""
        require_static(self._model)
        names = ", ".join(map(repr, operands_of(self._model)))
        raise ShapeError(
            f"shapes depend on the values of {names}; load the model with these as constants (values=) to save it"
        )

    def close(self) -> None:
        """Forget every specialisation; a later call compiles again."""
        with self._lock:
            self._ready.clear()
            self._last = self._same = None

    @property
    def specialisations(self) -> int:
        """How many are ready."""
        return len(self._ready)

    @property
    def plan(self) -> Plan:
        """The plan of the specialisation used last."""
        return self._current().plan

    @property
    def fallback_ops(self) -> Mapping[str, int]:
        """Operators of the specialisation used last that an interpreter runs."""
        return self._current().fallback_ops

    @property
    def bundle(self) -> Bundle:
        """The bundle of the specialisation used last."""
        return self._current().bundle

    @property
    def info(self) -> Mapping[str, Any]:
        """What the compiler noted of the specialisation used last."""
        return self._current().info

    def stats(self) -> dict[str, Any]:
        """Sizes, threads and loading time of the specialisation used last."""
        return self._current().stats()

    def profile(self, *arrays: np.ndarray, runs: int = 20) -> list[dict[str, Any]]:
        """Median time of every kernel call for these inputs, or for the specialisation used last without them."""
        if not arrays:
            return self._current().profile(runs=runs)
        executable, rest = self._for(self._named(arrays))
        return executable.profile(*rest.values(), runs=runs)

    def timeline(self) -> list[dict[str, Any]]:
        """The last run of the specialisation used last."""
        return self._current().timeline()

    def throughput(self) -> dict[str, Any]:
        """Requests a second of the last run of the specialisation used last."""
        return self._current().throughput()

    def energy(self) -> list[dict[str, Any]]:
        """Energy of the last run of the specialisation used last."""
        return self._current().energy()

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write the last run of the specialisation used last as a trace."""
        self._current().trace(path)

    def for_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> Executable:
        """The executable for inputs of these shapes, where no shape depends on values.

        Raises ShapeError where a size that the model fixes is another one.
        """
        for name, (_, shape) in self._model.inputs.items():
            _check_shape(name, shape, shapes[name])
        with self._lock:
            return self._specialised(tuple((name, shapes[name]) for name in self._model.inputs), {}, ())

    def _named(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        names = list(self._wanted)
        if len(arrays) != len(names):
            raise ShapeError(f"the model has {len(names)} inputs ({', '.join(names)}), but {len(arrays)} were given")
        return dict(zip(names, arrays, strict=True))

    def _item(self, item: Item) -> tuple[Executable, Mapping[str, np.ndarray] | list[np.ndarray]]:
        """The executable for a request, and what it still takes of it, in the form that it came in."""
        if isinstance(item, Mapping):
            return self._for(item)
        arrays = list(item) if isinstance(item, list | tuple) else [np.asarray(item)]
        executable, rest = self._for(self._named(arrays))
        return executable, list(rest.values())

    def _current(self) -> Executable:
        if self._last is None:
            require_static(self._model)
            raise ShapeError("nothing is compiled yet: shapes depend on values of inputs, so call the executable first")
        return self._last

    def _for(self, inputs: Mapping[str, np.ndarray]) -> tuple[Executable, dict[str, np.ndarray]]:
        """The executable for these inputs, compiled if need be, and the inputs that it still takes."""
        arrays = self._checked(inputs)
        shapes = tuple((name, array.shape) for name, array in arrays.items())
        with self._lock:
            if shapes not in self._operands:
                self._operands[shapes] = operands_of(bind(self._model, _sizes(shapes)))
            operands = self._operands[shapes]
            executable = self._specialised(shapes, arrays, operands)
        return executable, {name: array for name, array in arrays.items() if name not in operands}

    def _specialised(self, shapes: Shapes, arrays: Mapping[str, np.ndarray], operands: Sequence[str]) -> Executable:
        """Look up or compile; the lock is held."""
        key = (shapes, tuple(arrays[name].tobytes() for name in operands))
        executable = self._ready.get(key)
        if executable is None:
            values = {name: arrays[name] for name in operands}
            executable = self._make(bind(self._model, _sizes(shapes, operands), None, values))
            self._ready[key] = executable
        self._ready.move_to_end(key)
        while len(self._ready) > self._capacity:
            self._ready.popitem(last=False)
        self._last = executable
        return executable

    def _checked(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs as arrays in graph order. Raises ShapeError for a wrong name, rank, size or dtype."""
        unknown = next((name for name in inputs if name not in self._wanted), None)
        if unknown is not None:
            raise ShapeError(f"there is no input {unknown!r}; the inputs are {', '.join(self._wanted)}")
        arrays: dict[str, np.ndarray] = {}
        for name, (dtype, shape) in self._wanted.items():
            if name not in inputs:
                raise ShapeError(f"input {name!r} is missing; the inputs are {', '.join(self._wanted)}")
            array = np.asarray(inputs[name])
            if array.dtype != dtype and not dtype.hasobject:
                raise ShapeError(f"input {name!r} is of dtype {dtype}, but {array.dtype} was given")
            if name not in self._unranked:
                _check_shape(name, shape, array.shape)
            arrays[name] = array
        return arrays


def _like(arrays: Sequence[np.ndarray]) -> list[Like]:
    """What a call is known by; shorter than its arrays if something else is among them."""
    return [(array.shape, array.dtype) for array in arrays if type(array) is np.ndarray]


def _sizes(shapes: Shapes, without: Sequence[str] = ()) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes if name not in without}


def _check_shape(name: str, wanted: Sequence[int | str], given: Sequence[int]) -> None:
    fits = len(wanted) == len(given) and all(
        not isinstance(size, int) or size == actual for size, actual in zip(wanted, given, strict=True)
    )
    if not fits:
        listed = ", ".join(map(str, wanted))
        raise ShapeError(f"input {name!r} has the shape ({listed}), but {tuple(given)} was given")
