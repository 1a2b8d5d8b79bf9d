"""Typed settings of a command: one frozen dataclass is its command line, its YAML file and its ``config.yaml``.

A setting says its role where it is declared. Run identity, shared caches and comparability are derived from the roles;
nothing else keeps lists of names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Flag
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from eva_lightning.errors import InputError, InputTypeError, check_choice, check_number, unknown
from eva_lightning.names import check_length, shown
from eva_lightning.reading import in_short
from experiments.runner.calling import as_called
from experiments.runner.help import help_text
from experiments.runner.yaml_files import is_unusual_number, read_yaml

S = TypeVar("S")


class Role(Flag):
    """What a setting is for. Roles combine: ``Role.RESULT | Role.PER_RUN``."""

    #: Where and how fast a run happens, never what comes out: folders, workers, progress bars.
    PLACE = 1
    #: Changes what comes out: part of a run's identity.
    RESULT = 2
    #: Changes the inputs of the initialisation or how they are decomposed, and so what comes out: runs that agree in
    #: these settings share an EVA state.
    INITIALISATION = 4 | 2
    #: Differs between the runs of one experiment: its axes, such as task, method, learning rate and seed.
    PER_RUN = 8
    #: Which runs a command does, or what it reports of them; no part of any run.
    SELECTION = 16


def option(
    default: Any,
    text: str,
    role: Role,
    *,
    choices: Iterable[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    identity: Callable[[Any], Any] | None = None,
    omit_default: bool = False,
    non_finite: bool = False,
    positional: bool = False,
    topic: str | None = None,
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: Its default; ``dataclasses.MISSING``: required.
        text: Its line in ``--help``.
        role: What it is for.
        choices: The values allowed; of a list, for each of its items.
        at_least, above, at_most, below: Bounds of a number, or of each number in a list. None passes.
        identity: What stands for the value in a run's identity, such as a digest for the path of a file.
        omit_default: No part of a run's identity while it has its default: for settings that came later, so that runs
            from before keep theirs.
        non_finite: Infinity and NaN mean something here; everywhere else they are refused.
        positional: Words of the command line that belong to no option are its items; of one list of texts alone.
        topic: Where ``--help`` shows it, if not where :mod:`experiments.runner.topics` has its name.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {
        "help": text,
        "role": role,
        "choices": None if choices is None else tuple(choices),
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        "identity": identity,
        "omit_default": omit_default,
        "non_finite": non_finite,
        "positional": positional,
        "topic": topic,
    }
    return dataclasses.field(default=default, metadata=metadata)


_HINTS: dict[Any, dict[str, Any]] = {}


def _hints(kind: Any) -> dict[str, Any]:
    """Annotations of a dataclass, evaluated once: a sweep makes thousands of objects of one class."""
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    return _HINTS[kind]


def check_settings(settings: Any) -> None:
    """Check the values of a settings dataclass: all numbers finite, and within the choices and bounds of its options.

    A text is no longer than a path, so that what names a file is refused before anything starts.

    Raises:
        InputError: One does not fit; ``setting`` names it.
    """
    hints = _hints(type(settings))
    for item in fields(settings):
        value, metadata = getattr(settings, item.name), item.metadata
        _check_finite(item, value)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str):
                check_length(item.name, Path(each), setting=item.name)
        if value is None or not (metadata.get("choices") or metadata.get("bounds")):
            continue
        for each in value if isinstance(value, tuple) else (value,):
            if metadata["choices"] is not None:
                # of a list `methods` each item is a method
                name = item.name.removesuffix("s") if isinstance(value, tuple) else item.name
                try:
                    check_choice(name, each, metadata["choices"])
                except InputError as error:
                    error.setting = item.name
                    raise
            if metadata["bounds"]:
                check_number(item.name, each, whole=not _accepts(hints[item.name], float), **metadata["bounds"])


def _check_finite(item: Field[Any], value: Any) -> None:
    """Refuse infinity and NaN, alone or in a list or mapping, where an option does not declare a meaning for them."""
    if isinstance(value, float) and not math.isfinite(value) and not item.metadata.get("non_finite"):
        raise InputError(f"{item.name} must be a finite number, got {value}", setting=item.name)
    if isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            _check_finite(item, each)


def role_of(item: Field[Any]) -> Role:
    """The role of a field.

    Raises:
        TypeError: It has none.
    """
    role = item.metadata.get("role")
    if not isinstance(role, Role):
        raise TypeError(f"setting {item.name} has no role: declare it with option(...)")
    return role


def identity(settings: Any, role: Role = Role.RESULT, without: Role | None = None) -> dict[str, Any]:
    """The settings that have `role`, as plain JSON values: equal for runs that are the same in this respect.

    Args:
        settings: A settings dataclass.
        role: ``Role.RESULT``: what tells one run from another; ``Role.INITIALISATION``: what runs that share an EVA
            state agree in.
        without: Leave out settings with this role: ``Role.PER_RUN`` gives what all runs of an experiment agree in.
    """
    found = {}
    for item in fields(settings):
        has = role_of(item)
        value = getattr(settings, item.name)
        if item.metadata["omit_default"] and value == item.default:
            continue
        if role in has and (without is None or without not in has):
            stands_for = item.metadata["identity"]
            found[item.name] = plain(value if stands_for is None else stands_for(value))
    return found


def has_identity(settings: Any, name: str) -> bool:
    """Whether something else stands for the value of a setting in a run's identity, as for the path of a file."""
    return any(item.name == name and item.metadata["identity"] is not None for item in fields(settings))


