from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from eva_lightning.optim.schedules import warmup_cosine
from eva_lightning.rl.module import DecisionTransformerModule, running_mean, save_weights
from eva_lightning.rl.trajectories import TrajectoryDataModule
from tests.eva_lightning.rl.synthetic import write_synthetic

TASKS = ("reach-v3", "drawer-open-v3")
SMALL: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "context": 5, "dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataModule:
    folder = write_synthetic(tmp_path_factory.mktemp("demonstrations"), TASKS)
    return TrajectoryDataModule(folder, TASKS, context=5, batch_size=16, val_episodes=1)


def small(data: TrajectoryDataModule, **changes: Any) -> DecisionTransformerModule:
    torch.manual_seed(0)
    return DecisionTransformerModule(**data.statistics, **{**SMALL, "lr": 3e-3, "warmup_steps": 5, **changes})


def trainer(steps: int, **changes: Any) -> L.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, **changes,
    }  # fmt: skip
    return L.Trainer(**options)


def test_defaults_are_the_papers() -> None:
    hparams = DecisionTransformerModule().hparams
    expected = {
        "width": 512, "layers": 4, "heads": 8, "context": 50, "dropout": 0.2, "lr": 1e-4, "weight_decay": 0.01,
        "warmup_steps": 4000, "min_lr": 1e-6, "gradient_clip": 0.25, "return_scale": 1000.0, "reward_scale": 10.0,
    }  # fmt: skip
    assert {key: hparams[key] for key in expected} == expected


def test_learning_rate_rises_and_falls_to_the_lowest() -> None:
    factors = [warmup_cosine(step, 4, 104, 0.01) for step in range(105)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[54] == pytest.approx(0.505)
    assert factors[104] == pytest.approx(0.01)


def test_loss_is_the_mean_over_real_steps(data: TrajectoryDataModule) -> None:
    module = small(data).eval()
    batch = dict(next(iter(data.train_dataloader())))
    assert not batch["mask"].all()
    error = (module(batch) - batch["actions"])[batch["mask"]]
    torch.testing.assert_close(module.loss(batch), error.square().mean())
    batch["target_actions"] = torch.zeros_like(batch["actions"])
    torch.testing.assert_close(module.loss(batch), module(batch)[batch["mask"]].square().mean())
    assert module.mask_fn(batch).shape == (16, 20)
    assert module.mask_fn(batch).sum() == 4 * batch["mask"].sum()


def test_training_learns_and_logs_each_tasks_loss(data: TrajectoryDataModule) -> None:
    module = small(data)
    fit = trainer(150, val_check_interval=150, check_val_every_n_epoch=None)
    before = fit.validate(module, data, verbose=False)[0]
    fit.fit(module, data)
    after = {key: float(value) for key, value in fit.callback_metrics.items()}
    names = {f"val_loss/{task}" for task in TASKS}
    assert set(before) == {"val_loss", *names}
    assert before["val_loss"] == pytest.approx(sum(before[name] for name in names) / 2)
    assert after["val_loss"] < 0.5 * before["val_loss"]
    assert after["train_loss"] < 0.5 * before["val_loss"]
    batches = list(data.val_dataloader())
    with torch.no_grad():
        alone = [module.eval().loss({k: v[b["task"] == 1] for k, v in b.items()}) for b in batches]
    assert after["val_loss/drawer-open-v3"] == pytest.approx(float(alone[0]), rel=1e-5)


def test_running_means_are_in_double_precision_and_keep_nan() -> None:
    mean = running_mean(torch.device("cpu"))
    mean.update(torch.tensor(0.1), torch.tensor(3))
    mean.update(torch.tensor([0.7, 0.2]), torch.tensor([4, 1]))
    values = [float(torch.tensor(value)) for value in (0.1, 0.7, 0.2)]
    assert float(mean.compute()) == pytest.approx((3 * values[0] + 4 * values[1] + values[2]) / 8, rel=1e-15)
    mean.update(torch.tensor([float("nan"), 0.2]), torch.tensor([4, 1]))
    assert mean.compute().isnan()


def test_a_small_batch_is_learnt_by_heart(data: TrajectoryDataModule) -> None:
    module = small(data)
    batch = {key: value[:4] for key, value in next(iter(data.train_dataloader())).items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss = module.loss(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-4


def test_gradients_are_clipped_unless_the_trainer_says_how(data: TrajectoryDataModule) -> None:
    class Norms(L.Callback):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()])))

    for clip, given, largest in ((0.01, None, 0.01), (0.01, 0.02, 0.02), (None, None, None)):
        norms = Norms()
        module = small(data, gradient_clip=clip)
        # the hook comes before clipping: look at the gradient of the last step afterwards
        trainer(2, callbacks=[norms], gradient_clip_val=given, limit_val_batches=0).fit(module, data)
        assert max(norms.norms) > 0.05
        last = float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
        if largest is None:
            assert last > 0.05
        else:
            assert last == pytest.approx(largest, rel=1e-3)


