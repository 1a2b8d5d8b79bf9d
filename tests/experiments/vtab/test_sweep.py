from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_lightning.state import EVAState
from eva_lightning.vision.backbone import timm_models as backbones
from eva_lightning.vision.backbone.backbone_cache import reuse_backbones
from eva_lightning.vision.data.tasks import TASKS
from eva_lightning.vision.module import ImageClassifier
from experiments.vtab import run, sweep, sweep_checks
from experiments.vtab.__main__ import main as vtab
from experiments.vtab.jobs import Job
from experiments.vtab.schedule import cells
from experiments.vtab.store import ResultsStore
from experiments.vtab.store_writer import StoreWriter, held_store
from experiments.vtab.sweep_settings import TABLE_20, parse
from experiments.vtab.worker import Outcome, WorkerOptions
from tests.experiments.vtab.sweep_fakes import inline, make_tasks, pretend, quick, words

SMALL = "--tasks kitti --methods lora,linear --lrs 1e-3,1e-2 --ranks 2,4 --tune-seeds 2 --final-seeds 2"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_tasks(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_defaults_are_the_papers_table_20() -> None:
    settings = parse([])
    assert settings.task_names == tuple(TASKS)
    assert [key.key for key in settings.keys] == TABLE_20.split(",")
    base = settings.base
    expected = {"model": "dinov2_g14", "epochs": 30, "batch_size": 64, "image_size": 224, "weight_decay": 0.05}
    assert {name: getattr(base, name) for name in expected} == expected
    assert str(settings.store_path) == "runs/vtab/results.sqlite"
    assert base.cache == "runs/vtab/cache"
    jobs = [job for cell in cells(settings) for job in cell.tune]
    per_method = {key: sum(job.key.key == key for job in jobs) for key in TABLE_20.split(",")}
    assert per_method == {key: 285 if key == "fft" else 1140 for key in per_method}
    assert len({job.run_id for job in jobs}) == len(jobs)
    assert {job.components for job in jobs if job.key.streams_eva} == {32}
    assert {job.components for job in jobs if not job.key.streams_eva} == {0}


def test_groups_orders_and_repetitions_of_names() -> None:
    settings = parse(["--tasks", "kitti,natural,kitti", "--methods", "eva,eva:2,eva:1"])
    assert settings.task_names == (*list(TASKS)[:7], "kitti")
    assert [key.key for key in settings.keys] == ["eva", "eva:1"]


def test_identity_of_a_run_is_its_settings(root: Path, output: Path, tmp_path: Path) -> None:
    def ids(extra: str, directory: Path = output) -> list[str]:
        return [job.run_id for cell in cells(parse(words(root, directory, f"{SMALL} {extra}"))) for job in cell.tune]

    one = ids("")
    assert ids("--workers 7 --backend ray --cache none --retry-failed", tmp_path / "x") == one
    assert set(ids("--methods lora,linear,eva --tasks all --final-seeds 3")) > set(one)
    for other in ("--epochs 2", "--protocol authors-code", "--model test_vit2", "--limit-train 4", "--tau 0.5"):
        assert not set(ids(other)) & set(one), other
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"1" * 100)
    first = ids(f"--weights {weights}")
    moved = tmp_path / "moved/w.pth"
    moved.parent.mkdir()
    shutil.copy(weights, moved)
    assert ids(f"--weights {moved}") == first
    moved.write_bytes(b"2" * 100)
    moved.rename(moved.parent / "other.pth")
    assert not set(ids(f"--weights {moved.parent / 'other.pth'}")) & set(first)


