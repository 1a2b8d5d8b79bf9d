from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_lightning import files
from eva_lightning.errors import InputError
from eva_lightning.state import EVAState
from eva_lightning.vision.backbone import timm_models as backbones
from eva_lightning.vision.backbone.backbone_cache import reuse_backbones
from eva_lightning.vision.data.tasks import TASKS
from eva_lightning.vision.module import ImageClassifier
from experiments.runner import comparison, jobs
from experiments.runner.jobs import Job
from experiments.runner.run_folder import RunFolder, Work
from experiments.vtab import run, settings
from experiments.vtab.__main__ import main as vtab
from experiments.vtab.sweep import Sweep
from experiments.vtab.sweep_settings import TABLE_20, command_line, parse
from experiments.vtab.table_results import gather, read_runs
from tests.experiments.runner.fake_pool import FakePool
from tests.experiments.vtab.sweep_fakes import all_runs, make_tasks, pretend, sweep, words

SMALL = "--tasks kitti --methods lora,linear --lrs 1e-3,1e-2 --ranks 2,4 --tune-seeds 2 --final-seeds 2"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # collecting garbage after each run would look at all that the test process has imported
    monkeypatch.setattr(jobs, "free_memory", lambda: None)
    make_tasks(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def tuning(line: list[str]) -> list[Job]:
    """The tuning runs of a sweep."""
    return [job for cell in Sweep(parse(line)).cells() for point in cell.points for job in cell.tune(point)]


def test_defaults_are_the_papers_table_20() -> None:
    settings = parse([])
    assert settings.task_names == tuple(TASKS)
    assert tuple(each.name for each in settings.contenders) == TABLE_20
    expected = {"model": "dinov2_g14", "epochs": 30, "batch_size": 64, "image_size": 224, "weight_decay": 0.05}
    assert {name: getattr(settings.base, name) for name in expected} == expected
    assert settings.base.cache_dir == Path("runs/vtab/cache")
    jobs = tuning([])
    per_method = {key: sum(job.settings.method == key for job in jobs) for key in TABLE_20}
    several = {"fft": 285, "eva": 2 * 1140, "eva-dora": 2 * 1140}
    assert per_method == {key: several.get(key, 1140) for key in per_method}
    assert len({job.id for job in jobs}) == len(jobs)
    assert {job.settings.split for job in jobs} == {"train800"}
    assert {job.settings.rho for job in jobs if job.settings.method in ("eva", "eva-dora")} == {1.0, 2.0}
    components = {job.settings.method: job.shared and job.shared.path.rpartition("-k")[2] for job in jobs}
    assert components == {key: "32" if key in ("eva", "eva-dora") else None for key in TABLE_20}


def test_groups_orders_and_repetitions_of_names() -> None:
    settings = parse(["--tasks", "kitti,natural,kitti", "--methods", "eva,eva:2,eva:1"])
    assert settings.task_names == (*list(TASKS)[:7], "kitti")
    (eva,) = settings.contenders
    assert ([key.rho for key in eva.keys], [key.rho for key in eva.always]) == ([1.0, 2.0], [1.0, 2.0])
    settings = parse(["--methods", "eva:1,eva:1.5,eva,eva-whiten,eva:1"])
    assert [each.name for each in settings.contenders] == ["eva:1.5", "eva", "eva-whiten"]
    assert [each.name for each in parse(["--methods", "eva:2,eva:1"]).contenders] == ["eva", "eva:1"]
    assert [each.searches_rho for each in parse(["--methods", "eva", "--rhos", "1.5"]).contenders] == [False]


def test_identity_of_a_run_is_its_settings(root: Path, output: Path, tmp_path: Path) -> None:
    def ids(extra: str, directory: Path = output) -> list[str]:
        return [job.id for job in tuning(words(root, directory, f"{SMALL} {extra}"))]

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


def test_whole_sweep_in_process(root: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = FakePool(slots=3)
    line = words(root, output, SMALL.replace("--tune-seeds 2 --final-seeds 2", "--tune-seeds 1 --final-seeds 1"))
    results = sweep(line, pool)
    assert results.is_complete
    assert (len(results.tuning), len(results.runs)) == (4 + 2, 2)
    out = capsys.readouterr().out
    assert "VTAB-1K: 8 runs" in out
    assert "0 done, 0 failed, 8 to do" in out
    assert "8 of 8 runs are done" in out
    assert f"the table: python -m experiments.vtab table --runs {output}" in out
    # the choice, by its definition
    for method in ("lora", "linear"):
        tuned = results.tuning[results.tuning["method"] == method]
        (final,) = results.runs[results.runs["method"] == method].to_dict("records")
        same = tuned[(tuned["lr"] == final["lr"]) & (tuned["rank"].eq(final["rank"]) | tuned["rank"].isna())]
        assert same["accuracy"].tolist() == [tuned["accuracy"].max()]
    for found, splits in ((results.tuning, ("train800", "val200")), (results.runs, ("train800val200", "test"))):
        assert set(zip(found["train_split"], found["evaluation_split"], strict=True)) == {splits}
    # final runs keep their adapters; no run keeps checkpoints or draws curves
    assert len(list((output / "tuning").iterdir())) == 6
    for final in all_runs(results).to_dict("records"):
        folder = Path(final["path"])
        assert json.loads((folder / "metrics.json").read_text())["accuracy"] == final["accuracy"]
        assert (folder / "adapter").is_dir() == (final["method"] == "lora" and final["phase"] == "final")
        assert not (folder / "checkpoints").exists()
        assert not (folder / "plots").exists()
    # the same command has nothing to do, and says so
    pool.jobs.clear()
    again = sweep(line, pool).runs
    assert dict(zip(again["id"], again["accuracy"], strict=True)) == dict(
        zip(results.runs["id"], results.runs["accuracy"], strict=True)
    )
    assert not pool.jobs
    assert "8 done, 0 failed, 0 to do" in capsys.readouterr().out


def test_a_run_of_the_sweep_is_the_run_command(root: Path, output: Path) -> None:
    results = sweep(words(root, output, f"{SMALL} --methods lora --lrs 1e-2 --ranks 2 --tune-seeds 1 --final-seeds 1"))
    (row,) = results.runs.to_dict("records")
    text = f"--root {root} --output {output / 'alone'} --task kitti --method lora --seed 0 --model test_vit"
    more = "--weights none --image-size 32 --epochs 1 --batch-size 8 --accelerator cpu"
    alone = settings.main([*text.split(), *more.split(), "--lr", str(row["lr"]), "--rank", str(row["rank"])])
    assert (alone["accuracy"], alone["loss"]) == (row["accuracy"], row["loss"])


def test_fewer_final_seeds_later_hide_no_results(root: Path, output: Path) -> None:
    sweep(words(root, output, f"{SMALL} --methods lora --final-seeds 3"), FakePool(pretend()))
    pool = FakePool(pretend())
    results = sweep(words(root, output, f"{SMALL} --methods lora --final-seeds 1"), pool)
    assert not pool.jobs
    assert len(results.runs) == 1
    (ours,) = gather(read_runs([output]))
    assert ours.samples["kitti"].n == 3


def test_more_methods_and_a_larger_grid_later(root: Path, output: Path) -> None:
    pool = FakePool(pretend(lambda job: job.settings.rank / 100 + 0.5 * (job.phase == "final")))
    sweep(words(root, output, f"{SMALL} --methods lora"), pool)
    (ours,) = gather(read_runs([output]))
    assert ours.samples["kitti"].mean == pytest.approx(54)
    pool.jobs.clear()
    line = words(root, output, f"{SMALL} --methods lora,dora --ranks 2,4,8")
    assert set(sweep(line, pool).runs["rank"]) == {8}
    assert {job.tags["method"] for job in pool.jobs} == {"lora", "dora"}
    assert sum(job.tags["method"] == "lora" for job in pool.jobs) == 2 * 2 + 2  # rank 8, and its final runs
    # those of the smaller grid's choice count no more
    ours, _ = gather(read_runs([output]))
    assert (ours.key.method, ours.samples["kitti"].mean, ours.samples["kitti"].n) == ("lora", pytest.approx(58), 2)
    # and back
    pool.jobs.clear()
    assert set(sweep(words(root, output, f"{SMALL} --methods lora"), pool).runs["rank"]) == {4}
    assert not pool.jobs


def test_a_task_and_method_is_finished_before_the_next_one_begins(root: Path, output: Path) -> None:
    pool = FakePool(pretend())
    sweep(words(root, output, f"{SMALL} --tasks kitti,dmlab"), pool)
    order = [(job.settings.task, job.tags["method"], job.phase) for job in pool.jobs]
    expected = [
        (task, method, phase)
        for task in ("dmlab", "kitti")  # the order of the paper's tables
        for method in ("lora", "linear")
        for phase in ("tune", "final")
    ]
    assert list(dict.fromkeys(order)) == expected


def test_long_run_goes_on_from_its_checkpoint(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = "--methods eva:2 --lrs 1e-2 --ranks 4 --tune-seeds 1 --final-seeds 1 --epochs 3 --checkpoint-minutes 0"
    whole = all_runs(sweep(words(root, output / "whole", f"--tasks kitti {extra}")))
    training_step, epochs = ImageClassifier.training_step, []

    def noted(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        epochs.append(self.current_epoch)
        if len(epochs) == 3:
            raise _Killed
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", noted)
    with pytest.raises(_Killed):
        sweep(words(root, output / "cut", f"--tasks kitti {extra}"))
    resumed = all_runs(sweep(words(root, output / "cut", f"--tasks kitti {extra}")))
    # one step per epoch; the third again, not the first two; then the final run, of two steps per epoch
    assert epochs == [0, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    figures = ["phase", "accuracy", "loss"]
    assert resumed[figures].equals(whole[figures])


class _Killed(BaseException):
    """As abrupt as a signal, for a test in one process."""


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
        ("--workers -1", "workers must be a whole number of at least 0, got -1"),
        ("--ray-address auto", "--ray-address goes with --backend ray"),
        ("--methods []", "methods must name at least one method"),
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
    monkeypatch.setattr(comparison, "open_pool", lambda *a, **k: pytest.fail("started"))
    assert command_line(words(root, output, f"{SMALL} {extra}")) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1
    assert not output.exists()


def test_too_little_room_is_said_before_anything_starts(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(root)._replace(free=300 * 2**20)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"the sweep needs about .* has 300\.0 MiB free: make room, .* --cache none"):
        sweep(words(root, output, f"{SMALL} --image-size 224"))
    sweep(words(root, output, f"{SMALL} --image-size 224 --cache none"), FakePool(pretend()))


def test_dispatcher_takes_a_line_without_a_task_for_the_sweep(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = FakePool(pretend())
    monkeypatch.setattr(comparison, "open_pool", lambda *args: pool)
    assert vtab(words(root, output, SMALL)) == 0
    assert len(pool.jobs) == 16
    assert vtab(["sweep", *words(root, output, SMALL)]) == 0
    assert len(pool.jobs) == 16
    config = output / "sweep.yaml"
    config.write_text("methods: [linear]\nepochs: 2\nlrs: [1e-3]\nweights: none\n")
    assert vtab(["--config", str(config), *words(root, output, "--tasks kitti --epochs 2")]) == 0
    assert pool.jobs[-1].settings.epochs == 2


def test_state_is_streamed_once_for_a_whole_sweep(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(settings: settings.Settings) -> Work:
        state = Path(str(settings.eva_state)).name

        def work(folder: RunFolder) -> Mapping[str, Any]:
            return {"accuracy": 0.5, "loss": 1.0, "eva_state": state}

        return work

    monkeypatch.setattr(run, "build", quick)
    results = sweep(words(root, output, "--tasks kitti --methods eva:2,eva:1 --lrs 1e-3 --ranks 2,4 --tune-seeds 2"))
    assert len(all_runs(results)) == 2 * (4 + 5)
    assert len((output / "states/computed.log").read_text().splitlines()) == 2  # train800, and all images
    (tune,) = (output / "states").glob("kitti-train800-*.json")
    assert {len(v) for v in EVAState.load(tune).singular_values.values()} == {8}
    assert set(results.tuning["eva_state"]) == {tune.stem}


def test_weights_are_built_once_per_process(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created, builds = backbones._created, []
    monkeypatch.setattr(backbones, "_created", lambda *a: (builds.append(a) if not _meta() else None, created(*a))[1])
    start: Callable[[], None] | None = Sweep(parse(words(root, output, SMALL))).worker_options().start
    assert start is not None
    start()
    try:
        sweep(words(root, output, f"{SMALL} --methods linear"))
    finally:
        reuse_backbones(False)
    assert len(builds) == 1


def _meta() -> bool:
    return torch.empty(0).device.type == "meta"


RHO = "--tasks kitti --methods eva --lrs 1e-3,1e-2 --ranks 2,4 --tune-seeds 2 --final-seeds 2"


def _by_rho(job: Job) -> float:
    """At ρ = 1 rank 2 is the better one, at ρ = 2 rank 4, and this is the best."""
    return 0.5 + 0.1 * ((job.settings.rho, job.settings.rank) in ((1, 2), (2, 4))) + 0.1 * (job.settings.rho == 2)


def test_rho_is_chosen_by_validation_and_only_the_better_one_gets_final_runs(root: Path, output: Path) -> None:
    pool = FakePool(pretend(_by_rho))
    results = sweep(words(root, output, RHO), pool)
    assert len(results.tuning) == 2 * 4 * 2
    assert set(zip(results.runs["rho"], results.runs["rank"], strict=True)) == {(2.0, 4)}
    assert results.choices["kitti, eva"].point.as_dict() == {"lr": 1e-3, "rank": 4, "rho": 2.0}
    # the other one's, at its own best rank, on request; nothing is run again
    pool.jobs.clear()
    results = sweep(words(root, output, f"{RHO} --final-each-rho"), pool)
    assert {(job.settings.rho, job.settings.rank, job.phase) for job in pool.jobs} == {(1.0, 2, "final")}
    assert len(pool.jobs) == 2
    assert set(zip(results.runs["rho"], results.runs["rank"], strict=True)) == {(1.0, 2), (2.0, 4)}


def test_a_sweep_from_before_rho_was_searched_goes_on(root: Path, output: Path) -> None:
    """Ids and folders of runs with a given ρ are those of runs whose ρ is searched."""
    pool = FakePool(pretend(_by_rho))
    before = sweep(words(root, output, RHO.replace("eva", "eva:2")), pool)
    pool.jobs.clear()
    after = sweep(words(root, output, RHO), pool)
    assert {(job.settings.rho, job.phase) for job in pool.jobs} == {(1.0, "tune")}
    assert set(before.runs["id"]) == set(after.runs["id"])
    assert set(before.runs["path"]) == set(after.runs["path"])


def test_several_rho_above_one_are_refused_where_all_are_the_same() -> None:
    parse(["--methods", "eva", "--protocol", "authors-code", "--rhos", "1,2"])
    with pytest.raises(ValueError, match=r"lets all 32 components .* rhos may hold one such value, got 1\.5, 2\.0"):
        parse(["--methods", "eva", "--protocol", "authors-code", "--rhos", "1,1.5,2"])
