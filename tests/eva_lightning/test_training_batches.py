"""Minibatches reach the model as the training loop would deliver them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from eva_lightning import EVAInitCallback, StreamingOptions
from tests.modules import Classifier, build, dataset, loader, trainer


class Scaling(pl.LightningDataModule):
    """Changes batches in its transfer hooks, as GPU augmentation does."""

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(48), 16)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 3, batch[1]


class ScalingModule(Classifier):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 6, batch[1]


def first_singular_values(callback: EVAInitCallback) -> torch.Tensor:
    assert callback.state is not None
    return callback.state.singular_values["net.0"]


def test_transfer_hooks_of_data_module_and_module_apply() -> None:
    plain, by_data, by_module = (
        EVAInitCallback(r=4, rho=1, streaming=StreamingOptions(tau=1.0), verbose=False) for _ in range(3)
    )
    trainer(plain).fit(build(), DataLoader(dataset(48), 16))
    trainer(by_data).fit(build(), datamodule=Scaling())
    torch.manual_seed(0)
    trainer(by_module).fit(ScalingModule(), DataLoader(dataset(48), 16))
    expected = 6 * first_singular_values(plain)
    torch.testing.assert_close(first_singular_values(by_data), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first_singular_values(by_module), expected, rtol=1e-4, atol=1e-4)


def test_no_more_batches_are_read_than_allowed() -> None:
    class Counting(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.data, self.reads = dataset(96), []

        def __len__(self) -> int:
            return 96

        def __getitem__(self, i: int) -> Any:
            self.reads.append(i)
            return self.data[i]

    data = Counting()
    callback = EVAInitCallback(r=4, streaming=StreamingOptions(max_batches=2), verbose=False)
    trainer(callback, max_steps=1, max_epochs=-1).fit(build(), DataLoader(data, 16))
    assert callback.state is not None
    assert callback.state.n_batches == 2
    assert data.reads[:32] == list(range(32))
    assert data.reads[32:48] == list(range(16)), "training starts from the first batch again"


def test_workers_end_with_the_stream() -> None:
    import multiprocessing

    class Look(EVAInitCallback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            before = len(multiprocessing.active_children())
            super().on_fit_start(trainer, pl_module)
            self.left = len(multiprocessing.active_children()) - before

    callback = Look(r=4, streaming=StreamingOptions(max_batches=2), verbose=False)
    trainer(callback).fit(build(), loader(num_workers=1))
    # Lightning itself starts one iterator when it sets the loader up
    assert callback.left <= 1
