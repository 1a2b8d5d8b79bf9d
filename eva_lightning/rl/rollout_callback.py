"""Success and return in the simulator, measured during training."""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from eva_lightning.errors import InputError, check_number
from eva_lightning.rl.policy import Mode
from eva_lightning.rl.rendering import no_video_reason, rendering_backend
from eva_lightning.rl.rollout_environments import MakeEnvironment, resolve_environment, scene_of
from eva_lightning.rl.rollouts import RolloutResult, evaluate
from eva_lightning.rl.tasks import TASKS
from eva_lightning.rl.video import write_video

_LOGGER = logging.getLogger(__name__)


class RolloutCallback(L.Callback):
    """Roll the module out whenever it is validated, at most every `every_n_steps` updates.

    In Meta-World's tasks or in any Gymnasium environment. Logged are ``rollout/<task>/success`` (share of the episodes
    solved at any step) and ``rollout/<task>/final_success`` (at the last step), both only where the environment says
    what is solved, ``rollout/<task>/return``, and with several tasks their means ``rollout/success`` and so on. Videos
    go, as GIF, to a WandbLogger (online or offline) and a TensorBoardLogger, if the trainer has one. Training is not
    affected: the module's modes, its weights and every random state stay. With several devices the first one rolls out.
    Where MuJoCo cannot render, a warning names what to install and the rest works.

    Example::

        rollouts = RolloutCallback(["push-v3"], episodes=10, every_n_steps=1000, target_returns={"push-v3": 1585.0})
        L.Trainer(val_check_interval=500, callbacks=[rollouts]).fit(module, data)
        RolloutCallback({"HalfCheetah-v5": lambda: gymnasium.make("HalfCheetah-v5")}, episodes=5, every_n_steps=100)

    Args:
        tasks: Meta-World tasks or Gymnasium ids to roll out, or environments: a name of your choice -> a function that
            makes one.
        episodes: Episodes per task.
        every_n_steps: Optimizer steps between rollouts, at least; validations in between have none.
        target_returns: Task -> return the policy is asked for; those that are not there are asked for the module's own
            ``target_return``. Meta-World's tasks must be there.
        video: Episodes per task to record; True for one.
        seed: Seed of the evaluation goals, or of the first episode.
        mode, context, environments, horizon, video_size: See :func:`~eva_lightning.rl.rollouts.evaluate`.

    Attributes:
        results: What was measured last, by task.

    Raises:
        InputError: A value is out of range, a task is unknown or has no target return.
    """

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, MakeEnvironment],
        episodes: int,
        every_n_steps: int,
        target_returns: Mapping[str, float] | None = None,
        video: bool | int = False,
        *,
        seed: int = 0,
        mode: Mode = "exact",
        context: int | None = None,
        environments: int | None = None,
        horizon: int | None = None,
        video_size: int = 240,
    ) -> None:
        self._environments: dict[str, str | MakeEnvironment] = (
            {**tasks} if isinstance(tasks, Mapping) else {name: name for name in map(resolve_environment, tasks)}
        )
        self.tasks = tuple(self._environments)
        if not self.tasks:
            raise InputError("tasks must name at least one task, got none")
        for make_env in self._environments.values():
            scene_of(make_env, seed, horizon, video_size).check(0, 0)
        check_number("episodes", episodes, at_least=1, whole=True)
        check_number("every_n_steps", every_n_steps, at_least=1, whole=True)
        check_number("video", int(video), at_least=0, whole=True)
        self.target_returns = {
            task if task in self.tasks else resolve_environment(task): float(value)
            for task, value in (target_returns or {}).items()
        }
        missing = [
            name for name, make in self._environments.items() if make in TASKS and name not in self.target_returns
        ]
        if missing:
            raise InputError(f"target_returns has no return for {missing[0]}, only for {sorted(self.target_returns)}")
        self.every_n_steps = every_n_steps
        self.video = int(video)
        self.results: dict[str, RolloutResult] = {}
        self._options: dict[str, Any] = {
            "episodes": episodes, "seed": seed, "mode": mode, "context": context, "environments": environments,
            "horizon": horizon, "video_size": video_size,
        }  # fmt: skip
        # -1: the first validation, also one before any training, is rolled out
        self._last_step = -1

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Roll out and log, if it is time."""
        if trainer.sanity_checking or not self._due(trainer.global_step):
            return
        self._last_step = trainer.global_step
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            values = self._roll_out(trainer, pl_module)
        values = trainer.strategy.broadcast(values)
        pl_module.log_dict(values, rank_zero_only=False)

    def state_dict(self) -> dict[str, Any]:
        """When the last rollout was."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self._last_step = int(state_dict.get("last_step", -1))

    def _due(self, step: int) -> bool:
        return self._last_step < 0 or step // self.every_n_steps > self._last_step // self.every_n_steps

    def _roll_out(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        film = self._films(trainer)
        values: dict[str, float] = {}
        for task in self.tasks:
            target = self.target_returns.get(task)
            make_env = self._environments[task]
            result = evaluate(pl_module, make_env, target_return=target, video_episodes=film, **self._options)
            self.results[task] = result
            figures = {"return": result.mean_return}
            if result.knows_success:
                figures |= {"success": result.success_rate, "final_success": result.final_success_rate}
            values |= {f"rollout/{task}/{name}": value for name, value in figures.items()}
            if result.frames:
                log_video(trainer, f"rollout/{task}/video", result.frames)
        if len(self.tasks) > 1:
            for name in ("success", "final_success", "return"):
                figures_of_all = [values.get(f"rollout/{task}/{name}") for task in self.tasks]
                known = [value for value in figures_of_all if value is not None]
                if len(known) == len(self.tasks):
                    values[f"rollout/{name}"] = sum(known) / len(known)
        return values

    def _films(self, trainer: L.Trainer) -> int:
        """Episodes to record: none where no logger takes videos, or rendering is unavailable."""
        if not self.video or not any(_takes_videos(logger) for logger in trainer.loggers):
            return 0
        if rendering_backend() is None:
            _LOGGER.warning(no_video_reason())
            self.video = 0
        return self.video


def log_video(trainer: L.Trainer, key: str, episodes: Sequence[Any]) -> None:
    """Send episodes, ``(T, H, W, 3)`` uint8 each, as one GIF to every logger of `trainer` that takes videos."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_video(episodes, Path(folder) / "video.gif")
        for logger in trainer.loggers:
            kind = _takes_videos(logger)
            if kind == "wandb":
                _log_to_wandb(logger, key, file, trainer.global_step)
            elif kind == "tensorboard":
                _log_to_tensorboard(logger, key, file, trainer.global_step)


def _takes_videos(logger: Any) -> str | None:
    if isinstance(logger, WandbLogger):
        return "wandb"
    return "tensorboard" if isinstance(logger, TensorBoardLogger) else None


def _log_to_wandb(logger: Any, key: str, file: Path, step: int) -> None:
    import wandb

    # the file is copied into the run's folder at once; arrays would need moviepy
    logger.log_metrics({key: wandb.Video(str(file), format="gif")}, step=step)


def _log_to_tensorboard(logger: Any, key: str, file: Path, step: int) -> None:
    try:
        messages = importlib.import_module("tensorboard.compat.proto.summary_pb2")
    except ImportError:
        messages = importlib.import_module("tensorboardX.proto.summary_pb2")
    content = file.read_bytes()
    width, height = (
        int.from_bytes(content[at : at + 2], "little") for at in (6, 8)
    )  # as the head of every GIF has them
    # what add_video writes, without the moviepy that it needs
    picture = messages.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    summary = messages.Summary(value=[messages.Summary.Value(tag=key, image=picture)])
    logger.experiment.file_writer.add_summary(summary, step)
