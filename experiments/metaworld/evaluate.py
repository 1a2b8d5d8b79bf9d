"""Success and return of a checkpoint: ``python -m experiments.metaworld evaluate --ckpt CKPT --task push-v3``.

Takes checkpoints of ``pretrain`` and ``finetune``, with or without adapters, and folders of their runs. Success means
solved at any step of the episode, as in Meta-World's benchmark; success at the last step is given too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.rl.tasks import parse_tasks
from experiments.runner.cli import in_terminal
from experiments.runner.settings import option, parse_settings

if TYPE_CHECKING:
    from eva_lightning.rl.module import DecisionTransformerModule
    from eva_lightning.rl.rollouts import RolloutResult

_LOGGER = logging.getLogger("experiments.metaworld.evaluate")


@dataclass(frozen=True)
class Settings:
    """What to roll out."""

    ckpt: str = option(MISSING, "checkpoint, or folder of a run, of pretrain or finetune")
    task: str | None = option(None, "task such as push-v3, several with commas between them, cw10 or mt40; the ckpt's")
    init: str | None = option(
        None, "for a ckpt with adapters alone: what they were trained on; noted in it by finetune"
    )
    episodes: int = option(50, "episodes per task; there are 50 different evaluation goals")
    seed: int = option(0, "seed of the evaluation goals")
    target_return: float | None = option(None, "return to ask for; the largest of the task's data if not given")
    data: str = option("data/metaworld", "demonstrations, for target returns that the checkpoint does not note")
    mode: str = option("exact", "inference: exact window, or streaming (faster)")
    context: int | None = option(None, "steps of the window; those of training if not given")
    environments: int = option(20, "episodes in lock-step, one network call for all")
    workers: int = option(0, "processes; 0 for none besides this one")
    horizon: int = option(200, "steps of an episode, at most 500")
    video: str | None = option(None, "film some episodes to this file, .gif or .mp4")
    video_episodes: int = option(3, "episodes to film")
    video_size: int = option(240, "height and width of the film, in pixels")
    progress: bool = option(True, "show a progress bar")

    def __post_init__(self) -> None:
        if self.video_episodes < 1:
            raise InputError(f"video_episodes must be at least 1, got {self.video_episodes}")
        if self.video is not None:
            from eva_lightning.rl.video import check_format

            check_format(self.video)


def load_module(
    checkpoint: str | Path, init: str | Path | None = None
) -> tuple[DecisionTransformerModule, dict[str, Any]]:
    """The module of a checkpoint, and what the checkpoint says about itself.

    Args:
        checkpoint: A checkpoint file, or the folder of a run.
        init: Checkpoint with the frozen weights, for one that has adapters alone; what it notes itself for None.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is no checkpoint of a Decision Transformer, or its adapters belong to other weights.
    """
    from eva_lightning.checkpoint import KEY, fit_to_checkpoint
    from eva_lightning.rl.module import DecisionTransformerModule, read_checkpoint

    file = Path(checkpoint)
    if file.is_dir():
        file = file / "weights.ckpt"
    found = read_checkpoint(file)
    about: dict[str, Any] = dict(found.get("about") or {})
    description: Mapping[str, Any] | None = found.get(KEY)
    if description is None:
        return DecisionTransformerModule.from_pretrained(file), about
    hparams = {name: value for name, value in found["hyper_parameters"].items() if not name.startswith("_")}
    if description["base_fingerprint"] is None:
        module = DecisionTransformerModule(**hparams)
    else:
        source = about.get("init") if init is None else init
        if source is None:
            raise InputError(f"{file} holds adapters alone: name the checkpoint they were trained on with --init")
        module = DecisionTransformerModule.from_pretrained(source, context=hparams["context"])
    fit_to_checkpoint(module, found)
    module.load_state_dict(found["state_dict"])
    return module, about


def target_return(settings: Settings, task: str, about: Mapping[str, Any]) -> float:
    """The return to ask for: given, noted in the checkpoint, or the largest of the demonstrations.

    Raises:
        MissingInputError: There are no demonstrations of the task, and nothing else says it.
    """
    from eva_lightning.rl.demonstrations import read_index
    from experiments.metaworld.finetune import warn_of_target

    noted = about.get("max_return") or {}
    means = about.get("mean_return") or {}
    if settings.target_return is not None:
        target, mean = settings.target_return, means.get(task)
        if mean is None:
            # only a warning hangs on it: demonstrations that are not there are no reason to stop
            with suppress(FileNotFoundError, ValueError):
                mean = read_index(settings.data)[task].mean_return
    elif task in noted:
        target, mean = noted[task], means.get(task)
    else:
        try:
            entry = read_index(settings.data)[task]
        except FileNotFoundError as error:
            raise MissingInputError(f"{settings.ckpt} notes no target return for {task}, and {error}") from error
        target, mean = entry.max_return, entry.mean_return
    if mean is not None:
        warn_of_target(task, target, mean)
    return float(target)


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    description = "Success and return of a checkpoint, measured in the simulator."
    return parse_settings(Settings, "python -m experiments.metaworld evaluate", description, args)


def main(args: Sequence[str] | None = None) -> list[RolloutResult]:
    """Run the command line `args` (``sys.argv`` for None), print a table and return the results.

    Raises:
        MissingInputError: The checkpoint or the demonstrations are missing.
        InputError: A setting or the checkpoint is wrong.
    """
    settings = parse(args)
    tasks = None if settings.task is None else parse_tasks(settings.task)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks of kernels that nothing here needs

    from eva_lightning.rl.rendering import no_video_reason, rendering_backend
    from eva_lightning.rl.rollouts import evaluate

    films = settings.video is not None
    if films and rendering_backend() is None:
        _LOGGER.warning(no_video_reason())
        films = False
    module, about = load_module(settings.ckpt, settings.init)
    if tasks is None:
        if not about.get("tasks"):
            raise InputError(f"{settings.ckpt} does not say which tasks it was trained on: name one with --task")
        tasks = parse_tasks(",".join(about["tasks"]))
    targets = {task: target_return(settings, task, about) for task in tasks}
    results = []
    for task in tasks:
        result = evaluate(
            module,
            task,
            target_return=targets[task],
            episodes=settings.episodes,
            seed=settings.seed,
            mode=settings.mode,  # type: ignore[arg-type]  # checked by the policy
            context=settings.context,
            environments=settings.environments,
            horizon=settings.horizon,
            workers=settings.workers,
            video_episodes=settings.video_episodes if films else 0,
            video_size=settings.video_size,
            progress=settings.progress and sys.stdout.isatty(),
        )
        results.append(result)
        if result.frames and settings.video is not None:
            print(f"{_film(result, settings.video, alone=len(tasks) == 1)}: {len(result.frames)} episodes")
    _report(results, targets)
    return results


def _film(result: RolloutResult, file: str, alone: bool) -> Path:
    from eva_lightning.rl.video import write_video

    path = Path(file)
    return write_video(result.frames, path if alone else path.with_name(f"{path.stem}-{result.task}{path.suffix}"))


def _report(results: Sequence[RolloutResult], targets: Mapping[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    # the longest name of a task leaves room for five columns in 80 characters
    table = Table(title=f"success in {len(results[0])} episodes: share solved at any step, ± standard error")
    table.add_column("task", no_wrap=True)
    for name in ("success", "last step", "return", "target"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.task,
            f"{result.success_rate:.2f} ± {result.success_stderr:.2f}",
            f"{result.final_success_rate:.2f}",
            f"{result.mean_return:.0f} ± {result.return_stderr:.0f}",
            f"{targets[result.task]:.0f}",
        )
    if len(results) > 1:
        n = len(results)
        success, final = (sum(r.success_rate for r in results) / n, sum(r.final_success_rate for r in results) / n)
        table.add_section()
        table.add_row("mean of the tasks", f"{success:.2f}", f"{final:.2f}", "", "")
    console = Console()
    console.print(table)
    steps, seconds = sum(result.steps for result in results), sum(result.seconds for result in results)
    console.print(f"{steps:,} steps in {seconds:.1f} s", highlight=False)


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    return in_terminal(main, args)


if __name__ == "__main__":
    sys.exit(command_line())
