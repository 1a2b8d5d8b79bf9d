"""One run of the transfer experiment: fine-tune on the second half of the classes, look at held-out images on the way.

A run takes seconds, so an interrupted one starts over, and nothing but its figures is kept.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eva_lightning.errors import InputError, unknown
from eva_lightning.methods.keys import METHOD_TRAITS, MethodKey
from experiments.runner.run_folder import RunFolder

if TYPE_CHECKING:
    import lightning as L

    from eva_lightning.vision.data.datamodule import SplitDataset
    from experiments.vtab.transfer_data import Halves

#: What the pre-trained weights are worth is seen beside these, which start from random ones: key -> label.
BASELINES = {"scratch": "Scratch (FFT)", "linear-random": "Linear, random weights"}

#: Settings of a run that say where it happens, not what comes out.
INCIDENTAL = ("root", "output", "weights")


@dataclass(frozen=True)
class Variant:
    """A method as it is compared.

    Attributes:
        key: How it is written in settings.
        label: How it is written in tables.
        method: Name in :data:`eva_lightning.methods.vision.METHODS`; None trains everything at one rate.
        rho: EVA's ρ; None for methods without.
        pretrained: Starts from the pre-trained weights.
    """

    key: str
    label: str
    method: str | None
    rho: float | None = None
    pretrained: bool = True

    @classmethod
    def parse(cls, text: str) -> Variant:
        """A method key (``lora``, ``eva:1``) or one of `BASELINES`.

        Raises:
            InputError: There is no such method; names the nearest.
        """
        word = text.strip()
        if word in BASELINES:
            return cls(word, BASELINES[word], None if word == "scratch" else "linear", pretrained=False)
        if word.partition(":")[0] not in METHOD_TRAITS:
            raise InputError(unknown("method", word, [*METHOD_TRAITS, *BASELINES]))
        found = MethodKey.parse(word)
        label = found.traits.label + ("" if found.rho is None else f" ρ={found.rho:g}")
        return cls(found.key, label, found.method, found.rho)

    @property
    def adapts(self) -> bool:
        """Whether it has adapters, and so a rank."""
        return self.method is not None and METHOD_TRAITS[self.method].adapts


@dataclass(frozen=True)
class Job:
    """One run; its fields are its ``config.yaml``.

    Attributes:
        variant: Key of the method.
        phase: ``"tuning"``: trained on 800 images, looked at on 200; ``"final"``: on 1,000, looked at on the others.
        lr: Peak learning rate.
        seed: Of head, order of images and random parts of initialisations; not of the images.
        epochs, warmup_epochs, batch_size, weight_decay, rank, alpha: As in ``python -m experiments.vtab run``.
        looks: Epochs after which the held-out images are looked at, besides the last one.
        split_seed, train_images, validation_images: Which images.
        digest: Of the pre-trained weights.
        root, output, weights: Where things are.
    """

    variant: str
    phase: Literal["tuning", "final"]
    lr: float
    seed: int
    epochs: int
    warmup_epochs: float
    batch_size: int
    weight_decay: float
    rank: int
    alpha: float
    looks: tuple[int, ...]
    split_seed: int
    train_images: int
    validation_images: int
    digest: str
    root: str
    output: str
    weights: str

    @property
    def folder(self) -> RunFolder:
        """Where its figures go, and whether they are there."""
        name = f"{self.variant.replace(':', '-rho')}-lr{self.lr:g}-seed{self.seed}"
        config = {**asdict(self), "looks": list(self.looks)}
        return RunFolder(
            Path(self.output) / ("runs" if self.phase == "final" else self.phase) / name, config, INCIDENTAL
        )

    @property
    def text(self) -> str:
        """One line that tells it from the others."""
        return f"{Variant.parse(self.variant).label}, lr {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended: with metrics, or with what went wrong."""

    job: Job
    metrics: dict[str, Any] | None
    error: str | None = None


@functools.lru_cache(maxsize=1)
def halves(root: str, seed: int, train: int, validation: int) -> Halves:
    """The images, read once per process."""
    from experiments.vtab.transfer_data import read_images, split_halves

    return split_halves(read_images(root), seed, train, validation)


@functools.lru_cache(maxsize=2)
def data_of(
    phase: str, root: str, output: str, seed: int, train: int, validation: int
) -> tuple[SplitDataset, SplitDataset, int]:
    """Images to train on, images to look at, and the number of classes; decoded once, read once per process."""
    from experiments.vtab.transfer_data import decoded
    from experiments.vtab.transfer_model import IMAGE_SIZE

    found = halves(root, seed, train, validation)
    pair = (found.tuning, found.validation) if phase == "tuning" else (found.train, found.test)
    first, second = (decoded(split, IMAGE_SIZE, Path(output) / "cache") for split in pair)
    return first, second, found.classes[1]


