import llvmlite.binding as llvm
import pytest

from nestc.measure import peak

X86 = "x86_64-unknown-linux-gnu"


@pytest.mark.skipif(not llvm.get_process_triple().startswith("x86_64"), reason="assembles x86 instructions")
@pytest.mark.parametrize(
    ("cpu", "features", "kind", "instruction"),
    [
        ("znver4", {"avx512f": True}, "fp32", "vfmadd231ps\t%zmm1, %zmm0, %zmm2"),
        ("znver4", {"avx512bf16": True}, "bf16", "vdpbf16ps"),
        ("znver4", {"avx512vnni": True}, "int8", "vpdpbusd"),
        ("alderlake", {"avxvnni": True}, "int8", "vpdpbusd"),
        ("znver3", {"avx2": True}, "int8", "vpmaddwd"),
        ("znver3", {"fma": True}, "fp32", "%ymm"),
    ],
)
def test_each_chain_is_one_instruction(cpu: str, features: dict[str, bool], kind: str, instruction: str) -> None:
    peak.host()
    probe = peak.probes(X86, features)[kind]
    assert probe is not None
    machine = llvm.Target.from_triple(X86).create_target_machine(cpu=cpu, opt=2)
    assembly = machine.emit_assembly(llvm.parse_assembly(peak.source(probe, X86)))
    assert instruction in assembly
    name = instruction.split("\t")[0] if kind != "fp32" else "vfmadd231ps"
    assert assembly.count(name) == probe.chains


def test_missing_instructions_have_no_peak() -> None:
    found = peak.probes(X86, {"fma": True})
    assert found["bf16"] is None and found["int8"] is None


def test_the_fp32_probe_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "SECONDS", 0.001)
    monkeypatch.setattr(peak, "TRIES", 1)
    triple, _, features = peak.host()
    probe = peak.probes(triple, features)["fp32"]
    assert probe is not None and peak.measure(probe) > 0


def test_layers_count_direct_work() -> None:
    from kernels import Layer, is_measured

    assert Layer("conv3x3", (64, 56, 56), 64, 3).flops() == 2 * 64 * 56 * 56 * 64 * 9
    assert Layer("depthwise", (144, 56, 56), 144, 3, 1, 144).flops() == 2 * 144 * 56 * 56 * 9
    assert Layer("conv3x3s2", (128, 56, 56), 128, 3, 2).flops() == 2 * 128 * 28 * 28 * 128 * 9
    assert Layer("matmul", (128, 768), 3072).flops() == 2 * 128 * 768 * 3072
    assert Layer("matmul", (128, 768), 3072, precision="int8").label == "int8 matmul"
    assert is_measured({"origin": ("Conv:measured", "Relu:r")}) and not is_measured({"origin": ("MaxPool:p",)})
