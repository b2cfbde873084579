"""``nestc compile``: a model into a bundle."""

from __future__ import annotations

import enum
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestc.commands import common, quantize
from nestc.errors import Error

if TYPE_CHECKING:
    from nestc import compiled
    from nestc.bundle.artifact import Artifact
    from nestc.graph.model import Model
    from nestc.runtime import Executable
    from nestc.specialise import Specialised
    from nestc.targets.api import Target


class Objective(str, enum.Enum):
    """What the placement minimises."""

    latency = "latency"
    throughput = "throughput"
    energy = "energy"


class PlaceBy(str, enum.Enum):
    """How devices are chosen."""

    auto = "auto"
    order = "order"
    cost = "cost"


PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="PLAN.yaml", help="Place regions as this plan of nestc partition says."),
]


Placements = Annotated[
    PlaceBy,
    typer.Option(
        "--placement",
        help="How devices are chosen: `order` (the first target that takes a region), `cost` (measured or simulated), "
        "`auto`: by cost where several targets are given.",
    ),
]


class Level(str, enum.Enum):
    """An intermediate form that can be written out."""

    graph = "graph"
    tensor = "tensor"
    llvm = "llvm"
    asm = "asm"
    commands = "commands"


SUFFIX = {
    Level.graph: ".onnx.txt",
    Level.tensor: ".tensor",
    Level.llvm: ".ll",
    Level.asm: ".s",
    Level.commands: ".txt",
}


_NOT_IN_KEY = frozenset({"model", "output", "target", "json", "verbose", "debug"})
"""Parameters that do not decide what is in the bundle, or are in the key of a kept one anyway."""


