"""Single options of ``streaming`` and ``lora`` among the callback's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from eva_lightning.adapters.lora_options import HONOURED
from eva_lightning.errors import InputError, InputTypeError, unknown
from eva_lightning.streaming_options import StreamingOptions


def with_single_options(
    streaming: StreamingOptions | Mapping[str, Any] | None,
    lora: Any,
    options: Mapping[str, Any],
    arguments: Sequence[str],
) -> tuple[StreamingOptions, Any]:
    """`streaming` and `lora` with the single options that were given beside them.

    Args:
        streaming: How minibatches are streamed, also as a mapping of some options; None for the defaults.
        lora: A ``peft.LoraConfig``, a mapping of some of its options, or None.
        options: Name -> value of fields of :class:`StreamingOptions` and of options of LoraConfig.
        arguments: Names of the callback's own arguments, for suggestions.

    Raises:
        InputError: There is no such option (suggests the nearest), or a single one stands beside a whole LoraConfig.
    """
    of_streaming = [item.name for item in fields(StreamingOptions)]
    if isinstance(streaming, Mapping):
        for name in streaming:
            if name not in of_streaming:
                raise InputTypeError(unknown("option of streaming", name, of_streaming), setting="streaming")
        streaming = StreamingOptions(**streaming)
    if streaming is not None and not isinstance(streaming, StreamingOptions):
        raise InputTypeError(
            f"streaming must be StreamingOptions, a mapping of its options or None, got {streaming!r}",
            setting="streaming",
        )
    for name in options:
        if name not in (*of_streaming, *HONOURED):
            raise InputTypeError(unknown("argument", name, [*arguments, *of_streaming, *HONOURED], list_all=False))
    single = {name: value for name, value in options.items() if name in HONOURED}
    if single and lora is not None and not isinstance(lora, Mapping):
        name = next(iter(single))
        raise InputError(f"{name} belongs into the LoraConfig that is given as lora", setting=name)
    streamed = {name: value for name, value in options.items() if name in of_streaming}
    return replace(streaming or StreamingOptions(), **streamed), {**(lora or {}), **single} if single else lora
