"""What a sweep would do and take: ``python -m experiments.vtab sweep --plan``. Nothing is started or written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from eva_lightning.errors import InputError
from eva_lightning.files import format_bytes
from eva_lightning.vision.data.tasks import expected_size
from experiments.runner.calling import as_called
from experiments.runner.comparison import Comparison
from experiments.runner.jobs import Job
from experiments.runner.schedule import Schedule
from experiments.vtab.grid import Grid
from experiments.vtab.sizes import ModelSize, cache_bytes
from experiments.vtab.sweep_checks import DiskUse, may_keep_models, memory_bytes, missing_data
from experiments.vtab.sweep_settings import Settings
from experiments.vtab.timing import Speed, measure
from experiments.vtab.weights import check_weights

#: Building or copying a model, moving it, injecting adapters, reading a state: seconds per run, and per byte of model.
_PER_RUN = 3.0
_PER_BYTE = 1e-9
#: Minibatches that an EVA state is taken to stream.
_STATE_BATCHES = 16


@dataclass
class Plan:
    """The plan of a sweep.

    Attributes:
        settings: The sweep.
        schedule: Its runs, as their folders say they are.
        size: Of its model.
        speed: Measured now.
    """

    settings: Settings
    schedule: Schedule
    size: ModelSize
    speed: Speed

    @classmethod
    def of(cls, sweep: Comparison, settings: Settings) -> Plan:
        """Measures for up to half a minute."""
        size = ModelSize.of(settings.base)
        methods = dict.fromkeys(key.method for key in settings.keys)
        speed = measure(settings.base, methods, size, max(settings.search.ranks))
        return cls(settings, Schedule(sweep.cells(), sweep.score), size, speed)

    def seconds(self) -> Callable[[Job], float]:
        """What runs take; the first that needs an EVA state which is not there takes longer."""
        computed: set[str] = set()

        def of(job: Job) -> float:
            seconds = self._training(job)
            if job.shared is not None and not job.shared.exists() and job.shared.path not in computed:
                computed.add(job.shared.path)
                seconds += self._state_seconds
            return seconds

        return of

    def _training(self, job: Job) -> float:
        """One run without its EVA state, at the official sizes or the limits given."""
        shared, single = self.settings, job.settings
        task = shared.task(single.task)
        images = expected_size(task, single.split)
        test = expected_size(task, "val200" if job.phase == "tune" else "test")
        images, test = min(images, shared.limit_train or images), min(test, shared.limit_test or test)
        steps = shared.epochs * shared.rules.batches_per_epoch(images, single.batch)
        start = _PER_RUN + _PER_BYTE * 4 * self.size.parameters
        step = self.speed.step[single.method] * single.batch / shared.base.batch
        return steps * step + test * self.speed.image + start

    @property
    def _state_seconds(self) -> float:
        return _STATE_BATCHES * self.settings.base.batch * self.speed.image

    @cached_property
    def _names(self) -> dict[str, str]:
        """Of the contender that a method with its ρ belongs to."""
        return {key.key: contender.name for contender in self.settings.contenders for key in contender.keys}

    @cached_property
    def runs(self) -> pd.DataFrame:
        """All runs: ``method``, ``phase``, ``status`` and, of those to do, ``seconds`` and the ``state`` they need."""
        rows = self.schedule.rows.values()
        known = [(row.job, row.status) for row in rows] + [(job, "pending") for job in self.schedule.later()]
        return pd.DataFrame(
            [
                {
                    "method": self._names[job.tags["method"]],
                    "phase": job.phase,
                    "status": status,
                    "seconds": 0.0 if status == "done" else self._training(job),
                    "state": None if status == "done" or job.shared is None or job.shared.exists() else job.shared.path,
                }
                for job, status in known
            ]
        )

    def notes(self) -> list[str]:
        """Everything but how long it takes in all."""
        return [
            self._what(),
            *protocol_notes(self.settings),
            *self._counts(),
            *self._missing(),
            self._disk(),
            self._memory(),
            *self._time(),
        ]

    def _what(self) -> str:
        shared, grid, tasks = self.settings, self.settings.search, self.settings.task_names
        searched = any(each.searches_rho for each in shared.contenders)
        rhos = f" (x {len(grid.rhos)} ρ of {_rhos(grid)})" if searched else ""
        axes = f"{len(grid.lrs)} learning rates x {len(grid.ranks)} ranks{rhos} x {len(grid.tune_seeds)} seeds"
        final = f"then {len(grid.final_seeds)} final seeds on train800val200/test"
        return (
            f"sweep: {shared.model}, weights {shared.weights}, protocol {shared.protocol}; {len(tasks)} tasks"
            f"{' (' + ', '.join(tasks) + ')' if len(tasks) <= 4 else ''}, {len(shared.contenders)} methods\n"
            f"grid: {axes} on train800/val200, {final if grid.final_seeds else 'no final runs'}; {shared.epochs} "
            f"epochs, batch {_batches(shared)}, {shared.image_size} px"
        )

    def _counts(self) -> Iterator[str]:
        yield "runs:"
        for each in self.settings.contenders:
            note = "" if each.adapts else "  no rank: that axis collapses"
            if each.searches_rho:
                final = f", final runs of ρ = {_values(key.rho for key in each.always)} besides" if each.always else ""
                note = f"  ρ searched over {_values(key.rho for key in each.keys)}{final}"
            yield _count(each.name, self.runs[self.runs["method"] == each.name]) + note
        yield _count("together", self.runs)
        states = [key for key in self.settings.keys if key.state_kind is not None]
        if states:
            kinds = sorted({str(key.state_kind) for key in states})
            components = sorted(set(self.settings.states()))
            paper = self.settings.algorithm == "paper"
            shared_by = (
                "serve all learning rates and seeds" if paper else "serve all learning rates, ranks, ρ and seeds"
            )
            one = self.settings.rules.decomposition is not None
            yield (
                f"  EVA states: {'one per task' if one else 'two per task (train800, all 1,000)'}"
                f"{' and kind (' + ', '.join(kinds) + ')' if len(kinds) > 1 else ''}"
                f"{', for each rank and ρ' if paper else ''}, of "
                f"{' and '.join(map(str, components))} components per layer, {shared_by}"
            )

    def _missing(self) -> Iterator[str]:
        """What has to be there before the sweep can start, and is not."""
        settings = self.settings
        lacking, tasks = missing_data(settings), len(settings.task_names)
        if lacking:
            here = Path(settings.root).is_dir()
            why = next(iter(lacking.values())) if here else f"there is no folder {settings.root}"
            yield as_called(
                f"data: MISSING for {len(lacking)} of {tasks} tasks ({why}); get it by "
                f"python -m experiments.vtab prepare --root {settings.root}"
            )
        else:
            yield f"data: all {tasks} tasks are in {settings.root}"
        try:
            check_weights(settings.model, settings.weights)
        except InputError as error:
            yield f"weights: MISSING: {error}"

    def _disk(self) -> str:
        settings, use = self.settings, DiskUse.of(self.settings, self.size)
        whole = sum(cache_bytes(settings.task(name), settings.image_size) for name in settings.task_names)
        folder = settings.base.cache_dir
        images = f"decoded images {format_bytes(use.cache)} of {format_bytes(whole)} in {folder}"
        return (
            f"disk: {images if folder else 'no cache'}; EVA states {format_bytes(use.states)}; runs at most "
            f"{format_bytes(use.runs)} in {settings.output}"
        )

    def _memory(self) -> str:
        settings, size = self.settings, self.size
        weights, rank = 4 * size.parameters, max(settings.search.ranks)
        # gradient and AdamW's two moments
        training = weights + 12 * max(size.trained(key, rank, 100, settings.bias) for key in settings.keys)
        if self.speed.memory:
            device = f"{format_bytes(self.speed.memory)} on the GPU (measured)"
        else:
            device = (
                f"{format_bytes(training)} for weights, gradients and AdamW of the largest method, plus activations"
            )
        kept = f", and {format_bytes(weights)} for the pre-trained weights between runs"
        return (
            f"memory: per run {device}{kept if may_keep_models(settings) else ''}; {settings.slots_here()} at a time; "
            f"this machine has {format_bytes(memory_bytes())}"
        )

    def _time(self) -> Iterator[str]:
        speed, unit = self.speed, "CPU" if self.speed.memory is None else "GPU"
        steps = ", ".join(f"{method} {_seconds(seconds)}" for method, seconds in speed.step.items())
        evaluated = f"{1 / speed.image:.3g} images/s evaluated"
        yield f"measured: seconds per step of {self.settings.base.batch} images: {steps}; {evaluated}"
        yield f"  on {speed.device}; {speed.how}"
        states = self.runs["state"].nunique() * self._state_seconds
        phases = self.runs.groupby("phase")["seconds"].sum().reindex(["tune", "final"], fill_value=0.0)
        yield (
            f"work: {_hours(phases.sum() + states)} {unit}-hours (tuning {_hours(phases['tune'])}, final runs "
            f"{_hours(phases['final'])}, EVA states {_hours(states)})"
        )
        for method, seconds in self.runs.groupby("method", sort=False)["seconds"].sum().items():
            yield f"  {method:<18} {_hours(seconds)} {unit}-hours"
        if self.settings.model == "dinov2_g14":
            yield "  (the paper: about 140 H100-hours for one method with g/14, 160 A100-hours with L/14)"


def protocol_notes(settings: Settings) -> list[str]:
    """What the protocol means for each method of a sweep, and what of the code it is named after is not followed."""
    methods = dict.fromkeys(key.method for key in settings.keys)
    said = [sentence for method in methods for sentence in settings.explanation(method)]
    return [*said, *(f"not followed: {sentence}" for sentence in settings.rules.not_followed)]


def _batches(settings: Settings) -> str:
    """The usual batch, and that of methods with another."""
    found: dict[int, list[str]] = {}
    for method in dict.fromkeys(key.method for key in settings.keys):
        found.setdefault(settings.batch_for(method), []).append(method)
    first, *others = sorted(found, key=lambda batch: -len(found[batch]))
    return ", ".join([str(first), *(f"{batch} for {', '.join(found[batch])}" for batch in others)])


def _rhos(grid: Grid) -> str:
    return _values(sorted(grid.rhos))


def _values(rhos: Iterable[float | None]) -> str:
    return " and ".join(f"{rho:g}" for rho in rhos if rho is not None)


def _count(title: str, runs: pd.DataFrame) -> str:
    words = {}
    for phase in ("tune", "final"):
        statuses = runs.loc[runs["phase"] == phase, "status"]
        notes = [f"{n} {status}" for status in ("done", "failed") if (n := int((statuses == status).sum()))]
        words[phase] = f"{len(statuses):,}" + (f" ({', '.join(notes)})" if notes else "")
    return f"  {title:<18} {words['tune']:>22} tuning + {words['final']:>16} final"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
