"""Demonstrations as Minari data sets, which ``minari.load_dataset`` opens.

A data set's ``recover_environment()`` makes the environment of the demonstrations again, and with ``eval_env=True`` the
same task on its evaluation goals. An episode's option ``goal`` is the number of its goal: with
``reset(options={"goal": i})`` the stored actions give the stored episode. ``infos`` has an entry per observation:
``success``, False at the first, and ``expert_action``, zero at the last. Minari's buffers take the files as they are;
its ``DataCollector`` would act anew.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import gymnasium
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.storage import get_dataset_path
from rich.console import Console
from rich.progress import track

from eva_lightning.errors import InputError
from eva_lightning.ours import delete_tree
from eva_lightning.rl.demonstrations import DemonstrationIndex, TaskDemonstrations, TaskEntry, load_task
from eva_lightning.rl.registration import environment_id
from eva_lightning.rl.tasks import ACTION_DIM, resolve_task

_VARIABLE = "MINARI_DATASETS_PATH"
_ALGORITHM = "metaworld scripted expert"


def dataset_name(task: str) -> str:
    """Name of the Minari data set of `task`: ``metaworld/push/expert-v0`` for ``push-v3``."""
    return f"metaworld/{resolve_task(task).removesuffix('-v3')}/expert-v0"


def export_minari(
    index: DemonstrationIndex, tasks: Sequence[str], path: str | Path | None = None, *, progress: bool = True
) -> list[str]:
    """Write one Minari data set per task; data sets of the same names are replaced.

    Args:
        index: Index of the folder of demonstrations.
        tasks: Tasks to export.
        path: Folder for the data sets, as in the environment variable ``MINARI_DATASETS_PATH``; None leaves that, or
            Minari's default, in force.
        progress: Show a progress bar on standard error, in a terminal.

    Returns:
        The names of the data sets, for ``minari.load_dataset`` under the same path.

    Raises:
        MissingInputError: A task was not collected.
        InputError: A file of demonstrations is damaged, a task is unknown, or its demonstrations were imported.
    """
    entries = [(resolve_task(task), index[resolve_task(task)]) for task in tasks]
    for task, entry in entries:
        if entry.source is not None:
            raise InputError(
                f"the demonstrations of {task} were imported from {entry.source}: they are not the expert's"
            )
    root = Path(get_dataset_path() if path is None else path).resolve()
    root.mkdir(parents=True, exist_ok=True)
    steps = track(entries, "exporting to Minari", console=Console(stderr=True), transient=True, disable=not progress)
    for task, _ in entries:
        _refuse_another(root / dataset_name(task))
    for task, entry in steps:
        name, demonstrations = dataset_name(task), load_task(index.folder, task)
        # under its name only when complete; Minari overlooks folders that begin with a dot
        with tempfile.TemporaryDirectory(dir=root, prefix=".") as scratch, patch.dict(os.environ, {_VARIABLE: scratch}):
            # Minari reads its folder from the environment at every call, and takes no argument for it
            _export(name, demonstrations, entry)
            delete_tree(root / name)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / name).rename(root / name)
    return [dataset_name(task) for task, _ in entries]


def _refuse_another(dataset: Path) -> None:
    """Refuse to replace a data set of the same name that comes from elsewhere, such as from Minari's server."""
    if not dataset.is_dir():
        return
    try:
        about = json.loads((dataset / "data" / "metadata.json").read_text(encoding="utf-8"))
        is_ours = str(about["algorithm_name"]).startswith(_ALGORITHM)
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise InputError(
            f"{dataset} is a Minari data set that this program has not written: move it away, or choose another "
            "--minari-path"
        )


def _export(name: str, demonstrations: TaskDemonstrations, entry: TaskEntry) -> None:
    buffers = []
    for number in range(len(demonstrations)):
        ends = np.zeros(demonstrations.horizon, dtype=np.bool_)
        ends[-1] = True
        # one entry per observation, as Minari counts infos: nothing is known of the first one
        success = np.concatenate([[False], demonstrations.successes[number]])
        wanted = np.concatenate([demonstrations.expert_actions[number], np.zeros((1, ACTION_DIM), np.float32)])
        buffers.append(
            EpisodeBuffer(
                id=number,
                seed=entry.seed,
                options={"goal": int(demonstrations.goals[number])},
                observations=demonstrations.observations[number],
                actions=demonstrations.actions[number],
                rewards=list(demonstrations.rewards[number].astype(np.float64)),
                terminations=[False] * demonstrations.horizon,
                truncations=list(ends),
                infos={"success": success, "expert_action": wanted},
            )
        )
    with warnings.catch_warnings(), gymnasium.make(_spec(demonstrations, entry, "train")) as environment:
        # author, licence and reference scores are not ours to invent
        warnings.filterwarnings("ignore", category=UserWarning, module=r"minari\.")
        minari.create_dataset_from_buffers(
            name,
            buffers,
            env=environment,
            eval_env=_spec(demonstrations, entry, "eval"),
            algorithm_name=f"{_ALGORITHM}, Gaussian noise {entry.noise:g}",
            description=(
                f"Meta-World {demonstrations.task}, goal visible, reward v2, {entry.horizon} steps per episode; "
                f"goals and noise of seed {entry.seed}; success rate "
                f"{demonstrations.success_rate:.3f} (solved at any step)."
            ),
            requirements=[f"{package}=={version}" for package, version in entry.versions.items()],
        )


def _spec(demonstrations: TaskDemonstrations, entry: TaskEntry, split: str) -> EnvSpec:
    """What makes the task's environment again, with the goals of the demonstrations or those to evaluate on."""
    spec = copy.deepcopy(gymnasium.spec(environment_id(demonstrations.task)))
    spec.max_episode_steps = entry.horizon
    spec.kwargs |= {"seed": entry.seed, "split": split}
    return spec
