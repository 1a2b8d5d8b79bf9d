from __future__ import annotations

from pathlib import Path

import pytest

from eva_lightning.errors import InputError
from eva_lightning.ours import claim, delete, delete_tree, refuse_others


def test_a_name_is_ours_once_it_was_claimed_before_it_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    claim(folder, ("table.md", "*.png"), "choose another")
    for name in ("table.md", "loss.png", "mine.txt"):
        (folder / name).write_text("")
    claim(folder, ("table.md", "*.png"), "choose another")
    with pytest.raises(InputError, match=r"holds files that this program has not written \(mine\.txt\): move them"):
        claim(folder, ("mine.txt",), "choose another")


@pytest.mark.parametrize("name", ["table.md", "plots/mine.png"])
def test_what_was_there_before_is_somebody_elses(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for _ in range(2):
        with pytest.raises(InputError, match="has not written"):
            claim(tmp_path, ("table.md", "plots"), "choose another")
    assert (tmp_path / name).read_text() == "mine"


def test_links_are_refused_also_dangling_ones(tmp_path: Path) -> None:
    claim(tmp_path, ("checkpoints",), "choose another")
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a symbolic link"):
        refuse_others(tmp_path, ("checkpoints",), "choose another")


def test_only_what_fits_is_deleted_and_links_are_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    for file in (
        outside / "last.ckpt",
        folder / "a/last.ckpt",
        folder / "b/last.ckpt",
        folder / "b/mine",
        folder / "c/d/e",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    (folder / "link").symlink_to(outside)
    delete(folder, ("a/last*", "b/last*", "link/last*", "c/**"))
    assert sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if not file.is_dir()) == [
        "outside/last.ckpt",
        "run/b/mine",
    ]
    assert not (folder / "a").exists()
    assert not (folder / "c").exists()
    delete_tree(folder / "link")
    assert (outside / "last.ckpt").exists()
    assert not (folder / "link").is_symlink()
