"""A video: one episode of the starting network beside the same one after fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eva_lightning.errors import DamagedFileError
from eva_lightning.files import file_digest
from eva_lightning.processes import process_pool
from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.policy import DecisionTransformerPolicy
from eva_lightning.rl.rendering import no_video_reason, rendering_backend
from eva_lightning.rl.video import STRIDE, side_by_side, write_video
from eva_lightning.sealed import read_sealed_json, set_aside, write_sealed_json

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Film:
    """What is filmed.

    Attributes:
        before, after: Checkpoints of the networks on the left and on the right.
        label: The right one's name.
        task: The task.
        seed: Seed of the goals.
        goal: Number of the goal.
        target_return: Return that both are asked for.
        horizon: Steps of the episode.
        size: Height and width of the frames, in pixels; 0 for no video.
    """

    before: str
    after: str
    label: str
    task: str
    seed: int
    goal: int
    target_return: float
    horizon: int
    size: int


def make_film(film: Film, file: Path, workers: int) -> tuple[tuple[bool, bool] | None, str]:
    """Write the GIF `file`, unless it shows this video already.

    Returns:
        Whether the episode was solved on the left and on the right, or None and the reason why there is no video:
        a failure to draw must not cost the numbers of a comparison.
    """
    note = file.with_suffix(".json")
    known = _known(note) if file.is_file() else {}
    if known.get("film") == asdict(film) and known.get("sha256") == file_digest(file):
        return (known["solved"][0], known["solved"][1]), ""
    if film.size == 0:
        return None, "no video: film_size is 0"
    if rendering_backend() is None:
        return None, no_video_reason()
    try:
        solved = _draw(film, file, workers)
    except Exception as error:
        return None, f"no video: {error}"
    write_sealed_json(note, {"film": asdict(film), "solved": solved, "sha256": file_digest(file)})
    return solved, ""


def _known(note: Path) -> dict[str, Any]:
    """What an earlier call has noted."""
    if not note.is_file():
        return {}
    try:
        return read_sealed_json(note)
    except DamagedFileError as error:
        set_aside(note, str(error), "drawing the video again")
        return {}


def interesting_goal(before: Sequence[bool], after: Sequence[bool]) -> int:
    """The first evaluation goal that was missed before fine-tuning and reached after it; else the first."""
    pairs = zip(before, after, strict=True)
    return next((goal for goal, (was, now) in enumerate(pairs) if now and not was), 0)


def roll_one(film: Film, checkpoint: str) -> tuple[Frames, bool]:
    """Pictures ``(T, H, W, 3)`` of one episode, every fourth step and the last, and whether it was solved."""
    solved = False
    policy = DecisionTransformerPolicy(DecisionTransformerModule.from_pretrained(checkpoint), 1, film.target_return)
    with MetaWorldEnvironment(
        film.task, seed=film.seed, split="eval", horizon=film.horizon, render_size=film.size
    ) as environment:
        observation, reward = environment.reset(film.goal), None
        frames = [environment.render()]
        for step in range(1, film.horizon + 1):
            action = policy.act(observation[None], reward)[0]
            observation, gained, success, _ = environment.step(action)
            reward, solved = np.array([gained]), solved or success
            if step % STRIDE == 0 or step == film.horizon:
                frames.append(environment.render())
    return np.stack(frames), solved


def _draw(film: Film, file: Path, workers: int) -> tuple[bool, bool]:
    checkpoints = (film.before, film.after)
    if workers:
        # a broken OpenGL driver ends a process of its own
        with process_pool(min(workers, 2)) as pool:
            (before, was), (after, now) = pool.map(roll_one, (film, film), checkpoints)
    else:
        (before, was), (after, now) = map(roll_one, (film, film), checkpoints)
    words = ("solved" if was else "not solved", "solved" if now else "not solved")
    labels = (f"before: {words[0]}", f"{film.label}: {words[1]}")
    file.parent.mkdir(parents=True, exist_ok=True)
    frames = side_by_side(before, after, labels)
    # the pictures are thinned already: each stands for the steps until the next
    every_step = np.repeat(frames, STRIDE, axis=0)[: (len(frames) - 1) * STRIDE + 1]
    write_video([every_step], file)
    return was, now
