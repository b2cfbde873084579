"""The scripts in examples/ run, and print what they promise."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
OCR = ("ch_PP-OCRv4_det_infer.onnx", "ch_PP-OCRv4_rec_infer.onnx")


def printed(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a script prints when it is run with these arguments."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_short_and_says_how_it_is_run() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert [script.stem for script in scripts] == [
        "classify_image", "plan_devices", "quantize_your_data", "read_text", "watch_pipeline"
    ]  # fmt: skip
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 60 and f"python examples/{script.name}" in text


def test_classify_image(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "ankle boot" in printed("classify_image", monkeypatch, capsys).splitlines()[0]
    from PIL import Image

    from nestc.demo import labelled_images

    bag = (labelled_images()[0][18, 0] * 255).astype("uint8")
    Image.fromarray(bag).resize((56, 56)).save(tmp_path / "bag.png")
    assert "bag" in printed("classify_image", monkeypatch, capsys, str(tmp_path / "bag.png")).splitlines()[0]


def test_quantize_your_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed("quantize_your_data", monkeypatch, capsys).splitlines()
    assert "  9 Conv on integers" in lines
    assert any(line.endswith("in float 94.50%, on 400 images") for line in lines)


def test_plan_devices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("plan_devices", monkeypatch, capsys)
    assert "for latency:" in text and "for energy:" in text and "moved to the CPU by hand" in text
    right = int(text.splitlines()[-1].split()[0])
    assert right >= 17


def test_watch_pipeline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    text = printed("watch_pipeline", monkeypatch, capsys, str(trace))
    assert "requests a second (modelled)" in text
    for device in ("cpu ", "vta ", "aim ", "cpu->vta", "vta->cpu"):
        assert f"request 0  {device}" in text
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


def test_read_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stored = {name: next((ROOT / "benchmarks" / ".zoo").glob(f"*{name}"), None) for name in OCR}
    if importlib.util.find_spec("rapidocr_onnxruntime") is None and None in stored.values():
        pytest.skip("the networks are in rapidocr-onnxruntime, which is not installed")
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (480, 160), "white")
    for row, words in enumerate(("Compiled networks", "read this line")):
        ImageDraw.Draw(picture).text((24, 16 + 68 * row), words, "black", ImageFont.load_default(40))
    picture.save(tmp_path / "page.png")
    given = [str(tmp_path / "page.png")]
    if None not in stored.values():
        for name, path in stored.items():
            assert path is not None
            (tmp_path / name).symlink_to(path)
        given.append(str(tmp_path))
    assert printed("read_text", monkeypatch, capsys, *given).splitlines() == ["Compiled networks", "read this line"]
    with pytest.raises(SystemExit, match="pip install"):
        printed("read_text", monkeypatch, capsys)
