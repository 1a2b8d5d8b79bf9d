"""Typed settings of a command: one frozen dataclass is its command line, its YAML file and its ``config.yaml``."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar, get_type_hints

S = TypeVar("S")

#: Of paths that users gave: no permission, a file in place of a folder or the other way round, a read-only disk.
_UNUSABLE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS)


def option(default: Any, text: str) -> Any:
    """A field of a settings dataclass: its default (``MISSING``: required) and its line in ``--help``."""
    return field(default=default, metadata={"help": text})


def parse_settings(kind: type[S], prog: str, description: str, args: Sequence[str] | None = None) -> S:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``.

    Args:
        kind: A dataclass whose fields are all made by :func:`option`; ``batch_size`` becomes ``--batch-size``.
        prog: How the command is called, for ``--help``.
        description: One sentence for ``--help``.
        args: The words of the command line.

    Raises:
        SystemExit: An unknown option or a value of the wrong type; the reason is on standard error.
        ValueError: Raised by the dataclass itself.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    hints = get_type_hints(kind)
    for item in fields(kind):  # type: ignore[arg-type]
        flag = "--" + item.name.replace("_", "-")
        text = item.metadata["help"]
        if hints[item.name] is bool:
            parser.add_argument(flag, nargs="?", const=True, type=bool, default=item.default, help=text)
        elif item.default is MISSING:
            parser.add_argument(flag, type=hints[item.name], required=True, help=text)
        else:
            parser.add_argument(flag, type=hints[item.name], default=item.default, help=text)
    values = parser.parse_args(None if args is None else list(args)).as_dict()
    values.pop("config", None)
    return kind(**values)


def in_terminal(run: Callable[[Sequence[str] | None], Any], args: Sequence[str] | None = None) -> int:
    """`run` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    try:
        run(args)
    except (FileNotFoundError, ValueError, TypeError, ConnectionError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _UNUSABLE:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in _UNUSABLE and error.filename is not None:
        return f"{error.filename} cannot be used: {(error.strerror or '').lower()}"
    return str(error)
