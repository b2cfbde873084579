"""``nestc compile`` twice: the second time the bundle is what was kept, byte for byte, or made anew if anything differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from nestc import compiled, host
from nestc.errors import Error
from nestc.runtime import open as open_bundle


def network(weight=0.5, stride=1, size=8, name="w"):
    random = np.random.default_rng(0)
    weights = random.standard_normal((8, 4, 3, 3), dtype=np.float32)
    weights[1, 2, 0, 1] = weight
    nodes = [
        helper.make_node("Conv", ["x", name], ["c"], "conv", strides=[stride] * 2, pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["y"], "pool"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4, size, size])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, name)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write(path, model):
    """Save a model as if some time ago: what changed just now is not kept."""
    path.write_bytes(model.SerializeToString())
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compile_(nestc, tmp_path, monkeypatch, cache):
    """Compile a file: the bundle's bytes, and whether a compiler had to run."""
    runs = []

    def call(model, *options, out="out.nest"):
        import nestc.driver

        real, before = nestc.driver.build, len(runs)
        with monkeypatch.context() as patch:
            patch.setattr(nestc.driver, "build", lambda *args, **named: (runs.append(1), real(*args, **named))[1])
            result = call_line(model, *options, out=out)
        assert result.status == 0, result.err
        return (tmp_path / out).read_bytes(), len(runs) > before

    def call_line(model, *options, out="out.nest"):
        return nestc("compile", model, "-o", tmp_path / out, "--threads", 2, *options)

    return call


def kept(cache):
    return [path for path in (cache / "nestc" / "blobs").rglob("*") if path.is_file()]


def test_a_second_compilation_gives_the_same_bytes_without_compiling(compile_, tmp_path):
    model = write(tmp_path / "m.onnx", network())
    cold, ran = compile_(model)
    assert ran
    warm, ran = compile_(model, out="other.nest")
    assert (warm == cold, ran) == (True, False)
    x = np.ones((1, 4, 8, 8), np.float32)
    with open_bundle(tmp_path / "other.nest") as executable:
        assert executable(x).shape == (1, 8, 1, 1)


def test_what_was_kept_is_reported_as_what_was_compiled(nestc, tmp_path, cache):
    model = write(tmp_path / "m.onnx", network())
    reports = [json.loads(nestc("compile", model, "-o", tmp_path / "m.nest", "--json").out) for _ in range(2)]
    assert [list(report)[:2] for report in reports] == [["bundle", "seconds"]] * 2
    assert reports[0] | {"seconds": 0} == reports[1] | {"seconds": 0}
    texts = [nestc("compile", model, "-o", tmp_path / "m.nest").out.splitlines() for _ in range(2)]
    assert texts[0][1:] == texts[1][1:]
    assert "3 regions" in texts[0][0] or "2 regions" in texts[0][0]


@pytest.mark.parametrize(
    "changed",
    [{"weight": 0.25}, {"stride": 2}, {"size": 9}, {"name": "v"}],
    ids=["weight", "attribute", "shape", "name"],
)
def test_another_model_is_compiled_anew(compile_, tmp_path, changed):
    first, _ = compile_(write(tmp_path / "m.onnx", network()))
    other, ran = compile_(write(tmp_path / "m.onnx", network(**changed)))
    assert ran
    assert other != first
    again, ran = compile_(write(tmp_path / "m.onnx", network()))
    assert (again == first, ran) == (True, False)


@pytest.mark.parametrize("options", [("--threads", 1), ("--target", "cpu:exact=true"), ("--objective", "energy")])
def test_another_wish_is_compiled_anew(compile_, tmp_path, options):
    model = write(tmp_path / "m.onnx", network())
    compile_(model)
    assert compile_(model, *options)[1]
    assert not compile_(model, *options)[1]


@pytest.mark.parametrize("part", ["_machine", "_versions"])
def test_another_machine_or_version_compiles_anew(compile_, tmp_path, monkeypatch, part):
    model = write(tmp_path / "m.onnx", network())
    compile_(model)
    monkeypatch.setattr(compiled, part, lambda: "another")
    assert compile_(model)[1]


def test_the_version_is_that_of_all_source_files(monkeypatch):
    before = compiled._versions()
    monkeypatch.setattr(compiled, "code_digest", lambda *parts: f"changed {parts}")
    assert compiled._versions() != before


def test_new_measurements_of_kernels_compile_anew(compile_, tmp_path):
    from nestc.cache import TuningStore

    model = write(tmp_path / "m.onnx", network())
    compile_(model)
    TuningStore().put("some kernel", "its time")
    assert compile_(model)[1]


def test_weights_beside_the_model_count(compile_, tmp_path):
    model = tmp_path / "m.onnx"

    def save(weight):
        onnx.save(
            network(weight),
            model,
            save_as_external_data=True,
            location="m.data",
            size_threshold=0,
            all_tensors_to_one_file=True,
        )
        for file in (model, tmp_path / "m.data"):
            os.utime(file, (1_700_000_000, 1_700_000_000))

    save(0.5)
    first, _ = compile_(model)
    assert compile_(model) == (first, False)
    (tmp_path / "m.data").unlink()
    save(0.25)
    other, ran = compile_(model)
    assert ran
    assert other != first


