"""The source reads one way: server -> engine -> models -> pallas_kernels; proto is a leaf."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "pallas_kernels": set(),
    "models": {"pallas_kernels"},
    "engine": {"models", "pallas_kernels"},
    "proto": set(),
    "server": {"engine", "models", "pallas_kernels", "proto"},
}


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("pallasite", *(parts[:-1] if parts[-1] == "__init__" else parts)))


SOURCES = {
    _module_name(path): ast.parse(path.read_text(), filename=str(path.relative_to(ROOT)))
    for folder in MAY_IMPORT
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def _imported(node: ast.AST) -> list[str]:
    """The dotted names that one statement imports, `from` imports with the name at the end."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def _package(module: str) -> str:
    return module.split(".")[1]


def _faults(module: str, tree: ast.Module) -> list[str]:
    """What is wrong with the imports of one module, in words."""
    faults = []
    package = _package(module)
    for node in ast.walk(tree):
        for name in _imported(node):
            if name.startswith("."):
                faults.append(f"{module}:{node.lineno} imports {name}, which is relative")
            if name == "jax._src" or name.startswith("jax._src."):
                faults.append(f"{module}:{node.lineno} imports JAX's internals, {name}")
            if name in ("typing.TYPE_CHECKING", "typing_extensions.TYPE_CHECKING"):
                faults.append(f"{module}:{node.lineno} imports TYPE_CHECKING")
            if name.startswith("pallasite."):
                other = _package(name)
                if other != package and other not in MAY_IMPORT[package]:
                    faults.append(f"{module}:{node.lineno} imports {name}, against the direction")
        if isinstance(node, ast.Attribute) and node.attr in ("TYPE_CHECKING", "_src"):
            faults.append(f"{module}:{node.lineno} uses .{node.attr}")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for inner in ast.walk(node):
                for name in _imported(inner):
                    if name.startswith(("pallasite", ".")):
                        faults.append(f"{module}:{inner.lineno} imports {name} in a function")
    return faults


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module):
    assert _faults(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("pallasite.models.a", "from pallasite.engine import request", "against the direction"),
        ("pallasite.engine.a", "import pallasite.proto.inference_pb2", "against the direction"),
        ("pallasite.pallas_kernels.a", "from pallasite.models.config import X", "against the"),
        ("pallasite.engine.a", "from . import request", "relative"),
        ("pallasite.engine.a", "from jax._src import core", "internals"),
        ("pallasite.engine.a", "from jax import _src", "internals"),
        ("pallasite.engine.a", "import jax\njax._src.core", "uses ._src"),
        ("pallasite.engine.a", "from typing import TYPE_CHECKING", "TYPE_CHECKING"),
        ("pallasite.engine.a", "def f():\n  from pallasite.engine import request", "in a function"),
    ],
)
def test_a_fault_would_be_seen(module, source, fault):
    faults = _faults(module, ast.parse(source))
    assert len(faults) == 1
    assert fault in faults[0]


def test_no_two_modules_import_each_other():
    """Also where Python would not notice, since the names are only used later."""
    imports = {
        module: {
            target
            for node in ast.walk(tree)
            for name in _imported(node)
            for target in (name, name.rpartition(".")[0])
            if target in SOURCES and target != module and not module.startswith(f"{target}.")
        }
        for module, tree in SOURCES.items()
    }
    done: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        assert module not in chain, " -> ".join((*chain[chain.index(module) :], module))
        if module not in done:
            for target in sorted(imports[module]):
                visit(target, (*chain, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())
    assert done == set(SOURCES)


def test_every_package_is_in_the_wheel():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for folder in MAY_IMPORT
        for path in (ROOT / folder).rglob("*.py")
    }
    # What builds the package is in no package, but goes with the sources.
    folders.remove("pallas_kernels/cpu/setup")
    assert "setup/*.py" in setuptools["package-data"]["pallasite.pallas_kernels.cpu"]
    expected = {f"pallasite.{folder.replace('/', '.')}": folder for folder in folders}
    assert setuptools["package-dir"] == expected
    assert set(setuptools["packages"]) == set(expected)


def test_every_source_of_the_bodies_is_built():
    [extension] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "ext-modules"
    ]
    folder = ROOT / "pallas_kernels/cpu"
    sources = [path.relative_to(ROOT).as_posix() for path in folder.glob("*.cc")]
    assert sorted(extension["sources"]) == sorted(sources)
