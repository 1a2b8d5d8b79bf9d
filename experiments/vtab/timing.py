"""How fast a model trains and evaluates on this device, by a few real steps, or by two of its blocks where it is large.

Where a full step would take too long (a ViT-g on a CPU), the model is built with one and with two blocks: the
difference is what a block costs, and the rest of the model is what remains. The batch is then smaller as well, and its
time scaled up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from eva_lightning.methods.apply import apply_method
from eva_lightning.methods.registry import METHODS
from eva_lightning.vision.module import ImageClassifier
from eva_lightning.vision.protocol import module_options
from experiments.runner.lightning_runs import on_gpu, trainer_precision
from experiments.vtab.run import left_out
from experiments.vtab.settings import Settings
from experiments.vtab.sizes import ModelSize

#: What all measurements together should take at most.
BUDGET_SECONDS = 30.0
#: The trainer's share: hooks, metrics, moving batches.
_TRAINER = 1.05
_CLASSES = 100
#: A backward pass is two forward passes.
_PASSES = 3


@dataclass(frozen=True)
class Speed:
    """Times in seconds, `memory` in bytes.

    Attributes:
        step: By method, of an optimizer step over one batch.
        image: Of evaluating one image.
        memory: On the GPU, the most any method's step took; None on a CPU.
        device: What it was measured on.
        how: What was measured, in one phrase.
    """

    step: dict[str, float]
    image: float
    memory: int | None
    device: str
    how: str


def cost_class(method: str) -> str:
    """The method that stands for `method` in measurements: however LoRA is initialised, its steps cost the same."""
    if method in ("linear", "fft", "adalora"):
        return method
    return "dora" if "dora" in method else "lora"


def measure(settings: Settings, methods: Iterable[str], size: ModelSize, rank: int) -> Speed:
    """Time steps of `methods` with the model, image size, batch and precision of `settings`, at LoRA rank `rank`."""
    device = torch.device("cuda" if on_gpu(settings.accelerator) else "cpu")
    wanted = {method: cost_class(method) for method in methods}
    batch = settings.batch // settings.accumulate
    bench = _Bench(settings, rank, device)
    classes = sorted(set(wanted.values()))
    if device.type == "cpu" and not bench.fits(size, batch, len(classes)):
        return bench.extrapolated(size, batch, wanted, classes)
    steps, memory = {}, 0
    forward = 0.0
    for method in classes:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps[method], forward = bench.times(method, batch, None)
        if device.type == "cuda":
            memory = max(memory, torch.cuda.max_memory_allocated())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Speed(
        {method: steps[like] * settings.accumulate * _TRAINER for method, like in wanted.items()},
        forward / batch,
        memory or None,
        name,
        f"whole steps of batch {batch} by {', '.join(classes)}",
    )


class _Bench:
    def __init__(self, settings: Settings, rank: int, device: torch.device) -> None:
        self.settings = settings
        self.rank = rank
        self.device = device
        precision = trainer_precision(settings.precision, settings.accelerator)
        self.autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        self.dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32

    def fits(self, size: ModelSize, batch: int, n: int) -> bool:
        """Whether whole steps of `n` methods stay within the budget, by one image through one block."""
        if not size.depth:
            return True
        _, forward = self.times("linear", 1, 1)
        return forward * size.depth * batch * _PASSES * 3 * n <= BUDGET_SECONDS

    def extrapolated(self, size: ModelSize, batch: int, wanted: dict[str, str], classes: list[str]) -> Speed:
        """From models of one and two blocks and a few images."""
        _, forward = self.times("linear", 1, 1)
        few = max(1, min(batch, int(BUDGET_SECONDS / len(classes) / (forward * 3 * 3 * _PASSES + 1e-9))))
        steps: dict[str, float] = {}
        image = 0.0
        deadline, unmeasured = time.monotonic() + BUDGET_SECONDS, []
        for method in sorted(classes, key=lambda name: name != "lora"):
            if steps and time.monotonic() > deadline:
                # a busy machine
                steps[method] = next(iter(steps.values()))
                unmeasured.append(method)
                continue
            (one, forward_one), (two, forward_two) = (self.times(method, few, depth) for depth in (1, 2))
            # noise must not make a block cost nothing
            steps[method] = one + (size.depth - 1) * max(two - one, one / 20)
            image = (forward_one + (size.depth - 1) * max(forward_two - forward_one, forward_one / 20)) / few
        scale = batch / few * self.settings.accumulate * _TRAINER
        return Speed(
            {method: steps[like] * scale for method, like in wanted.items()},
            image,
            None,
            f"CPU, {torch.get_num_threads()} threads",
            f"extrapolated from 1 and 2 of {size.depth} blocks and {few} of {batch} images, by {', '.join(classes)}"
            + (f" (no time for {', '.join(unmeasured)}: as the first one)" if unmeasured else ""),
        )

    def times(self, method: str, batch: int, depth: int | None) -> tuple[float, float]:
        """Seconds of a training step and of a forward pass."""
        module = self._module(method, depth)
        images = torch.randn(batch, 3, self.settings.image_size, self.settings.image_size, device=self.device)
        images = images.to(self.dtype)
        labels = torch.randint(_CLASSES, (batch,), device=self.device)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                loss = F.cross_entropy(module(images).float(), labels)
            loss.backward()
            optimizer.step()

        def forward() -> None:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None), torch.no_grad():
                module(images)

        return self._seconds(module.train(), step), self._seconds(module.eval(), forward)

    def _seconds(self, module: ImageClassifier, work: Callable[[], None]) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
            if times[0] > BUDGET_SECONDS / 10:
                break  # the first one, which warms up, is good enough where it takes seconds
        return min(times)

    def _module(self, method: str, depth: int | None) -> ImageClassifier:
        """With weights of noise: drawing those of a ViT-g as a model wants them takes longer than timing it."""
        settings = self.settings
        rules = settings.rules
        with torch.device("meta"):
            module = ImageClassifier(
                settings.model,
                _CLASSES,
                settings.image_size,
                position_embedding=settings.pos_embed,  # type: ignore[arg-type]
                model_options=None if depth is None else {"depth": depth},
                **module_options(rules),
            )
        module.to_empty(device=self.device)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.02)
        changed = replace(settings, method=method, eva_state=None)
        if METHODS[method].adapts:
            changed = replace(changed, rank=self.rank)
        apply_method(method, module, changed.adapter_options(), exclude=left_out(changed, module))
        return module.to(device=self.device, dtype=self.dtype)
