"""Read an ONNX file without reading its weights: they stay in the file and are mapped when somebody needs them.

The protobuf wire format (https://protobuf.dev/programming-guides/encoding/) is walked down to each initializer's
``raw_data``; the rest is parsed as usual, and the tensor is told that its data lies in the model file itself, at that
place, which is just what ONNX calls external data.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

_GRAPH, _INITIALIZER, _NAME, _RAW_DATA = 7, 5, 8, 9  # field numbers in onnx.proto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_RESIDENT = 16 << 20  # bytes of a mapped file that may have been read before its pages are given back
_SMALL = 1024  # bytes; smaller tensors are shapes, axes and scalars, which everything reads


def parse_mapped(path: Path) -> onnx.ModelProto | None:
    """The model at `path` with large weights left in the file, or None if the file is not plain enough for that.

    None says nothing about the file being sound: parse it as usual then, and see.
    """
    if path.stat().st_nlink != 1 or path.stat().st_size == 0:
        return None  # onnx_ir refuses external data with several hard links, as a precaution
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            content, places = _strip_model(data)
        except (IndexError, ValueError):
            return None
    proto = onnx.ModelProto.FromString(content)
    for tensor in proto.graph.initializer:
        if tensor.name in places:
            offset, length = places[tensor.name]
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", path.name), ("offset", str(offset)), ("length", str(length))):
                tensor.external_data.add(key=key, value=value)
    return proto


def map_external(model: ir.Model, folder: Path) -> None:
    """Let every external weight be a view of its file, which is mapped once for all of them.

    (onnx_ir maps the file once a tensor, and each mapping holds a file descriptor, of which there are 1024.)
    """
    files: dict[Path, _Pages] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8 or tensor.size == 0:
                continue
            path = folder / tensor.location
            if path not in files:
                with path.open("rb") as file:
                    files[path] = _Pages(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            flat = np.frombuffer(files[path].data, tensor.dtype.numpy(), tensor.size, tensor.offset or 0)
            view = flat.reshape(tensor.shape.numpy())
            value.const_value = _MappedTensor(view, tensor, files[path])


class _MappedTensor(ir.Tensor[np.ndarray]):
    """A weight in a mapped file. Reading it counts; after some megabytes the pages read so far are given back, which
    the system can do at once since they are in the file: so a compilation never holds all weights twice."""

    def __init__(self, view: np.ndarray, tensor: ir.ExternalTensor, pages: _Pages) -> None:
        super().__init__(view, dtype=tensor.dtype, name=tensor.name)
        self._pages = pages

    def numpy(self) -> np.ndarray:
        """A view of the file."""
        self._pages.count(self.nbytes)
        return super().numpy()


class _Pages:
    """The pages of a mapped file that have been read since they were last given back."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.read = 0

    def count(self, size: int) -> None:
        """Note that `size` bytes are about to be read."""
        if self.read > _RESIDENT and hasattr(mmap, "MADV_DONTNEED"):
            self.data.madvise(mmap.MADV_DONTNEED)  # what is still in use is simply read from the file again
            self.read = 0
        self.read += size


def _strip_model(data: mmap.mmap) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file without large raw data, and the place (offset, length) of what was left out, by tensor name."""
    places: dict[str, tuple[int, int]] = {}
    parts: list[bytes] = []
    for number, begin, start, end in _fields(data, 0, len(data)):
        if number != _GRAPH:
            parts.append(data[begin:end])
            continue
        inner: list[bytes] = []
        for field, field_begin, field_start, field_end in _fields(data, start, end):
            if field == _INITIALIZER:
                inner.append(_message(_INITIALIZER, _strip_tensor(data, field_start, field_end, places)))
            else:
                inner.append(data[field_begin:field_end])
        parts.append(_message(_GRAPH, b"".join(inner)))
    return b"".join(parts), places


def _strip_tensor(data: mmap.mmap, start: int, end: int, places: dict[str, tuple[int, int]]) -> bytes:
    if end - start <= _SMALL:
        return data[start:end]
    parts: list[bytes] = []
    name, place = "", None
    for number, begin, inner, stop in _fields(data, start, end):
        if number == _NAME:
            name = data[inner:stop].decode()
        if number == _RAW_DATA and stop - inner > _SMALL:
            place = (inner, stop - inner)
        else:
            parts.append(data[begin:stop])
    if place is None:
        return data[start:end]
    if not name or name in places:
        raise ValueError("a large tensor needs a name of its own")
    places[name] = place
    return b"".join(parts)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: (number, begin of its tag, begin of its content, end)."""
    position = start
    while position < end:
        begin = position
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        inner = position
        if kind == _VARINT:
            _, position = _varint(data, position)
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        elif kind == _BYTES:
            length, inner = _varint(data, position)
            position = inner + length
        else:
            raise ValueError(f"wire type {kind} is not used by ONNX")
        if position > end:
            raise ValueError("a field is longer than the message around it")
        yield number, begin, inner, position


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _message(number: int, content: bytes) -> bytes:
    """A field that holds a message, as bytes."""
    return bytes(_encode(number << 3 | _BYTES)) + bytes(_encode(len(content))) + content


def _encode(value: int) -> Iterator[int]:
    while value >= 0x80:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
