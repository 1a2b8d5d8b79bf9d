"""Reading YAML that people wrote: bounded before anything is built from it, mistakes said with file and line."""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from eva_lightning.names import shown
from eva_lightning.reading import read_text, reading

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: Far more than any file of settings or choices has; parsing so much takes a second.
_MOST_BYTES, _MOST_VALUES, _DEEPEST, _LONGEST = 4 * 2**20, 200_000, 50, 10_000

#: To YAML 1.1, ``010`` is 8 and ``1:30`` is 90; and whole numbers of so many digits fit into no library's integers.
_UNUSUAL = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|[0-9_]{19,})")


def is_unusual_number(word: str) -> bool:
    """Whether YAML reads a word as a number, but people would not, or as another one."""
    return _UNUSUAL.fullmatch(word) is not None


def read_yaml(path: str | os.PathLike[str], remedy: str = "") -> Any:
    """The document in a YAML file; None where it is empty.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is no YAML, names a Python object, has a key twice, is nested too deeply, or refers to itself or
            to other parts of it so often that it would not fit into memory.
    """
    text = read_text(path, remedy, _MOST_BYTES)
    with reading(path, remedy):
        _check_size(text)
        node = yaml.compose(text, LOADER)
        if node is not None:
            _refuse_repeated_keys(node)
        return yaml.load(text, LOADER)


def _problem(text: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


class _Size:
    """Values and levels of a part of a document, with what its aliases stand for."""

    def __init__(self, anchor: str | None) -> None:
        self.anchor, self.values, self.depth = anchor, 1, 1


def _check_size(text: str) -> None:
    """Go through the events of a document, which takes neither recursion nor more memory than the text."""
    known: dict[str | None, _Size | None] = {}
    above = [_Size(None)]
    for event in yaml.parse(text, LOADER):
        if isinstance(event, yaml.AliasEvent):
            part = known.get(event.anchor, _Size(None))
            if part is None:
                raise _problem("a part contains itself", event.start_mark)
        elif isinstance(event, yaml.ScalarEvent):
            part = _Size(event.anchor)
            if len(event.value) > _LONGEST:
                raise _problem("a value is too long", event.start_mark)
            if event.implicit[0] and is_unusual_number(event.value):
                number = shown(event.value)
                raise _problem(f"{number} must be a usual decimal number, or be in quotes", event.start_mark)
        elif isinstance(event, yaml.CollectionStartEvent):
            above.append(_Size(event.anchor))
            part = None
        elif isinstance(event, yaml.CollectionEndEvent):
            part = above.pop()
        else:
            continue
        anchor = above[-1].anchor if part is None else part.anchor
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            known[anchor] = part
        if part is not None:
            above[-1].values += part.values
            above[-1].depth = max(above[-1].depth, part.depth + 1)
        if sum(size.values for size in above) > _MOST_VALUES or len(above) + (part.depth if part else 0) > _DEEPEST:
            raise _problem("too many values or levels", event.start_mark)


def _refuse_repeated_keys(node: yaml.Node) -> None:
    seen: set[int] = set()
    left = [node]
    while left:
        part = left.pop()
        if id(part) in seen or isinstance(part, yaml.ScalarNode):
            continue
        seen.add(id(part))
        if isinstance(part, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in part.value:
                if key.value in keys if isinstance(key, yaml.ScalarNode) else False:
                    raise _problem(f"{key.value!r} is there twice", key.start_mark)
                if isinstance(key, yaml.ScalarNode):
                    keys.add(key.value)
                left += [key, value]
        else:
            left += part.value
