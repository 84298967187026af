"""The project's modules as syntax trees: their imports, definitions and calls."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FLOORS = ("online_meta", "streams", "trainers", "deploy")
"""The packages, lowest floor first."""


class Module(NamedTuple):
    """A module: its dotted name, its file, and the file's path relative to the root."""

    name: str
    path: Path
    place: str

    @property
    def tree(self) -> ast.Module:
        return _parse(self.path)


class Import(NamedTuple):
    """One import of ``target`` (a dotted name) on a line of a module."""

    module: Module
    line: int
    target: str


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def modules(root: Path = ROOT) -> dict[str, Module]:
    """Return the modules of the four packages under ``root`` by dotted name."""
    found = {}
    for floor in FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            place = path.relative_to(root)
            parts = place.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(name, path, str(place))
    return found


def imports(module: Module, known: dict[str, Module]) -> Iterator[Import]:
    """Yield every import in a module; ``from a import b`` is a.b if that is a module, else a."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Import(module, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(module, node)
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                yield Import(module, node.lineno, whole if whole in known else origin)
        elif isinstance(node, ast.Call) and dotted(node.func) in ("importlib.import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(module, node.lineno, first.value)


def _origin(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.name.split(".") if module.path.name == "__init__.py" else module.name.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def dotted(node: ast.AST) -> str:
    """Return a dotted expression such as ``os.environ`` as text, "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""
