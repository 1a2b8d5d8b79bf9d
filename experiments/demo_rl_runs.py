"""What the demo's robot part consists of: demonstrations, fine-tuning runs, rollouts before them, and a film.

Every piece is a function that a process can be given, and leaves files that tell a finished piece from an unfinished
one. They lie in a folder named after a hash of the code, the starting network and the library versions, so that a rerun
finds what is there and nothing stale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eva_lightning.errors import InputError, MissingInputError
from experiments.demo_runs import code_fingerprint, quiet, single_thread

METHODS = {"fft": "Full fine-tuning", "lora": "LoRA", "eva": "EVA"}
_ROOT = Path(__file__).resolve().parents[1]
_FRAME_STRIDE = 4


@dataclass(frozen=True)
class Setup:
    """Settings of the robot part; the layout of ``setup`` in ``configs/demo_rl.yaml``.

    Attributes:
        checkpoint: Network that every method starts from, relative to the repository.
        tasks: Tasks to fine-tune on, one run for each method and seed.
        seeds: Runs per task and method. A seed draws batches, LoRA's matrices and the evaluation goals.
        updates: Gradient updates of a run.
        batch_size: Windows per update.
        episodes: Evaluation episodes after each run.
        demonstrations: Episodes of the scripted expert to train on.
        held_out: Further ones, for the validation loss.
        noise: Standard deviation of the noise on the expert's actions.
        rank: LoRA's rank and EVA's mean rank.
        rho: EVA's largest rank over its mean rank.
        horizon: Steps of an episode.
        film_size: Height and width of the film's pictures, in pixels; 0 for no film.
    """

    checkpoint: str = "experiments/metaworld/assets/dt_small_mt40.ckpt"
    tasks: tuple[str, ...] = ("faucet-close-v3", "push-v3")
    seeds: int = 2
    updates: int = 50
    batch_size: int = 32
    episodes: int = 10
    demonstrations: int = 20
    held_out: int = 4
    noise: float = 0.1
    rank: int = 4
    rho: float = 2.0
    horizon: int = 200
    film_size: int = 200

    def __post_init__(self) -> None:
        from eva_lightning.rl.tasks import parse_tasks

        object.__setattr__(self, "tasks", parse_tasks(",".join(self.tasks)))
        for name, least in (("seeds", 1), ("updates", 1), ("episodes", 1), ("demonstrations", 1), ("film_size", 0)):
            if getattr(self, name) < least:
                raise InputError(f"setup.{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def init(self) -> Path:
        """The starting network."""
        return _ROOT / self.checkpoint

    @property
    def shown_updates(self) -> tuple[int, ...]:
        """Updates whose loss stands in the table: the start, a fifth, half and the end of training."""
        return tuple(sorted({0, max(1, self.updates // 5), max(1, self.updates // 2), self.updates}))

    @property
    def noted_updates(self) -> tuple[int, ...]:
        """Updates whose loss is measured, for the curves."""
        return tuple(sorted({*range(0, self.updates + 1, max(1, self.updates // 10)), *self.shown_updates}))


@dataclass(frozen=True)
class Config:
    """``configs/demo_rl.yaml``: settings, one learning rate per method, and how these were chosen."""

    setup: Setup
    learning_rates: dict[str, float]
    tuning: dict[str, Any]

    @classmethod
    def read(cls, path: Path, rates_needed: bool = True) -> Config:
        """Read the file.

        Raises:
            MissingInputError: There is no such file.
            InputError: A setting is unknown or wrong, or a method lacks a learning rate above 0.
        """
        from eva_lightning.errors import unknown

        if not path.is_file():
            raise MissingInputError(f"no configuration at {path}: pass --rl-config")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content = content if isinstance(content, dict) else {}
        settings = dict(content.get("setup") or {})
        names = [field.name for field in dataclasses.fields(Setup)]
        for name in settings:
            if name not in names:
                raise InputError(f"{path}: {unknown('setting', name, names)}")
        if isinstance(settings.get("tasks"), list):
            settings["tasks"] = tuple(settings["tasks"])
        setup = Setup(**settings)
        rates = content.get("learning_rates") or {}
        for method in METHODS if rates_needed else ():
            rate = rates.get(method)
            if not isinstance(rate, int | float) or not rate > 0:
                raise InputError(f"{path}: learning_rates.{method} must be a positive number, got {rate!r}")
        return cls(setup, {name: float(rate) for name, rate in rates.items()}, content.get("tuning") or {})


def versions() -> dict[str, str]:
    """Versions of the libraries whose behaviour the figures depend on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "lightning", "peft", "metaworld", "mujoco")}


