"""Simulated ticks of AiM beside those of the public simulators, matrix-vector products, and networks beside the CPU.

    python benchmarks/aim.py
    python benchmarks/aim.py --models vgg16_classifier,lstm --json
    python benchmarks/aim.py --models none --gemv 4096x8192,1000x512

Golden figures come from public simulators (arkhadem/aim_simulator at 0f28a07; PIMFlow's Ramulator). Everything of AiM
is simulated: ticks, milliseconds, joules, bandwidth. Times of the CPU are measured in the same run. Tables say which.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import numpy as np

import aim_network
from nestc.errors import Error
from nestc.measure import context
from nestc.runtime.aim import commands as c
from nestc.runtime.aim.device import Array
from nestc.runtime.aim.machine import AimMachine, load, preset
from nestc.runtime.aim.newton import matrix_vector, simulate_newton
from nestc.runtime.aim.simulate import Machine
from nestc.runtime.aim.timing import simulate_timing
from nestc.targets.aim.compiler import Program, compile_layers, without_host
from nestc.targets.aim.cost import element_ticks
from nestc.targets.aim.elementwise import Elementwise, Step
from nestc.targets.aim.emit import Addresses, emit
from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.lower import lower
from nestc.targets.aim.mapping import Mapping, plan
from nestc.targets.aim.search import search

GOLDEN_MICRO = {
    **{
        f"MAC_ABK 64 rows x {n}": t
        for n, t in {1: 6359, 2: 6487, 4: 6743, 8: 7255, 16: 8279, 32: 10327, 64: 14423}.items()
    },
    "MAC_ABK 1 row, 64 x 64": 8249,
    **{f"WR_GB 64 x {n}": t for n, t in {1: 163, 8: 1059, 64: 8227}.items()},
}
GOLDEN_GEMV = {
    "512x1024": 415,
    "4096x1024": 2417,
    "1024x4096": 2801,
    "4096x4096": 9665,
    "1000x2048": 1401,
    "4096x25088": 59825,
}
GOLDEN_NEWTON = {
    "16x512": 140,
    "32x512": 266,
    "160x512": 1274,
    "1600x512": 15141,
    "1024x1024": 19752,
    "4096x4096": 318391,
}
"""Cycles of one channel, with refresh."""

GEMV = ",".join([*GOLDEN_GEMV, "4096x8192", "11008x4096", "4096x11008"])

PRESET = "gddr6_aim"

Tell = Callable[[str], None]


def micro(tell: Tell) -> dict[str, dict[str, int]]:
    """Streams of one kind of request, and Newton's products, each beside its golden ticks."""
    machine, newton = preset(PRESET), preset("newton_pimflow")
    every = (1 << machine.channels) - 1
    found: dict[str, dict[str, int]] = {}

    def timed(name: str, stream: list[c.Command]) -> None:
        found[name] = {"ticks": simulate_timing([*stream, c.Eoc()], machine).ticks, "golden": GOLDEN_MICRO[name]}

    for n in (1, 2, 4, 8, 16, 32, 64):
        timed(f"MAC_ABK 64 rows x {n}", [c.MacAbk(n, every, row) for row in range(64)])
    timed("MAC_ABK 1 row, 64 x 64", [c.MacAbk(64, every, 0)] * 64)
    for n in (1, 8, 64):
        timed(f"WR_GB 64 x {n}", [c.WrGb(n, 0, every)] * 64)
    for name, golden in GOLDEN_NEWTON.items():
        rows, k = _shape(name)
        report = simulate_newton(matrix_vector(rows, k, newton), newton)
        found[f"Newton {name}"] = {"ticks": report.ticks, "golden": golden}
    tell("requests of one kind, and Newton's products (one channel): simulated ticks")
    tell(f"{'trace':26}{'ticks':>10}{'golden':>10}")
    for name, row in found.items():
        tell(f"{name:26}{row['ticks']:10,}{row['golden']:10,}{'' if row['ticks'] == row['golden'] else '  DIFFER'}")
    return found


def plain_gemv(m: int, k: int, machine: AimMachine) -> list[c.Command]:
    """The mapping of the golden figures: slices of a row's elements outside, passes over all banks inside, sums kept by
    reading them and writing them back as the next slice's bias."""
    every, passes = (1 << machine.channels) - 1, ceil(m / machine.outputs)
    stream: list[c.Command] = [c.WriteCfr(c.CFR_BROADCAST, 0)]
    for part in range(ceil(k / machine.row_elements)):
        size = ceil(min(machine.row_elements, k - part * machine.row_elements) / machine.lanes)
        stream.append(c.WrGb(size, 0, every))
        for number in range(passes):
            row = part * passes + number
            stream += [c.WrBias(0, every), c.MacAbk(size, every, row), c.RdMac(0, every)]
    return [*stream, c.Eoc()]