def compile_(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.nest", help="The bundle. [default: MODEL's name]")
    ] = None,
    target: common.Targets = None,
    shape: common.Shapes = None,
    dim: common.Dims = None,
    threads: common.Threads = None,
    objective: Annotated[Objective, typer.Option(help="What the placement minimises.")] = Objective.latency,
    calibrate: quantize.Calibrate = None,
    scheme: quantize.Scheme = None,
    accuracy_budget: quantize.Budget = None,
    overrides: quantize.Overrides = None,
    tools: quantize.Tools = None,
    labels: common.Labels = None,
    split: common.Split = None,
    preprocess: common.Preprocess = None,
    limit: common.Limit = None,
    plan: PlanFile = None,
    placement: Placements = PlaceBy.auto,
    on_failure: common.OnFailures = None,
    exact: common.Exact = False,
    tune: Annotated[
        float | None,
        typer.Option(
            "--tune",
            min=0.0,
            metavar="SECONDS",
            help="Measure before, for so long, which kernels are fastest: nestc tune.",
        ),
    ] = None,
    emit: Annotated[
        list[Level] | None,
        typer.Option(
            "--emit",
            help="Write an intermediate form into --emit-dir; repeatable. `commands` writes, for each partition of a "
            "device that takes commands (vta, aim), all that another simulator needs to replay it.",
        ),
    ] = None,
    emit_dir: Annotated[
        Path | None, typer.Option("--emit-dir", metavar="DIR", help="Where --emit writes. [default: emit]")
    ] = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Compile a model into one bundle of native code, quantized first if asked for.

    Example: `nestc compile resnet50.onnx -o resnet50.nest --dim batch=1 --threads 2`

    Quantized: `nestc compile m.onnx --calibrate images --preprocess imagenet --quantize int8`
    """
    options = {name: value for name, value in locals().items() if name not in _NOT_IN_KEY}
    started = time.perf_counter()
    common.require_file(model)
    if common.is_bundle(model):
        raise Error(f"{model} is a bundle already; compile takes a model (.onnx)")
    destination = output or Path(model.name).with_suffix(".nest")
    if destination.is_dir() or not destination.parent.is_dir():
        reason = "is a folder" if destination.is_dir() else "is in a folder that does not exist"
        raise Error(f"cannot write {destination}: it {reason}")
    levels = emit or []
    target = common.exact_targets(target or ["cpu"], exact)
    from nestc import compiled

    asked = None if verbose or tune is not None else _request(model, target, options)
    kept = None if asked is None else compiled.fetch(asked, destination)
    if kept is not None:
        _tell({**kept, "bundle": str(destination), "seconds": _since(started)}, json)
        return
    sink = Sink(emit_dir or Path("emit"), levels) if levels else None

    from nestc.driver import compile as compile_model
    from nestc.targets import resolve

    chosen = resolve(target, {"threads": threads})
    source, shapes, dims, told = planned_source(
        model, target, shape, dim, calibrate, scheme, accuracy_budget, overrides, tools, labels, split, preprocess,
        limit, threads,
    )  # fmt: skip
    if tune is not None:
        from nestc.tuning import cpu_for, tune_model

        with common.progress() as step:
            tune_model(source, cpu_for(chosen), seconds=tune, shapes=shapes, dims=dims, progress=step)
        chosen = resolve(target, {"threads": threads})  # anew, since a target knows what was known when it was made
    with common.progress() as step:
        executable = compile_model(
            source,
            targets=chosen,
            threads=threads,
            shapes=shapes,
            dims=dims,
            objective=objective.value,
            plan=plan,
            placement=placement.value,
            on_failure=None if on_failure is None else on_failure.value,
            emit=sink,
            bound=True,
            progress=step,
        )
        executable.save(destination)
    if sink is not None and Level.graph in levels:
        sink.model(executable)
    if sink is not None and Level.commands in levels:
        sink.commands(executable, chosen)
    report = summary(executable)
    taking = {partition["device"] for partition in report["partitions"]}
    idle = [each.name for each in chosen if each.name not in taking]
    if asked is not None and not idle:
        compiled.keep(asked, destination, report)
    report |= {"bundle": str(destination), "seconds": _since(started)}
    if told is not None:
        report["quantized"] = told
    _tell(report, json, sink)
    for name in [] if json else idle:
        print(f"  {name} takes nothing: nestc explain {model} --target {name} says why")


def _request(model: Path, targets: Sequence[str], options: Mapping[str, Any]) -> compiled.Request | None:
    """The request under which the bundle may have been kept; None where files or measurements decide, too, or more than
    the bundle is wanted."""
    files = any(isinstance(value, Path) for value in options.values())
    if files or options["emit"] or options["scheme"] is not None or options["placement"] is PlaceBy.cost:
        return None
    from nestc import compiled

    return compiled.request(model, targets, {name: repr(value) for name, value in options.items()})


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _tell(report: Mapping[str, Any], json: bool, sink: Sink | None = None) -> None:
    """Print the summary, for people or as one JSON object."""
    ordered = {name: report[name] for name in ("bundle", "seconds", *report)}
    if json:
        common.print_json(ordered)
    else:
        show(ordered, sink)


def planned_source(
    model: Path,
    target: Sequence[str] | None,
    shape: Sequence[str] | None,
    dim: Sequence[str] | None,
    calibrate: Path | None,
    scheme: str | None,
    accuracy_budget: float | None,
    overrides: Path | None,
    tools: list[str] | None,
    labels: Path | None,
    split: str | None,
    preprocess: str | None,
    limit: int | None,
    threads: int | None,
) -> tuple[Path | Model, dict[str, list[int]], dict[str, int], dict[str, Any] | None]:
    """The model that options ask for, quantized if so, with the sizes still to bind, and what quantizing reported."""
    shapes, dims = common.bindings(shape or [], dim or [])
    if scheme is None:
        if calibrate is not None or accuracy_budget is not None:
            raise Error("--calibrate and --accuracy-budget are for --quantize SCHEME, which is missing")
        return model, shapes, dims, None
    from nestc.graph.bind import bind
    from nestc.graph.model import require_static
    from nestc.importers.onnx import load

    bound = bind(load(model), shapes, dims)
    require_static(bound)  # a bundle has fixed shapes; said before minutes of calibration, not after
    source, told = quantize.calibrated(
        bound, scheme, calibrate,
        overrides=overrides, tools=tools, labels=labels, split=split, preprocess=preprocess, limit=limit,
        budget=accuracy_budget, threads=threads, targets=target or ["cpu"],
    )  # fmt: skip
    return source, {}, {}, told


def summary(executable: Executable | Specialised) -> dict[str, Any]:
    """What ``nestc compile --json`` says of a bundle."""
    plan, stats = executable.plan, executable.stats()
    simulated = {part.name: part.artifact.metadata.get("timing") for part in executable.bundle.partitions}
    return {
        "regions": len(plan.regions),
        "partitions": [
            {
                "device": partition.device,
                "regions": len(partition.regions),
                "ops": plan.ops(partition),
                **({"simulated": simulated[partition.name]} if simulated.get(partition.name) else {}),
            }
            for partition in plan.partitions
        ],
        "fallback_ops": plan.fallback_ops,
        "ways": dict(Counter(way for part in executable.bundle.partitions for way in ways_of(part.artifact).values())),
        "arena_bytes": stats["arena_bytes"],
        "weights_bytes": stats["weights_bytes"],
        "predicted_ms": plan.predicted_ms,
    }


def ways_of(artifact: Artifact) -> Mapping[str, str]:
    """The kernels of each region, by name, of an artifact that says so."""
    return artifact.metadata.get("ways", {})


def show(report: Mapping[str, Any], sink: Sink | None) -> None:
    """Print the summary for people."""
    print(f"{report['bundle']}: {report['regions']} regions compiled in {report['seconds']:.2f} s")
    for partition in report["partitions"]:
        ops = ", ".join(f"{op} {count}" for op, count in partition["ops"].items())
        print(f"  {partition['device']}: {partition['regions']} regions ({ops})")
        if "simulated" in partition:
            print(f"    {simulated_words(partition['simulated'])}")
    if "quantized" in report:
        told = report["quantized"]
        ops = ", ".join(f"{op} {count}" for op, count in told["quantized_ops"].items()) or "nothing"
        print(f"  {told['scheme']}: {ops}; float: {len(told['kept_float'])} nodes")
    if report["fallback_ops"]:
        listed = ", ".join(f"{op} {count}" for op, count in report["fallback_ops"].items())
        print(f"  interpreted, not compiled: {listed}")
    print(f"  weights {report['weights_bytes'] / 1e6:.1f} MB, working memory {report['arena_bytes'] / 1e6:.1f} MB")
    if sink is not None:
        print(f"  {len(sink.written)} intermediate forms in {sink.folder}")


def simulated_words(timing: Mapping[str, Any]) -> str:
    """What a simulator says of a partition, in a line."""
    count, unit = (timing["ticks"], "ticks") if "ticks" in timing else (timing["cycles"], "cycles")
    milliseconds = timing["seconds"] * 1e3
    took = f"{milliseconds:.3f} ms" if milliseconds >= 0.1 else f"{milliseconds * 1e3:.3f} us"
    words = [f"{count} {unit}, {took}"]
    engines = timing.get("engines", {})
    words += [f"{name} busy {100 * told['utilization']:.0f} %" for name, told in engines.items()]
    if "bandwidth_fraction" in timing:
        words.append(f"{100 * timing['bandwidth_fraction']:.0f} % of the internal bandwidth")
    return f"simulated: {', '.join(words)}, {_joules(timing['energy_joules'])}"


def _joules(energy: float) -> str:
    return f"{energy * 1e3:.3f} mJ" if energy >= 1e-4 else f"{energy * 1e6:.3f} uJ"


class Sink:
    """Writes intermediate forms of the levels asked for as files of a folder, one a form."""

    def __init__(self, folder: Path, levels: Sequence[Level]) -> None:
        self.folder = folder
        self.levels = frozenset(level.value for level in levels)
        self.written: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Error(f"cannot make the folder {folder}: {error.strerror or error}") from error

    def __call__(self, level: str, name: str, text: str) -> None:
        """Write one form; those of a level that nobody asked for are dropped."""
        if level not in self.levels:
            return
        # Names come from the model and may hold anything; two may become alike, so a number keeps them apart.
        stem = re.sub(r"[^\w.-]+", "_", name)[:120]
        path = self.folder / f"{stem}{SUFFIX[Level(level)]}"
        if path in self.written:
            path = path.with_name(f"{stem}-{len(self.written)}{SUFFIX[Level(level)]}")
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise Error(f"cannot write {path}: {error.strerror or error}") from error
        self.written.append(path)

    def model(self, executable: Executable | Specialised) -> None:
        """Write the graph with its regions as ``model.onnx``, without weights, for Netron and other viewers."""
        self._write(self.folder / "model.onnx", executable.bundle.graph)

    def commands(self, executable: Executable | Specialised, targets: Sequence[Target]) -> None:
        """Write what a replay of each partition needs whose device takes commands. Raises Error if none does."""
        from nestc.targets.api import Commanded

        makers = {target.name: target for target in targets if isinstance(target, Commanded)}
        parts = [part for part in executable.bundle.partitions if part.device in makers]
        if not parts:
            raise Error(
                "--emit commands: no partition runs on a device that takes commands; "
                "give such a target (--target vta or --target aim), and nestc explain for what it refuses"
            )
        for part in parts:
            for name, data in makers[part.device].commands(part.name, part.artifact).items():
                self._write(self.folder / name, data)

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file that appears only when it is complete."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise Error(f"cannot write {path}: {error.strerror or error}") from error
        self.written.append(path)
