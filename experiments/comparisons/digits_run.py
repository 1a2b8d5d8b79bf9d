"""One run on handwritten digits: pre-train a small ViT on some of them, fine-tune it on others by one method."""

from __future__ import annotations

import sys
import time
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from eva_lightning.callback import EVAInitCallback
from eva_lightning.files import replacing
from eva_lightning.methods import MethodKey
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.methods.registry import DEFAULT_RHO
from eva_lightning.tensor_files import are_whole, read_tensors, write_tensors
from eva_lightning.vision.digits import DigitsClassifier, DigitsDataModule, small_vit
from experiments.comparisons.held_out import FirstStep, quick_trainer
from experiments.comparisons.source_digest import source_digest
from experiments.report.ranks import described
from experiments.runner.jobs import Job
from experiments.runner.lightning_runs import Divergence
from experiments.runner.run_folder import RunFolder, Work, perform
from experiments.runner.settings import Role, check_settings, option

PRETRAINING_CLASSES = (0, 1, 2, 3, 4)
CLASSES = (5, 6, 7, 8, 9)
PACKAGES = ("torch", "lightning", "peft", "timm", "scikit-learn")
_OF_A_RUN = Role.RESULT | Role.PER_RUN


@dataclass(frozen=True)
class PretrainingSettings:
    """Recipe of the model that every method starts from."""

    epochs: int = option(30, "epochs", Role.RESULT, at_least=1)
    batch_size: int = option(64, "images per step", Role.RESULT, at_least=1)
    lr: float = option(1e-3, "peak learning rate", Role.RESULT, above=0)
    test_share: float = option(0.2, "share of the images that is held out", Role.RESULT)
    seed: int = option(0, "seed of weights and batches", Role.RESULT)
    code: str = option("", "digest of code and library versions", Role.RESULT)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class RunSettings:
    """A fine-tuning. The seed draws the labels, the head, the order of batches and LoRA's random matrices."""

    method: str = option(MISSING, "method, such as lora or eva:1", _OF_A_RUN)
    lr: float = option(MISSING, "peak learning rate", _OF_A_RUN, above=0)
    seed: int = option(MISSING, "seed", _OF_A_RUN)
    weights: str = option(
        MISSING, "file of the pre-trained model, in a folder named after its recipe", Role.RESULT,
        identity=lambda path: Path(path).parent.name,
    )  # fmt: skip
    labels: int = option(200, "labelled images", Role.RESULT, at_least=1)
    epochs: int = option(10, "epochs", Role.RESULT, at_least=1)
    batch_size: int = option(32, "images per step", Role.RESULT, at_least=1)
    rank: int = option(4, "LoRA's rank and EVA's mean rank", Role.RESULT, at_least=1)
    evaluate_on: str = option("test", "part of the images to evaluate on", Role.RESULT, choices=("test", "tune"))
    code: str = option("", "digest of code and library versions", Role.RESULT)

    def __post_init__(self) -> None:
        check_settings(self)
        MethodKey.parse(self.method)


def code_of_runs() -> str:
    """Digest of what makes a fine-tuning."""
    sources = ["eva_lightning", "experiments/comparisons/held_out.py", "experiments/comparisons/digits_run.py"]
    return source_digest(sources, ["eva_lightning/vision", "eva_lightning/rl"], PACKAGES)


class Recorder(FirstStep):
    """Held-out values after every epoch, and the state of affairs at the first training step."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: list[float] = []
        self.accuracy: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the epoch's values."""
        self.loss.append(float(trainer.callback_metrics["val_loss"]))
        self.accuracy.append(float(trainer.callback_metrics["val_accuracy"]))


def pretrained_folder(output: str | Path, epochs: int) -> RunFolder:
    """The folder of the pre-trained model in `output`, named after its recipe and the code that makes it."""
    code = source_digest(["eva_lightning/vision/digits.py"], [], PACKAGES)
    recipe = PretrainingSettings(epochs=epochs, code=code)
    return RunFolder(Path(output) / f"pretrained-{RunFolder('', recipe).id}", recipe)


def weights_in(folder: RunFolder) -> Path:
    """The file of weights that :func:`pretrain_once` leaves."""
    return folder.path / "weights.safetensors"


def pretrain_once(folder: RunFolder) -> dict[str, Any]:
    """Pre-train into a folder of :func:`pretrained_folder`, unless that is done; its ``accuracy`` and ``seconds``.

    Where the weights are missing or damaged, it is done again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small for more, and sums come out the same everywhere
    try:
        lost = folder.result() is not None and not are_whole(weights_in(folder))
        return perform(folder, lambda: partial(pretrain, folder.settings), terminal=False, overwrite=lost)
    finally:
        torch.set_num_threads(threads)


def pretrain(settings: PretrainingSettings, folder: RunFolder) -> dict[str, Any]:
    """Train the starting model."""
    started = time.perf_counter()
    L.seed_everything(settings.seed, verbose=False)
    data = DigitsDataModule(
        PRETRAINING_CLASSES,
        n_labels=None,
        batch_size=settings.batch_size,
        shift=True,
        seed=settings.seed,
        tune_share=0.0,
        test_share=settings.test_share,
    )
    module = DigitsClassifier(small_vit(len(PRETRAINING_CLASSES)), settings.lr)
    recorder = Recorder()
    quick_trainer(settings.epochs, [recorder], progress=sys.stdout.isatty()).fit(module, data)
    with replacing(weights_in(folder)) as file:
        write_tensors(file, module.model.state_dict())
    return {"accuracy": recorder.accuracy[-1], "seconds": time.perf_counter() - started}


def build(job: Job) -> Work:
    """The fine-tuning of a job with :class:`RunSettings`."""
    return partial(finetune, job.settings)


def finetune(settings: RunSettings, folder: RunFolder) -> dict[str, Any]:
    """Fine-tune; returns the held-out curves. ``setup_seconds`` is the time until the first training step."""
    L.seed_everything(settings.seed, verbose=False)
    data = DigitsDataModule(
        CLASSES,
        n_labels=settings.labels,
        evaluate_on=settings.evaluate_on,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    module = DigitsClassifier(starting_model(settings.weights), settings.lr)
    key, started = MethodKey.parse(settings.method), time.perf_counter()
    options = AdapterOptions(rank=settings.rank, rho=key.rho or DEFAULT_RHO, seed=settings.seed)
    callbacks = apply_method(key.method, module, options)
    recorder, divergence = Recorder(), Divergence()
    trainer = quick_trainer(settings.epochs, [recorder, divergence, *callbacks])
    trainer.fit(module, data)
    states = [callback.state for callback in callbacks if isinstance(callback, EVAInitCallback)]
    return {
        "loss": recorder.loss,
        "accuracy": recorder.accuracy,
        "trainable_parameters": recorder.trainable_parameters,
        "setup_seconds": recorder.at - started,
        "eva": {} if not states or states[0] is None else described(states[0]),
        **divergence.metrics(trainer, module),
    }


def starting_model(weights: str | Path) -> nn.Module:
    """The pre-trained model with a new head for the digits 5-9."""
    model = small_vit(len(PRETRAINING_CLASSES))
    model.load_state_dict(read_tensors(weights)[0])
    model.reset_classifier(len(CLASSES))
    head = model.get_classifier()
    # The paper's head for VTAB-1K (section 4.4): N(0, 2e-5) and zero bias, so that all classes start out equal.
    nn.init.normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    return model
