from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from eva_lightning.errors import InputError, InputTypeError
from experiments.runner.cli import in_terminal
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, check_settings, identity, option, parse_settings, plain, role_of
from tests.paths import ROOT


@dataclass(frozen=True)
class Settings:
    """One of each kind."""

    task: str = option(MISSING, "task", Role.RESULT | Role.PER_RUN)
    method: str = option("eva", "method", Role.RESULT | Role.PER_RUN, choices=("eva", "lora", "dora"))
    batch_size: int = option(64, "images per step", Role.INITIALISATION, at_least=1)
    lr: float = option(1e-3, "learning rate", Role.RESULT | Role.PER_RUN, above=0)
    tau: float = option(0.99, "threshold", Role.INITIALISATION, above=0, at_most=1)
    limit: int | None = option(None, "images", Role.INITIALISATION, at_least=1)
    weights: str = option("none", "weights", Role.INITIALISATION, identity=lambda value: value.rpartition("/")[2])
    methods: tuple[str, ...] = option(("eva",), "methods", Role.SELECTION, choices=("eva", "lora", "eva:2"))
    lrs: tuple[float, ...] = option((1e-3, 1e-2), "rates", Role.SELECTION, above=0)
    ranks: tuple[int, ...] | None = option(None, "ranks", Role.SELECTION, at_least=1)
    seeds: int | tuple[int, ...] = option(3, "how many, or which", Role.SELECTION)
    rates: Mapping[str, float] | None = option(None, "rates", Role.SELECTION)
    given: dict[str, float] | None = option(None, "rates", Role.SELECTION)
    asked: dict[str, str] | None = option(None, "words", Role.PLACE)
    output: str = option("runs", "folder", Role.PLACE)
    progress: bool = option(True, "progress", Role.PLACE)

    def __post_init__(self) -> None:
        check_settings(self)


def parse(text: str) -> Settings:
    return parse_settings(Settings, "command", "A command", ["--task", "kitti", *text.split()])


