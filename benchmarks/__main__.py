"""``python -m benchmarks NAME ...``: find the benchmark and hand it the rest of the line."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.runner.cli import Command, dispatch
from experiments.runner.ending import leave

COMMANDS = {
    "init": Command("benchmarks.initialisation", "whole initialisation beside the plain forward, PEFT and exact SVDs"),
    "algorithm": Command(
        "benchmarks.algorithm", "the paper's algorithm beside the default and PEFT on the same minibatches"
    ),
    "costs": Command(
        "benchmarks.costs", "seconds, peak memory and share of training of every initialisation (Figure 5)"
    ),
    "resize": Command("benchmarks.resize", "ranks, adapter resize and optimizer rebuild alone"),
    "starts": Command("benchmarks.first_update", "size of the first step from each start, at equal rank"),
    "vtab": Command("benchmarks.vtab", "epochs and data of VTAB-1K beside a bare PyTorch loop; g/14 on a GPU"),
    "metaworld": Command("benchmarks.metaworld", "collection, data and rollouts beside the bare simulator"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (``sys.argv`` for None) and return its exit status."""
    return dispatch("python -m benchmarks", COMMANDS, args)


if __name__ == "__main__":
    leave(main())
