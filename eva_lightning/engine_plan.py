"""Which engine each layer gets, where its state lives and how much memory that takes: known before any is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from eva_lightning.layer_inputs import LayerInputs
from eva_lightning.svd import StreamingSVD, choose_engines, make_engine, message_bytes, place_engines, total_bytes


@dataclass(frozen=True)
class Allocation:
    """The engines of all layers.

    Attributes:
        kinds: layer -> engine name.
        widths: layer -> width of its inputs.
        devices: layer -> where the engine's state lives.
        k: components wanted; layers narrower than that keep all.
    """

    kinds: Mapping[str, str]
    widths: Mapping[str, int]
    devices: Mapping[str, torch.device]
    k: int

    @classmethod
    def plan(
        cls,
        layers: Mapping[str, LayerInputs],
        k: int,
        engine: str,
        budget_bytes: int,
        offload: bool = False,
        thrifty: bool = True,
    ) -> Allocation:
        """Engines for ``layers`` within the budget (:func:`eva_lightning.svd.choose_engines`).

        Args:
            layers: how to read each layer's inputs.
            k: components wanted.
            engine: "auto" or an engine's name.
            budget_bytes: memory for all states together.
            offload: keep on the CPU what does not fit beside the model on another device.
            thrifty: let "auto" trade a ten-thousandth of the captured variance for time.

        Raises:
            InputError: the budget is too small for the smallest engines.
        """
        widths = {name: inputs.width for name, inputs in layers.items()}
        devices = {name: device_of(inputs.module) for name, inputs in layers.items()}
        offload = offload and any(device.type != "cpu" for device in devices.values())
        main = next(iter(devices.values()), torch.device("cpu"))
        kinds = choose_engines(widths, k, engine, budget_bytes, offload=offload, device=main, thrifty=thrifty)
        if offload:
            devices = place_engines(kinds, widths, k, budget_bytes, devices)
        return cls(kinds, widths, devices, k)

    def engines(self) -> dict[str, StreamingSVD]:
        """The engines, empty: each takes its memory when it sees the first tokens."""
        return {
            name: make_engine(kind, self.widths[name], min(self.k, self.widths[name]), self.devices[name])
            for name, kind in self.kinds.items()
        }

    @property
    def bytes(self) -> int:
        """Most memory all states can take; layers that turn out to share an input need theirs only once."""
        return total_bytes(self.kinds, self.widths, self.k)

    @property
    def messages(self) -> dict[str, int]:
        """Bytes each process sends per layer when several unite what they have seen: per subspace iteration of an exact
        engine, in all of the others; never activations."""
        return {n: message_bytes(kind, self.widths[n], min(self.k, self.widths[n])) for n, kind in self.kinds.items()}

    def __str__(self) -> str:
        counts = [f"{list(self.kinds.values()).count(kind)} {kind}" for kind in sorted(set(self.kinds.values()))]
        moved = {n: kind for n, kind in self.kinds.items() if self.devices[n].type == "cpu"}
        elsewhere = any(device.type != "cpu" for device in self.devices.values())
        aside = f", {_size(total_bytes(moved, self.widths, self.k))} of it on the CPU" if moved and elsewhere else ""
        what = f"the decompositions of {len(self.kinds)} layers ({', '.join(counts)})"
        return f"{what} take at most {_size(self.bytes)}{aside}"


def device_of(layer: nn.Module) -> torch.device:
    """Where the layer computes; the CPU for layers without parameters or on the meta device."""
    parameter = next(layer.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.device.type == "meta" else parameter.device


def _size(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB" if n < 2**30 else f"{n / 2**30:,.1f} GiB"
