"""The pipeline from a model to something that runs: one function that reads top to bottom, and its public faces."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import onnx

from nestc.bundle.bundle import Bundle, BundlePartition, TensorSpec
from nestc.bundle.schema import DeviceSpec
from nestc.errors import PlanError, UnsupportedOp
from nestc.graph import pipeline
from nestc.graph.bind import bind
from nestc.graph.model import Model, require_static, skeleton, unbound_dims
from nestc.graph.region import TensorType
from nestc.host import available_cpus
from nestc.importers.onnx import load
from nestc.partition.cut import cut_in_order
from nestc.partition.descend import claim_or_descend
from nestc.partition.match import Claim, takes
from nestc.partition.place import follow, place
from nestc.partition.plan import Plan
from nestc.partition.problem import Objective
from nestc.runtime.executable import Executable
from nestc.specialise import Specialised, operands_of
from nestc.targets import resolve
from nestc.targets.api import Artifact, Partition, Target

if TYPE_CHECKING:
    from nestc.partition.by_cost import Placement

log = logging.getLogger("nestc")

Stage = Literal["graph", "regions", "plan", "code", "bundle"]
Emit = Callable[[str, str, str], None]
Progress = Callable[[str, float], None]
Source = str | os.PathLike[str] | onnx.ModelProto | bytes | Model

OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "energy")

OWN = ("cpu", "host")
"""Devices that run on the CPU by our own means: nothing replaces them when they fail."""

PlaceBy = Literal["auto", "order", "cost"]
"""How devices are chosen: in the order of the targets, or by what regions cost on each (measured, or modelled by a
simulator). ``auto``: by cost where more than one target is given."""


@dataclass
class Compilation:
    """What each stage of `build` has made; fields after `stop_after` stay empty."""

    model: Model
    optimised: Model | None = None
    formed: Model | None = None
    claims: list[Claim] = field(default_factory=list[Claim])
    partitions: tuple[Partition, ...] = ()
    plan: Plan | None = None
    placement: Placement | None = None
    artifacts: dict[str, Artifact] = field(default_factory=dict[str, Artifact])
    fallbacks: dict[str, Artifact] = field(default_factory=dict[str, Artifact])
    bundle: Bundle | None = None


def build(
    model: Model,
    targets: Sequence[Target],
    *,
    threads: int | None = None,
    objective: Objective = "latency",
    plan: Plan | None = None,
    by_cost: bool = False,
    fallback: bool = False,
    stop_after: Stage = "bundle",
    emit: Emit | None = None,
    progress: Progress | None = None,
) -> Compilation:
    """Compile a model with static shapes for `targets`, which end with the ones that take what is left (cpu, host).

    Without a `plan`, devices are chosen in the order of the targets, or `by_cost`. With `fallback` what runs on another
    device is compiled for the CPU too, in case it fails. `emit(level, name, text)` receives each intermediate form,
    `progress(what, fraction)` how far it is. Raises ShapeError if a dimension is not bound, UnsupportedOp if nobody
    takes an operator, PlanError if `plan` is not of this model, and what a target raises.
    """
    tell = progress or _silent
    done = Compilation(model)

    # Everything below needs sizes: they decide kernels, layouts and memory.
    require_static(model)

    # Simplify first, so that regions are formed of what really has to be computed.
    tell("optimise the graph", 0.0)
    done.optimised = pipeline.optimize(model)
    _verify(done.optimised)
    if stop_after == "graph":
        return done

    # Regions before placement: a target takes a convolution with its activation, or not at all. What nobody takes is
    # decomposed here and formed anew, since its pieces may join their neighbours.
    tell("form regions", 0.1)
    done.optimised, done.formed, done.claims = claim_or_descend(done.optimised, targets)
    _verify(done.formed)
    if emit is not None:
        emit("graph", "model", onnx.printer.to_text(skeleton(done.formed.ir)))
    if stop_after == "regions":
        return done

    # Placement follows a given plan, or costs, or the claims; partitions are as large as they can be without a cycle.
    tell("place", 0.15)
    if plan is not None:
        placed = follow(plan, done.optimised, targets)
    elif by_cost:
        from nestc.partition.by_cost import place_by_cost  # most compilations need neither solver nor profile store
        from nestc.partition.measure import Meter
        from nestc.partition.store import ProfileStore

        done.placement = place_by_cost(
            done.optimised,
            done.formed,
            targets,
            objective,
            Meter(ProfileStore(), threads or available_cpus()),
            progress=lambda what, fraction: tell(what, 0.15 + 0.35 * fraction),
        )
        placed = done.placement.placed
    else:
        done.formed, done.claims, cuts = cut_in_order(done.optimised, done.formed, done.claims, targets)
        placed = place(done.formed, done.claims, targets, objective, cuts)
    done.formed, done.partitions, done.plan = placed.formed, placed.partitions, placed.plan
    for line in done.plan.explain().splitlines():
        log.info("%s", line)
    if stop_after == "plan":
        return done

    # Each target compiles its partitions on its own; verification of the levels below is the target's.
    by_name = {target.name: target for target in targets}
    for index, partition in enumerate(done.partitions):
        tell(f"compile {partition.name}", 0.5 + 0.45 * index / len(done.partitions))
        done.artifacts[partition.name] = by_name[partition.device].compile(partition, emit)
        if fallback and partition.device not in OWN:
            spare = replace(partition, device="cpu")
            if all(takes(by_name["cpu"], region) for region in partition.regions):
                done.fallbacks[partition.name] = by_name["cpu"].compile(spare)
    _require_capacity(done, targets)
    if stop_after == "code":
        return done

    # One bundle holds all of it; it is also what runs when nothing is ever saved.
    tell("bundle", 0.95)
    done.bundle = _bundle(done, targets, threads or available_cpus())
    tell("done", 1.0)
    return done


def _require_capacity(done: Compilation, targets: Sequence[Target]) -> None:
    """Raise PlanError if the constants of a device's partitions, as compiled, are more than it holds together."""
    for target in targets:
        parts = [done.artifacts[each.name] for each in done.partitions if each.device == target.name]
        size = sum(array.nbytes for part in parts for array in part.weights.values())
        if 0 < target.machine.capacity_bytes < size:
            raise PlanError(
                f"{len(parts)} partitions on {target.name!r} need {size} bytes for constants, but it holds "
                f"{target.machine.capacity_bytes}; place by cost (--placement cost), or give a plan that moves regions"
            )


