"""Runs each method in a process of its own, and prints and draws what it took."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.costs.settings import OneMethod, Settings
from benchmarks.harness import Figure, describe_machine, publish, say, table_of
from eva_lightning import plots
from eva_lightning.errors import InputError
from eva_lightning.files import format_bytes, only_process, writable_folder
from eva_lightning.methods.registry import MethodKey
from eva_lightning.ours import claim
from experiments.analysis.sources import open_source
from experiments.runner.run_folder import RunFolder, perform
from experiments.runner.settings import plain

Costs = dict[str, list[float]]


def measure(settings: Settings) -> dict[str, Any]:
    """Measure what is not measured yet; print a table, draw a figure, and return the document."""
    output = writable_folder(settings.output)
    claim(output, ("fig5_costs.png", "measured", "cache"), "choose another --output")
    before, found, refused = describe_machine(), {}, {}
    with only_process(output / ".lock", f"another measurement is at work in {output}"):
        source = open_source(settings.analysis)  # which refuses what is wrong before the first process starts
        for key in settings.keys:
            try:
                found[key] = _measured(settings, key, output)
            except InputError as error:
                refused[key] = str(error)
    title = f"{source.model_text}; {source.data_text}"
    rows = [_row(settings, key, costs) for key, costs in found.items()]
    document = {"title": title, "costs": {key.key: costs for key, costs in found.items()},
                "not_run": {key.key: reason for key, reason in refused.items()}}  # fmt: skip

    def table(console: Console) -> None:
        if rows:
            console.print(table_of(rows, title))
        console.print(
            f"rank {settings.rank}, minibatches of {settings.batch_size}; share: of the {settings.whole:,} training "
            "steps that the method then takes. Memory: most in use, beyond the module at rest. Medians of "
            f"{settings.repeats}; in brackets the smallest and largest.",
            highlight=False,
        )
        for key, reason in refused.items():
            console.print(f"{key}: not run, {reason}", highlight=False, markup=False)

    if found:
        plots.save(_figure(settings, found, title), output / "fig5_costs.png", dpi=110)
    return publish(document, before, settings, table)


def _measured(settings: Settings, key: MethodKey, output: Path) -> Costs:
    shared = {item.name: getattr(settings, item.name) for item in fields(Settings)}
    shared |= {"methods": ("all",), "json": None, "training_steps": None}
    own = OneMethod(**shared, method=key.key)
    name = f"{key.key.replace(':', '-rho')}-{RunFolder('', own).id}"
    folder = RunFolder(output / "measured" / name, own)

    def work(_: RunFolder) -> Costs:
        say(f"measuring {key.label}")
        return _in_a_process(own)

    return perform(folder, lambda: work, terminal=False, overwrite=settings.overwrite)


def _in_a_process(settings: OneMethod) -> Costs:
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    given = json.dumps({**plain(settings), "overwrite": False, "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "benchmarks.costs.one_method"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, check=False)
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    if done.returncode == 2:
        raise InputError(lines[-1])
    if done.returncode:
        raise RuntimeError(f"measuring {settings.method} failed: {lines[-1]}\n{done.stderr}")
    costs: Costs = json.loads(done.stdout.splitlines()[-1])
    return costs


def _row(settings: Settings, key: MethodKey, costs: Costs) -> dict[str, str]:
    return {
        "method": key.label,
        "reads": key.entry.needs,
        "seconds": Figure.of(costs["seconds"]).text(".2f"),
        "share of training": f"{100 * _share(settings, costs):.2g}%",
        "memory": format_bytes(max(0, int(statistics.median(costs["bytes"])))),
        "training step": f"{statistics.median(costs['step_seconds']):.3f} s",
        "its memory": format_bytes(max(0, int(statistics.median(costs["step_bytes"])))),
    }


def _share(settings: Settings, costs: Costs) -> float:
    return statistics.median(costs["seconds"]) / (settings.whole * statistics.median(costs["step_seconds"]))


def _figure(settings: Settings, found: dict[MethodKey, Costs], title: str) -> Any:
    shares = {key.label: 100 * _share(settings, costs) for key, costs in found.items()}
    texts = {
        key.label: f"{100 * _share(settings, costs):.2g}%, {statistics.median(costs['seconds']):.2g} s, "
        f"{format_bytes(max(0, int(statistics.median(costs['bytes']))))}"
        for key, costs in found.items()
    }
    xlabel = f"preparation, % of the time of {settings.whole:,} training steps"
    return plots.horizontal_bars(shares, xlabel, texts, title=title)
