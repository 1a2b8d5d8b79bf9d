"""What one run of the demo is: pre-train a small ViT once, fine-tune it by one method with one seed, keep the result.

Everything here is a function of the settings it is given, and its result is kept in a file named after a hash of those
settings, the code and the library versions. A rerun therefore finds what is already there, and nothing stale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from eva_lightning.errors import InputError
from eva_lightning.vision.digits import DigitsClassifier, DigitsDataModule, small_vit

METHODS = {"full": "Full fine-tuning", "lora": "LoRA", "eva_rho1": "EVA ρ=1", "eva_rho2": "EVA ρ=2"}
ADAPTERS = tuple(method for method in METHODS if method != "full")
_RHO = {"eva_rho1": 1.0, "eva_rho2": 2.0}
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Pretraining:
    """Recipe of the model that every method starts from."""

    classes: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 1e-3
    test_share: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """Settings of one fine-tuning run. ``seed`` draws labels, head, batch order and LoRA's random matrices."""

    method: str
    learning_rate: float
    seed: int
    classes: tuple[int, ...] = (5, 6, 7, 8, 9)
    n_labels: int = 200
    epochs: int = 10
    batch_size: int = 32
    rank: int = 4
    evaluate_on: str = "test"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")


@dataclass
class RunResult:
    """Outcome of one run; ``loss`` and ``accuracy`` hold one held-out value per epoch.

    ``setup_seconds`` is the time from the ready pre-trained model to the first training step: adapters, streaming SVD
    and Lightning's own start. ``eva`` is empty for methods without a decomposition.
    """

    run: Run
    loss: list[float]
    accuracy: list[float]
    trainable_parameters: int
    setup_seconds: float
    seconds: float
    eva: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the demo's reader cannot act on out of its output.

    That is Lightning's start-up messages and advice about workers and loggers, and what bitsandbytes, which PEFT
    imports where it is installed, says about kernels that nothing here uses.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def versions() -> dict[str, str]:
    """Versions of the libraries whose behaviour the figures depend on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "lightning", "peft", "timm", "scikit-learn")}


def code_fingerprint(paths: Sequence[Path]) -> str:
    """Hash of the given source files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _key(settings: Any, paths: Sequence[Path], **extra: Any) -> str:
    material = {
        "settings": dataclasses.asdict(settings),
        "code": code_fingerprint(paths),
        "versions": versions(),
        **extra,
    }
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:16]


def pretraining_key(recipe: Pretraining) -> str:
    """Name of the cached model: recipe, the code of data and model, and library versions."""
    return _key(recipe, [_ROOT / "eva_lightning" / "vision" / "digits.py"])


def run_key(run: Run, recipe: Pretraining) -> str:
    """Name of a run's result: its settings, the model it starts from, the code that trains it and library versions."""
    package = _ROOT / "eva_lightning"
    unused = {package / name for name in ("vision", "rl", "plots.py", "analysis.py")}
    sources = [path for path in package.rglob("*.py") if path not in unused and unused.isdisjoint(path.parents)]
    return _key(run, [*sources, Path(__file__)], pretraining=pretraining_key(recipe))


