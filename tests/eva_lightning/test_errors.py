"""The project's errors: one class, one wording, and where built-in exceptions are expected they still fit."""

from __future__ import annotations

import pickle

import pytest

from eva_lightning.errors import (
    InputError,
    InputTypeError,
    MissingInputError,
    UnreachableError,
    check_choice,
    check_number,
    unknown,
)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InputError, ValueError),
        (InputTypeError, TypeError),
        (MissingInputError, FileNotFoundError),
        (UnreachableError, ConnectionError),
    ],
)
def test_every_error_is_an_input_error_and_its_builtin(kind: type[InputError], builtin: type[Exception]) -> None:
    error = kind("data/vtab is missing", setting="root")
    assert isinstance(error, builtin)
    assert isinstance(error, InputError)
    assert str(error) == "data/vtab is missing"
    assert error.setting == "root"
    assert str(pickle.loads(pickle.dumps(error))) == "data/vtab is missing"  # errors cross processes


def test_programming_errors_are_no_input_errors() -> None:
    for builtin in (ValueError, TypeError, FileNotFoundError, ConnectionError):
        assert not issubclass(builtin, InputError)


def test_the_nearest_name_is_suggested() -> None:
    assert unknown("engine", "exakt", ["auto", "exact", "sketch"]) == "unknown engine 'exakt': did you mean exact?"
    assert unknown("engine", "?", ["auto", "exact"]) == "unknown engine '?': choose from auto, exact"


def test_choices() -> None:
    check_choice("engine", "exact", ["exact", "sketch"])
    with pytest.raises(InputError, match="unknown engine 'exakt': did you mean exact") as caught:
        check_choice("engine", "exakt", ["exact", "sketch"])
    assert caught.value.setting == "engine"


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"at_least": 1, "whole": True}, "r must be a whole number of at least 1, got 0"),
        (1.5, {"at_least": 1, "whole": True}, "r must be a whole number of at least 1, got 1.5"),
        (True, {"at_least": 1, "whole": True}, "r must be a whole number of at least 1, got True"),
        (0.0, {"above": 0, "at_most": 1}, "r must be a number above 0 and of at most 1, got 0.0"),
        (float("nan"), {"above": 0}, "r must be a number above 0, got nan"),
        (float("inf"), {}, "r must be a number, got inf"),
        ("3", {"above": 0}, "r must be a number above 0, got '3'"),
        (1.0, {"at_least": 0, "below": 1}, "r must be a number of at least 0 and below 1, got 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(value: object, bounds: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_number("r", value, **bounds)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_numbers_in_range_pass() -> None:
    check_number("tau", 1, above=0, at_most=1)
    check_number("r", 1, at_least=1, whole=True)
    check_number("lr", 1e-3, above=0)