def compile(
    model: Source,
    targets: Sequence[str | Target] = ("cpu",),
    *,
    threads: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    objective: str = "latency",
    plan: Plan | str | os.PathLike[str] | None = None,
    placement: PlaceBy = "auto",
    on_failure: Literal["cpu"] | None = None,
    emit: Emit | None = None,
    bound: bool = False,
    progress: Progress | None = None,
) -> Executable | Specialised:
    """Compile a model (a file, bytes, a ModelProto or a `Model`) for the targets.

    One target takes all that it can; of several, each region goes where that serves the `objective` best, by costs that
    are measured (or modelled by a simulator) and kept in the profile store. With `placement` "order" the first target
    that takes a region has it. ``cpu`` and then ``host`` take what the targets given refuse. `plan` decides instead.
    `on_failure="cpu"`: what runs on another device is compiled for the CPU too, and run there if the device fails.

    `threads` defaults to the CPUs this process may use.
    A model whose inputs leave dimensions open, or the values that shapes depend on, is compiled at the first call
    with the shapes (and these values) of that call, and kept for the next; with `bound` that is a ShapeError instead.
    """
    wanted, chosen = require_objective(objective), with_fallbacks(resolve(targets, {"threads": threads}), threads)
    given = Plan.load(plan) if isinstance(plan, str | os.PathLike) else plan
    costs = _by_cost(placement, targets)

    def make(ready: Model) -> Bundle:
        done = build(
            ready,
            chosen,
            threads=threads,
            objective=wanted,
            plan=given,
            by_cost=costs,
            fallback=on_failure == "cpu",
            emit=emit,
            progress=progress,
        )
        assert done.bundle is not None
        return done.bundle

    def load_bundle(ready: Model) -> Executable:
        return Executable(make(ready), threads=threads, foreign=True, on_failure=on_failure)

    as_given = model if isinstance(model, Model) else load(model)
    _require_tensors(as_given)
    loaded = bind(as_given, shapes, dims)
    if bound:
        require_static(loaded)
    if unbound_dims(loaded) or operands_of(loaded):
        return Specialised(loaded, load_bundle)
    # What the file leaves open and `dims` has bound may still come in other sizes at a call.
    others = Specialised(as_given, load_bundle)
    again = others.for_shapes if unbound_dims(as_given) else None
    return Executable(make(loaded), threads=threads, respecialise=again, foreign=True, on_failure=on_failure)


def explain(
    model: Source,
    targets: Sequence[str | Target] = ("cpu",),
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    objective: str = "latency",
    placement: PlaceBy = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, list[str]]:
    """The plan for a model, without compiling it, and in words what each graph pass did.

    Placement `by_cost` has measured what the profile store does not know yet.
    """
    done = _planned(model, targets, shapes, dims, objective, _by_cost(placement, targets), threads, progress)
    assert done.plan is not None and done.formed is not None
    return done.plan, done.formed.notes