@dataclass(frozen=True)
class Run:
    """One fine-tuning. ``data_seed`` draws the demonstrations; ``episodes`` 0 leaves the rollouts out."""

    task: str
    method: str
    learning_rate: float
    seed: int
    episodes: int
    data_seed: int = 0

    @property
    def label(self) -> str:
        """For a progress bar."""
        return f"{self.task}, {METHODS[self.method]}, seed {self.seed}"


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        run: Its settings.
        losses: Validation loss after so many updates.
        successes: Per evaluation episode, whether it was solved at any step.
        returns: Per evaluation episode.
        trained: Number of trained parameters.
        train_seconds: Of the training, with EVA's initialisation and the validation losses.
        ranks: EVA's rank per layer.
        init_seconds: Of EVA's initialisation.
    """

    run: Run
    losses: dict[int, float]
    successes: tuple[bool, ...]
    returns: tuple[float, ...]
    trained: int
    train_seconds: float
    ranks: dict[str, int]
    init_seconds: float | None


@dataclass(frozen=True)
class Before:
    """Rollouts of the starting network: per seed, what :class:`RunResult` holds about the same goals."""

    task: str
    seed: int
    successes: tuple[bool, ...]
    returns: tuple[float, ...]


@dataclass(frozen=True)
class Film:
    """The GIF: one episode of the starting network beside the same one after fine-tuning."""

    path: Path
    task: str
    goal: int
    solved: tuple[bool, bool]


class Workplace:
    """The folder of one setup, and what lies where in it.

    Args:
        out: Folder of the demo.
        setup: The settings.
    """

    def __init__(self, out: Path, setup: Setup) -> None:
        self.setup = setup
        self.folder = out / "rl" / self._key()

    def _key(self) -> str:
        package = _ROOT / "eva_lightning"
        unused = {package / name for name in ("vision", "plots.py", "analysis.py")}
        sources = [path for path in package.rglob("*.py") if path not in unused and unused.isdisjoint(path.parents)]
        sources += [
            Path(__file__),
            *(_ROOT / "experiments" / "metaworld" / f"{n}.py" for n in ("finetune", "validation")),
        ]
        if not self.setup.init.is_file():
            raise MissingInputError(f"there is no checkpoint {self.setup.checkpoint}: see setup.checkpoint")
        settings = {k: v for k, v in dataclasses.asdict(self.setup).items() if k not in ("seeds", "film_size", "tasks")}
        material = {
            "settings": settings,
            "checkpoint": hashlib.sha256(self.setup.init.read_bytes()).hexdigest(),
            "code": code_fingerprint(sources),
            "versions": versions(),
        }
        return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:12]

    def data(self, task: str, seed: int = 0) -> Path:
        """Folder of a task's demonstrations; one each, so that processes can collect at the same time."""
        return self.folder / "demonstrations" / f"{task}-seed{seed}"

    def run(self, run: Run) -> Path:
        """Folder of a fine-tuning run."""
        name = f"{run.task}-{run.method}-lr{run.learning_rate:g}-data{run.data_seed}-episodes{run.episodes}-{run.seed}"
        return self.folder / "runs" / name

    def before(self, task: str, seed: int) -> Path:
        """File of the rollouts before fine-tuning."""
        return self.folder / "before" / f"{task}-{seed}.json"

    def film(self, run: Run, goal: int) -> Path:
        """File of the film."""
        size = self.setup.film_size
        return self.folder / "films" / f"{self.run(run).name}-goal{goal}-size{size}.gif"

    def collected(self, task: str, seed: int = 0) -> bool:
        """Whether all demonstrations of a task are there."""
        from eva_lightning.rl.demonstrations import read_index

        wanted = self.setup.demonstrations + self.setup.held_out
        try:
            return read_index(self.data(task, seed))[task].episodes >= wanted
        except (FileNotFoundError, ValueError):
            return False

    def result(self, run: Run) -> RunResult | None:
        """What a finished run came to; None for one that is not."""
        file = self.run(run) / "metrics.json"
        if not file.is_file():
            return None
        metrics = json.loads(file.read_text(encoding="utf-8"))
        return RunResult(
            run,
            {row["updates"]: row["val_loss"] for row in metrics["val_loss"]},
            tuple(metrics.get("successes") or ()),
            tuple(metrics.get("returns") or ()),
            metrics["trainable_parameters"],
            metrics["train_seconds"],
            dict(metrics.get("ranks") or {}),
            metrics.get("init_seconds"),
        )

    def before_result(self, task: str, seed: int) -> Before | None:
        """Rollouts before fine-tuning; None where there are none yet."""
        file = self.before(task, seed)
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return Before(task, seed, tuple(found["successes"]), tuple(found["returns"]))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    # the demo prints its own progress; a run's log is in its folder
    with quiet(), single_thread(), contextlib.redirect_stdout(io.StringIO()):
        yield


def collect_task(place: Workplace, task: str, seed: int = 0) -> None:
    """Demonstrations of `task` by the scripted expert."""
    from eva_lightning.rl.collection import collect

    setup = place.setup
    episodes = setup.demonstrations + setup.held_out
    with _silent():
        collect(
            [task],
            episodes,
            place.data(task, seed),
            noise=setup.noise,
            seed=seed,
            horizon=setup.horizon,
            progress=False,
        )


