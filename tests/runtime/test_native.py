"""The generated SPMD program: values with any number of threads, races, concurrent callers, idling, shutdown."""

import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from handmade import binary, chain, chain_result, f32, host_machine, native_bundle, total

from nestc.bundle.artifact import Artifact
from nestc.bundle.bundle import Bundle
from nestc.codegen.main import Alias, Step, build_main
from nestc.codegen.objects import compile_ir
from nestc.errors import BundleError, TargetError
from nestc.runtime import Executable, cpu, team
from nestc.runtime.native import NativeProgram

WRITES = (False, False, True)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(("count", "grain"), [(1000, 8), (7, 3), (3, 1), (64, 64), (500, 0)])
def test_a_chain_is_right_with_any_number_of_threads(threads, count, grain):
    with Executable(chain(6, count, threads, grain)) as executable:
        for seed in range(20):
            x = random(count, seed=seed)
            np.testing.assert_allclose(executable(x), chain_result(6, x), rtol=1e-5, atol=1e-6)


def test_ten_thousand_runs_do_not_race():
    """Every step reads what all workers wrote one barrier before; any missing order shows in the values."""
    count = 96
    with Executable(chain(2, count, 2, grain=1)) as executable:
        inputs = [random(count, seed=seed) for seed in range(4)]
        expected = [chain_result(2, x) for x in inputs]
        out = np.empty(count, np.float32)
        for turn in range(10_000):
            executable(inputs[turn % 4], out=out)
            assert np.abs(out - expected[turn % 4]).max() < 1e-5


