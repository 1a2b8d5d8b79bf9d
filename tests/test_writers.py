"""Every file is written all or nothing, through ``eva_lightning.files``, or has a reason in a list here."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.paths import ROOT

TOPS = ("eva_lightning", "experiments", "tools", "benchmarks", "examples")

#: Where files are written otherwise, and why.
APPENDED = "a log: lines are appended"
LEFT_OUT = {
    "eva_lightning/files.py:_settle": "the writer itself",
    "eva_lightning/sealed.py:set_aside": "renames a damaged file",
    "eva_lightning/checkpoint_io.py:save_sealed": "its callers give it a file of replacing()",
    "eva_lightning/checkpoint_io.py:_keep": "gives a whole checkpoint a second name",
    "eva_lightning/tensor_files.py:write_tensors": "its callers give it a file of replacing()",
    "eva_lightning/arrays.py:map_array": "reads",
    "eva_lightning/adapters/export.py:write": "its caller gives it a folder of filling()",
    "eva_lightning/plots.py:_png": "into memory",
    "eva_lightning/launching.py:__call__": "a message to the parent process, in a temporary folder",
    "eva_lightning/rl/trajectory_store.py:build": "a folder that takes its name when it is complete",
    "eva_lightning/rl/trajectory_store.py:_write": "into a folder that takes its name when it is complete",
    "eva_lightning/rl/minari_export.py:export_minari": "a folder that takes its name when it is complete",
    "eva_lightning/rl/video.py:_write_mp4": "its caller gives it a file of replacing()",
    "experiments/vtab/states.py:_compute": APPENDED,
    "experiments/runner/jobs.py:note": APPENDED,
    "experiments/runner/local_pool.py:_serve": APPENDED,
    "experiments/report/page.py:drawn": "into memory",
    "experiments/report/page.py:thumbnail": "into memory",
    "tools/vtab/archive.py:unpack": "a folder that takes its name when it is complete",
    "tools/vtab/archive.py:_write": "200,000 images: each renamed when complete, without waiting for the disk",
    "tools/vtab/archive.py:_fetch": "a download that goes on where it broke off; renamed when its digest is right",
    "tools/ucmerced_bundle.py:make": "a folder that takes its name when it is complete",
    "tools/ucmerced_bundle.py:_save": "into memory",
    "tools/vtab/originals/build.py:build_task": "a folder that takes its name when it is complete",
    "tools/vtab/originals/build.py:_writer.write": "many images, each renamed when complete, in a folder likewise",
    "tools/vtab/originals/build.py:_link": "into a temporary name, renamed by its caller",
    "examples/export_and_merge.py:": "torch's own writer, as readers use it",
    "examples/timm_vit.py:": "torch's own writer, as readers use it",
    "benchmarks/vtab/images.py:_make_up": "made-up data in a temporary folder",
    "benchmarks/initialisation/memory.py:peak_over_forward": "a message to a process, in a temporary folder",
    "benchmarks/initialisation/memory.py:reset_resident": "tells the kernel to count anew",
}

#: Methods and functions that write, whatever they are called on.
WRITERS = {
    "write_text", "write_bytes", "savefig", "savez", "savez_compressed", "savetxt", "tofile", "open_memmap", "memmap",
    "save_file", "imwrite", "imsave", "get_writer", "mimsave", "copyfile", "copyfileobj", "copy2", "copytree", "move",
    "rename", "renames", "link", "symlink", "symlink_to", "hardlink_to", "touch", "extract", "extractall",
    "save_checkpoint_to", "to_parquet", "to_pickle", "to_excel", "to_feather", "export", "write_html", "truncate",
}  # fmt: skip
#: Those that write where they are given a place, and return the text otherwise: name -> arguments before it.
WITH_A_PLACE = {"to_csv": 0, "to_json": 0, "to_html": 0, "to_markdown": 0, "to_latex": 0, "dump": 1, "safe_dump": 1}
#: What has a ``save`` of its own that goes through files.py.
SAFE_SAVE = re.compile(r"(plots|run|.*state.*|.*\.without_components\(\)|super\(\))$")


class _Writes(ast.NodeVisitor):
    """Finds calls that write, but for those on a file or folder that replacing() or filling() gave."""

    def __init__(self) -> None:
        self.where: list[str] = []
        self.given: list[str] = []
        self.found: list[tuple[str, str]] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.where.append(node.name)
        self.generic_visit(node)
        self.where.pop()

    def visit_With(self, node: ast.With) -> None:
        before = len(self.given)
        for item in node.items:
            self.visit(item.context_expr)
            call, name = item.context_expr, item.optional_vars
            if isinstance(call, ast.Call) and _called(call) in ("replacing", "filling") and isinstance(name, ast.Name):
                self.given.append(name.id)
        for statement in node.body:
            self.visit(statement)
        del self.given[before:]

    def visit_Call(self, node: ast.Call) -> None:
        if _writes(node) and not self._is_given(node):
            self.found.append((".".join(self.where), ast.unparse(node)))
        self.generic_visit(node)

    def _is_given(self, node: ast.Call) -> bool:
        parts = [*node.args, *(keyword.value for keyword in node.keywords)]
        if isinstance(node.func, ast.Attribute):
            parts.append(node.func.value)
        return any(isinstance(n, ast.Name) and n.id in self.given for part in parts for n in ast.walk(part))


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _writes(node: ast.Call) -> bool:
    name, method = _called(node), isinstance(node.func, ast.Attribute)
    if name == "open":
        modes = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        values = [str(mode.value) for mode in modes if isinstance(mode, ast.Constant)]
        return any(re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", value) for value in values)
    if name in WITH_A_PLACE:
        named = any(keyword.arg in ("path_or_buf", "stream", "buf") for keyword in node.keywords)
        return named or len(node.args) > WITH_A_PLACE[name]
    if name == "save":
        return method and not SAFE_SAVE.match(ast.unparse(node.func.value))  # type: ignore[attr-defined]
    if name == "replace":  # of a path; that of text has two arguments, that of a dataclass is no method
        return method and (len(node.args) == 1 or ast.unparse(node.func).startswith("os.")) and not node.keywords
    # functions of our own are called by their bare names
    return name in WRITERS and (method or name in ("save_file", "get_writer", "imwrite"))


def writes(source: str) -> list[tuple[str, str]]:
    """Function and text of every call that writes past files.py."""
    visitor = _Writes()
    visitor.visit(ast.parse(source))
    return visitor.found


def test_every_file_is_written_through_one_writer() -> None:
    found: Counter[str] = Counter()
    others = []
    for top in TOPS:
        for file in sorted((ROOT / top).rglob("*.py")):
            for where, text in writes(file.read_text(encoding="utf-8")):
                place = f"{file.relative_to(ROOT).as_posix()}:{where}"
                found[place] += 1
                if place not in LEFT_OUT:
                    others.append(f"{place}: {text}")
    assert not others, "write it through eva_lightning.files.replacing (or write_text, write_json, plots.save)"
    assert not set(LEFT_OUT) - set(found), "these are no longer needed here"


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')", "path.open('ab')", "open(path, mode='r+')", "path.write_text('')", "torch.save(x, path)",
        "np.save(path, x)", "np.savez(path, x=x)", "figure.savefig(path)", "frame.to_csv(path)", "json.dump(x, file)",
        "yaml.safe_dump(x, file)", "save_file(x, path)", "shutil.copyfile(a, b)", "path.rename(b)", "os.replace(a, b)",
        "path.replace(b)", "image.save(path)", "with replacing(a) as b:\n    torch.save(x, a)",
    ],
)  # fmt: skip
def test_the_search_finds(line: str) -> None:
    assert len(writes(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "open(path)", "path.open('rb')", "write_text(path, '')", "frame.to_csv(index=False)", "yaml.safe_dump(x)",
        "text.replace('a', 'b')", "replace(settings, lr=1)", "with replacing(a) as b:\n    torch.save(x, b)",
        "with filling(a) as b, other():\n    save_file(x, b / 'c')", "state.save(path)", "plots.save(figure, path)",
    ],
)  # fmt: skip
def test_the_search_passes(line: str) -> None:
    assert writes(line) == []


def test_paths_are_those_of_files() -> None:
    assert all(Path(ROOT, place.partition(":")[0]).is_file() for place in LEFT_OUT)
