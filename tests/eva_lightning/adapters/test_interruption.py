"""Ctrl-C while adapters are put in, line by line of what does it: ours and PEFT's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import peft.tuners.lora.model
import pytest
import torch
from torch import nn

from eva_lightning.adapters import inject, injection
from eva_lightning.errors import InputError

FILES = (injection.__file__, peft.tuners.lora.model.__file__)
Line = tuple[str, int]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.encoder.eval()
        self.body.bias.requires_grad_(False)


def traced(at: Callable[[Line], None], call: Callable[[], Any]) -> None:
    """Make the call, with ``at`` told every line of FILES before it runs."""

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return each if frame.f_code.co_filename in FILES else None

    def each(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            at((frame.f_code.co_filename, frame.f_lineno))
        return each

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)


def put_in(net: nn.Module) -> None:
    inject(net, r=2, target_modules=["linear1", "linear2", "attention", "body"])


def everything(net: nn.Module) -> Any:
    modules = {
        name: (id(m), m.training, len(m._forward_pre_hooks), set(vars(m)) - {"_is_hf_initialized"})
        for name, m in net.named_modules()
    }
    parameters = {name: (id(p), p.requires_grad) for name, p in net.named_parameters()}
    return modules, parameters, net.encoder.activation_relu_or_gelu, torch.get_rng_state().tolist()  # type: ignore[union-attr]


def test_the_module_is_left_as_it_was_wherever_it_comes() -> None:
    lines: dict[Line, None] = {}
    traced(lambda line: lines.setdefault(line), lambda: put_in(Net()))
    assert len(lines) > 80
    assert {file for file, _ in lines} == set(FILES)
    left = []
    for line in lines:
        net = Net()
        before = everything(net)

        def interrupt(at: Line, line: Line = line) -> None:
            if at == line:
                sys.settrace(None)
                raise KeyboardInterrupt

        try:
            traced(interrupt, lambda net=net: put_in(net))  # type: ignore[misc]
        except KeyboardInterrupt:
            pass
        except InputError as error:
            left.append(f"{line}: {error}")
        if everything(net) != before:
            left.append(f"{line}: changed")
    assert left == []


def test_an_error_of_pefts_in_the_middle_is_the_one_that_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    replace, calls = peft.tuners.lora.model.LoraModel._replace_module, []

    def fails(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError("no space for the third")
        replace(*arguments)

    monkeypatch.setattr(peft.tuners.lora.model.LoraModel, "_replace_module", fails)
    net = Net()
    before = everything(net)
    with pytest.raises(MemoryError, match="no space for the third"):
        put_in(net)
    assert everything(net) == before