def test_words_of_a_command_line() -> None:
    found = parse("--batch-size 8 --lr 1e-2 --limit 3 --output a,b --progress false")
    assert (found.batch_size, found.lr, found.limit, found.output, found.progress) == (8, 0.01, 3, "a,b", False)
    assert parse("--progress").progress
    assert parse("--progress=false --batch-size=9").batch_size == 9
    found = parse("--lrs 1e-3,5e-4 --methods eva,lora,eva:2 --ranks 4")
    assert (found.lrs, found.methods, found.ranks) == ((1e-3, 5e-4), ("eva", "lora", "eva:2"), (4,))
    assert parse("--lrs 1e-3").lrs == (1e-3,)
    assert parse("--lrs [1e-3,2]").lrs == (1e-3, 2.0)
    assert (parse("--seeds 5").seeds, parse("--seeds 5,7").seeds) == (5, (5, 7))
    assert parse("--given lora=1e-2,eva:2=3e-2").given == {"lora": 0.01, "eva:2": 0.03}
    assert parse("--asked time=4:00:00,nodes=2").asked == {"time": "4:00:00", "nodes": "2"}
    assert parse("--limit null").limit is None


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lrs: [1e-3, 0.5]\nbatch_size: 4\nmethods: [lora]\ngiven: {lora: 1e-2}\nseeds: [1, 2]\n")
    found = parse(f"--config {file} --batch-size 16")
    assert (found.lrs, found.batch_size, found.methods) == ((1e-3, 0.5), 16, ("lora",))
    assert (found.given, found.seeds) == ({"lora": 0.01}, (1, 2))
    file.write_text("batchsize: 4\n")
    with pytest.raises(InputError, match="unknown setting 'batchsize': did you mean batch_size"):
        parse(f"--config {file}")
    file.write_text("- 1\n")
    with pytest.raises(InputError, match="--config: a YAML mapping is needed, got - 1"):
        parse(f"--config {file}")
    with pytest.raises(InputError, match=r"--config.*nowhere"):
        parse("--config nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--batchsize 3", "unknown option '--batchsize': did you mean --batch-size"),
        ("--batch_size 3", "unknown option '--batch_size': did you mean --batch-size"),
        ("--batch-size", "--batch-size needs a value"),
        ("--batch-size x", "--batch-size must be a whole number, got x"),
        ("--batch-size 0", "--batch-size must be a whole number of at least 1, got 0"),
        ("--lr -1", "--lr must be a number above 0, got -1.0"),
        ("--lr .nan", "--lr must be a finite number, got nan"),
        ("--lr .inf", "--lr must be a finite number, got inf"),
        ("--lr 1e999", "--lr must be a finite number, got inf"),
        ("--lrs 1e-3,.inf", "--lrs must be a finite number, got inf"),
        ("--given lora=.inf", "--given must be a finite number, got inf"),
        ("--batch-size .inf", "--batch-size must be a whole number, got inf"),
        ("--batch-size null", "--batch-size must be a whole number, got None"),
        ("--tau 2", "--tau must be a number above 0 and of at most 1, got 2.0"),
        ("--limit x", "--limit must be a whole number or none, got x"),
        ("--lrs 1,x", "--lrs must be a list, each item a number, got"),
        ("--lrs 1,-1", "--lrs must be a number above 0, got -1.0"),
        ("--method lorra", "unknown method 'lorra': did you mean lora or dora?"),
        ("--methods eva,lorra", "unknown method 'lorra': did you mean lora?"),
        ("--progress maybe", "--progress must be true or false, got maybe"),
        ("stray", "unexpected words on the command line: stray"),
        pytest.param("[" * 5000, "unexpected words on the command line: [[[", id="long words"),
        pytest.param(
            "--given " + "x" * 5000, "--given must be a mapping, each value a number or none", id="long value"
        ),
        ("--given lora=x", "--given must be a mapping, each value a number or none, got"),
    ],
)
def test_mistakes_are_one_sentence(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_terminal(lambda words: parse(text)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert len(error) < 1100


def test_what_is_required() -> None:
    with pytest.raises(InputError, match="--task is required"):
        parse_settings(Settings, "command", "A command", [])
    with pytest.raises(InputTypeError):
        parse("--batch-size x")


def test_identity_follows_roles() -> None:
    settings = Settings(task="kitti", weights="here/w.pth", lr=0.5)
    everything = {
        "task": "kitti", "method": "eva", "batch_size": 64, "lr": 0.5, "tau": 0.99, "limit": None, "weights": "w.pth",
    }  # fmt: skip
    assert identity(settings) == everything
    assert identity(settings, Role.INITIALISATION) == {
        name: everything[name] for name in ("batch_size", "tau", "limit", "weights")
    }
    shared = identity(settings, Role.RESULT, without=Role.PER_RUN)
    assert shared == {name: everything[name] for name in ("batch_size", "tau", "limit", "weights")}
    assert plain(settings)["weights"] == "here/w.pth"
    assert plain(settings)["lrs"] == [1e-3, 1e-2]


def test_a_setting_without_a_role_is_a_mistake() -> None:
    kind = make_dataclass("Forgotten", [("lr", float, field(default=1.0))])
    with pytest.raises(TypeError, match="setting lr has no role: declare it with option"):
        identity(kind())


def settings_modules() -> list[str]:
    """Modules of commands that declare options."""
    files = [
        file for folder in ("experiments", "tools", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    declaring = [file for file in files if " = option(" in file.read_text(encoding="utf-8")]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in declaring]


def settings_classes() -> dict[str, type[Any]]:
    """Every dataclass of the commands with at least one option, by its full name."""
    found = {}
    for name in settings_modules():
        for value in vars(importlib.import_module(name)).values():
            own = isinstance(value, type) and is_dataclass(value) and value.__module__ == name
            if own and any("role" in item.metadata for item in fields(value)):
                found[f"{name}.{value.__qualname__}"] = value
    return found


def test_every_setting_of_every_command_has_a_role() -> None:
    classes = settings_classes()
    assert "experiments.runner.options.RunnerOptions" in classes
    for name, kind in classes.items():
        for item in fields(kind):
            assert isinstance(role_of(item), Role), f"{name}.{item.name}"
            assert item.metadata["help"], f"{name}.{item.name}"


def test_every_command_names_work_that_exists() -> None:
    commands = {
        value.prog: value.run
        for name in settings_modules()
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, SettingsCommand)
    }
    assert {"python -m experiments.vtab run", "python -m experiments.metaworld finetune"} <= set(commands)
    for prog, work in commands.items():
        module, _, function = work.partition(":")
        assert callable(getattr(importlib.import_module(module), function, None)), f"{prog}: {work}"


@pytest.mark.parametrize("value", ["n" * 256, "a/" + "n" * 256, "ab/" * 2000, "a\0b"])
@pytest.mark.parametrize("name", ["output", "weights", "task"])
def test_what_no_file_system_takes_as_a_path_is_refused_before_anything_starts(name: str, value: str) -> None:
    with pytest.raises(InputError, match=name) as found:
        Settings(**{"task": "push", name: value})
    assert len(str(found.value)) < 300


def test_a_path_that_cannot_be_used_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for path in (tmp_path / ("n" * 300), tmp_path / "loop", tmp_path / "file" / "x", tmp_path):
        assert in_terminal(lambda args, path=path: path.read_text()) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: cannot use ")
        assert error.count("\n") == 1
    # what a program should have looked for is its own fault
    with pytest.raises(FileNotFoundError):
        in_terminal(lambda args: (tmp_path / "missing").read_text())


@pytest.mark.parametrize("value", ["010", "-010", "+07", "0_7", "1:30", "1:30:2.5", "9" * 400, str(2**64)])
@pytest.mark.parametrize("option", ["batch-size", "lr", "lrs", "ranks", "seeds", "given"])
def test_numbers_that_yaml_reads_as_others_are_refused(tmp_path: Path, option: str, value: str) -> None:
    """To YAML 1.1, 010 is 8 and 1:30 is 90; the parser took 010 as 10 for some options and as 8 for others."""
    given = f"eva={value}" if option == "given" else value
    with pytest.raises(InputError, match="decimal, got") as caught:
        parse_settings(Settings, "command", "A command", ["--task=kitti", f"--{option}={given}"])
    assert caught.value.setting == option.replace("-", "_")
    listed = {"lrs": f"[{value}]", "given": f"{{eva: {value}}}"}.get(option, value)
    (tmp_path / "c.yaml").write_text(f"task: kitti\n{option.replace('-', '_')}: {listed}\n")
    with pytest.raises(InputError, match=r"c\.yaml is damaged \(line 2: .* must be a usual decimal number"):
        parse_settings(Settings, "command", "A command", ["--config", str(tmp_path / "c.yaml")])


def test_names_may_look_like_numbers(tmp_path: Path) -> None:
    assert parse("--output 010").output == "010"
    (tmp_path / "c.yaml").write_text("task: kitti\noutput: '010'\n")
    assert parse_settings(Settings, "command", "", ["--config", str(tmp_path / "c.yaml")]).output == "010"


@pytest.mark.parametrize("value", ["5\u200b", "\x1b[31m3", "3\x07"])
def test_messages_show_what_a_terminal_does_not(value: str) -> None:
    with pytest.raises(InputError, match="batch_size must be a whole number") as caught:
        parse_settings(Settings, "command", "A command", ["--task=kitti", f"--batch-size={value}"])
    assert str(caught.value).isprintable()


def test_an_empty_value_is_said_in_few_words() -> None:
    with pytest.raises(InputError, match=r"^seeds must be a whole number or a list, each item a whole number$"):
        parse_settings(Settings, "command", "A command", ["--task=kitti", "--seeds="])
