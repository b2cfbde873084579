"""What the commands share: common options, reading inputs, progress on a terminal, and JSON on stdout."""

from __future__ import annotations

import enum
import json
import logging
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nestc.errors import ModelError, ShapeError, TargetError

if TYPE_CHECKING:
    import numpy as np

    from nestc.runtime import Executable
    from nestc.specialise import Specialised


def _set_verbosity(verbose: bool) -> bool:
    if verbose:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    return verbose


Verbose = Annotated[bool, typer.Option("-v", "--verbose", callback=_set_verbosity, help="Log what is done, on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        metavar="T",
        help="A target, `name` or `name:option=value,...`; repeatable, in the order of preference. [default: cpu]",
    ),
]


class OnFailure(str, enum.Enum):
    """Who takes over when a device fails."""

    cpu = "cpu"


OnFailures = Annotated[
    OnFailure | None,
    typer.Option(
        "--on-failure",
        help="Where a device fails the CPU takes over what it runs; a bundle must have been compiled with this option.",
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="On the CPU, no kernels that add up before they multiply (no Winograd, no Strassen).",
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape", metavar="NAME=D0,D1,...", help="The shape of an input, e.g. `input=1,3,224,224`; repeatable."
    ),
]
Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=SIZE", help="The size of a symbolic dimension, e.g. `batch=1`; repeatable."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="Threads to run with. [default: the CPUs allowed]")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="NAME=FILE",
        help="An input from a .npy, .npz, .png or .jpg file (an .npz without NAME= may hold several); repeatable. "
        "[default: random, seed 0]",
    ),
]

Data = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="DATA",
        help="An .npz (arrays named after the inputs, first axis = samples), a folder of "
        ".npy or .npz files, or a folder of images.",
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="A CSV file with the columns `file,label` and perhaps `split`, or a .npy file of integers.",
    ),
]
Split = Annotated[
    str | None,
    typer.Option("--split", metavar="NAME", help="Only the samples of this split in the labels. [default: all listed]"),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N samples.")]
Batch = Annotated[
    int, typer.Option("--batch", min=1, metavar="N", help="Samples a call, where the model leaves it open.")
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="HOW",
        help="Of images, resized bilinearly: `imagenet` (short side to 256/224 of the input's, centre crop, 0..1, mean "
        "0.485,0.456,0.406, std 0.229,0.224,0.225), `mean=..,std=..` (the same crop; of values 0..255, one number or "
        "one a channel), `0to1` or `raw` (0..255), which squeeze the whole image into the input; add `,fit=crop` or "
        "`,fit=stretch` for the other. [default: 0to1 for floats, raw for bytes]",
    ),
]


def print_json(data: Mapping[str, Any]) -> None:
    """Print the one JSON object of ``--json``."""
    print(json.dumps(data))


def is_bundle(path: Path) -> bool:
    """Whether the file is a bundle rather than a model; a file named ``.nest`` is, whatever it holds."""
    return path.suffix == ".nest" or (path.is_file() and zipfile.is_zipfile(path))


def open_or_compile(
    path: Path,
    targets: Sequence[str],
    shapes: Sequence[str],
    dims: Sequence[str],
    threads: int | None,
    bound: bool = True,
    on_failure: Literal["cpu"] | None = None,
    exact: bool = False,
) -> Executable | Specialised:
    """The executable of a bundle, or of a model compiled on the spot; with `bound` open dimensions are an error.

    Raises nestc.Error if the file is neither, or if an option does not apply to a bundle.
    """
    require_file(path)
    if is_bundle(path):
        for option, given in (("--target", targets), ("--shape", shapes), ("--dim", dims), ("--exact", exact)):
            if given:
                raise ModelError(f"{option} is for a model; {path} is a bundle, which is compiled already")
        from nestc.runtime import open as open_bundle

        return open_bundle(path, threads=threads, on_failure=on_failure)
    from nestc.driver import compile as compile_model

    bound_shapes, bound_dims = bindings(shapes, dims)
    with progress() as step:
        return compile_model(
            path,
            targets=exact_targets(targets or ["cpu"], exact),
            threads=threads,
            shapes=bound_shapes,
            dims=bound_dims,
            bound=bound,
            on_failure=on_failure,
            progress=step,
        )


def exact_targets(targets: Sequence[str], exact: bool) -> list[str]:
    """The texts of targets, with the CPU's option ``exact`` if so. Raises TargetError if it is not among them then."""
    if not exact:
        return list(targets)
    if all(text.partition(":")[0] != "cpu" for text in targets):
        raise TargetError(f"--exact is for the target cpu, which is not among the targets given ({', '.join(targets)})")
    return [
        f"{text}{',' if ':' in text else ':'}exact=true" if text.partition(":")[0] == "cpu" else text
        for text in targets
    ]


