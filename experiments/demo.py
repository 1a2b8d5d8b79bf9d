"""EVA against LoRA and full fine-tuning on digits and robot tasks, in minutes and without a download.

    python -m experiments.demo

has two parts. The first (:mod:`experiments.comparisons.digits`) pre-trains a small Vision Transformer on the digits 0-4
and fine-tunes it on 200 labelled images of the digits 5-9 with every method and four seeds, at tuned and at lower
learning rates. The second (:mod:`experiments.comparisons.robots`) fine-tunes a Decision Transformer on robot tasks and
rolls it out in MuJoCo. Both print tables and write ``runs/demo/report.html``. Safe to interrupt; rerun to resume:
finished runs are kept under ``runs/demo``. ``--fresh`` deletes them first; ``--parts vision`` or ``--parts rl`` does
one part.

The learning rates come from ``configs/demo.yaml`` and ``configs/demo_rl.yaml``. They were chosen, one per method and by
the same rule, with

    python -m experiments.demo --tune

on data and seeds that the tables do not use.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_lightning import ours
from eva_lightning.errors import MissingInputError
from experiments.runner.cli import in_terminal
from experiments.runner.ending import leave, was_interrupted
from experiments.runner.settings import Role, check_settings, flag, option, parse_settings

if TYPE_CHECKING:
    from experiments.comparisons.digits import Digits
    from experiments.comparisons.robots import Robots

PROG = "python -m experiments.demo"
ROOT = Path(__file__).resolve().parents[1]
#: Part -> module and class of its comparison.
PARTS = {"vision": ("experiments.comparisons.digits", "Digits"), "rl": ("experiments.comparisons.robots", "Robots")}
#: Options of the demo that are settings of its first part.
_OF_VISION = ("seeds", "epochs", "labels", "pretrain_epochs")


@dataclass(frozen=True)
class Settings:
    """The options of the demo."""

    parts: tuple[str, ...] = option(tuple(PARTS), "vision, rl or both", Role.SELECTION, choices=PARTS)
    seeds: int | None = option(None, "vision: runs per method; 10, or 5 with --tune", Role.SELECTION, at_least=1)
    epochs: int | None = option(None, "vision: fine-tuning epochs; 10", Role.RESULT, at_least=1)
    labels: int | None = option(None, "vision: labelled images of 5-9; 200", Role.RESULT, at_least=1)
    pretrain_epochs: int | None = option(None, "vision: pre-training epochs; 30", Role.RESULT, at_least=1)
    workers: int = option(min(2, os.cpu_count() or 1), "processes; 0: none besides this one", Role.PLACE, at_least=0)
    out: str = option("runs/demo", "folder of everything", Role.PLACE)
    vision_config: str = option(str(ROOT / "configs" / "demo.yaml"), "settings of the first part", Role.SELECTION)
    rl_config: str = option(str(ROOT / "configs" / "demo_rl.yaml"), "settings of the second part", Role.SELECTION)
    fresh: bool = option(False, "delete finished runs and the cached model first", Role.SELECTION)
    tune: bool = option(False, "choose the learning rates and write them to the configurations", Role.SELECTION)
    rates: tuple[float, ...] | None = option(None, "the learning rates that --tune tries", Role.SELECTION, above=0)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def command(self) -> str:
        """The command that repeats this, with the options that differ from their defaults."""
        words = [PROG]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("parts", *_OF_VISION) and value != item.default:
                words.append(f"{flag(item.name)} {','.join(value) if isinstance(value, tuple) else value}")
        return " ".join(words)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` and return its exit status."""
    statuses: list[int] = []

    def run(words: Sequence[str] | None) -> None:
        description = (__doc__ or "").split("\n\n")[0]
        statuses.append(demo(parse_settings(Settings, PROG, description, words)))

    status = in_terminal(run, args)
    if was_interrupted(status):
        print("Interrupted. Finished runs are kept; rerun to resume.")
    return status or max(statuses, default=0)


def demo(settings: Settings) -> int:
    """All parts, and the report, which is written after each so that an interruption leaves one.

    Returns:
        1 where a run failed, else 0.

    Raises:
        InputError: A setting is wrong, or a file is missing.
    """
    from experiments.report.page import write_page
    from experiments.runner.comparison import clear_output, run_comparison

    parts = [_part(settings, name) for name in settings.parts]
    sections, failed = [], 0
    report = Path(settings.out) / "report.html"
    ours.claim(report.parent, (report.name,), "choose another --out")
    for part in parts:
        if settings.fresh:
            clear_output(part)
        failed = max(failed, run_comparison(part).exit_status)
        if part.section is not None:
            sections.append(part.section)
            write_page(report, "EVA demo", sections)
    if sections:
        print(f"Report: {report}")
    return failed


def _part(settings: Settings, name: str) -> Digits | Robots:
    """The comparison called `name`, with its configuration file and the options of the demo."""
    module_name, class_name = PARTS[name]
    module = importlib.import_module(module_name)
    config = settings.vision_config if name == "vision" else settings.rl_config
    if not Path(config).is_file() and not settings.tune:
        raise MissingInputError(f"no configuration at {config}: choose learning rates with --tune, or give another")
    words = ["--config", config] if Path(config).is_file() else []
    found = parse_settings(module.Settings, f"{PROG} --parts {name}", module.__doc__ or "", words)
    changes: dict[str, Any] = {
        "output": str(Path(settings.out) / name),
        "workers": settings.workers,
        "threads": 1,
        "gpus_per_run": 0.0,
        "tune": config if settings.tune else None,
    }
    if settings.rates is not None:
        changes["lrs"] = settings.rates
    if name == "vision":
        changes |= {option: value for option in _OF_VISION if (value := getattr(settings, option)) is not None}
        if settings.tune:
            changes.setdefault("seeds", module.TUNING_SEEDS)
    comparison: Digits | Robots = getattr(module, class_name)(replace(found, **changes), settings.command)
    return comparison


if __name__ == "__main__":
    leave(main())
