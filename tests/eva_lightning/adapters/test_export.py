"""Exports against stock PEFT: what loads computes the same, or nothing is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations as norms

from eva_lightning.adapters import inject, save_pretrained
from eva_lightning.errors import InputError

WIDTH = 8
X = 3 * torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2))


class Named(nn.Module):
    """Layers under names as users give them, in their order; the last is the head."""

    def __init__(self, *names: str, first: nn.Module | None = None) -> None:
        super().__init__()
        for name in names:
            *parents, last = name.split("/")
            owner: nn.Module = self
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner._modules[parent]  # type: ignore[assignment]
            layer = first if first is not None and name == names[0] else nn.Linear(WIDTH, WIDTH)
            owner.add_module(last, layer)
        self.order = names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            layer: Any = self
            for part in name.split("/"):
                layer = layer._modules[part]
            x = torch.tanh(layer(x))
        return x


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.fc, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.fc(x + self.token)) - self.mean))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.block = nn.ModuleDict({"again": self.first})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block["again"](torch.relu(self.first(x))))


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, **{"dropout": 0.0, "batch_first": True, **options})
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (1, WIDTH)), stack, nn.Flatten(), nn.Linear(WIDTH, 3))


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    net[1].weight = net[0].weight  # type: ignore[assignment]
    return net


def digits() -> nn.Module:
    """PEFT reads "1" as the end of "11", and as a reason to leave "12.1" alone."""
    inner = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(12)), inner, nn.Linear(WIDTH, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "out, like lora_dropout": (lambda: Named("fc", "out"), {}),
    "A, like lora_A": (lambda: Named("fc", "A"), {}),
    "default, like PEFT's adapter": (lambda: Named("fc", "default"), {}),
    "head beside head.head": (lambda: Named("head/fc", "head/head"), {}),
    "fc beside net.fc, fc1 and xfc": (lambda: Named("net/fc", "fc1", "xfc", "fc"), {}),
    "characters of regular expressions": (lambda: Named("a+b", "aab", "h("), {"target_modules": ["a+b"]}),
    "digits": (digits, {"rank_pattern": {"1": 4}, "alpha_pattern": {"11": 7}}),
    "head that hides a target": (lambda: Named("0/0", "0/2", "1/2/0", "2"), {}),
    "parameter, buffer, batch norm": (Statistics, {}),
    "one layer under two names": (Twice, {}),
    "two layers with one weight": (tied, {}),
    "weight_norm": (lambda: Named("0", "1", first=norms.weight_norm(nn.Linear(WIDTH, WIDTH))), {"use_dora": True}),
    "spectral_norm": (lambda: Named("0", "1", first=norms.spectral_norm(nn.Linear(WIDTH, WIDTH))), {}),
    "encoder": (encoder, {}),
    "encoder, DoRA": (encoder, {"use_dora": True}),
    "encoder, PiSSA": (encoder, {"initialisation": "pissa"}),
    "encoder's attention": (lambda: encoder(activation="gelu"), {"target_modules": ["self_attn", "linear1"]}),
    "encoder without fast path": (lambda: encoder(batch_first=False), {}),
}


def adapted(build: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """A module whose adapters, head, statistics and token have moved, and the base model."""
    torch.manual_seed(0)
    net = build()
    base = copy.deepcopy(net)
    inject(net, r=2, alpha=4.0, **options)
    return moved(net), base


def moved(net: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    if isinstance(net, Statistics):
        net.token.requires_grad_(True)
        net.get_buffer("mean").normal_()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    net.train()
    for _ in range(3):
        net(X)  # batch norm, spectral norm
    return net.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:layers .* are saved as whole layers")
def test_stock_peft_computes_the_same_in_eval_mode(case: str, tmp_path: Path) -> None:
    build, options = CASES[case]
    net, base = adapted(build, **options)
    with torch.no_grad():
        before = net(X)
        save_pretrained(net, tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(base, str(tmp_path)).eval()(X), before)
        assert torch.equal(net(X), before)


def test_adapters_that_the_fused_encoder_reads_past_are_said_to_be_whole(tmp_path: Path) -> None:
    net, _ = adapted(encoder)
    with pytest.warns(UserWarning, match=r"1\.layers\.0\.linear1.*saved as whole layers"):
        save_pretrained(net, tmp_path)


def from_peft(**options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3))
    base = copy.deepcopy(net)
    return get_peft_model(net, LoraConfig(r=2, **options)), base


PEFTS: dict[str, dict[str, Any]] = {
    "token indices": {"target_modules": ["1"], "trainable_token_indices": {"0": [1, 3]}},
    "embedding": {"target_modules": ["0", "1"]},
    "modules_to_save": {"target_modules": ["1"], "modules_to_save": ["2", "3"]},
    "exclude_modules": {"target_modules": r"\d", "exclude_modules": ["0", "2", "3"]},
}


@pytest.mark.parametrize("case", PEFTS)
def test_models_of_peft_itself(case: str, tmp_path: Path) -> None:
    model, base = from_peft(**PEFTS[case])
    ids = torch.arange(10)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    before = model.eval()(ids)
    save_pretrained(model, tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path)).eval()(ids), before)


def test_what_cannot_be_saved_leaves_an_earlier_export_alone(tmp_path: Path) -> None:
    net, _ = adapted(lambda: Named("fc", "head"))
    save_pretrained(net, tmp_path)
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    net.fc.lora_B.default.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(InputError, match=r"fc\.lora_B.*NaN or infinite"):
        save_pretrained(net, tmp_path)
    pissa, _ = from_peft(target_modules=["1"], init_lora_weights="pissa")
    with pytest.raises(InputError, match="init_lora_weights='pissa'"):
        save_pretrained(pissa, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == good


class Alone(nn.Linear):
    """Computes something else when it is loaded than when it was saved."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Alone:
        Alone.copies += 1
        found = Alone(WIDTH, WIDTH)
        memo[id(self)] = found
        return found


def test_what_loads_differently_is_found_and_not_written(tmp_path: Path) -> None:
    net = Named("fc", "head", first=Alone(WIDTH, WIDTH))
    inject(net, r=2)
    with pytest.raises(InputError, match=r"stock PEFT would load this export differently.*'fc"):
        save_pretrained(net, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    save_pretrained(net, tmp_path / "new", verify=False)
    assert (tmp_path / "new" / "adapter_config.json").exists()


def test_an_example_compares_whole_outputs(tmp_path: Path) -> None:
    net, _ = adapted(lambda: Named("fc", "head"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    save_pretrained(net, tmp_path, example=X)
    net.register_forward_hook(lambda m, i, o: o * 2 if hasattr(m.fc, "_eva_lightning_config") else o)
    with pytest.raises(InputError, match="output for the example"):
        save_pretrained(net, tmp_path, example=(X,))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
