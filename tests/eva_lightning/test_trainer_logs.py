"""What the callback writes to loggers, read back with the loggers' own readers."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.tuner.tuning import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from eva_lightning import EVAInitCallback, EVAState
from eva_lightning.trainer_logs import TrainerLogs
from tests import wandb_files
from tests.modules import Classifier, dataset, loader, trainer
from tests.svd_helpers import reference


class Saved(Classifier):
    """Has hyper-parameters of its own."""

    def __init__(self, lr: float = 0.01, width: str = "narrow") -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def built(kind: type[Classifier] = Saved) -> Classifier:
    torch.manual_seed(0)
    return kind()


def fit(
    loggers: list[Any], module: Classifier | None = None, ckpt_path: Path | None = None, epochs: int = 1, **options: Any
) -> EVAInitCallback:
    callback = EVAInitCallback(**{"rho": 2, "r": 4, "tokens_per_sample": None, "verbose": False, **options})
    own = trainer(callback, logger=loggers, max_epochs=epochs, log_every_n_steps=2)
    own.fit(built() if module is None else module, loader(), ckpt_path=ckpt_path)
    own.save_checkpoint(Path(loggers[0].save_dir) / "last.ckpt")
    for logger in loggers:
        logger.finalize("success")
    return callback


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def of_eva(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if key.startswith("eva") and not isinstance(value, dict)}


def expected(state: EVAState) -> dict[str, float]:
    """Written by hand, not by the code under test."""
    explained = {n: float(state.explained_variance_ratio[n][:rank].sum()) for n, rank in state.ranks.items()}
    ranks = list(state.ranks.values())
    return {
        "eva/seconds": state.seconds,
        "eva/batches": 6,
        "eva/rank_mean": 4,
        "eva/rank_min": min(ranks),
        "eva/rank_max": max(ranks),
        "eva/layers_removed": 0,
        "eva/explained_variance": sum(explained.values()) / 3,
        **{f"eva_rank/{n}": rank for n, rank in state.ranks.items()},
        **{f"eva_explained_variance/{n}": share for n, share in explained.items()},
    }


def session(events: EventAccumulator) -> dict[str, Any]:
    """The hyper-parameters that TensorBoard shows."""
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in values.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[EVAState, CSVLogger, Path, Path]:
    """A state, and where one fit has written it: CSV, TensorBoard's events, wandb's offline file."""
    import wandb

    folder = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        table = CSVLogger(folder)
        board = TensorBoardLogger(folder, name="board", version="")
        online = WandbLogger(save_dir=folder, settings=wandb.Settings(silent=True, console="off"), config={"seed": 7})
        state = fit([table, board, online]).state
        online.experiment.finish()
    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert state is not None
    return state, table, folder / "board", record


def test_csv_has_the_scalars_once_and_the_hyperparameters(written: tuple[EVAState, CSVLogger, Path, Path]) -> None:
    state, table, _, _ = written
    with_eva = [row for row in rows_of(table) if of_eva(row)]
    assert [of_eva(row) for row in with_eva] == [pytest.approx(expected(state))]
    assert with_eva[0]["step"] == "0"
    kept = yaml.safe_load((Path(table.log_dir) / "hparams.yaml").read_text())
    assert {"lr": kept.pop("lr"), "width": kept.pop("width")} == {"lr": 0.01, "width": "narrow"}
    ours = kept.pop("eva")
    assert kept == {}
    assert (ours["rho"], ours["r"], ours["metric"], ours["engine"], ours["batches"]) == (2, 4, "ratio", "exact", 6)


def test_the_explained_variance_is_that_of_a_dense_svd(written: tuple[EVAState, CSVLogger, Path, Path]) -> None:
    _, table, _, _ = written
    (row,) = [row for row in rows_of(table) if of_eva(row)]
    variances = reference(dataset(96).tensors[0])[0].square()
    dense = float(variances[: int(float(row["eva_rank/net.0"]))].sum() / variances.sum())
    assert float(row["eva_explained_variance/net.0"]) == pytest.approx(dense, rel=1e-5)


def test_tensorboard_has_scalars_figures_and_one_row_of_hyperparameters(
    written: tuple[EVAState, CSVLogger, Path, Path],
) -> None:
    state, _, board, _ = written
    events = EventAccumulator(str(board), size_guidance={"images": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("eva")]
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    assert found == {tag: [(0, pytest.approx(value, rel=1e-5))] for tag, value in expected(state).items()}
    assert [event.value for event in events.Scalars("hp_metric")] == [-1], "Lightning's own, once"
    assert sorted(events.Tags()["images"]) == ["eva/ranks", "eva/spectra"]
    for tag in events.Tags()["images"]:
        (image,) = events.Images(tag)
        assert image.encoded_image_string.startswith(b"\x89PNG")
        assert image.width > 300
    shown = session(events)
    assert {key: shown[key] for key in ("lr", "width", "eva/rho", "eva/r")} == {
        "lr": pytest.approx(0.01), "width": "narrow", "eva/rho": 2, "eva/r": 4,
    }  # fmt: skip
    assert yaml.safe_load((board / "hparams.yaml").read_text())["width"] == "narrow"


def test_wandb_has_scalars_figures_and_config(written: tuple[EVAState, CSVLogger, Path, Path]) -> None:
    state, _, _, record = written
    entries = [entry for entry in wandb_files.history(record) if any(key.startswith("eva") for key in entry)]
    assert [of_eva(entry) for entry in entries if of_eva(entry)] == [pytest.approx(expected(state))]
    images = {key: value for entry in entries for key, value in entry.items() if isinstance(value, dict)}
    assert sorted(key for key in images if key.startswith("eva")) == ["eva/ranks", "eva/spectra"]
    for key in ("eva/ranks", "eva/spectra"):
        (name,) = images[key]["filenames"]
        assert (record.parent / "files" / name).read_bytes().startswith(b"\x89PNG")
    config = wandb_files.config(record)
    assert (config["lr"], config["width"], config["seed"]) == (0.01, "narrow", 7)
    assert (config["eva"]["rho"], config["eva"]["rank_mean"], config["eva"]["init"]) == (2, 4, "eva")


def test_everything_else_that_is_logged_stays_as_it_is(tmp_path: Path) -> None:
    logs = [CSVLogger(tmp_path / str(log)) for log in (True, False)]
    for log, logger in zip((True, False), logs, strict=True):
        fit([logger], log=log)
    assert not any(of_eva(row) for row in rows_of(logs[1]))
    assert [row for row in rows_of(logs[0]) if not of_eva(row)] == rows_of(logs[1])
    assert (Path(logs[1].log_dir) / "hparams.yaml").read_text() == "lr: 0.01\nwidth: narrow\n"


@pytest.mark.parametrize("given", [False, True], ids=["from the checkpoint", "with a state beside it"])
def test_a_resumed_run_writes_nothing_again(tmp_path: Path, given: bool) -> None:
    first = fit([CSVLogger(tmp_path)])
    assert first.state is not None
    resumed = CSVLogger(tmp_path / "resumed")
    options = {"state": first.state} if given else {}
    fit([resumed], ckpt_path=tmp_path / "last.ckpt", epochs=2, **options)
    rows = rows_of(resumed)
    assert rows
    assert not any(of_eva(row) for row in rows)
    assert (Path(resumed.log_dir) / "hparams.yaml").read_text() == "lr: 0.01\nwidth: narrow\n"


def test_a_given_state_is_written(tmp_path: Path) -> None:
    state = fit([CSVLogger(tmp_path)]).state
    again = CSVLogger(tmp_path / "again")
    fit([again], state=state, r=2, rho=1)
    (values,) = [of_eva(row) for row in rows_of(again) if of_eva(row)]
    assert (values["eva/rank_mean"], values["eva/rank_max"], values["eva/batches"]) == (2, 2, 6)


def test_the_learning_rate_finder_leaves_them_to_the_fit(tmp_path: Path) -> None:
    state = fit([CSVLogger(tmp_path)]).state
    callback = EVAInitCallback(rho=2, r=4, state=state, verbose=False)
    table = CSVLogger(tmp_path / "found")
    own = trainer(callback, logger=table, default_root_dir=tmp_path)
    module = built()
    Tuner(own).lr_find(module, loader(), num_training=4)
    own.fit(module, loader())
    table.finalize("success")
    assert len([row for row in rows_of(table) if of_eva(row)]) == 1


def test_a_second_fit_writes_nothing_again(tmp_path: Path) -> None:
    module, table = built(), CSVLogger(tmp_path)
    fit([table], module)
    again = CSVLogger(tmp_path / "again")
    fit([again], module)
    assert not any(of_eva(row) for row in rows_of(again))


def test_without_matplotlib_there_are_scalars_and_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "eva_lightning.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    board = TensorBoardLogger(tmp_path, name="board", version="")
    fit([board])
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert "eva/rank_mean" in events.Tags()["scalars"]
    assert events.Tags()["images"] == []


def test_hyperparameters_of_a_module_that_has_none(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="board", version="")
    fit([board], built(Classifier))
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {key.partition("/")[0] for key in session(events)} == {"eva"}


def test_hyperparameters_that_were_logged_before_fit_are_those_shown(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="board", version="")
    board.log_hyperparams({"task": "kitti"})
    fit([board], built(Classifier))
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert session(events) == {"task": "kitti"}
    assert len(events.Scalars("hp_metric")) == 1
    assert board.hparams["eva"]["rho"] == 2


class Recorder:
    """A logger that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def log_hyperparams(self, params: Any) -> None:
        self.told.append(params)

    def log_metrics(self, values: Any, step: int) -> None:
        self.told.append(values)


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_writes(first: bool) -> None:
    state = EVAState(ranks={"a": 2}, meta={"rho": 2.0})
    logger, logs = Recorder(), TrainerLogs(state)
    process: Any = SimpleNamespace(is_global_zero=first, loggers=[logger], global_step=0)
    logs.join_hyperparameters(process)
    logger.log_hyperparams({"lr": 1, "eva": "the module's own"})
    logs.write(process)
    logs.write(process)
    assert [told for told in logger.told if "lr" in told] == [{"lr": 1, "eva": "the module's own"}]
    assert sum("eva/rank_mean" in told for told in logger.told) == first
    assert "log_hyperparams" not in vars(logger)


def test_loggers_get_their_own_back_after_an_error(tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_fit_start(self, *_: Any) -> None:
            raise RuntimeError("of the user's")

    table = CSVLogger(tmp_path)
    with pytest.raises(RuntimeError, match="of the user's"):
        trainer(EVAInitCallback(r=4, verbose=False), Fails(), logger=table).fit(built(), loader())
    assert "log_hyperparams" not in vars(table)
