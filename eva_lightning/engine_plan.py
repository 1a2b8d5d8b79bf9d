"""Which engine each layer gets, where its state lives and how much memory that takes, before any is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from eva_lightning.files import format_bytes
from eva_lightning.layer_inputs import LayerInputs
from eva_lightning.streaming_options import StreamingOptions
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
        cls, layers: Mapping[str, LayerInputs], k: int, options: StreamingOptions, minor: bool = False
    ) -> Allocation:
        """The engines for these inputs.

        Args:
            layers: layer -> how its inputs are read.
            k: components wanted.
            options: engine, memory budget and whether what exceeds it goes to the CPU.
            minor: the directions of least variance are wanted, which only the exact engine keeps.

        Raises:
            InputError: the budget is too small for the smallest engines.
        """
        widths = {name: inputs.width for name, inputs in layers.items()}
        devices = {name: device_of(inputs.module) for name, inputs in layers.items()}
        offload = options.offload and any(device.type != "cpu" for device in devices.values())
        kinds = choose_engines(
            widths,
            k,
            "exact" if minor else options.engine,
            options.memory_budget,
            offload=offload,
            device=next(iter(devices.values()), torch.device("cpu")),
            # tokens_per_sample=None means exact
            thrifty=options.tokens_per_sample is not None,
        )
        if offload:
            devices = place_engines(kinds, widths, k, options.memory_budget, devices)
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
        aside = (
            f", {format_bytes(total_bytes(moved, self.widths, self.k))} of it on the CPU" if moved and elsewhere else ""
        )
        what = f"the decompositions of {len(self.kinds)} layers ({', '.join(counts)})"
        return f"{what} take at most {format_bytes(self.bytes)}{aside}"


def device_of(layer: nn.Module) -> torch.device:
    """Where the layer computes; the CPU for layers without parameters or on the meta device."""
    parameter = next(layer.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.device.type == "meta" else parameter.device
