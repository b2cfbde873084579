"""Samples and labels from files, for calibrating and evaluating: read a few at a time, checked against the inputs."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from nestc.bundle.dtypes import numpy_dtype
from nestc.errors import DataError, ShapeError
from nestc.images import SUFFIXES, ImageInput, Preprocess, parse_preprocess, read_image

Inputs = Mapping[str, tuple[str, tuple[int | str, ...]]]
"""Element type and shape of every input by name, as `Executable.inputs` has them; a text stands for an open size."""

Read = Callable[[], dict[str, np.ndarray]]

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One sample: what labels call it, and how to get its arrays, whose first axis is the sample's share of a batch.

    A `whole` one has all that a call takes, so that it makes a batch by itself.
    """

    name: str
    read: Read
    whole: bool = False


class Dataset:
    """Batches of a data set, {input: array}, in a fixed order; iterating again reads again.

    ``len`` is the number of batches, ``samples`` that of samples, ``batch`` the samples in each (the last may have
    fewer where the model's batch is open), ``labels`` one integer a sample (int64), or None, and ``names`` what the
    samples are called. Iterating raises DataError or ShapeError at the sample that cannot be read or does not fit.
    """

    def __init__(self, samples: Sequence[Sample], inputs: Inputs, batch: int, labels: np.ndarray | None = None) -> None:
        self._samples = samples
        self._inputs = inputs
        self.batch = batch
        self.labels = labels
        self.names = [sample.name for sample in samples]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def __len__(self) -> int:
        return -(-len(self._samples) // self.batch)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(self._samples), self.batch):
            read = [self._read(sample) for sample in self._samples[start : start + self.batch]]
            if len(read) == 1:
                yield read[0]
                continue
            try:
                yield {name: np.concatenate([arrays[name] for arrays in read]) for name in self._inputs}
            except ValueError:
                last = self._samples[min(start + self.batch, self.samples) - 1].name
                raise ShapeError(
                    f"samples {self._samples[start].name} to {last} differ in shape, so they make no batch; use batch 1"
                ) from None

    def _read(self, sample: Sample) -> dict[str, np.ndarray]:
        arrays = sample.read()
        return {
            name: _fit(arrays[name], name, dtype, shape, self.batch, sample.name)
            for name, (dtype, shape) in self._inputs.items()
        }


def open_data(
    path: str | Path,
    inputs: Inputs,
    *,
    preprocess: str | Preprocess | None = None,
    labels: str | Path | Sequence[int] | np.ndarray | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch: int = 1,
) -> Dataset:
    """The data set at `path` for a model with these `inputs`.

    `path` is an .npz (arrays named after the inputs, first axis = samples; held in memory), a folder of .npy or .npz
    files (a sample or a batch each), or a folder of images, decoded one at a time (`preprocess`: as
    `images.parse_preprocess` reads it; default: as `nestc run` reads an image). `labels` is a CSV file with the columns
    file, label and perhaps split, of which only the rows of `split` are taken, if given; or a .npy file or a sequence
    with an integer a sample, in order. The file of a CSV row is relative to the folder; of an .npz it is the sample's
    number from 0. `limit` keeps the first samples. `batch` is for models whose batch is open; others get what they ask.

    Raises DataError and ShapeError, each with the file, the input and what is wrong.
    """
    folder = Path(path)
    if not inputs:
        raise ShapeError("the model has no inputs, so no data can be given to it")
    table = read_labels(labels) if isinstance(labels, str | Path) and Path(labels).suffix.lower() == ".csv" else None
    if split is not None and table is None:
        raise DataError(f"a split ({split!r}) can be chosen only with labels in a CSV file that has the column split")
    if limit is not None and limit < 1:
        raise DataError(f"the limit on samples must be at least 1, not {limit}")
    size = _batch_size(inputs, batch)
    rows = None if table is None else _rows(table, split)
    listed = None if rows is None else [row.file for row in rows]
    samples = _find(folder, inputs, preprocess, listed, whole=size is not None)
    numbers: np.ndarray | None = None
    if rows is not None:
        samples, numbers = _select(folder, samples, rows)
    elif labels is not None:
        numbers = _label_array(labels, len(samples), folder)
    if limit is not None:
        samples, numbers = samples[:limit], None if numbers is None else numbers[:limit]
    if any(sample.whole for sample in samples):
        size = 1
    if size is not None and len(samples) % size:
        fewer = len(samples) // size * size
        hint = f"limit them to {fewer}" if fewer else "give more"
        raise ShapeError(f"{len(samples)} samples do not fill batches of {size}, which the model takes; {hint}")
    return Dataset(samples, inputs, size or batch, numbers)


# --- labels ---


@dataclass(frozen=True)
class Labelled:
    """A row of a label file."""

    file: str
    label: int
    split: str | None


def read_labels(path: str | Path) -> list[Labelled]:
    """Rows of a CSV file with the columns file, label and perhaps split, in order. Raises DataError."""
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            columns = reader.fieldnames or []
            missing = next((column for column in ("file", "label") if column not in columns), None)
            if missing is not None:
                raise DataError(
                    f"{path} has no column {missing!r}; its first line must be file,label or file,label,split"
                )
            rows = [_labelled(path, reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(f"the labels in {path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file that can be read: {error}") from error
    if not rows:
        raise DataError(f"{path} lists no samples")
    seen: set[str] = set()
    for row in rows:
        if row.file in seen:
            raise DataError(f"{path} lists {row.file} twice")
        seen.add(row.file)
    return rows


def _labelled(path: Path, line: int, row: Mapping[str, Any]) -> Labelled:
    try:
        label = int(row["label"])
    except (TypeError, ValueError):
        raise DataError(f"{path}, line {line}: the label {row['label']!r} is not an integer") from None
    return Labelled(str(row["file"]), label, row.get("split"))


def _rows(table: Sequence[Labelled], split: str | None) -> Sequence[Labelled]:
    """Rows of one split; all if None is chosen."""
    rows = [row for row in table if split is None or row.split == split]
    if not rows:
        there = sorted({row.split for row in table if row.split})
        said = f"the splits are {', '.join(there)}" if there else "there is no column split"
        raise DataError(f"the labels have no row of split {split!r}; {said}")
    return rows


def _select(folder: Path, samples: Sequence[Sample], rows: Sequence[Labelled]) -> tuple[list[Sample], np.ndarray]:
    """The samples of these rows, in the rows' order, and their labels."""
    by_name = {sample.name: sample for sample in samples}
    missing = next((row.file for row in rows if row.file not in by_name), None)
    if missing is not None:
        raise DataError(f"the labels list {missing!r}, but {folder} has no such sample")
    return [by_name[row.file] for row in rows], np.array([row.label for row in rows], np.int64)


def _label_array(labels: Any, samples: int, folder: Path) -> np.ndarray:
    """Labels that are given as an array or in a .npy file."""
    if isinstance(labels, str | Path):
        if Path(labels).suffix.lower() != ".npy":
            raise DataError(f"labels are a CSV file (file,label[,split]) or a .npy file, not {labels}")
        array = read_npy(Path(labels))
    else:
        array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"labels must be one integer a sample, not {array.dtype} of shape {list(array.shape)}")
    if len(array) != samples:
        raise DataError(f"there are {len(array)} labels for the {samples} samples in {folder}")
    return array.astype(np.int64)


# --- samples ---


def _find(
    folder: Path, inputs: Inputs, preprocess: str | Preprocess | None, listed: Sequence[str] | None, whole: bool
) -> list[Sample]:
    """All samples at a path, in order of their names; of a folder only those that are `listed`, if given.

    With `whole` a file of a folder whose arrays have just the inputs' shapes is one call.
    """
    if not folder.exists():
        raise DataError(f"there is no data at {folder}")
    if not folder.is_dir():
        if folder.suffix.lower() != ".npz":
            raise DataError(f"{folder} is no data; give an .npz file, or a folder of .npy, .npz or image files")
        _no_preprocess(preprocess, folder)
        return _archive_samples(folder, inputs)
    there = (file for file in folder.iterdir() if file.is_file())
    files = sorted(there if listed is None else (folder / name for name in listed))
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    arrays = [file for file in files if file.suffix.lower() in (".npy", ".npz")]
    if images and arrays:
        raise DataError(f"{folder} has both images and arrays; keep one kind of samples in a folder")
    if images:
        return _image_samples(folder, images, inputs, preprocess)
    if not arrays and not listed:
        raise DataError(f"{folder} has no .npy, .npz or image files")
    _no_preprocess(preprocess, folder)
    source = _Files(inputs)
    samples = [sample for file in arrays for sample in source.samples(folder, file, whole)]
    many = None if listed is None else next((sample for sample in samples if sample.name not in listed), None)
    if many is not None:
        raise DataError(f"{folder / many.name} is one of several samples in a file, but labels are one for a file")
    return samples


def _no_preprocess(preprocess: str | Preprocess | None, path: Path) -> None:
    if preprocess is not None:
        raise DataError(f"preprocessing is for images, and {path} holds arrays; leave it out")


def _image_samples(
    folder: Path, files: Sequence[Path], inputs: Inputs, preprocess: str | Preprocess | None
) -> list[Sample]:
    if len(inputs) != 1:
        raise ShapeError(f"images serve models with one input; this one has {', '.join(inputs)}: give .npz files")
    name, (dtype, shape) = next(iter(inputs.items()))
    image = ImageInput.of(name, dtype, shape)
    how = parse_preprocess(preprocess) if isinstance(preprocess, str) else preprocess or image.usual
    image.check(how)

    def reader(file: Path) -> Read:
        return lambda: {name: read_image(file, image, how)}

    return [Sample(file.relative_to(folder).as_posix(), reader(file)) for file in files]


def _archive_samples(path: Path, inputs: Inputs) -> list[Sample]:
    """Samples along the first axis of the arrays of an .npz.

    An array of the input's rank is cut along its batch; one with an axis more has a whole input for each sample.
    """
    arrays = read_npz(path)
    _check_names(path, arrays, inputs)
    for name, (_, shape) in inputs.items():
        if arrays[name].ndim not in (len(shape), len(shape) + 1) or arrays[name].ndim == 0:
            raise ShapeError(
                f"{path}: {name!r} has shape {list(arrays[name].shape)}, but the input is {_written(shape)}; "
                "the first axis must be samples"
            )
    count = _count(path, {len(arrays[name]) for name in inputs})
    whole = any(arrays[name].ndim > len(shape) for name, (_, shape) in inputs.items())

    def reader(index: int) -> Read:
        return lambda: {name: _cut(arrays[name], len(shape), index) for name, (_, shape) in inputs.items()}

    return [Sample(str(index), reader(index), whole) for index in range(count)]


class _Files:
    """Reads the files of a folder; keeps the arrays of the last one, since its samples are read one after another."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._last: tuple[Path | None, dict[str, np.ndarray]] = (None, {})

    def samples(self, folder: Path, file: Path, whole: bool) -> list[Sample]:
        """Samples in one file: as many as its arrays' first axis has, or one if they have no such axis.

        Only the arrays' headers are read here. With `whole` arrays of just the inputs' shapes are one call.
        """
        name = file.relative_to(folder).as_posix()
        if not file.exists():
            return []  # said later, by the row of the labels
        shapes = self._by_input(file, read_shapes(file))
        if whole and all(_same(shapes[key], shape) for key, (_, shape) in self._inputs.items()):
            return [Sample(name, lambda: self._arrays(file), whole=True)]
        counts: set[int] = set()
        for key, (_, shape) in self._inputs.items():
            if len(shapes[key]) not in (len(shape) - 1, len(shape)):
                raise ShapeError(f"{file}: {key!r} has shape {list(shapes[key])}, but the input is {_written(shape)}")
            if shape:
                counts.add(1 if len(shapes[key]) < len(shape) else shapes[key][0])
        count = _count(file, counts)

        def reader(index: int) -> Read:
            return lambda: {
                key: _cut(array, len(self._inputs[key][1]), index) for key, array in self._arrays(file).items()
            }

        return [Sample(name if count == 1 else f"{name}[{index}]", reader(index)) for index in range(count)]

    def _arrays(self, file: Path) -> dict[str, np.ndarray]:
        if self._last[0] != file:
            held = {"": read_npy(file)} if file.suffix.lower() == ".npy" else read_npz(file)
            self._last = (file, self._by_input(file, held))
        return self._last[1]

    def _by_input(self, file: Path, held: Mapping[str, T]) -> dict[str, T]:
        """What a file holds, by input name; the only array of a .npy (called "") needs no name."""
        if list(held) == [""]:
            if len(self._inputs) != 1:
                raise ShapeError(f"{file} is one array, but the inputs are {', '.join(self._inputs)}; give .npz files")
            return {next(iter(self._inputs)): held[""]}
        _check_names(file, held, self._inputs)
        return {name: held[name] for name in self._inputs}


def _cut(array: np.ndarray, rank: int, index: int) -> np.ndarray:
    """A sample's part of an array for an input of this rank."""
    if rank == 0 and array.ndim == 0:
        return array
    if array.ndim < rank:
        return array[None]
    return array[index : index + 1] if array.ndim == rank else array[index]


def _count(path: Path, counts: set[int]) -> int:
    """The number of samples that all arrays of a file agree in."""
    if len(counts) > 1:
        raise DataError(f"{path}: the arrays differ in their number of samples, {', '.join(map(str, sorted(counts)))}")
    count = next(iter(counts), 1)
    if count == 0:
        raise DataError(f"{path} has no samples")
    return count


def _check_names(path: Path, arrays: Mapping[str, object], inputs: Inputs) -> None:
    missing = next((name for name in inputs if name not in arrays), None)
    if missing is not None:
        held = ", ".join(arrays) or "nothing"
        raise ShapeError(f"{path} holds no array {missing!r}, which is an input of the model; it holds {held}")


def _fit(array: np.ndarray, name: str, dtype: str, shape: tuple[int | str, ...], batch: int, sample: str) -> np.ndarray:
    """The array as the input takes it; raises if its shape is another, its values do not fit the type or are NaN."""
    share = shape if not shape or batch == 1 else (array.shape[0], *shape[1:])
    if not _same(array.shape, share):
        raise ShapeError(f"sample {sample}: {name!r} has shape {list(array.shape)}, but the input is {_written(shape)}")
    wanted = numpy_dtype(dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        kind = "NaN" if np.isnan(array).any() else "infinity"
        raise DataError(f"sample {sample}: {name!r} contains {kind}")
    if array.dtype == wanted:
        return array
    if not _convertible(array, wanted):
        raise ShapeError(f"sample {sample}: {name!r} is {array.dtype}, but the input takes {dtype}")
    with np.errstate(over="ignore"):
        converted = array.astype(wanted)
    if array.dtype.kind == "f" and not np.isfinite(converted).all():
        raise DataError(f"sample {sample}: {name!r} holds {np.abs(array).max():.3g}, which is infinite in {dtype}")
    return converted


def _convertible(array: np.ndarray, wanted: np.dtype[Any]) -> bool:
    """Whether values can be had in the other type without changing what they mean: floats rounded, integers equal."""
    if array.dtype.kind == "f":
        return wanted.kind == "f" or wanted.name in ("bfloat16", "float16")
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        limits = np.iinfo(wanted)
        return array.size == 0 or (int(array.min()) >= limits.min and int(array.max()) <= limits.max)
    return False


def _batch_size(inputs: Inputs, batch: int) -> int | None:
    """Samples of a call where the model fixes it, else None."""
    if batch < 1:
        raise DataError(f"the batch must have at least 1 sample, not {batch}")
    first = [shape[0] for _, shape in inputs.values() if shape]
    if len(first) < len(inputs):
        return 1  # an input without axes is the same for a whole call
    if all(size == first[0] for size in first):
        return first[0] if isinstance(first[0], int) else None
    return 1


def _same(shape: Sequence[int], wanted: Sequence[int | str]) -> bool:
    return len(shape) == len(wanted) and all(isinstance(b, str) or a == b for a, b in zip(shape, wanted))


def _written(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


# --- files ---

# What numpy raises on files that are cut, of another kind, or hold objects.
_UNREADABLE = (ValueError, EOFError, OSError, zipfile.BadZipFile, AttributeError, TypeError, KeyError)


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file. Raises DataError if it cannot be read."""
    try:
        with path.open("rb") as opened:
            return np.lib.format.read_array(opened, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except _UNREADABLE as error:
        raise DataError(f"{path} is not a .npy file that can be read: {error}") from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name. Raises DataError if it cannot be read."""
    try:
        # Opened here: numpy does not close a file that turns out to be no archive.
        if not zipfile.is_zipfile(path):  # numpy takes anything else for a pickle
            raise zipfile.BadZipFile("it is cut, or of another kind" if path.stat().st_size else "it is empty")
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except _UNREADABLE as error:
        raise DataError(f"{path} is not an .npz file that can be read: {error}") from error
    # numpy gives what is no array as its bytes.
    other = next((name for name, array in arrays.items() if not isinstance(array, np.ndarray)), None)
    if other is not None:
        raise DataError(f"{path} is not an .npz file that can be read: {other!r} in it is no array")
    return arrays


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an .npz by name, or of a .npy as "", without reading the arrays. Raises DataError."""
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as opened:
                return {"": _shape(opened)}
        with zipfile.ZipFile(path) as archive:
            shapes: dict[str, tuple[int, ...]] = {}
            for member in archive.namelist():
                with archive.open(member) as opened:
                    shapes[member.removesuffix(".npy")] = _shape(opened)
            return shapes
    except _UNREADABLE as error:
        raise DataError(f"{path} is not a file of arrays that can be read: {error}") from error


def _shape(stream: IO[bytes]) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    # Versions after 2.0 differ from it only in how names of fields are written, and inputs have none.
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return header(stream)[0]
