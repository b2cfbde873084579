"""The roofline of each kernel, with times that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import nestc as package
from nestc.commands import bench
from nestc.report.kernels import Kernel, Limits, roofline
from nestc.report.roofs import Bandwidth, Ceiling, Roof

LIMITS = Limits(
    threads=1,
    roof=Roof((Ceiling("float32", 1e9),), 1e8, "measured", "made up"),
    bandwidths=(Bandwidth(512, 1e9), Bandwidth(100_000, 5e8)),
)
"""A billion operations a second, and as many bytes where 512 are used; half as many up to 100,000, a tenth beyond."""

CONV = {
    "symbol": "conv_0123456789abcdef",
    "origin": ("Conv:conv", "Relu:relu"),
    "us": 40.0,
    "team_us": None,
}


class Scripted:
    """An executable whose kernels take what the test says."""

    def __init__(self, on_cpu: package.Executable, rows: list[dict[str, Any]]) -> None:
        self.bundle = on_cpu.bundle
        self._rows = [{"partition": "cpu_0", "device": "cpu", **row} for row in rows]

    def stats(self) -> dict[str, Any]:
        return {"threads": 1, "weights_bytes": 2000}

    def profile(self, *arrays: Any, runs: int = 20) -> list[dict[str, Any]]:
        return self._rows


def found(on_cpu: package.Executable, *rows: dict[str, Any]) -> list[Kernel]:
    return list(roofline(Scripted(on_cpu, list(rows)), limits=LIMITS).kernels)  # pyright: ignore[reportArgumentType]


def test_arithmetic_is_the_roof_of_a_convolution(on_cpu: package.Executable) -> None:
    (kernel,) = found(on_cpu, CONV)
    assert kernel.shape == "1x3x8x8 * 4x3x3x3 -> 1x4x8x8"
    # 2 x 27 for each of 256 outputs, and one for the Relu; 192 floats in, 256 out, 108 + 4 of weights.
    assert (kernel.operations, kernel.data, kernel.weights) == (256 * 55, 4 * (192 + 256), 4 * 112)
    assert kernel.roof == "float32" and kernel.roof_ms == pytest.approx(256 * 55 / 1e6)
    assert kernel.gflops == pytest.approx(256 * 55 / 40e3) and kernel.gbytes == pytest.approx(2240 / 40e3)
    assert kernel.percent == pytest.approx(35.2) and kernel.above_ms == pytest.approx(0.04 - 0.01408)


def test_calls_of_the_same_nodes_are_one_kernel_named_after_the_longest(on_cpu: package.Executable) -> None:
    transform = {**CONV, "symbol": "winograd_input", "us": 1.0}
    product = {**CONV, "symbol": "winograd", "us": 5.0, "team_us": 4.0}
    (kernel,) = found(on_cpu, transform, product)
    assert kernel.name == "winograd" and [call.ms for call in kernel.calls] == [0.001, 0.004]
    assert kernel.ms == 0.005
    # Faster than the direct convolution can be: nothing to save.
    assert kernel.percent == pytest.approx(281.6) and kernel.above_ms == 0


def test_bytes_are_the_roof_of_a_pooling(on_cpu: package.Executable) -> None:
    (kernel,) = found(on_cpu, {"symbol": "pool", "origin": ("MaxPool:pool",), "us": 5.0, "team_us": None})
    assert kernel.roof == "bytes" and kernel.data == 4 * (256 + 64)
    assert kernel.roof_ms == pytest.approx(1280 / 5e5)  # more than 512 bytes, so of the second cache


def test_a_kernel_of_two_regions_has_the_work_of_both(on_cpu: package.Executable) -> None:
    origin = ("Conv:conv", "Relu:relu", "MaxPool:pool")
    (kernel,) = found(on_cpu, {"symbol": "conv_pool", "origin": origin, "us": 50.0, "team_us": None})
    assert kernel.shape == "1x3x8x8 * 4x3x3x3 -> 1x4x4x4"
    # Four for each of 64 windows more; what lies between the two crosses no border.
    assert (kernel.operations, kernel.data) == (256 * 55 + 256, 4 * (192 + 64))


def test_worst_first_and_what_has_no_roof_last(on_cpu: package.Executable) -> None:
    gemm = {"symbol": "gemm", "origin": ("Gemm:gemm",), "us": 500.0, "team_us": None}
    foreign = {"symbol": "vendor", "us": 9000.0}
    modelled = {"symbol": "vta", "us": 8000.0, "kind": "modelled", "origin": ("MaxPool:pool",)}
    kernels = found(on_cpu, foreign, CONV, modelled, gemm)
    assert [kernel.name for kernel in kernels] == ["gemm", CONV["symbol"], "vendor", "vta"]
    assert [kernel.percent is None for kernel in kernels] == [False, False, True, True]
    assert kernels[3].modelled and kernels[3].ms == 8.0
    data, weights = 4 * (64 + 5), 4 * (320 + 5)
    # Weights lie where the 2000 bytes of the whole model do.
    moving = data / 1e9 + weights / 5e8
    assert kernels[0].roof_ms == pytest.approx(1e3 * max(moving, kernels[0].operations / 1e9))


def test_a_change_of_layout_is_all_loss(on_cpu: package.Executable) -> None:
    (kernel,) = found(on_cpu, {"symbol": "layout_8_0", "origin": ("Identity:layout_8_0",), "us": 3.0, "team_us": None})
    assert (kernel.roof, kernel.roof_ms, kernel.percent, kernel.above_ms) == ("nothing", 0.0, 0.0, 0.003)


def test_totals_are_those_of_the_model(on_cpu: package.Executable) -> None:
    line = roofline(Scripted(on_cpu, [CONV]), limits=LIMITS)  # pyright: ignore[reportArgumentType]
    done = 256 * 55 + 256 + 2 * 64 * 5  # the convolution, the pooling, the product
    assert line.operations == done and line.numbers == "float32"
    about = json.loads(json.dumps(line.as_json(0.1)))
    assert about["total"]["percent_of_peak"] == pytest.approx(100 * done / 1e5)
    assert about["total"]["above_roof_ms"] == pytest.approx(about["kernels"][0]["above_roof_ms"])
    assert about["roofs"] == {
        "threads": 1,
        "gflops": {"float32": 1.0},
        "gbytes_per_second": {"512": 1.0, "100000": 0.5, "memory": 0.1},
    }
    assert line.as_json()["total"]["percent_of_peak"] == pytest.approx(100 * done / 4e4)


def test_table_merges_equal_kernels(on_cpu: package.Executable, capsys: pytest.CaptureFixture[str]) -> None:
    gemm = {"symbol": "r003_Gemm_0_0123456789abcdef", "origin": ("Gemm:gemm",), "us": 500.0, "team_us": None}
    again = {**CONV, "symbol": "conv_fedcba9876543210"}
    rows = [CONV, gemm, again, {"symbol": "vendor", "us": 9.0}]
    line = roofline(Scripted(on_cpu, rows), limits=LIMITS)  # pyright: ignore[reportArgumentType]
    bench.show_kernels(line, 2.0)
    printed = capsys.readouterr().out
    rows_of = [[cell.strip() for cell in text.split("│")[1:-1]] for text in printed.splitlines() if "│" in text]
    assert [row[0] for row in rows_of] == ["Gemm", "conv", "vendor"]
    assert rows_of[1][3:] == ["2", "0.080", "0.4", "0.1", "float32", "35", "0.052"]
    assert rows_of[2][5:] == ["-", "-", "-", "-", "-"]
    assert "a run 2.000 ms: 0.7 % of the float32 peak" in printed


def test_on_the_command_line(nestc: Any, on_cpu: package.Executable, tmp_path: Path) -> None:
    on_cpu.save(tmp_path / "small.nest")
    result = nestc("bench", tmp_path / "small.nest", "--threads", 1, "--runs", 2, "--kernels", "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    names = [node for kernel in report["kernels"] for node in kernel["nodes"]]
    assert {"Conv:conv", "MaxPool:pool", "Gemm:gemm"} <= set(names)
    assert report["total"]["latency_ms"] == report["nestc"]["median_ms"]
    above = [kernel["above_roof_ms"] for kernel in report["kernels"]]
    assert above == sorted(above, reverse=True) and report["roofs"]["gflops"]["float32"] > 0
