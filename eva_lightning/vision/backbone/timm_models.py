"""Vision backbones: any timm model with a linear head, DINOv2 under its short names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from eva_lightning.errors import InputError, check_choice, unknown
from eva_lightning.side_effects import isolated_rng
from eva_lightning.vision.backbone.backbone_cache import built_or_copied
from eva_lightning.vision.backbone.position_embedding import (
    CHOICES,
    PositionEmbedding,
    differs_from_timm,
    resample_state,
)
from eva_lightning.vision.backbone.split_fused import split_fused
from eva_lightning.vision.backbone.weight_files import read_weights
from eva_lightning.vision.backbone.weights import Weights, download

#: Short names of the models in the EVA paper (section 4.4) -> timm.
ALIASES: dict[str, str] = {
    "dinov2_s14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_b14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_l14": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_g14": "vit_giant_patch14_dinov2.lvd142m",
}

#: Standard deviation of the head's weights at the start (EVA paper, section D.2).
HEAD_STD = 2e-5
_HEAD_INITS: dict[str, Callable[..., object]] = {"normal": nn.init.normal_, "truncated": nn.init.trunc_normal_}


def resolve_model(name: str) -> str:
    """timm's name of a model given by alias or timm name.

    Raises:
        InputError: No such model, or no such set of weights (the part after the dot); names the nearest.
    """
    model = ALIASES.get(name, name)
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise InputError(unknown("model", name, [*ALIASES, *timm.list_models()], list_all=False))
    if tag:
        known = timm.list_pretrained(f"{architecture}.*")
        if model not in known:
            raise InputError(unknown("pre-trained model", name, known))
    return model


def create_backbone(
    name: str,
    num_classes: int,
    image_size: int = 224,
    weights: Weights | None = None,
    *,
    position_embedding: PositionEmbedding = "official",
    split: bool = False,
    options: Mapping[str, Any] | None = None,
    head_init: str = "normal",
) -> nn.Module:
    """Build a timm model with a fresh linear head on its pooled feature ([CLS] for DINOv2 and plain ViTs).

    Head weights are drawn from N(0, 2e-5), its bias is 0 (EVA paper, section D.2). They alone come from torch's global
    generator: random weights of the backbone stand for pre-trained ones, and are the same whatever the seed of a run.

    Args:
        name: Alias or timm name.
        num_classes: Outputs of the head.
        image_size: Height and width of the input, in pixels; position embeddings are resampled to it.
        weights: Resolved weights; random for None.
        position_embedding: How: ``"official"`` resamples that of a DINOv2 without registers as its own code does, and
            all others as timm does; ``"timm"``: all as timm does
            (:mod:`eva_lightning.vision.backbone.position_embedding`).
        split: Take fused projections apart (:mod:`eva_lightning.vision.backbone.split_fused`).
        options: Further arguments for ``timm.create_model``, such as ``depth``.
        head_init: How the head's weights are drawn: ``"normal"``, or ``"truncated"`` (``torch.nn.init.trunc_normal_``
            at its default bounds: the same distribution but for what lies beyond 2, drawn in another way).

    Returns:
        Module from images ``(B, 3, image_size, image_size)`` to logits ``(B, num_classes)``.

    Raises:
        InputError: Unknown model, image size no multiple of the patch size, unreadable weight file, weights of another
            architecture (the message names keys), a model without a linear head, or without anything to split.
    """
    check_choice("position_embedding", position_embedding, CHOICES)
    check_choice("head_init", head_init, _HEAD_INITS)
    weights = weights or Weights(pretrained=False)
    options = dict(sorted((options or {}).items()))
    recipe = _Recipe(name, num_classes, image_size, weights, position_embedding, split, options)
    model = built_or_copied(repr(recipe), lambda: _build(recipe))
    _initialise_head(model, name, _HEAD_INITS[head_init])
    return model


@dataclass(frozen=True)
class _Recipe:
    """All that decides a backbone before its head is drawn: the arguments of :func:`create_backbone`."""

    name: str
    num_classes: int
    image_size: int
    weights: Weights
    position_embedding: PositionEmbedding
    split: bool
    options: Mapping[str, Any]


def _build(recipe: _Recipe) -> nn.Module:
    with isolated_rng():
        torch.manual_seed(0)
        model = _created(recipe)
    _check_patches(model, recipe.name, recipe.image_size)
    _call_fused_projections(model)
    if recipe.split:
        split_fused(model)
    return model


def _created(recipe: _Recipe) -> nn.Module:
    image_size, weights = recipe.image_size, recipe.weights
    model_name = resolve_model(recipe.name)
    config = get_pretrained_cfg(model_name)
    arguments = dict(recipe.options)
    if config is not None and config.fixed_input_size:
        arguments["img_size"] = image_size
    if not weights.pretrained:
        try:
            return timm.create_model(model_name, num_classes=recipe.num_classes, **arguments)
        except (AssertionError, ValueError, RuntimeError, TypeError) as error:
            raise InputError(f"{recipe.name} cannot be built for images of {image_size} pixels: {error}") from error
    official = recipe.position_embedding == "official" and differs_from_timm(model_name)
    file = weights.file
    if file is None and official and config is not None:
        # timm would resample on its way from the hub into the model
        file = download(config.hf_hub_id, config.hf_hub_filename)
    if file is None:
        return timm.create_model(model_name, pretrained=True, num_classes=recipe.num_classes, **arguments)
    state = read_weights(file)
    if official:
        state = resample_state(state, image_size)
    if not weights.strict:
        overlay = {"state_dict": state, "custom_load": False}
        return timm.create_model(
            model_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=recipe.num_classes, **arguments
        )
    classifiers = config.classifier if config is not None else None
    model = _with_weights(model_name, file, state, classifiers, arguments)
    model.reset_classifier(recipe.num_classes)  # type: ignore[operator]  # every timm model has it
    return model


def classifier_name(model: nn.Module) -> str:
    """Name of the output layer within a timm model, such as ``"head"`` or ``"head.fc"``."""
    head = model.get_classifier()  # type: ignore[operator]  # every timm model has it
    return next(name for name, module in model.named_modules() if module is head)


def _with_weights(
    model_name: str, file: Path, state: dict[str, Tensor], classifiers: Any, arguments: dict[str, Any]
) -> nn.Module:
    """Load a user's file strictly: with a head of another size, timm would accept any file and load what fits."""
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers or ():
        for parameter in ("weight", "bias"):
            state.pop(f"{classifier}.{parameter}", None)
    patches = state.get("patch_embed.proj.weight")
    overlay = {"state_dict": state, "num_classes": 0, "custom_load": False}
    try:
        model: nn.Module = timm.create_model(
            model_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **arguments
        )
    except (RuntimeError, KeyError, AttributeError, AssertionError, ValueError, IndexError, TypeError) as error:
        # timm converts some files before it loads them, and may fail there without a word about a key
        reason = _disagreement(error) or _differing_keys(state, model_name, arguments) or str(error).partition("\n")[0]
        raise InputError(f"weight file {file} is not of {model_name}: {reason or type(error).__name__}") from error
    wanted = model.state_dict().get("patch_embed.proj.weight")
    if patches is not None and wanted is not None and patches.ndim == 4 and patches.shape != wanted.shape:
        # timm would resample the filters of another patch size without a word
        raise InputError(
            f"weight file {file} is not of {model_name}: patch_embed.proj.weight has shape {list(patches.shape)} where "
            f"{list(wanted.shape)} is needed"
        )
    return model


