from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_lightning.methods import METHODS, method_names
from eva_lightning.rl.collection import collect
from eva_lightning.rl.module import DecisionTransformerModule, save_weights
from eva_lightning.rl.trajectories import TrajectoryDataModule
from eva_lightning.sealed import read_sealed_json
from experiments.metaworld import evaluate, finetune, finetune_run, table
from experiments.metaworld.finetune_run import build, prepare
from experiments.runner.run_folder import RunFolder, perform

TASK = "handle-press-side-v3"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of one task and a pre-trained network, both tiny."""
    folder = tmp_path_factory.mktemp("metaworld")
    collect([TASK], 4, folder / "data", horizon=30, progress=False)
    torch.manual_seed(7)
    data = TrajectoryDataModule(folder / "data", [TASK], context=4, val_episodes=1)
    module = DecisionTransformerModule(**data.statistics, width=16, layers=2, heads=2, context=4)  # type: ignore[arg-type]
    save_weights(module, folder / "init.ckpt", about={"tasks": [TASK]})
    return folder


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


def test_all_methods_but_scratch_start_from_the_same_loss(root: Path) -> None:
    start = {m: finetune.main(command(root, m))[0]["val_loss"][0]["val_loss"] for m in ("fft", "lora", "eva", "pissa")}
    assert list(start.values()) == pytest.approx([start["fft"]] * 4, rel=1e-4)
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
    ],
)
def test_bad_input_is_one_sentence(change: str, message: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.command_line(command(root, "eva", "--name=bad", change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (root / "runs" / "bad-0").exists()
