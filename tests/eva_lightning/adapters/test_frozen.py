"""What a user froze before fit: a head that does not train, a teacher or tower that is to stay, a backbone for LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import Metric

from eva_lightning import EVAInitCallback, load_from_checkpoint
from eva_lightning.adapters import choose_layers, find_adapters, inject
from eva_lightning.errors import InputError
from tests.modules import CLASSES, HIDDEN, IN, loader, trainer


def mlp(out: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, out))


def frozen(module: nn.Module) -> Any:
    return module.requires_grad_(False)


def parts(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


MLP = ["0", "2", "4"]


def of(name: str) -> list[str]:
    return [f"{name}.{layer}" for layer in MLP]


class Distance(Metric):
    """Holds a network, as FID does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def update(self) -> None: ...

    def compute(self) -> Tensor:
        return torch.zeros(())


def partly_frozen(count: int) -> nn.Sequential:
    net = mlp()
    for layer in list(net)[:count]:
        frozen(layer)
    return net


def tower(network: nn.Module) -> nn.ModuleDict:
    return parts(body=network, head=nn.Linear(CLASSES, 2))


#: What is frozen, the targets, the head, and what is left alone.
SITUATIONS: dict[str, tuple[nn.Module, list[str], list[str], list[str]]] = {
    "nothing": (mlp(), ["0", "2"], ["4"], []),
    "everything": (frozen(mlp()), ["0", "2"], ["4"], []),
    "teacher last": (parts(net=mlp(), teacher=frozen(mlp())), ["net.0", "net.2"], ["net.4"], of("teacher")),
    "teacher first": (parts(teacher=frozen(mlp()), net=mlp()), ["net.0", "net.2"], ["net.4"], of("teacher")),
    "teacher with a head": (parts(a=mlp(), t=frozen(tower(mlp()))), ["a.0", "a.2"], ["a.4"], [*of("t.body"), "t.head"]),
    "teacher of one layer": (parts(net=mlp(), t=frozen(nn.Linear(IN, 2))), ["net.0", "net.2"], ["net.4"], ["t"]),
    "encoder last": (parts(head=nn.Linear(CLASSES, 2), encoder=frozen(mlp())), of("encoder"), ["head"], []),
    "encoder of one layer": (parts(head=nn.Linear(9, 2), coder=frozen(nn.Linear(9, 9))), ["coder"], ["head"], []),
    "all but a head of two layers": (
        parts(head=nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)), encoder=frozen(mlp())),
        of("encoder"), ["head"], [],
    ),
    "all but two heads": (
        parts(policy=nn.Linear(3, 4), value=nn.Linear(3, 1), encoder=frozen(mlp())),
        of("encoder"), ["policy", "value"], [],
    ),
    "all but a list of heads": (
        parts(encoder=frozen(mlp()), heads=nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 1)])),
        of("encoder"), ["heads"], [],
    ),
    "all but a head of convolutions": (
        parts(vit=frozen(mlp()), head=nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))), of("vit"), ["head"], [],
    ),
    "all but the last of a chain": (partly_frozen(3), ["0", "2"], ["4"], []),
    "all but norms and head": (
        parts(norm=nn.LayerNorm(IN), net=frozen(mlp()), head=nn.Linear(3, 2)), of("net"), ["head"], [],
    ),
    "the first block": (partly_frozen(1), ["2"], ["4"], ["0"]),
    "the head alone": (parts(body=mlp(), head=frozen(nn.Linear(CLASSES, 2))), of("body"), ["head"], []),
    "head and teacher": (
        parts(net=parts(body=mlp(), head=frozen(nn.Linear(CLASSES, 2))), teacher=frozen(tower(mlp()))),
        of("net.body"), ["net.head"], [*of("teacher.body"), "teacher.head"],
    ),
    "one of two towers": (
        parts(image=mlp(), text=frozen(mlp()), image_out=nn.Linear(3, 8), text_out=nn.Linear(3, 8)),
        [*of("image"), "image_out"], ["text_out"], of("text"),
    ),
    "embedding and norm": (
        parts(e=frozen(nn.Embedding(5, 4)), n=frozen(nn.BatchNorm1d(4)), net=mlp()), ["net.0", "net.2"], ["net.4"], [],
    ),
    "a metric's network": (parts(net=mlp(), fid=Distance(frozen(mlp()))), ["net.0", "net.2"], ["net.4"], []),
    "nothing, but a metric's": (parts(net=mlp(), fid=Distance(mlp())), ["net.0", "net.2"], ["net.4"], []),
}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS)
def test_frozen_networks_are_left_alone_where_others_than_the_head_train(situation: str) -> None:
    module, targets, head, left = SITUATIONS[situation]
    choice = choose_layers(module)
    assert (choice.targets, choice.head, choice.left_frozen) == (targets, head, left)
    with_frozen = choose_layers(module, adapt_frozen=True)
    assert set(with_frozen.targets) == {*targets, *left}
    assert with_frozen.head == head


