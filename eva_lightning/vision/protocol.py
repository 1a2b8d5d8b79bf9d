"""Where the authors' released vision pipeline differs from the paper's text, as one table of named fields.

The paper's text (sections 3, 4.4 and D.2) is the default. The authors' code is ``BenediktAlkin/vtab1k-pytorch`` on
GitHub, named by the paper's repository ``ml-jku/EVA``; file names below are of its folder ``src/vtab``. Programs read
the fields and never the name, so that a protocol of one's own is ``dataclasses.replace(PAPER, ...)``.

Two things that the text leaves open follow that code under both protocols: the learning rate is set at every step,
and EVA-whiten divides by the square root of the explained-variance ratio (:mod:`eva_lightning.initialization`). Its
runs of DoRA and full fine-tuning at batch 32 and twice the learning rate are not followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eva_lightning.errors import InputError, check_choice


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
    """

    name: str
    split_fused: bool = False
    decomposition: OnePassPCA | None = None
    rescale_alpha: bool = True
    schedule: str = "cosine"
    merged_evaluation: bool = False
    drop_last: bool = False
    decay_matrices_only: bool = False

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

AUTHORS_CODE = Protocol(
    name="authors-code",
    split_fused=True,
    decomposition=OnePassPCA(),
    rescale_alpha=False,
    schedule="cosine-authors",
    merged_evaluation=True,
    drop_last=True,
    decay_matrices_only=True,
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (PAPER, AUTHORS_CODE)}


def get_protocol(name: str) -> Protocol:
    """The protocol called `name`.

    Raises:
        InputError: No such protocol; names the nearest.
    """
    check_choice("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def module_options(protocol: Protocol) -> dict[str, Any]:
    """The fields that an :class:`~eva_lightning.vision.module.ImageClassifier` takes."""
    return {
        "split_fused": protocol.split_fused,
        "schedule": protocol.schedule,
        "decay_matrices_only": protocol.decay_matrices_only,
    }
