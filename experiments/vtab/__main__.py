"""``python -m experiments.vtab [COMMAND] ...``: finds the command's module and hands it the rest of the line.

Without a command, a line that names a ``--task`` is one run, and one that does not is the whole benchmark (``sweep``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from experiments.runner.cli import Command, dispatch
from experiments.runner.ending import leave
from experiments.runner.settings import config_files

COMMANDS: dict[str, Command] = {
    "prepare": Command(
        "tools.vtab.prepare",
        "download or unpack VTAB-1K, or build it from the original data, and check it: one row per task",
    ),
    "run": Command("experiments.vtab.settings", "fine-tune on one task by one method, and test"),
    "sweep": Command(
        "experiments.vtab.sweep_settings",
        "all tasks, methods, learning rates, ranks and seeds, safe to interrupt; --plan says what it takes",
    ),
    "table": Command(
        "experiments.vtab.table",
        "results beside the paper's Tables 20, 21 and 25, as Markdown, CSV, LaTeX and figures",
    ),
    "transfer": Command(
        "experiments.comparisons.transfer",
        "all methods on real images without downloaded weights: half of Caltech101 to the other half",
    ),
    "report": Command("experiments.report", "a page on any finished runs: report RUN...; curves, rank maps, data"),
    "benchmark": Command("benchmarks.vtab", "speed of data and training beside a bare PyTorch loop"),
}

_USAGE = (
    "       python -m experiments.vtab --task TASK [options]  as run",
    "       python -m experiments.vtab [options]              as sweep: everything",
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (``sys.argv`` for None) and return its exit status."""
    # silence bitsandbytes' message on missing CUDA kernels
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return dispatch("python -m experiments.vtab", COMMANDS, args, implied=_implied, usage=_USAGE)


def _implied(words: Sequence[str]) -> str:
    """One run where the line, or the YAML file it names, has a task; the whole benchmark otherwise."""
    if any(word.partition("=")[0] == "--task" for word in words):
        return "run"
    if any(isinstance(settings, dict) and settings.get("task") for settings in config_files(words)):
        return "run"
    return "sweep"


if __name__ == "__main__":
    leave(main())
