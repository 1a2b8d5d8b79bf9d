"""What ``--help`` and ``--help-all`` of a command print: its options by topic, with choices and defaults.

``--help`` of a command with many options has the common ones, a line each, so that they fit on one screen.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field
from typing import Any, Literal, get_args, get_origin

from experiments.runner.calling import as_called
from experiments.runner.topics import COMMON, TOPICS, place_of, topic_of

#: A command with no more options than this shows all of them at once.
_FEW = 14
#: Characters of choices that stand in braces behind the option, where all is shown and where there is a line for each.
_BRACES, _SHORT_BRACES = 44, 12
#: Characters of the longest default in a line, and of the longest name that stands for its own value.
_DEFAULT, _NAME = 22, 8
_NARROWEST, _WIDEST = 60, 120
_LEFT = 11  # of the topic's name
_MARGIN = 6  # of a text below its option


Asked = Literal["--help", "--help-all"]


def help_width() -> int:
    """Columns of a help text: those of the terminal, within bounds."""
    return min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)


def help_text(
    prog: str, description: str, items: Mapping[str, Field[Any]], hints: Mapping[str, Any], asked: Asked = "--help"
) -> str:
    """The text of ``--help`` or ``--help-all``, as wide as the terminal.

    Args:
        prog: How the command is called.
        description: What it does.
        items: Its options, by the name on the command line (``--batch-size``).
        hints: The types of their values, by the same names.
        asked: For what.
    """
    width = help_width()
    loose = [
        name.removeprefix("--").removesuffix("s").upper() for name, item in items.items() if item.metadata["positional"]
    ]
    words = " ".join([as_called(prog), *(f"{name}..." for name in loose), "[options]"])
    head = [f"usage: {words}", "", *textwrap.wrap(as_called(description).replace("``", ""), width), ""]
    if asked == "--help-all" or len(items) <= _FEW:
        return "\n".join([*head, *_all(items, hints, width)])
    common = {name: item for name, item in items.items() if item.name in COMMON or item.default is MISSING}
    tail = f"--help-all: all {len(items)} options. --config FILE: any of them from a YAML file."
    return "\n".join([*head, *_lines(common, hints, width), "", *textwrap.wrap(tail, width)])


def _by_topic(items: Mapping[str, Field[Any]]) -> Iterator[tuple[str, list[str]]]:
    """Topic -> names of options, those that are required first."""
    for topic in TOPICS:
        names = [name for name, item in items.items() if (item.metadata["topic"] or topic_of(item.name)) == topic]
        if names:
            yield (
                topic,
                sorted(names, key=lambda name: (items[name].default is not MISSING, place_of(items[name].name))),
            )


def _lines(items: Mapping[str, Field[Any]], hints: Mapping[str, Any], width: int) -> Iterator[str]:
    """A line for each option; texts that are too long are cut, defaults are not."""
    options = {name: f"{name} {_value(item, hints[name], _SHORT_BRACES)}".strip() for name, item in items.items()}
    column = max(map(len, options.values())) + 2
    for topic, names in _by_topic(items):
        for place, name in enumerate(names):
            default = _default(items[name], _DEFAULT)
            room = width - _LEFT - column - len(default) - 1
            text = _text(items[name], hints[name], _SHORT_BRACES)
            text = textwrap.shorten(text, room, placeholder=" ...", break_on_hyphens=False)
            yield f"{topic if place == 0 else '':<{_LEFT}}{options[name]:<{column}}{text} {default}".rstrip()


def _all(items: Mapping[str, Field[Any]], hints: Mapping[str, Any], width: int) -> Iterator[str]:
    """Every option with its whole text below it, or beside it where that is short."""
    for topic, names in _by_topic(items):
        yield f"{topic}:"
        for name in names:
            item = items[name]
            option = f"  {name} {_value(item, hints[name], _BRACES)}".rstrip()
            default, text = _default(item), _text(item, hints[name], _BRACES)
            if len(option) + 2 + len(default) > width:  # a long list
                default, text = "", f"{text} {default.replace(',', ', ')}"
            yield f"{option}  {default}".rstrip()
            indent = " " * _MARGIN
            yield from textwrap.wrap(
                text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
            )
        yield ""
    yield "  --config FILE"
    yield f"{' ' * _MARGIN}YAML file with any of these options"
    yield "  --help, --help-all"
    yield f"{' ' * _MARGIN}the common options, all options"


def _value(item: Field[Any], hint: Any, most: int) -> str:
    """What stands behind an option: its choices where they are short, else the kind of its value."""
    choices = item.metadata["choices"]
    if choices is not None and len(",".join(choices)) <= most:
        return f"{{{','.join(choices)}}}" + (",..." if get_origin(hint) is tuple else "")
    if hint is bool:
        return "true|false" if item.default is True else ""
    return _kind(hint, item.name.strip("_"))


def _kind(hint: Any, name: str) -> str:
    parts = {get_origin(part) or part for part in (hint, *get_args(hint))}
    if parts & {dict, Mapping}:
        return "NAME=VALUE,..."
    word = name.upper() if len(name) <= _NAME and "_" not in name else "NAME"
    one = "N" if _holds(hint, int) else "X" if _holds(hint, float) else word
    return f"{one.removesuffix('S')},..." if tuple in parts else one


def _holds(hint: Any, kind: type) -> bool:
    return hint is kind or any(_holds(part, kind) for part in get_args(hint))


def _text(item: Field[Any], hint: Any, most: int) -> str:
    """What an option is for, with its choices where they are too long to stand behind it."""
    text, choices = as_called(str(item.metadata["help"])), item.metadata["choices"]
    if choices is None or len(",".join(choices)) <= most or all(choice in text for choice in choices):
        return text
    return f"{text}: {', '.join(choices)}"


def _default(item: Field[Any], most: int = 1000) -> str:
    if item.default is MISSING:
        return "(required)"
    text = "" if item.default is False or item.default in (None, (), "") else _shown(item.default)
    return f"[{text if len(text) <= most else f'{text[: most - 4]} ...'}]" if text else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ",".join(f"{name}={_shown(each)}" for name, each in value.items())
    return ",".join(map(_shown, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
