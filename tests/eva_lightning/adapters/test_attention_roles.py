"""Queries and values by their names, in models of timm and transformers and in the Decision Transformer."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from eva_lightning.adapters.attention_roles import attention_role, queries_and_values
from eva_lightning.adapters.targets import linear_layers
from eva_lightning.rl.decision_transformer import DecisionTransformer
from eva_lightning.vision.backbone.split_fused import split_fused

TINY = {"depth": 2, "embed_dim": 24, "num_heads": 2}


def found(model: nn.Module) -> list[str]:
    return queries_and_values(model, linear_layers(model), "ailora")


def vit(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **{**TINY, **options})


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            "query",
            "q q_proj query to_q wq Wq q_lin q_attn c_q in_proj_q query_proj attn.qkv.q layers.0.self_attn.q_proj",
        ),
        ("key", "k k_proj key to_k wk k_lin attn.kv.k"),
        ("value", "v v_proj value to_v wv v_lin value_proj attn.qkv.v values"),
        (None, "qkv kv c_attn c_proj query_key_value out o_proj fc1 gate proj vq equery value_head kernel q.proj"),
    ],
)
def test_roles_by_the_last_part_of_a_name(role: str | None, names: str) -> None:
    assert {name: attention_role(name) for name in names.split()} == dict.fromkeys(names.split(), role)


@pytest.mark.parametrize(
    "model",
    [vit("vit_small_patch14_dinov2", img_size=28), DecisionTransformer(3, 2, 16, 2, 2, 3)],
    ids=["timm", "decision transformer"],
)
def test_fused_projections_are_refused_and_taken_apart_found(model: nn.Module) -> None:
    fused = "blocks.0.attn.qkv" if hasattr(model, "patch_embed") else "blocks.0.qkv"
    sentence = f"ailora adapts queries and values .*'{fused}' and 1 more compute them together.*--split-fused"
    with pytest.raises(ValueError, match=sentence):
        found(model)
    split_fused(model)
    assert found(model) == [f"{fused.replace('.0.', f'.{i}.')}.{part}" for i in (0, 1) for part in "qv"]


def test_attention_pooling_has_its_query_beside_and_its_value_in_a_fused_layer() -> None:
    model = vit("vit_base_patch16_siglip_224", img_size=32, depth=1)
    split_fused(model)
    assert found(model) == ["blocks.0.attn.qkv.q", "blocks.0.attn.qkv.v", "attn_pool.q", "attn_pool.kv.v"]


def test_transformers_models() -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.device("meta"):
        assert found(BertModel(BertConfig(**small, vocab_size=9))) == [
            f"encoder.layer.0.attention.self.{part}" for part in ("query", "value")
        ]
        assert found(LlamaModel(LlamaConfig(**small, vocab_size=9))) == [
            f"layers.0.self_attn.{part}" for part in ("q_proj", "v_proj")
        ]
        gpt2 = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(ValueError, match=r"'h\.0\.attn\.c_attn' compute them together"):
        found(gpt2)


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.value, self.policy = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 2)


def test_what_stands_alone_is_no_attention() -> None:
    with pytest.raises(ValueError, match="ActorCritic has no two layers to adapt that are named like them"):
        found(ActorCritic())
    encoder = nn.TransformerEncoderLayer(8, 2, 8)
    with pytest.raises(ValueError, match=r"in one module: nn\.MultiheadAttention keeps them in one weight"):
        found(encoder)
