from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from eva_lightning.errors import InputError
from eva_lightning.sealed import read_sealed_json
from experiments.runner.comparison import run_comparison
from experiments.runner.holder import held
from experiments.runner.jobs import Job, Outcome, Point, Shared, attempt
from experiments.runner.results import Results
from experiments.runner.schedule import MOST_DEATHS, Schedule
from tests.experiments.runner.fake_comparison import Fake, command_line, finished_runs, parse
from tests.experiments.runner.fake_pool import FakePool

RUNS = 2 * (2 * 2 + 2)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def compare(output: Path, extra: str = "", pool: FakePool | None = None) -> Results:
    return run_comparison(parse(["--output", str(output), *extra.split()]), None if pool is None else lambda: pool)


def run(output: Path, extra: str = "") -> int:
    return command_line(["--output", str(output), *extra.split()])


def trouble(output: Path, name: str, code: str) -> Path:
    """Let the build of jobs of `name` (method-phase) do something bad."""
    folder = Path(f"{output}-trouble")
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(code)
    return folder / name


def journal(output: Path, what: str) -> Counter[str]:
    """Runs of the journal's lines of one kind."""
    return Counter(re.findall(rf" {what} (\w{{16}}) process ", (output / "journal.log").read_text()))


def test_a_whole_comparison(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = FakePool(slots=3)
    results = compare(output, pool=pool)
    assert pool.closed
    assert len(pool.jobs) == RUNS
    assert {name: choice.point for name, choice in results.choices.items()} == {
        "lora": Point.of(lr=1e-2), "eva": Point.of(lr=1e-3),
    }  # fmt: skip
    assert len(results.tuning) == 8
    assert results.runs[["method", "lr", "seed"]].values.tolist() == [
        ["lora", 1e-2, 0], ["lora", 1e-2, 1], ["eva", 1e-3, 0], ["eva", 1e-3, 1],
    ]  # fmt: skip
    assert results.runs["loss"].tolist() == pytest.approx([0, 1e-6, 0, 1e-6])
    assert set(results.runs["path"]) == {str(run.path) for run in finished_runs(output)}
    assert results.is_complete
    assert results.seconds >= 0
    out = capsys.readouterr().out
    assert f"fake: {RUNS} runs in {output}: 0 done, 0 failed, {RUNS} to do" in out
    assert "lora: lr 0.01, by 0.0001005 in tuning" in out
    assert f"{RUNS} of {RUNS} runs are done" in out
    assert f"the report: {output / 'report.md'}" in out
    assert "lora: lr 0.01, by 0.0001005 in tuning" in (output / "log.txt").read_text()
    choices = read_sealed_json(output / "choices.json")
    assert choices["eva"]["lr"] == 1e-3
    assert [each["lr"] for each in choices["eva"]["candidates"]] == [1e-3, 1e-2]
    # the same command has nothing to do, and says so
    again = FakePool()
    pd.testing.assert_frame_equal(compare(output, pool=again).runs, results.runs)
    assert not again.jobs
    assert f"{RUNS} done, 0 failed, 0 to do" in capsys.readouterr().out
    # a run's folder
    (run,) = (run for run in finished_runs(output) if run.settings["method"] == "eva" and run.settings["seed"] == 1)
    assert run.path.name.startswith("eva-lr-0.001-seed-1-final-")
    assert run.metrics["loss"] == pytest.approx(1e-6)
    assert run.metrics["seconds"] >= 0
    assert len(list(finished_runs(output, "tune"))) == 8


def test_final_runs_start_as_soon_as_their_own_tuning_is_complete(output: Path) -> None:
    pool = FakePool()
    compare(output, pool=pool)
    order = list(dict.fromkeys((job.tags["method"], job.phase) for job in pool.jobs))
    assert order == [("lora", "tune"), ("lora", "final"), ("eva", "tune"), ("eva", "final")]


def test_more_methods_seeds_and_rates_later_run_only_what_is_new(output: Path) -> None:
    compare(output, "--methods lora --seeds 3")
    pool = FakePool()
    results = compare(output, "--seeds 1 --lrs 0.001,0.01,0.0101", pool)
    assert {job.tags["method"] for job in pool.jobs if job.phase == "tune"} == {"lora", "eva"}
    assert sum(job.tags["method"] == "lora" for job in pool.jobs) == 2  # of the new rate, which is not better
    assert len(results.runs) == 2
    assert read_sealed_json(output / "choices.json").keys() == {"lora", "eva"}
    assert len(list(finished_runs(output))) == 3 + 1


def test_the_grid_is_extended_and_given_points_are_not_tuned(output: Path) -> None:
    pool = FakePool()
    results = compare(output, "--extend 2 --lrs 0.00001,0.0001 --methods eva", pool)
    assert results.choices["eva"].point == Point.of(lr=1e-3)
    rates = list(dict.fromkeys(job.tags["lr"] for job in pool.jobs if job.phase == "tune"))
    assert rates == [1e-5, 1e-4, 1e-3, 1e-2]
    comparison = parse(["--output", str(output / "given")])
    cells = comparison.cells()
    cells[0].given = Point.of(lr=0.5)
    schedule = Schedule(cells, comparison.score)
    assert schedule.choices()["lora"].point == Point.of(lr=0.5)
    assert {row.job.phase for row in schedule.rows.values() if row.job.tags["method"] == "lora"} == {"final"}


def test_identity_is_settings_that_change_the_result(output: Path) -> None:
    def ids(extra: str, folder: Path = output) -> set[str]:
        cells = parse(["--output", str(folder), *extra.split()]).cells()
        return {job.id for cell in cells for point in cell.points for job in cell.tune(point)}

    one = ids("")
    assert ids("--workers 7 --retry-failed --backend slurm --wait 3", output / "x") == one
    assert ids("--tune-seeds 3 --lrs 0.1,0.01,0.001") > one
    assert not ids("--steps 7") & one
    job = parse([]).cells()[0].final(Point.of(lr=1e-3))[0]
    assert job.id not in one


def test_failures_are_recorded_others_go_on_and_they_are_retried_on_request(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "if job.settings.lr == 0.001:\n    raise RuntimeError('CUDA error: an illegal memory access')"
    file = trouble(output, "lora-tune", code)
    assert run(output, "--workers 0") == 1
    failed = sorted((output / "tuning").glob("*/error.txt"))
    assert len(failed) == 2
    for each in failed:
        for text in (each.read_text(), (each.parent / "log.txt").read_text()):
            assert "Traceback" in text
            assert "in build" in text
            assert "illegal memory access" in text
    out = capsys.readouterr().out
    assert "2 failed, such as lora, lr 0.001, seed 100, tune: RuntimeError: CUDA error" in out
    assert "failed tuning runs hold up the final runs of 1 cells, such as lora" in out
    assert {run.settings["method"] for run in finished_runs(output)} == {"eva"}
    # without a request they stay
    begun = journal(output, "begin").total()
    assert run(output) == 1
    assert journal(output, "begin").total() == begun
    # choosing without them
    assert run(output, "--skip-failed") == 1
    assert {run.settings["lr"] for run in finished_runs(output) if run.settings["method"] == "lora"} == {1e-2}
    # and with them
    file.unlink()
    assert run(output, "--retry-failed") == 0
    assert journal(output, "begin").total() == begun + 2 + 2
    assert not list(output.glob("*/*/error.txt"))


def test_a_comparison_that_only_fails_stops(output: Path) -> None:
    trouble(output, "lora-tune", "raise KeyError('head')")
    with pytest.raises(InputError) as error:
        compare(output)
    assert str(error.value) == (
        "the first 3 runs failed, the last one with \"KeyError: 'head'\" (tracebacks are in error.txt of the runs' "
        f"folders in {output}): remove the cause, then add --retry-failed"
    )
    assert journal(output, "begin").total() == 3


def test_all_points_of_a_cell_failed(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trouble(output, "eva-tune", "raise RuntimeError('diverged')")
    assert run(output, "--skip-failed") == 1
    assert "eva failed or diverged in tuning at every point" in capsys.readouterr().out


def test_full_disk_is_one_sentence_and_what_is_done_stays(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "if job.settings.seed == 101:\n    with open('/dev/full', 'w') as file:\n        file.write('x')"
    file = trouble(output, "eva-tune", code)
    assert run(output) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: the disk that holds {output} is full (")
    assert error.rstrip().endswith("free): what is done stays; make room, then rerun to resume")
    assert len(error.splitlines()) == 1
    assert not list(output.glob("*/*/error.txt"))
    done = journal(output, "end").total()
    assert done == 4 + 2 + 1
    file.unlink()
    assert run(output) == 0
    assert journal(output, "end").total() == RUNS


def test_errors_that_hide_a_full_disk(output: Path) -> None:
    """Libraries have words of their own for it."""
    code = (
        "try:\n    raise OSError(28, 'No space left on device')\n"
        "except OSError as error:\n    raise RuntimeError('PytorchStreamWriter failed writing file') from error"
    )
    trouble(output, "lora-tune", code)
    with pytest.raises(InputError, match="is full"):
        compare(output)


def test_a_small_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        assert run(small / "out") == 2
        error = capsys.readouterr().err
        assert "is full (" in error
        assert len(error.splitlines()) == 1
        before = journal(small / "out", "end")
        assert before.total() > 0
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        assert run(small / "out") == 0
        after = journal(small / "out", "end")
        assert max(after.values()) == 1
        assert RUNS - after.total() <= 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_everything_in_order(
    output: Path, capsys: pytest.CaptureFixture[str], how: signal.Signals
) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    file = trouble(output, "eva-tune", f"import os; os.kill(os.getpid(), {int(how)})")
    assert run(output) == 128 + how
    assert f"interrupted: 6 of {RUNS} runs are done; rerun to resume" in capsys.readouterr().out
    assert not (output / "holder.json").exists()
    assert not list(output.glob("*/*/error.txt"))
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    file.unlink()
    assert run(output) == 0
    assert "taking over" not in capsys.readouterr().out
    assert max(journal(output, "end").values()) == 1


def test_an_interruption_closes_the_pool(output: Path) -> None:
    def interrupted(job: Job) -> Outcome:
        if len(pool.jobs) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return attempt(job)

    pool = FakePool(interrupted, slots=2)
    with pytest.raises(KeyboardInterrupt):
        compare(output, pool=pool)
    assert pool.closed


def test_two_at_one_output(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(output):
        assert run(output) == 2
        error = capsys.readouterr().err
        assert f"{output} is in use by another process (process {os.getpid()} on " in error
        assert len(error.splitlines()) == 1
        # looking at what is there disturbs nobody
        assert run(output, "--plan") == 0
        assert run(output, "--report") == 0
    assert run(output) == 0


def test_a_run_that_kills_its_workers_is_failed_in_the_end(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def deadly(job: Job) -> Outcome:
        if job.settings.method == "lora" and job.settings.lr == 1e-3:
            return Outcome(job.id, "died", error="killed by signal 9, SIGKILL (out of memory?)")
        return attempt(job)

    pool = FakePool(deadly)
    results = compare(output, pool=pool)
    assert results.exit_status == 1
    text, error = results.failures[0]
    assert text == "lora, lr 0.001, seed 100, tune"
    assert error == (
        f"{MOST_DEATHS} worker processes ended in this run, the last one thus: killed by signal 9, SIGKILL (out of "
        "memory?)"
    )
    tries = Counter(job.id for job in pool.jobs)
    assert sorted(tries.values())[-3:] == [1, 3, 3]
    assert "a worker process was killed by signal 9" in capsys.readouterr().out
    # the next session knows, until it is asked to try again
    again = FakePool()
    assert len(compare(output, pool=again).failures) == 2
    assert not again.jobs
    assert compare(output, "--retry-failed").is_complete


def test_jobs_that_share_something_wait_for_the_one_that_computes_it(output: Path) -> None:
    comparison = parse(["--output", str(output)])
    cells = comparison.cells()
    tune, shared = cells[0].tune, output / "state"
    cells[0].tune = lambda point: [Job(**{**vars(job), "shared": Shared(str(shared))}) for job in tune(point)]
    schedule = Schedule(cells, comparison.score)
    first, second = schedule.claim(), schedule.claim()
    assert first is not None
    assert second is not None
    assert (first.tags["method"], second.tags["method"]) == ("lora", "eva")
    # computed by another one, or not at all: then it is the next one's turn
    schedule.record(Outcome(first.id, "died", error="killed"))
    third = schedule.claim()
    assert third is not None
    assert third.id == first.id
    output.mkdir()
    shared.touch()
    fourth = schedule.claim()
    assert fourth is not None
    assert fourth.tags["method"] == "lora"


def test_jobs_of_one_identity_are_a_mistake(output: Path) -> None:
    comparison = parse(["--output", str(output)])
    with pytest.raises(ValueError, match="two jobs have the same settings: lora"):
        Schedule([*comparison.cells(), comparison.cells()[0]], comparison.score)


def test_order_of_jobs(output: Path) -> None:
    comparison = parse(["--output", str(output)])
    cells = comparison.cells()
    for cell in cells:
        tune = cell.tune
        cell.tune = lambda point, tune=tune: [  # type: ignore[misc]
            Job(**{**vars(job), "order": job.settings.seed}) for job in tune(point)
        ]
    schedule = Schedule(cells, comparison.score)
    seeds = [job.settings.seed for job in iter(schedule.claim, None) if job is not None]
    assert seeds == [100] * 4 + [101] * 4


def test_plan_says_what_there_is_to_do(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(output, "--plan --workers 2") == 0
    assert capsys.readouterr().out.splitlines() == [
        "tuning: 8 runs, 0 of them finished",
        "final: 4 runs, 0 of them finished",
        "measured: nothing",
        "estimate: 6 min with 2 runs at a time, if nothing else needs the machine",
    ]
    assert not output.exists()
    compare(output, "--methods lora")
    capsys.readouterr()
    assert run(output, "--plan") == 0
    assert "final: 4 runs, 2 of them finished" in capsys.readouterr().out


def test_report_of_what_is_finished(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(output, "--report") == 0
    assert "nothing to report yet" in capsys.readouterr().out
    trouble(output, "eva-final", "raise RuntimeError")
    assert run(output) == 1
    (output / "report.md").unlink()
    assert run(output, "--report") == 1
    assert "lora" in (output / "report.md").read_text()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--backend rey", "unknown backend 'rey': did you mean ray?"),
        ("--workers -1", "--workers must be a whole number of at least 0, got -1"),
        ("--workers x", "--workers must be a whole number or none, got x"),
        ("--ray-address auto", "--ray-address goes with --backend ray, got --backend local"),
        ("--slurm partition=gpu", "--slurm goes with --backend slurm, got --backend local"),
        ("--gpus-per-run=-1", "--gpus-per-run must be a number of at least 0, got -1.0"),
        ("--worker 3", "unknown option '--worker': did you mean --workers"),
        ("--tune-seeds 0", "--tune-seeds must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_options_are_one_sentence(
    output: Path, capsys: pytest.CaptureFixture[str], extra: str, message: str
) -> None:
    assert run(output, extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not output.exists()


def test_damaged_results_and_choices_are_set_aside_and_made_again(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = compare(output)
    choices = read_sealed_json(output / "choices.json")
    damaged = next((output / "runs").glob("*/metrics.json"))
    damaged.write_text("{")
    (output / "choices.json").write_text((output / "choices.json").read_text()[:-20])
    pool = FakePool()
    again = compare(output, "", pool)
    assert [job.path for job in pool.jobs] == [damaged.parent]
    assert again.runs["loss"].tolist() == first.runs["loss"].tolist()
    assert "metrics.json is damaged" in capsys.readouterr().out
    assert damaged.with_name("metrics.json.damaged").read_text() == "{"
    assert read_sealed_json(output / "choices.json") == choices


def test_an_error_of_the_comparison_itself_is_in_its_log(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(self: Fake, results: Any) -> None:
        raise TypeError("no such column")

    monkeypatch.setattr(Fake, "report", faulty)
    with pytest.raises(TypeError):
        run(output)
    assert "in faulty" in (output / "log.txt").read_text()
    assert errno.ENOSPC == 28
