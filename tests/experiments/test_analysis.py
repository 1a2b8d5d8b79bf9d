from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from eva_lightning.analysis import component_cosines
from experiments.analysis import command_line, main, parse, parts
from experiments.analysis.figures import shares
from experiments.analysis.settings import part_settings
from experiments.analysis.sources import Streamed, open_source
from tests.eva_lightning.rl.tiny import TASK, make_robot
from tests.eva_lightning.vision.fakes import make_task

FIGURES = {"fig5", "fig11", "fig12", "fig13", "fig14", "table6"}


@pytest.fixture(scope="module")
def robots(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny pre-trained network and demonstrations."""
    folder = tmp_path_factory.mktemp("metaworld")
    make_robot(folder)
    return [f"--checkpoint={folder / 'init.ckpt'}", f"--data={folder / 'data'}", f"--task={TASK}", "--map-rank=4"]


def vision(folder: Path) -> list[str]:
    """A tiny ViT of timm and a task."""
    make_task(folder / "data", counts={"train800": 32, "val200": 8, "test": 4})
    words = f"--model test_vit --weights none --root {folder / 'data'} --task kitti --image-size 32 --map-rank 8"
    return words.split()


def small(output: Path, *more: str) -> list[str]:
    text = "--orders 2 --images 32 --epochs 1 --seeds 1 --pretrain-epochs 1 --components 6 --r 2 --accelerator cpu"
    return [*text.split(), "--output", str(output), *more]


def drawn(output: Path) -> set[str]:
    return {path.stem.split("_")[0] for path in output.glob("*.png")}


def test_the_command_makes_all_figures_of_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = main(small(tmp_path, "--parts=convergence,batch-sizes"))
    assert json.loads((tmp_path / "analysis.json").read_text()) == json.loads(json.dumps(numbers))
    assert drawn(tmp_path) == {"fig5", "fig11"}
    curves = numbers["convergence"]["curves"]
    assert set(curves) == {"4", "8", "16", "32"}
    assert curves["4"][-1]["n_batches"] == 8
    assert "half of the 96 components" in capsys.readouterr().out


def test_the_command_makes_all_figures_of_a_timm_backbone(tmp_path: Path) -> None:
    numbers = main(small(tmp_path / "out", *vision(tmp_path)))
    assert drawn(tmp_path / "out") == FIGURES
    blocks = len(timm.create_model("test_vit").blocks)
    kinds = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert len(numbers["ranks"]["ranks"]["1"]) == blocks * len(kinds)
    assert set(numbers["distances"]["table5"]) == kinds
    assert {sum(ranks.values()) for ranks in numbers["ranks"]["ranks"].values()} == {8 * blocks * len(kinds)}


def test_shares_are_those_of_types_and_of_parts_of_the_depth() -> None:
    ranks = {
        f"blocks.{block}.{kind}": 10 * block + place for block in range(5) for place, kind in enumerate(("a.x", "b"))
    }
    total = sum(ranks.values())
    maps = {1.0: dict.fromkeys(ranks, 4), 2.0: ranks}
    assert shares(maps) == {
        "a.x": {1.0: pytest.approx(0.5), 2.0: pytest.approx(100 / total)},
        "b": {1.0: pytest.approx(0.5), 2.0: pytest.approx(105 / total)},
    }
    by_depth = shares(maps, parts=3)
    assert list(by_depth) == ["blocks 0 to 1", "blocks 2 to 3", "blocks 4 to 4"]
    assert by_depth["blocks 4 to 4"] == {1.0: pytest.approx(0.2), 2.0: pytest.approx(81 / total)}
    assert sum(of[2.0] for of in by_depth.values()) == pytest.approx(1)
    without_blocks = {2.0: {"fc": 3, "head": 1}}
    assert shares(without_blocks, parts=3) == {"other layers": {2.0: 1.0}}


def test_the_command_makes_all_figures_of_a_decision_transformer(robots: list[str], tmp_path: Path) -> None:
    numbers = main(small(tmp_path, *robots))
    assert drawn(tmp_path) == FIGURES
    names = {f"model.blocks.{block}.{name}" for block in range(2) for name in ("qkv", "proj", "fc1", "fc2")}
    assert set(numbers["ranks"]["ranks"]["3"]) == names  # embeddings and head have none
    assert numbers["data"].startswith("32 windows of 4 steps of handle-press-side-v3")


def test_padding_is_left_out_of_the_windows_components(robots: list[str], tmp_path: Path) -> None:
    """Against a dense SVD of the tokens of real steps."""
    settings = parse(small(tmp_path, *robots))
    streamed = Streamed(open_source(settings))
    (batch,) = streamed.batches(32, "")
    assert not batch["mask"].all()
    name, layer = next(iter(streamed.layers.items()))
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        streamed.model.eval()(batch)
    handle.remove()
    real = seen[0][batch["mask"].repeat_interleave(4, dim=1)].double()
    dense = torch.linalg.svd(real - real.mean(0), full_matrices=False).Vh[:3].float()
    found = parts._components(settings, streamed, 32, "", list(range(32)))[name][:3]
    assert component_cosines(found, dense).min() > 0.999


def test_what_is_done_is_reused_and_what_depends_on_a_change_is_not(
    robots: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name, function in list(parts.STREAMING.items()):

        def counted(*args: Any, name: str = name, function: Any = function) -> Any:
            calls.append(name)
            return function(*args)

        monkeypatch.setitem(parts.STREAMING, name, counted)
    line = small(tmp_path, *robots, "--parts=batch-sizes,batch-orders,ranks")
    first = main(line)
    assert main(line) == first
    assert calls == ["batch-sizes", "batch-orders", "ranks"]
    main([*line, "--orders=3"])
    assert calls[3:] == ["batch-orders"]
    main([*line, "--overwrite=true", "--parts=ranks"])
    assert calls[4:] == ["ranks"]


def test_an_interrupted_training_is_the_only_one_that_is_done_again(
    robots: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    train = parts.train

    def failing(settings: Any, *args: Any) -> Any:
        if settings.method == "eva:1" and trained.count("eva:1") == 0:
            trained.append("eva:1")
            raise KeyboardInterrupt
        trained.append(settings.method)
        return train(settings, *args)

    monkeypatch.setattr(parts, "train", failing)
    line = small(tmp_path, *robots, "--parts=distances")
    with pytest.raises(KeyboardInterrupt):
        main(line)
    main(line)
    assert trained == ["lora", "eva:1", "eva:1"]


def test_parts_depend_on_nothing_else(robots: list[str], tmp_path: Path) -> None:
    settings = parse(small(tmp_path, *robots))
    other = parse(small(tmp_path, *robots, "--lr=0.1", "--orders=7"))
    assert part_settings(settings, "ranks") == part_settings(other, "ranks")
    assert part_settings(settings, "distances") != part_settings(other, "distances")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--images 8", "--images must be a whole number of at least 32, got 8"),
        ("--model test_vit --checkpoint x", "--model is a vision backbone and checkpoint a Decision Transformer: give"),
        ("--model test_vit", "--task goes with --model and --checkpoint: name a task of the data, got None"),
        ("--task push", "--task goes with --model and --checkpoint: the digits have no tasks, got push"),
        ("--parts rank", "--parts: unknown part 'rank': did you mean ranks?"),
        ("--checkpoint none.ckpt --task push", "there is no checkpoint none.ckpt: make one with"),
        ("--model test_vi --task kitti", "unknown model 'test_vi'"),
    ],
    ids=lambda value: value.replace(" ", "_") if value.startswith("--") and "must" not in value else "sentence",
)
def test_the_command_refuses_in_one_sentence(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line([*words.split(), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}")
    assert error.count("\n") == 1


def test_more_samples_than_there_are_are_refused(robots: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images must be at most 120, the windows of"):
        main(small(tmp_path, *robots, "--images=4000"))
