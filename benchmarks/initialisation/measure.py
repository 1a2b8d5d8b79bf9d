"""Everything that ``python -m benchmarks init`` measures on one model after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.clock import Timing
from benchmarks.harness import Figure, describe_machine, publish, say
from benchmarks.initialisation import memory, peft_eva
from benchmarks.initialisation.report import print_tables
from benchmarks.initialisation.runner import Outcome, Runner
from benchmarks.initialisation.settings import Settings
from benchmarks.initialisation.variance import add_captured_variance
from benchmarks.models import build_classifier
from benchmarks.photographs import Images, make_images
from benchmarks.profiling import profile_ours
from eva_lightning.adapters.targets import find_targets
from experiments.vtab.settings import weights_in_words

PEFT = "PEFT"


def measure(settings: Settings) -> dict[str, Any]:
    """Measure all models; returns the JSON document."""
    device = settings.torch_device()
    before = describe_machine(device)
    models = [_Model.build(name, settings).measure() for name in settings.model_names]
    weights = weights_in_words(settings.weights) if settings.weights else "random, power-law spectra"
    return publish(
        {"models": models}, before, settings, lambda console: print_tables(models, settings, weights, console)
    )


@dataclass
class _Model:
    """One model, and what was run on it so far."""

    name: str
    settings: Settings
    images: Images
    runner: Runner
    targets: list[str]
    callbacks: dict[str, dict[str, Any]]
    forwards: list[list[Timing]] = field(default_factory=list)
    runs: dict[str, list[Outcome]] = field(default_factory=dict)

    @classmethod
    def build(cls, name: str, settings: Settings) -> _Model:
        """The model and its images."""
        say(f"{name}: building model and images")
        classifier = build_classifier(name, settings.image_size, settings.weights, settings.seed)
        targets, _ = find_targets(classifier, None, None, "auto")
        n_batches = settings.streamed + settings.heldout_batches
        images = make_images(settings.images, n_batches, settings.batch_size, settings.image_size, settings.seed)
        runner = Runner(
            classifier,
            images.batches[: settings.streamed],
            settings.torch_device(),
            settings.full_precision,
            settings.r,
            settings.rho,
        )
        callbacks = {f"ours ({engine})": arguments for engine, arguments in settings.callbacks().items()}
        return cls(name, settings, images, runner, targets, callbacks)

    def measure(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        say(f"{self.name}: warming up")
        load = describe_machine(self.runner.device)["load_average"]
        self.runner.forward(1)
        for arguments in self.callbacks.values():
            self.runner.ours(max_batches=2, **arguments)
        self._time()
        rows = [self._row(method) for method in self.runs]
        result = {
            "model": self.name,
            "parameters": sum(p.numel() for p in self.runner.classifier.parameters()),
            "layers": len(self.targets),
            "images": self.images.source,
            "load_average": load,
            "forward": {
                "n_batches": [len(run) for run in self.forwards],
                "wall": [[t.wall for t in run] for run in self.forwards],
                "cpu": [[t.cpu for t in run] for run in self.forwards],
            },
            "methods": rows,
        }
        outcomes = {method: runs[0] for method, runs in self.runs.items()}
        if not self.settings.no_reference:
            say(f"{self.name}: exact SVDs")
            heldout = self.images.batches[self.settings.streamed :]
            result["variance_in_top_32"] = add_captured_variance(rows, self.runner, self.targets, outcomes, heldout)
        if not self.settings.no_memory:
            result["memory_method"] = self._memory(rows)
        if self.settings.profile:
            result["profile"] = {method: self._profile(method) for method in self.callbacks}
        return result

    def _time(self) -> None:
        """Plain forwards, and between two of them every method once."""
        settings = self.settings
        n_forward = settings.batches
        for repeat in range(settings.repeats):
            say(f"{self.name}: repetition {repeat + 1} of {settings.repeats}")
            self.forwards.append(self.runner.forward(n_forward))
            for method, arguments in self.callbacks.items():
                outcome = self.runner.ours(max_batches=settings.batches, **arguments)
                self.runs.setdefault(method, []).append(outcome)
            n_forward = max(self.runs[method][0].n_batches for method in self.callbacks)
            if settings.most_peft_batches > 0 and repeat < settings.peft_repeats:
                outcome = peft_eva.initialise(self.runner, settings.most_peft_batches, self.targets, settings.tau)
                self.runs.setdefault(PEFT, []).append(outcome)
        self.forwards.append(self.runner.forward(n_forward))

    def _row(self, method: str) -> dict[str, Any]:
        """Times of one method, each over the mean of the plain forwards right before and right after it."""
        runs = self.runs[method]
        row: dict[str, Any] = {
            "name": method,
            "n_batches": runs[0].n_batches,
            "n_forwards": runs[0].n_forwards,
            "stopped_by_itself": runs[0].stopped,
            "bit_identical": len({run.fingerprint for run in runs}) == 1 if len(runs) > 1 else None,
            "fingerprint": runs[0].fingerprint,
        }
        for clock, seconds, ratio in (
            ("wall", "seconds", "over_forward"),
            ("cpu", "cpu_seconds", "over_forward_cpu"),
        ):
            times = [getattr(run.timing, clock) for run in runs]
            around = [
                (_forward_time(self.forwards[i], run.n_batches, clock)
                 + _forward_time(self.forwards[i + 1], run.n_batches, clock)) / 2
                for i, run in enumerate(runs)
            ]  # fmt: skip
            row[seconds] = Figure.of(times).document()
            row[ratio] = Figure.ratio(times, around).document()
            if method != PEFT and PEFT in self.runs:
                peft = Figure.of(getattr(run.timing, clock) for run in self.runs[PEFT])
                row[f"peft_over_ours{'' if clock == 'wall' else '_cpu'}"] = peft.median / row[seconds]["median"]
        if method != PEFT:
            row["streaming_seconds"] = [run.streaming_seconds for run in runs]
        return row

    def _memory(self, rows: Sequence[dict[str, Any]]) -> str:
        """Add peak memory over the plain forward; a few minibatches show the peak. Returns how it was measured."""
        few = min(4, self.settings.batches)
        for row in rows:
            say(f"{self.name}: memory of {row['name']}")
            call, arguments = "ours", {"max_batches": few, **self.callbacks.get(row["name"], {})}
            if row["name"] == PEFT:
                call = "peft"
                arguments = {"max_batches": min(few, self.settings.most_peft_batches), "targets": self.targets}
            row["peak_bytes"] = memory.peak_over_forward(self.runner, call, few, **arguments)
        return memory.CUDA_METHOD if self.runner.device.type == "cuda" else memory.CPU_METHOD

    def _profile(self, method: str) -> list[dict[str, Any]]:
        say(f"{self.name}: profile of {method}")
        return profile_ours(lambda: self.runner.ours(max_batches=self.settings.batches, **self.callbacks[method]))


def _forward_time(run: Sequence[Timing], n_batches: int, clock: str) -> float:
    """Time of the first `n_batches`, extrapolated at the mean rate where the plain forward ran fewer (PEFT's cap)."""
    if n_batches <= len(run):
        return float(getattr(run[n_batches - 1], clock))
    return float(getattr(run[-1], clock)) * n_batches / len(run)
