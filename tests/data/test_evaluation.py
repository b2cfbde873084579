"""Metrics against plain definitions of them, and evaluation of the shipped network and of bad inputs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nestc
from nestc.demo import INPUT, labelled_images, model_path
from nestc.errors import DataError, Error, ModelError, ShapeError
from nestc.evaluation import Distance, evaluate, wilson, within_top


class Table:
    """Something that runs: looks its outputs up by the number in its input."""

    def __init__(self, outputs: np.ndarray, name: str = "x", output: str = "y") -> None:
        self.inputs: dict[str, tuple[str, tuple[int | str, ...]]] = {name: ("int64", (1,))}
        self._outputs, self._name, self._output = outputs, name, output

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {self._output: self._outputs[inputs[self._name]]}


def numbers(count: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.array([index])} for index in range(count)]


SCORES = np.array([[0, 3, 1], [2, 2, 1], [5, 1, 0], [0, 1, 9]], np.float32)


def test_top1_against_a_reference() -> None:
    other = SCORES.copy()
    other[3] = [1, 0, 0]
    found = evaluate(Table(other), numbers(4), [1, 1, 0, 2], against=Table(SCORES))
    assert found.accuracy is not None and found.reference is not None
    assert (found.accuracy.correct, found.reference.correct, found.disagreements) == (2, 3, 1)
    assert found.value == 0.5 and found.samples == 4
    shown = found.to_json()
    assert shown["loss"] == 0.25 and shown["reference"]["correct"] == 3 and shown["interval"] == list(wilson(2, 4))


def test_equal_scores_are_in_order_of_classes() -> None:
    assert within_top(SCORES, np.array([1, 0, 0, 2]), 1).tolist() == [True, True, True, True]
    assert within_top(SCORES, np.array([1, 1, 0, 2]), 1).tolist() == [True, False, True, True]
    assert within_top(SCORES, np.array([2, 1, 2, 0]), 2).tolist() == [True, True, False, False]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_within_top_is_membership_of_the_sorted_scores(seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (5, 7)).astype(np.float32)
    labels = random.integers(0, 7, 5)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert within_top(scores, labels, k).tolist() == [bool(label in row) for label, row in zip(labels, order)]


def test_top5_and_classes_behind_axes_of_one() -> None:
    scores = np.arange(20, dtype=np.float32).reshape(2, 10, 1, 1)
    found = evaluate(Table(scores), numbers(2), [4, 5], "top5")
    assert found.accuracy is not None and found.accuracy.correct == 1
    assert found.disagreements is None and "loss" not in found.to_json()


def test_wilson_is_as_tabulated() -> None:
    # Newcombe 1998, table I: 81 of 263, and 15 of 148, and 0 of 20, by the score method without continuity correction.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def test_distances() -> None:
    random = np.random.default_rng(1)
    expected, noise = random.standard_normal((2, 6, 3, 4))
    distance = Distance()
    distance.add(expected[:4], expected[:4] + noise[:4])
    distance.add(expected[4:], expected[4:] + noise[4:])
    assert distance.sqnr_db == pytest.approx(10 * np.log10((expected**2).sum() / (noise**2).sum()))
    a, b = expected.reshape(6, -1), (expected + noise).reshape(6, -1)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert distance.cosine == pytest.approx(cosines.mean())


def test_distances_of_nothing_and_of_equals() -> None:
    same = Distance()
    same.add(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
    assert same.sqnr_db == math.inf and same.cosine == pytest.approx(1)
    zeros = Distance()
    zeros.add(np.zeros((2, 3)), np.array([[0, 0, 0], [0, 1, 0]]))
    assert zeros.sqnr_db == -math.inf and zeros.cosine == 0.5


def test_sqnr_and_cosine_by_output() -> None:
    found = evaluate(Table(SCORES * np.float32(1.1)), numbers(4), metric="sqnr", against=Table(SCORES))
    assert found.value == pytest.approx(20, abs=1e-4) and found.disagreements == 0
    assert found.outputs == {"y": found.value} and "loss" not in found.to_json()
    equal = evaluate(Table(SCORES), numbers(4), metric="sqnr", against=Table(SCORES))
    assert equal.value == math.inf and equal.to_json()["value"] is None
    turned = evaluate(Table(-SCORES), numbers(4), metric="cosine", against=Table(SCORES))
    assert turned.value == pytest.approx(-1)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"metric": "top3"}, DataError, "no metric 'top3'; choose top1, top5, cosine, sqnr"),
        ({"metric": "sqnr"}, DataError, "compares with a reference"),
        ({"labels": None}, DataError, "top1 needs labels"),
        ({"labels": [0, 1, 2]}, DataError, "3 labels, but more samples"),
        ({"labels": [0, 1, 2, 2, 1]}, DataError, "5 labels for 4 samples"),
        ({"labels": [0, 1, 2, 3]}, DataError, r"label 3 is no class of the model, which has 3 \(0 to 2\)"),
        ({"labels": [0, 1, 2, -1]}, DataError, "label -1"),
        ({"labels": [0.5, 1, 2, 1]}, DataError, "one integer a sample"),
        ({"labels": "labels.csv"}, DataError, "file of labels goes with data in files"),
        ({"data": []}, DataError, "no samples"),
        ({"split": "a"}, DataError, "for data in files"),
        ({"model": Table(np.ones((4, 3, 2, 2), np.float32))}, ShapeError, r"scores \[samples, classes\].*\[1, 3, 2, 2\]"),
        ({"model": Table(np.where(SCORES == 9, np.nan, SCORES))}, ModelError, "model gives NaN in output 'y' after 3"),
        ({"against": Table(SCORES, name="z")}, ShapeError, "reference has the inputs z, but the model x"),
        ({"against": Table(SCORES, output="z")}, ShapeError, "reference has the output 'z', the model only y"),
        ({"against": Table(SCORES[:, :2])}, ShapeError, r"output 'y' is \[1, 3\], but the reference's is \[1, 2\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_sentence(change, error: type[Error], said: str) -> None:
    given = {"model": Table(SCORES), "data": numbers(4), "labels": [0, 1, 2, 1], **change}
    with pytest.raises(error, match=said):
        evaluate(**given)


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of the shipped network as an .npz, with labels in two splits."""
    folder = tmp_path_factory.mktemp("demo")
    images, labels = labelled_images()
    np.savez(folder / "images.npz", **{INPUT: images[:60]})
    rows = [f"{index},{labels[index]},{'calibrate' if index % 3 == 0 else 'evaluate'}" for index in range(60)]
    (folder / "labels.csv").write_text("\n".join(["file,label,split", *rows]))
    return folder


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.nest"
    with nestc.compile(model_path(), shapes={INPUT: [1, 1, 28, 28]}, threads=1) as executable:  # type: ignore[union-attr]
        executable.save(path)
    return path


