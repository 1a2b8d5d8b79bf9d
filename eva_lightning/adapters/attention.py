"""LoRA on nn.MultiheadAttention, which PEFT 0.21 does with two pairs of matrices of one rank.

Its layer adds B A to the packed query, key and value weights and to those of the output projection before every call,
and subtracts them afterwards, because torch's attention function reads weights and calls no layers. PEFT adds the
output projection's B A twice in doing so; EVA sets A only and does not correct that, so that stock PEFT computes the
same. One entry of LoraConfig stands for both pairs: the rank cannot be redistributed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.layer_inputs import AttentionInputs, AttentionOutputs, LayerInputs

OUT_PROJECTION = ".base_layer.out_proj"
"""Where the output projection's LoRA layer stands below that of the attention."""


class AttentionInputLayer(AdapterLayer):
    """The adapter of the query, key and value projections: A (rank, embed_dim), B (3 * embed_dim, rank)."""

    has_fixed_rank = True

    def inputs(self) -> LayerInputs:
        attention: Any = self.base
        return AttentionInputs(attention)

    def _update_layer(self, rank: int, alpha: float, config: Any) -> None:
        from peft.tuners.lora import LoraLayer

        # the attention's own update_layer would also resize the output projection, a layer of its own here
        update: Any = LoraLayer.update_layer
        update(self.module, self.adapter, rank, alpha, config=config)


@dataclass(frozen=True)
class AttentionOutputLayer(AdapterLayer):
    """The adapter of the output projection.

    Attributes:
        attention: the ``nn.MultiheadAttention`` it belongs to.
    """

    attention: Any = None

    has_fixed_rank = True

    def inputs(self) -> LayerInputs:
        return AttentionOutputs(self.attention)
