"""Shared EVA states: one decomposition per task, training split, model and number of components serves many runs.

Learning rate, seed, rank and ρ do not change what a layer's inputs look like, and a run of rank r needs the first
``round(r * rho)`` components only: so the first run that needs a state computes it, with as many components as any
run of the sweep needs, and all others read it. Two per task: tuning sees train800, final runs all 1,000 images (the
protocol of the authors' code decomposes train800 for both: one per task).

How a run with a shared state differs from one that streams itself: the shared one is streamed in the data order of
seed 0, and until *its* components have converged, which for a smaller number of components can be sooner or later.
Where both see the same minibatches (seed 0, the same number of components, or training data of one minibatch) the
results are equal to the last bit.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock

from eva_lightning.methods.keys import StateKind
from experiments.vtab import run
from experiments.vtab.jobs import Job, digest, weights_identity

_LOGGER = logging.getLogger("experiments.vtab.states")

#: Settings that do not change the inputs of a model's layers at the start of training, or how they are decomposed.
_WITHOUT_INFLUENCE = (
    "method", "rank", "rho", "alpha", "bias", "init", "metric", "dropout", "epochs", "warmup_epochs", "lr",
    "weight_decay", "lora_plus_ratio", "seed", "limit_test", "eva_state", *run.INCIDENTAL,
)  # fmt: skip


@dataclass(frozen=True)
class SharedState:
    """An EVA state that a sweep needs.

    Attributes:
        settings: Those of a run that would stream it: its rank is the number of components, ρ is 1, the seed 0.
        kind: Components of most (``"major"``) or least (``"minor"``) variance.
        folder: Where a sweep's states lie.
    """

    settings: run.Settings
    kind: StateKind
    folder: Path

    @classmethod
    def of(cls, job: Job) -> SharedState | None:
        """The state `job` starts from, or None for methods without."""
        kind = job.key.state_kind
        if kind is None or not job.components:
            return None
        method = "eva" if kind == "major" else "eva-minor"
        settings = replace(
            job.settings, method=method, init=run.Settings.init, rank=job.components, rho=1.0, seed=0, eva_state=None
        )
        decomposition = settings.rules.decomposition
        if decomposition is not None and kind == "major":
            settings = replace(settings, split=decomposition.split)
        return cls(settings, kind, Path(job.settings.output) / "states")

    @property
    def components(self) -> int:
        """Components per layer."""
        return self.settings.rank

    @property
    def path(self) -> Path:
        """Common stem of its two files."""
        influence = {k: v for k, v in asdict(self.settings).items() if k not in _WITHOUT_INFLUENCE}
        influence["weights"] = weights_identity(self.settings.weights)
        model = self.settings.model.replace("/", "_").replace(":", "_")
        place = f"{self.settings.task}-{self.settings.split}-{model}-{self.kind}"
        return self.folder / f"{place}-{digest(influence)}-k{self.components}"

    def find(self) -> Path | None:
        """A complete state of at least as many components: the smallest one, or None."""
        stem, _, _ = self.path.name.rpartition("-k")
        found = []
        for file in self.folder.glob(f"{stem}-k*.json"):
            number = file.stem.rpartition("-k")[2]
            if number.isdigit() and int(number) >= self.components and file.with_suffix(".safetensors").is_file():
                found.append((int(number), file.with_suffix("")))
        return min(found)[1] if found else None

    def obtain(self) -> Path:
        """The state's path, after computing it where nobody has; others that want it wait meanwhile.

        Raises:
            MissingInputError, InputError, UnreachableError: As :func:`experiments.vtab.run.build`.
            OSError: The disk is full.
        """
        found = self.find()
        if found is not None and _is_sound(found):
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{self.path.name}.lock"):
            found = self.find()
            if found is None or not _is_sound(found):
                # a damaged one is made again under its own name
                found = self.path if found is None else found
                _compute(replace(self.settings, rank=int(found.name.rpartition("-k")[2])), found)
        return found


_SOUND: set[tuple[str, int]] = set()


def _is_sound(path: Path) -> bool:
    """Whether the state can be read; each file is looked at once per process."""
    from eva_lightning.state import EVAState

    try:
        stamp = (str(path.absolute()), path.with_name(f"{path.name}.json").stat().st_mtime_ns)
        if stamp not in _SOUND:
            EVAState.load(path)
            _SOUND.add(stamp)
    except (FileNotFoundError, ValueError) as error:
        _LOGGER.warning("computing the EVA state %s again: %s", path.name, error)
        return False
    return True


def _compute(settings: run.Settings, path: Path) -> None:
    """Stream the training data through the model as a run of these settings would, and save what comes out."""
    import lightning as L

    from eva_lightning.callback import EVAInitCallback

    data, module, callbacks = run.build(settings)
    (callback,) = (c for c in callbacks if isinstance(c, EVAInitCallback))
    callback.verbose = False
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=run.lightning_precision(settings),  # type: ignore[arg-type]
        max_epochs=0,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    assert callback.state is not None
    callback.state.save(path)
    log = path.parent / "computed.log"
    with log.open("a", encoding="utf-8") as handle:
        handle.write(f"{path.name} process {os.getpid()} {callback.state.seconds:.2f} s\n")
