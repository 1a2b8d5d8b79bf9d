"""Fine-tune a pre-trained vision model on a folder of images: ``eva-lightning finetune --data DIR --model dinov2_b14``.

A folder of class folders (or a split file) in; a page of results, a PEFT adapter and a merged timm model out.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from eva_lightning.errors import InputError
from eva_lightning.files import digest
from eva_lightning.methods.registry import METHODS, MethodKey, method_identity, method_names
from eva_lightning.names import check_name
from eva_lightning.vision.data.own_tasks import Drawing
from eva_lightning.vision.data.splits import TaskData, open_folder
from experiments.runner.command import SettingsCommand
from experiments.runner.options import PRECISIONS
from experiments.runner.settings import Role, check_settings, option
from experiments.vtab.settings import WEIGHTS_HELP, weights_identity
from experiments.vtab.settings import Settings as VTABSettings

PLACE, RESULT, PER_RUN, SELECTION = Role.PLACE, Role.RESULT, Role.PER_RUN, Role.SELECTION

#: Share of the epochs that the learning rate takes to rise.
WARMUP = 0.1
#: Learning rates that --tune may go on to, where the best of its grid lies at an edge.
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all runs of a fine-tuning share."""

    data: str = option(
        MISSING, "folder of images: CLASS/, or train/CLASS/ and test/CLASS/, or with a split file", PLACE
    )
    split_file: str | None = option(
        None, "table with the columns path, label and perhaps split; splits.csv in the folder if not given", PLACE
    )
    model: str = option("dinov2_s14", "timm name, or dinov2_s14, dinov2_b14, dinov2_l14, dinov2_g14", RESULT)
    weights: str = option("pretrained", WEIGHTS_HELP, RESULT, identity=weights_identity)
    method: str = option(
        "eva", ", ".join(method_names("vision")), RESULT, choices=method_names("vision"), identity=method_identity
    )
    rank: int = option(8, "LoRA rank; EVA's mean rank per layer", RESULT, at_least=1)
    rho: float = option(2.0, "EVA: largest rank over mean rank, at least 1 (1 keeps ranks uniform)", RESULT, at_least=1)
    target_modules: tuple[str, ...] | None = option(
        None, "layers to adapt, by name, last part of the name or module; none: every nn.Linear but the head",
        RESULT, omit_default=True,
    )  # fmt: skip
    epochs: int = option(10, "training epochs", RESULT, at_least=1)
    batch_size: int = option(32, "images per step", RESULT, at_least=1)
    weight_decay: float = option(0.05, "AdamW's weight decay", RESULT, at_least=0)
    image_size: int = option(224, "height and width of the images, in pixels", RESULT, at_least=1)
    hold_out: bool = option(
        True, "keep validation images out of the training, and evaluate them by epoch; false: train on them too", RESULT
    )
    test_share: float = option(
        0.25, "share of each class for the test, where the folder does not say", RESULT, above=0, below=1
    )
    val_share: float = option(
        0.2, "share of the other images of each class that validate, likewise", RESULT, above=0, below=1
    )
    split_seed: int = option(0, "another seed draws other test and validation images", RESULT, at_least=0)
    seed: int = option(0, "seed of head, data order and EVA's random parts", RESULT, at_least=0, below=2**32)
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, gpu, mps, ...", PLACE)
    precision: str = option(
        "auto", "auto (bf16-mixed on a GPU, else 32-true), or a Lightning precision", RESULT | PLACE, choices=PRECISIONS
    )
    workers: int = option(0, "image decoding threads", PLACE, at_least=0)
    cache: str | None = option(None, "folder for decoded images, or none; OUTPUT/cache if not given", PLACE)
    output: str = option("runs/finetune", "folder that holds the runs", PLACE)
    progress: bool = option(True, "show progress bars", PLACE)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def key(self) -> MethodKey:
        """The method with its ρ."""
        return MethodKey(self.method, self.rho if METHODS[self.method].redistributes else None)

    @property
    def drawing(self) -> Drawing:
        """How the folder is divided where it does not say."""
        file = None if self.split_file is None else Path(self.split_file).expanduser()
        return Drawing(self.test_share, self.val_share, self.split_seed, file)

    @property
    def cache_dir(self) -> Path | None:
        """Folder for decoded images, or None to do without."""
        if self.cache is None:
            return Path(self.output) / "cache"
        return None if self.cache == "none" else Path(self.cache)


