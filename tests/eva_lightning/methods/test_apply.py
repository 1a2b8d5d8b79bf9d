from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from eva_lightning.adalora_schedule import AdaLoRASchedule, start_rank
from eva_lightning.adapters import inject, save_pretrained
from eva_lightning.adapters.adalora import RankAllocation
from eva_lightning.adapters.base_weight_init import INITIALISATIONS
from eva_lightning.checkpoint import load_from_checkpoint
from eva_lightning.methods import METHODS
from eva_lightning.methods.adalora import AdaLoRACallback
from eva_lightning.methods.apply import AdapterOptions, apply_method
from tests.eva_lightning.methods import token_fits
from tests.eva_lightning.methods.token_fits import build, fit, inputs
from tests.modules import Classifier, TokenNet

EDIT_BASE_WEIGHTS = [m for m in METHODS if METHODS[m].adapts and METHODS[m].changes_base]
TARGETS = {"ailora": {"target_modules": ["q", "v"]}}
OPTIONS = AdapterOptions(rank=3, bias="none")


def prepared(method: str, options: AdapterOptions = OPTIONS, **kwargs: Any) -> tuple[Classifier, list[pl.Callback]]:
    return token_fits.prepared(method, options, **kwargs)


def test_without_a_head_it_is_adapted_or_frozen() -> None:
    adapted, frozen = build(), build()
    apply_method("lora", adapted, OPTIONS, head=None)
    apply_method("lora", frozen, OPTIONS, head=None, exclude=["net.head"])
    names = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert {"net.head.lora_A.default.weight"} <= names
    assert all("lora_" in n for n in names)
    assert not any("head" in n for n, p in frozen.named_parameters() if p.requires_grad)


def test_pissa_exports_after_loading_into_a_module_of_other_weights(tmp_path: Path) -> None:
    from peft import PeftModel

    module, callbacks = prepared("pissa")
    fit(module, callbacks).save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(99)
    loaded = load_from_checkpoint(Classifier, tmp_path / "a.ckpt", net=TokenNet())
    save_pretrained(loaded.net, tmp_path / "adapter")
    pre_trained = build().net
    with torch.no_grad():
        expected = module.eval()(inputs())
        peft = PeftModel.from_pretrained(pre_trained, tmp_path / "adapter").eval()
        # the embedding was frozen, so it is the pre-trained one in both
        torch.testing.assert_close(peft(inputs()), expected, rtol=1e-4, atol=1e-5)


