"""All methods on real images without downloaded weights: ``python -m experiments.vtab transfer --root DIR``.

A small Vision Transformer is pre-trained on half of Caltech101's classes; then every method fine-tunes it on 1,000
images of the other half and is tested on the rest of that half, with the protocol of the EVA paper (section D.2)
scaled down. Learning rates are tuned for each method alone, by the loss on 200 of the 1,000 images after training on
the other 800, with seeds that the comparison does not use; the grid grows until the best learning rate lies inside.

Every run is a folder below OUTPUT: safe to interrupt; rerun to resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eva_lightning.methods import MethodKey
from experiments.comparisons.settings import MethodSettings
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, option

#: Methods that start from random weights, which show what the pre-trained ones are worth: key -> label.
NOT_PRETRAINED = {"scratch": "From scratch", "linear-random": "Linear, random weights"}


#: What is compared unless something else is asked for: those of docs/transfer.md.
COMPARED = (
    *NOT_PRETRAINED,
    *("linear", "fft", "lora", "dora", "rslora", "lora+", "adalora", "pissa", "milora", "olora", "corda", "lora-ga"),
    *("eva:1", "eva", "eva-dora", "eva-whiten", "eva-rotate", "eva-permute", "eva-minor", "lora-redistribute"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all runs of the comparison have in common."""

    root: str = option("vtab-1k", "folder that holds VTAB-1K's caltech101 folder", Role.PLACE)
    rank: int = option(4, "LoRA rank; EVA's mean rank per layer, so that all share one budget", Role.RESULT, at_least=1)
    alpha: float = option(1.0, "LoRA's alpha; its output is scaled by alpha / rank", Role.RESULT, at_least=0)
    epochs: int = option(6, "epochs of fine-tuning", Role.RESULT, at_least=1)
    warmup_epochs: float = option(0.6, "epochs of linear warm-up", Role.RESULT, at_least=0)
    batch_size: int = option(64, "images per step", Role.RESULT, at_least=1)
    weight_decay: float = option(0.05, "AdamW's weight decay", Role.RESULT, at_least=0)
    eval_epochs: tuple[int, ...] = option(
        (1, 2, 3), "epochs after which the test images are evaluated, besides the last", Role.RESULT, at_least=1
    )
    train_images: int = option(1000, "images to fine-tune on", Role.RESULT)
    validation_images: int = option(200, "how many of them are for tuning", Role.RESULT)
    split_seed: int = option(0, "which half of the classes, and which images", Role.RESULT)


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe, MethodSettings):
    """What to compare; the layout of ``configs/vtab/transfer.yaml``."""

    methods: tuple[str, ...] = option(
        COMPARED, f"methods, EVA's ρ behind a colon; {' and '.join(NOT_PRETRAINED)}: not pre-trained",
        Role.SELECTION,
    )  # fmt: skip
    seeds: int = option(6, "seeds per method, from 0", Role.SELECTION, at_least=1)
    grid: tuple[float, ...] = option((3e-3, 1e-2, 3e-2), "learning rates to try first", Role.SELECTION, above=0)
    extend: int = option(
        3, "most learning rates to add per method, beyond an edge of the grid that came out best", Role.SELECTION,
        at_least=0,
    )  # fmt: skip
    pretrain_epochs: int = option(60, "epochs of pre-training, on one core", Role.RESULT, at_least=1)
    output: str = option("runs/vtab-transfer", "folder for weights, runs and report", Role.PLACE)

    def key_and_label(self, text: str) -> tuple[str, str]:
        """A method of the vision half, or one that is not pre-trained."""
        word = text.strip()
        if word in NOT_PRETRAINED:
            return word, NOT_PRETRAINED[word]
        key = MethodKey.parse(word)
        return key.key, key.label

    @property
    def evaluated_epochs(self) -> tuple[int, ...]:
        """Epochs after which the test images are evaluated, the last included."""
        return tuple(sorted({epoch for epoch in self.eval_epochs if epoch < self.epochs} | {self.epochs}))

    @property
    def weights(self) -> Path:
        """File of the pre-trained weights."""
        return Path(self.output) / "pretraining" / "backbone.safetensors"

    @property
    def cache(self) -> Path:
        """Folder of decoded images."""
        return Path(self.output) / "cache"


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.vtab transfer",
    "Compare all methods on real images, without downloaded weights.",
    "experiments.comparisons.transfer_comparison:run",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
