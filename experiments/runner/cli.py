"""What all command lines share: finding a command by its name, and how a command ends."""

from __future__ import annotations

import errno
import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eva_lightning.errors import InputError, unknown
from eva_lightning.files import is_disk_full
from eva_lightning.names import shown
from experiments.runner.calling import as_called
from experiments.runner.ending import Ending, asked_to_end
from experiments.runner.help import help_width
from experiments.runner.settings import flag

#: Errors of the system that are about a path that was given, not a fault of the program.
_OF_A_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Command:
    """A command of ``python -m PACKAGE``.

    Attributes:
        module: Where it is; imported when it is called.
        text: Its line in ``--help``.
        function: Of the module: takes the words and returns the exit status. ``main`` where there are commands below.
    """

    module: str
    text: str
    function: str = "command_line"


def in_terminal(run: Callable[[Sequence[str] | None], Any], args: Sequence[str] | None = None) -> int:
    """Call `run` for a terminal and return the exit status.

    An :class:`~eva_lightning.errors.InputError`, a path that cannot be used or a full disk becomes one sentence on
    standard error and status 2; Ctrl-C gives status 130, SIGTERM 143, SIGHUP 129. Any other exception is a fault of the
    program and passes, with its traceback.
    """
    ending = Ending()
    try:
        with asked_to_end() as ending:
            run(args)
    except InputError as error:
        return _refused(error)
    except KeyboardInterrupt:
        return ending.status
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename is not None:
            return _refused(InputError(f"cannot use {shown(str(error.filename))}: {str(error.strerror).lower()}"))
        if not is_disk_full(error):
            raise
        print(f"error: the disk is full ({error}): what was done stays; make room, then run it again", file=sys.stderr)
        return 2
    return 0


def _refused(error: InputError) -> int:
    print(f"error: {sentence(error)}", file=sys.stderr)
    return 2


def sentence(error: InputError) -> str:
    """The message of an error with the setting at fault written as on the command line."""
    text = as_called(str(error))
    if error.setting is None:
        return text
    if text.startswith(error.setting):
        return flag(error.setting) + text[len(error.setting) :]
    return f"{flag(error.setting)}: {text}"


def dispatch(
    prog: str,
    commands: Mapping[str, Command],
    args: Sequence[str] | None = None,
    implied: Callable[[Sequence[str]], str] | None = None,
    usage: Sequence[str] = (),
) -> int:
    """Find the command that the first word names and hand it the rest of the line.

    Args:
        prog: How the package is called, such as ``python -m experiments.vtab``.
        commands: Name -> command.
        args: The words of the command line; ``sys.argv`` for None.
        implied: The command meant by a line that begins with an option.
        usage: Further lines of usage.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help", "--help-all"):
        print("\n".join(_usage(prog, commands, usage)))
        return 0 if words else 2
    try:
        name = implied(words) if implied is not None and words[0].startswith("-") else words.pop(0)
    except InputError as error:
        return _refused(error)
    if name not in commands:
        print(f"error: {unknown('command', name, commands)}", file=sys.stderr)
        return 2
    statuses: list[int] = []

    def call(words: Sequence[str] | None) -> None:
        command = commands[name]
        statuses.append(getattr(importlib.import_module(command.module), command.function)(words))

    return in_terminal(call, words) or statuses[0]


def _usage(prog: str, commands: Mapping[str, Command], more: Sequence[str]) -> Iterator[str]:
    """The lines of ``--help``, as wide as the terminal."""
    yield from map(as_called, (f"usage: {prog} COMMAND [options]", *more, ""))
    column = 2 + max(10, *(len(name) + 2 for name in commands))
    for name, command in commands.items():
        head = f"  {name}".ljust(column)
        yield from textwrap.wrap(
            command.text, help_width(), initial_indent=head, subsequent_indent=" " * column, break_on_hyphens=False
        )
    yield ""
    yield as_called(f"{prog} COMMAND --help says more")
