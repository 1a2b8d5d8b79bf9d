"""A fine-tuned classifier as a plain timm model: adapters added to the weights, and what builds and feeds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models import get_pretrained_cfg

from eva_lightning.adapters.model_card import CARD, REPOSITORY, card, is_edited
from eva_lightning.errors import InputError, check_choice
from eva_lightning.files import filling, write_json, write_text
from eva_lightning.vision.backbone.split_fused import split_layers
from eva_lightning.vision.backbone.timm_models import resolve_model
from eva_lightning.vision.data.datamodule import NORMALIZATIONS
from eva_lightning.vision.merged_evaluation import merged_in_fp32
from eva_lightning.vision.module import ImageClassifier

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_timm(
    module: ImageClassifier,
    directory: str | Path,
    class_names: Sequence[str] | None = None,
    *,
    normalization: str = "imagenet",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model.safetensors``, ``config.json`` and a model card, in the layout of timm's repositories.

    ``timm.create_model("local-dir:DIRECTORY", pretrained=True)`` then computes what `module` computes, with its head,
    and so does ``timm.create_model(NAME, num_classes=N, img_size=S, checkpoint_path="DIRECTORY/model.safetensors")``;
    timm's own transform for it prepares images as the data modules here do. `module` stays as it is.

    Args:
        module: With adapters or without.
        directory: Created if missing; the three files are replaced.
        class_names: In the order of the labels.
        normalization: What the images were trained with, ``"imagenet"`` or ``"none"``.
        about: Rows for the model card, such as ``{"data": "2,000 photographs of birds"}``.

    Returns:
        The directory; :func:`eva_lightning.hub.push_to_hub` uploads it.

    Raises:
        InputError: An adapter cannot be merged, fused projections were taken apart, or there is another number of class
            names than of classes.
    """
    check_choice("normalization", normalization, NORMALIZATIONS)
    classes = int(module.hparams["num_classes"])
    if class_names is not None and len(class_names) != classes:
        raise InputError(f"class_names must name the {classes} classes of the model, got {len(class_names)} names")
    if split_layers(module.model):
        raise InputError(
            "the fused projections of this model were taken apart (split_fused), so that its weights do not fit timm's "
            "names: train without split_fused, or keep the adapter (save_fused_adapter)"
        )
    config = _config(module, normalization)
    if class_names is not None:
        config["label_names"] = list(class_names)
    with merged_in_fp32(module):
        weights = {name: value.detach().cpu().contiguous().clone() for name, value in module.model.state_dict().items()}
    text = _card(module, config, about)
    with filling(directory, last=CONFIG) as temporary:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, config)
        if not is_edited(Path(directory) / CARD):
            write_text(temporary / CARD, text)
    return Path(directory)


def timm_name(module: ImageClassifier) -> str:
    """timm's name of the backbone, with that of its pre-trained weights where there is one."""
    return resolve_model(module.hparams["model"])


def _config(module: ImageClassifier, normalization: str) -> dict[str, Any]:
    """What timm reads beside the weights: how the model is built, and how its images are prepared."""
    size, known = int(module.hparams["image_size"]), get_pretrained_cfg(timm_name(module))
    fixed = known is not None and bool(known.fixed_input_size)
    mean, std = NORMALIZATIONS[normalization]
    return {
        "architecture": timm_name(module).partition(".")[0],
        "num_classes": int(module.hparams["num_classes"]),
        "num_features": int(module.get_submodule(module.head_name).in_features),  # type: ignore[arg-type]
        "model_args": {**(module.hparams["model_options"] or {}), **({"img_size": size} if fixed else {})},
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": fixed,
            "interpolation": "bicubic",
            # the whole image squeezed to a square, as the data modules do
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(mean),
            "std": list(std),
            "num_classes": int(module.hparams["num_classes"]),
            "first_conv": None if known is None else known.first_conv,
            "classifier": module.head_name.removeprefix("model."),
            "custom_load": False,
        },
    }


def _card(module: ImageClassifier, config: Mapping[str, Any], about: Mapping[str, Any] | None) -> str:
    name = timm_name(module)
    metadata = {
        **({"base_model": f"timm/{name}"} if "." in name else {}),
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm"],
    }
    rows = {
        "classes": config.get("label_names", config["num_classes"]),
        "image size": config["pretrained_cfg"]["input_size"][1],
        **(about or {}),
    }
    code = [
        "import timm",
        "",
        f'model = timm.create_model("hf-hub:{REPOSITORY}", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    ]
    start = f"`{name}`, fine-tuned by adapters that were added to its weights afterwards."
    return card(metadata, f"Fine-tuned {name}", start, rows, code)
