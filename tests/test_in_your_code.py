"""docs/in-your-code.md: every block is run, in its order and in one folder."""

from __future__ import annotations

import csv
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from onnx.reference import ReferenceEvaluator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from eva_lightning import EVAInitCallback, precompute
from tests.paths import ROOT

# what torch and Lightning say of the TorchScript exporters and of LightningCLI in a program
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in (":DeprecationWarning", ":FutureWarning", "LightningCLI's args parameter", ".*exists and is not empty")
]

TEXT = (ROOT / "docs" / "in-your-code.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@dataclass
class Ran:
    """What the blocks left: their folder, their names, and what every command gave."""

    folder: Path
    names: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def callback(self, command: str) -> EVAInitCallback:
        (found,) = [c for c in self.results[command].trainer.callbacks if isinstance(c, EVAInitCallback)]
        return found


def run_command(text: str, ran: Ran) -> None:
    """A command in this process: a new one would import torch again."""
    words = shlex.split(text)
    if words[:2] == ["python", "train.py"]:
        import train

        ran.results[text.strip()] = train.main(words[2:])
    elif words[:3] == ["python", "-m", "eva_lightning.precompute"]:
        ran.results[text.strip()] = precompute.main(words[3:])
    else:
        ran.left.append(text)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    ran, logger = Ran(tmp_path_factory.mktemp("project")), logging.getLogger("eva_lightning")
    level, environment = logger.level, dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ran.folder)
        patch.syspath_prepend(ran.folder)
        for kind, text in BLOCKS:
            if name := re.match(r"# (\w+\.(?:py|yaml))\b", text):
                (ran.folder / name[1]).write_text(text)
            elif kind == "python":
                exec(compile(text, "in-your-code.md", "exec"), ran.names)
            else:
                run_command(text, ran)
        run_command("python train.py fit --config config.yaml --config sharded.yaml", ran)
    yield ran
    logger.setLevel(level)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name in ("project", "train"):
        sys.modules.pop(name, None)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as handle:
        return list(csv.DictReader(handle))


def test_the_loggers_have_what_the_page_says(ran: Ran) -> None:
    (file,) = ran.folder.glob("logs/csv/*/metrics.csv")
    (row,) = [row for row in rows(file) if row["eva/rank_mean"]]
    (folder,) = ran.folder.glob("logs/tensorboard/*")
    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["images"] == ["eva/ranks", "eva/spectra"]
    for shown in re.findall(r"^\| (`eva[^|]*)\|", TEXT, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", shown):
            whole = (name if "/" in name else f"eva/{name}").replace("LAYER", "net.0")
            assert row[whole], whole
            assert whole in events.Tags()["scalars"]
    for name in ("ranks.png", "spectra.png"):
        assert (ran.folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_configuration_reaches_the_callback(ran: Ran) -> None:
    callback = ran.callback("python train.py fit --config config.yaml")
    assert (callback.rho, callback.verbose) == (2, "auto")
    options = callback.initialiser.streaming
    assert (options.tau, options.max_batches) == (0.95, 16)
    assert callback.state is not None
    assert sum(callback.state.ranks.values()) == 16
    assert callback.state.ranks.keys() == {"net.0", "net.2"}


def test_a_resumed_run_goes_on_with_the_same_ranks(ran: Ran) -> None:
    first, resumed = "python train.py fit --config config.yaml", next(c for c in ran.results if "--ckpt_path" in c)
    assert ran.results[resumed].trainer.current_epoch == 4
    states = [ran.callback(command).state for command in (first, resumed)]
    assert states[0] is not None
    assert states[1] is not None
    assert states[0].ranks == states[1].ranks
    assert states[0].seconds == states[1].seconds, "that of the first run: nothing is streamed"


def test_a_state_from_one_device_serves_another_configuration(ran: Ran) -> None:
    command = next(c for c in ran.results if "precompute" in c)
    assert ran.results[command] == 0
    callback = ran.callback("python train.py fit --config config.yaml --config sharded.yaml")
    assert callback.initialiser.given is not None
    assert callback.state is not None
    assert sum(callback.state.ranks.values()) == 16


def test_what_is_served_computes_what_was_trained(ran: Ran) -> None:
    resumed = ran.results[next(c for c in ran.results if "--ckpt_path" in c)]
    trained = resumed.model.eval()
    assert any("lora_" in name for name in trained.state_dict())
    x = torch.randn(5, 32)
    with torch.no_grad():
        expected = trained(x).numpy()
        plain = ran.names["Classifier"]().net.eval()
        plain.load_state_dict(torch.load(ran.folder / "weights.pt", weights_only=True))
        (onnx,) = ReferenceEvaluator(str(ran.folder / "model.onnx")).run(None, {"x": x.numpy()})
        found = {
            "weights.pt": plain(x).numpy(),
            "model.onnx": onnx,
            "model.pt": torch.jit.load(str(ran.folder / "model.pt"))(x).numpy(),
            "model.pt2": torch.export.load(ran.folder / "model.pt2").module()(x).numpy(),
        }
    for name, value in found.items():
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    assert [type(layer) for layer in plain] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_the_job_for_slurm_starts_what_the_command_line_takes(ran: Ran, tmp_path: Path) -> None:
    (job,) = [text for text in ran.left if text.startswith("#!/bin/bash")]
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$0.arguments"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", job], env=environment, check=True, cwd=tmp_path)
    program, script, command, *rest = (tmp_path / "srun.arguments").read_text().splitlines()
    assert (program, script, command) == ("python", "train.py", "fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ran.folder)
        patch.syspath_prepend(ran.folder)
        cli = LightningCLI(run=False, args=rest)
    assert (cli.trainer.num_nodes, cli.trainer.num_devices) == (2, 4)
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", job))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "4", "4")


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_trains_with_two_processes(ran: Ran, tmp_path: Path) -> None:
    (command,) = [text for text in ran.left if text.startswith("torchrun")]
    for name in ("project.py", "train.py", "config.yaml"):
        (tmp_path / name).write_text((ran.folder / name).read_text())
    words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    (file,) = tmp_path.glob("logs/**/metrics.csv")
    assert len([row for row in rows(file) if row["eva/rank_mean"]]) == 1, "the first process writes, once"
    assert done.stdout.count("EVA initialisation") == 1


def test_every_block_is_run(ran: Ran) -> None:
    assert [text.partition(" ")[0].splitlines()[0] for text in ran.left] == ["torchrun", "#!/bin/bash"]
