from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from eva_lightning.methods import METHODS, method_names
from eva_lightning.rl.module import DecisionTransformerModule, read_checkpoint
from eva_lightning.sealed import read_sealed_json
from eva_lightning.state import EVAState
from experiments.metaworld import evaluate, finetune, finetune_run, table
from experiments.metaworld.finetune_run import build, prepare
from experiments.runner.run_folder import RunFolder, perform
from experiments.runner.settings import Role, identity
from tests.eva_lightning.rl.tiny import TASK, make_robot
from tests.paths import ROOT


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of one task and a pre-trained network, both tiny."""
    folder = tmp_path_factory.mktemp("metaworld")
    return make_robot(folder, about={"tasks": [TASK]})


def command(root: Path, method: str = "eva", *more: str, seeds: int = 1) -> list[str]:
    options = {
        "task": TASK, "init": root / "init.ckpt", "data": root / "data", "output": root / "runs", "method": method,
        "seeds": seeds, "train-episodes": 3, "val-episodes": 1, "max-steps": 6, "batch-size": 8, "val-at": "2,4",
        "eval-episodes": 1, "horizon": 5, "rank": 2, "progress": "false", "accelerator": "cpu",
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


@pytest.mark.parametrize("method", method_names("rl"))
def test_every_method_runs_and_its_checkpoints_evaluate(method: str, root: Path) -> None:
    (metrics,) = finetune.main(command(root, method))
    assert [row["updates"] for row in metrics["val_loss"]] == [0, 2, 4, 6]
    assert metrics["val_loss"][0]["val_loss"] > 0
    assert metrics["rank"] == (2 if METHODS[method].adapts else None)
    assert (metrics["episodes"], len(metrics["returns"])) == (1, 1)
    (folder,) = (p.parent for p in (root / "runs").glob(f"{TASK}-{method}-*/metrics.json") if f"-{method}-" in str(p))
    assert read_sealed_json(folder / "metrics.json") == metrics
    assert (folder / "adapter" / "adapter_config.json").is_file() == METHODS[method].adapts
    # the merged network and the trainer's checkpoint with adapters roll out alike
    for checkpoint in (folder, folder / "checkpoints" / "last.ckpt"):
        (result,) = evaluate.main([f"--ckpt={checkpoint}", "--episodes=1", "--horizon=5", "--progress=false"])
        assert result.returns.tolist() == pytest.approx(metrics["returns"], rel=1e-3)


def test_all_methods_but_scratch_and_those_that_move_start_from_the_same_loss(root: Path) -> None:
    start = {m: finetune.main(command(root, m))[0]["val_loss"][0]["val_loss"] for m in ("fft", "lora", "eva", "pissa")}
    assert list(start.values()) == pytest.approx([start["fft"]] * 4, rel=1e-4)
    moved, kept = (
        finetune.main(command(root, "lora-one", f"--keep-function={keep}", f"--name={keep}"))[0]["val_loss"][0][
            "val_loss"
        ]
        for keep in ("false", "true")
    )
    assert kept == pytest.approx(start["fft"], rel=1e-4)
    assert moved != pytest.approx(start["fft"], rel=1e-4)
    (scratch,) = finetune.main(command(root, "scratch"))
    assert scratch["val_loss"][0]["val_loss"] != pytest.approx(start["fft"], rel=1e-4)


@pytest.mark.parametrize(("head", "trains", "adapted"), [("train", 2, 0), ("freeze", 0, 0), ("adapt", 2, 2)])
def test_embeddings_have_no_adapters_and_the_head_as_asked(head: str, trains: int, adapted: int, root: Path) -> None:
    settings = finetune.parse(command(root, "lora", f"--head={head}"))
    base = DecisionTransformerModule.from_pretrained(root / "init.ckpt")
    prepare(settings, base)
    trained = [name for name, p in base.named_parameters() if p.requires_grad]
    assert not any("embed" in name for name in trained)
    of_head = [name for name in trained if "predict_action" in name]
    assert len(of_head) == trains
    assert sum("lora_" in name for name in of_head) == adapted
    assert sum("blocks" in name for name in trained) == 2 * 4 * 2


@pytest.mark.parametrize("method", ["eva", "lora", "pissa", "corda", "adalora"])
def test_layers_to_adapt_can_be_named_for_every_method(method: str, root: Path) -> None:
    settings = finetune.parse(command(root, method, "--target-modules=blocks.0"))
    base = DecisionTransformerModule.from_pretrained(root / "init.ckpt")
    callbacks = prepare(settings, base)
    if method == "eva":
        callbacks[0].initialiser.inject(base)  # type: ignore[attr-defined]
    adapted = {name.partition(".lora_")[0] for name, _ in base.named_parameters() if ".lora_" in name}
    assert adapted == {f"model.blocks.0.{name}" for name in ("qkv", "proj", "fc1", "fc2")}


def test_the_papers_algorithm_can_be_chosen(root: Path) -> None:
    line = command(root, "eva", "--algorithm=paper", "--name=paper", "--rank=1")
    finetune.main(line)
    state = EVAState.load(root / "runs" / "paper-0" / "eva_state")
    assert state.meta["algorithm"] == "paper"
    assert state.meta["tokens_per_sample"] == "all"
    assert state.meta["selected_converged"] == state.meta["selected"] == sum(state.ranks.values())
    # runs from before the option was there keep their identity
    fast = finetune.parse(command(root, "eva"))
    assert "algorithm" not in identity(fast, Role.RESULT)
    assert identity(finetune.parse(line), Role.RESULT)["algorithm"] == "paper"


def test_finished_seeds_are_reprinted_and_interrupted_ones_go_on(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = command(root, "lora", "--name=again", "--checkpoint-every=3", seeds=2)

    def power_cut(*args: Any, **options: Any) -> Any:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(finetune_run, "evaluate", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            finetune.main(line)
    assert "RuntimeError: power cut" in (root / "runs" / "again-0" / "log.txt").read_text()
    first = finetune.main(line)
    assert "resuming from" in capsys.readouterr().out
    assert [run["seed"] for run in first] == [0, 1]
    assert [row["updates"] for row in first[0]["val_loss"]] == [0, 2, 4, 6]
    assert finetune.main(line) == first
    printed = capsys.readouterr().out
    assert printed.count("is finished already") == 2
    assert "2 seeds: validation loss" in printed
    assert re.search(r"success: any step \d\.\d\d ± \d\.\d\d, last step \d\.\d\d ± \d\.\d\d, return", printed)
    assert re.search(r"seed 1: .* success: any step \d\.\d\d \[.*\], last step \d\.\d\d \[.*\]", printed)
    assert "The paper's numbers belong beside success at the last step" in printed
    assert [len(run["final_successes"]) for run in first] == [1, 1]
    assert "± is half the width of the 95% interval" in printed
    with pytest.raises(ValueError, match=r"holds another run, with lr=0.001 \(now 0.01\)"):
        finetune.main([*line, "--lr=0.01"])
    assert "| **ours** LoRA (r=2)" in table.main(["--runs", str(root / "runs" / "again-0")])


def test_a_run_alone_is_that_of_the_command_and_leaves_what_is_asked_for(root: Path, tmp_path: Path) -> None:
    (metrics,) = finetune.main(command(root, "eva", "--name=command"))
    settings = replace(finetune.parse(command(root, "eva")), checkpoint_every=0, save=False)
    folder = RunFolder(tmp_path / "alone", settings)
    alone = perform(folder, partial(build, settings), terminal=False)
    for name in ("val_loss", "ranks", "returns", "trainable_parameters"):
        assert alone[name] == metrics[name], name
    assert sorted(path.name for path in folder.path.iterdir() if path.suffix) == [
        "config.yaml", "log.txt", "metrics.json",
    ]  # fmt: skip
    assert not (folder.path / "checkpoints").exists()
    # its config.yaml is a command line, of this one run
    assert finetune.parse([f"--config={folder.path / 'config.yaml'}"]) == settings


def test_mixed_precision_starts_eva_rolls_out_and_resumes_bit_for_bit(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--precision=bf16-mixed", "--checkpoint-every=2", "--dropout=0.1", "--bias=all")
    (whole,) = finetune.main(command(root, "eva", "--name=bf16", *more))
    assert whole["precision"] == "bf16-mixed"
    assert len(whole["returns"]) == 1
    (single,) = finetune.main(command(root, "eva", "--name=fp32", *more, "--precision=32-true"))
    losses = [[row["val_loss"] for row in metrics["val_loss"]] for metrics in (whole, single)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    # in another precision, not the same numbers under another name
    assert losses[0] != losses[1]
    assert sum(whole["ranks"].values()) == sum(single["ranks"].values())

    steps, original = iter(range(100)), DecisionTransformerModule.training_step

    def power_cut(self: DecisionTransformerModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if next(steps) == 5:
            raise RuntimeError("power cut")
        return original(self, batch, batch_idx)

    line = command(root, "eva", "--name=bf16-cut", *more)
    with monkeypatch.context() as patched:
        patched.setattr(DecisionTransformerModule, "training_step", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            finetune.main(line)
    capsys.readouterr()
    (resumed,) = finetune.main(line)
    assert "resuming from" in capsys.readouterr().out
    assert resumed["val_loss"] == whole["val_loss"]
    assert resumed["returns"] == whole["returns"]
    weights = [read_checkpoint(root / "runs" / f"{n}-0" / "weights.ckpt")["state_dict"] for n in ("bf16", "bf16-cut")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert {value.dtype for value in weights[0].values()} == {torch.float32}
    # another precision is another run
    assert finetune.command_line([*line, "--precision=32-true"]) == 2
    assert "holds another run, with precision=bf16-mixed (now 32-true)" in capsys.readouterr().err


def test_loggers_get_the_curves_the_ranks_and_the_result(root: Path) -> None:
    (metrics,) = finetune.main(command(root, "eva", "--name=logged", "--logger=csv,tensorboard"))
    (file,) = (root / "runs" / "logged-0" / "csv").glob("*/metrics.csv")
    rows = pd.read_csv(file)
    losses = rows.dropna(subset="val_loss")
    assert dict(zip(losses["step"], losses["val_loss"], strict=True)) == pytest.approx(
        {row["updates"]: row["val_loss"] for row in metrics["val_loss"]}
    )
    found = {name: rows[name].dropna().tolist() for name in rows}
    assert found["eva/rank_mean"] == [2.0]
    assert found["success_rate"] == [metrics["success_rate"]]
    assert found["final_success_rate"] == [metrics["final_success_rate"]]
    assert found["mean_return"] == pytest.approx([metrics["mean_return"]])
    assert len(found["train_loss"]) > 0
    assert list((root / "runs" / "logged-0" / "tensorboard").glob("events*"))
    # where a run logs to does not make it another
    assert finetune.main(command(root, "eva", "--name=logged")) == [metrics]


def test_checkpoints_may_come_by_time(root: Path) -> None:
    finetune.main(command(root, "lora", "--name=timed", "--checkpoint-minutes=0", "--save=false"))
    # after the last step and, as no time has to pass, after those before it
    folder = root / "runs" / "timed-0" / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "last.ckpt.previous"]
    assert torch.load(folder / "last.ckpt.previous", weights_only=True)["global_step"] in (5, 6)


def test_settings_that_came_later_leave_the_identity_of_older_runs_alone() -> None:
    older = finetune.Settings(task=("push-v3",), init="x", checkpoint_every=7, logger="csv")
    assert RunFolder("x", older).id == "4cdecd1af9f6d225"
    changed = [{"precision": "bf16-mixed"}, {"devices": 2}, {"min_lr": 1e-5}, {"gradient_clip": 1.0}]
    ids = {RunFolder("x", replace(older, **change)).id for change in changed}  # type: ignore[arg-type]
    assert len(ids - {"4cdecd1af9f6d225"}) == 4


@pytest.mark.slow
def test_two_processes_share_a_batch_and_one_of_them_writes(root: Path) -> None:
    more = ("--dropout=0", "--logger=csv", "--max-steps=3", "--val-at=1")
    line = command(root, "eva", "--name=two", "--devices=2", *more, seeds=2)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.metaworld", "finetune", *line],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    alone = finetune.main(command(root, "eva", "--name=one", *more, seeds=2))
    for seed, expected in enumerate(alone):
        folder = root / "runs" / f"two-{seed}"
        metrics = read_sealed_json(folder / "metrics.json")
        losses = [[row["val_loss"] for row in found["val_loss"]] for found in (metrics, expected)]
        # the same windows in every step, the mean of two halves' means: equal up to padding's weight
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
        assert len(metrics["returns"]) == 1
        assert len(list((folder / "csv").iterdir())) == 1
    assert done.stdout.count("-> ") == 2


def test_a_target_return_far_above_the_data_is_warned_of(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (metrics,) = finetune.main(command(root, "lora", "--name=high", "--target-return=9000"))
    assert metrics["target_return"] == 9000
    assert "warning: handle-press-side-v3: the target return 9000 is" in capsys.readouterr().out


def test_a_summary_of_runs_made_earlier_has_dashes() -> None:
    run = {
        "task": TASK, "method": "lora", "rho": None, "seed": 0, "val_loss": [{"updates": 5, "val_loss": 0.5}],
        "max_steps": 5, "success_rate": 0.5, "successes": [True, False], "returns": [3.0, 5.0], "mean_return": 4.0,
        "episodes": 2,
    }  # fmt: skip
    assert "success: any step 0.50 ± 0.00, last step –, return" in finetune_run.summary([run, {**run, "seed": 1}])
    assert "success: any step 0.50 [0.09, 0.91], last step –" in finetune_run.headline(run)
    # without the episodes, the rate is enough
    assert "last step 1.00 [0.34, 1.00]" in finetune_run.headline({**run, "final_success_rate": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--method=evva", "unknown method 'evva': did you mean eva"),
        ("--task=push-v2", "did you mean push-v3"),
        ("--task=push-v3", "no demonstrations of push-v3 in"),
        ("--init=nowhere.ckpt", "there is no checkpoint nowhere.ckpt"),
        ("--context=5", "context must be at most the 4 steps of"),
        ("--horizon=501", "--horizon must be a whole number of at least 1 and of at most 500"),
        ("--train-episodes=9", "9"),
        ("--rank=0", "--rank must be a whole number of at least 1, got 0"),
        ("--val-at=2,x", "--val-at must be a list, each item a whole number, got"),
        ("--head=heads", "unknown head 'heads'"),
        ("--devices=99999", "--devices must"),
        ("--devices=3", "--devices must divide batch_size 8, got 3"),
        ("--precision=bf16", "unknown precision 'bf16'"),
        ("--logger=csv,tensorbord", "unknown logger 'tensorbord': did you mean tensorboard"),
        ("--min-lr=-1", "--min-lr must be a number of at least 0, got -1"),
    ],
)
def test_bad_input_is_one_sentence(change: str, message: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.command_line(command(root, "eva", "--name=bad", change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (root / "runs" / "bad-0").exists()