def test_milora_starts_at_the_least_singular_directions() -> None:
    """Wang et al., 2024: what PiSSA takes from the top of the spectrum, MiLoRA takes from its bottom."""
    module, _ = prepared("milora", AdapterOptions(rank=3, alpha=2.0, bias="none"))
    for name in ("attention.q", "narrow"):
        layer: Any = module.net.get_submodule(name)
        weight = build().net.get_submodule(name).weight.detach()
        s = torch.linalg.svdvals(weight.double())  # type: ignore[operator,union-attr]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        taken = torch.linalg.svdvals((2 / 3 * b @ a).double())[:3]
        torch.testing.assert_close(taken, s[-3:], rtol=1e-4, atol=1e-6)
        left = torch.linalg.svdvals(layer.base_layer.weight.detach().double())
        torch.testing.assert_close(left[: len(s) - 3], s[:-3], rtol=1e-4, atol=1e-6)
        assert left[len(s) - 3 :].abs().max() < 1e-5
        # both halves carry the same share, as in PiSSA
        torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_weight_based_starts_are_pefts(method: Any) -> None:
    from peft import LoraConfig, get_peft_model

    module, _ = prepared(method)
    config = LoraConfig(r=3, lora_alpha=1, target_modules=["q", "narrow"], init_lora_weights=method)
    theirs: Any = get_peft_model(build().net, config).base_model.model
    for name in ("attention.q", "narrow"):
        ours, reference = module.net.get_submodule(name), theirs.get_submodule(name)
        for factor in ("lora_A", "lora_B"):
            mine, other = getattr(ours, factor)["default"].weight, getattr(reference, factor)["default"].weight
            torch.testing.assert_close(mine, other)
        torch.testing.assert_close(ours.base_layer.weight, reference.base_layer.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", [m for m in EDIT_BASE_WEIGHTS if m not in TARGETS])
def test_rank_is_capped_where_the_weight_has_fewer_directions(method: str) -> None:
    module, callbacks = prepared(method, AdapterOptions(rank=8, alpha=2.0, bias="none"), lr=0.0)
    fit(module, callbacks, max_steps=1)
    narrow: Any = module.net.narrow
    # LoRA-GA takes the directions of B after those of A
    assert narrow.lora_A["default"].weight.shape == (4 // INITIALISATIONS[method].directions, 24)
    # LoRA-GA's authors set rsLoRA's scaling
    assert narrow.scaling["default"] == pytest.approx(2 / math.sqrt(8) if method == "lora-ga" else 0.25)
    assert narrow.lora_B["default"].weight.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(module(inputs()), build()(inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        *({"initialisation": m, **TARGETS.get(m, {})} for m in EDIT_BASE_WEIGHTS),
        {"adalora": {"target_r": 2, "total_step": 5}},
    ],
    ids=str,
)
def test_an_injection_is_taken_back(options: dict[str, Any]) -> None:
    module = build()
    before = copy.deepcopy(module.state_dict())
    injection = inject(module, r=3, **options)
    assert any("lora_A" in name for name in module.state_dict())
    injection.undo(module)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert all(p.requires_grad for p in module.parameters())


def test_adalora_ends_with_the_rank_budget() -> None:
    module, callbacks = prepared("adalora")
    fit(module, callbacks, max_steps=12)
    (allocation,) = [c.allocation for c in callbacks if isinstance(c, AdaLoRACallback)]
    assert allocation is not None
    layers = [m for m in module.modules() if hasattr(m, "lora_E")]
    left = [int((m.lora_E["default"] != 0).sum()) for m in layers]  # type: ignore[index]
    # section C.3 of the EVA paper, and peft_trainer.py of its authors' code
    assert [start_rank(rank) for rank in (2, 4, 8, 16)] == [6, 8, 12, 20]
    assert {layer.lora_A["default"].shape[0] for layer in layers} == {3 + 4}  # type: ignore[index]
    assert sum(left) == 3 * len(layers) == sum(allocation.ranks().values())
    assert max(left) > min(left)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_adalora_takes_very_short_trainings(steps: int) -> None:
    module, callbacks = prepared("adalora")
    fit(module, callbacks, max_steps=steps)


def test_adalora_penalty_is_pefts() -> None:
    module, _ = prepared("adalora")
    allocation = RankAllocation(module, 10)
    allocation.add_penalty_gradient()
    layer: Any = module.net.attention.q  # type: ignore[union-attr]
    a = layer.lora_A["default"].detach().clone().requires_grad_()
    factors = 2 * sum(hasattr(m, "lora_E") for m in module.modules())
    (0.5 * torch.norm(a @ a.T - torch.eye(len(a)), p="fro") / factors).backward()
    torch.testing.assert_close(layer.lora_A["default"].grad, a.grad)


def test_adalora_schedule_is_pefts_with_other_numbers() -> None:
    """0.1 T, 0.2 T, every 10 steps, counted from 0, and a weight that no loss contains: the authors' vision code."""
    module, _ = prepared("adalora")
    schedule = AdaLoRASchedule(final=0.2, every=10, penalty=0.1, penalises=False, first_step=0)
    allocation = RankAllocation(module, 100, schedule)
    config = allocation.config
    assert (config.tinit, config.tfinal, config.deltaT, config.orth_reg_weight) == (10, 20, 10, 0.1)
    assert config.total_step == 100
    allocation.add_penalty_gradient()
    assert all(p.grad is None for p in module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    masked = []
    for step in range(1, 32):
        allocation.step(step)
        masked.append(allocation.config.rank_pattern is not None)
    # PEFT's first allocation after the warm-up of 10 steps is at its step 20, our 21st
    assert masked.index(True) == 20


def test_adalora_without_an_end_is_refused() -> None:
    module, callbacks = prepared("adalora")
    with pytest.raises(ValueError, match="number of training steps, got inf"):
        fit(module, callbacks, max_epochs=-1)
    with pytest.raises(ValueError, match="Heeding has no AdaLoRA layers"):
        RankAllocation(build(), 10)


def test_scratch_draws_new_weights_and_leaves_the_generators_alone() -> None:
    module = build()
    state = torch.get_rng_state()
    assert apply_method("scratch", module, AdapterOptions(seed=5)) == []
    assert torch.equal(torch.get_rng_state(), state)
    again, other = build(), build()
    apply_method("scratch", again, AdapterOptions(seed=5))
    apply_method("scratch", other, AdapterOptions(seed=6))
    assert torch.equal(module.net.embed.weight, again.net.embed.weight)  # type: ignore[union-attr,arg-type]
    assert not torch.equal(module.net.embed.weight, other.net.embed.weight)  # type: ignore[union-attr,arg-type]
    assert not torch.equal(module.net.embed.weight, build().net.embed.weight)  # type: ignore[union-attr,arg-type]


def test_scratch_refuses_weights_it_cannot_draw() -> None:
    module = build()
    module.net.register_parameter("positions", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="new weights for 'net': TokenNet has parameters but no reset_parameters"):
        apply_method("scratch", module, OPTIONS)


def test_lora_plus_trains_b_at_another_rate_as_pefts_optimizer_does() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    module, callbacks = prepared("lora+", AdapterOptions(rank=3, bias="none", lora_plus_ratio=8.0))
    run = fit(module, callbacks, max_steps=1)
    ours = {id(p): group["lr"] for group in run.optimizers[0].param_groups for p in group["params"]}
    model = get_peft_model(build().net, LoraConfig(r=3, target_modules=["q"]))
    theirs_optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=module.lr, loraplus_lr_ratio=8.0)
    theirs = {id(p): group["lr"] for group in theirs_optimizer.param_groups for p in group["params"]}
    reference = {n.split("lora_")[1]: theirs[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    assert reference == {"A.default.weight": module.lr, "B.default.weight": 8 * module.lr}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert ours[id(parameter)] == reference.get(name.partition("lora_")[2], module.lr), name


def test_lora_plus_needs_a_module_that_heeds_it() -> None:
    with pytest.raises(ValueError, match="Classifier has no lr_multipliers"):
        apply_method("lora+", Classifier(TokenNet()), OPTIONS)
    with pytest.raises(ValueError, match="lora_plus_ratio must be a number above 0, got 0"):
        AdapterOptions(lora_plus_ratio=0)


def test_a_weight_of_two_layers_cannot_give_up_a_part() -> None:
    module = build()
    module.net.attention.q.weight = module.net.attention.k.weight  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"milora takes .*'net.attention.q' and 'net.attention.k' share theirs"):
        inject(module, initialisation="milora")
    one_input = Classifier(nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 2)))
    with pytest.raises(
        ValueError, match=r"lora-ga needs layers of at least 2 .*'net\.0' has a weight of shape \(3, 1\)"
    ):
        inject(one_input, head="net.1", initialisation="lora-ga")


def test_unknown_names_are_suggested() -> None:
    with pytest.raises(ValueError, match="unknown method 'pisa': did you mean pissa"):
        apply_method("pisa", build(), OPTIONS)
    with pytest.raises(ValueError, match="unknown initialisation 'olra': did you mean olora"):
        inject(build(), initialisation="olra")  # type: ignore[arg-type]
    conv = Classifier(nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(3, 3), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"pissa adapts linear layers only, but 'net\.0' is not one"):
        inject(conv, target_modules=["net.0"], initialisation="pissa")
