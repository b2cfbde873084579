"""Data sets: the forms that samples and labels come in, and one sentence for each fault."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestc.datasets import Dataset, open_data
from nestc.errors import DataError, Error, ShapeError

ONE = {"x": ("float32", (1, 3))}
OPEN = {"x": ("float32", ("batch", 3))}
FOUR = {"x": ("float32", (4, 3))}
VALUES = np.arange(24, dtype=np.float32).reshape(8, 3)


def every(data: Dataset, name: str = "x") -> np.ndarray:
    return np.concatenate([batch[name] for batch in data])


def labels(path: Path, *rows: str, header: str = "file,label,split") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


class TestArchive:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        np.savez(tmp_path / "a.npz", x=VALUES)
        return tmp_path / "a.npz"

    @pytest.mark.parametrize(("inputs", "batch", "sizes"), [(ONE, 1, [1] * 8), (FOUR, 1, [4, 4]), (OPEN, 3, [3, 3, 2])])
    def test_batches(self, path: Path, inputs, batch: int, sizes: list[int]) -> None:
        data = open_data(path, inputs, batch=batch)
        assert [len(batch["x"]) for batch in data] == sizes
        assert len(data) == len(sizes) and data.samples == 8
        np.testing.assert_array_equal(every(data), VALUES)
        np.testing.assert_array_equal(every(data), VALUES)  # again, from the start

    def test_a_batch_that_cannot_be_filled(self, path: Path) -> None:
        with pytest.raises(ShapeError, match="7 samples do not fill batches of 4.*limit them to 4"):
            open_data(path, FOUR, limit=7)

    def test_labels(self, path: Path, tmp_path: Path) -> None:
        table = labels(tmp_path / "l.csv", "3,7,test", "0,9,train", "1,8,test")
        data = open_data(path, ONE, labels=table, split="test")
        assert data.labels is not None and data.labels.tolist() == [7, 8] and data.names == ["3", "1"]
        np.testing.assert_array_equal(every(data), VALUES[[3, 1]])
        np.save(tmp_path / "l.npy", np.arange(8))
        held = open_data(path, ONE, labels=tmp_path / "l.npy", limit=2)
        assert held.labels is not None and held.labels.tolist() == [0, 1]
        given = open_data(path, ONE, labels=range(8))
        assert given.labels is not None and given.labels.sum() == 28

    def test_whole_inputs(self, tmp_path: Path) -> None:
        inputs = {"x": ("float32", (1, 3)), "state": ("float32", (2, 1, 4)), "rate": ("int64", ())}
        state = np.random.default_rng(0).random((8, 2, 1, 4), np.float32)
        np.savez(tmp_path / "a.npz", x=VALUES, state=state, rate=np.arange(8))
        batches = list(open_data(tmp_path / "a.npz", inputs))
        assert len(batches) == 8
        assert [batches[5][name].shape for name in inputs] == [(1, 3), (2, 1, 4), ()]
        np.testing.assert_array_equal(batches[5]["state"], state[5])
        assert batches[5]["rate"] == 5

    def test_whole_batches(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=VALUES.reshape(2, 4, 3))
        data = open_data(tmp_path / "a.npz", FOUR)
        assert [batch["x"].shape for batch in data] == [(4, 3), (4, 3)]
        np.testing.assert_array_equal(every(data), VALUES)

    @pytest.mark.parametrize(
        ("arrays", "said"),
        [
            ({"y": VALUES}, "holds no array 'x'.*it holds y"),
            ({"x": VALUES[:, :2]}, r"shape \[1, 2\]"),
            ({"x": VALUES[0]}, "first axis must be samples"),
            ({"x": VALUES[:0]}, "has no samples"),
            ({"x": np.where(VALUES == 10, np.nan, VALUES)}, "sample 3: 'x' contains NaN"),
            ({"x": np.where(VALUES == 10, np.inf, VALUES)}, "sample 3: 'x' contains infinity"),
            ({"x": VALUES.astype(np.int32)}, "int32, but the input takes float32"),
        ],
    )
    def test_bad_arrays(self, tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(Error, match=said):
            list(open_data(tmp_path / "a.npz", ONE))

    def test_files_that_are_no_archive_of_arrays(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("x", b"text")
        (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-10])
        np.save(tmp_path / "c.npy", VALUES)
        (tmp_path / "c.npy").rename(tmp_path / "c.npz")
        for name in "abc":
            with pytest.raises(DataError, match=rf"{name}\.npz is not an \.npz file that can be read"):
                open_data(tmp_path / f"{name}.npz", ONE)

    def test_arrays_of_different_lengths(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=VALUES, y=VALUES[:5])
        with pytest.raises(DataError, match="differ in their number of samples, 5, 8"):
            open_data(tmp_path / "a.npz", {**ONE, "y": ("float32", (1, 3))})

    def test_types_that_fit(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=VALUES.astype(np.float64), n=np.arange(8, dtype=np.int32)[:, None])
        batch = next(iter(open_data(tmp_path / "a.npz", {**ONE, "n": ("int64", (1, 1))})))
        assert batch["x"].dtype == np.float32 and batch["n"].dtype == np.int64
        with pytest.raises(ShapeError, match="takes uint8"):
            np.savez(tmp_path / "b.npz", x=VALUES.astype(np.int32) - 1)
            list(open_data(tmp_path / "b.npz", {"x": ("uint8", (1, 3))}))


class TestFolder:
    def test_samples_and_batches(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", VALUES[0])  # without a batch axis
        np.save(tmp_path / "b.npy", VALUES[1:2])
        np.save(tmp_path / "c.npy", VALUES[2:5])
        np.savez(tmp_path / "d.npz", x=VALUES[5:])
        for inputs in (ONE, OPEN, FOUR):
            data = open_data(tmp_path, inputs)
            assert data.names == [
                "a.npy",
                "b.npy",
                "c.npy[0]",
                "c.npy[1]",
                "c.npy[2]",
                *(f"d.npz[{i}]" for i in range(3)),
            ]
            np.testing.assert_array_equal(every(data), VALUES)

    def test_whole_calls(self, tmp_path: Path) -> None:
        inputs = {"x": ("float32", (4, 3)), "rate": ("int64", ())}
        for index in range(2):
            np.savez(tmp_path / f"{index}.npz", x=VALUES[4 * index : 4 * index + 4], rate=np.int64(index))
        data = open_data(tmp_path, inputs)
        assert len(data) == 2
        np.testing.assert_array_equal(every(data), VALUES)

    def test_labels_choose_files(self, tmp_path: Path) -> None:
        for index in range(4):
            np.save(tmp_path / f"{index}.npy", VALUES[index])
        table = labels(tmp_path / "l.csv", "2.npy,5,a", "0.npy,6,a", "1.npy,7,b")
        data = open_data(tmp_path, ONE, labels=table, split="a")
        assert data.labels is not None and data.labels.tolist() == [5, 6]
        np.testing.assert_array_equal(every(data), VALUES[[2, 0]])

    @pytest.mark.parametrize(
        ("rows", "split", "said"),
        [
            (["0.npy,1,a", "9.npy,2,a"], None, "'9.npy'.*no such sample"),
            (["0.npy,x,a"], None, "line 2: the label 'x' is not an integer"),
            (["0.npy,1,a", "0.npy,1,a"], None, "lists 0.npy twice"),
            (["0.npy,1,a"], "b", "no row of split 'b'; the splits are a"),
            ([], None, "lists no samples"),
            (["many.npy,1,a"], None, "one of several samples"),
        ],
    )
    def test_bad_labels(self, tmp_path: Path, rows: list[str], split: str | None, said: str) -> None:
        np.save(tmp_path / "0.npy", VALUES[0])
        np.save(tmp_path / "many.npy", VALUES)
        with pytest.raises(DataError, match=said):
            open_data(tmp_path, ONE, labels=labels(tmp_path / "l.csv", *rows), split=split)

    def test_label_files_of_other_kinds(self, tmp_path: Path) -> None:
        np.save(tmp_path / "0.npy", VALUES[0])
        with pytest.raises(DataError, match="no column 'label'"):
            open_data(tmp_path, ONE, labels=labels(tmp_path / "l.csv", "0.npy,1", header="file,class"))
        with pytest.raises(DataError, match=r"CSV.*or a \.npy"):
            open_data(tmp_path, ONE, labels=tmp_path / "l.txt")
        with pytest.raises(DataError, match="cannot be read"):
            open_data(tmp_path, ONE, labels=tmp_path / "none.csv")
        with pytest.raises(DataError, match="2 labels for the 1 samples"):
            open_data(tmp_path, ONE, labels=[1, 2])
        with pytest.raises(DataError, match="one integer a sample"):
            open_data(tmp_path, ONE, labels=np.array([0.5]))
        with pytest.raises(DataError, match="column split"):
            open_data(tmp_path, ONE, split="a")

    def test_bad_folders(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no data"):
            open_data(tmp_path / "none", ONE)
        with pytest.raises(DataError, match="has no .npy"):
            open_data(tmp_path, ONE)
        (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
        with pytest.raises(DataError, match=r"a\.npy"):
            open_data(tmp_path, ONE)
        np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
        with pytest.raises(DataError, match=r"a\.npy"):
            list(open_data(tmp_path, ONE))
        np.save(tmp_path / "a.npy", VALUES[0])
        with pytest.raises(ShapeError, match=r"inputs are x, y; give \.npz"):
            open_data(tmp_path, {**ONE, "y": ("float32", (1,))})
        with pytest.raises(DataError, match="preprocessing is for images"):
            open_data(tmp_path, ONE, preprocess="raw")
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        with pytest.raises(DataError, match="both images and arrays"):
            open_data(tmp_path, ONE)
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(DataError, match="is no data"):
            open_data(tmp_path / "a.txt", ONE)

    def test_bad_numbers(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", VALUES)
        with pytest.raises(DataError, match="limit"):
            open_data(tmp_path, ONE, limit=0)
        with pytest.raises(DataError, match="batch"):
            open_data(tmp_path, OPEN, batch=0)
        with pytest.raises(ShapeError, match="no inputs"):
            open_data(tmp_path, {})

    def test_samples_of_several_shapes_make_no_batch(self, tmp_path: Path) -> None:
        inputs = {"x": ("float32", ("batch", "length"))}
        np.save(tmp_path / "a.npy", np.ones((1, 3), np.float32))
        np.save(tmp_path / "b.npy", np.ones((1, 4), np.float32))
        assert [batch["x"].shape for batch in open_data(tmp_path, inputs)] == [(1, 3), (1, 4)]
        with pytest.raises(ShapeError, match=r"a\.npy to b\.npy differ in shape"):
            list(open_data(tmp_path, inputs, batch=2))


def test_images_with_labels(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (10, 8), (index * 10, 0, 255)).save(tmp_path / f"{index}.png")
    table = labels(tmp_path / "labels.csv", "2.png,4", "0.png,5", header="file,label")
    data = open_data(tmp_path, {"x": ("float32", ("N", 3, 4, 4))}, preprocess="raw", labels=table, batch=2)
    assert data.labels is not None and data.labels.tolist() == [4, 5]
    (batch,) = data
    assert batch["x"].shape == (2, 3, 4, 4)
    assert batch["x"][:, 0, 0, 0].tolist() == [20, 0] and (batch["x"][:, 2] == 255).all()
    assert open_data(tmp_path, {"x": ("float32", (1, 3, 4, 4))}).samples == 3
    with pytest.raises(ShapeError, match="images serve models with one input"):
        open_data(tmp_path, {"x": ("float32", (1, 3, 4, 4)), "y": ("float32", (1,))})
