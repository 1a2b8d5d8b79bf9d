"""Vision backbones: any timm model with a linear head, DINOv2 under its short names."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from eva_lightning._suggest import unknown

from .weights import Weights

#: Short names of the models in the EVA paper (section 4.4) -> timm.
ALIASES: dict[str, str] = {
    "dinov2_s14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_b14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_l14": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_g14": "vit_giant_patch14_dinov2.lvd142m",
}

#: Standard deviation of the head's weights at the start (EVA paper, section D.2).
HEAD_STD = 2e-5


def resolve_model(name: str) -> str:
    """timm's name of a model given by alias or timm name.

    Raises:
        ValueError: No such model, or no such set of weights (the part after the dot); names the nearest.
    """
    import timm

    model = ALIASES.get(name, name)
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(unknown("model", name, [*ALIASES, *timm.list_models()], list_all=False))
    if tag:
        known = timm.list_pretrained(f"{architecture}.*")
        if model not in known:
            raise ValueError(unknown("pre-trained model", name, known))
    return model


def create_backbone(name: str, num_classes: int, image_size: int = 224, weights: Weights | None = None) -> nn.Module:
    """Build a timm model with a fresh linear head on its pooled feature ([CLS] for DINOv2 and plain ViTs).

    Head weights are drawn from N(0, 2e-5), its bias is 0 (EVA paper, section D.2).

    Args:
        name: Alias or timm name.
        num_classes: Outputs of the head.
        image_size: Height and width of the input, in pixels; position embeddings are resampled to it.
        weights: Resolved weights; random for None.

    Returns:
        Module from images ``(B, 3, image_size, image_size)`` to logits ``(B, num_classes)``.

    Raises:
        ValueError: Unknown model, image size no multiple of the patch size, unreadable weight file, weights of another
            architecture (the message names keys), or a model without a linear head.
    """
    import timm
    from timm.models import get_pretrained_cfg

    model_name = resolve_model(name)
    weights = weights or Weights(pretrained=False)
    config = get_pretrained_cfg(model_name)
    options: dict[str, Any] = {}
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    if weights.file is None and not weights.pretrained:
        try:
            model = timm.create_model(model_name, num_classes=num_classes, **options)
        except (AssertionError, ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"{name} cannot be built for images of {image_size} pixels: {error}") from error
    elif weights.file is None:
        model = timm.create_model(model_name, pretrained=True, num_classes=num_classes, **options)
    elif weights.strict:
        model = _with_file(model_name, weights, config.classifier if config is not None else None, options)
        model.reset_classifier(num_classes)  # type: ignore[operator]  # every timm model has it
    else:
        overlay = {"file": str(weights.file), "custom_load": False}
        model = timm.create_model(
            model_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes, **options
        )
    _check_patches(model, name, image_size)
    _initialise_head(model, name)
    return model


def classifier_name(model: nn.Module) -> str:
    """Name of the output layer within a timm model, such as ``"head"`` or ``"head.fc"``."""
    head = model.get_classifier()  # type: ignore[operator]  # every timm model has it
    return next(name for name, module in model.named_modules() if module is head)


def _with_file(model_name: str, weights: Weights, classifiers: Any, options: dict[str, Any]) -> nn.Module:
    """Load a user's file strictly: with a head of another size, timm would accept any file and load what fits."""
    import timm
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(weights.file))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"weight file {weights.file} cannot be read ({reason}): download it again") from None
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers or ():
        for parameter in ("weight", "bias"):
            state.pop(f"{classifier}.{parameter}", None)
    overlay = {"state_dict": state, "num_classes": 0, "custom_load": False}
    try:
        return timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **options)
    except (RuntimeError, KeyError, AttributeError, AssertionError, ValueError) as error:
        raise ValueError(f"weight file {weights.file} is not of {model_name}: {_disagreement(error)}") from error


def _disagreement(error: Exception) -> str:
    """The first keys that PyTorch's strict loading objects to, in one phrase."""
    text = str(error)
    phrases = []
    for kind, label in (("Missing key", "it lacks"), ("Unexpected key", "it has the surplus")):
        found = re.search(rf"{kind}\(s\) in state_dict: (.*?)\.\s*(?:\n|$)", text, flags=re.DOTALL)
        if found:
            keys = re.findall(r'"([^"]+)"', found.group(1))
            phrases.append(f"{label} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""))
    sizes = re.findall(r"size mismatch for (\S+): .*?shape torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", text)
    if sizes:
        key, theirs, ours = sizes[0]
        more = f" and {len(sizes) - 1} more of another shape" if len(sizes) > 1 else ""
        phrases.append(f"{key} has shape {theirs} where {ours} is needed{more}")
    return "; ".join(phrases) or (text.splitlines()[0] if text else type(error).__name__)


def _check_patches(model: nn.Module, name: str, image_size: int) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    size = patch[0] if isinstance(patch, tuple) else patch
    if isinstance(size, int) and image_size % size:
        below = image_size // size * size
        near = f"{below} or {below + size}" if below else f"{size}"
        raise ValueError(
            f"image size must be a multiple of {name}'s patch size {size} (such as {near}), got {image_size}"
        )


def _initialise_head(model: nn.Module, name: str) -> None:
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{name} has no linear head (its classifier is {type(head).__name__}): choose another model")
    nn.init.normal_(head.weight, std=HEAD_STD)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
