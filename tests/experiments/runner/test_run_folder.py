from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_lightning.errors import InputError
from eva_lightning.ours import MARK
from eva_lightning.sealed import read_sealed_json
from experiments.runner.run_folder import RunFolder, Work, metrics_below, perform
from experiments.runner.settings import Role, option


@dataclass(frozen=True)
class Settings:
    """Of a run in this file."""

    lr: float = option(1e-3, "learning rate", Role.RESULT)
    epochs: int = option(3, "epochs", Role.RESULT)
    names: tuple[str, ...] = option(("a", "b"), "names", Role.RESULT)
    weights: str = option("none", "file", Role.RESULT, identity=lambda path: Path(path).name if "/" in path else path)
    output: str = option("runs", "folder", Role.PLACE)


SETTINGS = Settings()
METRICS = {"accuracy": 0.75, "looks": [{"epoch": 1}]}


def finished(path: Path, settings: Settings = SETTINGS) -> RunFolder:
    folder = RunFolder(path, settings)
    folder.start()
    folder.finish(METRICS)
    return folder


def test_life_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep/run", SETTINGS)
    assert (folder.result(), folder.error(), folder.last_checkpoint()) == (None, None, None)
    folder.fail("Traceback ...")
    assert folder.error() == "Traceback ..."
    folder.start()
    assert (folder.result(), folder.error()) == (None, None)
    folder.finish(METRICS)
    assert folder.result() == METRICS
    (tmp_path / "deep/run/mine.png").touch()
    folder.clear()
    assert [file.name for file in folder.path.iterdir() if file.name != MARK] == ["mine.png"]


def test_another_run_is_refused_naming_what_differs(tmp_path: Path) -> None:
    finished(tmp_path)
    other = RunFolder(tmp_path, Settings(lr=0.5, epochs=4, output="elsewhere"))
    with pytest.raises(InputError) as error:
        other.result()
    assert str(error.value) == (
        f"{tmp_path} holds another run, with lr=0.001 (now 0.5), epochs=3 (now 4): choose another --name or pass "
        "--overwrite"
    )
    assert RunFolder(tmp_path, Settings(output="elsewhere")).result() == METRICS
    # also without the line that has the identity
    config = tmp_path / "config.yaml"
    config.write_text("".join(config.read_text().splitlines(keepends=True)[1:]))
    assert RunFolder(tmp_path, SETTINGS).result() == METRICS
    with pytest.raises(InputError, match=r"names=\['a', 'b'\] \(now \['c'\]\)"):
        RunFolder(tmp_path, Settings(names=("c",))).result()
    # a run that has nothing to lose is no obstacle
    (tmp_path / "metrics.json").unlink()
    assert other.result() is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    with pytest.raises(InputError, match="holds another run"):
        other.result()


