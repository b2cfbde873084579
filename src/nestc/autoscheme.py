"""The searches of the quantizer with nestc's own compiler: scheme ``auto``, and sampling of ways to quantize."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nestc.driver import compile as compile_model
from nestc.errors import QuantizationError
from nestc.graph.bind import bind_batch
from nestc.graph.model import Model, unbound_dims
from nestc.partition.cut import find_cuts
from nestc.quant.apply import apply
from nestc.quant.choose import Wishes, choose
from nestc.quant.derive import derive
from nestc.quant.devices import Formats, by_devices, formats_asked
from nestc.quant.overrides import overrides_of, read_overrides
from nestc.quant.prepare import prepare
from nestc.quant.profile import Profile
from nestc.quant.run import Batch, Progress
from nestc.quant.sample import SPACE, Choice, Sampler, Trial, sample, scheme_of
from nestc.quant.scheme import RECURRENT, WEIGHTED, Scheme, scheme_named
from nestc.quant.score import Judge, Score
from nestc.quant.search import Costs, Found, require_budget, search
from nestc.quant.tools import Tool
from nestc.quantization import checked, compiler, quantize, quantize_as, require_repeatable
from nestc.runtime.executable import Executable
from nestc.targets import resolve
from nestc.targets.api import Target
from nestc.targets.cpu.machine import host_machine

BUDGET = 0.01
"""The accuracy budget if none is given: one sample in a hundred."""

SENSITIVITY_BATCHES = 32
"""Batches, at most, over which the noise of the nodes is summed: sums of squares over so many differ little."""

RUNS = 9
"""Runs of which the median is a kernel's time."""


