"""Every task that is built from original data, on a miniature in the original's own format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eva_lightning.vision.data.split_files import read_split
from eva_lightning.vision.data.tasks import TASKS
from tests.tools.vtab import original_fakes as fakes
from tests.tools.vtab.original_fakes import Content, Examples
from tools.vtab.originals import ORIGINALS, REFUSED
from tools.vtab.originals.build import build_task, require_original
from tools.vtab.originals.rules import Rule, Slice, slices

# task -> what writes the fake, and the slices of it that train800 (5 images), val200 (2 images) and test must be
CASES: dict[str, tuple[Callable[[Path], Examples], dict[str, tuple[str, int, int | None]]]] = {
    "cifar": (fakes.cifar, {"train800": ("train", 0, 5), "val200": ("train", 36, 38), "test": ("test", 0, None)}),
    "svhn": (fakes.svhn, {"train800": ("train", 0, 5), "val200": ("train", 36, 38), "test": ("test", 0, None)}),
    "dtd": (fakes.dtd, {"train800": ("train", 0, 5), "val200": ("validation", 0, 2), "test": ("test", 0, None)}),
    "oxford_flowers102": (
        fakes.flowers,
        {"train800": ("train", 0, 5), "val200": ("validation", 0, 2), "test": ("test", 0, None)},
    ),
    "oxford_iiit_pet": (
        fakes.pets,
        {"train800": ("train", 0, 5), "val200": ("train", 16, 18), "test": ("test", 0, None)},
    ),
    "patch_camelyon": (
        fakes.camelyon,
        {"train800": ("train", 0, 5), "val200": ("validation", 0, 2), "test": ("test", 0, None)},
    ),
    "eurosat": (fakes.eurosat, {"train800": ("train", 0, 5), "val200": ("train", 18, 20), "test": ("train", 24, None)}),
    "resisc45": (
        fakes.resisc45,
        {"train800": ("train", 0, 5), "val200": ("train", 18, 20), "test": ("train", 24, None)},
    ),
    "clevr_count": (
        partial(fakes.clevr, distances=False),
        {"train800": ("train", 0, 5), "val200": ("train", 27, 29), "test": ("validation", 0, None)},
    ),
    "clevr_dist": (
        partial(fakes.clevr, distances=True),
        {"train800": ("train", 0, 5), "val200": ("train", 27, 29), "test": ("validation", 0, None)},
    ),
    "dmlab": (fakes.dmlab, {"train800": ("train", 0, 5), "val200": ("validation", 0, 2), "test": ("test", 0, None)}),
    "kitti": (fakes.kitti, {"train800": ("train", 0, 5), "val200": ("validation", 0, 2), "test": ("test", 0, None)}),
    "dsprites_loc": (
        partial(fakes.dsprites, orientation=False),
        {"train800": ("train", 0, 5), "val200": ("train", 48, 50), "test": ("train", 54, None)},
    ),
    "dsprites_ori": (
        partial(fakes.dsprites, orientation=True),
        {"train800": ("train", 0, 5), "val200": ("train", 48, 50), "test": ("train", 54, None)},
    ),
    "smallnorb_azi": (
        partial(fakes.smallnorb, elevation=False),
        {"train800": ("train", 0, 5), "val200": ("test", 0, 2), "test": ("test", 10, None)},
    ),
    "smallnorb_ele": (
        partial(fakes.smallnorb, elevation=True),
        {"train800": ("train", 0, 5), "val200": ("test", 0, 2), "test": ("test", 10, None)},
    ),
}


@pytest.fixture(autouse=True)
def no_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision compares its files with the digests of the real ones."""
    for module in ("cifar", "svhn", "flowers102"):
        target = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(target, lambda path, md5=None: Path(path).is_file())


