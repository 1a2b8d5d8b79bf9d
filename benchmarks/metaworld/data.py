"""What the data pipeline costs: a training step with it, divided by the same step on one batch held in memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Figure, Figures, in_turn
from eva_lightning.rl.demonstrations import DemonstrationMeta, TaskDemonstrations, read_index, write_task
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.tasks import MT40
from eva_lightning.rl.trajectories import TrajectoryDataModule


def measure(
    folder: str | Path | None = None, steps: int = 60, batch_size: int = 64, context: int = 10, workers: int = 0
) -> Figures:
    """Time training steps of the small Decision Transformer, alternating between the two sources of batches.

    Args:
        folder: Demonstrations; made-up ones of MT40's size in memory (40 tasks of 20 episodes) for None.
        steps: Timed steps of each kind.
        batch_size: Windows per step.
        context: Steps of a window.
        workers: Loader processes.

    Returns:
        ``ratio``, ``step_with_pipeline_ms``, ``step_in_memory_ms`` and ``batch_ms`` (the loader alone).
    """
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch) / "demonstrations"
            _make_up(folder, MT40, episodes=20)
        tasks = tuple(read_index(folder))
        data = TrajectoryDataModule(
            folder, tasks, context, batch_size, val_episodes=0, workers=workers, cache_dir=Path(scratch) / "cache"
        )
        torch.manual_seed(0)
        module = DecisionTransformerModule(width=128, layers=3, heads=4, context=context, dropout=0.1)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        batches = iter(data.train_dataloader())
        held = next(batches)
        fetching: list[float] = []

        def step(batch: dict[str, torch.Tensor]) -> float:
            started = time.perf_counter()
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
            return time.perf_counter() - started

        def with_pipeline() -> float:
            started = time.perf_counter()
            batch = next(batches)
            fetching.append(time.perf_counter() - started)
            return fetching[-1] + step(batch)

        seconds = in_turn({"pipeline": with_pipeline, "memory": lambda: step(held)}, steps, warm_up=3)
    return {
        "ratio": Figure.ratio(seconds["pipeline"], seconds["memory"], "<= 1.03"),
        "step_with_pipeline_ms": Figure.of(1e3 * s for s in seconds["pipeline"]),
        "step_in_memory_ms": Figure.of(1e3 * s for s in seconds["memory"]),
        "batch_ms": Figure.of(1e3 * s for s in fetching[-steps:]),
    }


def _make_up(folder: Path, tasks: tuple[str, ...], episodes: int, horizon: int = 200) -> None:
    """Random numbers in the layout of demonstrations."""
    rng = np.random.default_rng(0)
    shape = (episodes, horizon)
    for task in tasks:
        made = TaskDemonstrations(
            task,
            observations=np.zeros((episodes, horizon + 1, 39), dtype=np.float32),
            actions=rng.uniform(-1, 1, size=(*shape, 4)).astype(np.float32),
            expert_actions=np.zeros((*shape, 4), dtype=np.float32),
            rewards=rng.uniform(0, 10, size=shape).astype(np.float32),
            successes=np.zeros(shape, dtype=np.bool_),
            goals=np.arange(episodes),
        )
        write_task(folder, made, DemonstrationMeta(noise=0.0, seed=0))
