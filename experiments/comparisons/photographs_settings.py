"""Settings of the comparison on photographs; no torch is imported to read them."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from eva_lightning.errors import InputError
from eva_lightning.methods import MethodKey
from experiments.comparisons.tuned import TunedSettings
from experiments.runner.settings import Role, option

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all runs of a comparison share: the network, the images, and how adapters train."""

    root: str = option(str(ROOT / "experiments" / "assets"), "folder of the folder of images", Role.PLACE)
    task: str = option("ucmerced10", "folder of images, as python -m experiments.vtab reads it", Role.RESULT)
    model: str = option("dinov2_s14", "the network, a name of timm's", Role.RESULT)
    image_size: int = option(56, "height and width of the images in pixels", Role.RESULT, at_least=1)
    test_images: int | None = option(None, "test images; all if not given", Role.RESULT, at_least=1)
    epochs: int = option(5, "epochs of the learning-rate schedule", Role.RESULT, at_least=1)
    batch_size: int = option(32, "images per step", Role.RESULT, at_least=1)
    rank: int = option(8, "LoRA's rank and EVA's mean rank", Role.RESULT, at_least=1)
    warmup_epochs: float = option(0.5, "epochs of linear warm-up; cosine decay follows", Role.RESULT, at_least=0)
    weight_decay: float = option(0.05, "AdamW's weight decay", Role.RESULT, at_least=0)
    gradient_steps: int = option(14, "first steps whose gradient norms are noted", Role.RESULT, at_least=0)


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe, TunedSettings):
    """Settings of the comparison; the layout of ``configs/demo.yaml`` and ``configs/photographs.yaml``."""

    methods: tuple[str, ...] = option(("linear", "lora", "eva:1", "eva"), "methods to compare", Role.SELECTION)
    seeds: int = option(3, "runs per method", Role.SELECTION, at_least=1)
    evaluated: tuple[int, ...] = option((1, 2, 3), "epochs to evaluate after, and the last", Role.SELECTION, at_least=1)
    lrs: tuple[float, ...] = option((3e-4, 1e-3, 3e-3, 1e-2), "to choose from", Role.SELECTION, above=0)
    equal_rates: tuple[float, ...] = option((1e-3,), "learning rates that all methods share", Role.SELECTION, above=0)
    equal_methods: tuple[str, ...] | None = option(None, "methods compared at them; all if not given", Role.SELECTION)
    equal_epochs: int | None = option(
        None, "stop these runs after so many epochs of the schedule, for an early look", Role.SELECTION, at_least=1
    )
    weights: str = option("pretrained", "pretrained, none, or a file", Role.SELECTION)
    origin: str = option("", "what the weights are, in words", Role.SELECTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("methods", "equal_methods"):
            for method in getattr(self, name) or ():
                MethodKey.parse(method)
        if "lora" not in self.methods:
            raise InputError("methods must have lora, which the others are compared with", setting="methods")
        strange = next((m for m in self.equal_methods or () if m not in self.trained), None)
        if strange is not None:
            raise InputError(f"equal_methods must be among the methods that train adapters, got {strange}")

    @property
    def trained(self) -> tuple[str, ...]:
        """The methods that train more than the head."""
        return tuple(method for method in self.methods if MethodKey.parse(method).entry.trains != "head")

    @property
    def has_probe(self) -> bool:
        """Whether frozen features are among what is compared."""
        return len(self.trained) < len(self.methods)

    @property
    def shown(self) -> tuple[int, ...]:
        """Epochs that runs to the end are evaluated after."""
        wanted = {*self.evaluated, self.equal_epochs or self.epochs}
        return tuple(sorted({epoch for epoch in wanted if epoch < self.epochs} | {self.epochs}))

    @property
    def shown_early(self) -> tuple[int, ...]:
        """Epochs that the runs at equal rates are evaluated after."""
        stop = self.equal_epochs or self.epochs
        return tuple(epoch for epoch in self.shown if epoch <= stop)


@dataclass(frozen=True, kw_only=True)
class OneRun(Recipe):
    """Settings of one run. The seed draws the head, the order of images and LoRA's random matrices."""

    method: str = option(MISSING, "key of the method", Role.RESULT | Role.PER_RUN)
    lr: float = option(0.0, "peak learning rate", Role.RESULT | Role.PER_RUN)
    seed: int = option(0, "seed", Role.RESULT | Role.PER_RUN)
    evaluate_on: str = option("test", "split to evaluate on", Role.RESULT, choices=("test", "val200"))
    evaluated: tuple[int, ...] = option(MISSING, "epochs to evaluate after", Role.RESULT)
    stop_after: int | None = option(None, "epoch to stop after", Role.RESULT)
    weights: str = option(MISSING, "pretrained, none or a file", Role.PLACE)
    weights_digest: str = option("", "digest of that file", Role.RESULT)
    images: str = option("", "digest of the images", Role.RESULT)
    code: str = option("", "digest of code and library versions", Role.RESULT)
