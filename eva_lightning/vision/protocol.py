"""Where the authors' released vision pipeline differs from the paper's text, as one table of named fields.

The paper's text (sections 3, 4.4 and D.2) is the default. The authors' code is ``BenediktAlkin/vtab1k-pytorch`` on
GitHub, named by the paper's repository ``ml-jku/EVA``; file names below are of its folder ``src/vtab``. Programs read
the fields and never the name, so that a protocol of one's own is ``dataclasses.replace(PAPER, ...)``.

Two things that the text leaves open follow that code under both protocols: the learning rate is set at every step,
and EVA-whiten divides by the square root of the explained-variance ratio (:mod:`eva_lightning.initialization`). What
the released code does and no field follows is in ``Protocol.not_followed``, which commands print.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eva_lightning.adalora_schedule import ADALORA_SCHEDULE, AdaLoRASchedule
from eva_lightning.errors import InputError, check_choice

#: What the paper has for every method (sections 4.1 and D.2).
ALPHA, BATCH_SIZE = 1.0, 64


@dataclass(frozen=True)
class OnePassPCA:
    """Incremental PCA over a whole split, without a test of convergence (``trainers/eva_pca_trainer.py``).

    Attributes:
        split: What is decomposed, also for runs that train on more (``pipelines/peft/eva_pca/g14_ipcabs16k.yaml``).
        images: Images per forward pass.
        min_tokens: Forward passes are collected until a layer has so many tokens (``pca_batch_size``); what is left at
            the end is dropped, unless there was nothing else.
        components: Kept per layer, and competing for ranks, whatever r is: ρ is `components` / r.
    """

    split: str = "train800"
    images: int = 50
    min_tokens: int = 16_384
    components: int = 32

    def rho(self, rank: int, asked: float) -> float:
        """The ρ that lets all components compete for mean rank `rank`; 1, uniform ranks, where 1 is `asked` for.

        Raises:
            InputError: Fewer components than ranks.
        """
        if rank > self.components:
            raise InputError(
                f"this protocol decomposes every layer into {self.components} components, so rank must be at most "
                f"{self.components}, got {rank}"
            )
        return 1.0 if asked == 1 else self.components / rank


@dataclass(frozen=True)
class Protocol:
    """How a run is done beyond its hyperparameters; the defaults are the paper's text.

    Attributes:
        name: What ``--protocol`` calls it.
        split_fused: Adapt q, k, v and the two halves of SwiGLU separately. Authors: yes (``adapters/split_qkv.py``,
            ``adapters/split_swigluffn.py``); not in the text.
        decomposition: EVA's decomposition by one pass, or None to stream training batches until the components have
            converged (section 3.2, Algorithm 1). Authors: one pass (``trainers/eva_pca_trainer.py``).
        rescale_alpha: Keep α/r in layers whose rank changes, by rescaling α (section 4.1). Authors: α stays, so the
            update of a layer is scaled by α over its own rank (``adapters/lora_linear.py``, ``change_lora_rank``).
        schedule: Name of the learning-rate schedule in :data:`eva_lightning.optim.schedules.SCHEDULES`. The text:
            linear warm-up and cosine. Authors: the same but for the ends of the cosine
            (``schedules/warmup_cosine_schedule.py``).
        merged_evaluation: Test with adapters added to the weights and everything in fp32, whatever precision trained.
            Authors: yes (``adapters/lora_linear.py``, ``train``; no autocast in ``trainers/finetune_trainer.py``). The
            text: bfloat16, no word on merging.
        drop_last: Leave out the last, smaller batch of an epoch. Authors: yes (``trainers/finetune_trainer.py``), 12
            steps per epoch of 800 images and 15 of 1,000 at batch 64; not in the text.
        decay_matrices_only: No weight decay on biases and other parameters of one dimension. Authors: yes
            (``utils/param_groups.py``); the text: weight decay 0.05.
        head_init: How the head's weights are drawn: ``"normal"``, the text's; authors: ``"truncated"``
            (``trunc_normal_(std=2e-5)`` in ``models/dinov2_model.py``).
        batch_size: Method -> images per optimizer step, where not 64, with the learning rate times 64 over it. Authors:
            32 and twice the rate for FFT, LoRA, DoRA and EVA+DoRA, 64 for all others (``pipelines/peft/*.yaml``,
            ``optims/__init__.py``; their ``accumulation_steps: 2`` halves those 32). The text: 64.
        alpha: Method -> LoRA's α, where not 1. Authors: PEFT's default of 8 for the methods that come from PEFT
            (``g14_pissa.yaml``, ``g14_olora.yaml`` and ``g14_adalora.yaml`` name none). The text: 1 throughout.
        target_modules: Method -> layers that get adapters, where not every linear one but the head. Authors: q, k, v,
            output.dense, fc1 and fc2 for the methods that come from PEFT (``models/dinov2_peft_model.py``), here by
            timm's names.
        without_swiglu: Methods of `target_modules` for which a SwiGLU's layers are none of these: in transformers they
            were called weights_in and weights_out, so that in g/14 only q, k, v and output.dense are adapted.
        exclude: Method -> layers without adapters. Authors: q, k and v of the first block under EVA+DoRA
            (``g14_evadora_redist.yaml``).
        dora_by_column: DoRA freezes the magnitude and takes norms per input column, with the gradient through the norm
            (``adapters/dora_linear.py``; frozen in ``trainers/lora_trainer.py`` and ``eva_lora_trainer.py``). The
            text has DoRA from PEFT: trained, per output.
        adalora: AdaLoRA's schedule. Authors: tinit 0.1 T, tfinal 0.2 T, deltaT 10, orthogonality weight 0.1, which no
            loss contains; steps are counted from 0 (``trainers/peft_trainer.py``, ``finetune_trainer.py``,
            ``g14_adalora.yaml``). Both start at r + 4 ranks (section C.3).
        not_followed: What the code does, beyond the fields: sentences for whoever puts results side by side.
    """

    name: str
    split_fused: bool = False
    decomposition: OnePassPCA | None = None
    rescale_alpha: bool = True
    schedule: str = "cosine"
    merged_evaluation: bool = False
    drop_last: bool = False
    decay_matrices_only: bool = False
    head_init: str = "normal"
    batch_size: Mapping[str, int] = field(default_factory=dict)
    alpha: Mapping[str, float] = field(default_factory=dict)
    target_modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without_swiglu: tuple[str, ...] = ()
    exclude: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dora_by_column: bool = False
    adalora: AdaLoRASchedule = ADALORA_SCHEDULE
    not_followed: tuple[str, ...] = ()

    def batches_per_epoch(self, images: int, batch_size: int) -> int:
        """Optimizer steps of an epoch.

        Raises:
            InputError: The last batch is dropped and it is the only one.
        """
        if not self.drop_last:
            return -(-images // batch_size)
        if images < batch_size:
            raise InputError(
                f"this protocol drops the last, smaller batch of an epoch, and {images} training images are fewer than "
                f"batch_size {batch_size}: choose a smaller batch_size"
            )
        return images // batch_size


PAPER = Protocol("paper")

_BY_PEFT = ("adalora", "pissa", "olora")
_TARGETS = ("qkv.q", "qkv.k", "qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2")

_HEAD_OF_TRANSFORMERS = (
    "AdaLoRA, PiSSA and OLoRA there fine-tune transformers' DINOv2 (its own resampling of the position embedding), and "
    "their head reads [CLS] beside the mean of the patches, as the one for [CLS] alone is put on PEFT's wrapper, where "
    "nothing calls it; here timm's model and a head on [CLS]"
)
_LOST_RANKS = (
    "EVA+DoRA's layers without adapters take part in the distribution of ranks there, and their share is lost; here "
    "all ranks go to the other layers"
)
_OTHERS = "methods that have no pipeline there run as EVA does, at batch 64"

AUTHORS_CODE = Protocol(
    name="authors-code",
    split_fused=True,
    decomposition=OnePassPCA(),
    rescale_alpha=False,
    schedule="cosine-authors",
    merged_evaluation=True,
    drop_last=True,
    decay_matrices_only=True,
    head_init="truncated",
    batch_size=dict.fromkeys(("fft", "lora", "dora", "eva-dora"), 32),
    alpha=dict.fromkeys(_BY_PEFT, 8.0),
    target_modules=dict.fromkeys(_BY_PEFT, _TARGETS),
    without_swiglu=_BY_PEFT,
    exclude={"eva-dora": ("blocks.0.attn.qkv",)},
    dora_by_column=True,
    adalora=AdaLoRASchedule(final=0.2, every=10, penalty=0.1, penalises=False, first_step=0),
    not_followed=(_HEAD_OF_TRANSFORMERS, _LOST_RANKS, _OTHERS),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (PAPER, AUTHORS_CODE)}


def get_protocol(name: str) -> Protocol:
    """The protocol called `name`.

    Raises:
        InputError: No such protocol; names the nearest.
    """
    check_choice("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def explain(protocol: Protocol, method: str, alpha: float | None, batch: int | None, layers: bool) -> list[str]:
    """What `protocol` means for `method`, in a few sentences: what it sets, and what the user's options override.

    Args:
        protocol: None is said of one that sets nothing by method.
        method: A name in the method registry.
        alpha, batch: The user's; None: not given.
        layers: Whether the user gave layers to adapt.
    """
    said = []
    if method in protocol.batch_size:
        own = protocol.batch_size[method]
        rate = f"the learning rate times {BATCH_SIZE / own:g}"
        if batch is None:
            said.append(f"batch {own} and {rate}")
        else:
            said.append(f"batch {batch} and the learning rate as given, instead of {own} and {rate}")
    elif protocol.batch_size and batch is not None:
        said.append(f"batch {batch} as given, instead of {BATCH_SIZE}, and the learning rate as given")
    if method in protocol.alpha:
        own_alpha = protocol.alpha[method]
        said.append(f"alpha {own_alpha:g}" if alpha is None else f"alpha {alpha:g} as given, instead of {own_alpha:g}")
    if method in protocol.target_modules:
        names = ", ".join(protocol.target_modules[method])
        names += " (but no SwiGLU's)" if method in protocol.without_swiglu else ""
        said.append(f"layers as given, instead of {names}" if layers else f"adapters on {names}")
    if method in protocol.exclude and not layers:
        said.append(f"none on {', '.join(protocol.exclude[method])}")
    if protocol.dora_by_column and method in ("dora", "eva-dora"):
        said.append("a frozen magnitude and norms per input column")
    if method == "adalora" and protocol.adalora != ADALORA_SCHEDULE:
        said.append(protocol.adalora.text)
    return [f"protocol {protocol.name}, {method}: {'; '.join(said)}"] if said else []


def module_options(protocol: Protocol) -> dict[str, Any]:
    """The fields that an :class:`~eva_lightning.vision.module.ImageClassifier` takes."""
    return {
        "split_fused": protocol.split_fused,
        "schedule": protocol.schedule,
        "decay_matrices_only": protocol.decay_matrices_only,
        "head_init": protocol.head_init,
    }