def test_a_bundle_on_files(demo_data: Path, demo_bundle: Path) -> None:
    images, labels = labelled_images()
    with nestc.open(demo_bundle) as executable:
        decided = np.array([int(executable(image[None]).argmax()) for image in images[:60]])
    chosen = np.arange(60) % 3 != 0
    seen: list[float] = []
    found = nestc.evaluate(
        demo_bundle, demo_data / "images.npz", demo_data / "labels.csv", split="evaluate", threads=1,
        progress=lambda what, fraction: seen.append(fraction),
    )  # fmt: skip
    assert found.samples == 40 and found.accuracy is not None
    assert found.accuracy.correct == int((decided == labels[:60])[chosen].sum())
    assert len(seen) == 40 and seen == sorted(seen) and seen[-1] == 1.0


def test_labels_given_go_before_those_of_the_data(demo_data: Path) -> None:
    outputs = np.eye(3, dtype=np.float32)
    data = nestc.open_data(write_indices(demo_data), {"x": ("int64", (1,))}, labels=[0, 1, 1])
    assert evaluate(Table(outputs), data).value == pytest.approx(2 / 3)
    assert evaluate(Table(outputs), data, [0, 1, 2]).value == 1.0


def write_indices(folder: Path) -> Path:
    np.savez(folder / "indices.npz", x=np.arange(3))
    return folder / "indices.npz"


def test_a_bundle_is_evaluated_without_the_compiler(demo_data: Path, demo_bundle: Path) -> None:
    script = (
        "import sys, nestc\n"
        f"nestc.evaluate({str(demo_bundle)!r}, {str(demo_data / 'images.npz')!r}, {str(demo_data / 'labels.csv')!r})\n"
        "print([name for name in ('onnx', 'onnx_ir', 'nestc.driver', 'nestc.kernels', 'nestc.codegen', 'nestc.targets',"
        " 'nestc.quant') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
