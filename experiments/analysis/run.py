"""What ``python -m experiments.analysis`` computes, draws and prints."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import rich.progress
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from eva_lightning import plots
from eva_lightning.adapters.targets import find_targets
from eva_lightning.analysis import (
    RHOS,
    Distance,
    adapter_distances,
    adapter_matrices,
    collect_components,
    component_similarity,
    convergence_curve,
    rank_deltas,
    rank_maps,
    similarity_matrix,
)
from eva_lightning.callback import EVAInitCallback
from eva_lightning.errors import InputError
from eva_lightning.files import only_process, writable_folder, write_json
from eva_lightning.methods import MethodKey
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.ours import claim
from eva_lightning.streaming import compute_eva_state
from eva_lightning.vision.digits import DigitsClassifier, DigitsDataModule, load_digits_split
from experiments.analysis.settings import BATCH_SIZES, Settings
from experiments.comparisons.digits_run import (
    CLASSES,
    pretrain_once,
    pretrained_folder,
    quick_trainer,
    starting_model,
    weights_in,
)
from experiments.runner.lightning_runs import Divergence

# uniform ranks, so that both methods have matrices of one shape
METHODS = (MethodKey.parse("lora"), MethodKey.parse("eva:1"))
MAP_RANK = 16  # the paper's, in Figures 13 and 14

Numbers = dict[str, Any]
Figures = dict[str, Figure]


@dataclass(frozen=True)
class Streamed:
    """The pre-trained model, the layers that EVA adapts, and images ``(N, 1, 8, 8)`` of the new digits."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    images: torch.Tensor

    @classmethod
    def load(cls, weights: Path, count: int) -> Streamed:
        """The first `count` of all images in one fixed random order."""
        images = load_digits_split(CLASSES, tune_share=0.0, test_share=0.0).train.tensors[0]
        if count > len(images):
            raise InputError(f"images must be at most {len(images)}, got {count}", setting="images")
        model = starting_model(weights)
        layers = {name: model.get_submodule(name) for name in find_targets(model)[0]}
        return cls(model, layers, images[_order(len(images), 0)[:count]])

    def components(self, images: torch.Tensor, batch_size: int, k: int) -> dict[str, torch.Tensor]:
        """Of all layers, after all `images`."""
        return collect_components(self.model, images.split(batch_size), self.layers, k)