def require_file(path: Path) -> None:
    """Raise ModelError unless `path` is a file that exists."""
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give a model (.onnx) or a bundle (.nest)")
    if not path.exists():
        raise ModelError(f"there is no file {path}")


def bindings(shapes: Sequence[str], dims: Sequence[str]) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Read the values of ``--shape`` and ``--dim``. Raises ShapeError."""
    from nestc.graph.model import parse_dim, parse_shape

    return dict(parse_shape(text) for text in shapes), dict(parse_dim(text) for text in dims)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A function to be told (what is being done, the fraction done); draws a bar on a terminal, else stays quiet."""
    if not sys.stderr.isatty():
        yield lambda what, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, fraction: bar.update(task, description=what, completed=fraction)


def read_inputs(given: Sequence[str], wanted: Mapping[str, tuple[str, tuple[int | str, ...]]]) -> dict[str, np.ndarray]:
    """Arrays from ``NAME=FILE`` texts. `wanted` has the (dtype, shape) of each input.

    Raises ShapeError for a name that is not an input, and nestc.Error for a file that cannot be read.
    """
    from nestc.datasets import read_npz
    from nestc.targets import suggestion

    arrays: dict[str, np.ndarray] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals and text.endswith(".npz"):
            arrays.update(read_npz(Path(text)))
            continue
        if not equals:
            if len(wanted) != 1:
                raise ShapeError(f"--input {text!r} does not say which input it is; write NAME={text}")
            name, file = next(iter(wanted)), text
        if name in wanted:
            arrays[name] = _read_array(Path(file), name, *wanted[name])
        else:
            listed = ", ".join(wanted)
            raise ShapeError(f"there is no input {name!r}{suggestion(name, wanted)}; the inputs are {listed}")
    unknown = next((name for name in arrays if name not in wanted), None)
    if unknown is not None:
        raise ShapeError(
            f"there is no input {unknown!r}{suggestion(unknown, wanted)}; the inputs are {', '.join(wanted)}"
        )
    missing = [name for name in wanted if name not in arrays]
    if arrays and missing:
        raise ShapeError(f"input {missing[0]!r} is missing; give --input {missing[0]}=FILE")
    return arrays


def random_inputs(wanted: Mapping[str, tuple[str, tuple[int | str, ...]]]) -> dict[str, np.ndarray]:
    """Inputs drawn with seed 0: floats normally distributed, bytes over their range, bools, other integers 0 or 1.

    0 and 1 are valid as token ids, masks and indices of nearly every model. Raises ShapeError where a dimension is
    not bound or the element type has no random values (strings).
    """
    import ml_dtypes
    import numpy as np

    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in wanted.items():
        unbound = next((size for size in shape if not isinstance(size, int)), None)
        if unbound is not None:
            raise ShapeError(f"input {name!r} has the unbound dimension {unbound!r}; bind it with --dim {unbound}=SIZE")
        sizes = [int(size) for size in shape]
        if dtype == "bool":
            arrays[name] = generator.integers(0, 2, sizes).astype(bool)
        elif dtype in ("int8", "uint8"):
            limits = np.iinfo(dtype)
            arrays[name] = generator.integers(limits.min, limits.max + 1, sizes).astype(dtype)
        elif dtype.startswith(("int", "uint")):
            kind = dtype if hasattr(np, dtype) else getattr(ml_dtypes, dtype)
            arrays[name] = generator.integers(0, 2, sizes).astype(kind)
        elif dtype.startswith(("float", "bfloat")):
            kind = dtype if hasattr(np, dtype) else getattr(ml_dtypes, dtype)
            arrays[name] = generator.standard_normal(sizes).astype(kind)
        else:
            raise ShapeError(f"input {name!r} is of type {dtype}, which has no random values; give --input {name}=FILE")
    return arrays


def _read_array(path: Path, name: str, dtype: str, shape: tuple[int | str, ...]) -> np.ndarray:
    from nestc.datasets import read_npy, read_npz
    from nestc.images import SUFFIXES, ImageInput, read_image

    require_file(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        held = read_npz(path)
        if name not in held and len(held) != 1:
            raise ShapeError(f"{path} holds no array {name!r}, only {', '.join(held) or 'nothing'}")
        return held.get(name, next(iter(held.values())))
    if suffix in SUFFIXES:
        image = ImageInput.of(name, dtype, shape)
        return read_image(path, image, image.usual)
    if suffix != ".npy":
        raise ModelError(f"{path} is of no kind that --input reads; it reads .npy, .npz, .png and .jpg")
    return read_npy(path)
