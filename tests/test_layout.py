"""The rules of the tree: who may import whom, how long a file may be, and which parts of NNX are not used."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("emu2_jax", "data_pipelines", "experiments")
FILES = sorted(path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 800

#: NNX's own versions of jax transformations and its optimiser hide where arrays lie; plain jax is used instead.
UNUSED_NNX = {"jit", "scan", "grad", "value_and_grad", "remat", "checkpoint", "Optimizer", "pmap", "shard_map", "sow"}


def imported_packages(source: str) -> set[str]:
    """Top-level names that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def nnx_names(source: str) -> set[str]:
    """What a module uses of NNX: `nnx.X`, `flax.nnx.X` and `from flax.nnx import X`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("nnx", "flax.nnx"):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "flax.nnx":
            names |= {alias.name for alias in node.names}
    return names


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def files_of(package: str) -> list[Path]:
    return [path for path in FILES if relative(path).split("/")[0] == package]


def test_the_scan_sees_what_it_should() -> None:
    source = "import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h\n@nnx.jit\ndef i(): flax.nnx.remat"
    assert imported_packages(source) == {"a", "c", "h"}
    assert nnx_names(source) == {"jit", "remat"}
    assert all(files_of(package) for package in PACKAGES)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("emu2_jax", {"data_pipelines", "experiments"}),
        ("data_pipelines", {"experiments", "jax", "flax"}),  # host side: no device arrays
    ],
)
def test_packages_import_downwards_only(package: str, forbidden: set[str]) -> None:
    found = {relative(path): imported_packages(path.read_text(encoding="utf-8")) for path in files_of(package)}
    assert {path: names & forbidden for path, names in found.items() if names & forbidden} == {}


def test_no_file_is_too_long_to_read() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_no_file_is_named_after_nothing() -> None:
    assert [relative(path) for path in FILES if path.stem in ("utils", "common", "helpers", "misc")] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nnx_modules_only_describe_computation(package: str) -> None:
    used = {relative(path): nnx_names(path.read_text(encoding="utf-8")) & UNUSED_NNX for path in files_of(package)}
    assert {path: names for path, names in used.items() if names} == {}


def test_only_the_stack_stacks() -> None:
    """One file knows that the layers of a stack share a leading axis."""
    stacking = {
        relative(path) for path in files_of("emu2_jax") if "vmap" in nnx_names(path.read_text(encoding="utf-8"))
    }
    assert stacking == {"emu2_jax/models/stack.py"}
