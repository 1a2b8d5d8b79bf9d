"""What all benchmarks share: repetitions in turn, ratios of pairs with an interval, one table, one JSON document.

What is compared runs in turn in one process, so that whatever else the machine does disturbs both sides alike. A ratio
is the median over pairs of neighbours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import binom

from eva_lightning.files import as_json, write_text
from experiments.runner.settings import Role, option

_PACKAGES = ("torch", "lightning", "peft", "timm", "numpy")
_CHATTY = ("eva_lightning", "lightning.pytorch", "lightning.fabric", "bitsandbytes")

INTERVAL = "In brackets: 95% interval of the median (smallest and largest value where there are fewer than six)."


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Settings that every benchmark has."""

    json: str | None = option(
        None, "write all figures to this file as JSON; -: print them instead of a table", Role.PLACE
    )


@dataclass(frozen=True)
class Figure:
    """Something measured a few times.

    Attributes:
        values: One per repetition.
        target: What the median should be, such as ``"<= 1.05"``.
    """

    values: tuple[float, ...]
    target: str = ""

    @classmethod
    def of(cls, values: Iterable[float], target: str = "") -> Figure:
        """From any numbers."""
        return cls(tuple(float(value) for value in values), target)

    @classmethod
    def ratio(cls, numerators: Iterable[float], denominators: Iterable[float], target: str = "") -> Figure:
        """Of pairs that were measured one after the other."""
        return cls.of((a / b for a, b in zip(numerators, denominators, strict=True)), target)

    @property
    def median(self) -> float:
        """Of the values."""
        return statistics.median(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the median from order statistics, which assumes no distribution.

        Below six values there is none: the smallest and the largest.
        """
        n = len(self.values)
        outside = max(int(binom.ppf(0.025, n, 0.5)), 1) - 1
        ordered = sorted(self.values)
        return ordered[outside], ordered[n - 1 - outside]

    def text(self, form: str | None = None) -> str:
        """``"1.008 (0.992-1.021)"``."""
        form = form or (",.0f" if abs(self.median) >= 100 else ".3f")
        if len(self.values) == 1:
            return f"{self.median:{form}}"
        low, high = self.interval
        return f"{self.median:{form}} ({low:{form}}-{high:{form}})"

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        low, high = self.interval
        return {"median": self.median, "low": low, "high": high, "values": list(self.values), "target": self.target}


Figures = dict[str, Figure]


class CannotRunError(Exception):
    """A part cannot run on this machine; the message says why."""


def in_turn(runs: Mapping[str, Callable[[], float]], repeats: int, warm_up: int = 0) -> dict[str, list[float]]:
    """Call every run once, then all again.

    Args:
        runs: Name -> what to run; returns its seconds.
        repeats: How often.
        warm_up: Rounds before these, which are left out.

    Returns:
        Name -> seconds, one per repetition.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-warm_up, repeats):
        for name, run in runs.items():
            value = run()
            if number >= 0:
                seconds[name].append(value)
    return seconds


def measure_parts(parts: Mapping[str, Callable[[], Figures]], settings: BenchmarkSettings) -> dict[str, Figures]:
    """Measure each part, print one table and write the document; returns part -> name -> figure of those that ran."""
    results: dict[str, Figures] = {}
    not_run: dict[str, str] = {}
    before = describe_machine()
    for part, measure in parts.items():
        say(f"measuring {part}")
        try:
            results[part] = measure()
        except CannotRunError as reason:
            not_run[part] = str(reason)
    rows = [
        {"part": part, "what": name, "figure": figure.text(), "target": figure.target}
        for part, figures in results.items()
        for name, figure in figures.items()
    ]
    document = {
        "figures": {part: {name: f.document() for name, f in figures.items()} for part, figures in results.items()},
        "not_run": not_run,
    }

    def table(console: Console) -> None:
        if rows:
            console.print(table_of(rows))
            console.print(INTERVAL, highlight=False)
        for part, reason in not_run.items():
            console.print(f"{part}: not run, {reason}", highlight=False)

    publish(document, before, settings, table)
    return results


def publish(
    document: Mapping[str, Any],
    machine: Mapping[str, Any],
    settings: BenchmarkSettings,
    table: Callable[[Console], None],
) -> dict[str, Any]:
    """Print the tables and write the JSON document, as the settings say.

    Args:
        document: The figures.
        machine: What :func:`describe_machine` gave before they were measured.
        settings: Of the benchmark.
        table: Prints the tables.

    Returns:
        The whole document.
    """
    whole = {
        "machine": {**machine, "load_average_after": _load()},
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name != "json"},
        **document,
    }
    text = as_json(whole, indent=1)
    if settings.json == "-":
        print(text)
        return whole
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(_machine_line(whole["machine"]), highlight=False)
    table(console)
    if settings.json is not None:
        write_text(settings.json, text + "\n")
    return whole


def say(text: str) -> None:
    """What is being measured, on standard error."""
    print(f"{text} ...", file=sys.stderr, flush=True)


def table_of(rows: Iterable[Mapping[str, str]], title: str | None = None) -> Table:
    """One column per key; the first two to the left, figures to the right."""
    rows = list(rows)
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, cores, threads, load and versions; nothing that names the machine or its user.

    Args:
        device: What is measured; None for a GPU where there is one.
    """
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load_average": _load(),
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in _PACKAGES}},
    }
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["versions"]["cuda"] = torch.version.cuda
    return machine


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines, and no warnings of Lightning on how to run faster."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def bare_trainer(**options: Any) -> L.Trainer:
    """A Trainer of one device that logs, shows and keeps nothing."""
    return L.Trainer(
        devices=1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def _machine_line(machine: Mapping[str, Any]) -> str:
    line = f"{machine.get('gpu') or machine['processor']}, {machine['cores']} core(s), {machine['threads']} thread(s)"
    if machine["load_average"] is None:
        return line
    before, after = machine["load_average"][0], machine["load_average_after"][0]
    return f"{line}, load average {before:.1f} before, {after:.1f} after"


def _load() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
