"""How the quantizer runs models: it never compiles one itself, whoever calls it hands in a compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nestc.graph.model import Model

Batch = Mapping[str, np.ndarray]
"""One array for each input of a model, by its name."""

Runner = Callable[[Batch], dict[str, np.ndarray]]
"""Runs a compiled model: arrays by input name in, arrays by output name out."""

Compiler = Callable[[Model], Runner]
"""Compiles a model, of static or open shapes, to something that runs it (`nestc.quantization.compiler`)."""

Progress = Callable[[str, float], None]
"""Told what is being done and how far it is (0 to 1)."""
