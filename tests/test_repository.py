"""Promises about the repository itself: what a clone holds, what the lock pins, what the core package needs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 5_000_000

# Written so that no pattern matches itself here.
FORBIDDEN = {
    "a package registry's host": (
        r"pyp[i]\.org|pythonhoste[d]\.org|download\.pytorc[h]\.org|registry\.npmj[s]|deb\.debia[n]\.org"
    ),
    "a path of one machine": (
        r"(?<![\w.])/(?:roo[t]|hom[e]/\w+|User[s]/\w+|wor[k]|opt/pyp[i]|opt/wheel[s])(?=[/\s\"'`:,;)]|$)"
    ),
    "a credential": (
        r"\bhf_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}|BEGIN [A-Z ]*PRIVATE KE[Y]"
    ),
}

# Modules that only an extra installs, or that are too slow to import for a user who has not asked for adapters yet.
NOT_FOR_IMPORT = [
    "bitsandbytes",
    "gymnasium",
    "jsonargparse",
    "matplotlib",
    "metaworld",
    "mujoco",
    "peft",
    "ray",
    "sklearn",
    "timm",
    "torchvision",
    "wandb",
]


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """The files that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_is_large(files: list[Path]) -> None:
    large = [path for path in files if path.stat().st_size > MAX_BYTES]
    assert [f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes" for path in large] == []


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str, files: list[Path]) -> None:
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    found = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []


def test_forbidden_patterns_find_what_they_are_for() -> None:
    """The check above is worth something only if its patterns match."""
    registry, machine, credential = (re.compile(pattern, re.MULTILINE) for pattern in FORBIDDEN.values())
    assert registry.search("--index-url https://" + "pypi" + ".org/simple")
    assert machine.search("see /" + "root/.cache and")
    assert machine.search('open("/' + 'home/me/x")')
    assert not machine.search("docs/" + "root/x, a/" + "work/b and /workspace")
    assert credential.search("token = hf_" + "a" * 34)


def _locked() -> dict[str, list[str]]:
    """Versions per package in requirements.lock: one per Python range."""
    text = (ROOT / "requirements.lock").read_text()
    versions: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE):
        versions.setdefault(canonicalize_name(name), []).append(version)
    return versions


def test_lock_pins_everything_with_hashes_and_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.findall(r"^[A-Za-z0-9].*(?:\n[ \t].*)*", text, re.MULTILINE)
    assert blocks
    assert [block.splitlines()[0] for block in blocks if "==" not in block or "--hash=sha256:" not in block] == []
    assert re.findall(r"^\s*(?:-i|-f|-e|--(?!hash)\S+).*|.*://.*|.* @ .*", text, re.MULTILINE) == []


def test_lock_satisfies_every_range_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    locked = _locked()
    for requirement in map(Requirement, requirements):
        if requirement.name == project["name"]:  # an extra that includes another one
            continue
        versions = locked.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement.name} is missing from requirements.lock: run `make lock`"
        assert all(requirement.specifier.contains(v, prereleases=True) for v in versions), (str(requirement), versions)


def test_extras_are_the_documented_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == {
        "experiments",
        "vision",
        "plots",
        "rl",
        "sweep",
        "slurm",
        "quant",
        "docs",
        "dev",
    }
    assert {Requirement(r).name for r in project["dependencies"]} == {
        "lightning",
        "numpy",
        "peft",
        "rich",
        "safetensors",
        "torch",
        "typing-extensions",
    }


def test_import_needs_no_extra_and_not_peft() -> None:
    """`import eva_lightning` works where only the core is installed, and does not wait for PEFT and transformers.

    Lightning comes first: what it imports where it finds it (matplotlib, through torchmetrics) is its own business.
    """
    code = (
        "import sys, lightning.pytorch\n"
        f"for name in {NOT_FOR_IMPORT!r}: sys.modules.setdefault(name, None)\n"
        "import eva_lightning\n"
        "assert all(getattr(eva_lightning, name) is not None for name in eva_lightning.__all__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