def in_order(split: str, examples: list[tuple[str | int, int, Content]]) -> list[tuple[str | int, int, Content]]:
    """Sorted as TFDS does: by the MD5 of split and key, read as a number."""
    return sorted(examples, key=lambda example: int(hashlib.md5(f"{split}{example[0]}".encode()).hexdigest(), 16))


def build(task: str, tmp_path: Path, workers: int = 1) -> tuple[Examples, Path]:
    examples = CASES[task][0](tmp_path / "originals")
    sizes = {split: len(found) for split, found in examples.items()}
    original = replace(ORIGINALS[task], sizes=sizes)
    assert original.found_in(tmp_path / "originals")
    build_task(original, tmp_path / "originals", tmp_path / "root", workers=workers, take=(5, 2))
    return examples, tmp_path / "root" / task


def test_every_task_is_built_or_refused_with_a_reason() -> None:
    assert set(ORIGINALS) == set(CASES)
    assert set(ORIGINALS) | set(REFUSED) == set(TASKS)
    assert not set(ORIGINALS) & set(REFUSED)


@pytest.mark.parametrize("task", CASES)
def test_holds_the_right_images_with_the_right_labels(tmp_path: Path, task: str) -> None:
    examples, folder = build(task, tmp_path)
    for name, (split, start, stop) in CASES[task][1].items():
        expected = in_order(split, examples[split])[start:stop]
        found = read_split(folder, name, TASKS[task].classes)
        assert found.labels == tuple(label for _, label, _ in expected)
        for path, (_, _, content) in zip(found.paths, expected, strict=True):
            if isinstance(content, bytes):
                assert (folder / path).read_bytes() == content
            else:
                np.testing.assert_array_equal(np.asarray(Image.open(folder / path)), content)
    joint = read_split(folder, "train800val200", TASKS[task].classes)
    parts = [read_split(folder, name, TASKS[task].classes) for name in ("train800", "val200")]
    assert joint.paths == parts[0].paths + parts[1].paths
    assert joint.labels == parts[0].labels + parts[1].labels


# Number of test images in the benchmark, from the sizes of the published data sets.
@pytest.mark.parametrize("task", ORIGINALS)
def test_rule_gives_the_official_sizes(task: str) -> None:
    original = ORIGINALS[task]
    subsets = slices(original.rule, original.sizes, test=original.test)
    sizes = {name: len(piece.of(list(range(original.sizes[piece.split])))) for name, piece in subsets.items()}
    assert sizes == {"train800": 800, "val200": 200, "test": TASKS[task].test_size}


@pytest.mark.parametrize(
    ("rule", "validation", "test"),
    [
        ("A90", Slice("train", 900, 1100), Slice("test", 0, None)),
        ("A80", Slice("train", 800, 1000), Slice("test", 0, None)),
        ("B", Slice("validation", 0, 200), Slice("test", 0, None)),
        ("C", Slice("train", 600, 800), Slice("train", 800, None)),
        ("D", Slice("train", 800, 1000), Slice("train", 900, None)),
        ("E", Slice("test", 0, 200), Slice("test", 250, None)),
    ],
)
def test_rules(rule: Rule, validation: Slice, test: Slice) -> None:
    found = slices(rule, {"train": 1001, "validation": 300, "test": 500})
    assert list(found.values()) == [Slice("train", 0, 800), validation, test]


def test_threads_and_the_unpacked_devkit_change_nothing(tmp_path: Path) -> None:
    _, folder = build("kitti", tmp_path / "a")
    fakes.kitti(tmp_path / "b" / "originals", zipped=False)
    original = replace(ORIGINALS["kitti"], sizes={"train": 64, "validation": 8, "test": 8})
    build_task(original, tmp_path / "b" / "originals", tmp_path / "b" / "root", workers=3, take=(5, 2))
    for name in ("train800", "val200", "test"):
        other = tmp_path / "b" / "root" / "kitti" / f"{name}.txt"
        assert (folder / f"{name}.txt").read_text() == other.read_text()


