"""How the package is laid out, measured on its code: `python -m tests.structure` prints it, a test holds it.

Rooms are the folders of `fl_taskarith`, in the order in which a change of one may reach the others: a room imports
rooms above it in `ROOMS` and never one below.
"""

import argparse
import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fl_taskarith"
NAME = PACKAGE.name
ROOT_MODULES = {"__init__", "errors", "seeding"}
ROOMS = (
    "masking.rules",  # names and rankings alone; settings list them
    *("config", "storage", "data", "data.sets", "models", "masking", "merging", "merging.rules", "training"),
    *("mixtures", "workspace", "engine", "client", "figures", "strategies", "server", "study", "mixtures.studies"),
    *("describe", "one_shot", "report", "bench", "cli"),
)
LONGEST_FUNCTION = 60  # lines
MOST_LINES = 17_500
MOST_ROOMS = 30
TENSORS = re.compile(r"\b(Tensor|Weights|TaskVector|GlobalModel|Frozen|ImageSet)\b")
SHAPES = re.compile(r"\[[^\[\]]*\]|\bshapes?\b|\bscalar\b")


@dataclass(frozen=True)
class Structure:
    """What is measured; every list names files below the package, functions as FILE:NAME."""

    lines: Mapping[str, int]
    root_modules: list[str]
    unknown_rooms: list[str]
    file_circles: list[list[str]]
    room_circles: list[list[str]]
    arrows_back_up: list[str]
    stems_twice: list[str]
    long_functions: list[str]
    without_docstring: list[str]
    without_shapes: list[str]
    tensor_functions: int


def measure(package: Path = PACKAGE) -> Structure:
    """The structure of the package in this folder."""
    files = {_module(path, package): path for path in sorted(package.rglob("*.py"))}
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in files.items()}
    imports = {module: _imports(tree, files) for module, tree in trees.items() if module}
    lines: Counter[str] = Counter()
    for module, path in files.items():
        lines[_room(module, path)] += len(path.read_text(encoding="utf-8").splitlines())
    rooms: dict[str, set[str]] = defaultdict(set)
    arrows = []
    for module, targets in imports.items():
        here = _room(module, files[module])
        for target in targets:
            there = _room(target, files[target])
            if not here or not there or here == there:
                continue
            rooms[here].add(there)
            if here in ROOMS and there in ROOMS and ROOMS.index(there) > ROOMS.index(here):
                arrows.append(f"{module} -> {target}")
    stems = Counter(path.stem for path in files.values() if path.stem not in ("__init__", "__main__"))
    functions = [(module, *each) for module, tree in trees.items() for each in _functions(tree)]
    tensors = [(module, name, node) for module, name, node in functions if _public(name) and _takes_tensors(node)]
    return Structure(
        lines=dict(lines),
        root_modules=sorted({path.stem for path in package.glob("*.py")} - ROOT_MODULES),
        unknown_rooms=sorted(set(lines) - {"", *ROOMS}),
        file_circles=_circles(imports),
        room_circles=_circles(rooms),
        arrows_back_up=sorted(arrows),
        stems_twice=sorted(stem for stem, count in stems.items() if count > 1),
        long_functions=[
            f"{module}:{name} ({length})"
            for module, name, node in functions
            if (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
        ],
        without_docstring=[
            f"{module}:{name}"
            for module, name, node in functions
            if _public(name) and not ast.get_docstring(node) and not _overload(node)
        ],
        without_shapes=[
            f"{module}:{name}" for module, name, node in tensors if not SHAPES.search(ast.get_docstring(node) or "")
        ],
        tensor_functions=len(tensors),
    )


def _module(path: Path, package: Path) -> str:
    """Dotted below the package; "" is its own __init__."""
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def _room(module: str, path: Path) -> str:
    """The folder a module lies in, dotted; "" at the root."""
    return module if path.stem == "__init__" else module.rpartition(".")[0]


def _imports(tree: ast.Module, files: Mapping[str, Path]) -> set[str]:
    """Modules of the package that this one imports anywhere, for type checkers too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and (node.module + ".").startswith(f"{NAME}."):
            base = node.module.removeprefix(NAME).lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in files else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix(f"{NAME}.") for alias in node.names if alias.name.startswith(f"{NAME}.")}
    return {module for module in found if module in files and module}


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions of a module and methods of its classes, as NAME or CLASS.NAME; none that stands in a function."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def _overload(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)


def _takes_tensors(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a tensor, or a mapping of them, is among what it takes or returns."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    annotations = [argument.annotation for argument in arguments if argument and argument.annotation] + [node.returns]
    return any(TENSORS.search(ast.unparse(annotation)) for annotation in annotations if annotation is not None)


def _circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in index:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], index[target])
        if lowest[node] == index[node]:
            place = stack.index(node)
            circle = sorted(stack[place:])
            del stack[place:]
            if len(circle) > 1:
                found.append(circle)

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def main() -> None:
    """Print the structure."""
    argparse.ArgumentParser(prog="python -m tests.structure", description=__doc__).parse_args()
    found = measure()
    for room in ("", *ROOMS, *found.unknown_rooms):
        print(f"{found.lines.get(room, 0):6,} lines  {room or '(root)'}")
    print(f"{sum(found.lines.values()):6,} lines in {len(found.lines) - 1} rooms, of {MOST_LINES:,} lines wanted\n")
    for title, members in (
        ("modules at the root beside errors and seeding", found.root_modules),
        ("rooms that have no place in the order", found.unknown_rooms),
        ("circles between files", [" <-> ".join(circle) for circle in found.file_circles]),
        ("circles between rooms", [" <-> ".join(circle) for circle in found.room_circles]),
        ("arrows back up", found.arrows_back_up),
        ("file stems twice", found.stems_twice),
        (f"functions over {LONGEST_FUNCTION} lines", found.long_functions),
        ("public functions without a docstring", found.without_docstring),
        (f"public tensor functions without shapes, of {found.tensor_functions}", found.without_shapes),
    ):
        print(f"{len(members):3} {title}")
        for member in members:
            print(f"      {member}")


if __name__ == "__main__":
    main()