def test_biases_do_not_make_a_layer_one_that_trains_or_not() -> None:
    net = mlp()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("bias" not in name)
    assert choose_layers(net).left_frozen == []
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("bias" in name or name.startswith("4"))
    assert choose_layers(net).targets == ["0", "2"]


def test_a_frozen_network_beside_nothing_to_adapt_is_said() -> None:
    module = parts(cnn=nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), fc=nn.Linear(4, 2), lpips=frozen(mlp()))
    text = r"3 linear layers are frozen \(lpips\) while others train \(cnn, fc\); adapt_frozen=True"
    with pytest.raises(InputError, match=text):
        choose_layers(module)


def test_names_reach_a_frozen_network_only_where_they_mean_nothing_else() -> None:
    module = parts(student=mlp(), teacher=frozen(mlp()))
    assert choose_layers(module, target_modules=["2"]).targets == ["student.2"]
    assert choose_layers(module, target_modules=["2"]).left_frozen == ["teacher.2"]
    assert choose_layers(module, target_modules=["2", "teacher.2"]).targets == ["student.2", "teacher.2"]
    assert choose_layers(module, target_modules=r".*\.[02]").targets == ["student.0", "student.2"]
    assert choose_layers(module, target_modules="teacher").targets == of("teacher")
    assert choose_layers(module, target_modules=["2"], adapt_frozen=True).targets == ["student.2", "teacher.2"]


@pytest.mark.parametrize("exclude", ["teacher", ["teacher"], ["net.teacher"], r"net\.teacher", r".*teacher.*"])
def test_excluding_a_module_excludes_everything_in_it(exclude: Any) -> None:
    choice = choose_layers(parts(net=parts(student=mlp(), teacher=mlp())), exclude=exclude)
    assert (choice.targets, choice.head) == (["net.student.0", "net.student.2"], ["net.student.4"])


def test_a_name_may_be_a_layers_and_a_modules() -> None:
    module = parts(
        blocks=nn.ModuleList([mlp(), mlp()]), teacher=mlp(), proj=parts(teacher=nn.Linear(4, 4), x=nn.Linear(4, 4)),
        head=nn.Linear(4, 2),
    )  # fmt: skip
    assert choose_layers(module, exclude="teacher").targets == [*of("blocks.0"), *of("blocks.1"), "proj.x"]
    assert choose_layers(module, exclude=["blocks.0", "proj"]).targets == [*of("blocks.1"), *of("teacher")]
    # as in PEFT: a number in a list is the last part of layers' names, not all that is in blocks of that number
    assert choose_layers(module, exclude=["0"]).targets[:2] == ["blocks.0.2", "blocks.0.4"]
    assert choose_layers(module, target_modules=["proj"]).targets == ["proj.teacher", "proj.x"]
    assert choose_layers(parts(a=parts(proj=nn.Linear(4, 4)), proj=nn.Linear(4, 4)), ["proj"], head=None).targets == [
        "a.proj",
        "proj",
    ]
    with pytest.raises(InputError, match="exclude: unknown layer 'techer': did you mean teacher"):
        choose_layers(module, exclude="techer")


