"""What a sweep would do and take: ``python -m experiments.vtab sweep --plan``. Nothing is started or written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from eva_lightning.vision.data.splits import open_task
from eva_lightning.vision.data.tasks import TASKS, TRAIN_SIZES
from experiments.vtab.jobs import SPLITS
from experiments.vtab.schedule import Cell, cells, choice_of, final_jobs, known_rows
from experiments.vtab.sizes import ModelSize, cache_bytes, human
from experiments.vtab.store import ResultsStore
from experiments.vtab.sweep_checks import (
    DiskUse,
    disk_use,
    expected_slots,
    may_keep_models,
    memory_bytes,
)
from experiments.vtab.sweep_progress import span
from experiments.vtab.sweep_settings import Settings
from experiments.vtab.timing import Speed, measure

#: Building or copying a model, moving it, injecting adapters, reading a state: seconds per run, and per byte of model.
_PER_RUN = 3.0
_PER_BYTE = 1e-9
#: Minibatches that an EVA state is taken to stream.
_STATE_BATCHES = 16


class Progress:
    """How many runs of each phase of a method there are, and how many of them are done or failed."""

    def __init__(self) -> None:
        self.total = {"tune": 0, "final": 0}
        self.done = {"tune": 0, "final": 0}
        self.failed = {"tune": 0, "final": 0}

    def __add__(self, other: Progress) -> Progress:
        result = Progress()
        for name in ("total", "done", "failed"):
            mine, theirs, ours = (getattr(p, name) for p in (self, other, result))
            ours.update({phase: mine[phase] + theirs[phase] for phase in mine})
        return result

    def left(self, phase: str) -> int:
        """Runs to do."""
        return self.total[phase] - self.done[phase]

    def text(self, phase: str) -> str:
        """Such as ``"1140 (12 done, 1 failed)"``."""
        notes = [f"{n} {word}" for n, word in ((self.done[phase], "done"), (self.failed[phase], "failed")) if n]
        return f"{self.total[phase]:,}" + (f" ({', '.join(notes)})" if notes else "")


def plan(settings: Settings) -> str:
    """The plan as text.

    Raises:
        InputError: An unknown model, a wrong option, or a damaged store.
    """
    from eva_lightning.vision.backbone.timm_models import resolve_model

    resolve_model(settings.base.model)
    size = ModelSize.of(settings.base)
    found = progress_by_cell(settings)
    rank = max(settings.search.ranks)
    speed = measure(settings.base, [key.method for key in settings.keys], size, rank)
    slots = expected_slots(settings)
    sections = [
        _what(settings),
        *_counts(settings, found),
        *_missing(settings),
        _disk(settings, disk_use(settings, size)),
        _memory(settings, size, speed, slots),
        *_time(settings, size, found, speed, slots),
    ]
    return "\n".join(sections)


def progress_by_cell(settings: Settings) -> list[tuple[Cell, Progress]]:
    """What the store says of every task and method; it is only read."""
    rows = known_rows(ResultsStore(settings.store_path)) if settings.store_path.is_file() else {}
    result = []
    for cell in cells(settings):
        progress = Progress()
        progress.total = {"tune": len(cell.tune), "final": len(settings.search.final_seeds)}
        known = [rows[job.run_id] for job in cell.tune if job.run_id in rows]
        if len(known) == len(cell.tune) and all(row["status"] == "done" for row in known):
            choice = choice_of(cell, known, settings)
            if choice is not None:
                cell.final = final_jobs(cell, choice, settings)
        for job in (*cell.tune, *cell.final):
            status = rows.get(job.run_id, {}).get("status")
            progress.done[job.phase] += status == "done"
            progress.failed[job.phase] += status == "failed"
        result.append((cell, progress))
    return result


def _what(settings: Settings) -> str:
    grid, base = settings.search, settings.base
    axes = f"{len(grid.lrs)} learning rates x {len(grid.ranks)} ranks x {len(grid.tune_seeds)} seeds"
    final = f"then {len(grid.final_seeds)} final seeds on train800val200/test" if grid.final_seeds else "no final runs"
    names = settings.task_names if len(settings.task_names) <= 4 else ()
    return (
        f"sweep: {base.model}, weights {base.weights}, protocol {base.protocol}; {len(settings.task_names)} tasks"
        f"{' (' + ', '.join(names) + ')' if names else ''}, {len(settings.keys)} methods\n"
        f"grid: {axes} on train800/val200, {final}; {base.epochs} epochs, batch {base.batch_size}, "
        f"{base.image_size} px"
    )


def _counts(settings: Settings, found: Iterable[tuple[Cell, Progress]]) -> Iterator[str]:
    by_method: dict[str, Progress] = {}
    for cell, progress in found:
        by_method[cell.key.key] = by_method.get(cell.key.key, Progress()) + progress
    whole = sum(by_method.values(), Progress())
    yield "runs:"
    for key in settings.keys:
        progress = by_method[key.key]
        note = "" if key.adapts else "  no rank: that axis collapses"
        yield f"  {key.key:<18} {progress.text('tune'):>22} tuning + {progress.text('final'):>16} final{note}"
    yield f"  {'together':<18} {whole.text('tune'):>22} tuning + {whole.text('final'):>16} final"
    states = [key for key in settings.keys if key.streams_eva]
    if states:
        kinds = sorted({str(key.state_kind) for key in states})
        components = sorted({settings.components(key) for key in states})
        splits = (
            "one per task" if settings.base.rules.decomposition is not None else "two per task (train800, all 1,000)"
        )
        yield (
            f"  EVA states: {splits}{' and kind (' + ', '.join(kinds) + ')' if len(kinds) > 1 else ''}, of "
            f"{' and '.join(map(str, components))} components per layer, serve all learning rates, ranks and seeds"
        )


def _missing(settings: Settings) -> Iterator[str]:
    """What has to be there before the sweep can start, and is not."""
    base = settings.base
    lacking: dict[str, str] = {}
    for task in settings.task_names:
        try:
            for split in SPLITS.values():
                open_task(settings.root, task, split, base.limit_train, base.limit_test)
        except (FileNotFoundError, ValueError) as error:
            lacking[task] = str(error)
    if lacking:
        here = Path(settings.root).is_dir()
        why = next(iter(lacking.values())) if here else f"there is no folder {settings.root}"
        yield (
            f"data: MISSING for {len(lacking)} of {len(settings.task_names)} tasks ({why}); get it by "
            f"python -m experiments.vtab prepare --root {settings.root}"
        )
    else:
        yield f"data: all {len(settings.task_names)} tasks are in {settings.root}"
    from eva_lightning.vision.backbone.timm_models import resolve_model
    from eva_lightning.vision.backbone.weights import resolve_weights

    try:
        resolve_weights(resolve_model(base.model), base.weights)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        yield f"weights: MISSING: {error}"


def _disk(settings: Settings, use: DiskUse) -> str:
    size = settings.base.image_size
    whole = sum(cache_bytes(task, size) for task in settings.task_names)
    folder = settings.base.cache_dir
    cache = "no cache" if folder is None else f"decoded images {human(use.cache)} of {human(whole)} in {folder}"
    return (
        f"disk: {cache}; EVA states {human(use.states)}; final runs at most {human(use.runs)} in {settings.output}; "
        "a tuning run leaves its row only"
    )


def _memory(settings: Settings, size: ModelSize, speed: Speed, slots: int) -> str:
    weights = 4 * size.parameters
    trained = max(size.trained(key, max(settings.search.ranks), 100, settings.base.bias) for key in settings.keys)
    # gradient and AdamW's two moments
    training = weights + 12 * trained
    device = (
        f"{human(speed.memory)} on the GPU (measured)"
        if speed.memory
        else f"{human(training)} for weights, gradients and AdamW of the largest method, plus activations"
    )
    kept = (
        f", and {human(weights)} for the pre-trained weights between runs" if may_keep_models(settings, slots) else ""
    )
    return f"memory: per run {device}{kept}; {slots} at a time; this machine has {human(memory_bytes())}"


def run_seconds(settings: Settings, size: ModelSize, speed: Speed, cell: Cell, phase: str) -> float:
    """One run of a task and method, at the official sizes or the limits given."""
    base = settings.base
    images = TRAIN_SIZES["train800" if phase == "tune" else "train800val200"]
    test = TRAIN_SIZES["val200"] if phase == "tune" else TASKS[cell.task].test_size
    images, test = min(images, base.limit_train or images), min(test, base.limit_test or test)
    steps = base.epochs * base.rules.batches_per_epoch(images, base.batch_size)
    return steps * speed.step[cell.key.method] + test * speed.image + _PER_RUN + _PER_BYTE * 4 * size.parameters


def _time(
    settings: Settings, size: ModelSize, found: Iterable[tuple[Cell, Progress]], speed: Speed, slots: int
) -> Iterator[str]:
    base = settings.base
    seconds = {"tune": 0.0, "final": 0.0}
    by_method: dict[str, float] = {}
    tasks_with_states = set()
    for cell, progress in found:
        for phase in ("tune", "final"):
            cost = progress.left(phase) * run_seconds(settings, size, speed, cell, phase)
            seconds[phase] += cost
            by_method[cell.key.key] = by_method.get(cell.key.key, 0.0) + cost
        if cell.key.streams_eva and progress.left("tune") + progress.left("final"):
            tasks_with_states.add((cell.task, cell.key.state_kind))
    states = 2 * len(tasks_with_states) * _STATE_BATCHES * base.batch_size * speed.image
    steps = ", ".join(f"{key.key} {_seconds(speed.step[key.method])}" for key in settings.keys)
    unit = "CPU" if speed.memory is None else "GPU"
    yield f"measured: seconds per step of {base.batch_size} images: {steps}; {1 / speed.image:.3g} images/s evaluated"
    yield f"  on {speed.device}; {speed.how}"
    total = seconds["tune"] + seconds["final"] + states
    yield (
        f"estimate: {_hours(total, unit)} (tuning {_hours(seconds['tune'], unit)}, final runs "
        f"{_hours(seconds['final'], unit)}, EVA states {_hours(states, unit)}); {slots} at a time take "
        f"{span(total / slots)} if they do not slow each other down"
    )
    for key, cost in by_method.items():
        yield f"  {key:<18} {_hours(cost, unit)}"
    if base.model == "dinov2_g14":
        yield "  (the paper: about 140 H100-hours for one method with g/14, 160 A100-hours with L/14)"


def _hours(seconds: float, unit: str) -> str:
    return f"{seconds / 3600:,.1f} {unit}-hours"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
