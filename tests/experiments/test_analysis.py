from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.analysis import command_line, main


def test_the_command_makes_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "--orders 2 --images 32 --epochs 1 --seeds 1 --pretrain-epochs 1 --components 6"
    numbers = main([*text.split(), "--output", str(tmp_path)])
    assert json.loads((tmp_path / "analysis.json").read_text()) == json.loads(json.dumps(numbers))
    figures = {path.stem for path in tmp_path.glob("*.png")}
    assert {name.split("_")[0] for name in figures} == {"fig5", "fig11", "fig12", "fig13", "fig14", "table6"}
    assert set(numbers["convergence"]) == {"4", "8", "16", "32"}
    assert numbers["convergence"]["4"][-1]["n_batches"] == 8
    assert "half of the 96 components" in capsys.readouterr().out


def test_the_command_refuses_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["--images", "8"]) == 2
    assert capsys.readouterr().err == "error: --images must be a whole number of at least 32, got 8\n"
