from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from eva_lightning.rl import rollout_callback
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.rollout_callback import RolloutCallback, log_video
from tests.modules import trainer
from tests.rl_helpers import windows

TARGETS = {"push-v3": 1500.0, "reach-v3": 1800.0}


def fit(callbacks: list[L.Callback], **kwargs: Any) -> tuple[DecisionTransformerModule, L.Trainer]:
    torch.manual_seed(0)
    module = DecisionTransformerModule(width=16, layers=1, heads=2, context=4, dropout=0.3, lr=1e-3)
    run = trainer(*callbacks, max_steps=4, max_epochs=-1, val_check_interval=1, **kwargs)
    run.fit(module, DataLoader(windows(), 4), DataLoader(windows(), 4))  # type: ignore[arg-type]
    return module, run


def callback(**kwargs: Any) -> RolloutCallback:
    return RolloutCallback(["push-v3"], 2, kwargs.pop("every_n_steps", 2), TARGETS, horizon=4, **kwargs)


def test_measures_during_validation_and_changes_nothing_else() -> None:
    steps: list[int] = []

    class Counting(RolloutCallback):
        def _roll_out(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
            steps.append(trainer.global_step)
            return super()._roll_out(trainer, pl_module)

    rollouts = Counting(["push", "reach-v3"], 2, 2, TARGETS, horizon=4)
    module, run = fit([rollouts])
    plain, _ = fit([])
    assert steps == [1, 2, 4]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    metrics = run.callback_metrics
    assert float(metrics["rollout/push-v3/return"]) == pytest.approx(rollouts.results["push-v3"].mean_return)
    mean = (metrics["rollout/push-v3/return"] + metrics["rollout/reach-v3/return"]) / 2
    assert float(metrics["rollout/return"]) == pytest.approx(float(mean))
    assert 0 <= float(metrics["rollout/final_success"]) <= float(metrics["rollout/success"]) <= 1
    last = rollouts.results["push-v3"].final_success_rate
    assert float(metrics["rollout/push-v3/final_success"]) == pytest.approx(last)
    assert "rollout/push-v3/success" in metrics
    assert rollouts.state_dict() == {"last_step": 4}


def test_a_resumed_run_keeps_the_rhythm() -> None:
    rollouts = callback(every_n_steps=3)
    rollouts.load_state_dict({"last_step": 3})
    assert [step for step in range(3, 8) if rollouts._due(step)] == [6, 7]


def test_video_goes_to_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, settings=wandb.Settings(console="off"))
    try:
        log_video(trainer(logger=logger), "rollout/push-v3/video", [film()])
    finally:
        wandb.finish()
    (file,) = tmp_path.rglob("*.gif")
    assert "offline-run" in str(file)
    assert file.read_bytes()[:4] == b"GIF8"


def test_video_goes_to_tensorboard(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing import event_accumulator as reading

    logger = TensorBoardLogger(tmp_path)
    log_video(trainer(logger=logger), "rollout/push-v3/video", [film()])
    logger.save()
    events = reading.EventAccumulator(logger.log_dir).Reload()
    (picture,) = events.Images("rollout/push-v3/video")
    assert (picture.width, picture.height) == (16, 16)
    assert picture.encoded_image_string[:4] == b"GIF8"


def film() -> Any:
    return np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), dtype=np.uint8)


def test_without_drawing_it_warns_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(rollout_callback, "rendering_backend", lambda: None)
    monkeypatch.setattr(rollout_callback, "_takes_videos", lambda logger: "wandb")
    from lightning.pytorch.loggers import CSVLogger

    with caplog.at_level(logging.WARNING, logger="eva_lightning.rl.rollout_callback"):
        _, run = fit([callback(video=True)], logger=CSVLogger(tmp_path))
    assert [r.getMessage()[:8] for r in caplog.records] == ["no video"]
    assert "rollout/push-v3/success" in run.callback_metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["push-v2"], 1, 1, TARGETS), "did you mean push-v3"),
        (([], 1, 1, TARGETS), "at least one task, got none"),
        ((["push"], 0, 1, TARGETS), "episodes must be a whole number of at least 1, got 0"),
        ((["push"], 1, 0, TARGETS), "every_n_steps must be a whole number of at least 1, got 0"),
        ((["hammer"], 1, 1, TARGETS), "no return for hammer-v3, only for"),
    ],
)
def test_bad_input_is_one_sentence(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutCallback(*arguments)
