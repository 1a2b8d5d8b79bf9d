"""The examples and the notebook run from top to bottom, with no more than what they say they need."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.paths import ROOT
from tests.test_repository import NOT_FOR_IMPORT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

#: Extra -> modules of it that an example may import. One process runs all examples of an extra, as importing torch and
#: Lightning takes longer than any of them.
MODULES = {
    "the core package": ("peft",),
    "vision": ("peft", "timm", "torchvision"),
    "quant": ("peft", "bitsandbytes"),
    "rl": ("peft", "gymnasium", "metaworld", "mujoco"),
}
#: Examples that a test of their own runs, with other arguments.
OWN_TESTS = {"own_environment.py": "tests/examples/test_own_environment.py"}

_RUN = """
import runpy, sys
import lightning.pytorch
for name in {blocked!r}: sys.modules.setdefault(name, None)
sys.path.insert(0, {root!r})
for example in {examples!r}:
    print("==", example, flush=True)
    runpy.run_path(example, run_name="__main__")
"""


def needs(example: Path) -> str:
    """The extra that an example says it needs, in its first lines."""
    found = re.search(r"(?:pip install '\.\[|the extra ``)(\w+)", example.read_text(encoding="utf-8").split('"""')[1])
    return found[1] if found else "the core package"


@pytest.mark.slow
@pytest.mark.parametrize("extra", sorted({needs(example) for example in EXAMPLES}))
def test_examples_run_on_what_they_need_alone(extra: str, tmp_path: Path) -> None:
    examples = [str(example) for example in EXAMPLES if needs(example) == extra and example.name not in OWN_TESTS]
    blocked = [name for name in NOT_FOR_IMPORT if name not in MODULES[extra]]
    code = _RUN.format(blocked=blocked, root=str(ROOT), examples=examples)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout.rpartition('== ')[2][:200]}\n{done.stderr[-2000:]}"
    if extra == "the core package":
        assert "7 / 7 / 10, sum 24" in done.stdout  # the table that the README shows


@pytest.mark.parametrize("example", [each for each in EXAMPLES if each.name in OWN_TESTS], ids=lambda path: path.stem)
def test_examples_that_are_left_out_have_a_test_of_their_own(example: Path) -> None:
    assert example.name in (ROOT / OWN_TESTS[example.name]).read_text(encoding="utf-8")


def test_the_examples_are_those_that_the_page_lists() -> None:
    listed = re.findall(r"\]\(\.\./examples/([^)]+)\)", (ROOT / "docs" / "examples.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in (*EXAMPLES, *NOTEBOOKS))


# --- the notebook ----------------------------------------------------------------------------------------------------

#: What Jupyter's format 4.5 requires of the parts that are used here.
_TEXT = {"type": "array", "items": {"type": "string"}}
_CELL: dict[str, Any] = {
    "type": "object",
    "required": ["cell_type", "id", "metadata", "source"],
    "properties": {"id": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}, "source": _TEXT},
}
_OTHERS: dict[str, Any] = {"id": {}, "metadata": {}, "source": {}}
_CODE = {
    "additionalProperties": False,
    "required": ["execution_count", "outputs"],
    "properties": {
        **_OTHERS, "cell_type": {"const": "code"}, "outputs": {"maxItems": 0}, "execution_count": {"type": "null"},
    },
}  # fmt: skip
_MARKDOWN = {"additionalProperties": False, "properties": {**_OTHERS, "cell_type": {"const": "markdown"}}}
_NOTEBOOK = {
    "type": "object",
    "required": ["cells", "metadata", "nbformat", "nbformat_minor"],
    "additionalProperties": False,
    "properties": {
        "nbformat": {"const": 4}, "nbformat_minor": {"minimum": 5},
        "metadata": {"type": "object", "required": ["kernelspec", "language_info"]},
        "cells": {"type": "array", "items": {"allOf": [_CELL, {"oneOf": [_CODE, _MARKDOWN]}]}},
    },
}  # fmt: skip


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_valid_and_committed_without_outputs(notebook: Path) -> None:
    document = json.loads(notebook.read_text(encoding="utf-8"))
    jsonschema.validate(document, _NOTEBOOK)
    ids = [cell["id"] for cell in document["cells"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}:{cell['id']}", "exec"), namespace)
    assert namespace["eva"].state.ranks == {"net.0": 10, "net.2": 7, "net.4": 7}  # as the README's table says
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
