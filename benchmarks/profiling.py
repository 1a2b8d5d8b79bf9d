"""Where the time of a run goes: seconds per function of this package and per operator of torch."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.harness import table_of


def profile_ours(run: Callable[[], object], top: int = 30) -> list[dict[str, Any]]:
    """Cumulative and own seconds per function of this package, and of torch's operators that take most, in `run`."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    rows = []
    for (file, line, name), (_, calls, own, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        ours = "eva_lightning" in file and "vision" not in file
        if ours or file == "~":
            where = f"{file.rsplit('eva_lightning', 1)[-1].lstrip('/')}:{line}" if ours else "builtin"
            rows.append({"function": name, "where": where, "calls": calls, "own": own, "cumulative": cumulative})
    rows.sort(key=lambda row: row["own"] if row["where"] == "builtin" else row["cumulative"], reverse=True)
    return rows[:top]


def profile_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """What :func:`profile_ours` gave, for a terminal."""
    return table_of(
        (
            {
                "function": row["function"],
                "where": row["where"],
                "calls": str(row["calls"]),
                "own s": f"{row['own']:.3f}",
                "cumulative s": f"{row['cumulative']:.3f}",
            }
            for row in rows
        ),
        title,
    )