def plain(value: Any) -> Any:
    """`value` as JSON and YAML have it: tuples as lists, dataclasses as mappings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value


class _Parser(ArgumentParser):
    """Says what is wrong in one sentence, without 40 lines of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise InputError(_printable(" ".join(message.split()))) from ex


def _printable(text: str) -> str:
    """`text` with control characters, and others that a terminal does not show, escaped."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def parse_settings(kind: type[S], prog: str, description: str, args: Sequence[str] | None = None) -> S:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``.

    ``batch_size`` becomes ``--batch-size``. Lists are YAML lists in files and words with commas on the command line
    (``--lrs 1e-3,5e-4``); mappings likewise (``--rates lora=1e-3,eva:2=1e-2``).

    Args:
        kind: A dataclass whose fields are all made by :func:`option`.
        prog: How the command is called, for ``--help``.
        description: One sentence for ``--help``.
        args: The words of the command line.

    Raises:
        InputError: An unknown option or key (suggests the nearest), or a value of the wrong type.
        SystemExit: ``--help`` or ``--help-all`` has been answered.
    """
    hints = _hints(kind)
    items = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    given = list(sys.argv[1:] if args is None else args)
    _answer_help(prog, description, items, hints, given)
    words = _as_yaml(_gathered(given, items, hints), hints)
    _refuse_unknown(words, items)
    config_files(words)
    try:
        values = _parser(cast(Any, kind), prog).parse_args(words).as_dict()
    except InputError as error:
        raise _in_one_line(_reworded(error, hints)) from error.__cause__
    except (ArithmeticError, ValueError, TypeError, RecursionError) as error:  # of jsonargparse, on impossible values
        raise InputError(f"the command line cannot be read: {in_short(error)}") from error
    values.pop("config", None)
    values = {name: values[_key(name)] for name in items}
    for name, value in values.items():
        if value is None and items[name].default is not None and not _accepts(hints[name], type(None)):
            raise InputTypeError(f"{name} must be {_described(hints[name])}, got none", setting=name)
        _check_finite(items[name], value)
    return kind(**{name: _typed(value, hints[name]) for name, value in values.items()})


def _answer_help(
    prog: str, description: str, items: Mapping[str, Field[Any]], hints: Mapping[str, Any], words: Sequence[str]
) -> None:
    """Print the options and end, where the command line asks for them."""
    asked = next((word for word in words if word in ("-h", "--help", "--help-all")), None)
    if asked is not None:
        by_flag = {flag(name): item for name, item in items.items()}
        types_of = {flag(name): hints[name] for name in items}
        print(help_text(prog, description, by_flag, types_of, "--help-all" if asked == "--help-all" else "--help"))
        sys.exit(0)


