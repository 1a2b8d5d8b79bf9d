"""One initialisation at a time, as a user runs it: plain forward, our callback in a real Trainer, PEFT."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast
from unittest import mock

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eva_lightning import streaming
from eva_lightning.batch_forward import run_forward
from eva_lightning.callback import EVAInitCallback
from eva_lightning.capture import InputCapture
from eva_lightning.side_effects import observing
from eva_lightning.streaming_options import StreamingOptions
from eva_lightning.training_batches import set_up_loader, training_batches
from experiments.runner.run_folder import _LOGGERS

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Timing:
    """Wall seconds, and processor seconds of all threads, which other processes on the machine disturb less."""

    wall: float
    cpu: float


@dataclass
class Outcome:
    """What one initialisation gave.

    Attributes:
        timing: the initialisation alone; LoRA layers are made before it, for us and for PEFT alike.
        n_batches: minibatches that went into the decompositions.
        n_forwards: minibatches that went through the model (PEFT looks at one more).
        stopped: whether it stopped by itself, not at the cap.
        components: per layer, up to round(r * rho) rows.
        fingerprint: a checksum of the ranks and of every A.
        streaming_seconds: the part of the wall time that :class:`~eva_lightning.EVAState` reports.
        state_bytes: predicted and real size of the engines' state.
    """

    timing: Timing
    n_batches: int
    n_forwards: int
    stopped: bool
    components: dict[str, Tensor] = field(repr=False)
    fingerprint: str
    streaming_seconds: float | None = None
    state_bytes: tuple[int, int] | None = None


class Stopwatch:
    """Wall and processor time; on a GPU the wall time between events in its stream, which is idle at the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._event = self._record()
        self._started = time.perf_counter(), time.process_time()

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self) -> Timing:
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        if self._event is not None:
            end = self._record()
            end.synchronize()
            wall = self._event.elapsed_time(end) / 1e3
        return Timing(wall, cpu)


