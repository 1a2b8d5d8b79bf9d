"""Tables of ``python -m benchmarks init``, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from benchmarks.harness import INTERVAL, Figure, table_of
from benchmarks.initialisation.comparison import ahead_in_words, layers_in_words
from benchmarks.initialisation.settings import Settings
from benchmarks.profiling import profile_table


def print_tables(models: Sequence[Mapping[str, Any]], settings: Settings, console: Console) -> None:
    """Print what was measured.

    Args:
        models: Of the document, one per model.
        settings: Of the command.
        console: Where to print.
    """
    rows = [_row(model, row) for model in models for row in model["methods"]]
    console.print(table_of(rows, f"EVA initialisation, r = {settings.r}, rho = {settings.rho:g}"))
    console.print(
        f"Seconds and ratios: median. {INTERVAL} ÷ forward: over the plain forward of the same minibatches right "
        "before and after. Captured: median / minimum over layers, 1 is the optimum."
    )
    console.print(
        "Ahead of PEFT: layers in which ours captures more of the same minibatches (-: they streamed different ones) / "
        "of those held out."
    )
    for model in models:
        console.print(_notes(model))
        for row in model["methods"]:
            for line in layers_in_words(row):
                console.print(line, highlight=False)
        for method, profile in model.get("profile", {}).items():
            console.print(profile_table(profile, f"profile of {method}"))


def _row(model: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "model": model["model"],
        "method": row["name"],
        "minibatches": f"{row['n_batches']}{'' if row['stopped_by_itself'] else ' (cap)'}",
        "seconds": Figure.of(row["seconds"]["values"]).text(".2f"),
        "÷ forward": Figure.of(row["over_forward"]["values"]).text(".3f"),
        "CPU ÷ forward": f"{row['over_forward_cpu']['median']:.3f}",
        "captured ÷ exact": _accuracy(row.get("captured")),
        "held-out": _accuracy(row.get("heldout")),
        "ahead of PEFT": ahead_in_words(row),
        "peak memory": f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else "",
        "PEFT ÷ ours": _peft_ratio(row.get("peft_over_ours"), model["methods"][-1]),
    }


def _peft_ratio(ratio: float | None, peft: Mapping[str, Any]) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.1f}" if peft["stopped_by_itself"] else f"≥ {ratio:.1f} (cap {peft['n_batches']})"


def _accuracy(values: Mapping[str, float] | None) -> str:
    return "" if values is None else f"{values['median']:.6f} / {values['min']:.6f}"


def _notes(model: Mapping[str, Any]) -> str:
    notes = [f"{model['model']}: {model['layers']} layers; {model['weights']}; {model['images']}"]
    if "variance_in_top_32" in model:
        notes.append(f"the top 32 directions hold {model['variance_in_top_32']:.0%} of the variance (median layer)")
    for row in model["methods"]:
        if row["bit_identical"] is not None:
            notes.append(f"repeats of {row['name']} {'bit-identical' if row['bit_identical'] else 'DIFFER'}")
    if "memory_method" in model:
        notes.append(f"peak memory: {model['memory_method']}")
    return "; ".join(notes) + "."
