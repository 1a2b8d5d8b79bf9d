"""YAML of people: mistakes are said with file and line, and nothing is built that would not fit into memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from eva_lightning.errors import InputError
from experiments.runner.yaml_files import read_yaml
from experiments.vtab.__main__ import main

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
BAD = {
    "brackets": ("task: kitti\nlrs: [1, 2\nepochs: 3\n", r"\(line 3: did not find expected ',' or '\]'\)"),
    "deep": ("[" * 100_000, "line 1: too many values or levels"),
    "deep by aliases": ("a0: &a0 x\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 90)), "too many values"),
    "laughs": (LAUGHS, r"line \d: too many values or levels"),
    "merged laughs": (LAUGHS.replace("[x, x]", "{x: 1}") + "z: {<<: [*a0, *a0]}\n", "too many values or levels"),
    "itself": ("a: &a [*a]\n", "line 1: a part contains itself"),
    "key itself": ("&a {*a : 1}\n", "contains itself|unhashable"),
    "twice": ("lr: 1e-3\nepochs: 3\nlr: 1e-2\n", "line 3: 'lr' is there twice"),
    "python": ("lr: !!python/object/apply:os.system ['x']\n", "line 1: could not determine a constructor"),
    "date": ("a: 2001-99-99\n", "month must be in"),
    "digits": ("a: " + "9" * 5000, "line 1: '9+.*9+' must be a usual decimal number"),
    "base 8": ("a: 1\nepochs: 010\n", "line 2: '010' must be a usual decimal number"),
    "base 60": ("lrs: [1e-3, 1:30]\n", "line 1: '1:30' must be a usual decimal number"),
    "long": ("a: " + "1:" * 6000 + "1", "line 1: a value is too long"),
    "unknown alias": ("a: 1\nb: *x\n", "line 2: found undefined alias"),
    "list key": ("[1]: 2\n", "line 1: found unhashable key"),
    "two": ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
    "tab": ("a:\n\t- b\n", "line 2: found character that cannot start any token"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_sentence_with_the_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = BAD[name]
    file = tmp_path / "c.yaml"
    file.write_text(text)
    started = time.perf_counter()
    with pytest.raises(InputError, match=rf"c\.yaml is damaged .*(?:{message})"):
        read_yaml(file)
    assert main(["--config", str(file)]) == 2
    assert time.perf_counter() - started < 5
    said = capsys.readouterr().err
    assert said.startswith(f"error: --config: {file} is damaged")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("content", [bytes(range(256)), b"\xff\xfea: 1", b"a: 1\nb: \0\n", b"\x89PNG\r\n\x1a\n"])
def test_binary_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"c\.yaml is damaged"):
        read_yaml(tmp_path / "c.yaml")


def test_good_files_are_what_yaml_makes_of_them(tmp_path: Path) -> None:
    text = "a: &x {lr: 1e-3, n: [1, 2]}\nb: *x\nc: {<<: *x, n: 3}\nd: null\ne: näme\n'1': 2\n"
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "c.yaml") == yaml.safe_load(text)
    (tmp_path / "c.yaml").write_text("")
    assert read_yaml(tmp_path / "c.yaml") is None
