"""``python -m benchmarks algorithm``: all three on one stream, compared by the components that get a rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.algorithm import PAPER, PEFT, main
from benchmarks.initialisation.runner import Runner
from benchmarks.initialisation.variance import heldout_variance
from benchmarks.models import build_classifier
from benchmarks.photographs import make_images
from tests.experiments.vtab.sweep_fakes import make_tasks
from tests.svd_helpers import captured_variance

SMALL = "--models test_vit --image-size 32 --batch-size 8 --r 2"


def test_one_table_and_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tasks(tmp_path / "data", ["kitti"])
    file = tmp_path / "figures.json"
    document = main(f"{SMALL} --root {tmp_path / 'data'} --task kitti --tau 0.9 --max-batches 30 --json {file}".split())
    assert json.loads(file.read_text()) == json.loads(json.dumps(document))
    (model,) = document["models"]
    default, paper, peft = model["methods"]
    assert [default["name"], paper["name"], peft["name"]] == ["default", PAPER, PEFT]
    assert default["n_batches"] <= model["minibatches_per_pass"]
    # both start over what is less than they need
    assert paper["stopped_by_itself"]
    assert model["minibatches_per_pass"] < paper["n_batches"] <= peft["n_batches"]
    for row in model["methods"]:
        assert sum(row["ranks"].values()) == 2 * model["layers"]
        assert set(row["heldout_per_layer"]) == {layer for layer, rank in row["ranks"].items() if rank}
        assert 0 < row["heldout"]["min"] <= row["heldout"]["median"] <= 1 + 1e-9
    assert paper["moved_from_paper"] == 0
    out = capsys.readouterr().out
    assert "of kitti, train800" in out
    assert PAPER in out


def test_a_cap_is_marked_and_peft_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    document = main(f"{SMALL} --images 16 --heldout 8 --tau 0.99999 --max-batches 3 --no-peft".split())
    methods = document["models"][0]["methods"]
    assert [row["name"] for row in methods] == ["default", PAPER]
    assert (methods[1]["n_batches"], methods[1]["stopped_by_itself"]) == (3, False)
    assert "3 (cap)" in capsys.readouterr().out


def test_heldout_variance_is_that_of_a_dense_svd() -> None:
    images = make_images(None, 3, 4, 32, seed=0).batches
    runner = Runner(build_classifier("test_vit", 32, None, 0), images, torch.device("cpu"))
    name = "model.blocks.1.mlp.fc1"
    layer = runner.classifier.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    rows = torch.linalg.qr(torch.randn(layer.in_features, 3, generator=torch.Generator().manual_seed(0))).Q.T
    values = heldout_variance(runner, [name], {"random": {name: rows}}, images)
    tokens: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: tokens.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for x, _ in images:
            runner.classifier.eval()(x)
    assert values["random"][name] == pytest.approx(captured_variance(torch.cat(tokens), rows), rel=1e-4)
