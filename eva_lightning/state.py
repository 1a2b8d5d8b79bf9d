"""The result of EVA's decompositions, in memory and on disk: compute once, inspect, reuse with any rank."""

from __future__ import annotations

import json
import math
import os
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eva_lightning.errors import DamagedFileError, InputError, InputTypeError, MissingInputError, check_number
from eva_lightning.files import file_digest, replacing
from eva_lightning.names import shown
from eva_lightning.optional import needed
from eva_lightning.ranks import explained_variance, redistribute_ranks
from eva_lightning.reading import parse_json, read_text
from eva_lightning.sealed import CHECKSUM, read_sealed_json, sealed
from eva_lightning.state_checks import DOCUMENT_FIELDS, check_agreement, check_document
from eva_lightning.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

FORMAT = "eva_lightning.state"
VERSION = 2
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
        """One row per layer: name, width, rank, components held, explained variance of the kept ones, tokens.

        A layer that did not run has no components and no tokens, and its explained variance is NaN.
        """
        return [
            {
                "layer": layer,
                "width": self.widths.get(layer, 0),
                "rank": rank,
                "components": len(self.singular_values.get(layer, ())),
                "explained": self._explained(layer, rank),
                "n_samples": self.n_samples.get(layer, 0),
                "converged": self.converged.get(layer, False),
                "shared_with": self.shared_with.get(layer, ""),
            }
            for layer, rank in self.ranks.items()
        ]

    def _explained(self, layer: str, rank: int) -> float:
        ratio = self.explained_variance_ratio.get(layer)
        return math.nan if ratio is None else float(ratio[:rank].sum())

    def to_pandas(self) -> DataFrame:
        """:meth:`describe` as a ``pandas.DataFrame`` with the layers as its index.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = needed("pandas", "EVAState.to_pandas", "plots")
        # the columns are there without rows too
        columns = ["width", "rank", "components", "explained", "n_samples", "converged", "shared_with"]
        return pandas.DataFrame(self.describe(), columns=["layer", *columns]).set_index("layer")

    def plot_ranks(self, title: str | None = None) -> Figure:
        """The ranks as a table of colours, one column per block and one row per kind of layer; rank r is neutral.

        Args:
            title: Text above the figure.

        Raises:
            MissingPackageError: matplotlib or scipy is not installed.
            InputError: The state has no ranks (:func:`eva_lightning.compute_eva_state` gives none).
        """
        plots = needed("eva_lightning.plots", "EVAState.plot_ranks", "plots")
        return plots.rank_heatmap(self.ranks, self.meta.get("r"), title)

    def plot_spectra(self, title: str | None = None) -> Figure:
        """The explained-variance ratios of the components held, one line per layer.

        Args:
            title: Text above the figure.

        Raises:
            MissingPackageError: matplotlib or scipy is not installed.
            InputError: The state has no decompositions.
        """
        plots = needed("eva_lightning.plots", "EVAState.plot_spectra", "plots")
        ratios = {layer: ratio.tolist() for layer, ratio in self.explained_variance_ratio.items()}
        return plots.spectra(ratios, title)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``<path>.safetensors``, with everything in it, and ``<path>.json``, a copy of the numbers for reading.

        No pickle. Both are complete before the first one takes its name, so that a kill or a full disk leaves the old
        state or the new one, whole; every byte is under a checksum.

        Args:
            path: File name with or without either suffix. Folders are created.

        Returns:
            The path of the tensor file.

        Raises:
            InputTypeError: ``meta`` holds something that JSON cannot.
            InputError: A field is no finite number, or fields disagree on layers or sizes.
            DiskFullError, UnwritableError: The files cannot be written.
        """
        tensor_path, json_path = _paths(path)
        document = self._document()
        values = {name: getattr(self, name) for name in _TENSOR_FIELDS}
        try:
            check_document(document)
            check_agreement(document, values)
        except InputError as error:
            raise InputError(f"this EVA state cannot be saved: {error}") from error
        tensors = {
            f"{name}/{layer}": value
            for name, found in values.items()
            for layer, value in found.items()
            if not _is_same(value, found.get(self.shared_with.get(layer, "")))
        }
        with replacing(json_path) as json_file, replacing(tensor_path) as tensor_file:
            write_tensors(tensor_file, tensors, json.dumps(document))
            json_file.write_text(json.dumps(sealed(document), indent=1) + "\n", encoding="utf-8")
        return tensor_path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EVAState:
        """Read what :meth:`save` wrote.

        The tensor file is the state; the JSON file beside it must be its copy. One that is whole but of another state,
        as a kill can leave it, is warned of and not used. States of version 1 are read as well: there, the JSON file is
        needed and has no checksum, so that of a number changed in it only what is impossible is found.

        Args:
            path: The name of either file, or their common stem.

        Raises:
            MissingInputError: A file is missing.
            InputError: Not an EVA state, another version, truncated or changed.
        """
        tensor_path, json_path = _paths(path)
        if not tensor_path.is_file():
            raise _missing(tensor_path, tensor_path, json_path)
        tensors, text = read_tensors(tensor_path)
        if text is None:
            document, source = _read_version_1(tensor_path, json_path), json_path
        else:
            document, source = _parsed(text, tensor_path), tensor_path
            _check_copy(json_path, document, tensor_path)
        try:
            check_document(document)
            values: dict[str, Any] = {name: _by_layer(name, tensors, document) for name in _TENSOR_FIELDS}
            check_agreement(document, values)
        except InputError as error:
            raise InputError(f"{source} is no sound EVA state: {error}") from error
        document["convergence"] = {
            layer: [(t, float(value)) for t, value in curve] for layer, curve in document["convergence"].items()
        }
        return cls(**values, **{name: document[name] for name in DOCUMENT_FIELDS})

    def _document(self) -> dict[str, Any]:
        """What the state holds besides tensors, as JSON reads it back.

        Raises:
            InputTypeError: ``meta`` holds something that JSON cannot.
            InputError: A number is not finite.
        """
        content = {"format": FORMAT, "version": VERSION} | {name: getattr(self, name) for name in DOCUMENT_FIELDS}
        for name, value in content.items():
            if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
                raise InputTypeError(f"this EVA state cannot be saved: {name} has keys that are not strings")
        try:
            text = json.dumps(content, default=_plain_number, allow_nan=False)
        except InputTypeError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"this EVA state cannot be saved: {error}") from error
        document: dict[str, Any] = json.loads(text)
        return document


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Tensor and JSON file of a state; a dot inside the stem ("vit.r16") is not a suffix."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def _missing(part: Path, tensor_path: Path, json_path: Path) -> MissingInputError:
    return MissingInputError(f"An EVA state is two files, {tensor_path} and {json_path.name}: {part} is missing")


