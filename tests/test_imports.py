"""The imports between jlora's parts go downward only, and the manager needs no jax.

A part is a folder or a file directly under jlora/. Imports are read from the source, so
that one inside a function or under TYPE_CHECKING counts as well.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jlora"

#: Parts that everything but the kernels may import. They import only each other.
SHARED = {"config", "errors", "files", "orbax_files", "projections", "request"}

#: What each part may import, besides itself.
MAY_IMPORT = {
    "kernels": set(),
    "manager": SHARED,
    "model": SHARED | {"kernels"},
    "engine": SHARED | {"manager", "model", "kernels"},
    "llm": SHARED | {"engine", "manager", "model", "kernels"},
    "server": SHARED | {"engine", "manager", "model", "kernels"},
    "demo_tasks": set(),
    **dict.fromkeys(SHARED, SHARED),
}

#: Parts on top, which may import everything and which nothing else may import.
TOP = {"__init__", "__main__", "cli", "demo"}

#: Packages that bring jax with them, or are it.
JAX_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of everything that the file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield node.lineno, alias.name
            case ast.ImportFrom():
                base = absolute_name(path, node)
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"
            case ast.Call(
                func=ast.Name("__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str() as name), *_],
            ):
                yield node.lineno, name


def absolute_name(path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[: -node.level]
    return ".".join([*package, *filter(None, [node.module])])


def imported_parts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every part of jlora that the file imports."""
    known = {part_of(source) for source in SOURCES} | MAY_IMPORT.keys() | TOP
    for line, module in imported_modules(path):
        names = module.split(".")
        if names[0] == "jlora":
            # jlora alone, or one of its public names, is what __init__ gives.
            found = names[1] if len(names) > 1 and names[1] in known else "__init__"
            yield line, found


def test_every_part_has_a_place() -> None:
    unknown = {part_of(path) for path in SOURCES} - MAY_IMPORT.keys() - TOP
    assert not unknown, f"say in tests/test_imports.py what these may import: {sorted(unknown)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    part = part_of(path)
    if part in TOP:
        return
    allowed = MAY_IMPORT.get(part, SHARED) | {part}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {part} may not import {found}"
        for line, found in imported_parts(path)
        if found not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_manager_source_imports_no_jax() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in SOURCES
        if part_of(path) == "manager"
        for line, module in imported_modules(path)
        if module.split(".")[0] in JAX_PACKAGES
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_the_manager_loads_no_jax() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if part_of(path) == "manager"
    ]
    if not modules:
        pytest.skip("no manager yet")
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"loaded = sorted({JAX_PACKAGES!r} & sys.modules.keys())\n"
        "sys.exit(f'importing the manager loaded {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
