"""The official weights, from the Hugging Face hub or its cache on this machine."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from huggingface_hub import constants
from timm.models import get_pretrained_cfg

from eva_lightning.errors import UnreachableError
from eva_lightning.vision.backbone.hub import silence
from eva_lightning.vision.backbone.timm_models import resolve_model
from eva_lightning.vision.backbone.weights import cached_file
from tools.dinov2_small.release import MODEL, FoundWeights
from tools.dinov2_small.watched import Say, run_watched

OFFICIAL = FoundWeights(MODEL, "pretrained", True, "the official DINOv2 ViT-S/14 from the Hugging Face hub")

_FILE = "model.safetensors"
#: Seconds without a byte after which a download is given up.
_PATIENCE = 30.0
_DOWNLOAD = """
import sys, huggingface_hub
try:
    huggingface_hub.hf_hub_download(*sys.argv[1:])
except Exception as error:
    while error.__cause__ is not None:
        error = error.__cause__
    sys.exit(str(error).strip().partition("\\n")[0] or type(error).__name__)
"""


def official_file() -> Path | None:
    """Their file in the hub's cache on this machine, or None."""
    return cached_file(_repository(), None)


def _repository() -> str:
    config = get_pretrained_cfg(resolve_model(MODEL))
    assert config is not None
    return str(config.hf_hub_id)


def official_weights(timeout: float, say: Say) -> FoundWeights:
    """The official weights, once they are on this machine.

    Args:
        timeout: Seconds that the hub may take to answer.
        say: Is told what happens.

    Raises:
        UnreachableError: They are not here, and the hub does not answer or does not have them; begins with "the".
    """
    if official_file() is not None:
        return OFFICIAL
    repository = _repository()
    reason = silence(f"{repository}/resolve/main/{_FILE}", timeout)
    if reason is not None:
        raise UnreachableError(f"the Hugging Face hub does not answer ({reason})")
    say(f"downloading {OFFICIAL.description}")
    # by a process of its own, which can be ended; xet writes elsewhere, where nobody could see how far it is
    environment = {
        "HF_HUB_CACHE": str(constants.HF_HUB_CACHE),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ETAG_TIMEOUT": f"{math.ceil(timeout)}",
    }
    cache = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    command = [sys.executable, "-c", _DOWNLOAD, repository, _FILE]
    try:
        ended = run_watched(command, cache, 0, _PATIENCE + timeout, say, environment)
    except UnreachableError as error:
        raise UnreachableError(f"the download from the Hugging Face hub broke off ({error})") from None
    if ended.status:
        raise UnreachableError(f"the Hugging Face hub does not give the weights ({ended.reason('')})")
    return OFFICIAL
