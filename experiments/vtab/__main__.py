"""``python -m experiments.vtab [COMMAND] ...``: finds the command's module and hands it the rest of the line.

Without a command, a line that names a ``--task`` is one run, and one that does not is the whole benchmark (``sweep``).
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from eva_lightning.errors import unknown

#: Command -> what ``--help`` says about it. The module has the same name and a function ``command_line(args) -> int``.
COMMANDS: dict[str, str] = {
    "prepare": "download or unpack VTAB-1K, or build it from the original data, and check it: one row per task",
    "run": "fine-tune on one task by one method, and test",
    "sweep": "all tasks, methods, learning rates, ranks and seeds as one resumable job; --plan says what it takes",
    "table": "results beside the paper's Tables 20, 21 and 25, as Markdown, CSV, LaTeX and plots",
    "transfer": "all methods on real images without downloaded weights: half of Caltech101 to the other half",
    "benchmark": "speed of data and training beside a bare PyTorch loop",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (``sys.argv`` for None) and return its exit status."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    name = words.pop(0) if not words[0].startswith("-") else _implied(words)
    if name not in COMMANDS:
        print(f"error: {unknown('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks of kernels that nothing here needs
    command = importlib.import_module("tools.vtab.prepare" if name == "prepare" else f"experiments.vtab.{name}")
    status: int = command.command_line(words)
    return status


def _implied(words: Sequence[str]) -> str:
    """One run where the line, or the YAML file it names, has a task; the whole benchmark otherwise."""
    import yaml

    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        if flag == "--task":
            return "run"
        file = Path(value or following)
        if flag == "--config" and file.is_file():
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
            if isinstance(settings, dict) and settings.get("task"):
                return "run"
    return "sweep"


def _usage() -> str:
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m experiments.vtab COMMAND [options]",
            "       python -m experiments.vtab --task TASK [options]    the same as run",
            "       python -m experiments.vtab [options]                the same as sweep: the whole benchmark",
            "",
            *lines,
            "",
            "python -m experiments.vtab COMMAND --help says more",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
