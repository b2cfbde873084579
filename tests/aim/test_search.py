"""The search of mappings: what it finds for shapes with known ticks, and that it keeps what it found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from machines_small import small

from nestc.cache import TuningStore
from nestc.errors import TargetError
from nestc.runtime.aim.machine import preset
from nestc.runtime.aim.timing import simulate_timing
from nestc.targets.aim import search as searching
from nestc.targets.aim.compiler import compile_layers, without_host
from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.mapping import Mapping, plan
from nestc.targets.aim.search import best, estimate, search


def _layer(m: int, k: int, vectors: int = 1, activation: str | None = None) -> MatrixVector:
    return MatrixVector("layer", np.broadcast_to(np.float32(0), (m, k)), None, activation, "x", "y", vectors)


@pytest.mark.parametrize(
    ("m", "k", "ticks", "golden"),
    [
        (512, 1024, 414, 415),
        (4096, 1024, 2418, 2417),
        (1024, 4096, 2419, 2801),
        (4096, 4096, 8904, 9665),
        (1000, 2048, 1273, 1401),
    ],
)
def test_ticks_beside_the_public_simulators(m: int, k: int, ticks: int, golden: int) -> None:
    """Modelled ticks of the stream that is found, without the host's accesses to registers, which golden traces lack."""
    machine = preset("gddr6_aim")
    mapping = search(_layer(m, k), machine)[0].mapping
    program = compile_layers([_layer(m, k)], machine, choose=lambda *_: mapping)
    assert simulate_timing(without_host(program.launches[0].commands), machine).ticks == ticks
    assert ticks <= golden + 1


def test_large_layers_share_slices_among_channels() -> None:
    """VGG16's first classifier layer: 25 slices of 63 columns, so that EWMUL has a free column, over 32 channels."""
    found = plan(_layer(4096, 25088), Mapping(25, even=False, opener=True), preset("gddr6_aim"))
    assert (found.layout.width, found.items, found.layout.spares) == (63, 200, 0)
    estimates = {
        mapping: estimate(plan(_layer(4096, 25088), mapping, preset("gddr6_aim")), preset("gddr6_aim"))
        for mapping in (Mapping(25, even=False, opener=True), Mapping(25, even=True), Mapping(32, opener=True))
    }
    assert min(estimates, key=lambda mapping: estimates[mapping]) == Mapping(25, even=False, opener=True)


@pytest.mark.parametrize(("m", "k"), [(512, 1024), (2048, 4096), (3072, 768), (700, 3000), (100, 100), (96, 1500)])
def test_the_closed_form_is_near_the_model(m: int, k: int) -> None:
    layer, machine = _layer(m, k), preset("gddr6_aim")
    for found in search(layer, machine, timed=4):
        assert estimate(plan(layer, found.mapping, machine), machine) == pytest.approx(found.ticks, rel=0.16, abs=30)


def test_the_best_of_all_is_timed() -> None:
    """On a small machine every mapping can be timed; the search loses little by its closed form."""
    layer, machine = _layer(90, 50), small(3, 6)
    every = search(layer, machine, timed=1000)
    assert search(layer, machine)[0].ticks <= 1.1 * every[0].ticks


def test_few_outputs_are_spread_over_channels() -> None:
    """Ten outputs fill no bank of most channels; K is cut finely instead, so that each channel has a piece."""
    mapping = search(_layer(10, 4096), preset("gddr6_aim"))[0].mapping
    assert mapping.slices == 32


def test_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.sqlite"
    monkeypatch.setattr(searching, "TuningStore", lambda: TuningStore(path))
    layer, machine = _layer(300, 500), preset("gddr6_aim")
    first = best(layer, machine)
    monkeypatch.setattr(searching, "search", lambda *_: pytest.fail("it was found before"))
    assert best(layer, machine) == first
    with pytest.raises(pytest.fail.Exception):
        best(_layer(301, 500), machine)


def test_what_has_no_mapping_is_refused() -> None:
    with pytest.raises(TargetError, match="no mapping"):
        search(_layer(4, 10**4), small(2, 2))
