"""Processes of one training run on one machine meet on the loopback interface, not on all networks.

torch's rendezvous server listens on every interface, and gloo and NCCL on the one that the machine's name belongs to.
"""

from __future__ import annotations

import os
import socket

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from typing_extensions import override

_LOOPBACK = "127.0.0.1"
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class OneMachine(LightningEnvironment):
    """Lightning's own environment, with a rendezvous server that only this machine reaches."""

    def __init__(self) -> None:
        super().__init__()
        self._store: TCPStore | None = None
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        for variable in _INTERFACES:
            os.environ.setdefault(variable, loopback)

    @property
    @override
    def main_address(self) -> str:
        return _LOOPBACK

    @property
    @override
    def main_port(self) -> int:
        if self._main_port == -1 and "LOCAL_RANK" not in os.environ:
            # torch finds this server, and starts none of its own: stores of one port and process share it
            server = socket.create_server((_LOOPBACK, 0))
            self._main_port = server.getsockname()[1]
            self._store = TCPStore(
                _LOOPBACK,
                self._main_port,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=server.detach(),
            )
        return super().main_port


def one_machine(devices: int) -> list[LightningEnvironment]:
    """Trainer plugins for a run on this machine; none where there is one process, or a launcher that knows better."""
    if devices == 1 or SLURMEnvironment.detect() or TorchElasticEnvironment.detect():
        return []
    return [OneMachine()]