def test_resuming_within_an_epoch_gives_the_same_weights(data: TrajectoryDataModule, tmp_path: Path) -> None:
    def fit(steps: int, checkpoint: Path | None = None, until: int = 14) -> tuple[L.Trainer, DecisionTransformerModule]:
        class Stop(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                trainer.should_stop = trainer.global_step >= until

        module = small(data)
        fitted = trainer(steps, callbacks=[Stop()], limit_val_batches=0)
        fresh = TrajectoryDataModule(data.folder, TASKS, context=5, batch_size=16, val_episodes=1)
        fitted.fit(module, fresh, ckpt_path=checkpoint)
        return fitted, module

    whole = fit(14)[1]
    fit(14, until=6)[0].save_checkpoint(tmp_path / "x.ckpt")
    resumed, module = fit(14, tmp_path / "x.ckpt")
    assert resumed.global_step == 14
    for name, value in whole.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


@pytest.fixture
def checkpoint(data: TrajectoryDataModule, tmp_path: Path) -> Path:
    fitted = trainer(2, limit_val_batches=0)
    fitted.fit(small(data), data)
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_checkpoints_say_all_there_is_to_say(checkpoint: Path, data: TrajectoryDataModule) -> None:
    batch = next(iter(data.train_dataloader()))
    modules = [
        DecisionTransformerModule.load_from_checkpoint(checkpoint),
        DecisionTransformerModule.from_pretrained(checkpoint),
        DecisionTransformerModule.from_pretrained(checkpoint, lr=1.0, dropout=0.0, **data.statistics),
    ]
    with torch.no_grad():
        predictions = [module.eval()(batch) for module in modules]
    assert torch.equal(predictions[0], predictions[1])
    assert torch.equal(predictions[0], predictions[2])
    assert modules[2].lr == modules[2].hparams["lr"] == 1.0
    assert modules[1].hparams["lr"] == 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_alone_are_small_and_open_the_same_way(checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    module = DecisionTransformerModule.from_pretrained(checkpoint)
    file = save_weights(module, tmp_path / "folder" / "light.ckpt", dtype, {"tasks": list(TASKS)})
    assert file.stat().st_size < checkpoint.stat().st_size / 2
    for again in (
        DecisionTransformerModule.from_pretrained(file),
        DecisionTransformerModule.load_from_checkpoint(file),
    ):
        assert again.hparams == module.hparams
        for name, value in module.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value.to(dtype).float(), rtol=0, atol=0)


def test_the_small_model_fits_into_three_megabytes(tmp_path: Path) -> None:
    module = DecisionTransformerModule(width=128, layers=3, heads=4, context=10)
    assert save_weights(module, tmp_path / "half.ckpt", torch.float16).stat().st_size < 1.4e6
    assert save_weights(module, tmp_path / "full.ckpt").stat().st_size < 3e6


def test_a_shorter_context_takes_the_first_places(checkpoint: Path) -> None:
    whole = DecisionTransformerModule.from_pretrained(checkpoint)
    short = DecisionTransformerModule.from_pretrained(checkpoint, context=3)
    table = whole.model.embed_position.weight
    assert torch.equal(short.model.embed_position.weight, table[:12])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"width": 64}, "of another architecture: width must be 32, got 64"),
        ({"positions": "timestep"}, "of another architecture: positions must be global, got timestep"),
        ({"context": 6}, "context must be at most the 5 steps of .*'s training, got 6"),
        ({"state_mean": [0.0] * 39}, "of another normalisation: its state_mean must be used when fine-tuning"),
        ({"return_scale": 1.0}, "of another normalisation: .* expected 1000, got 1"),
        ({"learning_rate": 1.0}, "unknown hyper-parameter 'learning_rate'"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecisionTransformerModule.from_pretrained(checkpoint, **overrides)


def test_what_is_no_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        DecisionTransformerModule.from_pretrained(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        DecisionTransformerModule.from_pretrained(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"model": "vit"}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a Decision Transformer"):
        DecisionTransformerModule.from_pretrained(tmp_path / "other.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"].pop("model.norm.weight")
    torch.save(content, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match=r"1 of its weights are missing.* model\.norm\.weight"):
        DecisionTransformerModule.from_pretrained(tmp_path / "less.ckpt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_lr": 1.0}, "min_lr must be a number of at least 0 and of at most"),
        ({"gradient_clip": 0.0}, "gradient_clip must be a number above 0, got 0.0"),
        ({"state_mean": [0.0]}, "must have 39 values, got 1 and 39"),
        ({"reward_scale": 0.0}, "reward_scale must be a number above 0, got 0.0"),
        ({"action_low": [-1.0] * 4}, "action_low and action_high must be given together"),
        ({"action_low": [-1.0] * 3, "action_high": [1.0] * 3}, "must have 4 values, got 3"),
        ({"action_low": [2.0] * 4, "action_high": [1.0] * 4}, "action_low must be finite and at most action_high"),
        ({"target_return": float("nan")}, "target_return must be a number, got nan"),
    ],
)
def test_bad_hyper_parameters_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecisionTransformerModule(**{**SMALL, **changes})


def test_eva_leaves_embeddings_and_padding_out(data: TrajectoryDataModule) -> None:
    from eva_lightning import EVAInitCallback

    module = small(data)
    eva = EVAInitCallback(rho=2, r=2, head=module.head_name, exclude=module.embedding_names(), mask_fn=module.mask_fn)
    trainer(3, callbacks=[eva], limit_val_batches=0).fit(module, data)
    assert eva.state is not None
    assert len(eva.state.ranks) == 8
    assert all(".blocks." in name for name in eva.state.ranks)
    assert module.head_name == "model.predict_action"
