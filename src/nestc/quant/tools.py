"""The hook of the accuracy tools: a tool is a named function that runs at one of three moments of quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from nestc.errors import QuantizationError
from nestc.graph.model import Model
from nestc.quant.choose import Assignment
from nestc.quant.parameters import Parameters
from nestc.quant.profile import Profile
from nestc.quant.run import Batch, Compiler, Progress

Stage = Literal["before", "weights", "after"]


@dataclass
class Context:
    """What a tool may use and change.

    ``assignment`` has the scheme of every node. ``parameters`` is None before the weights are rounded, and what stage
    "weights" changes in place. ``quantized`` is the result as it stands, in stage "after". ``batches`` are the
    calibration data and may be iterated any number of times; None if the caller gave none. ``compiler`` compiles a
    model to something that runs it; ``calibrate`` makes the profile of a changed prepared model (None without data).
    ``notes`` is shown to the user: say what was done, in a sentence.
    """

    assignment: Assignment
    parameters: Parameters | None = None
    quantized: Model | None = None
    batches: Iterable[Batch] | None = None
    compiler: Compiler | None = None
    calibrate: Callable[[Model], Profile] | None = None
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list[str])

    def data(self, tool: str) -> Iterable[Batch]:
        """The calibration data. Raises QuantizationError if there are none."""
        if self.batches is None:
            raise QuantizationError(f"tool {tool!r} needs calibration data; give them with --data")
        return self.batches

    def compile(self, tool: str) -> Compiler:
        """The compiler. Raises QuantizationError if there is none."""
        if self.compiler is None:
            raise QuantizationError(f"tool {tool!r} runs the model, and no compiler was given")
        return self.compiler


@dataclass(frozen=True)
class Tool:
    """A tool of a name that users give, and the moment at which it runs; ``data``: whether it needs calibration data.

    ``run(prepared, profile, context)`` by stage:

    - ``before``: only schemes are chosen. It changes the float model `prepared` (cross-layer equalization,
      SmoothQuant) to one of the same results, in place, and returns the profile of the changed model: `profile` with
      the ranges that it has scaled, or ``context.calibrate(prepared)``. Names of nodes must stay.
    - ``weights``: scales are chosen and weights rounded to the nearest. It changes ``context.parameters`` in place
      (``Weight.values`` for AdaRound, ``biases`` for bias correction). The return value is `profile`.
    - ``after``: ``context.quantized`` is the quantized model, which it may change in place; returns `profile`.
    """

    name: str
    stage: Stage
    run: Callable[[Model, Profile, Context], Profile]
    data: bool = False
