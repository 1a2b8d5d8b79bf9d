"""Every Python and YAML block of every page runs, or says why it does not."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

from eva_lightning.adapters.base_weight_init import INITIALISATIONS
from eva_lightning.methods import METHODS
from eva_lightning.methods.starts import KINDS
from tests.documents.pages import PAGES, Block, blocks, name
from tests.paths import ROOT
from tools.website.notes import NOT_RUN

#: Pages whose blocks a test of their own runs, with more of what they need around them.
OWN_TESTS = {
    "docs/in-your-code.md": "tests/test_in_your_code.py",
    "docs/own-images.md": "tests/experiments/finetune/test_document.py",
}
WITH_PYTHON = [
    page for page in PAGES if name(page) not in OWN_TESTS and any(block.language == "python" for block in blocks(page))
]

#: What a page without room for it has run before its last blocks: page -> its block's number and code.
BEFORE = {
    "README.md": (1, "from peft import LoraConfig\ntrainer.callbacks[0].state.save('eva')\n"),
}

#: Modules of the reader's that pages name; a test runs `project.py` of docs/in-your-code.md.
READERS_MODULES = ("my_package.", "project.")

#: All blocks that are not run, in one place: page and reason -> how many.
LEFT_OUT = {
    ("docs/how-to/many-devices.md", "gpu"): 1,
    ("docs/how-to/qlora.md", "data"): 1,
}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace for a page, in an empty folder: what a reader who types it all would have."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "page"}
    python = [block for block in blocks(page) if block.language == "python"]
    # a page adds a method of its own, which other tests must not see
    with patch.dict(METHODS), patch.dict(KINDS), patch.dict(INITIALISATIONS):
        for number, block in enumerate(python):
            if number == BEFORE.get(name(page), (None, ""))[0]:
                exec(BEFORE[name(page)][1], namespace)
            if block.not_run is None:
                exec(_compiled(block), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) in OWN_TESTS], ids=name)
def test_pages_that_are_left_out_have_a_test_of_their_own(page: Path) -> None:
    assert page.name in (ROOT / OWN_TESTS[name(page)]).read_text(encoding="utf-8")


def _compiled(block: Block) -> Any:
    # tracebacks and syntax errors name the page and its line
    return compile("\n" * (block.line - 1) + block.code, block.page, "exec")


def test_what_is_not_run_is_listed_and_imports_what_there_is() -> None:
    left_out = [block for page in PAGES for block in blocks(page) if block.not_run is not None]
    assert Counter((block.page, str(block.not_run)) for block in left_out) == LEFT_OUT
    assert {reason for _, reason in LEFT_OUT} <= set(NOT_RUN)
    for block in left_out:
        imports = [node for node in ast.parse(block.code).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), block.page, "exec"), {})


def test_no_block_hides_behind_another_language() -> None:
    """What looks like Python is marked as Python, and so is run."""
    other = [block for page in PAGES for block in blocks(page) if block.language not in ("python", "yaml", "bash")]
    assert [f"{b.page}:{b.line}" for b in other if b.language or b.code.startswith(("import ", "from "))] == []


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "yaml" for b in blocks(p))], ids=name)
def test_yaml_blocks_are_yaml_and_name_classes_and_arguments_that_exist(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            _check_classes(yaml.safe_load(block.code))


def _check_classes(value: Any) -> None:
    if isinstance(value, list):
        for each in value:
            _check_classes(each)
    elif isinstance(value, dict):
        path = value.get("class_path")
        if path is not None and not path.startswith(READERS_MODULES):
            module, _, attribute = path.rpartition(".")
            signature = inspect.signature(getattr(importlib.import_module(module), attribute))
            signature.bind_partial(**value.get("init_args", {}))
        for each in value.values():
            _check_classes(each)
