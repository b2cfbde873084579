"""Data flows one way: a stage never imports a later one, and running a bundle never imports the compiler."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "nestc"

# The order of the stages; each may import itself and those before it.
STAGES = (
    "importers",
    "graph",
    "quant",
    "partition",
    "tensor",
    "kernels",
    "tune",
    "codegen",
    "bundle",
    "runtime",
    "measure",
    "report",
)

# Contracts between stages: plain data and protocols, which any stage may import.
CONTRACTS = {
    "nestc",
    "nestc.blobs",
    "nestc.cache",
    "nestc.errors",
    "nestc.evict",
    "nestc.host",
    "nestc.graph.model",
    "nestc.graph.region",
    "nestc.tensor.ir",
    "nestc.kernels.api",
    "nestc.targets.api",
    "nestc.bundle.artifact",
    "nestc.bundle.dtypes",
}

# The importer binds sizes, infers shapes and replaces operators with the means that the graph stage also uses later.
ALLOWED = {("importers", f"nestc.graph.{name}") for name in ("bind", "infer_shapes", "passes.rewrite", "quiet")}

# Everything above the stages: the command line and the driver see all.
TOP = {"__main__", "driver", "cli", "commands", "specialise", "demo", "datasets", "images", "evaluation"}
TOP |= {"quantization", "autoscheme", "compiled", "tuning"}

# What finds the fastest ways compiles and runs them, so it is above the targets; what was found (`tune.store`, by
# `tune.key`) they read.
TOP_MODULES = {f"nestc.tune.{name}" for name in ("cluster", "measure", "run", "search", "task")}

# Helpers that compile and run one kernel for tests and benchmarks; no stage may import them.
TOOLS = {"nestc.kernels.testing", "nestc.kernels.checking"}

# The run side must be light: these never appear among its imports.
COMPILER = ("importers", "graph", "quant", "tensor", "kernels", "tune", "codegen", "targets")


def modules() -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of nestc that a file imports anywhere, also inside functions; types-only imports do not count."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules_inside = inner & known
            names |= modules_inside
            if len(modules_inside) < len(inner):
                names.add(node.module)
    return {name for name in names if name.split(".")[0] == "nestc"}


MODULES = modules()
KNOWN = {name for name, _ in MODULES}


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_a_stage_imports_no_later_one(name: str, path: Path) -> None:
    parts = name.split(".")
    if len(parts) < 2 or parts[1] in TOP or name in TOP_MODULES | TOOLS:
        return
    stage = parts[1]
    for imported in imports(path, KNOWN):
        if imported in CONTRACTS or (stage, imported) in ALLOWED:
            continue
        other = imported.split(".")[1]
        assert imported not in TOOLS, f"{name} imports {imported}, which is for tests and benchmarks"
        above = other in TOP or imported in TOP_MODULES
        assert not above, f"{name} imports {imported}: only the command line and the driver see everything"
        if stage == "targets":
            continue
        if stage in STAGES:
            assert other in STAGES, f"{name} imports {imported}, which is no stage"
            assert STAGES.index(other) <= STAGES.index(stage), f"{name} imports {imported}, a later stage"


def test_every_part_has_a_place() -> None:
    placed = {*STAGES, *TOP, "targets", *(name.split(".")[1] for name in CONTRACTS if name.count(".") == 1)}
    assert {name.split(".")[1] for name, _ in MODULES if "." in name} <= placed
    assert KNOWN >= TOP_MODULES | TOOLS | CONTRACTS


@pytest.mark.parametrize("stage", ["bundle", "runtime"])
def test_the_run_side_imports_no_compiler_stage(stage: str) -> None:
    for name, path in MODULES:
        if name.split(".")[1:2] != [stage]:
            continue
        for imported in imports(path, KNOWN) - CONTRACTS:
            assert imported.split(".")[1] not in COMPILER, f"{name} imports {imported}"


@pytest.mark.parametrize("statement", ["import nestc", "import nestc; nestc.open"])
def test_opening_loads_no_compiler(statement: str) -> None:
    heavy = ("onnx", "onnx_ir", "onnxscript", "typer", *(f"nestc.{stage}" for stage in COMPILER))
    script = f"import sys; {statement}; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
