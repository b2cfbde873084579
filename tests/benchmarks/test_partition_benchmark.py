"""The benchmark of placement on a network small enough for a test: rows predicted, run, and told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import nestc
from nestc.errors import Error


def small() -> tuple[nestc.Model, dict[str, np.ndarray]]:
    """A quantized network of two branches, and an input."""
    from netbuilder import NetBuilder

    net = NetBuilder("small", seed=1)
    x = net.conv(net.input("input", (1, 3, 12, 12)), 16, 3, activation="relu")
    x = net.concat([net.conv(x, 16, 3, activation="relu"), net.conv(x, 16, 1, activation="relu")])
    net.output(net.conv(x, 8, 1), "output")
    random = np.random.default_rng(2)
    data = [{"input": random.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(3)]
    model = nestc.load(net.model())
    return nestc.quantize(model, nestc.calibrate(model, data, threads=1), "int8-pow2", threads=1), data[0]


def test_cases_are_every_model_with_every_set() -> None:
    from partition_cases import cases

    found = cases("resnet18,minilm", "cpu+vta,cpu+onnxruntime", ["latency", "energy"], 1)
    assert [(case.model, case.label, case.objective, case.scheme) for case in found[:3]] == [
        ("resnet18", "cpu+vta", "latency", "int8-pow2"),
        ("resnet18", "cpu+vta", "energy", "int8-pow2"),
        ("minilm", "cpu+vta", "latency", "int8-pow2"),
    ]
    assert len(found) == 8 and len({case.slug for case in found}) == 8
    assert found[0].devices == ("cpu", "vta:config=zcu102_1x16") and found[0].simulated == ("vta",)
    assert found[-1].devices == ("cpu", "onnxruntime") and found[-1].scheme is None
    (other,) = cases("resnet18", "cpu+vta", ["latency"], 1, {"vta": "count=2"})
    assert other.devices == ("cpu", "vta:count=2")
    with pytest.raises(Error, match="the zoo has no model 'nothing'"):
        cases("nothing", "cpu+vta", ["latency"], 1)


def test_types_of_regions() -> None:
    from partition_plans import kind_of

    assert kind_of(["DequantizeLinear", "Conv", "Relu", "QuantizeLinear"]) == "Conv"
    assert kind_of(["DequantizeLinear", "Sigmoid", "QuantizeLinear"]) == "Sigmoid"
    assert kind_of(["QuantizeLinear"]) == "QuantizeLinear"


def test_gains_and_ratios() -> None:
    from partition_observe import Seen, ratios
    from partition_plans import best_single, gain

    assert gain(1.05, 1.0) == pytest.approx(5.0)
    assert best_single({"single_cpu": 3.0, "single_vta": 2.0, "viterbi": 1.0}) == ("single_vta", 2.0)
    assert best_single({"viterbi": 1.0}) is None
    ours, other = Seen((1.0, 2.0, 4.0, 1.0)), Seen((2.0, 3.0, 4.0, 2.0))
    assert ratios(ours, other) == pytest.approx((1.125, 1.75, 2.0))
    assert ours.median_ms == 1.5
    assert Seen((1.0, 3.0)).spread_percent == 50.0


@pytest.mark.parametrize("objective", ["latency", "throughput", "energy"])
def test_a_row(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import partition_rows
    from partition_cases import Case

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, inputs = small()
    monkeypatch.setattr(partition_rows, "model_of", lambda case, work: model)
    monkeypatch.setattr(Case, "inputs", lambda self: inputs)
    job = partition_rows.Job(Case("squeezenet11", ("cpu", "vta"), objective), tmp_path / "work", 1)
    assert partition_rows.known(job) is None
    row = partition_rows.prepare(job)
    assert "error" not in row, row
    unit = "mj" if objective == "energy" else "ms"
    assert set(row["baselines"]) == {"single_cpu", "single_vta", "type_based", "greedy", "viterbi", "heft"}
    assert row[f"lower_bound_{unit}"] <= row[f"predicted_{unit}"] * (1 + 1e-9)
    assert row["modelled"] == ["vta"] and row["regions"] > 2
    assert row["predicted"]["published_percent"] == {"type_based": 5.03, "viterbi": 2.73}
    kept = {file.stem for file in job.folder.glob("*.nest")}
    assert "nestc" in kept and kept == {file.stem for file in job.folder.glob("*.yaml")}
    seen = partition_rows.run(job)
    assert "error" not in seen, seen
    assert set(seen["observed"]) == {"nestc", *row["baselines"]}
    assert seen[f"observed_{unit}"] > 0
    assert json.loads((job.folder / "row.json").read_text()) == json.loads(json.dumps(seen))


def test_a_failure_is_told(tmp_path: Path) -> None:
    import partition_rows
    from partition_cases import Case

    row = partition_rows.run(partition_rows.Job(Case("resnet18", ("cpu", "vta")), tmp_path))
    assert row["model"] == "resnet18" and "is not in" in row["error"]


def test_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import partition

    row = {
        "model": "resnet18", "devices": "cpu+vta", "objective": "latency", "threads": 1, "scheme": "int8-pow2",
        "modelled": ["vta"], "regions": 3, "partitions": 2, "used": ["cpu", "vta"], "predicted_ms": 2.0,
        "lower_bound_ms": 1.9, "gap_percent": 5.26, "optimal": False, "method": "by hand",
        "baselines": {"single_cpu": 3.0, "viterbi": 2.5}, "refused": {"heft": "no memory"}, "same": {},
        "predicted": {
            "best_single": "single_cpu", "times_best_single": 1.5, "gains_percent": {"single_cpu": 50.0, "viterbi": 25.0},
            "published_percent": {"viterbi": 5.36},
        },
    }  # fmt: skip
    monkeypatch.setattr(partition, "rows_of", lambda jobs, observe, timeout, fresh: [dict(row) for _ in jobs])
    arguments = ["--models", "resnet18", "--devices", "cpu+vta", "--work", str(tmp_path)]
    assert partition.main(arguments) == 0
    told = capsys.readouterr().out
    assert "predicted 2.000 ms, bound 1.900, gap 5.26 %" in told
    assert "heft has no plan: no memory" in told
    assert "+25.00" in told
    assert partition.main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["rows"][0]["baselines"] == row["baselines"]
    assert answer["summary"]["largest_gap_percent"] == 5.26 and answer["context"]["seed"] == 0
    assert partition.main(["--objective", "speed"]) == 2
    assert "there is no objective 'speed'" in capsys.readouterr().err
    assert partition.main(["--threads", "0"]) == 2