def test_many_threads_on_few_cores():
    with Executable(chain(3, 200, 8, grain=1)) as executable:
        for seed in range(100):
            x = random(200, seed=seed)
            np.testing.assert_allclose(executable(x), chain_result(3, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_callers_do_not_disturb_each_other(threads):
    failures: list[int] = []
    with Executable(chain(4, 300, threads)) as executable:

        def call(number: int) -> None:
            for turn in range(150):
                x = random(300, seed=1000 * number + turn)
                if not np.allclose(executable(x), chain_result(4, x), atol=1e-5):
                    failures.append(number)

        callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert failures == []


def two_sums(count: int) -> Bundle:
    """Two costly serial sums on lanes of their own, then their sum on all workers."""
    steps = [
        Step("total", ("x", "a"), (False, True), cost=1e-3),
        Step("total", ("z", "b"), (False, True), cost=1e-3),
        Step("add", ("a", "b", "y"), WRITES, 1, cost=1e-3),
    ]
    return native_bundle(
        steps,
        {"x": f32(count), "z": f32(count)},
        {"y": f32(1)},
        {"a": 4, "b": 4},
        threads=2,
        objects={"total.o": total("total", count), "add.o": binary("add", "fadd")},
    )


@pytest.mark.parametrize("threads", [2, 5])
def test_the_caller_alone_ends_a_run_to_which_no_worker_comes(threads, monkeypatch):
    monkeypatch.setattr(team.threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(team.threading.Thread, "join", lambda thread, timeout: None)
    with Executable(chain(6, 500, threads, 7)) as executable:
        for seed in range(20):
            x = random(500, seed=seed)
            np.testing.assert_allclose(executable(x), chain_result(6, x), rtol=1e-5, atol=1e-6)
    with Executable(two_sums(257)) as executable:  # the second lane belongs to the second worker
        x, z = random(257), random(257, seed=1)
        assert executable(x, z)[0] == pytest.approx(x.sum() + z.sum(), abs=1e-3)


def test_workers_that_come_late_or_again_find_nothing_to_do():
    """Runs so short that a sleeping worker wakes when one or several later runs have begun or ended."""
    count = 24
    with Executable(chain(3, count, 4, grain=1)) as executable:
        inputs = [random(count, seed=seed) for seed in range(3)]
        expected = [chain_result(3, x) for x in inputs]
        for turn in range(400):
            time.sleep(0.0003 if turn % 3 else 0.0)  # longer than the spin, so that they sleep
            assert np.abs(executable(inputs[turn % 3]) - expected[turn % 3]).max() < 1e-5


def test_teams_share_the_processors(monkeypatch):
    """While other programs run on all processors, the caller's thread does a run alone."""
    program = NativeProgram(chain(3, 400, 2).partitions[0].artifact, 2)
    workers = program._team
    assert workers is not None
    functions, ways, x = workers._functions, [], random(400)

    def run(context: int, table: int) -> None:
        ways.append("together")
        functions.run(context, table)

    def main(*arguments: int) -> None:
        ways.append("alone")
        functions.main(*arguments)

    monkeypatch.setattr(workers, "_functions", functions._replace(run=run, main=main))
    for others in (workers._cpus, 0):
        monkeypatch.setattr(team, "_running", others)
        (y,), _ = program([x], [None])
        np.testing.assert_allclose(y, chain_result(3, x), rtol=1e-5, atol=1e-6)
        assert team._running == others
    assert ways == ["alone", "together"]
    program.close()


def test_serial_steps_lanes_and_scratch():
    """Scratch memory is private to a worker."""
    count = 257
    bundle = two_sums(count)
    assert [step["parallel"] for step in bundle.partitions[0].artifact.metadata["steps"]] == [False] * 3
    with Executable(bundle) as executable:
        for seed in range(200):
            x, z = random(count, seed=seed), random(count, seed=seed + 1)
            assert executable(x, z)[0] == pytest.approx(x.sum() + z.sum(), abs=1e-3)


def test_parts_of_a_concatenation_are_written_in_place():
    steps = [
        Step("add", ("x", "w", "low"), WRITES, 16, 4, 1e-3),
        Step("mul", ("x", "w", "high"), WRITES, 16, 4, 1e-3),
    ]
    aliases = {"low": Alias("y"), "high": Alias("y", 64)}
    weights = {"w": np.arange(16, dtype=np.float32)}
    bundle = native_bundle(
        steps, {"x": f32(16)}, {"y": f32(32)}, {"low": 64, "high": 64}, weights, threads=2, aliases=aliases
    )
    x = random(16)
    with Executable(bundle) as executable:
        np.testing.assert_array_equal(executable(x), np.concatenate([x + weights["w"], x * weights["w"]]))


def test_a_small_model_starts_no_worker():
    before = threading.active_count()
    bundle = native_bundle(
        [Step("add", ("x", "x", "y"), WRITES, 8, cost=1e-7)], {"x": f32(8)}, {"y": f32(8)}, {}, threads=2
    )
    with Executable(bundle) as executable:
        executable(random(8))
        assert threading.active_count() == before


def test_profile_names_every_kernel_call():
    with Executable(chain(3, 400, 2)) as executable:
        rows = executable.profile(runs=5)
    assert [row["symbol"] for row in rows] == ["mul", "add"] * 3
    assert {row["origin"] for row in rows} == {("Mul:m",), ("Add:a",)}
    assert all(row["us"] > 0 and row["team_us"] > 0 and row["partition"] == "p0" for row in rows)


def test_idle_workers_use_no_cpu():
    with Executable(chain(3, 400, 2)) as executable:
        executable(random(400))
        time.sleep(0.05)  # longer than the spin
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.1


def test_closing_ends_the_workers_and_refuses_calls():
    before = threading.active_count()
    executable = Executable(chain(3, 400, 3))
    executable(random(400))
    assert threading.active_count() == before + 2
    executable.close()
    executable.close()
    assert threading.active_count() == before
    with pytest.raises(TargetError, match="closed"):
        executable(random(400))
    with pytest.raises(TargetError, match="closed"):
        executable.stats()


def test_a_forgotten_executable_ends_its_workers():
    before = threading.active_count()
    executable = Executable(chain(3, 400, 2))
    executable(random(400))
    del executable
    assert threading.active_count() == before


SCRIPT = """
import os, sys, threading, time
sys.path.insert(0, {folder!r})
import numpy as np
from handmade import chain, chain_result
from nestc.runtime import Executable
executable = Executable(chain(3, 400, 3))
x = np.ones(400, np.float32)
def check():
    assert np.allclose(executable(x), chain_result(3, x), atol=1e-5)
check()
{body}
print("end")
"""


def run_script(body: str) -> str:
    script = SCRIPT.format(folder=str(Path(__file__).parent), body=textwrap.dedent(body))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "body",
    [
        "",
        "executable.close()",
        "threading.Thread(target=check).start()",
        # A thread that is still calling when the interpreter ends.
        "threading.Thread(target=lambda: [check() for _ in range(10**9)], daemon=True).start(); time.sleep(0.05)",
    ],
)
def test_the_interpreter_exits_promptly(body):
    begin = time.monotonic()
    assert run_script(body).strip() == "end"
    assert time.monotonic() - begin < 30  # a hang would meet the timeout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_workers_of_its_own():
    body = """
        child = os.fork()
        if child == 0:
            check()
            os._exit(7)
        check()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    assert run_script(body).strip() == "end"


def test_code_for_another_cpu_is_refused_in_words():
    bundle = chain(1, 8, 1)

    def changed(**fields: object) -> Bundle:
        partition = bundle.partitions[0]
        artifact = replace(partition.artifact, metadata={**partition.artifact.metadata, **fields})
        return replace(bundle, partitions=(replace(partition, artifact=artifact),))

    with pytest.raises(TargetError, match=r"needs a CPU with .*amx-fp16"):
        Executable(changed(features=["avx10.2", "amx-fp16", "not-used-by-code"]))
    with pytest.raises(TargetError, match="compiled for riscv64 on linux"):
        Executable(changed(triple="riscv64-unknown-linux-gnu"))
    with pytest.raises(BundleError, match="layout 99"):
        Executable(changed(layout=99))
    with pytest.raises(BundleError, match="not complete"):
        Executable(changed(steps=None, context={}))


def test_required_features_follow_the_levels_of_the_abi():
    v3 = dict.fromkeys(
        "cmov cx8 sse sse2 sse3 ssse3 sse4.1 sse4.2 popcnt avx avx2 bmi bmi2 f16c fma lzcnt movbe".split(), True
    )
    assert cpu.missing_features("x86_64", "x86-64-v3", [], v3) == []
    assert "avx512f" in cpu.missing_features("x86_64", "x86-64-v4", [], v3)
    assert cpu.missing_features("x86_64", "generic", ["avx2", "sha", "clflushopt"], v3) == []
    assert cpu.missing_features("aarch64", "generic", ["neon", "sve"], {"neon": True, "sve": False}) == ["sve"]


def test_code_that_cannot_be_linked_is_a_bundle_error():
    bundle = chain(1, 8, 1)
    partition = bundle.partitions[0]
    files = {name: blob for name, blob in partition.artifact.files.items() if name != "mul.o"}
    artifact = Artifact(partition.artifact.kind, files, partition.artifact.weights, partition.artifact.metadata)
    with pytest.raises(BundleError, match="cannot be linked"):
        Executable(replace(bundle, partitions=(replace(partition, artifact=artifact),)))


@pytest.mark.parametrize(
    "triple",
    ["aarch64-unknown-linux-gnu", "riscv64-unknown-linux-gnu", "arm64-apple-macosx14.0", "x86_64-pc-windows-msvc"],
)
def test_the_program_compiles_for_other_platforms(triple):
    machine = replace(host_machine(), triple=triple, cpu="", features="")
    steps = [Step("k", ("x", "x", "y"), WRITES, 64, 8, 1e-3)]
    main = build_main(steps, inputs={"x": f32(64)}, outputs={"y": f32(64)}, constants=[], sizes={}, machine=machine)
    assert len(main.object) > 1000
    assert ("syscall" in main.llvm) == ("linux" in triple)


def test_two_hundred_steps_have_compact_code():
    names = ["x", *(f"t{number}" for number in range(199)), "y"]
    steps = [Step("k", (one, "x", two), WRITES, 64, cost=1e-3) for one, two in itertools.pairwise(names)]
    main = build_main(
        steps,
        inputs={"x": f32(64)},
        outputs={"y": f32(64)},
        constants=[],
        sizes=dict.fromkeys(names[1:-1], 256),
        machine=host_machine(),
        threads=2,
    )
    text = compile_ir(main.llvm, host_machine(), assembly=True).assembly
    instructions = [line for line in text.splitlines() if line.startswith("\t") and not line.startswith("\t.")]
    assert len(instructions) < 800  # no more than for two steps: the rest is tables
    assert main.schedule.arena_bytes == 512


def test_the_context_says_how_long_to_spin():
    assert team.usable_cpus() >= 1
