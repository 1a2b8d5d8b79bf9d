"""The mark "initialised" lives exactly as long as the adapters: what a fit does after they changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils.data import DataLoader

from eva_lightning import EVAInitCallback, StreamingOptions
from eva_lightning.adapters import find_adapters, inject, merge_and_unload
from eva_lightning.done import done
from eva_lightning.methods.apply import AdapterOptions, apply_method
from tests.modules import HIDDEN, Classifier, dataset, loader, mlp, trainer


def config(r: int = 4, targets: tuple[str, ...] = ("0", "3", "5")) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=8, target_modules=list(targets))


def with_peft() -> Any:
    return Classifier(get_peft_model(mlp(), config()))


def eva(**options: Any) -> EVAInitCallback:
    return EVAInitCallback(**{"rho": 2, "r": 4, "verbose": False, **options})


def fit(module: Any, *callbacks: Any, **options: Any) -> Any:
    trainer(*callbacks, **options).fit(module, loader())
    return module


def a_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.a.detach().clone() for name, layer in find_adapters(module).items()}


def starts_from_data(module: Any, callback: EVAInitCallback) -> None:
    """A of the first layer lies in the span that a dense SVD of the data gives, and B has been trained."""
    x = dataset(96).tensors[0].double()
    layer = find_adapters(module)["net.0"]
    v = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[: layer.rank].float()
    # B = 0 at first, so that A has hardly moved after the few steps of a fit
    assert (layer.a @ v.T).square().sum() / layer.a.square().sum() > 0.9
    assert layer.b.any()
    assert callback.state is not None
    assert callback.state.ranks["net.0"] == layer.rank


def merged(module: Any) -> None:
    merge_and_unload(module)


def new_network(module: Any) -> None:
    module.net = get_peft_model(mlp(), config())


def new_plain_network(module: Any) -> None:
    module.net = mlp()


def second_adapter(module: Any) -> None:
    module.net.add_adapter("second", config(3))
    module.net.set_adapter("second")


def unloaded(module: Any) -> None:
    module.net.unload()  # the PeftModel itself stays in the module


def merged_by_peft(module: Any) -> None:
    module.net = module.net.merge_and_unload()


def deleted(module: Any) -> None:
    module.net.delete_adapter("default")


def deleted_and_added(module: Any) -> None:
    module.net.delete_adapter("default")
    module.net.add_adapter("default", config(3))
    module.net.set_adapter("default")


def reset_in_place(module: Any) -> None:
    for layer in find_adapters(module).values():
        layer.module.reset_lora_parameters(layer.adapter, True)


CHANGES: list[Callable[[Any], None]] = [
    merged, new_network, new_plain_network, second_adapter, unloaded, merged_by_peft, deleted, deleted_and_added,
    reset_in_place,
]  # fmt: skip


@pytest.mark.parametrize("rho", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_fit_after_the_adapters_changed_initialises_the_new_ones(change: Any, rho: int) -> None:
    callback = eva(rho=rho, streaming=StreamingOptions(max_batches=6, tau=1.0))
    module = fit(with_peft(), callback)
    before = callback.state
    change(module)
    fit(module, callback)
    assert callback.state is not before
    starts_from_data(module, callback)


def test_cross_validation_by_loading_the_first_state_dict_again() -> None:
    module, callback = with_peft(), eva(rho=1, streaming=StreamingOptions(max_batches=6, tau=1.0))
    first = copy.deepcopy(module.state_dict())
    fit(module, callback)
    module.load_state_dict(first)
    fit(module, callback)
    starts_from_data(module, callback)


def test_copies_pickles_and_modules_around_the_network_keep_the_mark() -> None:
    callback = eva()
    module = fit(Classifier(), callback)
    module.trainer = None
    before = callback.state
    for same in (
        module,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        Classifier(copy.deepcopy(module.net)),
    ):
        trained = {n: layer.b.detach().clone() for n, layer in find_adapters(same).items()}
        fit(same, callback, max_epochs=0)
        assert callback.state is before
        assert all(torch.equal(layer.b, trained[n]) for n, layer in find_adapters(same).items())


def test_weight_decay_is_not_taken_for_a_reset() -> None:
    callback = eva()
    module = fit(Classifier(), callback, max_epochs=0)
    before = callback.state
    with torch.no_grad():
        for layer in find_adapters(module).values():
            layer.a.mul_(0.7)
    fit(module, callback)
    assert callback.state is before


def test_switching_back_to_the_first_adapter_keeps_it() -> None:
    callback = eva()
    module: Any = fit(with_peft(), callback)
    second_adapter(module)
    fit(module, callback)
    module.net.set_adapter("default")
    first = a_of(module)
    before = callback.state
    fit(module, callback, max_epochs=0)
    assert callback.state is before
    assert all(torch.equal(a, first[n]) for n, a in a_of(module).items())


def test_only_new_layers_beside_trained_ones_are_initialised() -> None:
    module: Any = Classifier(get_peft_model(mlp(), config(targets=("0",))))
    fit(module, eva())
    net = module.net.base_model.model
    net[3] = nn.Linear(HIDDEN, HIDDEN)
    inject_adapter_in_model(config(targets=("3",)), net, "default")
    trained = a_of(module)["net.0"]
    callback = eva()
    fit(module, callback, limit_train_batches=1)
    assert callback.state is not None
    assert list(callback.state.ranks) == ["net.3"]
    assert torch.nn.functional.cosine_similarity(a_of(module)["net.0"], trained).min() > 0.9


@pytest.mark.parametrize("rho", [1, 2])
def test_a_network_built_in_setup_at_every_fit(rho: int) -> None:
    class Rebuilt(Classifier):
        def setup(self, stage: str) -> None:
            self.net = mlp()

    module, callback = Rebuilt(), eva(rho=rho)
    fit(module, callback)
    before = callback.state
    fit(module, callback)
    assert callback.state is not before
    assert all(layer.b.any() for layer in find_adapters(module).values()), "the optimizer has them"


def test_checkpoint_from_before_the_initialisation_takes_the_mark_away(tmp_path: Path) -> None:
    module = with_peft()
    run = trainer(max_epochs=0)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "before.ckpt")
    callback = eva()
    fit(module, callback)
    before = callback.state
    trainer(callback).fit(module, loader(), ckpt_path=str(tmp_path / "before.ckpt"))
    assert callback.state is not before


def test_restored_mark_goes_with_the_network(tmp_path: Path) -> None:
    run = trainer(eva())
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "c.ckpt")
    module, callback = Classifier(), eva()
    trainer(callback, max_epochs=2).fit(module, DataLoader(dataset(96), 16), ckpt_path=str(tmp_path / "c.ckpt"))
    assert done(module) == "restored"
    module.net = mlp()
    assert done(module) is None
    before = callback.state
    fit(module, callback)
    assert callback.state is not before


def test_injection_that_waited_in_vain_does_not_count_for_another_network() -> None:
    module, callback = Classifier(), eva()
    fit(module, callback, limit_train_batches=0)
    module.net = get_peft_model(mlp(), config(2))
    fit(module, callback)
    assert callback.state is not None
    assert sum(callback.state.ranks.values()) == 6, "the user's adapters, with their own rank"
    assert callback.initialiser.injection is None


def test_exclude_of_the_first_injection_does_not_refuse_a_second_adapter() -> None:
    module, callback = Classifier(), eva(exclude=["3"])
    fit(module, callback)
    inject_adapter_in_model(config(2, ("0", "5")), module.net, "two")
    for m in module.modules():
        if hasattr(m, "lora_A"):
            m.set_adapter("two")  # type: ignore[operator]
    fit(module, callback)
    assert callback.state is not None
    assert sum(callback.state.ranks.values()) == 4


def test_trained_adapters_without_a_mark_and_merged_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="its LoRA matrix B is not zero"):
        fit(fit(with_peft()), eva())
    pissa = Classifier()
    inject(pissa, r=2, initialisation="pissa")
    with pytest.raises(ValueError, match="its LoRA matrix B is not zero"):
        fit(pissa, eva())
    module: Any = fit(with_peft(), eva())
    module.net.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into its weight .*unmerge_adapter\(\) before fit"):
        fit(module, eva())


def test_data_driven_start_knows_its_adapters_too() -> None:
    module = Classifier()
    callbacks = apply_method("corda", module, AdapterOptions(rank=2))
    fit(module, *callbacks)
    started = a_of(module)
    fit(module, *callbacks, max_epochs=0)
    assert all(torch.equal(a, started[n]) for n, a in a_of(module).items())
    merge_and_unload(module)
    with pytest.raises(ValueError, match=r"has no adapters to start: put them in with inject"):
        fit(module, *callbacks)