@functools.lru_cache(maxsize=16)
def _parser(kind: Any, prog: str) -> _Parser:
    """The parser of a command, made once: that takes longer than parsing."""
    parser = _Parser(prog=as_called(prog), allow_abbrev=False)
    parser.add_argument("--config", action="config")
    for item in fields(kind):
        _add(parser, item.name, item, _hints(kind)[item.name])
    return parser


def config_files(words: Sequence[str]) -> list[Any]:
    """The content of each YAML file that ``--config`` names on a command line.

    Raises:
        InputError: One is missing or cannot be read; says which and in which line.
    """
    found = []
    for word, following in zip(words, [*words[1:], ""][: len(words)], strict=True):
        name, equals, value = word.partition("=")
        file = value if equals else following
        if name == "--config" and file:
            try:
                found.append(read_yaml(file))
            except InputError as error:
                raise type(error)(f"--config: {error}") from error
    return found


def flag(name: str) -> str:
    """``batch_size`` as it is written on a command line: ``--batch-size``; ``from_``, Python's word, is ``--from``."""
    return "--" + _key(name).replace("_", "-")


def _key(name: str) -> str:
    """A setting's name in YAML files: without the underscore that tells it from a word of Python."""
    return name.rstrip("_")


def _add(parser: ArgumentParser, name: str, item: Field[Any], hint: Any) -> None:
    if hint is bool:
        parser.add_argument(flag(name), nargs="?", const=True, type=bool, default=item.default)
    elif item.default is MISSING:
        parser.add_argument(flag(name), type=hint, required=True)
    else:
        parser.add_argument(flag(name), type=hint, default=item.default)


def _refuse_unknown(words: Sequence[str], items: Mapping[str, Any]) -> None:
    known = ["--config", "--help", "--help-all", "--print_config", *map(flag, items)]
    for word in words:
        name = word.partition("=")[0]
        if word.startswith("--") and name not in known:
            raise InputError(unknown("option", name, known, list_all=False))


def _gathered(words: list[str], items: Mapping[str, Field[Any]], hints: Mapping[str, Any]) -> list[str]:
    """Words that belong to no option, as a list, behind the option that takes them; else the words as they are."""
    name = next((name for name, item in items.items() if item.metadata["positional"]), None)
    if name is None:
        return words
    switches = [flag(each) for each, hint in hints.items() if hint is bool]
    loose: list[str] = []
    rest: list[str] = []
    before = ""  # the option that the next word may be the value of
    for word in words:
        is_value = before and (before not in switches or word in ("true", "false"))
        (rest if word.startswith("--") or is_value else loose).append(word)
        before = word if word.startswith("--") and "=" not in word else ""
    return [*rest, f"{flag(name)}={json.dumps(loose)}"] if loose else rest


def _as_yaml(words: list[str], hints: Mapping[str, Any]) -> list[str]:
    """Words with commas as YAML lists or mappings, for the options that take those."""
    by_flag = {flag(name): hint for name, hint in hints.items()}
    result: list[str] = []
    expects: Any = None
    for word in words:
        name, equals, value = word.partition("=")
        if expects is not None and not word.startswith("--"):
            _refuse_unusual(result[-1], word, expects)
            word = _yaml_of(word, expects)
        elif equals and name in by_flag:
            _refuse_unusual(name, value, by_flag[name])
            word = f"{name}={_yaml_of(value, by_flag[name])}"
        expects = by_flag.get(word)
        result.append(word)
    return result


def _refuse_unusual(option: str, text: str, hint: Any) -> None:
    """Refuse numbers that YAML reads as others than people do, alone or in a list or mapping."""
    expected = _described(hint)
    odd = next(filter(is_unusual_number, re.split(r"[\s,=\[\]{}]+", text)), None) if "number" in expected else None
    if odd is not None:
        name = option.removeprefix("--").replace("-", "_")
        raise InputError(f"{name} must be {expected}, written as a usual decimal, got {shown(odd)}", setting=name)


