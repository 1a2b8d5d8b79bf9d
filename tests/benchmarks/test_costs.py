from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import costs
from benchmarks.costs import measure
from benchmarks.costs.one_method import measure as measure_one
from benchmarks.costs.settings import Settings, preparing
from eva_lightning.errors import InputError
from eva_lightning.methods import METHODS
from eva_lightning.methods.registry import Method
from tests.eva_lightning.rl.tiny import TASK, make_robot


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny pre-trained network and demonstrations."""
    folder = tmp_path_factory.mktemp("metaworld")
    make_robot(folder, horizon=20)
    text = (
        f"--checkpoint {folder / 'init.ckpt'} --data {folder / 'data'} --task {TASK} --images 32 --rank 2 "
        "--batch-size 8 --repeats 1 --steps 2 --training-steps 1000 --accelerator cpu"
    )
    return text.split()


def test_a_method_that_prepares_something_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"lora", "eva", "pissa", "olora", "milora", "lora-ga", "corda"} <= set(preparing("vision"))
    assert not {"fft", "linear", "scratch", "dora", "lora+"} & set(preparing("rl"))
    monkeypatch.setitem(METHODS, "new", Method("new", "New", needs="gradients"))
    assert preparing("rl")[-1] == "new"


def test_costs_are_printed_drawn_kept_and_reused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def here(settings: Any) -> Any:
        ran.append(settings.method)
        if settings.method == "olora":
            raise InputError("olora cannot be had here")
        return measure_one(settings)

    monkeypatch.setattr(measure, "_in_a_process", here)
    line = [
        *words,
        f"--output={tmp_path}",
        f"--json={tmp_path / 'costs.json'}",
        "--methods=lora,pissa,olora,eva:1,corda",
    ]
    document = costs.main(line)
    assert ran == ["lora", "pissa", "olora", "eva:1", "corda"]
    assert list(document["costs"]) == ["lora", "pissa", "eva:1", "corda"]
    assert document["not_run"] == {"olora": "olora cannot be had here"}
    assert json.loads((tmp_path / "costs.json").read_text())["costs"] == document["costs"]
    for of_method in document["costs"].values():
        assert min(*of_method["seconds"], *of_method["step_seconds"]) > 0
    printed = capsys.readouterr().out
    eva = document["costs"]["eva:1"]
    assert f"{100 * eva['seconds'][0] / (1000 * eva['step_seconds'][0]):.2g}%" in printed
    assert "olora: not run, olora cannot be had here" in printed
    assert (tmp_path / "fig5_costs.png").is_file()
    costs.main([*line, "--training-steps=10"])
    assert ran[5:] == ["olora"]


@pytest.mark.slow
def test_a_method_runs_in_a_process_of_its_own(words: list[str], tmp_path: Path) -> None:
    document = costs.main([*words, f"--output={tmp_path}", "--methods=eva"])
    assert document["costs"]["eva"]["seconds"][0] > 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="methods must have adapters and belong to this model, got fft"):
        Settings(methods=("fft",))
    with pytest.raises(ValueError, match="unknown method 'evo'"):
        Settings(methods=("evo",))
