"""``python -m experiments.metaworld COMMAND ...``: finds the command's module and hands it the rest of the line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from eva_lightning.errors import unknown

#: Command -> what ``--help`` says about it. The module has the same name and a function ``command_line(args) -> int``.
COMMANDS: dict[str, str] = {
    "collect": "demonstrations by metaworld's scripted experts",
    "pretrain": "train a Decision Transformer on the demonstrations of many tasks",
    "finetune": "fine-tune it on one task: fft, lora, dora, eva, eva-dora, pissa, olora, adalora, ...",
    "evaluate": "success and return of a checkpoint, measured in the simulator; video",
    "table": "runs side by side with the paper's Tables 23 and 24, as Markdown, CSV and a plot",
    "compare": "methods on several tasks and seeds: tuned learning rates, intervals, paired differences, report",
    "benchmark": "speed of collection, data pipeline and rollouts",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (``sys.argv`` for None) and return its exit status."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"error: {unknown('command', words[0], COMMANDS)}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"experiments.metaworld.{words[0]}")
    status: int = command.command_line(words[1:])
    return status


def _usage() -> str:
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m experiments.metaworld COMMAND [options]",
            "",
            *lines,
            "",
            "python -m experiments.metaworld COMMAND --help says more",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
