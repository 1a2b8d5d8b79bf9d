"""EVA in one call: the same as by the callback, without a Trainer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.fabric
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import eva_lightning
from eva_lightning import EVAInitCallback, EVAState, attention_mask
from eva_lightning.adapters import find_adapters
from eva_lightning.errors import EVAWarning, InputError, MissingInputError
from tests.modules import IN, TokenNet, build, dataset, loader, mlp, trainer
from tests.svd_helpers import reference

TOKENS = 5


def net() -> TokenNet:
    torch.manual_seed(0)
    return TokenNet()


def once(batches: DataLoader[Any]) -> Iterator[Any]:
    yield from batches


def quiet(model: nn.Module, batches: Any = None, **options: Any) -> EVAState:
    return eva_lightning.initialize(model, batches, **{"r": 4, "verbose": False, **options})


class Batches:
    """Minibatches in the order of a loader; Lightning would take a list for several loaders."""

    def __init__(self, batches: DataLoader[Any]) -> None:
        self.batches = list(batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


PAPER, ROTATED = {"algorithm": "paper", "max_batches": 9}, {"init": "rotate", "metric": "sum"}


@pytest.mark.parametrize(
    ("given", "options"),
    [(lambda x: x, {}), (list, {}), (once, {}), (iter, {}), (once, PAPER), (lambda x: x, ROTATED)],
    ids=["loader", "list", "generator", "iterator", "generator, the paper's algorithm", "loader, rotated"],
)
@pytest.mark.filterwarnings("ignore::eva_lightning.errors.EVAWarning")  # what has not converged after nine minibatches
def test_ranks_and_a_are_the_callbacks_to_the_bit(given: Callable[[Any], Any], options: dict[str, Any]) -> None:
    module = build(net=net())
    callback = EVAInitCallback(rho=2, r=4, verbose=False, **options)
    trainer(callback, max_epochs=0).fit(module, Batches(loader(tokens=TOKENS)))
    model = net()
    state = quiet(model, given(loader(tokens=TOKENS)), rho=2, **options)
    expected, found = find_adapters(module.net), find_adapters(model)
    assert callback.state is not None
    assert {f"net.{name}": rank for name, rank in state.ranks.items()} == callback.state.ranks
    assert len(set(state.ranks.values())) > 1, "ranks are redistributed"
    assert found.keys() == expected.keys()
    for name, layer in found.items():
        assert torch.equal(layer.a, expected[name].a), name
        assert not layer.b.any()
        assert layer.alpha == expected[name].alpha


def test_explained_variances_are_those_of_a_dense_svd() -> None:
    plain, batches = mlp().eval(), list(loader())
    inputs: dict[str, list[Tensor]] = {name: [] for name in ("0", "3", "5")}
    for name, seen in inputs.items():
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
    for x, _ in batches:
        plain(x)
    state = quiet(copy.deepcopy(plain), batches, tokens_per_sample=None)
    for name, seen in inputs.items():
        sigma, _ = reference(torch.cat(seen))
        shares = sigma.square() / sigma.square().sum()
        ours = state.explained_variance_ratio[name].double()
        torch.testing.assert_close(ours, shares[: len(ours)], rtol=1e-4, atol=1e-6)
        row = state.to_pandas().loc[name]
        assert row["explained"] == pytest.approx(float(shares[: state.ranks[name]].sum()), rel=1e-4)


def test_the_function_stays_and_the_head_and_adapters_train() -> None:
    model, x = net().eval(), dataset(8, TOKENS).tensors[0]
    before = model(x)
    quiet(model, loader(tokens=TOKENS))
    torch.testing.assert_close(model(x), before)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in training if "lora_" not in name} == {"head.weight", "head.bias"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, y = dataset(32, TOKENS).tensors
    losses = []
    for _ in range(20):
        losses.append(nn.functional.cross_entropy(model(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(layer.b.any() for layer in find_adapters(model).values())


def test_modes_random_state_buffers_and_order_stay() -> None:
    model, batches = mlp(), loader()
    model[1].eval()
    flags = [module.training for module in model]
    mean = model[1].running_mean.clone()  # type: ignore[union-attr, operator]
    expected = [x for x, _ in loader()]
    random = torch.get_rng_state()
    quiet(model, batches)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model] == flags
    assert torch.equal(model[1].running_mean, mean)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, (b, _) in zip(expected, batches, strict=True))


def test_lora_layers_of_a_peft_model_are_used() -> None:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q", "k", "v"])
    model = get_peft_model(net(), config)  # type: ignore[arg-type]
    state = quiet(model, loader(tokens=TOKENS), r=None)
    assert sum(state.ranks.values()) == 9
    assert {name.rpartition(".")[2] for name in state.ranks} == {"q", "k", "v"}


def test_forward_fn_mask_fn_and_targets() -> None:
    model, seen = net(), []

    def forward(module: nn.Module, batch: dict[str, Tensor]) -> Any:
        seen.append(module)
        return module(batch["pixels"])

    x = dataset(16, TOKENS).tensors[0]
    batches = [{"pixels": x, "attention_mask": torch.arange(TOKENS).expand(16, -1) < 3}]
    options = {"forward_fn": forward, "mask_fn": attention_mask, "target_modules": ["embed"]}
    state = quiet(model, batches, tokens_per_sample=None, **options)
    assert seen == [model]
    assert state.n_samples == {"embed": 16 * 3}
    sigma, _ = reference(x[:, :3].reshape(-1, IN))
    torch.testing.assert_close(state.singular_values["embed"].double(), sigma[:8], rtol=1e-4, atol=1e-4)


def test_a_saved_state_gives_the_same_without_batches(tmp_path: Path) -> None:
    first, second = net(), net()
    quiet(first, loader(tokens=TOKENS)).save(tmp_path / "eva")
    quiet(second, state=tmp_path / "eva")
    second.load_state_dict(first.state_dict())


def test_an_autocast_around_the_call_counts() -> None:
    seen: list[torch.dtype] = []
    model = mlp()
    model[3].register_forward_pre_hook(lambda _, args: seen.append(model[0](args[0][:, :IN]).dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quiet(model, loader())
    assert set(seen) == {torch.bfloat16}


class Broken(nn.Module):
    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.a, self.b, self.calls, self.fails_at = nn.Linear(IN, 8), nn.Linear(8, 3), 0, fails_at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("of the model's own")
        return self.b(self.a(x))


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = Broken(fails_at=3)
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="of the model's own"):
        quiet(model, loader())
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    assert quiet(model, loader()).ranks.keys() == {"a"}


def fully_sharded() -> nn.Module:
    """FSDP 1 around nothing: its constructor wants a GPU."""
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    return model


@pytest.mark.parametrize(
    ("model", "batches", "options", "sentence"),
    [
        (mlp, None, {}, "give batches, a DataLoader or any iterable of minibatches, or the state"),
        (mlp, list, {}, r"the data given \(list\) hold no minibatch"),
        (mlp, lambda: iter(()), {}, "hold no minibatch"),
        (mlp, lambda: dataset(8), {}, "got the samples of a TensorDataset: give DataLoader"),
        (mlp, lambda: torch.ones(4, IN), {}, "got one Tensor: put it into a list"),
        (mlp, lambda: {"x": torch.ones(4, IN)}, {}, "got one dict: put it into a list"),
        (mlp, lambda: 3, {}, "an iterable of minibatches, got int"),
        (lambda: "net", loader, {}, "model must be a torch.nn.Module, got str"),
        (mlp, loader, {"rho": 0.5}, "rho must be a number of at least 1"),
        (mlp, loader, {"verbose": "auto"}, "verbose must be True or False, got 'auto'"),
        (mlp, loader, {"log": True}, "log is for EVAInitCallback and a Trainer: leave it out"),
        (mlp, loader, {"rhoo": 1}, "unknown argument 'rhoo': did you mean rho"),
        (mlp, None, {"state": "absent"}, "is missing"),
        (lambda: nn.DataParallel(mlp()), loader, {}, r"wrapped \(DataParallel\) already"),
        (lambda: nn.Sequential(nn.DataParallel(mlp())), loader, {}, r"wrapped \(DataParallel\) already"),
        (fully_sharded, loader, {}, r"wrapped \(FullyShardedDataParallel\) already"),
        (mlp, lambda: list(loader()), {"mask_fn": attention_mask}, "batches that are mappings, got a list"),
    ],
    ids=[
        "no batches", "empty list", "empty iterator", "samples", "a tensor", "a mapping", "a number", "no model", "rho",
        "verbose", "log", "unknown", "no state", "wrapped", "wrapped inside",
        "FSDP 1", "attention_mask",
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    model: Callable[[], Any], batches: Any, options: dict[str, Any], sentence: str
) -> None:
    made = model()
    before = list(made.state_dict()) if isinstance(made, nn.Module) else None
    with pytest.raises(InputError, match=sentence):
        quiet(made, batches() if callable(batches) else batches, **options)
    if before is not None:
        assert list(made.state_dict()) == before


def test_twice_is_refused() -> None:
    model = mlp()
    quiet(model, loader())
    with pytest.raises(InputError, match="the adapters of Sequential are initialised already: build the model anew"):
        quiet(model, loader())


@pytest.mark.parametrize("package", ["lightning.fabric", "lightning_fabric"])
def test_a_model_that_fabric_has_set_up_is_refused(package: str) -> None:
    fabric = pytest.importorskip(package).Fabric(accelerator="cpu", devices=1)
    with pytest.raises(InputError, match=r"wrapped \(_FabricModule\) already.*: call initialize before that"):
        quiet(fabric.setup_module(mlp()), loader())


def test_a_loader_of_fabric() -> None:
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    own, plain = mlp(), mlp()
    own.load_state_dict(plain.state_dict())
    found, expected = quiet(own, fabric.setup_dataloaders(loader())), quiet(plain, loader())
    assert found.ranks == expected.ranks
    assert all(torch.equal(found.components[name], expected.components[name]) for name in expected.components)


class ByEpoch(torch.utils.data.Sampler[int]):
    """Another order in every epoch, as a DistributedSampler has."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(96, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return 96

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("package", ["lightning.fabric", "lightning_fabric"])
def test_the_epochs_of_a_loader_of_fabric_stay_in_order(package: str) -> None:
    fabric = pytest.importorskip(package).Fabric(accelerator="cpu", devices=1)

    def epochs(initialised: bool) -> list[list[Tensor]]:
        batches = fabric.setup_dataloaders(DataLoader(dataset(), batch_size=16, sampler=ByEpoch()))
        if initialised:
            quiet(mlp(), batches)
        return [[x for x, _ in batches] for _ in range(2)]

    expected, found = epochs(False), epochs(True)
    assert not torch.equal(expected[0][0], expected[1][0])
    assert all(
        torch.equal(a, b) for one, other in zip(expected, found, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_an_endless_generator_is_read_up_to_the_limit() -> None:
    batches = itertools.cycle(list(loader()))
    assert quiet(mlp(), batches, max_batches=7, stopping="never").n_batches == 7


@pytest.mark.filterwarnings("error")
def test_a_compiled_model_is_that_inside() -> None:
    plain, inner = mlp(), mlp()
    inner.load_state_dict(plain.state_dict())
    model: Any = torch.compile(inner, backend="eager")
    x = dataset(16).tensors[0]
    before = model(x)
    assert quiet(model, loader()).components.keys() == quiet(plain, loader()).components.keys()
    torch.testing.assert_close(model(x), before)
    for layer in find_adapters(model).values():
        nn.init.ones_(layer.b)
    assert not torch.allclose(model(x), before), "what was compiled before has the adapters"


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 32, (48, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = (torch.arange(8) < 4 + index % 4).long()
        return {"input_ids": self.ids[index] * mask, "attention_mask": mask, "labels": self.ids[index]}


def test_transformers_trainer_trains_what_was_set(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    own = Trainer(model, arguments, train_dataset=Texts())
    state = quiet(model, own.get_train_dataloader(), mask_fn=attention_mask, tokens_per_sample=None)
    counted = int(sum(text["attention_mask"].sum() for text in Texts()))  # type: ignore[attr-defined]
    assert set(state.n_samples.values()) == {counted}
    assert sum(state.ranks.values()) == 7 * 4
    layers = find_adapters(model)
    before = {name: layer.a.detach().clone() for name, layer in layers.items()}
    own.train()
    assert all(layer.b.any() for layer in layers.values())
    assert not any(torch.equal(before[name], layer.a) for name, layer in layers.items())


def test_what_did_not_run_keeps_its_adapter_and_is_said() -> None:
    class Idle(Broken):
        def __init__(self) -> None:
            super().__init__(0)
            self.idle = nn.Linear(4, 4)

    with pytest.warns(EVAWarning, match=r"'idle'\) did not run"):
        state = quiet(Idle(), loader(), head="b")
    assert state.ranks["idle"] == 4
    frame = state.to_pandas()
    assert frame.loc["idle"].isna().to_dict()["explained"]
    assert frame.loc["idle", "components"] == 0


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.filterwarnings("error::eva_lightning.errors.EVAWarning")
def test_a_warning_that_is_an_error_leaves_the_model_as_it_was_too(peft: bool) -> None:
    torch.manual_seed(0)
    model: Any = TokenNet()
    model.idle = nn.Linear(4, 4)
    if peft:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["embed", "q", "narrow", "idle"]))
    before = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(EVAWarning, match="did not run"):
        quiet(model, loader(tokens=TOKENS), head="head")
    after = dict(model.named_parameters())
    assert {name: (id(p), p.requires_grad) for name, p in after.items()} == {n: b[:2] for n, b in before.items()}
    assert all(torch.equal(p, before[name][2]) for name, p in after.items())
    with pytest.warns(EVAWarning, match="did not run"):
        assert quiet(model, loader(tokens=TOKENS), head="head").ranks["idle"] == 4


def test_a_missing_state_is_a_missing_file() -> None:
    with pytest.raises(MissingInputError):
        quiet(mlp(), state="nowhere")


def test_batches_of_samples_only() -> None:
    """A loader whose batches are a list of one tensor, as TensorDataset makes."""
    batches = DataLoader(TensorDataset(dataset(32).tensors[0]), batch_size=8)
    assert quiet(mlp(), batches).n_batches == 4
