"""``scripts/environment.sh``: what it takes from a lock, with CUDA and without."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT

#: What only a GPU needs: their names in the lock begin so.
CUDA = re.compile(r"nvidia-|cuda-|triton==")
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "eva_lightning"
version = "1"
[tool.hatch.build.targets.wheel]
packages = ["eva_lightning"]
dev-mode-dirs = ["."]
"""


def _split(text: str) -> list[str]:
    return re.findall(r"^[A-Za-z0-9].*(?:\n[ \t].*)*", text, re.MULTILINE)


def _entries(part: str, pattern: str) -> list[str]:
    script, lock = ROOT / "scripts" / "lock_entries.awk", ROOT / "requirements.lock"
    command = ["awk", "-v", f"part={part}", "-v", f"pattern={pattern}", "-f", str(script), str(lock)]
    return _split(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_every_entry_of_the_lock_is_in_one_part_and_keeps_its_hashes() -> None:
    script = (ROOT / "scripts" / "environment.sh").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"entries rest '([^']+)'", script)
    only, rest = _entries("only", pattern), _entries("rest", pattern)
    locked = _split((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    assert [entry for entry in locked if entry in rest] == rest
    assert sorted(only + rest) == sorted(locked)
    assert {entry.partition("==")[0] for entry in only if not CUDA.match(entry)} == {"torch", "torchvision"}
    assert [entry for entry in rest if CUDA.match(entry)] == []


def _wheel(folder: Path, name: str, version: str, module: str, text: str = "") -> str:
    """Write a wheel of one module; return its entry in a lock."""
    folder.mkdir(exist_ok=True)
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(module, text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name.replace('_', '-')}=={version} \\\n    --hash=sha256:{digest}\n    # via nothing\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a lock of three small packages, and an environment that has uv and nothing else.

    Its pip, uv and hatchling are those of the environment that runs the tests: laying down pip alone takes seconds.
    """
    folder, index = tmp_path / "project", tmp_path / "index"
    (folder / "eva_lightning").mkdir(parents=True)
    uv = importlib.metadata.version("uv")
    lock = f"# a comment before all\nuv=={uv} \\\n    --hash=sha256:{'0' * 64}\n"
    lock += _wheel(index, "nvidia_cublas", "13", "cublas.py")
    lock += _wheel(index, "torch", "2.15.0", "torch.py", "cuda = True")
    lock += _wheel(index, "torchmetrics", "1.9", "torchmetrics.py")
    _wheel(tmp_path / "cpu", "torch", "2.15.0+cpu", "torch.py", "cuda = False")
    (folder / "requirements.lock").write_text(lock)
    (folder / "pyproject.toml").write_text(PROJECT)
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    venv.create(folder / ".venv", with_pip=False, symlinks=True)
    (_site(folder) / "others.pth").write_text(str(Path(pytest.__file__).parents[1]))
    (folder / ".venv" / "bin" / "uv").symlink_to(Path(sys.executable).with_name("uv"))
    distribution = f"uv-{uv}.dist-info"
    shutil.copytree(Path(pytest.__file__).parents[1] / distribution, _site(folder) / distribution)
    return folder


def _site(project: Path) -> Path:
    return next((project / ".venv" / "lib").glob("python3*")) / "site-packages"


def _make(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    given = ("PIP_", "UV_", "PYTHON", "TORCH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(given)}
    index = str(project.parent / "index")
    # as docs/install.md says it for machines without an index
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": index, "UV_OFFLINE": "1", "UV_FIND_LINKS": index}
    command = ["bash", str(project / "scripts" / "environment.sh"), sys.executable]
    return subprocess.run(
        command, env=kept | offline | {"UV_NO_CACHE": "1"} | variables, capture_output=True, text=True
    )


def test_without_cuda_torch_is_the_cpu_build_and_all_else_is_the_locks(project: Path) -> None:
    done = _make(project, TORCH="cpu", TORCH_WHEELS=str(project.parent / "cpu"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (_site(project) / "torch.py").read_text() == "cuda = False"
    assert (_site(project) / "torchmetrics.py").exists()
    assert not (_site(project) / "cublas.py").exists()
    assert list(_site(project).glob("eva_lightning-1.dist-info"))
    assert not (project / ".venv" / ".unfinished").exists()


def test_without_cuda_too_a_package_that_is_not_the_locked_one_is_refused(project: Path) -> None:
    _wheel(project.parent / "index", "torchmetrics", "1.9", "torchmetrics.py", "another = True")
    done = _make(project, TORCH="cpu", TORCH_WHEELS=str(project.parent / "cpu"))
    assert done.returncode != 0
    assert re.search("hash.*torchmetrics", done.stderr, re.IGNORECASE | re.DOTALL)
    assert (project / ".venv" / ".unfinished").exists()


def test_another_word_for_torch_is_refused_before_anything_is_made(project: Path) -> None:
    shutil.rmtree(project / ".venv")
    done = _make(project, TORCH="gpu")
    assert (done.returncode, done.stderr) == (1, "error: TORCH is cpu or cuda, got gpu.\n")
    assert not (project / ".venv").exists()
