"""Which file imports which, read from the sources: nothing is imported."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "exporter", "lace_trainer", "lace_evaluation")


def modules(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """{dotted name: file}"""
    found = {}
    for package in packages:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path], *, late: bool) -> set[str]:
    """The modules of ``known`` that a file imports: when it is imported itself, or late, within its functions.

    What only type checkers import counts for neither.
    """
    found: set[str] = set()
    for node, is_late in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if is_late == late:
            found |= set(targets(node, name, path.name == "__init__.py", known))
    return found - {name}


def statements(node: ast.AST, is_late: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, is_late
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (found for part in child.orelse for found in statements(part, is_late))
        else:
            yield from statements(child, is_late or isinstance(child, ast.FunctionDef | ast.Lambda))


def targets(node: ast.Import | ast.ImportFrom, name: str, is_package: bool, known: dict[str, Path]) -> Iterator[str]:
    """``from a import b`` is of the module a.b where there is one, else of a."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
        return
    base = node.module or ""
    if node.level:
        above = name.split(".")[: len(name.split(".")) - node.level + is_package]
        base = ".".join([*above, *([node.module] if node.module else [])])
    for alias in node.names:
        whole = f"{base}.{alias.name}"
        if whole in known:
            yield whole
        elif base in known:
            yield base


@cache
def graph(*, late: bool = False, root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> dict[str, set[str]]:
    """Of every module what it imports at once; with ``late`` what it imports at once or late."""
    known = modules(root, packages)
    found = {name: imports(name, path, known, late=False) for name, path in known.items()}
    if late:
        found = {name: found[name] | imports(name, path, known, late=True) for name, path in known.items()}
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module, each sorted (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in sorted(edges):
        if name not in index:
            visit(name)
    return found


def reached(edges: dict[str, set[str]], *starts: str) -> set[str]:
    found, waiting = set(), list(starts)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += edges[name]
    return found