KINDS: dict[str, nn.Module] = {
    "LSTM": nn.LSTM(4, 4),
    "GRU": nn.GRU(4, 4),
    "RNN": nn.RNN(4, 4),
    "LSTMCell": nn.LSTMCell(4, 4),
    "ConvTranspose1d": nn.ConvTranspose1d(4, 4, 2),
    "ConvTranspose2d": nn.ConvTranspose2d(4, 4, 2),
    "Bilinear": nn.Bilinear(4, 4, 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_are_not_supported_are_named_with_those_that_are(kind: str) -> None:
    supported = r"not supported.*supported are nn\.Linear.*nn\.Conv2d.*nn\.MultiheadAttention"
    with pytest.raises(InputError, match=rf"no layer to adapt: .*{kind} \('layer'\).*{supported[13:]}"):
        inject(parts(layer=KINDS[kind], head=nn.Linear(4, 2)))
    for name in ("layer", "net"):
        with pytest.raises(
            InputError, match=rf"'net\.layer' cannot be adapted: layers of the kind {kind} are {supported}"
        ):
            inject(parts(net=parts(layer=KINDS[kind]), body=mlp()), target_modules=[name])


# --- in fit -----------------------------------------------------------------------------------------------------------


class Distilled(pl.LightningModule):
    """A backbone and a head, trained towards a teacher's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head, self.teacher = mlp(HIDDEN), nn.Linear(HIDDEN, CLASSES), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch[0])
        return F.mse_loss(self(batch[0]), wanted)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.03)


class FreezesInSetup(Distilled):
    def setup(self, stage: str) -> None:
        frozen(self.teacher)


class FreezesInConfigureModel(Distilled):
    def configure_model(self) -> None:
        frozen(self.teacher)


class Freezes(pl.Callback):
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        frozen(pl_module.teacher)


class FreezesLate(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        frozen(pl_module.backbone)


class Stages(BaseFinetuning):
    """Lightning's own way to freeze a backbone for some epochs."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.backbone, pl_module.teacher])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None: ...


def eva(**options: Any) -> EVAInitCallback:
    return EVAInitCallback(r=2, **options)


def data() -> DataLoader[Any]:
    return loader(n=32)


def trains(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad and "lora_" not in name]


@pytest.mark.parametrize(
    ("kind", "callbacks"),
    [
        (FreezesInSetup, []),
        (FreezesInConfigureModel, []),
        (Distilled, [Freezes()]),
    ],
    ids=["setup", "configure_model", "a later callback"],
)
def test_freezing_counts_wherever_it_is_done(
    kind: type[Distilled], callbacks: list[pl.Callback], caplog: pytest.LogCaptureFixture
) -> None:
    module = kind()
    before = copy.deepcopy(module.teacher.state_dict())
    trainer(eva(), *callbacks).fit(module, data())
    assert list(find_adapters(module)) == of("backbone")
    assert trains(module) == ["head.weight", "head.bias"]
    assert all(torch.equal(before[name], value) for name, value in module.teacher.state_dict().items())
    text = caplog.text
    assert "head head trains in full" in text
    assert "teacher (3 layers, frozen before fit)" in text
    assert "adapt_frozen=True" in text


@pytest.mark.parametrize(
    "callbacks", [[Stages(), eva(verbose=False)], [eva(verbose=False), Stages()]], ids=["before", "after"]
)
def test_a_backbone_that_lightnings_callback_freezes_is_adapted(callbacks: list[pl.Callback]) -> None:
    module = Distilled()
    before = module.backbone.state_dict()["0.weight"].clone()
    trainer(*callbacks).fit(module, data())
    layers = find_adapters(module)
    assert {*of("backbone")} <= {*layers}
    assert all(bool(layers[name].b.any()) for name in of("backbone")), "they train"
    assert torch.equal(module.backbone.state_dict()["0.base_layer.weight"], before)


def test_adapters_that_are_frozen_after_they_were_put_in_are_said() -> None:
    with pytest.raises(InputError, match=r"the adapter of 'backbone\.0' \(3 such\) was frozen after it was put in"):
        trainer(FreezesLate(), eva()).fit(FreezesInSetup(), data())


def test_the_summary_says_what_trains(caplog: pytest.LogCaptureFixture) -> None:
    for options, text in (({}, "frozen head: head: trains if named"), ({"head": "head"}, "head head trains in full")):
        module = Distilled()
        module.freeze()
        trainer(eva(**options)).fit(module, data())
        assert text in caplog.text
        caplog.clear()
        assert trains(module) == (["head.weight", "head.bias"] if options else [])
    module = Distilled()
    frozen(module.teacher)
    module.head.bias.requires_grad_(False)
    trainer(eva()).fit(module, data())
    out = caplog.text
    assert "head in part" in out
    assert "trains in full" not in out


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_resumed_run_trains_what_the_interrupted_one_did(adapter_only: bool, tmp_path: Path) -> None:
    """Also where the new process has not frozen the teacher, which is defined last."""
    modules = [Distilled() for _ in range(3)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    for module in modules[:2]:
        frozen(module.teacher)
    options = {"adapter_only_checkpoints": adapter_only, "verbose": False}
    run = trainer(eva(**options))
    run.fit(modules[0], data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    for module in modules[1:]:
        trainer(eva(**options), max_epochs=2).fit(module, data(), ckpt_path=tmp_path / "a.ckpt")
        assert trains(module) == trains(modules[0]) == ["head.weight", "head.bias"]
    one, other = (module.state_dict() for module in modules[1:])
    assert all(torch.equal(one[name], other[name]) for name in one)
    if not adapter_only:
        loaded = load_from_checkpoint(Distilled, tmp_path / "a.ckpt")
        assert trains(loaded) == trains(modules[0])


def test_a_wrong_value_is_refused() -> None:
    with pytest.raises(InputError, match="adapt_frozen must be True or False, got 'teacher'"):
        eva(adapt_frozen="teacher")
