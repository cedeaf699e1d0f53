"""The structure of the source tree: layers, import circles, and how many files an op takes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import alexnet_kernels
from alexnet_kernels import ops

ROOT = Path(__file__).parents[1]
PACKAGE = Path(alexnet_kernels.__file__).parent
NAME = "alexnet_kernels"
# From the lowest. A module imports modules of lower layers, and of its own package.
LAYERS = (
    ("_errors", "_interrupt", "_runtime", "_sources", "_torch_private", "_version"),
    ("_checksum", "_files", "_library", "_lock", "reference"),
    ("_dispatch",),
    ("backends",),
    ("triton",),
    ("ops",),
    ("op_info", "nn", "optim"),
    ("capture", "interop"),
    ("models",),
    ("lpips", "parallel"),
    ("training", "bench"),
    ("features",),
    ("gpu_check",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
OPTIONAL = {
    "huggingface_hub",
    "lightning",
    "torchmetrics",
    "PIL",
    "matplotlib",
    "rich",
    "safetensors",
    "yaml",
    "triton",
}
SOURCES = (".py", ".cpp", ".cu", ".h", ".cuh", ".md", ".sh", ".toml", ".yaml")
# Not written by hand, or a history.
EXEMPT = ("CHANGELOG.md", "benchmarks/results/", "build/")
# A module over the op and its test, documents, and this file.
USERS = ("alexnet_kernels/nn/modules.py", "tests/test_fuse", "docs/", "CONTRIBUTING.md", "tests/test_structure.py")


def modules() -> dict[str, Path]:
    """Every module of the package, by dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = [NAME, *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def targets_of(node: ast.Import | ast.ImportFrom, known: dict[str, Path]) -> list[str]:
    """The package's modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == NAME]
    if (node.module or "").split(".")[0] != NAME:
        return []
    whole = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in known else str(node.module) for name in whole]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """The modules that each module imports, anywhere in its code."""
    known = modules()
    found = {}
    for name, path in known.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        found[name] = {target for node in nodes for target in targets_of(node, known)} - {name}
    return found


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_module_is_in_a_layer(graph: dict[str, set[str]]) -> None:
    assert {layer_of(module) for module in graph} == set(LEVELS)


def test_no_module_imports_a_higher_layer(graph: dict[str, set[str]]) -> None:
    upward = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if layer_of(target) != layer_of(module) and LEVELS[layer_of(target)] >= LEVELS[layer_of(module)]
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    left = {module: set(targets) for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets & set(left)]:
        for module in free:
            del left[module]
    assert sorted(left) == []


def third_party(path: Path) -> set[str]:
    """The packages that a module imports when it is imported."""
    nodes = ast.parse(path.read_text()).body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_late_imports_are_of_optional_packages() -> None:
    """A function that imports a module of the package hides a circle, unless that needs an optional package.

    The command and the GPU check start faster without what only some of their parts need.
    """
    known = modules()
    optional = {name for name, path in known.items() if third_party(path) & OPTIONAL or layer_of(name) == "triton"}
    at_import = {
        name: {
            target
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for target in targets_of(node, known)
        }
        for name, path in known.items()
    }
    while more := {name for name, targets in at_import.items() if targets & optional} - optional:
        optional |= more
    assert f"{NAME}.ops" not in optional
    late = set()
    for module, path in known.items():
        if layer_of(module) not in ("cli", "gpu_check"):
            tree = ast.parse(path.read_text())
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            late |= {
                f"{module}: {target}"
                for function in functions
                for node in ast.walk(function)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for target in targets_of(node, known)
                if target not in optional
            }
    assert late == set()


def listed() -> list[str]:
    """The files of CONTRIBUTING's list of what an op takes, with <op> for its name."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding an op")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([^`]+)`", section, re.MULTILINE)


def test_an_op_takes_ten_files_at_most() -> None:
    assert 8 <= len(listed()) <= 10


@pytest.mark.parametrize("op", ["within_map_response_norm"])
def test_an_op_is_named_in_the_listed_files_only(op: str) -> None:
    """Besides, it may be used where anything else may be: in a module, a document."""
    assert op in ops.__all__
    mentions = set()
    for path in ROOT.rglob("*"):
        where = path.relative_to(ROOT).as_posix()
        written = path.suffix in SOURCES and not where.startswith(EXEMPT) and not re.search(r"(^|/)\.", where)
        if written and re.search(rf"\b{op}\b", path.read_text()):
            mentions.add(where)
    assert {where for where in mentions if not where.startswith(USERS)} == {f.replace("<op>", op) for f in listed()}
