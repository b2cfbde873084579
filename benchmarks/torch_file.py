"""Reads the tensors of a PyTorch state dict in the format before version 1.6, without torch and without trusting it.

The file is five pickles (magic number, protocol, system facts, the dict, storage keys) and then each storage: an
int64 element count and raw little-endian elements. Only the four classes below are ever constructed.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nestc.errors import ModelError

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8"), "HalfStorage": np.dtype("<f2")}


@dataclass(frozen=True)
class _Tensor:
    """A view on a storage that is read later; offset and stride count elements."""

    storage: str
    dtype: np.dtype[np.generic]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild(
    storage: tuple[str, np.dtype[np.generic]], offset: int, shape: Sequence[int], stride: Sequence[int], *_: object
) -> _Tensor:
    key, dtype = storage
    return _Tensor(key, dtype, offset, tuple(shape), tuple(stride))


class _Reader(pickle.Unpickler):
    """An unpickler that knows state dicts and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise ModelError(f"the PyTorch file names {module}.{name}, which a plain state dict does not contain")

    def persistent_load(self, pid: tuple[object, ...]) -> tuple[str, np.dtype[np.generic]]:
        kind, dtype, key = pid[0], pid[1], pid[2]
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ModelError("the PyTorch file refers to something that is not a tensor storage")
        return str(key), dtype


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Arrays by parameter name. Raises ModelError where the file is not such a state dict."""
    with path.open("rb") as file:
        try:
            return _read(file)
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError, TypeError, KeyError) as error:
            raise ModelError(f"{path.name} is not a PyTorch state dict of the format before 1.6: {error}") from error


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    if _Reader(file).load() != MAGIC:
        raise ValueError("wrong magic number")
    _Reader(file).load()
    _Reader(file).load()
    tensors: dict[str, _Tensor] = _Reader(file).load()
    keys: list[str] = _Reader(file).load()
    dtypes = {t.storage: t.dtype for t in tensors.values()}
    storages: dict[str, np.ndarray] = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        dtype = dtypes[key]
        storages[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    return {name: _view(storages[t.storage], t) for name, t in tensors.items()}


def _view(storage: np.ndarray, tensor: _Tensor) -> np.ndarray:
    item = tensor.dtype.itemsize
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if last >= storage.size:
        raise ValueError("a tensor reaches past its storage")
    strides = [step * item for step in tensor.stride]
    view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)
    return np.ascontiguousarray(view)
