"""A command whose settings are a dataclass and whose work is a function of another, heavier module."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from experiments.runner.cli import in_terminal
from experiments.runner.settings import parse_settings

S = TypeVar("S")


@runtime_checkable
class HasExitStatus(Protocol):
    """What work may return to say how a command ends, such as the results of a comparison."""

    @property
    def exit_status(self) -> int:
        """0: all is well; 1: something failed."""
        ...


#: Exit status of a command whose run ended, and diverged on the way: NaN or infinity in its loss or weights.
DIVERGED = 3


def exit_status(result: Any) -> int:
    """How a command ends by what its work returned: one thing or several; metrics of a run may say ``diverged``."""
    if isinstance(result, HasExitStatus):
        return result.exit_status
    if isinstance(result, Mapping):
        return DIVERGED if result.get("diverged") else 0
    return max(map(exit_status, result), default=0) if isinstance(result, list) else 0


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
        """:meth:`main` for a terminal, giving its exit status: of :func:`in_terminal`, or the work's (3: diverged)."""
        results: list[Any] = []
        status = in_terminal(lambda words: results.append(self.main(words)), args)
        return status or exit_status(results)
