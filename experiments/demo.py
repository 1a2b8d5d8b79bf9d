"""Frozen features, LoRA and EVA on real photographs, and on robot tasks, in minutes.

    python -m experiments.demo

has two parts. The first (:mod:`experiments.comparisons.photographs`) fine-tunes DINOv2 ViT-S/14 on 200 aerial
photographs of ten kinds of land use, which come with the project. Its weights come from the Hugging Face hub or, where
that does not answer, from a Python package (:mod:`tools.dinov2_small`); where neither can be had, the digits part
(:mod:`experiments.comparisons.digits`), which needs no download, takes its place. The second
(:mod:`experiments.comparisons.robots`) fine-tunes a Decision Transformer on robot tasks and rolls it out in MuJoCo.
Both print tables and write ``runs/demo/report.html``, the first time as soon as every method has one run. Safe to
interrupt; rerun to resume: finished runs are kept under ``runs/demo``. ``--fresh`` deletes them first; ``--parts``
chooses parts.

The learning rates come from ``configs/demo.yaml`` and ``configs/demo_rl.yaml``. They were chosen, one per method and by
the same rule, with

    python -m experiments.demo --parts vision --seeds 1 --tune
    python -m experiments.demo --parts rl --tune

on data and seeds that the tables do not use. The same comparison in full, as the project's evidence:

    python -m experiments.demo --parts vision --vision-config configs/photographs.yaml --out runs/photographs
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_lightning import ours
from eva_lightning.errors import InputError, MissingInputError
from experiments.runner.calling import as_called
from experiments.runner.cli import in_terminal
from experiments.runner.ending import leave, was_interrupted
from experiments.runner.settings import Role, check_settings, flag, option, parse_settings

if TYPE_CHECKING:
    from experiments.comparisons.tuned import TunedComparison
    from experiments.report.page import Section

PROG = as_called("python -m experiments.demo")
ROOT = Path(__file__).resolve().parents[1]
#: Part -> module and class of its comparison.
PARTS = {
    "vision": ("experiments.comparisons.photographs", "Photographs"),
    "digits": ("experiments.comparisons.digits", "Digits"),
    "rl": ("experiments.comparisons.robots", "Robots"),
}
#: Parts -> their settings, below configs/ of the project.
_CONFIGS = {"vision": "demo.yaml", "digits": "digits.yaml", "rl": "demo_rl.yaml"}
#: Parts -> the options of the demo that are settings of theirs.
_OPTIONS_OF = {
    "vision": ("seeds", "epochs"),
    "digits": ("seeds", "epochs", "labels", "pretrain_epochs"),
    "rl": (),
}


@dataclass(frozen=True)
class Settings:
    """The options of the demo."""

    parts: tuple[str, ...] = option(("vision", "rl"), "vision, rl or both; or digits", Role.SELECTION, choices=PARTS)
    seeds: int | None = option(None, "vision, digits: runs per method", Role.SELECTION, at_least=1)
    epochs: int | None = option(None, "vision, digits: fine-tuning epochs", Role.RESULT, at_least=1)
    labels: int | None = option(None, "digits: labelled images of 5-9; 200", Role.RESULT, at_least=1)
    pretrain_epochs: int | None = option(None, "digits: pre-training epochs; 30", Role.RESULT, at_least=1)
    workers: int = option(min(2, os.cpu_count() or 1), "processes; 0: none besides this one", Role.PLACE, at_least=0)
    out: str = option("runs/demo", "folder of everything", Role.PLACE)
    vision_config: str | None = option(
        None, "settings of the first part; configs/demo.yaml if not given", Role.SELECTION
    )
    digits_config: str | None = option(
        None, "settings of the digits part; configs/digits.yaml if not given", Role.SELECTION
    )
    rl_config: str | None = option(
        None, "settings of the second part; configs/demo_rl.yaml if not given", Role.SELECTION
    )
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
            if item.name in ("parts", "vision_config", *_OPTIONS_OF["digits"]) and value != item.default:
                words.append(f"{flag(item.name)} {_word(value)}")
        return " ".join([*words, *([flag("tune")] if self.tune else [])])

    def tuned_by(self, name: str, known: Mapping[str, Any] | None, usual_seeds: int | None) -> str:
        """The command that chose the learning rates of a part, or would.

        Args:
            name: The part.
            known: How they were chosen, as ``--tune`` has noted it.
            usual_seeds: How many seeds ``--tune`` takes by itself; None where that is no option.
        """
        number = self.seeds if self.tune else len((known or {}).get("seeds") or ())
        seeds = number if usual_seeds is not None and number and number != usual_seeds else None
        return Settings(parts=(name,), vision_config=self.vision_config, seeds=seeds, tune=True).command


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
    sections: list[Section] = []
    report, failed = Path(settings.out) / "report.html", 0
    ours.claim(report.parent, (report.name,), "choose another --out")

    def first_look(section: Section) -> None:
        write_page(report, "EVA demo", [*sections, section])
        print(f"First picture, of one seed: {report}", flush=True)

    for part in parts:
        if settings.fresh:
            clear_output(part)
        part.first_look = first_look
        failed = max(failed, run_comparison(part).exit_status)
        if part.section is not None:
            sections.append(part.section)
            write_page(report, "EVA demo", sections)
    if sections:
        print(f"Report: {report}")
    return failed


def _word(value: Any) -> str:
    """A value as it stands on a command line; a file below the working folder without the way there."""
    if isinstance(value, tuple):
        return ",".join(value)
    path = Path(str(value))
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else value)


def _part(settings: Settings, name: str) -> TunedComparison:
    """The comparison called `name`, with its configuration file and the options of the demo.

    Where `vision` can have no weights the digits take its place, unless learning rates are to be chosen.
    """
    changes: dict[str, Any] = {}
    if name == "vision":
        from tools.dinov2_small import find_weights

        try:
            found = find_weights(say=_say)
        except InputError as error:
            if settings.tune:
                raise
            _say(f"No photographs: {error}. Handwritten digits, which need no weights, take their place.")
            return _part(settings, "digits")
        changes = {"model": found.model, "weights": found.weights, "origin": found.description}
    module_name, class_name = PARTS[name]
    module = importlib.import_module(module_name)
    config = getattr(settings, f"{name}_config") or str(ROOT / "configs" / _CONFIGS[name])
    if not Path(config).is_file() and not settings.tune:
        raise MissingInputError(f"no configuration at {config}: choose learning rates with --tune, or give another")
    words = ["--config", config] if Path(config).is_file() else []
    given = parse_settings(module.Settings, f"{PROG} --parts {name}", module.__doc__ or "", words)
    changes |= {
        "output": str(Path(settings.out) / name),
        "workers": settings.workers,
        "threads": 1,
        "gpus_per_run": 0.0,
        "tune": config if settings.tune else None,
    }
    if settings.rates is not None:
        changes["lrs"] = settings.rates
    changes |= {option: value for option in _OPTIONS_OF[name] if (value := getattr(settings, option)) is not None}
    if settings.tune and "seeds" in _OPTIONS_OF[name]:
        changes.setdefault("seeds", module.TUNING_SEEDS)
    comparison: TunedComparison = getattr(module, class_name)(replace(given, **changes), settings.command)
    usual_seeds = module.TUNING_SEEDS if "seeds" in _OPTIONS_OF[name] else None
    comparison.tune_command = settings.tuned_by(name, given.tuning, usual_seeds)
    return comparison


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    leave(main())