def test_a_model_that_is_being_changed_is_not_kept(compile_, tmp_path):
    model = write(tmp_path / "m.onnx", network())
    later = 4_000_000_000
    os.utime(model, (later, later))
    compile_(model)
    assert compile_(model)[1]


def test_damage_to_any_file_of_the_store_is_survived(compile_, tmp_path, cache):
    model = write(tmp_path / "m.onnx", network())
    cold, _ = compile_(model)
    count = len(kept(cache))
    assert count >= 4  # kernels, the program, the bundle and what was reported of it
    for damage in (lambda data: b"", lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])):
        for file in kept(cache):
            file.write_bytes(damage(file.read_bytes()))
        assert compile_(model) == (cold, True)
        assert compile_(model) == (cold, False)
        assert len(kept(cache)) == count
    for file in kept(cache):
        file.write_bytes(file.read_bytes()[:70])
        assert compile_(model)[0] == cold


def test_a_cache_that_cannot_be_written_is_no_error(compile_, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = write(tmp_path / "m.onnx", network())
    assert compile_(model) == (compile_(model)[0], True)


def test_intermediate_forms_are_written_whatever_is_kept(nestc, tmp_path, cache):
    model = write(tmp_path / "m.onnx", network())
    emit = ("--emit", "tensor", "--emit", "llvm", "--emit", "asm", "--emit", "graph")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        assert nestc("compile", model, "-o", tmp_path / "m.nest").status == 0
        assert nestc("compile", model, "-o", tmp_path / "m.nest", *emit, "--emit-dir", folder).status == 0
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert {name.rpartition(".")[2] for name in names[0]} == {"tensor", "ll", "s", "txt", "onnx"}


def test_a_bundle_that_cannot_be_written_is_one_sentence(nestc, tmp_path, cache, monkeypatch):
    model = write(tmp_path / "m.onnx", network())
    assert nestc("compile", model, "-o", tmp_path / "m.nest").status == 0

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nestc.blobs._copy", full)
    result = nestc("compile", model, "-o", tmp_path / "n.nest")
    assert (result.status, result.err) == (
        2,
        f"nestc: cannot write the bundle {tmp_path / 'n.nest'}: No space left on device\n",
    )
    assert sorted(path.name for path in tmp_path.glob("*.nest*")) == ["m.nest"]


def test_the_kernel_store_alone_gives_the_same_bundle(tmp_path, cache):
    import nestc

    model = write(tmp_path / "m.onnx", network())
    for name in ("cold", "warm"):
        with nestc.compile(model, threads=2) as executable:
            executable.save(tmp_path / f"{name}.nest")
    assert (tmp_path / "cold.nest").read_bytes() == (tmp_path / "warm.nest").read_bytes()


def test_a_kernel_that_is_not_valid_is_refused_every_time(cache):
    from nestc.kernels.testing import host_machine
    from nestc.targets.cpu.assemble import Assembler
    from nestc.tensor.build import Builder, constant

    builder = Builder("bad")
    buffer = builder.param("p0", "float32", (4,))
    builder.store(buffer, (4,), constant(1.0, "float32"))
    kernel = builder.finish(())
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            worker = Assembler(host_machine(), (), None, pool, 1)
            with pytest.raises(Error, match="outside its extent"):
                worker.add_kernel(kernel)


def test_machines_differ_in_the_key(monkeypatch, tmp_path, cache):
    model = write(tmp_path / "m.onnx", network())
    here = host.host_cpu()
    keys = [compiled.request(model, ["cpu"], {}).key]
    changes = ({"cache_bytes": (1 << 15, 1 << 20, 1 << 24)}, {"name": "other"}, {"features": {"avx2": False}})
    for change in changes:
        monkeypatch.setattr(host, "host_cpu", lambda change=change: replace(here, **change))
        keys.append(compiled.request(model, ["cpu"], {}).key)
    monkeypatch.setattr(host, "host_cpu", lambda: here)
    monkeypatch.setattr(host, "available_cpus", lambda: 77)
    keys.append(compiled.request(model, ["cpu"], {}).key)
    assert len(set(keys)) == 5
    assert compiled.request(model, ["cpu", "vta"], {}) is None


def test_eight_processes_at_once_make_equal_bundles(tmp_path, cache):
    model = write(tmp_path / "m.onnx", network())
    start = "import nestc.cli; nestc.cli.main()"
    command = [sys.executable, "-c", start, "compile", str(model), "--threads", "2", "-o"]
    running = [
        subprocess.Popen(
            [*command, str(tmp_path / f"{number}.nest")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for number in range(8)
    ]
    errors = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * 8, errors
    assert len({(tmp_path / f"{number}.nest").read_bytes() for number in range(8)}) == 1
    assert not [path for path in kept(cache) if path.suffix == ".tmp"]