def test_what_stands_for_a_value_decides(tmp_path: Path) -> None:
    finished(tmp_path, Settings(weights="old/w.pth"))
    assert RunFolder(tmp_path, Settings(weights="moved/w.pth")).result() == METRICS
    with pytest.raises(InputError, match=r"weights=old/w\.pth \(now old/v\.pth\)"):
        RunFolder(tmp_path, Settings(weights="old/v.pth")).result()


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "\xff\x00{", '{"accuracy": 0.5, "checksum": "content-sha256:0123456789abcdef"}']
)
def test_a_damaged_result_is_named_set_aside_and_done_again(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = finished(tmp_path)
    (tmp_path / "metrics.json").write_bytes(content.encode("latin-1"))
    assert folder.result() is None
    assert "metrics.json is damaged" in caplog.text
    with pytest.raises(InputError, match=r"metrics\.json is damaged \(.*\): pass --overwrite or delete .* to run"):
        list(metrics_below(tmp_path))
    assert perform(folder, lambda: simple) == METRICS
    assert folder.result() == METRICS
    assert (tmp_path / "metrics.json.damaged").read_bytes() == content.encode("latin-1")


def test_a_digit_changed_in_a_result_is_damage(tmp_path: Path) -> None:
    folder, file = finished(tmp_path), tmp_path / "metrics.json"
    text = file.read_text()
    places = [i for i, character in enumerate(text) if character.isdigit()]
    assert places
    for place in places:
        file.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        assert folder.result() is None


def test_a_result_of_an_earlier_version_counts(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    assert folder.result() == METRICS


@pytest.mark.parametrize("content", ["{", "[1]", "\xff\x00{"])
def test_damaged_settings_are_one_sentence(tmp_path: Path, content: str) -> None:
    folder = finished(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.yaml is damaged"):
        folder.result()


def simple(folder: RunFolder) -> Mapping[str, Any]:
    return METRICS


def test_nothing_is_written_or_deleted_before_everything_is_built(tmp_path: Path) -> None:
    def refuses() -> Work:
        raise InputError("no such task")

    with pytest.raises(InputError, match="no such task"):
        perform(RunFolder(tmp_path / "new", SETTINGS), refuses)
    assert not (tmp_path / "new").exists()
    folder = finished(tmp_path / "old")
    with pytest.raises(InputError):
        perform(folder, refuses, overwrite=True)
    assert folder.result() == METRICS
    # an existing run of other settings is refused before anything is built
    with pytest.raises(InputError, match="holds another run"):
        perform(RunFolder(tmp_path / "old", Settings(lr=1.0)), refuses)
    assert perform(RunFolder(tmp_path / "old", Settings(lr=1.0)), lambda: lambda _: {"a": 1}, overwrite=True) == {
        "a": 1
    }
    assert RunFolder(tmp_path / "old", Settings(lr=1.0)).result() == {"a": 1}


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    calls = []

    def work(folder: RunFolder) -> Mapping[str, Any]:
        calls.append(folder)
        assert folder.error() is None
        return METRICS

    folder = RunFolder(tmp_path / "run", SETTINGS)
    assert perform(folder, lambda: work) == METRICS
    assert perform(folder, lambda: work) == METRICS
    assert len(calls) == 1


def test_two_at_the_same_run_do_it_once(tmp_path: Path) -> None:
    inside, calls, results = threading.Event(), [], []

    def work(folder: RunFolder) -> Mapping[str, Any]:
        calls.append(folder)
        inside.set()
        assert not second_done.wait(0.5)
        return METRICS

    second_done = threading.Event()
    folder = RunFolder(tmp_path / "run", SETTINGS)
    first = threading.Thread(target=lambda: results.append(perform(folder, lambda: work, terminal=False)))
    first.start()
    assert inside.wait(60)
    results.append(perform(replace_path(folder), lambda: work, terminal=False))
    second_done.set()
    first.join()
    assert results == [METRICS, METRICS]
    assert len(calls) == 1


def replace_path(folder: RunFolder) -> RunFolder:
    return RunFolder(folder.path, replace(folder.settings))


@pytest.mark.parametrize("where", ["build", "work"])
def test_a_programming_error_keeps_its_traceback_and_is_in_the_log(tmp_path: Path, where: str) -> None:
    def faulty(folder: RunFolder) -> Mapping[str, Any]:
        return {"sum": torch.zeros(2) + "x"}  # type: ignore[operator]

    def build() -> Work:
        return faulty if where == "work" else lambda _: faulty(folder)

    def faulty_build() -> Work:
        faulty(folder)
        return build()

    folder = RunFolder(tmp_path / "run", SETTINGS)
    with pytest.raises(TypeError):
        perform(folder, build if where == "work" else faulty_build)
    text = folder.log.read_text()
    assert "Traceback" in text
    assert "in faulty" in text
    assert "TypeError" in text
    assert folder.result() is None
    assert ("TypeError" in (folder.error() or "")) == (where == "work")  # before that nothing is written but the log


def test_lightnings_way_to_end_on_ctrl_c_is_ctrl_c(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)

    def work(folder: RunFolder) -> Mapping[str, Any]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise SystemExit(1)

    with pytest.raises(KeyboardInterrupt):
        perform(RunFolder(tmp_path / "run", SETTINGS), lambda: work)
    assert signal.getsignal(signal.SIGINT) == handler


def test_metrics_that_are_no_json_do_not_leave_a_part(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    with pytest.raises(TypeError):
        perform(folder, lambda: lambda _: {"a": object()}, terminal=False)
    assert not list(folder.path.glob("*metrics*"))
    assert read_sealed_json(finished(tmp_path / "x").path / "metrics.json") == METRICS


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "theirs", ["config.yaml", "plots/mine.png", "checkpoints/best.ckpt", "metrics.json", "log.txt"]
)
def test_a_folder_with_files_of_somebody_else_is_refused_before_anything_is_built(
    tmp_path: Path, theirs: str, overwrite: bool
) -> None:
    def never() -> Work:
        raise AssertionError("built")

    file = tmp_path / "run" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("mine: 1\n")
    with pytest.raises(InputError, match=r"this program has not written.*: move (it|them) away, or choose another"):
        perform(RunFolder(tmp_path / "run", SETTINGS), never, overwrite=overwrite)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine: 1\n"


def test_overwriting_deletes_what_the_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    written = ("checkpoints/last.ckpt", "plots/loss.png", "adapter/adapter_config.json", "weights.ckpt", "log.txt")
    theirs = ("notes.md", "plots/mine.png", "checkpoints/best.ckpt", "adapter/notes.md", "code/train.py")
    for name in (*written, *theirs):
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).write_text("")
    perform(folder, lambda: lambda _: {"a": 1}, terminal=False, overwrite=True)
    left = {file.relative_to(folder.path).as_posix() for file in folder.path.rglob("*") if file.is_file()}
    assert {name for name in left if not name.startswith(".")} == {*theirs, "config.yaml", "metrics.json", "log.txt"}
    # somebody's settings in place of the run's are not overwritten either
    (folder.path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(InputError, match=r"config\.yaml that this program has not written"):
        perform(folder, lambda: lambda _: {"a": 1}, overwrite=True)


@pytest.mark.parametrize("link", ["checkpoints", "plots", "config.yaml", ""])
def test_nothing_is_written_or_deleted_through_a_link(tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    folder = finished(tmp_path / "run") if link else RunFolder(tmp_path / "run", SETTINGS)
    if link == "config.yaml":
        (folder.path / link).rename(outside)
    else:
        outside.mkdir()
        (outside / "last.ckpt").write_text("theirs")
    (folder.path / link).symlink_to(outside)
    with pytest.raises(InputError, match="is a symbolic link"):
        perform(folder, lambda: lambda _: {"a": 1}, overwrite=True)
    assert outside.is_file() or (outside / "last.ckpt").read_text() == "theirs"


@pytest.mark.parametrize("name", ["..", "a/b", "a" * 256, "a\nb"])
def test_a_name_that_is_no_folder_of_the_output_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="must be the plain name of a file or folder"):
        RunFolder.below(tmp_path, name, SETTINGS)


def test_a_path_too_long_is_said_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a name of 300 bytes"):
        perform(RunFolder(tmp_path / ("a" * 300), SETTINGS), simple)  # type: ignore[arg-type]


def test_numbers_that_are_not_finite_come_back_from_a_file_that_is_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    folder = RunFolder(tmp_path, SETTINGS)
    metrics = {"loss": math.nan, "rows": [{"loss": 1.0}, {"loss": math.inf}], "rate": None, "low": -math.inf}
    perform(folder, lambda: lambda _: metrics, terminal=False)
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=refuse)["loss"] == "NaN"
    found = folder.result()
    assert found is not None
    assert math.isnan(found.pop("loss"))
    assert found == {name: value for name, value in metrics.items() if name != "loss"}
    (tmp_path / "metrics.json").write_text(text.replace('"low": "-Infinity"', '"low": 1.0'))
    assert folder.result() is None, "changed by hand: the run is not finished"
