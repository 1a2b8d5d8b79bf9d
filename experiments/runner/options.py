"""The settings that every comparison has."""

from __future__ import annotations

import os
from dataclasses import dataclass

from eva_lightning.errors import InputError
from experiments.runner.local_pool import default_workers, visible_gpus
from experiments.runner.settings import Role, check_settings, option

BACKENDS = ("local", "ray", "slurm")

#: Lightning's, and auto: bf16-mixed on a GPU that can, else 32-true.
PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed")


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How a comparison is run; its settings inherit these. Nothing of it changes a result."""

    output: str = option("runs/comparison", "folder for runs, figures and tables", Role.PLACE)
    backend: str = option(
        "local", "local (processes of this machine), ray (GPUs of one or many machines) or slurm (an array job)",
        Role.PLACE, choices=BACKENDS,
    )  # fmt: skip
    workers: int | None = option(
        None, "runs at the same time, 0: in this process; one per share of a GPU (or 4 CPU cores) if not given",
        Role.PLACE, at_least=0,
    )  # fmt: skip
    threads: int | None = option(None, "CPU threads per run; CPU cores / workers if not given", Role.PLACE, at_least=1)
    gpus_per_run: float | None = option(
        None, "share of a GPU per run, such as 0.5; a whole one if not given", Role.PLACE, at_least=0
    )
    cpus_per_run: float = option(1.0, "CPU cores per run, for ray and slurm", Role.PLACE, at_least=0)
    ray_address: str | None = option(
        None, "running Ray cluster (auto, or ray://host:port); if not given, one for this machine alone", Role.PLACE
    )
    slurm: dict[str, str] | None = option(
        None, "what to ask SLURM for, as partition=gpu,time=4:00:00,memory=32G; any option of sbatch", Role.PLACE
    )
    checkpoint_minutes: float = option(
        10.0, "a run longer than this is resumed if interrupted, a shorter one repeated", Role.PLACE, at_least=0
    )
    retry_failed: bool = option(False, "run again what failed", Role.SELECTION)
    skip_failed: bool = option(
        False, "choose among the settings without failed runs; else a failure holds the choice up", Role.SELECTION
    )
    plan: bool = option(
        False, "say what would run and, by the speed measured now, how long it takes, and stop", Role.SELECTION
    )
    report: bool = option(
        False, "write the report of what is finished so far, and stop; also while runs go on", Role.SELECTION
    )
    progress: bool = option(True, "show progress", Role.PLACE)

    def __post_init__(self) -> None:
        check_settings(self)
        for name, backend in (("ray_address", "ray"), ("slurm", "slurm")):
            value = getattr(self, name)
            if value is not None and self.backend != backend:
                raise InputError(f"{name} goes with --backend {backend}, got --backend {self.backend}", setting=name)

    @property
    def uses_gpus(self) -> bool:
        """Whether runs may use GPUs; settings of comparisons that train on the CPU say no."""
        return self.gpus_per_run != 0

    @property
    def gpu_share(self) -> float | None:
        """GPUs per run; None for a whole one where there is any."""
        return self.gpus_per_run if self.uses_gpus else 0.0

    def slots_here(self) -> int:
        """Runs at a time on this machine."""
        if self.workers is not None:
            return max(1, self.workers)
        share = 1.0 if self.gpus_per_run is None else self.gpus_per_run
        return default_workers(len(visible_gpus()) if self.uses_gpus else 0, min(1.0, share or 1.0))

    def threads_per_run(self) -> int:
        """CPU threads for each run."""
        if self.threads is not None:
            return self.threads
        shared = (os.cpu_count() or 1) // self.slots_here() if self.backend == "local" else round(self.cpus_per_run)
        return max(1, shared)
