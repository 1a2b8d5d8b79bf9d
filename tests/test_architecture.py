"""The structure of the source: imports go one way, nothing private crosses files, one folder knows PEFT."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.paths import ROOT

#: From the ground up: a package may import those on lines above it, and within its own line.
FLOORS = (
    ("eva_lightning",),
    ("eva_lightning.methods", "eva_lightning.optim", "eva_lightning.rl", "eva_lightning.vision"),
    ("experiments.runner",),
    ("tools", "benchmarks.harness"),
    ("experiments.vtab", "experiments.metaworld", "experiments.report"),
    ("experiments.comparisons",),
    ("experiments", "benchmarks", "examples"),
)
TOPS = ("eva_lightning", "experiments", "tools", "benchmarks", "examples")


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _sources() -> dict[str, ast.Module]:
    files = [file for top in TOPS for file in sorted((ROOT / top).rglob("*.py"))]
    return {_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in files}


@cache
def _imports() -> dict[str, list[tuple[str, list[str]]]]:
    """Module -> what it imports, inside functions and for type checkers too: a module of ours, and names from it."""
    known = set(_sources())
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for name, tree in _sources().items():
        found[name] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] += [(alias.name, []) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports relatively: write the whole name"
                module = node.module or ""
                submodules = [a.name for a in node.names if f"{module}.{a.name}" in known]
                names = [a.name for a in node.names if a.name not in submodules]
                found[name] += [(f"{module}.{submodule}", []) for submodule in submodules]
                if names:
                    found[name].append((module, names))
    return found


def _floor(module: str) -> int:
    fits = [
        (len(package), floor)
        for floor, packages in enumerate(FLOORS)
        for package in packages
        if module == package or module.startswith(f"{package}.")
    ]
    return max(fits)[1]


def test_imports_go_one_way() -> None:
    up = [
        f"{importer} -> {imported}"
        for importer, entries in _imports().items()
        for imported, _ in entries
        if imported in _sources() and _floor(imported) > _floor(importer)
    ]
    assert not up


def test_no_module_imports_itself_through_others() -> None:
    known = _sources()
    graph = {
        name: {imported for imported, _ in entries if imported in known and imported != name}
        for name, entries in _imports().items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_nothing_private_is_imported() -> None:
    private = [
        f"{importer}: from {module} import {name}"
        for importer, entries in _imports().items()
        for module, names in entries
        if module.partition(".")[0] in TOPS
        for name in names
        if name.startswith("_") and not name.startswith("__")
    ]
    assert not private


def test_only_adapters_know_peft() -> None:
    # benchmarks measure PEFT, examples show its configuration
    allowed = ("eva_lightning.adapters", "benchmarks", "examples")
    others = [
        importer
        for importer, entries in _imports().items()
        for module, _ in entries
        if module.partition(".")[0] == "peft" and not importer.startswith(allowed)
    ]
    assert not others


#: What opens an image file: by Pillow, Matplotlib, imageio, torchvision and OpenCV. Whatever is called ``open`` of a
#: module or class ``Image`` is Pillow's.
_DECODERS = ("imread", "imopen", "mimread", "get_reader", "read_image", "decode_image", "decode_jpeg", "decode_png",
             "default_loader", "pil_loader", "imdecode", "read_video", "VideoReader", "ImageFile")  # fmt: skip


def test_image_files_are_decoded_in_one_place() -> None:
    decoding = []
    for name, tree in _sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                of_pillow = node.attr == "open" and ast.unparse(node.value).endswith("Image")
                decoding += [f"{name}: {ast.unparse(node)}"] if of_pillow or node.attr in _DECODERS else []
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("PIL", "torchvision"):
                decoding += [f"{name}: {a.name}" for a in node.names if a.name in ("open", *_DECODERS)]
    assert decoding == ["eva_lightning.vision.data.decoding: Image.open"]
