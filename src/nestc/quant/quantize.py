"""Quantize a model: prepare, choose, run tools, derive parameters, write the result; reads top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from nestc.errors import QuantizationError
from nestc.graph.model import Model
from nestc.quant.apply import apply
from nestc.quant.choose import Wishes, choose, require_float
from nestc.quant.derive import derive
from nestc.quant.prepare import prepare
from nestc.quant.profile import Profile
from nestc.quant.run import Batch, Compiler, Progress
from nestc.quant.saturate import drop_saturated
from nestc.quant.scheme import Scheme
from nestc.quant.tools import Context, Stage, Tool


def quantize(
    model: Model,
    profile: Profile | None,
    scheme: Scheme,
    overrides: Mapping[str, Scheme | None] | None = None,
    tools: Sequence[Tool] = (),
    *,
    wishes: Wishes | None = None,
    batches: Iterable[Batch] | None = None,
    compiler: Compiler | None = None,
    calibrate: Callable[[Model], Profile] | None = None,
    progress: Progress | None = None,
) -> Model:
    """The quantized model (QDQ) of a float model and the profile of its prepared form, `wishes` as for `choose`.

    Schemes that need no ranges of activations need no profile. `batches`, `compiler` and `calibrate` are for tools that
    need them. Raises QuantizationError for a model that is quantized already, ModelError for a profile of another
    model, and what `choose` and the tools raise.
    """
    require_float(model)
    prepared = prepare(model)
    if profile is None:
        needs = next(
            (each for each in (scheme, *(overrides or {}).values()) if each is not None and each.integer), None
        )
        if needs is not None:
            raise QuantizationError(f"scheme {needs.name} needs a profile of the model; make one with nestc calibrate")
        profile = Profile(prepared.hash, "minmax", 0, {})
    profile.require(prepared.hash)

    # The choice is made before the tools that change the float model, which ask it what will be quantized, and again
    # after them, since they may add nodes.
    assignment = choose(prepared, scheme, overrides, profile, wishes)
    context = Context(assignment, None, None, batches, compiler, calibrate, progress)
    profile = _run("before", tools, prepared, profile, context)
    if any(tool.stage == "before" for tool in tools):
        context.assignment = choose(prepared, scheme, overrides, profile, wishes)

    context.parameters = derive(prepared, profile, context.assignment)
    profile = _run("weights", tools, prepared, profile, context)
    context.quantized = apply(prepared, context.assignment, context.parameters)
    # Equalization gives every channel a bound of its own; most of them are wider than what the integers hold.
    drop_saturated(context.quantized)
    _run("after", tools, prepared, profile, context)
    context.quantized.notes.extend(context.notes)
    return context.quantized


def _run(stage: Stage, tools: Sequence[Tool], prepared: Model, profile: Profile, context: Context) -> Profile:
    """Run the tools of one moment, in the order given."""
    for tool in tools:
        if tool.stage == stage:
            profile = tool.run(prepared, profile, context)
    return profile
