import pytest

import vta_tvm
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.report import count_work
from vta_tvm import NETWORKS, Convolution, Tiles


def test_published_cycles_of_networks_are_reproduced() -> None:
    rows = {row.network: row for row in vta_tvm.networks()}
    assert {name: row.ideal for name, row in rows.items()} == {
        "resnet18": 6_623_232,
        "resnet34": 13_848_576,
        "resnet50_v2": 15_504_384,
    }
    for row in rows.values():
        assert row.simulated == pytest.approx(row.published, rel=0.05)


@pytest.mark.parametrize(
    ("layer", "tiles"),
    [
        (Convolution(8, 32, 64, 3, 1), Tiles(4, 8, 1, 2)),
        (Convolution(8, 64, 32, 1, 2), Tiles(2, 2, 2, 1, "rows")),
        (Convolution(7, 16, 32, 3, 2), Tiles(4, 2, 1, 1)),
    ],
)
def test_a_stream_does_the_work_of_its_layer(layer: Convolution, tiles: Tiles) -> None:
    work = count_work(vta_tvm.stream(layer, tiles), VtaConfig())
    results = layer.output**2 * layer.outputs // 16
    assert work.gemm == layer.ideal
    assert (work.reset, work.alu_tensor, work.alu_immediate) == (results, results, 5 * results)
    assert work.written == results * 16


def test_the_tiles_are_those_that_the_search_finds() -> None:
    layers = {layer: tiles for _, net in NETWORKS.values() for _, layer, tiles in net}
    layer = Convolution(56, 64, 64, 3, 1)
    assert vta_tvm.search(layer) == layers[layer]
