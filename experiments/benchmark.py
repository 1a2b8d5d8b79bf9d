"""What an EVA initialisation costs and how good it is, against the plain forward, PEFT and the exact SVD, in one run.

    python -m experiments.benchmark init --model vit_small_patch16_224 --batches 16 --json
    python -m experiments.benchmark init --models tiny,small,base --images data/vtab-1k/caltech101/images
    python -m experiments.benchmark resize --model vit_giant_patch14_dinov2

``init`` times, interleaved and repeated: the plain forward of the same minibatches on the Trainer's path; our
callback's whole ``on_fit_start`` in a real ``Trainer.fit`` (streaming with hooks, SVD, ranks, resize, optimizer
rebuild); PEFT's ``initialize_lora_eva_weights``. LoRA layers exist before either starts. Captured variance is measured
against dense eigenvalues of the full covariances of all tokens, of the minibatches a method streamed and of held-out
ones that none did. ``resize`` times ranks, adapter resize and optimizer rebuild alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eva_lightning.errors import InputError

if TYPE_CHECKING:
    import torch

    from experiments.benchmark_init import Outcome, Runner, Timing
    from experiments.benchmark_setup import Images

SIZES = {size: f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-mixed")
ALIASES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # Lightning's


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line options; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    init = commands.add_parser("init", help="whole initialisation against plain forward, PEFT and exact SVD")
    resize = commands.add_parser("resize", help="ranks, adapter resize and optimizer rebuild alone")
    for command, default in ((init, "vit_small_patch16_224"), (resize, "vit_giant_patch14_dinov2")):
        add = command.add_argument
        add("--model", help=f"timm name, or dinov2_s14 ... dinov2_g14 (default {default})")
        add("--models", help=f"several, with commas; {', '.join(SIZES)} stand for vit_..._patch16_224")
        add("--r", type=int, default=16, help="mean rank per layer (default %(default)s)")
        add("--rho", type=float, default=2.0, help="largest rank over mean rank (default %(default)s)")
        add("--image-size", type=int, default=224, help="in pixels (default %(default)s)")
        add("--precision", default="32-true", help="the Trainer's: 32, bf16, 16, bf16-true (default %(default)s)")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto")
        add("--repeats", type=int, default=3, help="timed runs of each (default %(default)s)")
        add("--seed", type=int, default=0)
        add("--json", action="store_true", help="print one JSON document instead of a table")
        add("--output", type=Path, help="also write the JSON document to this file")
        command.set_defaults(default_model=default)
    add = init.add_argument
    add("--batches", type=int, default=16, help="most minibatches of ours (default %(default)s)")
    add("--peft-batches", type=int, help="most minibatches of PEFT; 0: without PEFT (default: as --batches)")
    add("--heldout-batches", type=int, default=4, help="for held-out variance; 0: none (default %(default)s)")
    add("--batch-size", type=int, default=16, help="images per minibatch (default %(default)s)")
    add("--engine", help="engines to compare, with commas (default: the callback's)")
    add("--stopping", help="the callback's stopping rule (default: the callback's)")
    add("--tokens-per-sample", help="a number or 'all' (default: the callback's)")
    add("--tau", type=float, default=0.99, help="convergence threshold of both (default %(default)s)")
    add("--images", type=Path, help="folder with image files (default: images made from what scikit-learn ships)")
    add("--weights", type=Path, help="weight file (default: random weights with decaying spectra)")
    add("--peft-repeats", type=int, default=1, help="timed runs of PEFT (default %(default)s)")
    add("--no-reference", action="store_true", help="skip the exact SVD and captured variances")
    add("--no-memory", action="store_true", help="skip the peak memory")
    add("--profile", action="store_true", help="also list where our time goes, from one more run")
    options = parser.parse_args(args)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.model and options.models:
        raise InputError(f"--model {options.model} and --models {options.models} exclude each other")
    options.precision = ALIASES.get(options.precision, options.precision)
    if options.precision not in PRECISIONS:
        raise InputError(f"--precision must be one of {', '.join((*ALIASES, *PRECISIONS))}, got {options.precision!r}")
    named = (options.models or options.model or options.default_model).split(",")
    options.model_names = [SIZES.get(name.strip(), name.strip()) for name in named]
    least = {"repeats": 1, "r": 1, "image_size": 1}
    if options.command == "init":
        least |= {"batches": 1, "heldout_batches": 0, "batch_size": 1, "peft_repeats": 1, "peft_batches": 0}
        if options.peft_batches is None:
            options.peft_batches = options.batches
        options.callback_options = _callback_options(options)
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise InputError(f"--{name.replace('_', '-')} must be at least {smallest}, got {getattr(options, name)}")
    if not options.rho >= 1:
        raise InputError(f"--rho must be at least 1, got {options.rho}")


def _callback_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the callback that were given; what was not is left to the callback's defaults."""
    given: dict[str, Any] = {"tau": options.tau}
    if options.stopping is not None:
        given["stopping"] = options.stopping
    tokens = options.tokens_per_sample
    if tokens is not None:
        if tokens != "all" and not (tokens.isdigit() and int(tokens) > 0):
            raise InputError(f"--tokens-per-sample must be a positive number or 'all', got {tokens!r}")
        given["tokens_per_sample"] = None if tokens == "all" else int(tokens)
    return given


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line `args` (``sys.argv`` for None) and return the JSON document.

    Raises:
        MissingInputError, InputError: An argument is wrong; the message is one sentence.
    """
    options = parse_args(args)
    from experiments.benchmark_setup import describe_machine

    device = _device(options.device)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    document: dict[str, Any] = {"command": options.command, "machine": describe_machine(device)}
    hidden = ("default_model", "model", "models", "output", "json", "images", "weights")
    settings = {key: value for key, value in vars(options).items() if key not in hidden}
    document["settings"] = settings
    if options.command == "init":
        settings["images"] = options.images.name if options.images else None
        settings["weights"] = options.weights.name if options.weights else "random, power-law spectra"
    with Progress(*columns, console=console, transient=True) as progress:
        for name in options.model_names:
            task = progress.add_task(name, total=None)
            steps = Steps(progress, task, name)
            if options.command == "resize":
                from experiments.benchmark_resize import measure_resize

                results.append(measure_resize(name, device, options, steps))
            else:
                results.append(measure_init(name, device, options, steps))
            progress.remove_task(task)
    document["models"] = results
    if hasattr(os, "getloadavg"):
        document["machine"]["load_average_after"] = list(os.getloadavg())
    text = json.dumps(document, indent=1)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        from experiments.benchmark_tables import print_tables

        print_tables(document)
    return document


class Steps:
    """The progress bar of one model."""

    def __init__(self, progress: Progress, task: Any, model: str) -> None:
        self._progress, self._task, self._model = progress, task, model
        self._begun = False

    def total(self, n: int) -> None:
        """How many steps there will be."""
        self._progress.update(self._task, total=n)

    def begin(self, what: str) -> None:
        """The step before is done and `what` starts."""
        text = f"{self._model}: {what}"
        self._progress.update(self._task, description=text, advance=int(self._begun))
        self._begun = True
        if not self._progress.console.is_terminal:
            # a log file shows no bar
            print(text, file=sys.stderr, flush=True)


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def measure_init(name: str, device: torch.device, options: argparse.Namespace, steps: Steps) -> dict[str, Any]:
    """Everything ``init`` measures on one model."""
    from eva_lightning.adapters.targets import find_targets
    from experiments.benchmark_init import Runner
    from experiments.benchmark_setup import build_classifier, make_images
    from experiments.benchmark_setup import describe_machine as machine

    engines = options.engine.split(",") if options.engine else [None]
    with_peft = options.peft_batches > 0
    reference = not options.no_reference
    n_methods = len(engines) + with_peft
    steps.total(
        3 + options.repeats * (1 + len(engines)) + with_peft * options.peft_repeats + 2 * reference
        + (not options.no_memory) * n_methods + options.profile * len(engines)
    )  # fmt: skip
    steps.begin("building model and images")
    classifier = build_classifier(name, options.image_size, options.weights, options.seed)
    targets, _ = find_targets(classifier, None, None, "auto")
    pool = max(options.batches, min(options.peft_batches, 64))
    n_all = pool + options.heldout_batches
    images = make_images(options.images, n_all, options.batch_size, options.image_size, options.seed)
    runner = Runner(classifier, images.batches[:pool], device, options.precision, options.r, options.rho)
    callback = {(engine or "default"): {**options.callback_options, "engine": engine} for engine in engines}
    for arguments in callback.values():
        if arguments["engine"] is None:
            del arguments["engine"]

    steps.begin("warming up")
    runner.forward(1)
    state_bytes = {
        engine: runner.ours(2, watch_engines=True, **arguments).state_bytes for engine, arguments in callback.items()
    }
    forwards: list[list[Timing]] = []
    ours: dict[str, list[Outcome]] = {engine: [] for engine in callback}
    peft: list[Outcome] = []
    n_forward = options.batches
    for repeat in range(options.repeats + 1):
        steps.begin(f"plain forward {repeat + 1}")
        forwards.append(runner.forward(n_forward))
        if repeat == options.repeats:
            break
        for engine, arguments in callback.items():
            steps.begin(f"ours ({engine}) {repeat + 1}")
            ours[engine].append(runner.ours(options.batches, **arguments))
        n_forward = max(runs[0].n_batches for runs in ours.values())
        if with_peft and repeat < options.peft_repeats:
            steps.begin(f"PEFT {repeat + 1} (up to {options.peft_batches} minibatches)")
            peft.append(runner.peft(options.peft_batches, targets, options.tau))

    result: dict[str, Any] = {
        "model": name,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "layers": len(targets),
        "images": images.source,
        "load_average": machine(device)["load_average"],
        "forward": {
            "n_batches": [len(run) for run in forwards],
            "wall": [[t.wall for t in run] for run in forwards],
            "cpu": [[t.cpu for t in run] for run in forwards],
        },
        "methods": [],
    }
    for engine, runs in ours.items():
        row = _row(f"ours ({engine})", runs, forwards)
        predicted, real = state_bytes[engine] or (0, 0)
        row |= {"state_bytes_predicted": predicted, "state_bytes": real}
        row["streaming_seconds"] = [run.streaming_seconds for run in runs]
        if peft:
            row["peft_over_ours"] = statistics.median(p.timing.wall for p in peft) / row["seconds"]["median"]
            row["peft_over_ours_cpu"] = statistics.median(p.timing.cpu for p in peft) / row["cpu_seconds"]["median"]
        result["methods"].append(row)
    if peft:
        result["methods"].append(_row("PEFT", peft, forwards))
    outcomes = {f"ours ({engine})": runs[0] for engine, runs in ours.items()} | ({"PEFT": peft[0]} if peft else {})
    if reference:
        result |= _accuracy(runner, targets, outcomes, images, pool, steps, result["methods"])
    if not options.no_memory:
        _memory(runner, targets, callback, outcomes, options, steps, result)
    if options.profile:
        from experiments.benchmark_init import profile_ours, ratio_within

        result["profile"], result["within_profile"] = {}, {}
        for engine, arguments in callback.items():
            steps.begin(f"profile of ours ({engine})")
            result["profile"][engine] = profile_ours(lambda a=arguments: runner.ours(options.batches, **a))  # type: ignore[misc]
            result["within_profile"][engine] = ratio_within(result["profile"][engine])
    return result


def _row(name: str, runs: Sequence[Outcome], forwards: Sequence[Sequence[Timing]]) -> dict[str, Any]:
    """Times of one method, each over the mean of the plain forwards right before and right after it."""
    from experiments.benchmark_reference import summarise

    row: dict[str, Any] = {
        "name": name,
        "n_batches": runs[0].n_batches,
        "n_forwards": runs[0].n_forwards,
        "stopped_by_itself": runs[0].stopped,
        "bit_identical": len({run.fingerprint for run in runs}) == 1 if len(runs) > 1 else None,
        "fingerprint": runs[0].fingerprint,
        "wall": [run.timing.wall for run in runs],
        "cpu": [run.timing.cpu for run in runs],
        "seconds": summarise(run.timing.wall for run in runs),
        "cpu_seconds": summarise(run.timing.cpu for run in runs),
    }
    for clock, key in (("wall", "over_forward"), ("cpu", "over_forward_cpu")):
        ratios = []
        for i, run in enumerate(runs):
            around = [_forward_time(forwards[j], run.n_batches, clock) for j in (i, i + 1) if j < len(forwards)]
            ratios.append(getattr(run.timing, clock) / statistics.mean(around))
        row[key] = summarise(ratios)
    return row


def _forward_time(run: Sequence[Timing], n_batches: int, clock: str) -> float:
    """Time of the first `n_batches`, extrapolated at the mean rate where the plain forward ran fewer (PEFT's cap)."""
    if n_batches <= len(run):
        return float(getattr(run[n_batches - 1], clock))
    return float(getattr(run[-1], clock)) * n_batches / len(run)


def _accuracy(
    runner: Runner,
    targets: Sequence[str],
    outcomes: Mapping[str, Outcome],
    images: Images,
    pool: int,
    steps: Steps,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Add captured variances to `rows`; returns the spectra's decay."""
    import copy

    import torch

    from experiments.benchmark_init import _autocast
    from experiments.benchmark_reference import Covariances, summarise

    classifier = copy.deepcopy(runner.classifier).to(runner.device).eval()
    if runner.precision == "bf16-true":
        classifier.to(torch.bfloat16)
    dtype = next(classifier.parameters()).dtype
    layers = {name: classifier.get_submodule(name) for name in targets}

    def add(covariances: Covariances, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        with _autocast(runner.device, runner.precision):
            covariances.add(lambda: classifier(batch[0].to(runner.device, dtype)))

    def note(covariances: Covariances, names: Sequence[str], key: str) -> float:
        values, share = covariances.captured({name: outcomes[name].components for name in names})
        for row in rows:
            if row["name"] in values:
                per_layer = values[row["name"]]
                row[key] = {**summarise(per_layer.values()), "weakest_layer": min(per_layer, key=per_layer.__getitem__)}
                row[f"{key}_per_layer"] = per_layer
        return share

    steps.begin("exact SVD of the streamed minibatches")
    covariances, share = Covariances(layers), 0.0
    due: dict[int, list[str]] = {}
    for name, outcome in outcomes.items():
        due.setdefault(outcome.n_batches, []).append(name)
    for n in range(1, max(due) + 1):
        add(covariances, images.batches[(n - 1) % pool])
        if n in due:
            share = note(covariances, due[n], "captured")
    del covariances
    steps.begin("exact SVD of the held-out minibatches")
    if len(images.batches) > pool:
        heldout = Covariances(layers)
        for batch in images.batches[pool:]:
            add(heldout, batch)
        note(heldout, list(outcomes), "heldout")
    return {"variance_in_top_32": share}


def _memory(
    runner: Runner,
    targets: Sequence[str],
    callback: Mapping[str, dict[str, Any]],
    outcomes: Mapping[str, Outcome],
    options: argparse.Namespace,
    steps: Steps,
    result: dict[str, Any],
) -> None:
    """Add peak memory over the plain forward; a few minibatches show the peak."""
    from experiments.benchmark_memory import CPU_METHOD, CUDA_METHOD, peak_over_forward

    result["memory_method"] = CUDA_METHOD if runner.device.type == "cuda" else CPU_METHOD
    few = min(4, options.batches)
    for row in result["methods"]:
        steps.begin(f"memory of {row['name']}")
        if row["name"] == "PEFT":
            row["peak_bytes"] = peak_over_forward(
                runner, "peft", few, max_batches=min(few, options.peft_batches), targets=list(targets)
            )
        else:
            engine = row["name"].removeprefix("ours (").removesuffix(")")
            row["peak_bytes"] = peak_over_forward(runner, "ours", few, max_batches=few, **callback[engine])


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    try:
        main(args)
    except (FileNotFoundError, ValueError, TypeError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
