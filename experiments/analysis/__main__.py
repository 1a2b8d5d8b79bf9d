"""``python -m experiments.analysis [COMMAND] ...``: without a command, all analyses of one model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.runner.cli import Command, dispatch
from experiments.runner.ending import leave

COMMANDS = {
    "all": Command("experiments.analysis", "components, ranks and distances of adapters of one model"),
    "gradients": Command(
        "experiments.analysis.gradient_norms", "gradient norms and losses of the first steps, of many runs (Figure 4)"
    ),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (``sys.argv`` for None) and return its exit status."""
    words = list(sys.argv[1:] if args is None else args)
    implied = ["all"] if not words or words[0].startswith("-") else []
    return dispatch("python -m experiments.analysis", COMMANDS, [*implied, *words])


if __name__ == "__main__":
    leave(main())