def run(job: Job) -> dict[str, Any]:
    """The metrics of a job, also written to its folder.

    ``looks`` has one row per look (``epoch``, ``loss``, ``accuracy``, ``class_accuracy``), the last one after training;
    ``seconds`` are those of the processor, looks included.
    """
    import lightning as L

    from eva_lightning.vision.backbone.weights import Weights
    from eva_lightning.vision.module import ImageClassifier
    from experiments.vtab.transfer_data import TransferData
    from experiments.vtab.transfer_model import IMAGE_SIZE, MODEL, HeldOut, quiet_trainer

    train, evaluation, classes = data_of(
        job.phase, job.root, job.output, job.split_seed, job.train_images, job.validation_images
    )
    variant = Variant.parse(job.variant)
    started, processor = time.perf_counter(), time.process_time()
    L.seed_everything(job.seed, workers=True, verbose=False)
    weights = Weights(pretrained=True, file=Path(job.weights), strict=True) if variant.pretrained else None
    module = ImageClassifier(
        MODEL,
        classes,
        IMAGE_SIZE,
        weights,
        lr=job.lr,
        weight_decay=job.weight_decay,
        warmup_epochs=job.warmup_epochs,
    )
    callbacks = prepare(variant, module, job)
    job.folder.start()
    looks = HeldOut(evaluation, {*job.looks, job.epochs})
    trainer = quiet_trainer(job.epochs, [*callbacks, looks])
    trainer.fit(module, datamodule=TransferData(train, job.batch_size, job.seed))
    metrics: dict[str, Any] = {
        "variant": job.variant,
        "phase": job.phase,
        "lr": job.lr,
        "seed": job.seed,
        "rank": job.rank if variant.adapts else None,
        "looks": looks.rows,
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "seconds": time.process_time() - processor,
        "elapsed_seconds": time.perf_counter() - started,
    }
    metrics |= _decomposition(callbacks)
    job.folder.finish(metrics)
    return metrics


def prepare(variant: Variant, module: Any, job: Job) -> list[L.Callback]:
    """Make `module` ready for a variant; returns the callbacks to train with."""
    from eva_lightning.callback import EVAInitCallback
    from eva_lightning.methods.vision import AdapterOptions, apply_method

    if variant.method is None:
        return []
    options = AdapterOptions(rank=job.rank, alpha=job.alpha, rho=variant.rho or 1.0, seed=job.seed)
    callbacks = apply_method(variant.method, module, options)
    for callback in callbacks:
        if isinstance(callback, EVAInitCallback):
            callback.verbose = False
    return callbacks


def _decomposition(callbacks: Sequence[L.Callback]) -> dict[str, Any]:
    """What EVA's streaming found and took, where there was one."""
    from eva_lightning.callback import EVAInitCallback

    state = next((callback.state for callback in callbacks if isinstance(callback, EVAInitCallback)), None)
    if state is None:
        return {}
    return {"ranks": dict(state.ranks), "init_seconds": state.seconds, "init_batches": state.n_batches}


def attempt(job: Job, run_one: Callable[[Job], dict[str, Any]] = run) -> Outcome:
    """Run a job in one thread; what goes wrong is written to its folder and handed back."""
    import torch

    from experiments.demo_runs import quiet

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    record = job.folder.path / "error.txt"
    try:
        with quiet():
            metrics = run_one(job)
    except Exception as error:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(traceback.format_exc(), encoding="utf-8")
        return Outcome(job, None, f"{type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads)
    record.unlink(missing_ok=True)
    return Outcome(job, metrics)


def run_all(
    jobs: Sequence[Job], pool: ProcessPoolExecutor | None, run_one: Callable[[Job], dict[str, Any]] = run
) -> Iterator[Outcome]:
    """Run `jobs` in `pool`, or here for None, giving each outcome as it comes. A failed job is an outcome, not an end.

    Args:
        jobs: What to run, in this order.
        pool: Processes, as :func:`experiments.runner.processes.worker_pool` makes them.
        run_one: A function of a module's top level.
    """
    if pool is None:
        yield from (attempt(job, run_one) for job in jobs)
        return
    for future in as_completed([pool.submit(attempt, job, run_one) for job in jobs]):
        yield future.result()