def auto(
    model: Model,
    profile: Profile | str | os.PathLike[str] | None,
    scheme: str | Scheme = "int8",
    data: Iterable[Batch] | None = None,
    budget: float | None = None,
    *,
    labels: Sequence[int] | np.ndarray | None = None,
    overrides: Mapping[str, str | Scheme | None] | str | os.PathLike[str] | None = None,
    tools: Sequence[str | Tool] | None = None,
    targets: Sequence[str | Target] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Found:
    """The fastest mix of `scheme` and float of a model (sizes bound) whose loss on `data` stays inside `budget`.

    Where this machine has no instruction for sums of byte products, weights of 7 bits are faster, and are tried first.

    With `targets` whose offers ask for formats, each node first gets that in which the fastest device computes it: what
    a simulated device would take by its model beside what the CPU takes with `scheme`, measured; the search for what
    goes back to float starts from there, with the same times. Who computes what is decided when the result is compiled.

    See `nestc.quant.search.search`. Costs are measured kernel by kernel on this machine; with open sizes they are
    estimated from multiply-accumulates. `data` must allow to be read several times. Raises QuantizationError without
    data or a profile, and if no mix holds the budget.
    """
    base = scheme_named(scheme) if isinstance(scheme, str) else scheme
    if data is None:
        raise QuantizationError("scheme auto is checked on data; give samples (--data)")
    require_repeatable(data)
    if profile is None:
        raise QuantizationError("scheme auto needs a profile; make one with nestc calibrate")
    seen = Profile.load(profile) if isinstance(profile, str | os.PathLike) else profile
    given = read_overrides(overrides) if isinstance(overrides, str | os.PathLike) else overrides_of(overrides or {})
    wanted = require_budget(BUDGET if budget is None else budget)
    prepared, run = prepare(model), compiler(threads)
    seen.require(prepared.hash)
    batches = checked(model, data)

    wishes: Wishes | None = None
    costs: Costs | Callable[[Model], Costs] | None = None
    faster: tuple[Scheme, ...] = ()
    devices = resolve(targets or (), {"threads": threads})
    formats = _for_devices(prepared, seen, base, given, devices, threads) if formats_asked(devices) else None
    if formats is not None and formats[0].taken:
        base, wishes, costs = formats[0].scheme, formats[0].wishes, formats[1]
    else:
        faster = _faster(base, prepared)
        costs = None if unbound_dims(prepared) else lambda whole: measure_costs(prepared, whole, threads)

    def quantized(by: Profile, scheme: Scheme, mixed: Mapping[str, Scheme | None]) -> Model:
        return quantize_as(model, by, scheme, mixed, wishes, tools=tools, data=data, threads=threads)

    found = search(
        prepared,
        seen,
        base,
        given,
        wanted,
        quantized,
        run,
        Judge(run(prepared), batches, None if labels is None else np.asarray(labels)),
        itertools.islice(batches, SENSITIVITY_BATCHES),
        costs,
        progress,
        faster,
        wishes,
    )
    found.model.ir.metadata_props["nestc.scheme"] = "auto"
    found.model.notes.append(str(found))
    return found


def _for_devices(
    prepared: Model,
    profile: Profile,
    scheme: Scheme,
    overrides: Mapping[str, Scheme | None],
    targets: Sequence[Target],
    threads: int | None,
) -> tuple[Formats, Costs]:
    """The fastest format of each node, of those that devices ask for and `scheme`, and what nodes take in it."""
    one, _ = bind_batch(prepared)
    assignment = choose(one, scheme, overrides, profile)
    cpu = measure_costs(one, apply(one, assignment, derive(one, profile, assignment)), threads)
    seconds = {name: times[1] * 1e-6 for name, times in cpu.nodes.items()}
    formats = by_devices(prepared, profile, targets, scheme, overrides, find_cuts, seconds)
    nodes = dict(cpu.nodes)
    products = {node.name for node in one.ir.graph if node.op_type in WEIGHTED | RECURRENT}
    for taken in dict.fromkeys(formats.taken.values()):
        if taken.seconds is None:
            continue
        owner = next((name for name in taken.nodes if name in products), taken.nodes[0])
        for name in taken.nodes:
            nodes[name] = (nodes.get(name, (0.0, 0.0))[0], taken.seconds * 1e6 if name == owner else 0.0)
    return formats, Costs("modelled", nodes)


def _faster(scheme: Scheme, prepared: Model) -> tuple[Scheme, ...]:
    """The scheme with weights of 7 bits, if convolutions sum byte products in 16 bits here (`kernels/conv_pack.py`)."""
    weight = scheme.weight
    if all(node.op_type != "Conv" for node in prepared.ir.graph):
        return ()
    if host_machine().dot_dtypes != ("int16", "int16") or not scheme.integer or weight.dtype != "int8" or weight.bits:
        return ()
    name = f"{scheme.name}{',' if ':' in scheme.name else ':'}weight-bits=7"
    return (scheme_named(name),)


def measure_costs(prepared: Model, quantized: Model, threads: int | None = None) -> Costs:
    """Microseconds of each node of a model of known sizes on one thread, float and quantized, as median over some runs.

    The time of a kernel goes to the product it computes, or else to the first node of the float model it computes;
    that of reading and rounding what several nodes share goes to nobody.
    """
    names = {node.name or "": node.op_type for node in prepared.ir.graph}
    times: list[dict[str, float]] = []
    for model in (prepared, quantized):
        executable = compile_model(model, threads=threads, bound=True)
        assert isinstance(executable, Executable)
        with executable:
            spent = dict.fromkeys(names, 0.0)
            for row in executable.profile(runs=RUNS):
                owner = _owner(row, names)
                if owner is not None:
                    spent[owner] += row["us"]
        times.append(spent)
    return Costs("measured", {name: (times[0][name], times[1][name]) for name in names})


def _owner(row: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """The node that a kernel's time is counted for: `origin` lists ``operator:node``."""
    computed = [each.partition(":")[2] for each in row.get("origin", ())]
    known = [name for name in computed if name in names]
    return next((name for name in known if names[name] in WEIGHTED), known[0] if known else None)


def sample_ways(
    model: Model,
    profile: Profile | str | os.PathLike[str],
    data: Iterable[Batch],
    trials: int = 20,
    *,
    sampler: Sampler = "optuna",
    space: Mapping[str, Sequence[str]] = SPACE,
    labels: Sequence[int] | np.ndarray | None = None,
    tools: Sequence[str | Tool] | None = (),
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Trial]:
    """Quantize a model (sizes bound) in different ways, run each on `data`, and return them in the order tried.

    The ways are choices from `space`, as `nestc.quant.sample.sample` draws them; `best_of` tells the best, and
    `scheme_of` its scheme. `data` must allow to be read several times; accuracy tools are off unless asked for.
    """
    require_repeatable(data)
    seen = Profile.load(profile) if isinstance(profile, str | os.PathLike) else profile
    prepared, run = prepare(model), compiler(threads)
    seen.require(prepared.hash)
    judge = Judge(run(prepared), checked(model, data), None if labels is None else np.asarray(labels))

    def objective(choice: Choice) -> Score:
        return judge.score(run(quantize(model, seen, scheme_of(choice), tools=tools, data=data, threads=threads)))

    return sample(objective, trials, sampler, space, seed, progress)
