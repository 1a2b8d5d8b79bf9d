"""What ``--protocol``, ``--split-fused`` and ``--pos-embed`` change in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import PeftModel

from eva_lightning.adapters import find_adapters, find_targets
from eva_lightning.sealed import read_sealed_json
from eva_lightning.vision.backbone.split_fused import split_layers
from eva_lightning.vision.backbone.timm_models import create_backbone
from eva_lightning.vision.module import ImageClassifier
from eva_lightning.vision.protocol import AUTHORS_CODE
from experiments.vtab import run
from experiments.vtab.settings import Settings, command_line, main, parse
from tests.eva_lightning.vision.fakes import make_task


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    make_task(tmp_path / "data", counts={"train800": 21, "val200": 8, "test": 12})
    text = (
        f"--root {tmp_path / 'data'} --task kitti --model test_vit --weights none --image-size 32 --batch-size 8 "
        f"--rank 4 --epochs 2 --lr 1e-2 --accelerator cpu --output {tmp_path / 'runs'} --name run"
    )
    return text.split()


def execute(arguments: list[str]) -> dict[str, Any]:
    """A run without its figures."""
    return main([*arguments, "--plots", "false"])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What training and testing looked like."""
    found: dict[str, Any] = {"steps": 0, "images": [], "train_dtypes": set(), "test_dtypes": set(), "adapters": set()}
    train, test = ImageClassifier.training_step, ImageClassifier.test_step

    def training_step(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        found["steps"] += 1
        found["images"].append(len(batch[0]))
        found["train_dtypes"].add(self(batch[0]).dtype)
        found["groups"] = [
            (p.ndim, g["weight_decay"]) for g in self.trainer.optimizers[0].param_groups for p in g["params"]
        ]
        found["lr"] = [*found.get("lr", []), self.trainer.optimizers[0].param_groups[0]["lr"]]
        found["scalings"] = {name: (x.rank, x.module.scaling[x.adapter]) for name, x in find_adapters(self).items()}
        found["targets"] = len(found["scalings"])
        return train(self, batch, batch_idx)

    def test_step(self: ImageClassifier, batch: Any, batch_idx: int) -> None:
        found["test_dtypes"].add(self(batch[0]).dtype)
        found["adapters"].add(len(find_adapters(self)))
        test(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", training_step)
    monkeypatch.setattr(ImageClassifier, "test_step", test_step)
    return found


def test_authors_code(arguments: list[str], seen: dict[str, Any], tmp_path: Path) -> None:
    metrics = execute([*arguments, "--protocol", "authors-code", "--precision", "bf16-mixed"])
    # 29 training images: three full batches of 8, the 5 others wait for another shuffle
    assert seen["images"] == [8] * 6
    # q, k, v, proj, fc1 and fc2 of six blocks, less those whose inputs explain little
    assert metrics["split_fused"]
    assert len(metrics["ranks"]) == 36
    assert sum(metrics["ranks"].values()) == 4 * 36
    # every layer is scaled by alpha over its own rank
    assert len({rank for rank, _ in seen["scalings"].values()}) > 1
    assert all(scaling == pytest.approx(1 / rank) for rank, scaling in seen["scalings"].values())
    assert {decay for ndim, decay in seen["groups"] if ndim <= 1} == {0.0}
    assert {decay for ndim, decay in seen["groups"] if ndim > 1} == {0.05}
    # trained in bf16 (logits are cast for the loss), tested in fp32 without adapters
    assert seen["train_dtypes"] == {torch.bfloat16}
    assert seen["test_dtypes"] == {torch.float32}
    assert seen["adapters"] == {0}
    assert (metrics["precision"], metrics["evaluation_precision"]) == ("bf16-mixed", "32-true")
    assert metrics["protocol"] == "authors-code"
    assert "protocol: authors-code" in (tmp_path / "runs/run/config.yaml").read_text()


def test_paper(arguments: list[str], seen: dict[str, Any]) -> None:
    metrics = execute([*arguments, "--precision", "bf16-mixed"])
    assert seen["images"] == [8, 8, 8, 5] * 2
    assert not metrics["split_fused"]
    assert len(metrics["ranks"]) == 24
    assert len({rank for rank, _ in seen["scalings"].values()}) > 1
    assert {scaling for _, scaling in seen["scalings"].values()} == {0.25}
    assert max(rank for rank, _ in seen["scalings"].values()) <= 8
    assert {decay for _, decay in seen["groups"]} == {0.05}
    assert seen["test_dtypes"] == {torch.bfloat16}
    assert seen["adapters"] == {seen["targets"]}
    assert metrics["evaluation_precision"] == "bf16-mixed"


@pytest.mark.parametrize(("protocol", "last"), [("paper", 0.0062), ("authors-code", 0.0)])
def test_learning_rate_is_set_at_every_step(
    arguments: list[str], seen: dict[str, Any], protocol: str, last: float
) -> None:
    options = ["--method", "linear", "--epochs", "5", "--warmup-epochs", "1", "--protocol", protocol]
    execute([*arguments, *options])
    steps = 3 if protocol == "authors-code" else 4
    assert len(set(seen["lr"])) > 3 * 5 - 3
    assert seen["lr"][:steps] == pytest.approx([1e-2 * (i + 1) / steps for i in range(steps)])
    assert seen["lr"][-1] == pytest.approx(last * 1e-2, abs=3e-4)
    assert (seen["lr"][steps] == seen["lr"][steps - 1]) == (protocol == "paper")
    assert (seen["lr"][-1] > seen["lr"][-2]) == (protocol == "authors-code")


def test_decomposition_is_of_train800_also_where_more_is_trained_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = parse([*arguments, "--protocol", "authors-code"])
    data, _, callbacks = run.assemble(settings)
    assert len(data.data.train) == 29
    state = callbacks[0].initialiser.given  # type: ignore[attr-defined]
    assert set(state.n_samples.values()) == {21 * 5}
    assert callbacks[0].rho == 8.0  # type: ignore[attr-defined]  # all 32 components compete at rank 4
    # one for all learning rates, ranks and seeds
    _, _, others = run.assemble(parse([*arguments, "--protocol", "authors-code", "--rank", "2", "--seed", "7"]))
    other = others[0].initialiser.given  # type: ignore[attr-defined]
    assert {len(v) for v in other.components.values()} == {32}
    assert all(torch.equal(other.components[name], state.components[name]) for name in state.components)


def test_methods_without_a_state_are_not_decomposed_for(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_decompose", lambda *args: pytest.fail("decomposed"))
    for method in ("lora", "eva-minor", "fft"):
        run.assemble(parse([*arguments, "--protocol", "authors-code", "--method", method]))


def test_split_alone_under_the_papers_protocol(arguments: list[str], seen: dict[str, Any], tmp_path: Path) -> None:
    metrics = execute([*arguments, "--split-fused"])
    assert metrics["protocol"] == "paper"
    assert seen["images"] == [8, 8, 8, 5] * 2
    assert len(metrics["ranks"]) == 36
    assert {scaling for _, scaling in seen["scalings"].values()} == {0.25}
    # both layouts are there for users of stock PEFT, and compute the same
    x = torch.randn(2, 3, 32, 32)
    outputs = []
    for split, folder in ((True, "adapter"), (False, "adapter/fused")):
        L.seed_everything(0, verbose=False)
        base = create_backbone("test_vit", 4, 32, split=split)
        outputs.append(PeftModel.from_pretrained(base, str(tmp_path / "runs/run" / folder)).eval()(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_interrupted_authors_run_is_resumed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = [*arguments, "--protocol", "authors-code"]
    whole = execute([*options, "--name", "whole"])
    step = ImageClassifier.training_step

    def interrupted(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        if self.trainer.current_epoch == 1:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "training_step", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            execute(options)
    resumed = execute(options)
    assert resumed["accuracy"] == whole["accuracy"]
    assert resumed["loss"] == whole["loss"]
    assert resumed["ranks"] == whole["ranks"]
    assert read_sealed_json(tmp_path / "runs/run/metrics.json") == resumed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "authors"], "unknown protocol 'authors': did you mean authors-code"),
        (["--pos-embed", "tim"], "unknown pos embed 'tim': did you mean timm"),
        (["--protocol", "authors-code", "--batch-size", "64"], "29 training images are fewer than batch_size 64"),
        (["--protocol", "authors-code", "--rank", "40"], "rank must be at most 32, got 40"),
        (["--model", "test_convnext", "--split-fused"], "has no fused projection to split"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line([*arguments, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_names_of_runs_tell_the_protocols_apart() -> None:
    names = {
        Settings(root="x", task="kitti", **options).run_name
        for options in ({}, {"split_fused": True}, {"protocol": AUTHORS_CODE.name})  # type: ignore[arg-type]
    }
    assert len(names) == 3


def test_module_of_the_authors_protocol_is_split(arguments: list[str]) -> None:
    _, module, _ = run.assemble(parse([*arguments, "--protocol", "authors-code", "--method", "linear"]))
    assert len(split_layers(module)) == 6


@pytest.mark.parametrize(
    ("method", "batch", "factor", "adapters", "scaling"),
    [
        ("eva", 64, 1, 36, 1 / 4),
        ("lora", 32, 2, 36, 1 / 4),
        ("fft", 32, 2, 0, None),
        ("dora", 32, 2, 36, 1 / 4),
        ("pissa", 64, 1, 36, 8 / 4),
        ("olora", 64, 1, 36, 8 / 4),
    ],
)
def test_methods_of_the_authors_code(
    arguments: list[str], method: str, batch: int, factor: int, adapters: int, scaling: float | None
) -> None:
    line = [word for word in arguments if word not in ("--batch-size", "8")]
    settings = parse([*line, "--protocol", "authors-code", "--method", method])
    assert (settings.batch, settings.peak_lr) == (batch, factor * 1e-2)
    # a batch that is given wins, with the learning rate as given
    _, module, _ = run.assemble(given := parse([*arguments, "--protocol", "authors-code", "--method", method]))
    assert (given.batch, module.lr) == (8, 1e-2)
    if method != "eva":  # whose adapters come at the start of fit
        found = find_adapters(module)
        assert len(found) == adapters
        assert {x.module.scaling[x.adapter] for x in found.values()} == (set() if scaling is None else {scaling})
    assert (
        parse([*arguments, "--protocol", "authors-code", "--method", "pissa", "--alpha", "1"]).adapter_options().alpha
        == 1
    )


@pytest.mark.parametrize("model", ["vit_small_patch14_dinov2", "vit_giant_patch14_dinov2"])
def test_layers_of_the_methods_from_peft(model: str) -> None:
    """q, k, v, output.dense, fc1, fc2; a SwiGLU of transformers has neither fc1 nor fc2 (weights_in, weights_out)."""
    settings = Settings(root="x", task="kitti", method="pissa", protocol="authors-code", model=model, image_size=28)
    with torch.device("meta"):
        module = ImageClassifier(model, 4, 28, split_fused=True, model_options={"depth": 2})
    options, excluded = settings.adapter_options(), run.left_out(settings, module)
    names, _ = find_targets(module, options.target_modules, excluded, head=module.head_name)
    attention = ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj"]
    mlp = [] if "giant" in model else ["mlp.fc1", "mlp.fc2"]
    assert names == [f"model.blocks.{block}.{part}" for block in (0, 1) for part in attention + mlp]


def test_eva_dora_of_the_authors_code(arguments: list[str], seen: dict[str, Any], tmp_path: Path) -> None:
    metrics = execute([*arguments, "--protocol", "authors-code", "--method", "eva-dora"])
    assert len(metrics["ranks"]) == 33
    assert not any("blocks.0.attn.qkv" in name for name in metrics["ranks"])
    assert sum(metrics["ranks"].values()) == 4 * 33
    log = (tmp_path / "runs/run/log.txt").read_text() if (tmp_path / "runs/run/log.txt").exists() else ""
    assert not log or "a frozen magnitude and norms per input column" in log
    assert (tmp_path / "runs/run/adapter/trained.safetensors").is_file()
