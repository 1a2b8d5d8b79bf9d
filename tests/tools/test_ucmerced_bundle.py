"""The bundle of photographs: the committed one is whole, and the script that made it draws as it says."""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.vision.data.own_tasks import read_own_task
from tests.paths import ROOT
from tools import ucmerced_bundle
from tools.ucmerced_bundle import ALL_CLASSES, CLASSES, SIZES, Settings, bundle_facts, difference_hash, make

BUNDLE = ROOT / "experiments" / "assets" / "ucmerced10"


def _photograph(path: Path, seed: int, size: int = 40) -> None:
    """Noise that no two seeds share."""
    coarse = np.random.default_rng(seed).integers(0, 256, (17, 17, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucmerced_bundle, "SIZES", {"train": 2, "val": 1, "test": 2})


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    """The archive's layout in small: six TIFF files of every class, in a folder Images."""
    for number, name in enumerate(ALL_CLASSES):
        for i in range(6):
            _photograph(tmp_path / "UCMerced" / "Images" / name / f"{name}{i:02}.tif", 100 * number + i)
    return tmp_path / "UCMerced"


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """VTAB-1K's layout: of eight images of every class four train and four test."""
    folder = tmp_path / "listed"
    lines: dict[str, list[str]] = {"train800val200": [], "test": []}
    for label, name in enumerate(ALL_CLASSES):
        for i in range(8):
            _photograph(folder / "images" / name / f"{name}{i:02}.jpg", 100 * label + i)
            lines["test" if i % 2 else "train800val200"].append(f"images/{name}/{name}{i:02}.jpg {label}")
    for split, of_split in lines.items():
        (folder / f"{split}.txt").write_text("\n".join(of_split))
    return folder


def test_the_committed_bundle_is_whole_small_and_balanced() -> None:
    number, size, digest = bundle_facts(BUNDLE)
    text = (BUNDLE / "SOURCES.md").read_text(encoding="utf-8")
    assert digest == re.search(r"SHA-256 ([0-9a-f]{64})", text)[1]  # type: ignore[index]
    assert number == 10 * sum(SIZES.values()) == 700
    assert size < 3_000_000
    task = read_own_task(BUNDLE)
    assert task.classes == CLASSES == ALL_CLASSES[0:20:2]
    for split, part in (("train800", "train"), ("val200", "val"), ("test", "test")):
        labels = [label for _, label in task.splits[split]]
        assert np.bincount(labels).tolist() == [SIZES[part]] * 10
    for word in ("Yang and", "Newsam", "public domain", "USGS"):
        assert word in text


def test_no_image_of_the_bundle_is_in_two_splits() -> None:
    names, contents, hashes = set(), set(), []
    for path in BUNDLE.rglob("*.jpg"):
        names.add(path.stem)
        contents.add(hashlib.sha256(path.read_bytes()).hexdigest())
        with Image.open(path) as image:
            assert image.size == (70, 70)
            hashes.append((path.parts[-3], difference_hash(image)))
    assert len(names) == len(contents) == 700
    bits = np.array([bits for _, bits in hashes]).astype(np.int32)
    split = np.array([split for split, _ in hashes])
    distances = bits @ (1 - bits).T + (1 - bits) @ bits.T
    assert distances[np.ix_(split == "test", split != "test")].min() > 10


def test_originals_and_split_files_are_read_and_give_the_same_bundle_each_time(
    few: None, originals: Path, listed: Path, tmp_path: Path
) -> None:
    for source in (originals, listed):
        said = [make(Settings(str(source), str(tmp_path / f"{source.name}-{i}"), pixels=28)) for i in range(2)]
        out = tmp_path / f"{source.name}-0"
        assert said[0].replace("-0:", "") == said[1].replace("-1:", "")
        task = read_own_task(out)
        assert task.classes == CLASSES
        assert [len(task.splits[split]) for split in ("train800", "val200", "test")] == [20, 10, 20]
        assert len({path.stem for path in out.rglob("*.jpg")}) == 50
        assert not list(tmp_path.glob(".ucmerced-*"))
    drawn = {path.stem[-2:]: path.parts[-3] for path in (tmp_path / "listed-0").rglob("agricultural*.jpg")}
    assert {int(number) % 2 for number, split in drawn.items() if split == "test"} == {1}
    assert {int(number) % 2 for number, split in drawn.items() if split != "test"} == {0}


def test_near_duplicates_are_passed_over(few: None, originals: Path, tmp_path: Path) -> None:
    folder = originals / "Images" / "agricultural"
    _photograph(folder / "agricultural06.tif", 3)  # the same ground as 03
    make(Settings(str(originals), str(tmp_path / "out"), pixels=28))
    taken = {path.stem[-2:] for path in (tmp_path / "out").rglob("agricultural*.jpg")}
    assert not {"03", "06"} <= taken
    for first, second in itertools.combinations([f"{i:02}" for i in range(6) if i != 3], 2):
        a, b = (difference_hash(Image.open(folder / f"agricultural{i}.tif")) for i in (first, second))
        assert (a != b).sum() > 20


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "river" / "river03.tif").write_bytes(b"II*\0nothing"), "cannot be decoded"),
        (lambda folder: _photograph(folder / "river" / "river03.tif", 1, size=20), "at least 28 are needed"),
        (lambda folder: [(folder / "river" / f"river0{i}.tif").unlink() for i in (0, 1)], "class river has"),
        (lambda folder: (folder / "tenniscourt").rename(folder / "golf"), "it lacks images of tenniscourt"),
    ],
    ids=["damaged", "too-small", "too-few", "another-data-set"],
)
def test_what_cannot_be_used_is_one_sentence_and_leaves_nothing(
    few: None, originals: Path, tmp_path: Path, spoil: object, message: str
) -> None:
    spoil(originals / "Images")  # type: ignore[operator]
    with pytest.raises((InputError, MissingInputError), match=message):
        make(Settings(str(originals), str(tmp_path / "out"), pixels=28))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["UCMerced"]


def test_a_bundle_that_is_there_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    assert ucmerced_bundle.main(["--source", str(ROOT)]) == 2
    assert "exists: delete it, or choose another --out" in capsys.readouterr().err
