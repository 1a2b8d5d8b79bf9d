"""Bad input: one clear sentence, and the module is as it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from eva_lightning import EVAInitCallback, EVAState, StreamingOptions
from eva_lightning.adapters import find_adapters
from eva_lightning.errors import InputError
from tests.modules import HIDDEN, IN, Classifier, TokenNet, build, dataset, loader, mlp, trainer


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Everything a failed run must leave alone."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    return {
        "types": {n: type(m) for n, m in module.named_modules()},
        "modes": {n: m.training for n, m in module.named_modules()},
        "flags": {n: p.requires_grad for n, p in module.named_parameters()},
        "weights": {n: t.clone() for n, t in module.state_dict().items()},
        "hooks": hooks,
        "random": torch.get_rng_state(),
        "attributes": {k for k in vars(module) if "eva" in k or k in ("peft_config", "on_load_checkpoint")},
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ("types", "modes", "flags", "hooks", "attributes"):
        assert a[key] == b[key], key
    assert a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    assert torch.equal(a["random"], b["random"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": 0.5}, ValueError, "rho must be a number of at least 1, got 0.5"),
        ({"rho": float("nan")}, ValueError, "rho must be a number of at least 1, got nan"),
        ({"rho": float("inf")}, ValueError, "rho must be a number of at least 1, got inf"),
        ({"rho": "2"}, TypeError, "rho must be a number of at least 1, got '2'"),
        ({"r": 0}, ValueError, "r must be a whole number of at least 1, got 0"),
        ({"r": -4}, ValueError, "r must be a whole number of at least 1, got -4"),
        ({"r": 2.5}, TypeError, "r must be a whole number of at least 1, got 2.5"),
        ({"alpha": 0}, ValueError, "alpha must be a number above 0, got 0"),
        ({"metric": "ration"}, ValueError, "unknown metric 'ration': did you mean ratio?"),
        ({"init": "whitten"}, ValueError, "unknown init 'whitten': did you mean whiten?"),
        ({"forward_fn": 3}, TypeError, "forward_fn must be a function or None, got 3"),
        ({"streaming": 3}, TypeError, "streaming must be StreamingOptions, a mapping of its options or None, got 3"),
        (
            {"init": "minor", "streaming": StreamingOptions(engine="incremental")},
            ValueError, "init='minor' needs the whole spectrum",
        ),
        ({"target_modules": 7}, TypeError, "target_modules must be names of layers, got 7"),
        ({"exclude": ["net", 3]}, TypeError, "exclude must be names of layers, got ['net', 3]"),
        ({"head": 3}, TypeError, "head must be names of layers, got 3"),
        ({"rescale_alpha": "no"}, TypeError, "rescale_alpha must be True or False, got 'no'"),
        ({"lora": {"lora_dropout": 1.0}}, ValueError, "lora_dropout must be a number of at least 0 and below 1"),
        ({"lora": {"bias": "some"}}, ValueError, "unknown bias 'some': did you mean none?"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        EVAInitCallback(**options)


@pytest.mark.parametrize("argument", ["target_modules", "exclude"])
@pytest.mark.parametrize("peft", [False, True])
def test_unknown_layer_names_get_a_suggestion(argument: str, peft: bool) -> None:
    net: nn.Module = TokenNet()
    if peft:
        net = get_peft_model(net, LoraConfig(r=2, target_modules="all-linear", exclude_modules=["head"]))
    module = Classifier(net)
    before = fingerprint(module)
    expected = rf"{argument}: unknown layer 'atention.q': did you mean attention\.q"
    with pytest.raises(ValueError, match=expected):
        trainer(EVAInitCallback(r=2, **{argument: ["atention.q"]})).fit(module, loader(tokens=4))
    assert_same(before, fingerprint(module))


@pytest.mark.parametrize("argument", ["target_modules", "exclude"])
def test_a_broken_regular_expression_is_named(argument: str) -> None:
    with pytest.raises(InputError, match=r"'\(' is no regular expression \(missing \)"):
        trainer(EVAInitCallback(**{argument: "("}, verbose=False)).fit(build(), loader())


def test_head_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"head: unknown layer 'net.haed': did you mean net\.head"):
        trainer(EVAInitCallback(r=2, head="net.haed")).fit(build(net=TokenNet()), loader(tokens=4))


def test_nothing_to_adapt() -> None:
    module = build(net=nn.Linear(IN, 3))
    with pytest.raises(
        ValueError, match=r"Classifier has no layer to adapt: 1 nn.Linear in all, output head \['net'\]"
    ):
        trainer(EVAInitCallback(r=2)).fit(module, loader())
    embedding = get_peft_model(nn.Sequential(nn.Embedding(4, 4), nn.Flatten()), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"none that EVA can initialise \(net.0: an nn.Embedding's inputs are indices"):
        trainer(EVAInitCallback(r=2)).fit(Classifier(embedding), loader())


def test_trained_adapters_are_not_erased() -> None:
    net = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights=False))
    module = Classifier(net)
    before = fingerprint(module)
    with pytest.raises(ValueError, match=r"layer 'net.0': its LoRA matrix B is not zero"):
        trainer(EVAInitCallback()).fit(module, loader())
    assert_same(before, fingerprint(module))


def test_empty_loader() -> None:
    module = build()
    before = fingerprint(module)
    with pytest.raises(ValueError, match=r"the training data loader is empty \(0 batches\)"):
        trainer(EVAInitCallback(r=2)).fit(module, DataLoader([]))
    assert_same(before, fingerprint(module))


def one_shot_loader() -> Any:
    return iter(loader())


def one_shot_generator() -> Any:
    return (b for b in loader())


class OneShot(IterableDataset[Any]):
    def __init__(self) -> None:
        self.items = iter(dataset(32))

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self.items)


def one_shot_dataset() -> Any:
    return DataLoader(OneShot(), 8)


class SameIterator:
    def __init__(self) -> None:
        self.batches = iter(list(loader()))

    def __iter__(self) -> Any:
        return self.batches


class SameIteratorInside(IterableDataset[Any]):
    def __init__(self) -> None:
        self.items = iter(dataset(32))

    def __iter__(self) -> Any:
        return self.items


def one_shot_inside_dataset() -> Any:
    return DataLoader(SameIteratorInside(), 8)


@pytest.mark.parametrize(
    "make", [one_shot_loader, one_shot_generator, one_shot_dataset, SameIterator, one_shot_inside_dataset]
)
def test_one_shot_iterators_are_refused_and_lose_nothing(make: Any) -> None:
    module, data = build(), make()
    before = fingerprint(module)
    with pytest.raises(ValueError, match="one-shot iterator"):
        trainer(EVAInitCallback(r=2)).fit(module, data)
    assert_same(before, fingerprint(module))
    with_state = EVAInitCallback(r=2, state=_state())
    fresh = build()
    trainer(with_state).fit(fresh, make())
    assert len(fresh.losses) >= 4, "every batch reached the training"


def _state() -> EVAState:
    callback = EVAInitCallback(r=2, verbose=False)
    trainer(callback).fit(build(), loader())
    assert callback.state is not None
    return callback.state


class Failing(Classifier):
    """Raises in the given forward call."""

    def __init__(self, error: BaseException, call: int = 3) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.error, self.call, self.calls = error, call, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.call:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
def test_failure_while_streaming_leaves_the_module_as_it_was(error: BaseException, peft: bool) -> None:
    module = Failing(error)
    if peft:
        module.net = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0", "3"]))
    before = fingerprint(module)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(EVAInitCallback(r=4)).fit(module, loader())
    assert module.calls == 3
    assert_same(before, fingerprint(module))
    # the same module and callback work once the cause is gone
    callback = EVAInitCallback(r=4)
    trainer(callback).fit(module, loader())
    assert callback.state is not None


@pytest.mark.parametrize("peft", [False, True])
def test_failure_while_writing_leaves_the_module_as_it_was(peft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from eva_lightning.adapters.adapter_layer import AdapterLayer

    module = build()
    if peft:
        module.net = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0", "3", "5"], use_dora=True))
    before = fingerprint(module)
    write, calls = AdapterLayer.write, []

    def fail(self: AdapterLayer, a: torch.Tensor) -> None:
        calls.append(self.name)
        if len(calls) == 3:
            raise MemoryError("no space for A")
        write(self, a)

    monkeypatch.setattr(AdapterLayer, "write", fail)
    with pytest.raises(MemoryError):
        trainer(EVAInitCallback(rho=2, r=4)).fit(module, loader())
    assert_same(before, fingerprint(module))
    monkeypatch.setattr(AdapterLayer, "write", write)
    trainer(EVAInitCallback(rho=2, r=4)).fit(module, loader())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_name_layer_and_batch(value: float) -> None:
    class Poisoned(Classifier):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x = self.net[:3](x)
            if self.calls == 2:
                x[3, 5] = value
            return self.net[3:](x)

    module = Poisoned()
    before = fingerprint(module)
    with pytest.raises(FloatingPointError, match=r"layer 'net.3': input of minibatch 2 has NaN or infinite values"):
        trainer(EVAInitCallback(r=4)).fit(module, loader())
    assert_same(before, fingerprint(module))


def test_batches_with_fewer_tokens_than_components_accumulate() -> None:
    callback = EVAInitCallback(rho=1, r=8, streaming=StreamingOptions(tau=1.0))
    trainer(callback).fit(build(), DataLoader(dataset(32), batch_size=2))
    assert callback.state is not None
    assert callback.state.n_samples["net.3"] == 32
    a = callback.state.components["net.3"]
    torch.testing.assert_close(a @ a.T, torch.eye(8), atol=1e-4, rtol=0)


class Odd(nn.Module):
    """Calls layers by keyword, on transposed views, only from the third call on, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.keyword, self.view, self.late, self.never = (nn.Linear(IN, IN) for _ in range(4))
        self.head = nn.Linear(IN, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.keyword(input=x)
        x = self.view(x.T.contiguous().T)
        if self.calls > 2:
            x = self.late(x)
        return self.head(x)


@pytest.mark.parametrize("engine", ["exact", "incremental"])
def test_odd_layers(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    module = build(net=Odd())
    callback = EVAInitCallback(rho=2, r=4, streaming=StreamingOptions(tau=1.0, engine=engine))
    trainer(callback).fit(module, loader(64))
    state = callback.state
    assert state is not None
    assert state.n_samples == {"net.keyword": 64, "net.view": 64, "net.late": 32}
    assert state.ranks["net.never"] == 4, "a layer never run keeps its adapter"
    assert sum(state.ranks[n] for n in state.n_samples) == 12
    assert "1 layers keep their random A, e.g. net.never" in caplog.text


def test_batch_that_cannot_be_run() -> None:
    module = build()
    data = DataLoader([{"pixels": x, "boxes": x} for x, _ in dataset(32)], 8)
    with pytest.raises(
        TypeError, match=r"cannot tell how to run Classifier on a batch with keys \['pixels', 'boxes'\]"
    ):
        trainer(EVAInitCallback(r=4)).fit(module, data)


def test_state_of_another_model_or_damaged(tmp_path: Any) -> None:
    state = _state()
    with pytest.raises(ValueError, match=r"the EVA state is of another model: unknown layer 'net\.embed'"):
        trainer(EVAInitCallback(r=2, state=state)).fit(build(net=TokenNet()), loader(tokens=3))

    wide = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Identity(), nn.ReLU(), nn.Linear(HIDDEN, 32), nn.ReLU())
    wide.append(nn.Linear(32, HIDDEN)).append(nn.ReLU()).append(nn.Linear(HIDDEN, 3))
    with pytest.raises(ValueError, match=r"another model: layer 'net.5' has 32 inputs, there 24"):
        trainer(EVAInitCallback(r=2, state=state)).fit(build(net=wide), loader())

    path = state.save(tmp_path / "eva")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        EVAInitCallback(r=2, state=path)
    with pytest.raises(FileNotFoundError, match="missing"):
        EVAInitCallback(r=2, state=tmp_path / "other")


def test_fsdp_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(EVAInitCallback(r=2))
    module = build()
    # the strategy itself needs CUDA; what is tested is the refusal, which comes before it does anything
    monkeypatch.setattr(type(run), "strategy", property(lambda _: FSDPStrategy.__new__(FSDPStrategy)))
    with pytest.raises(ValueError, match=r"FSDPStrategy shards the model before .* EVAInitCallback\(state=path\)"):
        EVAInitCallback(r=2).setup(run, module, "fit")
    assert not find_adapters(module)
