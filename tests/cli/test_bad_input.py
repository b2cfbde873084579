"""Whatever is wrong with the input: one sentence on stderr, exit status 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from .conftest import write


def expect(result, *said: str) -> None:
    assert result.status == 2, result
    assert result.err.startswith("nestc: ") and result.err.count("\n") == 1, result.err
    assert result.out == ""
    for words in said:
        assert words in result.err, result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["complie", "x.onnx"], "Did you mean 'compile'"),
        (["compile", "--taget", "cpu", "x.onnx"], "--target"),
        (["compile"], "MODEL"),
        (["compile", "x.onnx", "--threads", "0"], "--threads"),
        (["compile", "x.onnx", "--threads", "two"], "--threads"),
        (["compile", "x.onnx", "--emit", "assembly"], "asm"),
        (["compile", "x.onnx", "--objective", "speed"], "latency"),
    ],
)
def test_misspelt_commands_and_options(nestc, arguments: list[str], said: str) -> None:
    result = nestc(*arguments)
    assert result.status == 2
    assert said in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("command", ["compile", "run", "explain"])
def test_no_such_file(nestc, tmp_path: Path, command: str) -> None:
    expect(nestc(command, tmp_path / "none.onnx"), "there is no file", "none.onnx")


@pytest.mark.parametrize("command", ["compile", "run", "explain"])
def test_a_folder_instead_of_a_file(nestc, tmp_path: Path, command: str) -> None:
    expect(nestc(command, tmp_path), "is a folder")


@pytest.mark.parametrize("command", ["compile", "run", "explain"])
@pytest.mark.parametrize("content", [b"", b"this is no model", os.urandom(64)], ids=["empty", "text", "noise"])
def test_a_file_that_is_not_onnx(nestc, tmp_path: Path, command: str, content: bytes) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    expect(nestc(command, tmp_path / "bad.onnx"), "bad.onnx")


def test_a_cut_model(nestc, mlp: Path) -> None:
    mlp.write_bytes(mlp.read_bytes()[:-20])
    expect(nestc("compile", mlp, "-o", mlp.with_suffix(".nest")), "mlp.onnx")
    assert not mlp.with_suffix(".nest").exists()


def test_a_cut_bundle(nestc, tmp_path: Path) -> None:
    (tmp_path / "cut.nest").write_bytes(b"PK\x03\x04 not really")
    expect(nestc("run", tmp_path / "cut.nest"), "cut.nest")


def test_an_unknown_target(nestc, mlp: Path) -> None:
    expect(nestc("compile", mlp, "--target", "cqu"), "unknown target 'cqu'", "did you mean 'cpu'")


def test_an_open_dimension(nestc, open_mlp: Path) -> None:
    out = open_mlp.with_suffix(".nest")
    expect(nestc("compile", open_mlp, "-o", out), "'batch'", "--dim batch=SIZE")
    assert not out.exists()
    expect(nestc("run", open_mlp), "--dim batch=SIZE")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--dim", "bach=1", "'bach'"),
        ("--dim", "batch", "NAME=SIZE"),
        ("--dim", "batch=none", "NAME=SIZE"),
        ("--shape", "x=1,two", "NAME=D0,D1"),
        ("--shape", "z=1,4", "'z'"),
        ("--shape", "x=1,4,1", "rank"),
        ("--shape", "x=1,5", ""),
    ],
)
def test_sizes_that_do_not_fit(nestc, open_mlp: Path, option: str, value: str, said: str) -> None:
    expect(nestc("explain", open_mlp, option, value), said)


def test_an_unknown_operator(nestc, tmp_path: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="frob", domain="com.example")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    expect(nestc("compile", tmp_path / "m.onnx"), "Frobnicate", "frob")


@pytest.mark.parametrize("place", ["missing/m.nest", "folder"])
def test_a_place_that_cannot_be_written(nestc, tmp_path: Path, mlp: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    expect(nestc("compile", mlp, "-o", tmp_path / place), "cannot write")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "mlp.onnx"]


def test_options_for_models_are_refused_for_bundles(nestc, tmp_path: Path) -> None:
    (tmp_path / "b.nest").write_bytes(b"PK")
    expect(nestc("run", tmp_path / "b.nest", "--dim", "batch=1"), "--dim is for a model")
    expect(nestc("compile", tmp_path / "b.nest"), "is a bundle already")


def test_errors_of_a_process(tmp_path: Path) -> None:
    """The real entry point: status and streams as a shell sees them, and no traceback unless asked for."""
    script = "import sys; from nestc.cli import main; main()"
    for debug in (False, True):
        arguments = ["compile", str(tmp_path / "none.onnx"), *(["--debug"] if debug else [])]
        found = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
        assert found.returncode == 2
        assert found.stdout == ""
        assert ("Traceback" in found.stderr) == debug


def test_a_bug_of_ours_is_said_to_be_one(nestc, mlp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nestc.graph import pipeline

    def broken(model):
        raise RuntimeError("impossible")

    monkeypatch.setattr(pipeline, "optimize", broken)
    result = nestc("explain", mlp)
    assert result.status == 1
    assert result.err == "nestc: a bug in nestc, RuntimeError: impossible (--debug shows where)\n"


class TestInputs:
    """What ``--input`` refuses."""

    @pytest.fixture
    def bundle(self, nestc, mlp: Path) -> Path:
        out = mlp.with_suffix(".nest")
        assert nestc("compile", mlp, "-o", out).status == 0
        return out

    @pytest.mark.parametrize(
        ("array", "said"),
        [
            (np.ones((2, 5), np.float32), "float32[2,5]"),
            (np.ones((4,), np.float32), "float32[4]"),
            (np.ones((2, 4), np.float64), "float64"),
        ],
    )
    def test_arrays_that_do_not_fit(self, nestc, bundle: Path, tmp_path: Path, array: np.ndarray, said: str) -> None:
        np.save(tmp_path / "a.npy", array)
        expect(nestc("run", bundle, "--input", f"x={tmp_path / 'a.npy'}"), "'x'", said)

    def test_a_name_that_is_no_input(self, nestc, bundle: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.ones((2, 4), np.float32))
        expect(nestc("run", bundle, "--input", f"xx={tmp_path / 'a.npy'}"), "no input 'xx'", "did you mean 'x'")

    @pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.png", "a.txt"])
    def test_files_that_are_not_what_they_say(self, nestc, bundle: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"nothing of the kind")
        expect(nestc("run", bundle, "--input", f"x={tmp_path / name}"))

    def test_pickles_are_never_read(self, nestc, bundle: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
        expect(nestc("run", bundle, "--input", f"x={tmp_path / 'a.npy'}"), "a.npy")

    def test_an_output_that_cannot_be_written(self, nestc, bundle: Path, tmp_path: Path) -> None:
        expect(nestc("run", bundle, "-o", tmp_path / "none" / "out.npz"), "cannot write")


def test_images_need_an_image_input(nestc, mlp: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    expect(nestc("run", mlp, "--input", f"x={tmp_path / 'a.png'}"), "no image")


def test_values_of_two_types_do_not_make_a_model(nestc, tmp_path: Path) -> None:
    path = tmp_path / "types.onnx"
    write(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, [1])],
        [("y", TensorProto.FLOAT, [1])],
    )
    import onnx

    model = onnx.load(path)
    model.graph.node[0].op_type = "Add"
    path.write_bytes(model.SerializeToString())
    expect(nestc("compile", path), "types.onnx")


def test_json_is_all_that_json_prints(nestc) -> None:
    result = nestc("targets", "--json")
    assert result.status == 0
    assert set(json.loads(result.out)["targets"]) >= {"cpu", "host"}