@dataclass(frozen=True, kw_only=True)
class OneRun(Recipe):
    """Settings of one training; the layout of a run's ``config.yaml``."""

    lr: float = option(MISSING, "peak learning rate", RESULT | PER_RUN)
    images: str = option(MISSING, "digest of the lists of images and their sizes", RESULT)
    evaluation: str = option("test", "test, or val in tuning", RESULT, choices=("test", "val"))

    def as_vtab(self, task: str) -> VTABSettings:
        """The same training as ``python -m experiments.vtab`` has it: one piece of code does both.

        Position embeddings are resampled as timm does it, so that the adapter fits timm's own model.
        """
        return VTABSettings(
            root=self.data,
            task=task,
            model=self.model,
            weights=self.weights,
            pos_embed="timm",
            method=self.method,
            rank=self.rank,
            rho=self.rho,
            target_modules=self.target_modules,
            lr=self.lr,
            seed=self.seed,
            epochs=self.epochs,
            warmup_epochs=WARMUP * self.epochs,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            image_size=self.image_size,
            accelerator=self.accelerator,
            precision=self.precision,
            output=self.output,
            progress=self.progress,
            save_adapter=False,
        )


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """The options of the command."""

    lr: float = option(
        1e-3, "peak learning rate; for LoRA and EVA on DINOv2-S 1e-3 to 3e-3 were best, the higher the fewer steps",
        RESULT, above=0,
    )  # fmt: skip
    tune: bool = option(False, "choose the learning rate by the loss of the validation images instead", SELECTION)
    lrs: tuple[float, ...] = option((3e-4, 1e-3, 3e-3), "the rates that --tune begins with", SELECTION, above=0)
    name: str | None = option(None, "name of the run's folder; made of data, model, method and lr if not given", PLACE)
    overwrite: bool = option(False, "delete a run of this name first; else runs are resumed or reported", PLACE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None:
            check_name("name", self.name, setting="name")
        if self.tune and not self.lrs:
            raise InputError("lrs must hold at least one learning rate for --tune", setting="lrs")

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        if self.name is not None:
            return self.name
        folder = Path(self.data).expanduser().resolve().name or "images"
        adapter = f"-r{self.rank}" if self.key.adapts else ""
        adapter += f"-rho{self.rho:g}" if self.key.rho is not None else ""
        rate = "tuned" if self.tune else f"lr{self.lr:g}"
        name = f"{folder}-{self.model}-{self.method}{adapter}-{rate}-seed{self.seed}"
        # timm reads the path of a merged model as an address, which # and ? end
        return re.sub(r"[/:#?]", "_", name)

    def open(self) -> TaskData:
        """The folder, read and checked.

        Raises:
            MissingInputError, InputError: See :func:`~eva_lightning.vision.data.splits.open_folder`.
        """
        return open_folder(self.data, self.drawing, hold_out=self.hold_out)

    def one_run(self, lr: float, images: str, **own: Any) -> OneRun:
        """The settings of a training at `lr`."""
        shared = {item.name: getattr(self, item.name) for item in fields(Recipe)}
        return OneRun(**{**shared, "lr": lr, "images": images, **own})


def images_digest(data: TaskData) -> str:
    """What changes when an image is added, taken away, moved to another part or class, or has another size."""
    parts = [data.train, data.evaluation, *([] if data.validation is None else [data.validation])]
    lines = [
        [part.name, path, label, (part.folder / path).stat().st_size]
        for part in parts
        for path, label in zip(part.paths, part.labels, strict=True)
    ]
    return digest(lines)


COMMAND = SettingsCommand(
    Settings, "eva-lightning finetune", (__doc__ or "").splitlines()[0], "experiments.finetune.command:finetune"
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
