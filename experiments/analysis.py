"""The paper's analyses of EVA's initialisation, on a small model that needs no download.

    python -m experiments.analysis --output runs/analysis

pre-trains the Vision Transformer of the demo on the digits 0-4 and looks at its adaptation to the digits 5-9:
convergence for batch sizes 4 to 32 (Figure 11), similarity of components across batch orders and batch sizes (Figures
12 and 5), ranks for rho from 1 to 3 (Figures 13 and 14), and distances between adapters before and after training
(Tables 5 and 6). Writes one PNG each and ``analysis.json`` with the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eva_lightning.errors import InputError

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from eva_lightning.analysis import Distance

BATCH_SIZES = (4, 8, 16, 32)
CLASSES = (5, 6, 7, 8, 9)
METHODS = ("LoRA", "EVA")
MAP_RANK = 16  # the paper's, in Figures 13 and 14


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line options; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m experiments.analysis", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/analysis"), help="folder (default %(default)s)")
    parser.add_argument("--r", type=int, default=4, help="rank per layer, Tables 5 and 6 (default %(default)s)")
    parser.add_argument("--components", type=int, default=16, help="per layer, Figures 5, 11, 12 (default %(default)s)")
    parser.add_argument("--orders", type=int, default=10, help="random batch orders, Figure 12 (default %(default)s)")
    parser.add_argument("--images", type=int, default=448, help="images to stream (default %(default)s)")
    # one rate for both methods, as in the paper: a larger one moves A further whatever its start
    parser.add_argument("--lr", type=float, default=1e-2, help="of both methods, Tables 5 and 6 (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning, Tables 5, 6 (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per method, Tables 5 and 6 (default %(default)s)")
    parser.add_argument("--pretrain-epochs", type=int, default=30, help="default %(default)s")
    options = parser.parse_args(args)
    least = {"r": 1, "components": 1, "orders": 2, "images": max(BATCH_SIZES), "epochs": 1, "seeds": 1}
    for name, smallest in {**least, "pretrain_epochs": 1}.items():
        if getattr(options, name) < smallest:
            raise InputError(f"--{name.replace('_', '-')} must be at least {smallest}, got {getattr(options, name)}")
    if not options.lr > 0:
        raise InputError(f"--lr must be above 0, got {options.lr}")
    return options


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line `args` (``sys.argv`` for None) and return what ``analysis.json`` holds.

    Raises:
        InputError: An option is out of range; the message is one sentence.
    """
    options = parse_args(args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("pre-training", total=options.pretrain_epochs)
        numbers, figures = _analyse(options, lambda text, total: progress.update(
            task, description=text, completed=0, total=total), lambda: progress.advance(task))  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(options.output / f"{name}.png", dpi=120)
    (options.output / "analysis.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(_report(numbers, options.output))
    return numbers


Begin = Callable[[str, int], None]
Advance = Callable[[], None]


def _analyse(options: argparse.Namespace, begin: Begin, advance: Advance) -> tuple[dict[str, Any], dict[str, Figure]]:
    from experiments.demo_runs import Pretraining, load_pretrained, pretrain

    recipe = Pretraining(epochs=options.pretrain_epochs)
    cache = options.output / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    start = load_pretrained(recipe, cache) or pretrain(recipe, cache, lambda *_: advance())
    numbers: dict[str, Any] = {
        "model": "ViT of 0.45 M parameters, pre-trained on the digits 0-4",
        "data": f"{options.images} images of the digits 5-9",
        "pretraining_accuracy": start.accuracy,
    }
    figures: dict[str, Figure] = {}
    for part in (_streams, _ranks, _distances):
        part(options, start.path, begin, advance, numbers, figures)
    return numbers, figures


def _images(count: int) -> torch.Tensor:
    """The first `count` of all images of the new digits in one fixed random order."""
    import torch

    from eva_lightning.vision.digits import load_digits_split

    images = load_digits_split(CLASSES, tune_share=0.0, test_share=0.0).train.tensors[0]
    if count > len(images):
        raise InputError(f"--images must be at most {len(images)}, got {count}")
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def _model(weights: Path) -> tuple[Any, dict[str, Any]]:
    """The pre-trained model and the layers EVA adapts."""
    from eva_lightning.adapters.targets import find_targets
    from experiments.demo_runs import _starting_model

    model = _starting_model(weights, len(CLASSES), 5)
    targets, _ = find_targets(model)
    return model, {name: model.get_submodule(name) for name in targets}


def _streams(
    options: argparse.Namespace,
    weights: Path,
    begin: Begin,
    advance: Advance,
    numbers: dict[str, Any],
    figures: dict[str, Figure],
) -> None:
    """Figures 11, 5 and 12: the same images in minibatches of several sizes, and in several orders."""
    import torch

    from eva_lightning import plots
    from eva_lightning.analysis import collect_components, component_similarity, convergence_curve, similarity_matrix

    model, layers = _model(weights)
    images = _images(options.images)
    k = options.components
    begin("convergence by batch size", len(BATCH_SIZES))
    curves = {}
    for size in BATCH_SIZES:
        curves[size] = convergence_curve(model, images.split(size), layers, k)
        advance()
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

    begin("components by batch size", len(BATCH_SIZES))
    by_size = {}
    for size in BATCH_SIZES:
        by_size[size] = collect_components(model, images.split(size), layers, k)
        advance()
    matrix = similarity_matrix(by_size)
    figures["fig5_batch_sizes"] = plots.similarity_matrix(matrix.numpy(), BATCH_SIZES, title="Components by batch size")
    numbers["similarity_across_batch_sizes"] = matrix.tolist()

    begin("components by batch order", options.orders)
    # as many images as the stream needs to converge, not all there are: an order must be able to matter
    runs = []
    for seed in range(options.orders):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        runs.append(collect_components(model, images[order][: len(images) // 2].split(4), layers, k))
        advance()
    similarity = component_similarity(runs)
    figures["fig12_batch_orders"] = plots.component_similarity(
        {"|cos| of the j-th components": similarity.cosine.tolist(),
         "overlap of the spans of the first j": similarity.overlap.tolist()},
        ylabel="mean over layers and pairs of orders",
        title=f"{options.orders} random orders, batch size 4, half of the images each",
    )  # fmt: skip
    numbers["similarity_across_batch_orders"] = {
        "cosine": similarity.cosine.tolist(),
        "overlap": similarity.overlap.tolist(),
    }


def _ranks(
    options: argparse.Namespace,
    weights: Path,
    begin: Begin,
    advance: Advance,
    numbers: dict[str, Any],
    figures: dict[str, Figure],
) -> None:
    """Figures 13 and 14: one state with r * 3 components serves every rho."""
    from eva_lightning import StreamingOptions, compute_eva_state, plots
    from eva_lightning.analysis import RHOS, rank_deltas, rank_maps

    begin("ranks by rho", 1)
    model, layers = _model(weights)
    images = _images(options.images)
    stream = StreamingOptions(max_batches=64)
    state = compute_eva_state(model, lambda: images.split(16), layers, round(MAP_RANK * max(RHOS)), stream)
    advance()
    maps = rank_maps(state, MAP_RANK)
    deltas = rank_deltas(maps)
    figures["fig13_ranks"] = plots.rank_maps(maps, MAP_RANK, title=f"Ranks by ρ, r = {MAP_RANK}")
    figures["fig14_rank_changes"] = plots.rank_maps(
        deltas, 0, "change of rank", title="Changes from the next smaller ρ"
    )
    numbers["ranks"] = {f"{rho:g}": ranks for rho, ranks in maps.items()}
    numbers["rank_changes"] = {f"{rho:g}": sum(abs(d) for d in delta.values()) for rho, delta in deltas.items()}


def _distances(
    options: argparse.Namespace,
    weights: Path,
    begin: Begin,
    advance: Advance,
    numbers: dict[str, Any],
    figures: dict[str, Figure],
) -> None:
    """Tables 5 and 6: A before and after training, by LoRA and by EVA with uniform ranks."""
    from eva_lightning import plots
    from eva_lightning.analysis import adapter_distances

    begin("distances between adapters", 2 * options.seeds)
    own: dict[str, list[Mapping[str, Distance]]] = {method: [] for method in METHODS}
    between: list[Mapping[str, Distance]] = []
    for seed in range(options.seeds):
        finals = {}
        for method in METHODS:
            first, finals[method] = _train(method, weights, options, seed)
            own[method].append(adapter_distances(first, finals[method]))
            advance()
        between.append(adapter_distances(finals["LoRA"], finals["EVA"]))
    table6 = {method: _by_kind(runs) for method, runs in own.items()}
    table5 = _by_kind(between)
    numbers["table5_final_lora_against_final_eva"] = table5
    numbers["table6_initial_against_final"] = table6
    title = f"A matrices, learning rate {options.lr:g}, mean of {options.seeds} seeds"
    for name, key, label in (
        ("table6_spectral_norm", "spectral_norm", "spectral norm of the difference"),
        ("table6_cosine", "cosine", "mean cosine of rows"),
    ):
        bars = {f"{method}, start to end": {kind: v[key] for kind, v in row.items()} for method, row in table6.items()}
        bars["LoRA to EVA, both at the end"] = {kind: v[key] for kind, v in table5.items()}
        figures[name] = plots.grouped_bars(bars, label, title=title)


def _train(
    method: str, weights: Path, options: argparse.Namespace, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A matrices at the first training step and after the last epoch."""
    import lightning as L

    from eva_lightning.adapters import inject
    from eva_lightning.analysis import adapter_matrices
    from eva_lightning.callback import EVAInitCallback
    from eva_lightning.streaming_options import StreamingOptions
    from eva_lightning.vision.digits import DigitsClassifier, DigitsDataModule
    from experiments.demo_runs import _fit, _starting_model, _trainer, quiet

    first: dict[str, torch.Tensor] = {}

    class Start(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            first.update(adapter_matrices(pl_module))

    L.seed_everything(seed, verbose=False)
    data = DigitsDataModule(CLASSES, n_labels=200, batch_size=32, seed=seed)
    module = DigitsClassifier(_starting_model(weights, len(CLASSES), 5), options.lr)
    callbacks: list[L.Callback] = [Start()]
    with quiet():
        if method == "EVA":
            # uniform ranks, so that both methods have matrices of one shape
            streaming = StreamingOptions(seed=seed)
            eva = EVAInitCallback(rho=1, r=options.r, lora={"bias": "all"}, streaming=streaming, verbose=False)
            callbacks.insert(0, eva)
        else:
            inject(module, r=options.r, alpha=1.0, bias="all")
        _fit(_trainer(options.epochs, callbacks), module, data)
    return first, adapter_matrices(module)


def _by_kind(runs: Sequence[Mapping[str, Distance]]) -> dict[str, dict[str, float]]:
    """Means over seeds and blocks, per kind of layer."""
    from eva_lightning.plots import split_layer_name

    collected: dict[str, list[Distance]] = {}
    for run in runs:
        for name, distance in run.items():
            collected.setdefault(split_layer_name(name)[1], []).append(distance)
    return {
        kind: {
            "spectral_norm": statistics.mean(d.spectral_norm for d in values),
            "cosine": statistics.mean(d.cosine for d in values),
        }
        for kind, values in collected.items()
    }


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
    matrix = numbers["similarity_across_batch_sizes"]
    smallest = min(value for row in matrix for value in row)
    lines.append(f"batch sizes: smallest mean |cos| {smallest:.3f}")
    changes = numbers["rank_changes"]
    lines.append("ranks moved, by rho: " + ", ".join(f"{rho}: {n}" for rho, n in changes.items()))
    for method, kinds in numbers["table6_initial_against_final"].items():
        norm = statistics.mean(v["spectral_norm"] for v in kinds.values())
        cosine = statistics.mean(v["cosine"] for v in kinds.values())
        lines.append(f"{method}: initial against final A: spectral norm {norm:.2f}, cosine {cosine:.2f}")
    lines.append("(rows of A start at length 1 with EVA and about 0.58 with LoRA, which alone favours EVA's cosine)")
    lines.append(f"figures and analysis.json in {output}")
    return "\n".join(lines)


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    try:
        main(args)
    except (FileNotFoundError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the pre-trained model, if finished, is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