def _disagreement(error: Exception) -> str:
    """The first keys that PyTorch's strict loading objects to, in one phrase; empty for another error."""
    text = str(error)
    phrases = []
    for kind, label in (("Missing key", "it lacks"), ("Unexpected key", "it has the surplus")):
        found = re.search(rf"{kind}\(s\) in state_dict: (.*?)\.\s*(?:\n|$)", text, flags=re.DOTALL)
        if found:
            keys = re.findall(r'"([^"]+)"', found.group(1))
            phrases.append(f"{label} {_first(keys)}")
    sizes = re.findall(r"size mismatch for (\S+): .*?shape torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", text)
    if sizes:
        key, theirs, ours = sizes[0]
        more = f" and {len(sizes) - 1} more of another shape" if len(sizes) > 1 else ""
        phrases.append(f"{key} has shape {theirs} where {ours} is needed{more}")
    return "; ".join(phrases)


def _differing_keys(state: Mapping[str, Tensor], model_name: str, arguments: dict[str, Any]) -> str:
    """The first keys that a file lacks or has too many, in one phrase."""
    with torch.device("meta"):
        wanted = timm.create_model(model_name, num_classes=0, **arguments).state_dict()
    missing, surplus = [key for key in wanted if key not in state], [key for key in state if key not in wanted]
    phrases = ((missing, "it lacks"), (surplus, "it has the surplus"))
    return "; ".join(f"{label} {_first(keys)}" for keys, label in phrases if keys)


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _check_patches(model: nn.Module, name: str, image_size: int) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    size = patch[0] if isinstance(patch, tuple) else patch
    if isinstance(size, int) and image_size % size:
        below = image_size // size * size
        near = f"{below} or {below + size}" if below else f"{size}"
        raise InputError(
            f"image size must be a multiple of {name}'s patch size {size} (such as {near}), got {image_size}"
        )


def _call_fused_projections(model: nn.Module) -> None:
    """Let BEiT, EVA-02 and Swin v2 call their layer ``qkv`` instead of reading its weight: an adapter on it would train
    for nothing. The biases, which are parameters of their own, are then added to what it returns."""
    for module in model.modules():
        if getattr(module, "qkv_bias_separate", None) is False and getattr(module, "q_bias", None) is not None:
            setattr(module, "qkv_bias_separate", True)  # noqa: B010  # nn.Module types attributes as tensors


def _initialise_head(model: nn.Module, name: str, draw: Callable[..., object]) -> None:
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise InputError(f"{name} has no linear head (its classifier is {type(head).__name__}): choose another model")
    draw(head.weight, std=HEAD_STD)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
