"""What a fine-tuning leaves: where it lies, in words, and the code that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADAPTER, MERGED, PAGE = "adapter", "merged", "report.html"


def headline(metrics: Mapping[str, Any]) -> str:
    """A finished run in one line."""
    if metrics.get("diverged"):
        return f"{metrics['task']}, {metrics['model']}, {metrics['method']}: diverged"
    low, high = metrics["interval"]
    return (
        f"{metrics['accuracy']:.1%} of {metrics['evaluation_images']} test images (95% interval {low:.1%} to "
        f"{high:.1%}), {metrics['task']}, {metrics['model']}, {metrics['method']}, learning rate {metrics['lr']:g}"
    )


def where(folder: Path, metrics: Mapping[str, Any]) -> list[str]:
    """What a run has written, each with the lines of code that load it."""
    lines = [f"Page: {folder / PAGE}"]
    for title, code in loading(folder, metrics).items():
        lines += [title, *(f"    {line}" for line in code)]
    return lines


def loading(folder: Path, metrics: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a run has written -> the code that loads it."""
    merged = folder / MERGED
    found = {}
    if metrics.get("base_code"):
        found[f"Adapter: {folder / ADAPTER}"] = [
            str(metrics["base_code"]),
            f"model = peft.PeftModel.from_pretrained(base, {str(folder / ADAPTER)!r})",
        ]
    found[f"Merged timm model: {merged / 'model.safetensors'}"] = [
        f"model = timm.create_model({f'local-dir:{merged}'!r}, pretrained=True).eval()",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    ]
    return found
