from __future__ import annotations

import pytest

from benchmarks.resize import main


def test_resize_times_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    document = main(["--models", "test_vit", "--image-size", "32", "--r", "4", "--repeats", "1"])
    result = document["models"][0]
    assert result["layers"] == 24
    assert result["changed"] > 0
    assert result["seconds"]["values"][0] == pytest.approx(sum(part["wall"][0] for part in result["parts"].values()))
    assert "rebuild optimizers" in capsys.readouterr().out