def bound(m: int, k: int, machine: AimMachine) -> int:
    """Ticks that opening rows and multiplying take at least: outputs in passes over all banks, K in rows."""
    t, total = machine.timing, 0
    for part in range(ceil(k / machine.row_elements)):
        columns = ceil(min(machine.row_elements, k - part * machine.row_elements) / machine.lanes)
        total += t["nRCDRDMAC"] + (columns - 1) * t["nCCDS"] + t["nRTP"] + t["nRP"]
    return ceil(m / machine.outputs) * total


def gemv(name: str, machine: AimMachine, check: bool) -> dict[str, Any]:
    """One product: our mapping's ticks beside the plain mapping's, golden ones and the bound, and its accuracy."""
    m, k = _shape(name)
    random = np.random.default_rng(0)
    weights = random.standard_normal((m, k), dtype=np.float32) / np.float32(np.sqrt(k))
    layer = MatrixVector("gemv", weights, None, None, "x", "y")
    # Golden figures have no accesses of the host, so that mappings are compared without them; the compiler counts them.
    found = search(layer, machine)
    ticks, mapping = min(((_bare_ticks(layer, each.mapping, machine), each.mapping) for each in found), key=_first)
    program = compile_layers([layer], machine, choose=lambda *_: mapping)
    (launch,) = program.launches
    row: dict[str, Any] = {
        "ticks": ticks,
        "golden": GOLDEN_GEMV.get(name) if machine == preset(PRESET) else None,
        "plain_ticks": simulate_timing(plain_gemv(m, k, machine), machine).ticks,
        "bound": bound(m, k, machine),
        "bandwidth_fraction": m * k / (machine.outputs * machine.lanes / machine.timing["nCCDS"]) / ticks,
        "ticks_with_host": min(each.ticks for each in found),
        "additions_on_host": launch.layout.additions,
        "mapping": launch.mapping.to_json(),
    }
    if check:
        x = random.standard_normal(k, dtype=np.float32)
        row |= _errors(program, x, machine)
    return row


def _bare_ticks(layer: MatrixVector, mapping: Mapping, machine: AimMachine) -> int:
    """Ticks of a mapping's stream without the host's accesses to registers."""
    kernel = lower(layer, plan(layer, mapping, machine), machine)
    commands = [*emit(kernel, Addresses(0, 0, 0), machine).commands, c.Eoc()]
    return simulate_timing(without_host(commands), machine).ticks


def _first(pair: tuple[int, Mapping]) -> int:
    return pair[0]


def _errors(program: Program, x: Array, machine: AimMachine) -> dict[str, float]:
    """Errors against float64 on the rounded operands, over its norm: of the simulated stream, and of float32 sums of
    numpy, rounded to 16 bits at the end as registers are."""
    (launch,) = program.launches
    bench = Machine(machine, memory=program.memory)
    bench.gpr[: len(program.registers)] = program.registers
    found = launch.layout.unpack(bench.run(launch.commands, list(launch.layout.pack(x)))).reshape(-1)
    narrow = bench.number
    w, v = launch.layer.weights.astype(narrow).astype(np.float32), x.astype(narrow).astype(np.float32)
    exact = w.astype(np.float64) @ v.astype(np.float64)
    rounded = (w @ v).astype(narrow).astype(np.float64)
    norm = np.linalg.norm(exact)
    return {
        "relative_error": float(np.linalg.norm(found - exact) / norm),
        "relative_error_numpy": float(np.linalg.norm(rounded - exact) / norm),
    }


def gemv_table(names: Sequence[str], machine: AimMachine, check: bool, tell: Tell) -> dict[str, dict[str, Any]]:
    """All products asked for."""
    tell(
        f"\nmatrix-vector products on {machine.name}, {machine.channels} channels: simulated ticks. golden: public "
        "simulator; plain: its mapping here;\nours: our mapping, without and with the host's accesses to registers; "
        "bound: opening rows and multiplying; bandwidth: of ours,\nof the internal bandwidth; error against float64, "
        "and numpy's with float32 sums rounded once to bfloat16"
    )
    tell(
        f"{'M x K':>12}{'golden':>9}{'plain':>9}{'ours':>9}{'with host':>11}{'bound':>9}{'bound/ours':>12}"
        f"{'bandwidth':>11}{'error':>10}{'numpy':>10}"
    )
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        row = rows[name] = gemv(name, machine, check)
        golden = f"{row['golden']:9,}" if row["golden"] else f"{'-':>9}"
        errors = "".join(
            f"{row[key]:10.5f}" if key in row else f"{'-':>10}" for key in ("relative_error", "relative_error_numpy")
        )
        tell(
            f"{name:>12}{golden}{row['plain_ticks']:9,}{row['ticks']:9,}{row['ticks_with_host']:11,}{row['bound']:9,}"
            f"{row['bound'] / row['ticks']:12.1%}{row['bandwidth_fraction']:11.1%}{errors}"
        )
    return rows


