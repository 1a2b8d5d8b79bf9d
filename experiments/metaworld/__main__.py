"""``python -m experiments.metaworld COMMAND ...``."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.runner.cli import Command, dispatch
from experiments.runner.ending import leave

COMMANDS = {
    "collect": Command("experiments.metaworld.collect", "demonstrations by metaworld's scripted experts"),
    "import": Command(
        "experiments.metaworld.importing", "the published trajectories that the paper trains on, as demonstrations"
    ),
    "pretrain": Command(
        "experiments.metaworld.pretrain", "train a Decision Transformer on the demonstrations of many tasks"
    ),
    "finetune": Command(
        "experiments.metaworld.finetune", "fine-tune it on one task: fft, lora, dora, eva, eva-dora, pissa, ..."
    ),
    "evaluate": Command(
        "experiments.metaworld.evaluate", "success and return of a checkpoint, measured in the simulator; video"
    ),
    "table": Command(
        "experiments.metaworld.table", "runs side by side with the paper's Tables 23 and 24, as Markdown, CSV, a plot"
    ),
    "compare": Command(
        "experiments.comparisons.metaworld",
        "methods on several tasks and seeds: tuned learning rates, intervals, report",
    ),
    "report": Command("experiments.report", "a page on any finished runs: report RUN...; curves, rank maps, data"),
    "benchmark": Command("benchmarks.metaworld", "speed of collection, data pipeline and rollouts"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (``sys.argv`` for None) and return its exit status."""
    return dispatch("python -m experiments.metaworld", COMMANDS, args)


if __name__ == "__main__":
    leave(main())
