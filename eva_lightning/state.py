"""The result of EVA's decompositions, in memory and on disk: compute once, inspect, reuse with any rank."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eva_lightning.errors import InputError, InputTypeError, MissingInputError, check_number
from eva_lightning.files import file_digest, replacing, write_text
from eva_lightning.ranks import explained_variance, redistribute_ranks

FORMAT = "eva_lightning.state"
VERSION = 1
_TENSOR_FIELDS = ("components", "singular_values", "explained_variance_ratio")


@dataclass
class EVAState:
    """Decompositions of the inputs of all adapted layers, keyed by layer name.

    Attributes:
        ranks: Rank each layer received; 0: its adapter was removed.
        components: Top right-singular vectors, shape ``(k, dim)`` per layer.
        singular_values: Shape ``(k,)`` per layer, of the mean-centred inputs.
        explained_variance_ratio: Shape ``(k,)`` per layer.
        total_variance: Sum of all squared singular values per layer.
        n_samples: Tokens counted per layer.
        converged: Whether the layer met the stopping rule.
        n_batches: Minibatches streamed.
        seconds: Wall time of the whole initialisation.
        shared_with: Layer -> the layer whose inputs, and so whose decomposition, it shares. Tensors are then the same
            objects, and are saved once.
        convergence: Per layer the curve ``[(minibatches, value), ...]`` of the stopping rule.
        meta: r, rho, metric, engine, versions and the like.
        widths: Input width per layer; taken from the components when left out.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    components: dict[str, Tensor] = field(default_factory=dict)
    singular_values: dict[str, Tensor] = field(default_factory=dict)
    explained_variance_ratio: dict[str, Tensor] = field(default_factory=dict)
    total_variance: dict[str, float] = field(default_factory=dict)
    n_samples: dict[str, int] = field(default_factory=dict)
    converged: dict[str, bool] = field(default_factory=dict)
    n_batches: int = 0
    seconds: float = 0.0
    shared_with: dict[str, str] = field(default_factory=dict)
    convergence: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    meta: dict[str, str | int | float] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.widths:
            self.widths = {layer: v.shape[1] for layer, v in self.components.items()}

    def without_components(self) -> EVAState:
        """A copy without the singular vectors: enough to report and to redistribute ranks, and small."""
        return replace(self, components={})

    def redistribute(
        self, r: int | Mapping[str, int], rho: float, metric: str = "ratio", max_rank: int | None = None
    ) -> dict[str, int]:
        """Ranks for another r and rho, from the decompositions held.

        Every layer competes with its first ``round(r * rho)`` components (at most its input width) for the sum of r
        over all layers.

        Args:
            r: Mean rank, or one per layer.
            rho: Largest rank over r, at least 1; 1 gives uniform ranks.
            metric: One of ``ranks.METRICS``.
            max_rank: Cap on every layer's rank besides ``round(r * rho)``.

        Raises:
            InputError: r < 1, rho < 1 or NaN, unknown metric, or more components needed than the state holds.
        """
        check_number("rho", rho, at_least=1)
        budget, scores = 0, {}
        for layer, sigma in self.singular_values.items():
            layer_r = r[layer] if isinstance(r, Mapping) else r
            check_number(f"r of layer {layer!r}" if isinstance(r, Mapping) else "r", layer_r, at_least=1)
            needed = min(round(layer_r * rho), self.widths.get(layer, round(layer_r * rho)))
            if needed > len(sigma):
                raise InputError(
                    f"r * rho = {layer_r} * {rho:g} needs {needed} components per layer, but this EVA state holds "
                    f"{len(sigma)} for layer {layer!r}: compute it again with a larger r or rho"
                )
            budget += layer_r
            scores[layer] = explained_variance(
                sigma[:needed], self.total_variance[layer], self.n_samples[layer], metric
            )
        return redistribute_ranks(scores, budget, max_rank)

    def summary(self) -> dict[str, int | float]:
        """Totals for a one-line report."""
        ranks = sorted(self.ranks.values())
        return {
            "layers": len(ranks),
            "decompositions": len(ranks) - len(self.shared_with),
            "rank_min": ranks[0] if ranks else 0,
            "rank_median": statistics.median(ranks) if ranks else 0,
            "rank_max": ranks[-1] if ranks else 0,
            "rank_total": sum(ranks),
            "removed": ranks.count(0),
            "converged": sum(self.converged.values()),
            "n_batches": self.n_batches,
            "seconds": self.seconds,
        }

    def describe(self) -> list[dict[str, str | int | float | bool]]:
        """One row per layer: name, width, rank, components held, explained variance of the kept ones, tokens."""
        return [
            {
                "layer": layer,
                "width": self.widths.get(layer, 0),
                "rank": rank,
                "components": len(self.singular_values[layer]),
                "explained": float(self.explained_variance_ratio[layer][:rank].sum()),
                "n_samples": self.n_samples[layer],
                "converged": self.converged.get(layer, False),
                "shared_with": self.shared_with.get(layer, ""),
            }
            for layer, rank in self.ranks.items()
        ]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``<path>.safetensors`` (tensors) and ``<path>.json`` (everything else); no pickle.

        Each file appears whole or not at all, and the JSON holds a checksum of the tensors, so that halves of two
        different states are never read as one.

        Args:
            path: File name with or without either suffix. Folders are created.

        Returns:
            The path of the tensor file.
        """
        tensor_path, json_path = _paths(path)
        tensors = {
            f"{name}/{layer}": value.detach().cpu().contiguous()
            for name in _TENSOR_FIELDS
            for layer, value in getattr(self, name).items()
            if layer not in self.shared_with
        }
        document: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        document |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSOR_FIELDS}

        with replacing(tensor_path) as temporary:
            save_file(tensors, temporary)
            document["tensor_checksum"] = _checksum(temporary)
        write_text(json_path, json.dumps(document, indent=1, default=_plain_number))
        return tensor_path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EVAState:
        """Read what :meth:`save` wrote.

        Args:
            path: The name of either file, or their common stem.

        Raises:
            MissingInputError: One or both files are missing.
            InputError: Not an EVA state, another version, truncated, or tensors that do not belong to the JSON.
        """
        tensor_path, json_path = _paths(path)
        for part in (tensor_path, json_path):
            if not part.is_file():
                raise MissingInputError(
                    f"An EVA state is two files, {tensor_path} and {json_path.name}: {part} is missing"
                )
        document = _read_document(json_path)
        if document.pop("tensor_checksum", None) != _checksum(tensor_path):
            raise InputError(
                f"{tensor_path} is truncated or does not belong to {json_path.name} (checksum differs): "
                "copy both files again or compute the state again"
            )
        try:
            tensors = load_file(tensor_path)
        except SafetensorError as error:
            raise InputError(f"{tensor_path} is not a readable safetensors file: {error}") from error
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in document.items() if name in known}
        values["convergence"] = {
            layer: [(int(t), float(value)) for t, value in curve] for layer, curve in values["convergence"].items()
        }
        shared = values["shared_with"]
        for name in _TENSOR_FIELDS:
            prefix = f"{name}/"
            own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            values[name] = {
                layer: own[shared.get(layer, layer)] for layer in values["ranks"] if shared.get(layer, layer) in own
            }
        return cls(**values)


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Tensor and JSON file of a state; a dot inside the stem ("vit.r16") is not a suffix."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is truncated or not JSON: {error}") from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise InputError(f"{path} does not describe an EVA state")
    version = document.pop("version", None)
    if version != VERSION:
        raise InputError(f"{path} has version {version}, this eva_lightning reads version {VERSION}")
    required = {f.name for f in fields(EVAState)} - set(_TENSOR_FIELDS)
    if missing := sorted(required - set(document)):
        raise InputError(f"{path} lacks {', '.join(missing)}")
    return document


def _checksum(path: Path) -> str:
    return f"sha256:{file_digest(path)}"


def _plain_number(value: object) -> object:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if hasattr(value, "item"):
        return value.item()
    raise InputTypeError(f"{type(value).__name__} cannot be saved in an EVA state")
