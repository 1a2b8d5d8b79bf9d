"""docs/private-apis.md lists every private or undocumented name of another package that the source uses."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest

from tests.paths import ROOT

TOPS = ("eva_lightning", "experiments", "benchmarks", "tools")
#: Parts of other packages that their documentation does not describe, though no underscore says so.
UNDOCUMENTED = (
    "lightning.pytorch.core", "lightning.pytorch.utilities.model_helpers", "lightning.pytorch.utilities.rank_zero.",
    "metaworld.", "minari.data_collector.", "minari.storage", "peft.tuners.", "peft.utils.", "ray._private",
    "torch.multiprocessing.reductions", "torch.nn.modules.",
)  # fmt: skip
#: Underscores that the documentation of the language, or of IPython, describes.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace", "_make", "_repr_png_"}
#: Strings of our own that look like private names.
STRINGS = {"_states", "_actions", "_scalars"}
#: Calls that take the name of an attribute.
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "__setattr__", "object", "pop", "get"}


class Row(NamedTuple):
    name: str
    files: list[str]
    test: str


@cache
def _rows() -> list[Row]:
    text = (ROOT / "docs" / "private-apis.md").read_text(encoding="utf-8")
    cells = [re.findall(r"`([^`]+)`", line) for line in text.splitlines() if line.startswith("| `")]
    return [Row(found[0], [name for name in found[1:-1] if name.endswith(".py")], found[-1]) for found in cells]


@cache
def _trees() -> dict[str, ast.Module]:
    files = [file for top in TOPS for file in sorted((ROOT / top).rglob("*.py"))]
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def _is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None and name not in DOCUMENTED


def _own(tree: ast.Module) -> set[str]:
    """Names that a file defines: functions, classes, variables, and attributes of `self`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return found


def _strings(tree: ast.Module) -> Iterator[str]:
    """Strings that name an attribute: in ``getattr`` and the like, and in lists, keys and subscripts."""
    for node in ast.walk(tree):
        parts: list[Any] = []
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            parts = node.args if called in BY_NAME else []
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            parts = node.elts
        elif isinstance(node, ast.Dict):
            parts = node.keys
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        yield from (x.value for x in parts if isinstance(x, ast.Constant) and isinstance(x.value, str))


@cache
def _own_of_all() -> set[str]:
    return set().union(*map(_own, _trees().values()))


def _private_names(tree: ast.Module) -> set[str]:
    found = set(_strings(tree)) - STRINGS
    inherited: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            # what a class of ours inherits from another is defined in another file
            on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (inherited if on_self else found).add(node.attr)
    found = (found - _own(tree)) | (inherited - _own_of_all())
    return {name for name in found if _is_private(name) and not name.startswith("_eva_lightning")}


def _imports(tree: ast.Module) -> set[str]:
    """Undocumented things imported, by their whole names."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    private = {name for name in found if any(_is_private(part) for part in name.split("."))}
    return private | {name for name in found if name.startswith(UNDOCUMENTED)}


def test_everything_private_is_listed() -> None:
    listed = {(file, row.name) for row in _rows() for file in row.files}
    by_last = {(file, name.rpartition(".")[2]) for file, name in listed}
    missing = [
        f"{file}: {name}"
        for file, tree in _trees().items()
        for name in sorted({*_imports(tree), *_private_names(tree)})
        if (file, name) not in listed and (name in _imports(tree) or (file, name) not in by_last)
    ]
    assert not missing, "list them in docs/private-apis.md with the test that fails when they go"


def test_what_is_listed_is_used() -> None:
    stale = [
        f"{row.name}: {file}"
        for row in _rows()
        for file in row.files
        if not _names((ROOT / file).read_text(encoding="utf-8"), row.name.rpartition(".")[2])
    ]
    assert not stale


@pytest.mark.slow  # imports every package that a table names
@pytest.mark.parametrize("row", _rows(), ids=lambda row: row.name)
def test_what_is_listed_exists_and_has_a_test(row: Row) -> None:
    file, _, test = row.test.partition("::")
    assert re.search(rf"def {test}\(", (ROOT / file).read_text(encoding="utf-8")), f"there is no {row.test}"
    owner, name = _owner(row.name)
    # attributes that only instances have stand in the source of their class
    assert hasattr(owner, name) or _names(inspect.getsource(owner), name), f"{row.name} is gone"


def _names(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def _owner(whole: str) -> tuple[Any, str]:
    parts = whole.split(".")
    for size in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            if size == 1:  # all of them are in the lock files
                raise
            continue
        for part in parts[size:-1]:
            found = getattr(found, part)
        return found, parts[-1]
    raise AssertionError(whole)