@dataclass(frozen=True)
class Runner:
    """Runs initialisations of copies of one classifier on one list of minibatches.

    Args:
        classifier: LightningModule without adapters; never changed.
        batches: minibatches in memory, already collated.
        device: "cpu" or "cuda".
        precision: of the Trainer.
        r, rho: as for the callback.
    """

    classifier: pl.LightningModule
    batches: Sequence[Batch]
    device: torch.device
    precision: str = "32-true"
    r: int = 16
    rho: float = 2.0

    def forward(self, n_batches: int) -> list[Timing]:
        """The plain forward of the first minibatches, on the trainer's path; element i: time of the first i + 1."""
        timings: list[Timing] = []

        class Forward(pl.Callback):
            def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                watch = Stopwatch(trainer.strategy.root_device)
                set_up_loader(trainer)
                with observing(pl_module), torch.no_grad():
                    for batch in training_batches(trainer, n_batches):
                        with trainer.precision_plugin.forward_context():
                            run_forward(pl_module, batch)
                        timings.append(watch.read())

        self._fit(copy.deepcopy(self.classifier), Forward())
        return timings

    def ours(self, max_batches: int, watch_engines: bool = False, **options: Any) -> Outcome:
        """Our callback's whole ``on_fit_start``: streaming with hooks, SVD, ranks, resize, optimizer rebuild.

        Args:
            max_batches: cap on the minibatches.
            watch_engines: also measure the state the engines hold; keeps them alive, so not while timing.
            options: further arguments of :class:`EVAInitCallback` and of its :class:`StreamingOptions`.
        """
        timings: list[Timing] = []

        class Timed(EVAInitCallback):
            def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                watch = Stopwatch(trainer.strategy.root_device)
                super().on_fit_start(trainer, pl_module)
                timings.append(watch.read())

        streaming = {field.name: options.pop(field.name) for field in fields(StreamingOptions) if field.name in options}
        options["streaming"] = StreamingOptions(**{"max_batches": max_batches, **streaming})
        callback = Timed(self.rho, self.r, verbose=False, **options)
        module = copy.deepcopy(self.classifier)
        captures: list[InputCapture] = []
        with _recorded_captures(captures) if watch_engines else contextlib.nullcontext():
            self._fit(module, callback)
        state = callback.state
        if state is None:
            raise RuntimeError("the callback left no state")
        return Outcome(
            timings[0],
            state.n_batches,
            state.n_batches,
            all(state.converged.values()),
            dict(state.components),
            _fingerprint(module, state.ranks),
            state.seconds,
            _state_bytes(captures[-1]) if captures else None,
        )

    def peft(self, max_batches: int, targets: Sequence[str], tau: float = 0.99) -> Outcome:
        """PEFT's ``get_eva_state_dict`` and ``initialize_lora_eva_weights`` on the same backbone and minibatches.

        PEFT has no cap on minibatches and loops until every component of every layer has converged. At `max_batches`
        its hooks are told that they have, which makes it finish in its own way with what it has. Batches are plain
        image tensors on the device already, hooks need no mask, and no progress bar is shown.
        """
        from peft import EvaConfig, LoraConfig, get_peft_model
        from peft.tuners.lora.eva import initialize_lora_eva_weights

        classifier = copy.deepcopy(self.classifier).to(self.device)
        if self.precision == "bf16-true":
            classifier.to(torch.bfloat16)
        dtype = next(classifier.parameters()).dtype
        prefix = "model."
        config = LoraConfig(
            r=self.r,
            lora_alpha=1,
            target_modules=[name.removeprefix(prefix) for name in targets],
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=self.rho, tau=tau),
        )
        model: Any = get_peft_model(cast(Any, classifier.model), config, low_cpu_mem_usage=True)
        images = [images.to(self.device, dtype) for images, _ in self.batches]
        loader = CappedLoader(images, model, max_batches)
        forwards = 0

        def forward(module: nn.Module, batch: Tensor) -> None:
            nonlocal forwards
            forwards += 1
            with _autocast(self.device, self.precision), torch.no_grad():
                module(batch)

        watch = Stopwatch(self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            initialize_lora_eva_weights(
                model,
                loader,
                forward_fn=forward,
                prepare_model_inputs_fn=lambda *_: None,
                prepare_layer_inputs_fn=None,
                show_progress_bar=False,
            )
        timing = watch.read()
        components = {
            prefix + name.removeprefix("base_model.model."): hook.svd.components_.cpu()
            for name, hook in loader.hooks.items()
        }
        fingerprint = _fingerprint(model, {})
        return Outcome(timing, forwards - 1, forwards, not loader.capped, components, fingerprint)

    def trainer(self, callback: pl.Callback) -> pl.Trainer:
        """A Trainer with `callback` that ends before the first training step."""
        return pl.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision=self.precision,  # type: ignore[arg-type]
            max_epochs=1,
            callbacks=[callback, _StopBeforeTraining()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def _fit(self, module: pl.LightningModule, callback: pl.Callback) -> None:
        with quiet():
            trainer = self.trainer(callback)
            try:
                trainer.fit(module, DataLoader(self.batches, batch_size=None))  # type: ignore[arg-type]
            except SystemExit:
                if trainer.interrupted:  # how Lightning ends on Ctrl-C
                    raise KeyboardInterrupt from None
                raise


class _StopBeforeTraining(pl.Callback):
    """Everything up to the first training step, and no step."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True  # before fit() it would be reset

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        raise RuntimeError("the benchmark must not train: this version of Lightning ignores should_stop")


class CappedLoader:
    """A loader for PEFT that ends its loop after a number of minibatches, and keeps an eye on its hooks.

    PEFT iterates twice: once for the minibatch that tells which inputs are equal, once for the decompositions, where it
    starts over whenever the minibatches end.
    """

    def __init__(self, images: Sequence[Tensor], model: nn.Module, cap: int) -> None:
        self._images = images
        self._model = model
        self._cap = cap
        self._passes = 0
        self.hooks: dict[str, Any] = {}
        self.capped = False

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Tensor]:
        self._passes += 1
        if self._passes == 1:
            return iter(self._images[:1])
        return self._endless()

    def _endless(self) -> Iterator[Tensor]:
        n = 0
        while True:
            self._find_hooks()
            if n >= self._cap:
                self.capped = True
                for hook in self.hooks.values():
                    hook.converged = torch.ones_like(hook.converged)
            yield self._images[n % len(self._images)]
            n += 1

    def _find_hooks(self) -> None:
        from peft.tuners.lora.eva import SVDHook

        for module in self._model.modules():
            for hook in module._forward_hooks.values():
                if isinstance(hook, SVDHook):
                    self.hooks[hook.name] = hook


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines and no warnings of Lightning on how to run faster."""
    import logging

    loggers = [
        logging.getLogger(name)
        for name in (*_LOGGERS, "lightning.fabric", "lightning.pytorch.utilities", "bitsandbytes")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return torch.autocast(device.type, dtypes[precision]) if precision in dtypes else contextlib.nullcontext()


@contextlib.contextmanager
def _recorded_captures(captures: list[InputCapture]) -> Iterator[None]:
    def record(*args: Any, **kwargs: Any) -> InputCapture:
        captures.append(InputCapture(*args, **kwargs))
        return captures[-1]

    with mock.patch.object(streaming, "InputCapture", record):
        yield


def _state_bytes(capture: InputCapture) -> tuple[int, int]:
    engines = [engine for name, engine in capture.engines.items() if name not in capture.owner]
    storages: dict[int, int] = {}
    for engine in engines:
        for tensor in _tensors(engine, set()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(engine.state_bytes for engine in engines), sum(storages.values())


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value), seen)


def _fingerprint(module: nn.Module, ranks: Mapping[str, int]) -> str:
    digest = hashlib.sha256(repr(sorted(ranks.items())).encode())
    for name, parameter in module.named_parameters():
        if "lora_A" in name:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def ratio_within(profile: Sequence[Mapping[str, Any]]) -> float:
    """Whole initialisation over forward from one profiled run; the forward is its time less that of our hooks.

    The profiler slows Python down and leaves kernels alone: an upper bound, but free of differences between runs.
    """
    seconds: dict[str, float] = {}
    for row in profile:
        if row["where"] != "builtin":
            name = row["function"]
            seconds[name] = max(seconds.get(name, 0.0), row["cumulative"])
    return seconds["on_fit_start"] / (seconds["no_grad_forward"] - seconds["observe"])


def profile_ours(run: Callable[[], object], top: int = 30) -> list[dict[str, Any]]:
    """Cumulative and own seconds per function of this package, and of torch's operators that take most, in `run`."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(run)
    rows = []
    for (file, line, name), (_, calls, own, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        ours = "eva_lightning" in file and "vision" not in file
        if ours or file == "~":
            where = f"{file.rsplit('eva_lightning', 1)[-1].lstrip('/')}:{line}" if ours else "builtin"
            rows.append({"function": name, "where": where, "calls": calls, "own": own, "cumulative": cumulative})
    rows.sort(key=lambda row: row["own"] if row["where"] == "builtin" else row["cumulative"], reverse=True)
    return rows[:top]
