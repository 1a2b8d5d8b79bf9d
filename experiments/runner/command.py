"""A command whose settings are a dataclass and whose work is a function of another, heavier module."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from experiments.runner.cli import in_terminal
from experiments.runner.settings import parse_settings

S = TypeVar("S")


@dataclass(frozen=True)
class SettingsCommand(Generic[S]):
    """The three functions of a command's module: ``parse``, ``main`` and ``command_line``.

    The work is imported once the settings are right: a mistyped option is answered without loading torch.

    Attributes:
        settings: A dataclass whose fields are made by ``option``.
        prog: How the command is called.
        description: One sentence for ``--help``.
        run: ``"package.module:function"``: takes the settings and does the work.
    """

    settings: type[S]
    prog: str
    description: str
    run: str

    def parse(self, args: Sequence[str] | None = None) -> S:
        """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
        return parse_settings(self.settings, self.prog, self.description, args)

    def main(self, args: Sequence[str] | None = None) -> Any:
        """Run the command line `args` (``sys.argv`` for None) and return what the work returns."""
        settings = self.parse(args)
        module, _, function = self.run.partition(":")
        return getattr(importlib.import_module(module), function)(settings)

    def command_line(self, args: Sequence[str] | None = None) -> int:
        """:meth:`main` for a terminal, giving the exit status."""
        return in_terminal(self.main, args)
