"""benchmarks/aim.py: the public contract of its JSON object, and figures that are known."""

from __future__ import annotations

import json

import pytest

import aim
import aim_network
import nestc
import nets_attention


def test_the_json_object_has_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert aim.main(["--models", "none", "--gemv", "512x1024,100x200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"micro", "gemv", "elements", "nets", "context"} and found["nets"] == []
    assert len(found["micro"]) == 17
    assert all(row["ticks"] == row["golden"] for row in found["micro"].values())
    row = found["gemv"]["512x1024"]
    assert row["golden"] == row["plain_ticks"] == 415 and row["bound"] == 226
    assert row["relative_error"] < 2 * row["relative_error_numpy"]
    assert row["bandwidth_fraction"] == pytest.approx(512 * 1024 / (512 * 16 / 2) / row["ticks"])
    assert found["gemv"]["100x200"]["golden"] is None
    assert found["context"]["kind"] == "simulated" and {"seed", "cpu", "versions"} <= set(found["context"])


def test_a_network_is_simulated_and_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = aim_network.NetModel(
        "small",
        "an LSTM",
        lambda: nestc.load(nets_attention.lstm(32, 24, 2, 1)),
        lambda: aim_network._normal(x=(2, 24)),
    )
    monkeypatch.setattr(aim_network, "NETS", (small,))
    assert aim.main(["--models", "small", "--gemv", "", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["nets"]
    assert row["ticks"] == sum(layer["ticks"] for layer in row["layers"]) > 0
    assert row["total_ms"] == pytest.approx(row["aim_ms"] + row["rest_on_cpu_ms"])
    assert set(row["cpu_ms"]) == {"fp32", "bf16"} and row["relative_error"]["aim"] < 0.02
    named = row["kinds"]["simulated"] + row["kinds"]["measured"] + row["kinds"]["both"]
    assert set(named) <= set(row)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "vgg17"], "there is no network 'vgg17'; there are vgg16_classifier"),
        (["--gemv", "4096"], "write MxK"),
        (["--machine", "nowhere.yaml"], "cannot be read"),
    ],
)
def test_bad_options_are_told_in_a_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert aim.main(arguments) == 2
    assert words in capsys.readouterr().err