def _replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _trainer(epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _fit(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
    """``trainer.fit``, but Ctrl-C arrives as KeyboardInterrupt rather than as Lightning's ``sys.exit(1)``."""
    try:
        trainer.fit(module, data)
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


class _Recorder(L.Callback):
    """Held-out values after every epoch, and the state of affairs at the first training step."""

    def __init__(self, on_epoch: Callable[[int, float], None] | None = None) -> None:
        self.loss: list[float] = []
        self.accuracy: list[float] = []
        self.trainable_parameters = 0
        self.first_step_at = 0.0
        self._on_epoch = on_epoch

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.first_step_at = time.perf_counter()
        self.trainable_parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.loss.append(float(trainer.callback_metrics["val_loss"]))
        self.accuracy.append(float(trainer.callback_metrics["val_accuracy"]))
        if self._on_epoch is not None:
            self._on_epoch(len(self.loss), self.accuracy[-1])


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Compute on one thread: the model is too small for two to pay, and sums come out the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Pretrained:
    """Where the pre-trained model lies and what it cost and reached when it was trained."""

    path: Path
    accuracy: float
    seconds: float


def pretrained_path(recipe: Pretraining, cache: Path) -> Path:
    """File that holds, or will hold, the pre-trained weights."""
    return cache / f"pretrained-{pretraining_key(recipe)}.safetensors"


def load_pretrained(recipe: Pretraining, cache: Path) -> Pretrained | None:
    """The cached model, or None where there is none."""
    path = pretrained_path(recipe, cache)
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return Pretrained(path, float(metadata["accuracy"]), float(metadata["seconds"]))


def pretrain(recipe: Pretraining, cache: Path, on_epoch: Callable[[int, float], None] | None = None) -> Pretrained:
    """Train the starting model and keep it under ``cache``. ``on_epoch(epoch, held-out accuracy)`` follows progress."""
    start = time.perf_counter()
    L.seed_everything(recipe.seed, verbose=False)
    data = DigitsDataModule(
        recipe.classes,
        n_labels=None,
        batch_size=recipe.batch_size,
        shift=True,
        seed=recipe.seed,
        tune_share=0.0,
        test_share=recipe.test_share,
    )
    module = DigitsClassifier(small_vit(len(recipe.classes)), recipe.learning_rate)
    recorder = _Recorder(on_epoch)
    with quiet(), single_thread():
        _fit(_trainer(recipe.epochs, [recorder]), module, data)
    seconds = time.perf_counter() - start
    path = pretrained_path(recipe, cache)
    metadata = {"accuracy": repr(recorder.accuracy[-1]), "seconds": repr(seconds)}
    _replace_atomically(path, lambda file: save_file(module.model.state_dict(), file, metadata))
    return Pretrained(path, recorder.accuracy[-1], seconds)


def _starting_model(weights: Path, n_classes: int, n_pretraining_classes: int) -> nn.Module:
    from safetensors.torch import load_file

    model = small_vit(n_pretraining_classes)
    model.load_state_dict(load_file(weights))
    model.reset_classifier(n_classes)
    head = model.get_classifier()
    # The paper's head for VTAB-1K (section 4.4): N(0, 2e-5) and zero bias, so that all classes start out equal.
    nn.init.normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    return model


def finetune(run: Run, weights: Path, n_pretraining_classes: int = 5) -> RunResult:
    """Fine-tune the model in ``weights`` as ``run`` says and return the held-out curve."""
    start = time.perf_counter()
    L.seed_everything(run.seed, verbose=False)
    data = DigitsDataModule(
        run.classes, n_labels=run.n_labels, evaluate_on=run.evaluate_on, batch_size=run.batch_size, seed=run.seed
    )
    module = DigitsClassifier(_starting_model(weights, len(run.classes), n_pretraining_classes), run.learning_rate)
    recorder = _Recorder()
    callbacks: list[L.Callback] = [recorder]
    eva = None
    setup_start = time.perf_counter()
    with quiet(), single_thread():
        if run.method == "lora":
            from eva_lightning.adapters import inject

            inject(module, r=run.rank, alpha=1.0, bias="all")
        elif run.method in _RHO:
            from eva_lightning import EVAInitCallback, StreamingOptions

            eva = EVAInitCallback(
                rho=_RHO[run.method],
                r=run.rank,
                lora={"bias": "all"},
                streaming=StreamingOptions(seed=run.seed),
                verbose=False,
            )
            callbacks.append(eva)
        _fit(_trainer(run.epochs, callbacks), module, data)
    return RunResult(
        run=run,
        loss=recorder.loss,
        accuracy=recorder.accuracy,
        trainable_parameters=recorder.trainable_parameters,
        setup_seconds=recorder.first_step_at - setup_start,
        seconds=time.perf_counter() - start,
        eva={} if eva is None else _describe(eva.state),
    )


def _describe(state: Any) -> dict[str, Any]:
    """The part of an EVAState that the report draws, as plain JSON types."""
    return {
        "ranks": dict(state.ranks),
        "explained_variance_ratio": {name: ratio.tolist() for name, ratio in state.explained_variance_ratio.items()},
        "convergence": {name: [[int(t), float(q)] for t, q in curve] for name, curve in state.convergence.items()},
        "converged": {name: bool(flag) for name, flag in state.converged.items()},
        "n_batches": int(state.n_batches),
        "seconds": float(state.seconds),
    }


def result_path(run: Run, recipe: Pretraining, folder: Path) -> Path:
    """File that holds, or will hold, the result of ``run``."""
    return folder / f"{run.method}-seed{run.seed}-{run_key(run, recipe)}.json"


def save_result(result: RunResult, path: Path) -> None:
    """Write ``result`` as JSON; an interrupted write leaves no file."""
    text = json.dumps(dataclasses.asdict(result), indent=1)

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    _replace_atomically(path, write)


def load_result(path: Path) -> RunResult | None:
    """Read what :func:`save_result` wrote; None where there is nothing."""
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    settings = content.pop("run")
    return RunResult(run=Run(**{**settings, "classes": tuple(settings["classes"])}), **content)


def finetune_to_file(run: Run, weights: Path, path: Path, n_pretraining_classes: int = 5) -> RunResult:
    """:func:`finetune`, and keep the result at once, so that finished work survives whatever happens to the others."""
    result = finetune(run, weights, n_pretraining_classes)
    save_result(result, path)
    return result
