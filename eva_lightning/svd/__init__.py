"""Streaming SVD of mean-centred tokens: pure torch, no Lightning, no PEFT."""

from eva_lightning.svd.convergence import CosineRule, DoublingRule, StoppingRule, make_stopping_rule
from eva_lightning.svd.exact import ExactSVD
from eva_lightning.svd.factory import ENGINES, choose_engines, estimate_bytes, make_engine
from eva_lightning.svd.incremental import IncrementalSVD
from eva_lightning.svd.result import StreamingSVD, SVDResult

__all__ = [
    "ENGINES",
    "CosineRule",
    "DoublingRule",
    "ExactSVD",
    "IncrementalSVD",
    "SVDResult",
    "StoppingRule",
    "StreamingSVD",
    "choose_engines",
    "estimate_bytes",
    "make_engine",
    "make_stopping_rule",
]
