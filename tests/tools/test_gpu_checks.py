"""The GPU checks where there is no GPU: they say so, and what they check works on the CPU."""

from __future__ import annotations

import pytest
import torch

from tools import gpu_checks


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it skips where there is no GPU")
def test_without_a_gpu_nothing_passes(capsys: pytest.CaptureFixture[str]) -> None:
    before = gpu_checks.RESULT.read_text()
    assert gpu_checks.main() == 77
    printed = capsys.readouterr().out
    assert "There is no CUDA GPU here" in printed
    for name in gpu_checks.CHECKS:
        assert name in printed
    assert gpu_checks.RESULT.read_text() == before


def test_one_check_that_fails_does_not_end_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> str:
        raise ValueError("overlap 0.1")

    rows = gpu_checks.run({"wrong": wrong, "right": lambda: "fine"})
    assert [(name, passed, found) for name, passed, found, _ in rows] == [
        ("wrong", False, "ValueError: overlap 0.1"),
        ("right", True, "fine"),
    ]
    page = gpu_checks.page(rows, "a GPU")
    assert "| wrong | **failed** | ValueError: overlap 0.1 |" in page


def test_the_network_of_the_checks_trains_on_the_cpu() -> None:
    torch.manual_seed(0)
    assert len(gpu_checks._fit(gpu_checks._Network(), "cpu")) == 3