def net_table(
    names: Sequence[str], target: str, threads: int, skipped: dict[str, str], tell: Tell
) -> list[dict[str, Any]]:
    """All networks asked for; those whose file is not to be had are left out."""
    tell(
        f"\nnetworks in bfloat16 on {target} and the CPU, {threads} threads; milliseconds. aim: SIMULATED, with what "
        "its host does; rest: MEASURED on the CPU beside it;\ncpu: MEASURED, all on the CPU by nestc; error: of "
        "outputs against the float32 model, of aim+cpu and of the CPU in bf16"
    )
    tell(
        f"{'model':18}{'layers':>7}{'ticks':>10}{'aim':>9}{'rest':>9}{'sum':>9}{'cpu fp32':>10}{'cpu bf16':>10}"
        f"{'bandwidth':>11}{'energy mJ':>11}{'error':>9}{'cpu bf16':>9}"
    )
    rows: list[dict[str, Any]] = []
    for net in aim_network.NETS:
        if net.name not in names:
            continue
        try:
            row = aim_network.run(net, target, threads)
        except Error as error:
            skipped[net.name] = str(error)
            tell(f"{net.name:18} left out: {error}")
            continue
        rows.append(row)
        cpu, wrong = row["cpu_ms"], row["relative_error"]
        tell(
            f"{net.name:18}{row['layers_on_aim']:7}{row['ticks']:10,}{row['aim_ms']:9.4f}{row['rest_on_cpu_ms']:9.3f}"
            f"{row['total_ms']:9.3f}{cpu['fp32']:10.3f}{cpu['bf16']:10.3f}{row['bandwidth_fraction']:11.1%}"
            f"{row['energy_mj']:11.3f}{wrong['aim']:9.4f}{wrong['cpu_bf16']:9.4f}"
        )
    return rows


def elements_table(machine: AimMachine, tell: Tell) -> list[dict[str, Any]]:
    """Sums and products of values, element by element: ticks with the host's accesses to registers."""
    forms: dict[str, tuple[tuple[Step, ...], tuple[str, ...], tuple[str, ...]]] = {
        "a + b": ((Step("add", "a", "b", "y"),), ("a", "b"), ()),
        "a * b": ((Step("mul", "a", "b", "y"),), ("a", "b"), ()),
        "a * constant": ((Step("mul", "a", "k", "y"),), ("a",), ("k",)),
        "a * b + c * d": (
            (Step("mul", "a", "b", "p"), Step("mul", "c", "d", "q"), Step("add", "p", "q", "y")),
            ("a", "b", "c", "d"),
            (),
        ),
    }
    sizes = (768, 4096, 32768)
    tell(f"\nelement by element, ticks (simulated)\n{'':18}" + "".join(f"{size:>10,}" for size in sizes))
    rows: list[dict[str, Any]] = []
    for name, (steps, inputs, constants) in forms.items():
        found = {
            size: element_ticks(
                Elementwise(name, steps, inputs, {k: np.zeros(size, np.float32) for k in constants}, ("y",), size),
                "bfloat16",
                machine,
            )
            for size in sizes
        }
        tell(f"{name:18}" + "".join(f"{ticks:10,}" for ticks in found.values()))
        rows.append({"name": name, "ticks": found})
    return rows


def _shape(name: str) -> tuple[int, int]:
    rows, cross, k = name.partition("x")
    if not cross or not rows.isdigit() or not k.isdigit() or not int(rows) or not int(k):
        raise Error(f"{name!r} is no size of a matrix; write MxK, as 4096x1024")
    return int(rows), int(k)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    known = [net.name for net in aim_network.NETS]
    parser = argparse.ArgumentParser(
        description="Simulated ticks of AiM beside those of public simulators, and networks beside the CPU.",
        epilog="example: python benchmarks/aim.py --models lstm,gpt2_step --threads 2 --json",
    )
    parser.add_argument("--models", default=",".join(known), help=f"of {', '.join(known)}; none for none")
    parser.add_argument("--gemv", default=GEMV, help=f"sizes MxK, comma-separated; default: {GEMV}")
    parser.add_argument("--machine", default=PRESET, help="a preset or a YAML file, for products and networks")
    parser.add_argument("--no-check", action="store_true", help="do not simulate the values of products")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args(arguments)

    def tell(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    skipped: dict[str, str] = {}
    try:
        machine = load(options.machine)
        names = [] if options.models == "none" else options.models.split(",")
        for name in names:
            if name not in known:
                raise Error(f"there is no network {name!r}; there are {', '.join(known)}")
        sizes = [name for name in options.gemv.split(",") if name]
        for name in sizes:
            _shape(name)
        answer: dict[str, Any] = {"micro": micro(tell), "gemv": gemv_table(sizes, machine, not options.no_check, tell)}
        answer["elements"] = elements_table(machine, tell)
        answer["nets"] = (
            net_table(names, f"aim:machine={options.machine}", options.threads, skipped, tell) if names else []
        )
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        about = context("random inputs and weights, but for trained models; AiM simulated, CPU measured", 0)
        extra = {"kind": "simulated", "machine": machine.name, "channels": machine.channels, "skipped": skipped}
        print(json.dumps({**answer, "context": {**about, **extra, "threads": options.threads}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