def analyse(settings: Settings) -> Numbers:
    """Do all analyses, write figures and numbers, and print what they say."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    output = writable_folder(settings.output)
    claim(output, ("analysis.json", "fig*.png", "table6_*.png"), "choose another --output")
    with only_process(output / ".lock", f"another analysis is at work in {output}"):
        return _analyse(settings, output)


def _analyse(settings: Settings, output: Path) -> Numbers:
    folder = pretrained_folder(output, settings.pretrain_epochs)
    pretrained = pretrain_once(folder)
    weights = weights_in(folder)
    numbers: Numbers = {
        "model": "ViT of 0.45 M parameters, pre-trained on the digits 0-4",
        "data": f"{settings.images} images of the digits 5-9",
        "pretraining_accuracy": pretrained["accuracy"],
    }
    figures: Figures = {}
    streamed = Streamed.load(weights, settings.images)
    for part in (_convergence, _batch_sizes, _batch_orders, _ranks):
        part(settings, streamed, numbers, figures)
    _distances(settings, weights, numbers, figures)
    for name, figure in figures.items():
        plots.save(figure, output / f"{name}.png", dpi=120)
    write_json(output / "analysis.json", numbers)
    print(_report(numbers, output))
    return numbers


def _order(n: int, seed: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _watched(values: Iterable[Any], what: str) -> Iterable[Any]:
    return rich.progress.track(list(values), what, console=Console(stderr=True), transient=True)


def _convergence(settings: Settings, streamed: Streamed, numbers: Numbers, figures: Figures) -> None:
    """Figure 11: the same images in minibatches of several sizes."""
    curves = {
        size: convergence_curve(streamed.model, streamed.images.split(size), streamed.layers, settings.components)
        for size in _watched(BATCH_SIZES, "convergence by batch size")
    }
    total = curves[BATCH_SIZES[0]][0].total
    for name, attribute, xlabel in (
        ("fig11_convergence_minibatches", "n_batches", "minibatches"),
        ("fig11_convergence_images", "n_samples", "images"),
        ("fig11_convergence_seconds", "seconds", "seconds, forward passes included"),
    ):
        points = {size: [(getattr(p, attribute), p.converged) for p in curve] for size, curve in curves.items()}
        title = "Components that kept their direction (|cos| ≥ 0.99) in the last update"
        figures[name] = plots.convergence_counts(points, total, xlabel, title=title)
    numbers["convergence"] = {str(size): [vars(point) for point in curve] for size, curve in curves.items()}


def _batch_sizes(settings: Settings, streamed: Streamed, numbers: Numbers, figures: Figures) -> None:
    """Figure 5."""
    components = {
        size: streamed.components(streamed.images, size, settings.components)
        for size in _watched(BATCH_SIZES, "components by batch size")
    }
    matrix = similarity_matrix(components)
    figures["fig5_batch_sizes"] = plots.similarity_matrix(matrix.numpy(), BATCH_SIZES, title="Components by batch size")
    numbers["similarity_across_batch_sizes"] = matrix.tolist()


def _batch_orders(settings: Settings, streamed: Streamed, numbers: Numbers, figures: Figures) -> None:
    """Figure 12: as many images as the stream needs to converge, not all there are: an order must be able to matter."""
    runs = []
    for seed in _watched(range(settings.orders), "components by batch order"):
        shown = streamed.images[_order(settings.images, seed)][: settings.images // 2]
        runs.append(streamed.components(shown, 4, settings.components))
    similarity = component_similarity(runs)
    cosine, overlap = similarity.cosine.tolist(), similarity.overlap.tolist()
    figures["fig12_batch_orders"] = plots.component_similarity(
        {"|cos| of the j-th components": cosine, "overlap of the spans of the first j": overlap},
        ylabel="mean over layers and pairs of orders",
        title=f"{settings.orders} random orders, batch size 4, half of the images each",
    )
    numbers["similarity_across_batch_orders"] = {"cosine": cosine, "overlap": overlap}


def _ranks(settings: Settings, streamed: Streamed, numbers: Numbers, figures: Figures) -> None:
    """Figures 13 and 14: one state with r * 3 components serves every rho."""
    k = round(MAP_RANK * max(RHOS))
    state = compute_eva_state(streamed.model, lambda: streamed.images.split(16), streamed.layers, k)
    maps = rank_maps(state, MAP_RANK)
    deltas = rank_deltas(maps)
    figures["fig13_ranks"] = plots.rank_maps(maps, MAP_RANK, title=f"Ranks by ρ, r = {MAP_RANK}")
    title = "Changes from the next smaller ρ"
    figures["fig14_rank_changes"] = plots.rank_maps(deltas, 0, "change of rank", title=title)
    numbers["ranks"] = {f"{rho:g}": ranks for rho, ranks in maps.items()}
    numbers["rank_changes"] = {f"{rho:g}": sum(abs(d) for d in delta.values()) for rho, delta in deltas.items()}


def _distances(settings: Settings, weights: Path, numbers: Numbers, figures: Figures) -> None:
    """Tables 5 and 6: A before and after training, by LoRA and by EVA."""
    own: dict[str, list[Mapping[str, Distance]]] = {key.entry.label: [] for key in METHODS}
    between: list[Mapping[str, Distance]] = []
    for seed in _watched(range(settings.seeds), "distances between adapters"):
        finals = []
        for key in METHODS:
            first, last, diverged = _train(key, weights, settings, seed)
            numbers.update(diverged)
            own[key.entry.label].append(adapter_distances(first, last))
            finals.append(last)
        between.append(adapter_distances(*finals))
    table6 = {method: _by_kind(runs) for method, runs in own.items()}
    table5 = _by_kind(between)
    numbers["table5_final_lora_against_final_eva"] = table5
    numbers["table6_initial_against_final"] = table6
    title = f"A matrices, learning rate {settings.lr:g}, mean of {settings.seeds} seeds"
    for name, key_, label in (
        ("table6_spectral_norm", "spectral_norm", "spectral norm of the difference"),
        ("table6_cosine", "cosine", "mean cosine of rows"),
    ):
        bars = {f"{method}, start to end": {kind: v[key_] for kind, v in row.items()} for method, row in table6.items()}
        bars["LoRA to EVA, both at the end"] = {kind: v[key_] for kind, v in table5.items()}
        figures[name] = plots.grouped_bars(bars, label, title=title)


class _Start(L.Callback):
    """The A matrices at the first training step."""

    def __init__(self) -> None:
        self.matrices: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.matrices = adapter_matrices(pl_module)


def _train(
    key: MethodKey, weights: Path, settings: Settings, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, str]]:
    """A matrices at the first training step and after the last epoch, and whether training diverged."""
    L.seed_everything(seed, verbose=False)
    data = DigitsDataModule(CLASSES, n_labels=200, batch_size=32, seed=seed)
    module = DigitsClassifier(starting_model(weights), settings.lr)
    start, divergence = _Start(), Divergence()
    callbacks = apply_method(key.method, module, AdapterOptions(rank=settings.r, rho=1.0, bias="all", seed=seed))
    for callback in callbacks:
        if isinstance(callback, EVAInitCallback):
            callback.verbose = False
    try:
        trainer = quick_trainer(settings.epochs, [*callbacks, start, divergence])
        trainer.fit(module, data)
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from error
    return start.matrices, adapter_matrices(module), divergence.metrics(trainer, module)


def _by_kind(runs: Sequence[Mapping[str, Distance]]) -> dict[str, dict[str, float]]:
    """Means over seeds and blocks, per kind of layer."""
    frame = pd.DataFrame(
        {"kind": plots.split_layer_name(name)[1], **vars(distance)} for run in runs for name, distance in run.items()
    )
    means: dict[str, dict[str, float]] = frame.groupby("kind", sort=False).mean().to_dict("index")
    return means


def _report(numbers: Mapping[str, Any], output: Path) -> str:
    lines = []
    for size, curve in numbers["convergence"].items():
        last = curve[-1]
        half = next((p for p in curve if p["converged"] >= last["total"] / 2), None)
        when = "never" if half is None else f"after {half['n_batches']} minibatches ({half['n_samples']} images)"
        lines.append(
            f"batch size {size}: half of the {last['total']} components converged {when}, "
            f"{last['converged']} at the end of {last['n_samples']} images"
        )
    orders = numbers["similarity_across_batch_orders"]
    lines.append(
        f"batch orders: mean |cos| {orders['cosine'][0]:.3f} for the first component, "
        f"{statistics.mean(orders['cosine']):.3f} over all; the spans overlap by {orders['overlap'][-1]:.3f}"
    )
    smallest = min(value for row in numbers["similarity_across_batch_sizes"] for value in row)
    lines.append(f"batch sizes: smallest mean |cos| {smallest:.3f}")
    changes = ", ".join(f"{rho}: {n}" for rho, n in numbers["rank_changes"].items())
    lines.append(f"ranks moved, by rho: {changes}")
    for method, kinds in numbers["table6_initial_against_final"].items():
        norm = statistics.mean(v["spectral_norm"] for v in kinds.values())
        cosine = statistics.mean(v["cosine"] for v in kinds.values())
        lines.append(f"{method}: initial against final A: spectral norm {norm:.2f}, cosine {cosine:.2f}")
    lines.append("(rows of A start at length 1 with EVA and about 0.58 with LoRA, which alone favours EVA's cosine)")
    lines.append(f"figures and analysis.json in {output}")
    return "\n".join(lines)
