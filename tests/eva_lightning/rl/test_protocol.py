"""The conventions of ml-jku/L2M: the network, its inputs and its decay, against computations written here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.rl.module import DecisionTransformerModule, save_weights
from eva_lightning.rl.policy import DecisionTransformerPolicy
from eva_lightning.rl.protocol import DEFAULT, L2M, PROTOCOLS, check_protocol, get_protocol, protocol_of
from experiments.comparisons import robots_settings
from tests.rl_helpers import windows

SMALL: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "context": 4, "dropout": 0.0}


def small(**changes: Any) -> DecisionTransformerModule:
    torch.manual_seed(0)
    return DecisionTransformerModule(**{**L2M.module_options, **SMALL, **changes}).eval()


def batch() -> dict[str, Tensor]:
    found: dict[str, Tensor] = next(iter(DataLoader(windows(), 8)))  # type: ignore[arg-type]
    return {**found, "returns_to_go": 900 + 500 * found["returns_to_go"], "rewards": 10 * found["rewards"]}


def test_what_l2m_configures() -> None:
    # configs/env_params/mt50_pretrain.yaml: reward_scale: 200, norm_obs: False; its model: Linear, Tanh
    assert (L2M.return_scale, L2M.reward_scale, L2M.action_tanh, L2M.standardise) == (200, 200, True, False)
    assert L2M.differences
    assert not DEFAULT.differences
    assert get_protocol("l2m") is PROTOCOLS["l2m"] is L2M
    with pytest.raises(ValueError, match="unknown protocol 'l2n': did you mean l2m"):
        get_protocol("l2n")


def l2m_forward(weights: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> Tensor:
    """The network of one block as L2M's configuration has it, in float64: tokens s, R, a, r, one scale, GELU, tanh."""
    w = {name.removeprefix("model."): value.double() for name, value in weights.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    states, actions = data["states"].double(), data["actions"].double()
    rewards, returns = (data[name].double()[..., None] / 200 for name in ("rewards", "returns_to_go"))
    tokens = [linear(states, "embed_state"), linear(returns, "embed_return"), linear(actions, "embed_action")]
    tokens.append(linear(rewards, "embed_reward"))
    b, k = states.shape[:2]
    x = norm(torch.stack(tokens, 2).reshape(b, 4 * k, 16), "embed_norm") + w["embed_position.weight"]
    q, key, v = linear(norm(x, "blocks.0.norm1"), "blocks.0.qkv").reshape(b, 4 * k, 3, 2, 8).permute(2, 0, 3, 1, 4)
    scores = (q @ key.mT / 8**0.5).masked_fill(torch.ones(4 * k, 4 * k).triu(1).bool(), -torch.inf)
    x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, 4 * k, 16), "blocks.0.proj")
    hidden = linear(norm(x, "blocks.0.norm2"), "blocks.0.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    x = norm(x + linear(hidden, "blocks.0.fc2"), "norm").reshape(b, k, 4, 16)
    return torch.tanh(linear(x[:, :, 1], "predict_action"))  # L2M: tok_to_pred_pos["a"] = 1


def test_the_network_is_that_of_an_independent_computation() -> None:
    module, data = small(), batch()
    for parameter in module.parameters():  # far from where GELU and tanh are straight lines
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        predicted, expected = module(data), l2m_forward(module.state_dict(), data)
    assert expected.abs().max() > 0.9
    torch.testing.assert_close(predicted.double(), expected, rtol=0, atol=3e-6)
    for name in ("action_tanh", "state_first", "exact_gelu"):
        other = small(**{name: False})
        other.load_state_dict(module.state_dict())
        with torch.no_grad():
            assert (other(data) - predicted).abs().max() > 3e-5, name


def test_actions_lie_between_minus_one_and_one_whatever_the_weights() -> None:
    module, data = small(), batch()
    torch.nn.init.normal_(module.model.predict_action.weight, std=100.0)
    assert module(data).abs().max() <= 1
    free = small(action_tanh=False)
    free.load_state_dict(module.state_dict())
    assert free(data).abs().max() > 1


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_the_policy_acts_as_the_network_predicts(mode: Any) -> None:
    module, data = small(), batch()
    policy = DecisionTransformerPolicy(module, 8, 1500.0, mode)
    taken = torch.zeros(8, 4, 4)
    returns, rewards = torch.full((8, 4), 1500.0), data["rewards"].double()
    for step in range(4):
        before = None if step == 0 else rewards[:, step - 1].numpy()
        taken[:, step] = torch.from_numpy(policy.act(data["states"][:, step].double().numpy(), before)).float()
        returns[:, step] -= rewards[:, :step].sum(1).float()
    with torch.no_grad():
        expected = module({**data, "actions": taken, "returns_to_go": returns})
    np.testing.assert_allclose(taken.numpy(), expected.numpy(), atol=1e-5)


def decayed(module: DecisionTransformerModule, callbacks: list[Any]) -> tuple[set[str], set[str]]:
    """Names of the trained parameters that the optimizer of a fit decays, and of those that it does not."""
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module.train(), DataLoader(windows(), 4))  # type: ignore[arg-type]
    names = {parameter: name for name, parameter in module.named_parameters()}
    with_decay: set[str] = set()
    without: set[str] = set()
    for group in trainer.optimizers[0].param_groups:
        (with_decay if group["weight_decay"] > 0 else without).update(names[each] for each in group["params"])
    return with_decay, without


