"""The house of DESIGN.md, held by reading the source: who imports whom, and what library code never does."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# a module uses modules of its own floor and of those below
FLOORS = {
    "digests": 0,
    "files": 0,
    "streams": 0,
    "modes": 0,
    "transfers": 0,
    "values": 0,
    "processes": 0,
    "env": 0,
    "kernels": 1,
    "ops": 2,
    "functional": 3,
    "tuning": 3,
    "calls": 4,
    "estimators": 4,
    "gates": 4,
    "losses": 5,
    "schedules": 5,
    "optim": 5,
    "models": 5,
    "pruning": 6,
    "integrations": 7,
    "training": 7,
    "api": 8,
    "paper": 8,
    "reports": 8,
    "recipe_options": 8,
    "cli": 9,
    "__main__": 9,
    "": 9,  # fastgate/__init__.py
}
# usable without gates: only itself and the bottom
STANDALONE = {"energy": {"energy", "files", "env"}}
# old names of what moved to a floor above
ALIASES = {"fastgate.energy.lightning", "fastgate.energy.transformers"}


def library_files() -> dict[str, Path]:
    """Dotted module name -> file, for fastgate/ and kernels/ (imported as fastgate.kernels)."""
    files = {}
    for folder, package in (("fastgate", "fastgate"), ("kernels", "fastgate.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


FILES = library_files()


def floor_name(module: str) -> str:
    """fastgate.models.block -> models; fastgate -> "" (the top)."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(module: str, source: str, is_package: bool) -> list[tuple[str, bool]]:
    """(module of this library, inside a function?) for every import statement of a source text."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, in_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, in_function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = module.split(".")
                    package = parts[: len(parts) - child.level + is_package]
                    base = ".".join([*package, base] if base else package)
                for alias in child.names:
                    # `from fastgate import functional` imports the module, `from fastgate import compact` the top
                    full = f"{base}.{alias.name}"
                    found.append((full if full in FILES else base, in_function))
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, in_function or is_function)

    visit(ast.parse(source), False)
    return [(name, inside) for name, inside in found if name == "fastgate" or name.startswith("fastgate.")]


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    name = floor_name(module)
    wrong = []
    for imported, in_function in imported_modules(module, source, is_package):
        other = floor_name(imported)
        if name in STANDALONE and module not in ALIASES:
            if other not in STANDALONE[name]:
                wrong.append(f"{module} stands alone but imports {imported}")
        elif other not in FLOORS and other not in STANDALONE:
            wrong.append(f"{imported} has no floor: add it to FLOORS")
        elif other not in STANDALONE and FLOORS[other] > FLOORS.get(name, FLOORS["integrations"]):
            wrong.append(f"{module} imports {imported}, which is above it")
        if other == "kernels" and name != "kernels" and not (name == "ops" and in_function):
            wrong.append(f"{module} imports {imported}; kernels are imported inside functions of ops only")
    return wrong


def test_every_module_has_a_floor() -> None:
    assert "fastgate.gates" in FILES and "fastgate.kernels" in FILES
    assert {floor_name(module) for module in FILES} <= set(FLOORS) | set(STANDALONE)


@pytest.mark.parametrize("module", FILES)
def test_a_floor_imports_only_floors_below(module: str) -> None:
    path = FILES[module]
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastgate.gates", "import fastgate.losses"),
        ("fastgate.gates", "from fastgate import losses"),
        ("fastgate.gates", "from . import losses"),
        ("fastgate.ops.gate_head", "from ..gates import Gate"),
        ("fastgate.pruning.costs", "def f():\n    from fastgate import attach"),
        ("fastgate.files", "import fastgate"),
        ("fastgate.gates", "def f():\n    import fastgate.kernels.gate_head"),
        ("fastgate.ops.gate_head", "from fastgate import kernels"),
        ("fastgate.energy.meter", "from fastgate.gates import Gate"),
    ],
)
def test_the_reader_sees_a_wrong_import(module: str, source: str) -> None:
    assert violations(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastgate.gates", "import torch\nfrom fastgate import functional\nfrom fastgate.estimators import estimate"),
        ("fastgate.ops.gate_head", "def f():\n    from fastgate.kernels import gate_head"),
        ("fastgate.models.resnet", "from .block import ResidualBlock"),
        ("fastgate.energy.meter", "from fastgate.files import write_atomically\nfrom fastgate.energy import nvml"),
    ],
)
def test_the_reader_lets_a_right_import_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize("module", FILES)
def test_library_code_has_no_assert(module: str) -> None:
    # `python -O` drops asserts: user input is checked with exceptions that say what to do
    tree = ast.parse(FILES[module].read_text())
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("module", FILES)
def test_library_code_reads_nothing_beside_the_repository(module: str) -> None:
    # ../shared exists on the developers' machines only
    texts = [node.value for node in ast.walk(ast.parse(FILES[module].read_text())) if isinstance(node, ast.Constant)]
    assert [text for text in texts if isinstance(text, str) and re.search(r"\.\./shared|/work/", text)] == []
