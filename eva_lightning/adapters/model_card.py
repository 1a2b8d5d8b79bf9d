"""The model card (README.md) of an exported adapter, as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.adapters.origin import origin_of
from eva_lightning.errors import InputError, InputTypeError
from eva_lightning.names import shown
from eva_lightning.reading import read_text

CARD = "README.md"
#: A card without this line is somebody else's, or was edited: it stays.
OURS = "<!-- written by eva_lightning; remove this line to keep your own changes -->"

PAPER = "https://arxiv.org/abs/2410.07170"
#: What stands for the name of the repository until the card is uploaded.
REPOSITORY = "THIS REPOSITORY"
_HUB_PREFIX = "timm/"
#: The hub refuses a card whose base_model cannot be one of its own, such as the path of a folder.
_ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def check_base_model(base_model: Any) -> str:
    """`base_model`, once it can be the name of a model on the hub, or of a folder.

    Raises:
        InputTypeError: It is no text.
        InputError: It is empty, or has characters that cannot be printed.
    """
    expected = "base_model must name what the adapters were trained on, such as timm/vit_base_patch14_dinov2.lvd142m"
    if not isinstance(base_model, str):
        raise InputTypeError(f"{expected}, got {shown(base_model)}", setting="base_model")
    if not base_model.strip() or not base_model.isprintable():
        raise InputError(f"{expected}, got {shown(base_model)}", setting="base_model")
    return base_model.strip()


def model_card(
    model: nn.Module,
    config: Any,
    layers: Sequence[AdapterLayer],
    base_model: str,
    about: Mapping[str, Any] | None = None,
) -> str:
    """The text of an adapter's card: metadata for the hub, what the adapters are, and the code that loads them.

    Args:
        model: The network with its adapters.
        config: Their LoraConfig.
        layers: Those that are exported.
        base_model: What they were trained on.
        about: Rows of the table besides those that the adapters themselves give; None values are left out.
    """
    is_eva = origin_of(layers).get("method") == "EVA"
    metadata = {
        **({"base_model": base_model} if _ON_THE_HUB.fullmatch(base_model) else {}),
        "library_name": "peft",
        "tags": [*(["eva"] if is_eva else []), "lora", "peft", *(["timm"] if _is_timm(base_model) else [])],
    }
    start = f"Adapters for `{_plain(base_model)}`"
    if is_eva:
        start += f", initialised by [EVA]({PAPER}): their directions and ranks come from the activations on the data"
    end = (
        "The base model has to be built as it was for training. Adapters, and layers that trained in full such as the "
        "head, come from this repository."
    )
    rows = {**adapter_rows(config, layers), **(about or {})}
    return card(metadata, f"Adapters for {base_model}", f"{start}.", rows, _code(model, base_model), end)


def card(
    metadata: Mapping[str, Any],
    title: str,
    start: str,
    rows: Mapping[str, Any],
    code: Sequence[str],
    end: str = "",
) -> str:
    """A card of these parts; rows that are None are left out."""
    lines = [
        "---",
        yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True).strip(),
        "---",
        OURS,
        "",
        f"# {_plain(title)}",
        "",
        start,
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {_plain(key)} | {_plain(_words(value))} |" for key, value in rows.items() if value is not None),
        "",
        "## Use",
        "",
        "```python",
        *code,
        "```",
        *(["", end] if end else []),
    ]
    return "\n".join(lines) + "\n"


def is_edited(file: Path) -> bool:
    """Whether a card is there that somebody else wrote or edited."""
    return file.is_file() and OURS not in read_text(file)


def adapter_rows(config: Any, layers: Sequence[AdapterLayer]) -> dict[str, Any]:
    """What the adapters say of themselves: method, ρ, r, ranks."""
    origin, ranks = dict(origin_of(layers)), [layer.rank for layer in layers]
    kind = "DoRA" if getattr(config, "use_dora", False) else "LoRA"
    method = origin.pop("method", None)
    r = origin.pop("r", config.r)
    spread = f"{ranks[0]}" if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    alphas = sorted({layer.alpha / layer.rank for layer in layers})
    return {
        "method": kind if method is None else f"{method} ({kind})",
        **origin,
        "r": f"{r:g}" if isinstance(r, int | float) else r,
        "ranks": f"{spread} in {len(ranks)} layers, sum {sum(ranks)}",
        "alpha / rank": ", ".join(f"{alpha:.4g}" for alpha in alphas[:3]) + (", ..." if len(alphas) > 3 else ""),
    }


def _is_timm(base_model: str) -> bool:
    return base_model.startswith(_HUB_PREFIX)


def _code(model: nn.Module, base_model: str) -> list[str]:
    load = f'model = PeftModel.from_pretrained(base, "{REPOSITORY}")'
    classes = getattr(model, "num_classes", None)
    if not (_is_timm(base_model) and isinstance(classes, int)):
        return ["from peft import PeftModel", "", "# base: the network without adapters", load]
    return ["import timm", "from peft import PeftModel", "", timm_line(model, base_model), load]


def timm_line(model: nn.Module, base_model: str, file: Path | None = None) -> str:
    """The line that builds the base of `model`, a timm model, as it was for training.

    Args:
        model: With the number of classes and the size of the images that it was trained with.
        base_model: timm's name, with or without the hub's ``timm/`` before it.
        file: Its weights, where they are not the hub's.
    """
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    options = f", img_size={size[0]}" if isinstance(size, tuple) and len(set(size)) == 1 else ""
    name = base_model.removeprefix(_HUB_PREFIX)
    overlay = "" if file is None else f", pretrained_cfg_overlay={{'file': {str(file)!r}}}"
    return f'base = timm.create_model("{name}", pretrained=True{overlay}, num_classes={model.num_classes}{options})'


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _plain(text: str) -> str:
    """A text for a cell of a Markdown table."""
    one_line = " ".join(str(text).split())
    return "".join(f"\\{character}" if character in "\\|`<[" else character for character in one_line)