_LINEAR = ("embed_return", "embed_state", "embed_action", "embed_reward", "blocks.0.qkv", "blocks.0.proj",
           "blocks.0.fc1", "blocks.0.fc2", "predict_action")  # fmt: skip
_NORMS = ("embed_norm", "blocks.0.norm1", "blocks.0.norm2", "norm")


def test_biases_norms_and_embedding_tables_do_not_decay() -> None:
    with_decay, without = decayed(small(), [])
    assert with_decay == {f"model.{name}.weight" for name in _LINEAR}
    assert without == {
        *(f"model.{name}.bias" for name in (*_LINEAR, *_NORMS)),
        *(f"model.{name}.weight" for name in _NORMS),
        "model.embed_position.weight",
    }
    everything, nothing = decayed(small(decay_weights_only=False), [])
    assert everything == with_decay | without
    assert nothing == set()


def test_adapters_decay_and_magnitudes_do_not() -> None:
    module = small()
    callbacks = apply_method("dora", module, AdapterOptions(rank=2, bias="none"), head=module.head_name)
    with_decay, without = decayed(module, callbacks)
    assert {name.rpartition(".lora_")[2] for name in with_decay if "lora_" in name} == {
        "A.default.weight", "B.default.weight",
    }  # fmt: skip
    assert without
    assert all("magnitude" in name or name == "model.predict_action.bias" for name in without)


def test_a_checkpoint_says_its_protocol_and_keeps_it(tmp_path: Path) -> None:
    file = save_weights(small(), tmp_path / "l2m.ckpt")
    again = DecisionTransformerModule.from_pretrained(file, lr=1.0).eval()
    assert protocol_of(again.hparams) is L2M
    assert again.decay_weights_only
    with torch.no_grad():
        assert torch.equal(again(batch()), small()(batch()))
    check_protocol(L2M, again.hparams, "l2m.ckpt")
    with pytest.raises(ValueError, match=r"l2m\.ckpt was pre-trained by protocol l2m, and protocol=default was asked"):
        check_protocol(DEFAULT, again.hparams, "l2m.ckpt")
    with pytest.raises(ValueError, match="of another architecture: action_tanh must be True, got False"):
        DecisionTransformerModule.from_pretrained(file, action_tanh=False)
    assert protocol_of(small(reward_scale=7.0).hparams) is None


def test_checkpoints_from_before_are_of_the_default_protocol_bit_for_bit(tmp_path: Path) -> None:
    shipped = robots_settings.Settings().init
    content = torch.load(shipped, weights_only=True)
    assert not {"action_tanh", "decay_weights_only"} & set(content["hyper_parameters"])
    module = DecisionTransformerModule.from_pretrained(shipped).eval()
    assert protocol_of(module.hparams) is DEFAULT
    with pytest.raises(ValueError, match="pre-trained by protocol default, and protocol=l2m was asked for"):
        check_protocol(L2M, module.hparams, str(shipped))
    data = batch()
    with torch.no_grad():
        predicted = module(data)
        x = module.model.embed_steps(
            module.normalisation.states(data["states"]), data["actions"], data["rewards"] / 10,
            data["returns_to_go"] / 1000,
        )  # fmt: skip
        x = module.model.place(x.flatten(1, 2))
        for block in module.model.blocks:
            q, k, v = block._heads(x)  # type: ignore[operator, union-attr]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
            x = x + block.proj(y)  # type: ignore[operator, union-attr]
            x = x + block.fc2(F.gelu(block.fc1(block.norm2(x)), approximate="tanh"))  # type: ignore[operator, union-attr]
        expected = module.model.predict_action(module.model.norm(x[:, 1::4]))
    assert torch.equal(predicted, expected)
