from __future__ import annotations

import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import minari
import pytest

from eva_lightning.rl.collection import ExpertRunner
from eva_lightning.rl.demonstrations import read_index
from experiments.metaworld import __main__ as command
from experiments.metaworld import collect
from tests.paths import ROOT


def run(folder: Path, *options: str) -> list[str]:
    return ["--out", str(folder), "--episodes", "2", "--horizon", "5", "--progress", "false", *options]


def test_collects_prints_a_table_and_adds_when_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = collect.main(run(tmp_path, "--tasks", "reach,push"))
    assert list(index) == ["push-v3", "reach-v3"]
    text = capsys.readouterr().out
    for words in (
        "reach-v3",
        "push-v3",
        "mean of all",
        "any step",
        "last step",
        "mean return",
        "noise 0.1, seed 0, horizon 5",
    ):
        assert words in text
    assert text.index("reach-v3") < text.index("push-v3"), "in the order asked for"
    assert collect.command_line(run(tmp_path, "--tasks", "window-close")) == 0
    assert len(read_index(tmp_path)) == 3


def test_minari(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    collect.main(run(tmp_path / "data", "--tasks", "reach", "--minari", "--minari-path", str(tmp_path / "sets")))
    assert "minari.load_dataset('metaworld/reach/expert-v0')" in capsys.readouterr().out
    collect.main(run(tmp_path / "data", "--tasks", "reach", "--minari"))
    for path in (tmp_path / "sets", tmp_path / "data" / "minari"):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(path))
        assert minari.load_dataset("metaworld/reach/expert-v0").total_episodes == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "push-v2"], "error: task 'push-v2' is of another version of Meta-World: did you mean push-v3?"),
        (["--tasks", "pussh"], "error: unknown Meta-World task 'pussh': did you mean push-v3"),
        (["--horizon", "501"], "error: --horizon must be a whole number of at least 1 and of at most 500, got 501"),
        (["--noise", "-1"], "error: --noise must be a number of at least 0, got -1.0"),
        (["--episodes", "0"], "error: --episodes must be a whole number of at least 1, got 0"),
        (["--workers", "0"], "error: --workers must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert collect.command_line(run(tmp_path / "new", *options)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_another_noise_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collect.main(run(tmp_path, "--tasks", "reach"))
    assert collect.command_line(run(tmp_path, "--tasks", "push", "--noise", "0.2")) == 2
    assert "holds demonstrations of reach-v3 with noise 0.1, not 0.2" in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert collect.command_line(run(tmp_path / "file", "--tasks", "push")) == 2
    assert capsys.readouterr().err == f"error: demonstrations need a folder, and {tmp_path / 'file'} is a file\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: finished episodes are kept; rerun to resume\n"),
        (BrokenProcessPool("a process ended"), 1, "error: a process ended\n"),
        (
            OSError(28, "No space left on device"),
            2,
            (
                "error: the disk is full ([Errno 28] No space left on device): what was done stays; make room, "
                "then run it again\n"
            ),
        ),
    ],
)
def test_what_goes_wrong_on_the_way_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(self: ExpertRunner, chunk: object) -> None:
        raise error

    monkeypatch.setattr(ExpertRunner, "run", fail)
    assert collect.command_line(run(tmp_path, "--tasks", "push")) == status
    assert capsys.readouterr().err == message


def test_a_programming_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertRunner, "run", lambda self, chunk: [] + 1)  # type: ignore[operator]
    with pytest.raises(TypeError):
        collect.command_line(run(tmp_path, "--tasks", "push"))


def test_the_commands_are_listed_and_mistyped_ones_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in command.COMMANDS)
    assert command.main([]) == 2
    capsys.readouterr()
    assert command.main(["colect", "--tasks", "push"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'colect': did you mean collect?\n"


def test_help_needs_neither_torch_nor_the_simulator() -> None:
    code = (
        "import sys\n"
        "from experiments.metaworld.__main__ import main\n"
        "for name in ('pretrain', 'finetune', 'evaluate', 'table'):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "try: main(['report', '--help'])\n"
        "except SystemExit: pass\n"
        "try: main(['collect', '--help-all'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'mujoco', 'metaworld', 'lightning', 'peft', 'pandas', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for option in ("--tasks", "--episodes", "--noise", "--seed", "--workers", "--out", "--minari", "--config"):
        assert option in done.stdout
