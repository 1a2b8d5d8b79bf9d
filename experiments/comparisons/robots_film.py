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
from eva_lightning.rl.video import no_mp4_reason, side_by_side, write_picture, write_video
from eva_lightning.sealed import read_sealed_json, set_aside, write_sealed_json

Frames = npt.NDArray[np.uint8]

#: Simulator steps per picture: 16 pictures for a second of the robot's time.
FILM_STRIDE = 5


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


@dataclass(frozen=True)
class Made:
    """What became of a film.

    Attributes:
        solved: Whether the episode was solved on the left and on the right; None where there is no film.
        mp4: The film as MP4, if there is one.
        poster: Its last picture, which shows what became of it.
        reason: Why there is no film, or no MP4 of it.
    """

    solved: tuple[bool, bool] | None
    mp4: Path | None = None
    poster: Path | None = None
    reason: str = ""


def make_film(film: Film, file: Path, workers: int) -> Made:
    """Write the GIF `file`, an MP4 and its poster beside it, unless they show this film already.

    A failure to draw must not cost the numbers of a comparison: it is a reason why there is no film. Without ffmpeg
    there is a GIF alone.
    """
    note, mp4, poster = (file.with_suffix(suffix) for suffix in (".json", ".mp4", ".png"))
    lacks_mp4 = no_mp4_reason()
    known = _known(note) if file.is_file() else {}
    if known.get("film") == asdict(film) and known.get("sha256") == file_digest(file):
        solved = (known["solved"][0], known["solved"][1])
        if mp4.is_file() and poster.is_file() and known.get("mp4_sha256") == file_digest(mp4):
            return Made(solved, mp4, poster)
        if lacks_mp4 is not None:
            return Made(solved, reason=lacks_mp4)
    if film.size == 0:
        return Made(None, reason="no video: film_size is 0")
    if rendering_backend() is None:
        return Made(None, reason=no_video_reason())
    try:
        solved = _draw(film, [file] if lacks_mp4 else [file, mp4, poster], workers)
    except Exception as error:
        return Made(None, reason=f"no video: {error}")
    digests = {"sha256": file_digest(file), "mp4_sha256": None if lacks_mp4 else file_digest(mp4)}
    write_sealed_json(note, {"film": asdict(film), "solved": solved, **digests})
    return Made(solved, reason=lacks_mp4) if lacks_mp4 else Made(solved, mp4, poster)


def _known(note: Path) -> dict[str, Any]:
    """What an earlier call has noted."""
    if not note.is_file():
        return {}
    try:
        return read_sealed_json(note)
    except DamagedFileError as error:
        set_aside(note, str(error), "drawing the video again")
        return {}


def learnt_goals(before: Sequence[bool], after: Sequence[bool]) -> list[int]:
    """The evaluation goals that were missed before fine-tuning and reached after it."""
    pairs = zip(before, after, strict=True)
    return [goal for goal, (was, now) in enumerate(pairs) if now and not was]


def goal_to_film(before: Sequence[bool], after: Sequence[bool]) -> int:
    """The rule: the first goal that was learnt; the first of all where none was."""
    return next(iter(learnt_goals(before, after)), 0)


#: The rule in words.
RULE = (
    "Chosen by a rule, not by eye: the first task, EVA's first seed, and the first evaluation goal that was missed "
    "before and reached after (at any step), or else the first goal."
)


def roll_one(film: Film, checkpoint: str) -> tuple[Frames, bool]:
    """Pictures ``(T, H, W, 3)`` of one episode, every `FILM_STRIDE`-th step and the last, and whether it was solved."""
    solved = False
    policy = DecisionTransformerPolicy(DecisionTransformerModule.from_pretrained(checkpoint), 1, film.target_return)
    with MetaWorldEnvironment(
        film.task, seed=film.seed, split="eval", horizon=film.horizon, render_mode="rgb_array", render_size=film.size
    ) as environment:
        observation, _ = environment.reset(options={"goal": film.goal})
        reward = None
        frames = [environment.render()]
        for step in range(1, film.horizon + 1):
            action = policy.act(observation[None], reward)[0]
            observation, gained, _, _, info = environment.step(action)
            reward, solved = np.array([gained]), solved or info["success"]
            if step % FILM_STRIDE == 0 or step == film.horizon:
                frames.append(environment.render())
    return np.stack(frames), solved


def _draw(film: Film, files: Sequence[Path], workers: int) -> tuple[bool, bool]:
    checkpoints = (film.before, film.after)
    if workers:
        # a broken OpenGL driver ends a process of its own
        with process_pool(min(workers, 2)) as pool:
            (before, was), (after, now) = pool.map(roll_one, (film, film), checkpoints)
    else:
        (before, was), (after, now) = map(roll_one, (film, film), checkpoints)
    words = ("solved" if was else "not solved", "solved" if now else "not solved")
    labels = (f"before: {words[0]}", f"{film.label}: {words[1]}")
    frames = side_by_side(before, after, labels)
    # the pictures are thinned already: each stands for the steps until the next
    every_step = np.repeat(frames, FILM_STRIDE, axis=0)[: (len(frames) - 1) * FILM_STRIDE + 1]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png":
            write_picture(frames[-1], file)
        else:
            write_video([every_step], file, FILM_STRIDE)
    return was, now
