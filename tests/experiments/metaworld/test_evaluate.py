from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.rl import rendering, rollout_environments
from eva_lightning.rl.demonstrations import read_index
from eva_lightning.rl.module import DecisionTransformerModule, save_weights
from experiments.metaworld import evaluate, evaluate_run
from experiments.metaworld.evaluate_run import load_module, target_return
from tests.eva_lightning.rl.synthetic import write_synthetic

QUICK = ["--episodes=2", "--horizon=4", "--progress=false"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    module = DecisionTransformerModule(width=16, layers=1, heads=2, context=4)
    about = {"tasks": ["push-v3", "reach-v3"], "max_return": {"push-v3": 900.0, "reach-v3": 1800.0}}
    return save_weights(module, tmp_path / "weights.ckpt", about=about)


def test_rolls_out_the_tasks_of_the_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate.main([f"--ckpt={checkpoint.parent}", *QUICK])
    assert [r.task for r in results] == ["push-v3", "reach-v3"]
    printed = capsys.readouterr().out
    for words in (
        "protocol: default",
        "any step",
        "last step",
        "share of episodes solved at any",
        "The paper's numbers belong beside success",
    ):
        assert words in " ".join(printed.split()), words
    assert "0.00 [0.00, 0.66]" in printed  # Wilson's interval of 0 out of 2
    assert "1800" in printed
    (push,) = evaluate.main([f"--ckpt={checkpoint}", "--task=push", *QUICK])
    assert np.array_equal(push.returns, results[0].returns)


def test_films_to_gif(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if rendering.rendering_backend() is None:
        pytest.skip(rendering.no_video_reason())
    file = tmp_path / "new" / "out.gif"
    evaluate.main([f"--ckpt={checkpoint}", "--task=push-v3", f"--video={file}", "--video-size=32", *QUICK])
    assert file.read_bytes()[:4] == b"GIF8"


def test_without_drawing_it_goes_on_without_video(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluate_run, "rendering_backend", lambda: None)
    monkeypatch.setattr(rollout_environments, "rendering_backend", lambda: None)
    (result,) = evaluate.main([f"--ckpt={checkpoint}", "--task=push", f"--video={tmp_path / 'a.gif'}", *QUICK])
    assert len(result) == 2
    assert "no video: MuJoCo can draw" in caplog.text
    assert not (tmp_path / "a.gif").exists()


def test_adapters_alone_need_the_weights_they_were_trained_on(checkpoint: Path, tmp_path: Path) -> None:
    import lightning as L

    from tests.rl_helpers import windows

    module = DecisionTransformerModule.from_pretrained(checkpoint)
    callbacks = apply_method("lora", module, AdapterOptions(rank=2, bias="none"), head=module.head_name)
    loader: Any = torch.utils.data.DataLoader(windows(), 4)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    adapters = tmp_path / "adapters.ckpt"
    trainer.save_checkpoint(adapters)
    assert not any("base_layer.weight" in key for key in torch.load(adapters)["state_dict"])
    with pytest.raises(ValueError, match="holds adapters alone: name the checkpoint they were trained on with --init"):
        load_module(adapters)
    loaded, _ = load_module(adapters, checkpoint)
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    other = save_weights(DecisionTransformerModule(width=16, layers=1, heads=2, context=4), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="trained on other base weights"):
        load_module(adapters, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--ckpt=nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
        (["--task=hammer", "--data=nowhere"], "has no target return for hammer-v3, and no demonstrations in nowhere"),
        (["--task=push", "--context=5"], "context must be a whole number of at least 1 and of at most 4, got 5"),
        (["--task=push", "--horizon=501"], "--horizon must be a whole number of at least 1 and of at most 500"),
        (["--task=push", "--video=a.avi"], "a video file must end in .gif or .mp4, got 'a.avi'"),
        (["--task=pusch"], "did you mean push-v3"),
    ],
)
def test_bad_input_is_one_sentence(
    change: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.command_line([f"--ckpt={checkpoint}", "--progress=false", *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_high_target_is_warned_of(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: Any = evaluate.parse([f"--ckpt={checkpoint}", "--target-return=2000"])
    about = {"mean_return": {"push-v3": 1000.0}}
    assert target_return(settings, "push-v3", about) == 2000
    assert "the target return 2000 is 2.00 times the mean return 1000" in caplog.text


def test_a_high_target_is_measured_by_the_demonstrations_where_the_checkpoint_has_no_mean(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_synthetic(tmp_path / "data", ["push-v3"], episodes=2)
    mean = read_index(tmp_path / "data")["push-v3"].mean_return
    words = [f"--ckpt={checkpoint}", f"--data={tmp_path / 'data'}", f"--target-return={3 * mean}"]
    assert target_return(evaluate.parse(words), "push-v3", {}) == pytest.approx(3 * mean)
    assert "is 3.00 times the mean return" in caplog.text
    caplog.clear()
    assert target_return(evaluate.parse([*words[:1], "--data=nowhere", *words[2:]]), "push-v3", {}) > 0
    assert not caplog.text
