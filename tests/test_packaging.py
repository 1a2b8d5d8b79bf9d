"""What is handed out: a source distribution is a clone, a wheel is the library with its commands inside it."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from email.message import Message
from pathlib import Path, PurePosixPath

import pytest

from tests.paths import ROOT

#: Where a wheel holds a folder of the checkout; the library itself keeps its place.
INSIDE = "eva_lightning/checkout"
COMMAND_FOLDERS = ("benchmarks", "configs", "experiments", "tools")


def _git_files() -> set[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return {name for name in listing.split("\0") if name and (ROOT / name).is_file()}


def _build(target: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    archive = _build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        # nothing to guard against: it was made a moment ago
        tar.extractall(folder)
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built as installers build it: from the source distribution."""
    return _build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment that has the wheel, and of this environment everything but the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    uv = str(Path(sys.executable).with_name("uv"))
    command = [
        uv,
        "pip",
        "install",
        "--python",
        str(python),
        "--no-deps",
        "--offline",
        "--no-cache",
        "--quiet",
        str(wheel),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # behind the wheel; this folder's .pth files, such as the checkout's, are not read
    (site / "others.pth").write_text(str(Path(pytest.__file__).parents[1]))
    return folder / "bin"


def _run(
    scripts: Path, words: Sequence[str], where: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    program = [str(scripts / words[0]), *words[1:]]
    return subprocess.run(program, cwd=where, env=kept | (environment or {}), capture_output=True, text=True)


def test_a_source_distribution_is_what_git_tracks(unpacked: Path) -> None:
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert files - {"PKG-INFO"} == _git_files()


def test_a_wheel_is_the_library_and_its_commands(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = {PurePosixPath(name) for name in _git_files()}
    library = {str(path) for path in tracked if path.parts[0] == "eva_lightning"}
    commands = {f"{INSIDE}/{path}" for path in tracked if path.parts[0] in COMMAND_FOLDERS}
    assert names == library | commands
    assert {"eva_lightning/py.typed", f"{INSIDE}/experiments/vtab/paper_tables.csv"} <= names


def test_a_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {PurePosixPath(name).parts[0] for name in archive.namelist() if ".dist-info/" in name}
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata: Message = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload(decode=True)
    assert isinstance(description, bytes)
    assert description.strip() == (ROOT / "README.md").read_bytes().strip()
    assert scripts.split() == ["[console_scripts]", "eva-lightning", "=", "eva_lightning.console:script"]


def test_the_installed_command_is_the_wheel_s_and_claims_no_common_name(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("raise RuntimeError('the user has a folder of that name')")
    done = _run(installed, ["eva-lightning", "--help"], tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  metaworld +\S", done.stdout, re.MULTILINE)
    code = "import eva_lightning, importlib.util as u; print(eva_lightning.__file__, u.find_spec('experiments'))"
    found = _run(installed, ["python", "-c", code], installed).stdout.split()
    assert Path(found[0]).is_relative_to(installed.parent)
    assert found[1] == "None"


def test_installed_commands_advise_what_can_be_called_there(installed: Path, tmp_path: Path) -> None:
    usage = _run(installed, ["eva-lightning", "vtab", "sweep", "--help"], tmp_path)
    assert usage.stdout.startswith("usage: eva-lightning vtab sweep "), usage.stderr
    code = (
        "from eva_lightning import console; console.main(['--version'])\n"
        "from eva_lightning.errors import InputError\n"
        "from experiments.runner.cli import sentence\n"
        "print(sentence(InputError('none: python -m experiments.vtab prepare --root DIR makes them')))\n"
    )
    done = _run(installed, ["python", "-c", code], tmp_path)
    assert done.stdout.splitlines()[1:] == ["none: eva-lightning vtab prepare --root DIR makes them"], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_command_whose_extra_is_not_installed_says_so_in_one_sentence(installed: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['jsonargparse'] = None; from eva_lightning import console; console.script()"
    done = _run(installed, ["python", "-c", code], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(
        r"error: [^\n]*jsonargparse[^\n]*not installed[^\n]*eva_lightning\[vision\][^\n]*\n", done.stderr
    )


def test_a_module_of_ours_that_is_missing_keeps_its_traceback(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['experiments.runner.cli'] = None; from eva_lightning import console; console.script()"
    )
    done = _run(installed, ["python", "-c", code], tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