def test_whole_sweep_in_process(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = inline(monkeypatch, slots=3)
    grid = SMALL.replace("--tune-seeds 2 --final-seeds 2", "--tune-seeds 1 --final-seeds 1")
    rows = sweep.main(words(root, output, grid))
    assert len(rows) == (4 + 1) + (2 + 1)
    assert {row["status"] for row in rows} == {"done"}
    assert backend.closed
    out = capsys.readouterr().out
    assert "8 runs (1 tasks x 2 methods)" in out
    assert "0 done, 0 failed, 8 to do" in out
    assert "8 of 8 runs are done" in out
    # the choice, by its definition
    for method in ("lora", "linear"):
        tuned: dict[Any, list[float]] = {}
        for row in rows:
            if row["method"] == method and row["phase"] == "tune":
                tuned.setdefault((row["lr"], row["rank"]), []).append(row["accuracy"])
        (chosen,) = {(r["lr"], r["rank"]) for r in rows if r["method"] == method and r["phase"] == "final"}
        assert sum(tuned[chosen]) == max(map(sum, tuned.values()))
    by_phase = {row["phase"]: row["metrics"] for row in rows}
    assert (by_phase["tune"]["train_split"], by_phase["tune"]["evaluation_split"]) == ("train800", "val200")
    assert (by_phase["final"]["train_split"], by_phase["final"]["evaluation_split"]) == ("train800val200", "test")
    # a tuning run leaves its row alone; a final run its folder, with adapter and without checkpoints
    assert not list((output / "tuning").iterdir())
    folders = sorted(path.name for path in (output / "runs").iterdir())
    assert len(folders) == 2
    for row in rows:
        if row["phase"] == "final":
            (folder,) = (output / "runs").glob(f"*-{row['run_id'][:8]}")
            stored = json.loads((folder / "metrics.json").read_text())
            assert stored["accuracy"] == row["accuracy"]
            assert (folder / "adapter").is_dir() == (row["method"] == "lora")
            assert not (folder / "checkpoints").exists()
            assert not (folder / "plots").exists()
    # the same command has nothing to do, and says so
    backend.jobs.clear()
    assert sweep.main(words(root, output, grid)) == rows
    assert not backend.jobs
    assert "8 done, 0 failed, 0 to do" in capsys.readouterr().out


def test_a_run_of_the_sweep_is_the_run_command(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inline(monkeypatch)
    rows = sweep.main(
        words(root, output, f"{SMALL} --methods lora --lrs 1e-2 --ranks 2 --tune-seeds 1 --final-seeds 1")
    )
    (row,) = (row for row in rows if row["phase"] == "final")
    text = f"--root {root} --output {output / 'alone'} --task kitti --method lora --seed 0 --model test_vit"
    more = "--weights none --image-size 32 --epochs 1 --batch-size 8 --accelerator cpu"
    alone = run.main([*text.split(), *more.split(), "--lr", str(row["lr"]), "--rank", str(row["rank"])])
    assert (alone["accuracy"], alone["loss"]) == (row["accuracy"], row["loss"])


def test_fewer_final_seeds_later_hide_no_results(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = inline(monkeypatch, pretend(lambda job: 0.5))
    sweep.main(words(root, output, f"{SMALL} --methods lora --final-seeds 3"))
    backend.jobs.clear()
    rows = sweep.main(words(root, output, f"{SMALL} --methods lora --final-seeds 1"))
    assert not backend.jobs
    assert sum(row["phase"] == "final" for row in rows) == 1
    assert {row["seed"] for row in ResultsStore(output / "results.sqlite").rows(phase="final")} == {0, 1, 2}


def test_more_methods_and_a_larger_grid_later(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_rank = pretend(lambda job: 0.5 + job.settings.rank / 100 if job.phase == "tune" else 0.9)
    backend = inline(monkeypatch, by_rank)
    sweep.main(words(root, output, f"{SMALL} --methods lora"))
    backend.jobs.clear()
    sweep.main(words(root, output, f"{SMALL} --methods lora,dora --ranks 2,4,8"))
    assert {job.key.key for job in backend.jobs} == {"lora", "dora"}
    assert sum(job.key.key == "lora" for job in backend.jobs) == 2 * 2 + 2  # rank 8, and its final runs
    store = ResultsStore(output / "results.sqlite")
    finals = store.rows(phase="final", method="lora")
    assert {row["rank"] for row in finals} == {8}  # those of the smaller grid's choice are superseded
    assert len(store.rows(phase="final", method="lora", superseded=True)) == 4
    # and back
    backend.jobs.clear()
    sweep.main(words(root, output, f"{SMALL} --methods lora"))
    assert not backend.jobs
    assert {row["rank"] for row in store.rows(phase="final", method="lora")} == {4}


def test_final_runs_start_as_soon_as_their_own_tuning_is_complete(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = inline(monkeypatch, pretend())
    sweep.main(words(root, output, f"{SMALL} --tasks kitti,dmlab"))
    order = [(job.settings.task, job.key.key, job.phase) for job in backend.jobs]
    expected = [
        (task, method, phase)
        for task in ("dmlab", "kitti")  # the order of the paper's tables
        for method in ("lora", "linear")
        for phase in ("tune", "final")
    ]
    assert list(dict.fromkeys(order)) == expected


def test_failures_are_recorded_the_rest_goes_on_and_they_are_retried_on_request(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"on": True}

    def sometimes(settings: run.Settings, *args: Any) -> dict[str, Any]:
        if broken["on"] and settings.method == "lora" and settings.rank == 4:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return quick(settings, *args)

    monkeypatch.setattr(run, "execute", sometimes)
    backend = inline(monkeypatch)
    assert sweep.command_line(words(root, output, SMALL)) == 1
    store = ResultsStore(output / "results.sqlite")
    failed = store.rows(status="failed")
    assert len(failed) == 4
    for row in failed:
        assert "Traceback" in row["error"]
        assert "in sometimes" in row["error"]
        assert "illegal memory access" in row["error"]
    assert {row["method"] for row in store.rows(phase="final")} == {"linear"}  # lora's choice would be another's
    out = capsys.readouterr().out
    assert "4 failed, such as kitti, lora, lr 0.001, r 4, seed 0, tune: RuntimeError: CUDA error" in out
    assert "failed tuning runs hold up the final runs of 1 tasks and methods, such as kitti, lora" in out
    # without a request they stay
    backend.jobs.clear()
    assert sweep.command_line(words(root, output, SMALL)) == 1
    assert not backend.jobs
    # choosing without them
    assert sweep.command_line(words(root, output, f"{SMALL} --skip-failed")) == 1
    assert {row["rank"] for row in store.rows(phase="final", method="lora")} == {2}
    # and with them
    broken["on"] = False
    backend.jobs.clear()
    assert sweep.command_line(words(root, output, f"{SMALL} --retry-failed")) == 0
    assert {(job.key.key, job.settings.rank) for job in backend.jobs if job.phase == "tune"} == {("lora", 4)}
    assert not store.rows(status="failed")


def test_sweep_that_only_fails_stops(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = inline(
        monkeypatch, lambda job: Outcome(job.run_id, "failed", error="Traceback\nValueError: no such head")
    )
    with pytest.raises(ValueError, match=r"the first 3 runs failed, the last one with 'ValueError: no such head'"):
        sweep.main(words(root, output, f"{SMALL} --methods linear --lrs 1,2,3,4"))
    assert len(backend.jobs) == 3


def test_full_disk_stops_the_sweep_with_one_sentence_and_rows_intact(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = {"after": 5}

    def until_full(*args: Any) -> dict[str, Any]:
        full["after"] -= 1
        if full["after"] < 0:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise RuntimeError("PytorchStreamWriter failed writing file data/3") from error
        return quick(*args)

    monkeypatch.setattr(run, "execute", until_full)
    backend = inline(monkeypatch, slots=2)
    assert sweep.command_line(words(root, output, SMALL)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: the disk that holds {output} is full (")
    assert error.rstrip().endswith("make room, then the same command goes on")
    assert len(error.splitlines()) == 1
    assert backend.closed
    states = [row["status"] for row in ResultsStore(output / "results.sqlite").rows()]
    assert sorted(states) == ["done"] * 5 + ["pending"] * 7
    full["after"] = 1000
    backend.jobs.clear()
    backend._waiting.clear()
    assert sweep.command_line(words(root, output, SMALL)) == 0
    assert len(backend.jobs) == 11


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_the_store_in_order(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: signal.Signals
) -> None:
    done = pretend()
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def interrupted(job: Job) -> Outcome:
        if len(backend.jobs) == 7:
            os.kill(os.getpid(), how)
        return done(job)

    backend = inline(monkeypatch, interrupted, slots=2)
    assert sweep.command_line(words(root, output, SMALL)) == 130
    assert backend.closed
    assert "interrupted: 5 of 16 runs are done; the same command goes on" in capsys.readouterr().out
    states = [row["status"] for row in ResultsStore(output / "results.sqlite").rows()]
    assert sorted(states) == ["done"] * 5 + ["pending"] * 7
    with held_store(output / "results.sqlite") as store:
        assert store.taken_over is None
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_two_sweeps_on_one_store(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inline(monkeypatch, pretend())
    with held_store(output / "results.sqlite"):
        assert sweep.command_line(words(root, output, SMALL)) == 2
        error = capsys.readouterr().err
        assert f"is in use by another sweep (process {os.getpid()} on " in error
        assert len(error.splitlines()) == 1
    assert sweep.command_line(words(root, output, SMALL)) == 0


def test_a_run_finished_but_not_recorded_is_not_run_again(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep was killed between a run's last line and its row."""
    monkeypatch.setattr(run, "execute", quick)
    inline(monkeypatch)
    lost = {"n": 0}
    finish = StoreWriter.finish

    def killed(self: StoreWriter, run_id: str, metrics: dict[str, Any]) -> None:
        lost["n"] += 1
        if lost["n"] == 4:
            raise KeyboardInterrupt
        finish(self, run_id, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", killed)
        assert sweep.command_line(words(root, output, SMALL)) == 130
    assert len(list((output / "tuning").iterdir())) == 1
    assert sweep.command_line(words(root, output, SMALL)) == 0
    begun = [line for line in (output / "journal.log").read_text().splitlines() if " begin " in line]
    assert len(begun) == 16
    assert not list((output / "tuning").iterdir())


def test_long_run_goes_on_from_its_checkpoint(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = inline(monkeypatch)
    backend.options = WorkerOptions(checkpoint_minutes=0.0)
    extra = "--tasks kitti --methods eva --lrs 1e-2 --ranks 4 --tune-seeds 1 --final-seeds 1 --epochs 3"
    whole = sweep.main(words(root, output / "whole", extra))
    training_step, epochs = ImageClassifier.training_step, []

    def noted(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        epochs.append(self.current_epoch)
        if len(epochs) == 3:
            raise _Killed
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", noted)
    with pytest.raises(_Killed):
        sweep.main(words(root, output / "cut", extra))
    resumed = sweep.main(words(root, output / "cut", extra))
    # one step per epoch; the third again, not the first two; then the final run, of two steps per epoch
    assert epochs == [0, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    assert [(r["phase"], r["accuracy"], r["loss"]) for r in resumed] == [
        (r["phase"], r["accuracy"], r["loss"]) for r in whole
    ]


class _Killed(BaseException):
    """As abrupt as a signal, for a test in one process."""


def test_loggers_of_tuning_runs_keep_their_folders(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inline(monkeypatch)
    sweep.main(words(root, output, f"{SMALL} --methods linear --lrs 1e-3 --logger csv"))
    assert len(list((output / "tuning").iterdir())) == 2


def test_rank_grid_beyond_the_eva_states() -> None:
    with pytest.raises(ValueError) as error:
        parse(["--methods", "lora,eva:1,eva", "--state-components", "16"])
    assert str(error.value) == (
        "rank 16 and ρ = 2 (eva) needs 32 components per layer, beyond the 16 of the EVA states: raise "
        "--state-components or leave out the larger ranks"
    )
    settings = parse(["--methods", "lora,eva:1", "--state-components", "40"])
    assert [settings.components(key) for key in settings.keys] == [0, 40]
    with pytest.raises(ValueError, match="rank must be at most 32, got 64"):
        parse(["--methods", "eva", "--protocol", "authors-code", "--ranks", "2,64"])
    settings = parse(["--methods", "eva,eva:1", "--protocol", "authors-code"])
    assert {settings.components(key) for key in settings.keys} == {32}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--tasks kiti", "unknown VTAB-1K task 'kiti': did you mean kitti"),
        ("--methods eva,lorra", "unknown method 'lorra': did you mean lora"),
        ("--methods lora:2", "lora has no rho"),
        ("--model tst_vit", "unknown model 'tst_vit': did you mean test_vit"),
        ("--grid papper", "unknown grid 'papper': did you mean paper"),
        ("--backend rey", "unknown backend 'rey': did you mean ray"),
        ("--protocol papper", "unknown protocol 'papper': did you mean paper"),
        ("--workers 0", "workers must be at least 1, got 0"),
        ("--ray-address auto", "ray_address goes with --backend ray"),
        ("--methods ,", "methods must name at least one method"),
        ("--tau 2", "tau"),
        ("--image-size 40", "patch size 16"),
        ("--weights nowhere.pth", r"weight file nowhere\.pth does not exist"),
        ("--tasks kitti,eurosat", "has no folder eurosat"),
        ("--tasks all", r"17 of 19 tasks cannot be used, the first one because .*caltech101.*prepare command"),
        ("--root nowhere", r"nowhere does not exist"),
        ("--logger tensorbord", "tensorbord"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(
    root: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: str,
    message: str,
) -> None:
    monkeypatch.setattr(sweep, "open_backend", lambda *a, **k: pytest.fail("started"))
    assert sweep.command_line(words(root, output, f"{SMALL} {extra}")) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1
    assert not output.exists()


def test_too_little_room_is_said_before_anything_starts(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(root)._replace(free=300 * 2**20)
    monkeypatch.setattr(sweep_checks.shutil, "disk_usage", lambda _: usage)
    inline(monkeypatch, pretend())
    with pytest.raises(ValueError, match=r"the sweep needs about .* has 315 MB free: make room, .* --cache none"):
        sweep.main(words(root, output, f"{SMALL} --image-size 224"))
    sweep.main(words(root, output, f"{SMALL} --image-size 224 --cache none"))


def test_dispatcher_takes_a_line_without_a_task_for_the_sweep(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = inline(monkeypatch, pretend())
    assert vtab(words(root, output, SMALL)) == 0
    assert len(backend.jobs) == 16
    assert vtab(["sweep", *words(root, output, SMALL)]) == 0
    config = output / "sweep.yaml"
    config.write_text("methods: linear\nepochs: 2\nlrs: '1e-3'\nweights: none\n")
    assert vtab(["--config", str(config), *words(root, output, "--tasks kitti --epochs 2")]) == 0
    assert backend.jobs[-1].settings.epochs == 2


def test_runs_outside_the_main_thread(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inline(monkeypatch, pretend())
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(sweep.main(words(root, output, SMALL))))
    thread.start()
    thread.join()
    assert len(results) == 16


def test_state_is_streamed_once_for_a_whole_sweep(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "execute", quick)
    inline(monkeypatch)
    rows = sweep.main(words(root, output, "--tasks kitti --methods eva,eva:1 --lrs 1e-3 --ranks 2,4 --tune-seeds 2"))
    assert len(rows) == 2 * (4 + 5)
    assert len((output / "states/computed.log").read_text().splitlines()) == 2  # train800, and all images
    (tune,) = (output / "states").glob("kitti-train800-*.json")
    assert {len(v) for v in EVAState.load(tune).singular_values.values()} == {8}
    assert {row["metrics"]["eva_state"] for row in rows if row["phase"] == "tune"} == {tune.stem}


def test_weights_are_built_once_per_process(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created, builds = backbones._created, []
    monkeypatch.setattr(backbones, "_created", lambda *a: (builds.append(a) if not _meta() else None, created(*a))[1])
    reuse_backbones()
    try:
        inline(monkeypatch)
        sweep.main(words(root, output, f"{SMALL} --methods linear"))
    finally:
        reuse_backbones(False)
    assert len(builds) == 1


def _meta() -> bool:
    return torch.empty(0).device.type == "meta"