def partition(
    model: Source,
    targets: Sequence[str | Target] = ("cpu",),
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    objective: str = "latency",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Placement:
    """Place a model by cost without compiling the result: the plan, and the problem and solution behind it."""
    done = _planned(model, targets, shapes, dims, objective, True, threads, progress)
    assert done.placement is not None
    return done.placement


def _planned(
    model: Source,
    targets: Sequence[str | Target],
    shapes: Mapping[str, Sequence[int]] | None,
    dims: Mapping[str, int] | None,
    objective: str,
    by_cost: bool,
    threads: int | None,
    progress: Progress | None,
) -> Compilation:
    wanted, chosen = require_objective(objective), with_fallbacks(resolve(targets, {"threads": threads}), threads)
    loaded = bind(model if isinstance(model, Model) else load(model), shapes, dims)
    return build(
        loaded, chosen, threads=threads, objective=wanted, by_cost=by_cost, stop_after="plan", progress=progress
    )


def require_objective(name: str) -> Objective:
    """`name` as an objective. Raises PlanError if there is no such."""
    if name not in OBJECTIVES:
        raise PlanError(f"there is no objective {name!r}; choose {', '.join(OBJECTIVES)}")
    return name


def _by_cost(placement: PlaceBy, targets: Sequence[str | Target]) -> bool:
    if placement not in ("auto", "order", "cost"):
        raise PlanError(f"there is no placement {placement!r}; choose auto, order or cost")
    return placement == "cost" or (placement == "auto" and len(targets) > 1)


def with_fallbacks(targets: Sequence[Target], threads: int | None) -> tuple[Target, ...]:
    """The targets given, then ``cpu`` and ``host`` unless they are among them; ``host`` is always last."""
    from nestc.targets.cpu import CpuTarget
    from nestc.targets.host import HostTarget

    chosen: list[Target] = [target for target in targets if target.name != "host"]
    if all(target.name != "cpu" for target in chosen):
        chosen.append(CpuTarget(threads=threads))
    return (*chosen, next((target for target in targets if target.name == "host"), HostTarget()))


def _require_tensors(model: Model) -> None:
    """Raise UnsupportedOp for a sequence or an optional at the border of the model: only tensors go in and out."""
    for what, values in (("input", model.inputs), ("output", model.outputs)):
        for name, (dtype, _) in values.items():
            if "(" in dtype:
                raise UnsupportedOp(
                    f"{what} {name!r} of the model is a {dtype}; only tensors go in and out of a bundle"
                )


def _verify(model: Model) -> None:
    """L1 is valid ONNX at every moment: a pass that broke it is found here, not three stages later."""
    proto = skeleton(model.ir)
    for value in (*proto.graph.input, *proto.graph.output):
        # The checker wants a shape on every border, and an unknown rank has none to give; it does not read the sizes.
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto())
    onnx.checker.check_model(proto)


def _bundle(done: Compilation, targets: Sequence[Target], threads: int) -> Bundle:
    """Everything that running needs, and the graph and the plan for whoever wants to look."""
    assert done.formed is not None and done.plan is not None
    used = {partition.device for partition in done.partitions}
    return Bundle(
        name=done.plan.model,
        inputs=_specs(done.formed.inputs),
        outputs=_specs(done.formed.outputs),
        partitions=tuple(
            BundlePartition(
                name=partition.name,
                device=partition.device,
                inputs=partition.inputs,
                outputs=tuple(_spec(name, partition.types[name]) for name in partition.outputs),
                artifact=done.artifacts[partition.name],
                regions=tuple(region.name for region in partition.regions),
                fallback=done.fallbacks.get(partition.name),
            )
            for partition in done.partitions
        ),
        graph=skeleton(done.formed.ir).SerializeToString(deterministic=True),
        threads=threads,
        info={"plan": done.plan.to_json(), "fallback_ops": done.plan.fallback_ops},
        devices=tuple(_device(target) for target in targets if target.name in used),
    )


def _device(target: Target) -> DeviceSpec:
    """What the runtime has to know of a target's device."""
    link = target.machine.link
    return DeviceSpec(
        name=target.name,
        resource=target.machine.resource or target.name,
        launch_seconds=link.launch_seconds,
        latency_seconds=link.latency_seconds,
        bytes_per_second=link.bytes_per_second,
        joules_per_byte=link.joules_per_byte,
        kind=link.kind,
        watts=target.machine.watts,
    )


def _specs(values: Mapping[str, tuple[str, tuple[int | str, ...]]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, dtype, tuple(size if isinstance(size, int) else None for size in shape))
        for name, (dtype, shape) in values.items()
    )


def _spec(name: str, type_: TensorType) -> TensorSpec:
    """A region's type with what is known only at run time (-1; an unknown rank is (-1,)) as None."""
    return TensorSpec(name, type_.dtype, tuple(None if size < 0 else size for size in type_.shape))


def _silent(what: str, fraction: float) -> None:
    """Progress that nobody watches."""