def target_return(place: Workplace, task: str, seed: int = 0) -> float:
    """The return to ask for: the largest of the training demonstrations."""
    from eva_lightning.rl.demonstrations import load_task

    returns = load_task(place.data(task, seed), task, place.setup.demonstrations).returns
    return float(returns.max())


def measure_before(place: Workplace, task: str, seed: int) -> Before:
    """Roll out the starting network on the goals that the runs of `seed` are measured on."""
    from eva_lightning.rl.module import DecisionTransformerModule
    from eva_lightning.rl.rollouts import evaluate

    with _silent():
        module = DecisionTransformerModule.from_pretrained(place.setup.init)
        result = evaluate(
            module,
            task,
            target_return=target_return(place, task),
            episodes=place.setup.episodes,
            seed=seed,
            horizon=place.setup.horizon,
        )
    before = Before(task, seed, tuple(result.successes.tolist()), tuple(result.returns.tolist()))
    file = place.before(task, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(dataclasses.asdict(before)), encoding="utf-8")
    temporary.replace(file)
    return before


def command(place: Workplace, run: Run) -> list[str]:
    """Arguments of ``python -m experiments.metaworld finetune`` that make `run`."""
    setup, folder = place.setup, place.run(run)
    options: dict[str, Any] = {
        "task": run.task, "init": setup.init, "method": run.method, "rank": setup.rank, "rho": setup.rho,
        "lr": run.learning_rate, "seeds": 1, "first-seed": run.seed, "data": place.data(run.task, run.data_seed),
        "train-episodes": setup.demonstrations, "val-episodes": setup.held_out, "max-steps": setup.updates,
        "batch-size": setup.batch_size, "val-at": ",".join(map(str, setup.noted_updates)), "horizon": setup.horizon,
        "eval-episodes": run.episodes, "eval-seed": run.seed, "accelerator": "cpu", "progress": "false",
        "checkpoint-every": setup.updates, "output": folder.parent, "name": folder.name.removesuffix(f"-{run.seed}"),
        "overwrite": "true",
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


def finetune_run(place: Workplace, run: Run) -> RunResult:
    """One run of the finetune command, from its beginning: what was interrupted costs ten seconds at most."""
    import shutil

    from experiments.metaworld import finetune

    try:
        with _silent():
            finetune.main(command(place, run))
    except SystemExit:
        # how Lightning ends on Ctrl-C
        raise KeyboardInterrupt from None
    # the merged network beside it is all that is needed from now on
    shutil.rmtree(place.run(run) / "checkpoints", ignore_errors=True)
    result = place.result(run)
    assert result is not None
    return result


def roll_one(place: Workplace, checkpoint: Path, task: str, seed: int, goal: int) -> tuple[np.ndarray, bool]:
    """Pictures ``(T, H, W, 3)`` of one episode, every fourth step and the last, and whether it was solved."""
    from eva_lightning.rl.environments import MetaWorldEnvironment
    from eva_lightning.rl.module import DecisionTransformerModule
    from eva_lightning.rl.policy import DecisionTransformerPolicy

    setup, solved = place.setup, False
    with _silent():
        module = DecisionTransformerModule.from_pretrained(checkpoint)
        policy = DecisionTransformerPolicy(module, 1, target_return(place, task))
        with MetaWorldEnvironment(
            task, seed=seed, split="eval", horizon=setup.horizon, render_size=setup.film_size
        ) as environment:
            observation, reward = environment.reset(goal), None
            frames = [environment.render()]
            for step in range(1, setup.horizon + 1):
                action = policy.act(observation[None], reward)[0]
                observation, gained, success, _ = environment.step(action)
                reward, solved = np.array([gained]), solved or success
                if step % _FRAME_STRIDE == 0 or step == setup.horizon:
                    frames.append(environment.render())
    return np.stack(frames), solved


def write_film(path: Path, before: np.ndarray, after: np.ndarray, labels: tuple[str, str]) -> None:
    """Both episodes side by side as a GIF in real time."""
    from eva_lightning.rl.video import side_by_side, write_video

    frames = side_by_side(before, after, labels)
    # the pictures are thinned already: each stands for the steps until the next
    every_step = np.repeat(frames, _FRAME_STRIDE, axis=0)[: (len(frames) - 1) * _FRAME_STRIDE + 1]
    write_video([every_step], path, stride=_FRAME_STRIDE)


def interesting_goal(before: Before, after: RunResult) -> int:
    """The first evaluation goal that was missed before fine-tuning and reached after it; else the first."""
    pairs = zip(before.successes, after.successes, strict=True)
    return next((goal for goal, (was, now) in enumerate(pairs) if now and not was), 0)
