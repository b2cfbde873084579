"""Tuning a model for the CPU: the ways to compute its regions are measured, here or on other machines of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nestc.driver import Progress, Source, build, with_fallbacks
from nestc.errors import TargetError
from nestc.graph.bind import bind
from nestc.graph.model import Model, require_static
from nestc.importers.onnx import load
from nestc.targets.api import Target
from nestc.targets.cpu.target import CpuTarget
from nestc.tune.run import Report, one_by_one, tune


def tune_model(
    model: Source,
    target: CpuTarget,
    *,
    seconds: float = 60.0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    cluster: str | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure how the CPU computes the regions of a model fastest, for about so many `seconds`.

    Results go into the user's tuning store, which every target that is made afterwards for this kind of machine and
    number of threads asks. `cluster` is the address of a Dask scheduler whose workers measure instead. What is known
    already is not measured, unless `again`. Raises ShapeError where a size is not bound, TargetError if code for the
    target does not run here, or on no worker.
    """
    loaded = bind(model if isinstance(model, Model) else load(model), shapes, dims)
    require_static(loaded)
    done = build(loaded, with_fallbacks([target], target.threads), threads=target.threads, stop_after="plan")
    partitions = [each for each in done.partitions if each.device == target.name]
    if cluster is None:
        return tune(target, partitions, seconds, runner=one_by_one, again=again, progress=progress)
    from nestc.tune.cluster import connected

    with connected(cluster) as runner:
        return tune(target, partitions, seconds, runner=runner, again=again, progress=progress)


def cpu_for(targets: Sequence[Target]) -> CpuTarget:
    """The CPU among some targets. Raises TargetError if there is none."""
    cpu = next((target for target in targets if isinstance(target, CpuTarget)), None)
    if cpu is None:
        listed = ", ".join(target.name for target in targets)
        raise TargetError(f"only the target cpu is tuned, which is not among the targets given ({listed})")
    return cpu
