"""``eva-lightning COMMAND ...``, which in a checkout is also ``python -m experiments COMMAND ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

import eva_lightning
from experiments.runner.cli import Command, dispatch
from experiments.runner.ending import leave

COMMANDS: dict[str, Command] = {
    "finetune": Command("experiments.finetune", "fine-tune a pre-trained model on a folder of your images"),
    "vtab": Command("experiments.vtab.__main__", "VTAB-1K: single runs, the whole benchmark, its tables", "main"),
    "metaworld": Command("experiments.metaworld.__main__", "Meta-World: demonstrations, training, rollouts", "main"),
    "analysis": Command("experiments.analysis.__main__", "components and ranks of a model's adapters", "main"),
    "report": Command("experiments.report", "a page on any finished runs: report RUN..."),
    "demo": Command("experiments.demo", "two comparisons on bundled data, with a report page", "main"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (``sys.argv`` for None) and return its exit status."""
    words = list(sys.argv[1:] if args is None else args)
    if words == ["--version"]:
        print(f"eva_lightning {eva_lightning.__version__}")
        return 0
    return dispatch("eva-lightning", {name: each for name, each in COMMANDS.items() if find_spec(each.module)}, words)


if __name__ == "__main__":
    leave(main())
