"""Options of PEFT's LoraConfig that EVA honours, as arguments of :func:`eva_lightning.adapters.inject`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Union

from eva_lightning.errors import InputError, InputTypeError, check_choice, check_number, unknown

if TYPE_CHECKING:
    from peft import LoraConfig

LoraOptions = Union["LoraConfig", Mapping[str, Any]]
"""A LoraConfig, or a mapping of some of its options."""

DEFAULT_RANK = 16
DEFAULT_ALPHA = 1.0
"""The paper uses 1 throughout (section 4.1)."""

BIASES = ("none", "all", "lora_only")

_PASSED_ON = (
    "alpha_pattern", "fan_in_fan_out", "lora_bias", "lora_dropout", "rank_pattern", "task_type", "use_dora",
    "use_rslora",
    # not PEFT's
    "dora_by_column",
)  # fmt: skip
_TRANSLATED = ("r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "bias")
HONOURED = (*_TRANSLATED, *_PASSED_ON)
# about the file a config was read from, or of no consequence
_DESCRIPTIVE = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")


def injection_arguments(
    lora: Any = None,
    r: int | None = None,
    alpha: float | None = None,
    target_modules: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    head: str | Sequence[str] | None = "auto",
    adapt_frozen: bool = False,
) -> dict[str, Any]:
    """Arguments for :func:`eva_lightning.adapters.inject` from a LoraConfig and the callback's short arguments.

    Args:
        lora: A ``peft.LoraConfig``, a mapping of some of its options, or ``None``.
        r, alpha, target_modules, exclude: As in :func:`eva_lightning.adapters.inject`; ``None``: what `lora` says.
        head: Output layers that train in full; ``"auto"``: what `lora` says (``modules_to_save``), else found.
        adapt_frozen: As in :func:`eva_lightning.adapters.inject`.

    Returns:
        Numbers, strings, lists and dictionaries only, so that a checkpoint can hold them.

    Raises:
        InputError: `lora` contradicts another argument, has an option that EVA cannot honour, or a value is out of
            range.
    """
    options = _stated_options(lora)
    _refuse_unsupported(options)
    arguments = {
        "r": _agreed("r", r, "r", options, DEFAULT_RANK),
        "alpha": _agreed("alpha", alpha, "lora_alpha", options, DEFAULT_ALPHA),
        "target_modules": _agreed(
            "target_modules", _names("target_modules", target_modules), "target_modules", options
        ),
        "exclude": _agreed("exclude", _names("exclude", exclude), "exclude_modules", options),
        "head": _names("head", head),
        "bias": options.get("bias", "none"),
        **({"adapt_frozen": adapt_frozen} if adapt_frozen is not False else {}),
        **{name: _plain(options[name]) for name in _PASSED_ON if name in options},
    }
    if options.get("modules_to_save") is not None:
        given = None if head == "auto" else _names("head", head)
        arguments["head"] = _agreed("head", given, "modules_to_save", options)
    _check_values(arguments)
    return arguments


def _stated_options(lora: Any) -> dict[str, Any]:
    """What a mapping holds; of a LoraConfig, rank and alpha and whatever is not PEFT's default."""
    if lora is None:
        return {}
    if isinstance(lora, Mapping):
        return dict(lora)
    # by its name, and not imported: whoever has one has paid for PEFT's import
    if type(lora).__name__ != "LoraConfig" or not dataclasses.is_dataclass(lora):
        raise InputTypeError(
            f"lora must be a peft.LoraConfig or a mapping of its options, got {type(lora).__name__}", setting="lora"
        )
    stated = {}
    for field in dataclasses.fields(lora):
        value = getattr(lora, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in ("r", "lora_alpha") or value != default:
            stated[field.name] = value
    return {name: value for name, value in stated.items() if name not in _DESCRIPTIVE}


def _refuse_unsupported(options: Mapping[str, Any]) -> None:
    if options.get("init_lora_weights", True) is not True:
        raise InputError(
            f"lora: init_lora_weights={options['init_lora_weights']!r} cannot be combined with EVA, which writes A "
            "itself: leave it at True",
            setting="lora",
        )
    others = [name for name in options if name not in (*HONOURED, *_DESCRIPTIVE, "init_lora_weights")]
    if others:
        raise InputError(
            f"lora: {unknown('option', others[0], HONOURED, list_all=False)}; adapters with options that EVA does not "
            "know are made with peft.get_peft_model before fit, and EVA uses them",
            setting="lora",
        )


def _agreed(name: str, given: Any, option: str, options: Mapping[str, Any], default: Any = None) -> Any:
    """The value of an argument that LoraConfig has too, where not both say something else."""
    stated = options.get(option)
    stated = _names(option, stated) if isinstance(stated, Iterable) else stated
    if given is None:
        return default if stated is None else stated
    if stated is not None and stated != given and not _equal_sets(stated, given):
        raise InputError(f"{name}={given!r} contradicts lora's {option}={stated!r}: give one of them", setting=name)
    return given


def _equal_sets(a: Any, b: Any) -> bool:
    return isinstance(a, list) and isinstance(b, list) and set(a) == set(b)


def _names(name: str, value: Any) -> Any:
    """Lists where a checkpoint cannot hold sets and tuples."""
    if value is None or isinstance(value, str):
        return value
    entries = list(value) if isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise InputTypeError(f"{name} must be names of layers, got {value!r}", setting=name)
    return sorted(entries) if isinstance(value, (set, frozenset)) else entries


def _plain(value: Any) -> Any:
    """Without enumerations (``task_type``) and special mappings, which a checkpoint cannot hold either."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.value if isinstance(value, Enum) else value


def _check_values(arguments: Mapping[str, Any]) -> None:
    check_number("r", arguments["r"], at_least=1, whole=True)
    check_number("alpha", arguments["alpha"], above=0)
    check_number("lora_dropout", arguments.get("lora_dropout", 0.0), at_least=0, below=1)
    check_choice("bias", arguments["bias"], BIASES)
    if arguments.get("adapt_frozen", True) is not True:
        given = arguments["adapt_frozen"]
        raise InputTypeError(f"adapt_frozen must be True or False, got {given!r}", setting="adapt_frozen")
