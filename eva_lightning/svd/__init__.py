"""Streaming SVD of mean-centred tokens: pure torch, no Lightning, no PEFT."""

from eva_lightning.svd.engine import StreamingSVD, SVDResult
from eva_lightning.svd.exact import ExactSVD
from eva_lightning.svd.incremental import IncrementalSVD
from eva_lightning.svd.memory import (
    ENGINES,
    choose_engines,
    estimate_bytes,
    make_engine,
    message_bytes,
    place_engines,
    total_bytes,
)
from eva_lightning.svd.selected_cosine import SelectedCosineRule
from eva_lightning.svd.sketch import SketchSVD
from eva_lightning.svd.solver import Solution, solve
from eva_lightning.svd.stopping import CosineRule, DoublingRule, StoppingRule, make_stopping_rule
from eva_lightning.svd.token_noise import token_noise

__all__ = [
    "ENGINES",
    "CosineRule",
    "DoublingRule",
    "ExactSVD",
    "IncrementalSVD",
    "SVDResult",
    "SelectedCosineRule",
    "SketchSVD",
    "Solution",
    "StoppingRule",
    "StreamingSVD",
    "choose_engines",
    "estimate_bytes",
    "make_engine",
    "make_stopping_rule",
    "message_bytes",
    "place_engines",
    "solve",
    "token_noise",
    "total_bytes",
]
