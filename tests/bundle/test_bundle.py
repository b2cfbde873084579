"""The bundle file: its contents, its alignment, and what is said about bad ones."""

import errno
import json
import os
import struct
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from handmade import chain, chain_result, f32, native_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from nestc.bundle import read as read_module
from nestc.bundle import write as write_module
from nestc.bundle.artifact import Artifact
from nestc.bundle.bundle import Bundle, BundlePartition, DeviceSpec, TensorSpec
from nestc.bundle.read import read
from nestc.bundle.write import write
from nestc.codegen.main import Step
from nestc.errors import BundleError
from nestc.runtime import open as open_bundle

X = np.linspace(-2, 2, 200, dtype=np.float32)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good bundle."""
    path = tmp_path / "model.nest"
    write(path, chain(3, 200, 2))
    return path


def test_what_is_written_is_read_again(saved: Path):
    before, after = chain(3, 200, 2), read(saved)
    assert (after.name, after.inputs, after.outputs) == (before.name, before.inputs, before.outputs)
    assert (after.graph, after.threads, after.info) == (b"graph", 2, {"note": "handmade"})
    (one,), (two,) = before.partitions, after.partitions
    assert (two.name, two.device, two.inputs, two.outputs, two.regions) == (
        "p0",
        "cpu",
        ("x",),
        one.outputs,
        ("region",),
    )
    assert two.artifact.files == one.artifact.files
    assert two.artifact.metadata == json.loads(json.dumps(one.artifact.metadata))
    np.testing.assert_array_equal(two.artifact.weights["w"], one.artifact.weights["w"])


def test_a_saved_model_runs_and_is_the_same_file_when_saved_again(saved: Path, tmp_path: Path):
    with open_bundle(saved) as executable:
        np.testing.assert_allclose(executable(X), chain_result(3, X), rtol=1e-5, atol=1e-6)
        again = tmp_path / "again.nest"
        executable.save(again)
    assert again.read_bytes() == saved.read_bytes()


ODD = {
    "scalar": np.array(3.5, np.float64),
    "empty": np.empty((0, 4), np.int64),
    "bools": np.array([True, False, True]),
    "half": np.arange(7, dtype=np.float16),
    "brain": np.arange(33).astype(ml_dtypes.bfloat16),
    "float8": np.arange(5).astype(ml_dtypes.float8_e4m3fn),
    "int4": np.arange(-4, 4).astype(ml_dtypes.int4),
    "complex": np.array([1 + 2j], np.complex64),
    "transposed": np.arange(12, dtype=np.uint16).reshape(3, 4).T,
}


def odd_bundle() -> Bundle:
    """A bundle, not runnable, with weights of every sort."""
    artifact = Artifact("nothing", {"a/b.bin": b"\0" * 5, "empty": b""}, ODD, {"number": 1, "list": [1.5, None]})
    partition = BundlePartition("a part/with: odd name", "none", ("x",), (TensorSpec("y", "float32", None),), artifact)
    return Bundle("odd", (TensorSpec("x", "int8", (1, None)),), (), (partition,))


def test_weights_of_every_type_come_back(tmp_path: Path):
    write(tmp_path / "odd.nest", odd_bundle())
    (partition,) = read(tmp_path / "odd.nest").partitions
    assert partition.outputs[0].shape is None
    assert list(partition.artifact.weights) == list(ODD)
    for name, array in ODD.items():
        found = partition.artifact.weights[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
        assert not found.flags.writeable or not found.size


def test_weights_are_mapped_aligned_and_plain_safetensors(saved: Path, tmp_path: Path):
    array = read(saved).partitions[0].artifact.weights["w"]
    assert array.ctypes.data % 64 == 0
    write(tmp_path / "odd.nest", odd_bundle())
    with zipfile.ZipFile(tmp_path / "odd.nest") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        data = archive.read("weights.safetensors")
    tensors = dict(deserialize(data))
    half = tensors["0-a_part_with__odd_name/half"]
    assert (half["dtype"], half["shape"]) == ("F16", [32])
    assert np.frombuffer(half["data"], np.float16)[:7].tolist() == list(range(7))
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert all(begin % 64 == 0 for begin, _ in (item["data_offsets"] for item in header.values()))
    assert (8 + length) % 64 == 0


def test_zip64_entries_are_aligned_too(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(write_module, "_ZIP64_FROM", 0)
    path = tmp_path / "large.nest"
    write(path, chain(3, 200, 2))
    assert read(path).partitions[0].artifact.weights["w"].ctypes.data % 64 == 0


def test_open_imports_no_compiler_stage(saved: Path):
    script = (
        "import sys, numpy, nestc\n"
        f"executable = nestc.open({str(saved)!r})\n"
        "executable(numpy.zeros(200, numpy.float32))\n"
        "stages = ['importers', 'graph', 'quant', 'partition', 'tensor', 'kernels', 'codegen', 'targets', 'driver']\n"
        "banned = {'onnx', 'onnx_ir', 'onnxscript', 'torch', *('nestc.' + stage for stage in stages)}\n"
        "print(sorted(name for name in sys.modules if name in banned or name.rpartition('.')[0] in banned))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_missing_file_and_other_files_are_refused(tmp_path: Path):
    with pytest.raises(BundleError, match=r"cannot read the bundle .*: No such file"):
        read(tmp_path / "none.nest")
    with pytest.raises(BundleError, match="cannot read the bundle"):
        read(tmp_path)
    for name, contents in (("empty", b""), ("text", b"hello" * 100), ("onnx", b"\x08\x07" * 50)):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(BundleError, match="is not a nestc bundle"):
            read(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(BundleError, match=r"without manifest\.json, not a nestc bundle"):
        read(tmp_path / "other.zip")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_cut_bundle_is_refused(saved: Path, kept: float):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(BundleError, match="is cut or damaged"):
        read(saved)


def test_an_altered_weight_is_found(saved: Path):
    data = bytearray(saved.read_bytes())
    place = data.index(chain(3, 200, 2).partitions[0].artifact.weights["w"].tobytes())
    data[place + 400] ^= 1
    saved.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.safetensors was altered"):
        read(saved)


@settings(deadline=None, max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, place: float, bit: int):
    good = _good(tmp_path_factory)
    data = bytearray(good)
    data[int(place * len(data))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.nest"
    path.write_bytes(data)
    try:
        found = read(path)
    except BundleError as error:
        assert "\n" not in str(error)
        return
    (one,), (two,) = chain(3, 200, 2).partitions, found.partitions
    assert two.artifact.files == one.artifact.files
    assert two.artifact.weights["w"].tobytes() == one.artifact.weights["w"].tobytes()
    assert two.artifact.metadata == json.loads(json.dumps(one.artifact.metadata))


_cache: list[bytes] = []


def _good(factory: pytest.TempPathFactory) -> bytes:
    if not _cache:
        path = factory.mktemp("good") / "good.nest"
        write(path, chain(3, 200, 2))
        _cache.append(path.read_bytes())
    return _cache[0]


def with_manifest(path: Path, change: object) -> None:
    """Pack the bundle again with a changed manifest, hashes and all."""
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    manifest = json.loads(contents["manifest.json"])
    changed = change(manifest)  # type: ignore[operator]
    contents["manifest.json"] = json.dumps(manifest if changed is None else changed).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)


NPU = asdict(DeviceSpec("npu", "npu", 1e-6, 2e-6, 1e9, 1e-12, "estimated", 2.5))


def test_devices_and_fallbacks_come_back(tmp_path: Path):
    before = chain(3, 200, 2)
    fallback = Artifact("spare", {"code.o": b"spare"}, {"w": np.arange(3.0)}, {"layout": 1})
    partition = replace(before.partitions[0], device="npu", fallback=fallback)
    free = DeviceSpec("cpu", "cpu", watts=15.0)
    write(tmp_path / "m.nest", replace(before, partitions=(partition,), devices=(DeviceSpec(**NPU), free)))
    after = read(tmp_path / "m.nest")
    assert after.devices == (DeviceSpec(**NPU), free)
    assert after.devices[0].seconds(1000) == 2e-6 + 1e-6 and free.seconds(1 << 40) == 0
    (found,) = after.partitions
    assert found.fallback is not None
    assert (found.fallback.kind, found.fallback.files, found.fallback.metadata) == (
        "spare",
        {"code.o": b"spare"},
        {"layout": 1},
    )
    np.testing.assert_array_equal(found.fallback.weights["w"], fallback.weights["w"])
    np.testing.assert_array_equal(found.artifact.weights["w"], partition.artifact.weights["w"])
    write(tmp_path / "again.nest", after)
    assert (tmp_path / "again.nest").read_bytes() == (tmp_path / "m.nest").read_bytes()


def test_a_bundle_of_the_first_version_still_runs(saved: Path):
    """It knew neither devices nor fallbacks."""

    def older(manifest: dict[str, Any]) -> None:
        manifest.update(version=1)
        del manifest["devices"]
        for partition in manifest["partitions"]:
            del partition["fallback"]

    with_manifest(saved, older)
    assert read(saved).devices == () and read(saved).partitions[0].fallback is None
    with open_bundle(saved) as executable:
        np.testing.assert_allclose(executable(X), chain_result(3, X), rtol=1e-5, atol=1e-6)
    with_manifest(saved, lambda manifest: manifest.update(partitions=[1]))
    with pytest.raises(BundleError, match=r"partitions\[0\] must be an object"):
        read(saved)


def test_a_bundle_that_another_tool_packed_again_still_runs(saved: Path):
    with_manifest(saved, lambda manifest: None)  # its tensors are no longer aligned
    with open_bundle(saved) as executable:
        np.testing.assert_allclose(executable(X), chain_result(3, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=3), "is of version 3, but this nestc reads up to 2; update nestc"),
        (lambda m: m.update(version="new"), "gives the version 'new'"),
        (lambda m: m.update(format="other"), "does not say that it is a 'nestc-bundle'"),
        (lambda m: [], "does not say that it is a 'nestc-bundle'"),
        (lambda m: m.pop("threads") and None, "has no field 'threads'"),
        (lambda m: m.update(extra=1), "has the unknown field 'extra'"),
        (lambda m: m.update(threads=True), "threads must be a whole number, not true or false"),
        (lambda m: m.update(threads=-1), "threads must not be negative"),
        (lambda m: m.update(inputs={}), "inputs must be a list, not an object"),
        (lambda m: m["inputs"][0].update(dtype=3), r"inputs\[0\]: dtype must be a string, not a number"),
        (lambda m: m["inputs"][0].update(shape=["a"]), r"inputs\[0\]: shape\[0\] must be a whole number, not a string"),
        (lambda m: m["partitions"][0].update(metadata=[]), r"partitions\[0\]: metadata must be an object"),
        (lambda m: m["partitions"].append(1), r"partitions\[1\] must be an object, not a number"),
        (lambda m: m["entries"].pop() and None, "do not agree about"),
        (lambda m: m["entries"][0].update(sha256="0"), "was altered"),
        (lambda m: m["entries"][0].update(bytes=1), "bytes, not 1"),
        (lambda m: m["partitions"][0]["files"].append("z.o"), "partition p0 has no file 'z.o'"),
        (lambda m: m["partitions"][0]["weights"][0].update(name="v"), "partition p0 has no weight 'v'"),
        (lambda m: m["partitions"][0]["weights"][0].update(dtype="float7"), "there is no element type 'float7'"),
        (lambda m: m["partitions"][0]["weights"][0].update(shape=[1 << 40]), "weight 'w' of partition p0"),
        (lambda m: m["partitions"][0].pop("fallback") and None, r"partitions\[0\] has no field 'fallback'"),
        (lambda m: m["partitions"][0].update(fallback=3), r"partitions\[0\]: fallback must be an object, not a number"),
        (lambda m: m["devices"].append({"name": "npu"}), r"devices\[0\] has no field 'resource'"),
        (lambda m: m.update(devices=[{**NPU, "kind": "guessed"}]), r"kind must be one of 'measured', 'modelled', 'est"),
        (lambda m: m.update(devices=[{**NPU, "watts": "much"}]), r"devices\[0\]: watts must be a number, not a string"),
        (lambda m: m.update(devices=[{**NPU, "launch_seconds": True}]), "launch_seconds must be a number, not true"),
        (
            lambda m: m.update(devices=[{**NPU, "latency_seconds": -1e-6}]),
            "latency_seconds must be a number that is not",
        ),
    ],
)
def test_a_wrong_manifest_is_refused_naming_the_field(saved: Path, change: object, message: str):
    with_manifest(saved, change)
    with pytest.raises(BundleError, match=message):
        read(saved)


def test_an_unwritable_folder_is_reported(tmp_path: Path):
    with pytest.raises(BundleError, match=r"cannot write the bundle .*: No such file or directory"):
        write(tmp_path / "none" / "m.nest", chain(1, 8, 1))
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot write the bundle"):
        write(tmp_path / "file" / "m.nest", chain(1, 8, 1))
    with pytest.raises(BundleError, match="cannot write the bundle"):
        write(tmp_path, chain(1, 8, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_full_disk_leaves_nothing_and_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = saved.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="No space left on device"):
        write(saved, chain(2, 100, 1))
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_write_that_fails_in_the_middle_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: object, mode: str) -> object:
        return open("/dev/full", "wb")

    monkeypatch.setattr(write_module, "open", full, raising=False)
    with pytest.raises(BundleError, match="No space left on device"):
        write(tmp_path / "m.nest", chain(2, 100, 1))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_python_objects_are_refused(tmp_path: Path):
    bundle = odd_bundle()
    artifact = replace(bundle.partitions[0].artifact, weights={"s": np.array(["a"], object)})
    with pytest.raises(BundleError, match="weight 's'"):
        write(tmp_path / "m.nest", replace(bundle, partitions=(replace(bundle.partitions[0], artifact=artifact),)))
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_weights_has_a_bundle(tmp_path: Path):
    step = Step("add", ("x", "x", "y"), (False, False, True), 8)
    write(tmp_path / "m.nest", native_bundle([step], {"x": f32(8)}, {"y": f32(8)}, {}))
    with open_bundle(tmp_path / "m.nest") as executable:
        assert executable(np.ones(8, np.float32)).tolist() == [2.0] * 8
    assert read_module.MANIFEST == "manifest.json"