def _is_same(one: Tensor, other: Tensor | None) -> bool:
    return one is other or (other is not None and one.dtype == other.dtype and torch.equal(one, other))


def _by_layer(name: str, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> dict[str, Tensor]:
    """One field of tensors, in the order in which the state was made; what is shared is one object again."""
    prefix, shared = f"{name}/", document["shared_with"]
    own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    found = {layer: own.get(layer, own.get(shared.get(layer, layer))) for layer in document["total_variance"]}
    by_layer = {layer: value for layer, value in found.items() if value is not None}
    if foreign := sorted(key for key in tensors if key.partition("/")[0] not in _TENSOR_FIELDS):
        raise InputError(f"{shown(foreign[0])} is no tensor of an EVA state")
    if unknown := sorted(own.keys() - by_layer.keys()):
        raise InputError(f"{name} of layer {unknown[0]!r} have no total_variance")
    return by_layer


def _parsed(text: str, path: Path) -> dict[str, Any]:
    """The document in `text`, of this version."""
    document = parse_json(text, path, non_finite=True)  # which check_document names
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise InputError(f"{path} does not describe an EVA state")
    version = document.pop("version", None)
    if type(version) is not int or version not in (1, VERSION):
        raise InputError(f"{path} has version {shown(version)}, this eva_lightning reads versions 1 and {VERSION}")
    return document


def _read_version_1(tensor_path: Path, json_path: Path) -> dict[str, Any]:
    """The document of a state whose tensor file does not hold it."""
    if not json_path.is_file():
        raise _missing(json_path, tensor_path, json_path)
    document = _parsed(read_text(json_path), json_path)
    if document.pop("tensor_checksum", None) != f"sha256:{file_digest(tensor_path)}":
        raise InputError(
            f"{tensor_path} is truncated or does not belong to {json_path.name} (checksum differs): "
            "copy both files again or compute the state again"
        )
    return document


def _check_copy(json_path: Path, document: Mapping[str, Any], tensor_path: Path) -> None:
    """Make sure that the copy for reading says what the state is.

    Raises:
        InputError: It was cut or changed.
    """
    if not json_path.is_file():
        return
    try:
        copy = read_sealed_json(json_path)
    except DamagedFileError as error:
        raise InputError(
            f"{error}; {tensor_path.name} holds the whole state: delete {json_path.name} to load it"
        ) from error
    if copy != {"format": FORMAT, "version": VERSION, **document}:
        if CHECKSUM not in json.loads(json_path.read_text(encoding="utf-8")) and "tensor_checksum" not in copy:
            raise InputError(f"{json_path} was changed; {tensor_path.name} holds the whole state: delete the copy")
        warnings.warn(
            f"{json_path} is of another state than {tensor_path.name}, as an interrupted save leaves it: "
            f"{tensor_path.name} is used",
            stacklevel=3,
        )


def _plain_number(value: object) -> object:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if hasattr(value, "item"):
        return value.item()
    raise InputTypeError(f"{type(value).__name__} cannot be saved in an EVA state")
