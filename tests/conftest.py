"""What every test runs under: offline, one thread, fixed seeds, no GPU assumed."""

from __future__ import annotations

import ipaddress
import logging
import os
import random
import signal
import socket
from typing import Any

# Before torch and the hub clients are imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Derandomized so that a failure in CI is the failure everybody else sees; no deadline because cores are shared.
settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")

for noisy in ("bitsandbytes", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


def _is_local(host: str) -> bool:
    if host in ("", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def _offline() -> Any:
    """Fail at once, naming the host, where a test would reach beyond this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(str(address[0])):
            raise RuntimeError(f"tests run offline, but one tried to connect to {address[0]}:{address[1]}")
        return connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _hears_signals() -> Any:
    """Every test, and the processes it starts, hears signals: shells make background jobs deaf to Ctrl-C, and Lightning
    makes a process so that was interrupted."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    for number, handler in handlers.items():
        signal.signal(number, handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same generators, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third parties draw from the global generator
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the long ones first, so that no process is left with one of them at the end
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