def _yaml_of(text: str, hint: Any) -> str:
    if text[:1] in ("[", "{") or text in ("null", ""):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if _accepts(hint, dict):
        pairs = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts)}
        if _accepts(hint, str, inside=dict):
            return json.dumps(pairs)
        return "{" + ", ".join(f"{json.dumps(key)}: {value or 'null'}" for key, value in pairs.items()) + "}"
    if not _accepts(hint, tuple) or ("," not in text and _accepts(hint, int)):
        return text
    quoted = _accepts(hint, str, inside=tuple)
    return "[" + ", ".join(json.dumps(part) if quoted else part for part in parts) + "]"


def _accepts(hint: Any, kind: type, inside: type | None = None) -> bool:
    """Whether an annotation takes values of `kind`, itself or among others; with `inside`, as items of that type."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_accepts(part, kind, inside) for part in get_args(hint))
    if inside is not None:
        return get_origin(hint) is inside and kind in get_args(hint)[inside is dict :]
    if kind is float and get_origin(hint) is tuple:
        return float in get_args(hint)
    return hint is kind or get_origin(hint) is kind


def _typed(value: Any, hint: Any) -> Any:
    return tuple(value) if isinstance(value, list) and _accepts(hint, tuple) else value


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _described(hint: Any) -> str:
    """An annotation in words: what a value must be."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _described(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list, each item {_described(get_args(hint)[0])}"
    if get_origin(hint) in (dict, Mapping):
        return f"a mapping, each value {_described(get_args(hint)[1])}"
    return _KINDS.get(hint, str(hint))


#: How jsonargparse gives the value at fault: of one type, or of several.
_GIVEN = re.compile(r"(?:Got value|Given value): (.*?)(?: - Expected|$)")


#: Characters of the longest message about a command line: those of jsonargparse quote whatever was given.
_LONGEST_MESSAGE = 1000


def _in_one_line(error: InputError) -> InputError:
    text = " ".join(str(error).split())
    if text == str(error) and len(text) <= _LONGEST_MESSAGE:
        return error
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE - 100]}...{text[-90:]}"
    return type(error)(text, setting=error.setting)


def _reworded(error: InputError, hints: Mapping[str, Any]) -> InputError:
    """jsonargparse's words as ours."""
    text = str(error)
    for name, hint in hints.items():
        if text.startswith(f'Parser key "{_key(name)}":') and (found := _GIVEN.search(text)):
            given = found.group(1) if len(found.group(1)) < 200 else f"{found.group(1)[:100]}..."
            return InputTypeError(f"{name} must be {_described(hint)}, got {given}", setting=name)
        if text.startswith(f'Parser key "{_key(name)}": '):
            reason = text.partition(": ")[2]
            # which of several types a value was no value of, and why, goes on for lines
            why = "" if "Union subtypes" in reason else f" ({reason})"
            return InputTypeError(f"{name} must be {_described(hint)}{why}", setting=name)
    if text.startswith("Option '") and text.endswith("is not accepted"):
        return InputError(unknown("setting", text.split("'")[1], map(_key, hints), list_all=False))
    if text.startswith("unrecognized arguments:"):
        return InputError(f"unexpected words on the command line: {shown(text.partition(': ')[2], 200)[1:-1]}")
    if text.startswith("the following arguments are required: "):
        return InputError(f"{flag(text.rpartition(' ')[2])} is required")
    if text.startswith("argument --") and "expected one argument" in text:
        return InputError(f"{text.split(': ')[0].removeprefix('argument ')} needs a value")
    if text.startswith("Unexpected config:"):
        given = text.partition(":")[2].strip() or "nothing"
        return InputError(f"--config: a YAML mapping is needed, got {given}")
    if text.startswith('Parser key "config": '):
        return InputError(f"--config: {text.partition(': ')[2]}")
    return error
