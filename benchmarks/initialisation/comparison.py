"""Layer by layer: which layers come out worst, and where ours captures more variance than PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PEFT = "PEFT"
MEASURES = {"captured": "captured", "heldout": "held out"}
"""What is measured per layer, and what tables call it."""
_WORST = 3


def compare_layers(rows: Sequence[dict[str, Any]]) -> None:
    """Add to every row its worst layers, and to all but PEFT's in how many layers it is ahead of PEFT.

    Variances captured of the streamed minibatches are compared only where both streamed the same: those of few
    minibatches are easier to capture.

    Args:
        rows: One per method, with ``captured_per_layer`` and perhaps ``heldout_per_layer``; get ``worst`` and
            ``ahead_of_peft``, by the names in :data:`MEASURES`.
    """
    peft = next((row for row in rows if row["name"] == PEFT), None)
    for row in rows:
        values = {measure: row[f"{measure}_per_layer"] for measure in MEASURES if f"{measure}_per_layer" in row}
        row["worst"] = {measure: _worst(layers) for measure, layers in values.items()}
        if peft is None or row is peft:
            continue
        row["ahead_of_peft"] = {
            measure: _ahead(layers, peft[f"{measure}_per_layer"])
            for measure, layers in values.items()
            if measure == "heldout" or row["n_batches"] == peft["n_batches"]
        }


def _worst(layers: Mapping[str, float]) -> dict[str, float]:
    return {name: layers[name] for name in sorted(layers, key=layers.__getitem__)[:_WORST]}


def _ahead(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, Any]:
    gaps = {name: value - theirs[name] for name, value in ours.items() if name in theirs}
    behind = {name: gap for name, gap in sorted(gaps.items(), key=lambda item: item[1]) if gap <= 0}
    return {"layers": len(gaps) - len(behind), "of": len(gaps), "behind": behind}


def ahead_in_words(row: Mapping[str, Any]) -> str:
    """``"48 / 47 of 48"`` layers, captured and held out; a dash where that cannot be compared."""
    ahead = row.get("ahead_of_peft")
    if not ahead:
        return ""
    counts = [str(ahead[measure]["layers"]) if measure in ahead else "-" for measure in MEASURES]
    return f"{' / '.join(counts)} of {next(iter(ahead.values()))['of']}"


def layers_in_words(row: Mapping[str, Any]) -> list[str]:
    """Sentences on a method's worst layers, and on those in which PEFT captures more."""
    lines = []
    for measure, words in MEASURES.items():
        if worst := row.get("worst", {}).get(measure):
            lines.append(f"{row['name']}, worst layers, {words}: {_listed(worst, '.4f')}")
        behind = row.get("ahead_of_peft", {}).get(measure, {}).get("behind")
        if behind:
            lines.append(f"{row['name']}, behind PEFT, {words}: {_listed(behind, '+.5f')}")
    return lines


def _listed(layers: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name.removeprefix('model.')} {value:{form}}" for name, value in layers.items())
