"""Tables of the benchmark's JSON document, for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_tables(document: dict[str, Any]) -> None:
    """Print what ``python -m experiments.benchmark`` measured."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    machine = document["machine"]
    line = f"{machine.get('gpu') or machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
    if machine["load_average"]:
        before, after = machine["load_average"][0], machine["load_average_after"][0]
        line += f", load average {before:.1f} before, {after:.1f} after"
    console.print(line)
    if document["command"] == "resize":
        from experiments.benchmark_resize import print_resize

        print_resize(document, console)
        return
    settings = document["settings"]
    table = Table(title=f"EVA initialisation, r = {settings['r']}, rho = {settings['rho']:g}", title_justify="left")
    for heading in ("model", "method", "minibatches", "seconds", "÷ forward", "CPU ÷ forward", "captured ÷ exact",
                    "held-out", "peak memory", "PEFT ÷ ours"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("model", "method") else "right", no_wrap=True)
    for result in document["models"]:
        for row in result["methods"]:
            ratio = row.get("peft_over_ours")
            peft = result["methods"][-1]
            bound, cap = ("", "") if peft["stopped_by_itself"] else ("≥ ", f" (cap {peft['n_batches']})")
            table.add_row(
                result["model"],
                row["name"],
                f"{row['n_batches']}{'' if row['stopped_by_itself'] else ' (cap)'}",
                _spread(row["seconds"], ".2f"),
                _spread(row["over_forward"], ".3f"),
                f"{row['over_forward_cpu']['median']:.3f}",
                _accuracy_text(row.get("captured")),
                _accuracy_text(row.get("heldout")),
                f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else "",
                "" if ratio is None else f"{bound}{ratio:.1f}{cap}",
            )
    console.print(table)
    console.print(
        "Seconds and ratios: median (min-max). ÷ forward: over the plain forward of the same minibatches right before "
        "and after. Captured: median / minimum over layers, 1 is the optimum."
    )
    for result in document["models"]:
        console.print(_notes(result, settings["weights"]))
        for engine, rows in result.get("profile", {}).items():
            console.print(_profile(engine, rows))
            within = result["within_profile"][engine]
            console.print(f"Within this run, which noise between runs cannot touch: total ÷ forward {within:.3f}.")


def _notes(result: Mapping[str, Any], weights: str) -> str:
    notes = [f"{result['model']}: {result['layers']} layers; weights: {weights}; {result['images']}"]
    if "variance_in_top_32" in result:
        notes.append(f"the top 32 directions hold {result['variance_in_top_32']:.0%} of the variance (median layer)")
    for row in result["methods"]:
        if "state_bytes" in row:
            predicted, real = row["state_bytes_predicted"] / 2**20, row["state_bytes"] / 2**20
            notes.append(f"state of {row['name']}: {predicted:.1f} MiB predicted, {real:.1f} MiB real")
        if row["bit_identical"] is not None:
            notes.append(f"repeats of {row['name']} {'bit-identical' if row['bit_identical'] else 'DIFFER'}")
    if "memory_method" in result:
        notes.append(f"peak memory: {result['memory_method']}")
    return "; ".join(notes) + "."


def _profile(engine: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"profile of ours ({engine})", title_justify="left")
    for heading in ("function", "where", "calls", "own s", "cumulative s"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["function"], row["where"], f"{row['calls']}", f"{row['own']:.3f}", f"{row['cumulative']:.3f}")
    return table


def _spread(values: Mapping[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['min']:{form}}-{values['max']:{form}})"


def _accuracy_text(values: Mapping[str, float] | None) -> str:
    return "" if values is None else f"{values['median']:.6f} / {values['min']:.6f}"