def test_broken_off_build_is_no_task_and_goes_on(tmp_path: Path) -> None:
    examples = fakes.clevr(tmp_path / "originals", distances=False)
    original = replace(ORIGINALS["clevr_count"], sizes={split: len(found) for split, found in examples.items()})

    def stop(task: str, done: int, total: int) -> None:
        assert total == 5 + 2 + 30
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_task(original, tmp_path / "originals", tmp_path / "root", take=(5, 2), advance=stop)
    assert not (tmp_path / "root" / "clevr_count").exists()
    kept = {file.name: file.stat().st_ino for file in (tmp_path / "root").rglob("images/test/*.png")}
    assert kept
    build_task(original, tmp_path / "originals", tmp_path / "root", take=(5, 2))
    folder = tmp_path / "root" / "clevr_count" / "images" / "test"
    assert {name: (folder / name).stat().st_ino for name in kept} == kept
    with pytest.raises(FileExistsError, match="clevr_count is there already: move it away"):
        build_task(original, tmp_path / "originals", tmp_path / "root", take=(5, 2))


def test_files_are_taken_over_also_where_they_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    examples, folder = build("dtd", tmp_path)
    first = read_split(folder, "test", 47).paths[0]
    assert (folder / first).read_bytes() == in_order("test", examples["test"])[0][2]


def test_incomplete_data_is_refused_because_its_subsets_would_be_others(tmp_path: Path) -> None:
    fakes.clevr(tmp_path, distances=False)
    message = r"clevr_count: the train split in .* has 30 examples where the published data has 70000, so VTAB's images"
    with pytest.raises(ValueError, match=message):
        build_task(ORIGINALS["clevr_count"], tmp_path, tmp_path / "root")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("task", ORIGINALS)
def test_absent_data_says_what_is_needed(tmp_path: Path, task: str) -> None:
    assert not ORIGINALS[task].found_in(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        build_task(ORIGINALS[task], tmp_path, tmp_path / "root")
    message = str(error.value)
    assert message.startswith(f"{task} needs {ORIGINALS[task].needs[0]}")
    assert message.endswith(ORIGINALS[task].hint)
    assert "\n" not in message


def test_damaged_matrix_and_records_are_named(tmp_path: Path) -> None:
    from tools.vtab.originals.smallnorb import read_matrix
    from tools.vtab.originals.tfrecord import record_spans

    fakes.smallnorb(tmp_path, elevation=False)
    (file,) = (tmp_path / "smallnorb").glob("*training-info.mat")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"training-info\.mat holds 316 bytes where its head promises 320"):
        read_matrix(file)
    file.write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match="is no matrix of the NORB format"):
        read_matrix(file)
    fakes.dmlab(tmp_path)
    record = next((tmp_path / "dmlab").iterdir())
    record.write_bytes(record.read_bytes()[:-10])
    with record.open("rb") as stream, pytest.raises(ValueError, match="ends within a record"):
        list(record_spans(stream))


def test_refused_tasks_say_why_and_where_from() -> None:
    with pytest.raises(ValueError, match=r"caltech101 cannot be built .*: TFDS drew .*; take it from the archive"):
        require_original("caltech101")
    with pytest.raises(ValueError, match="unknown VTAB-1K task 'kiti': did you mean kitti"):
        require_original("kiti")
    assert require_original("kitti").task == "kitti"


def test_checksums_of_records_are_compared(tmp_path: Path) -> None:
    from tools.vtab.originals.crc32c import crc32c
    from tools.vtab.originals.dmlab import load

    # RFC 3720, B.4, and the check value of the catalogue of CRCs
    vectors = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E, b"123456789": 0xE3069283}
    assert {data: crc32c(data) for data in vectors} == vectors
    fakes.dmlab(tmp_path)
    record = next((tmp_path / "dmlab").iterdir())
    content = bytearray(record.read_bytes())
    content[500] ^= 1
    record.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged \(the checksum of a record differs\): download it again"):
        load(tmp_path)
