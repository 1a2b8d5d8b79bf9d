"""What ``python -m experiments.analysis`` does: each part in a run folder of its own, then figures and numbers."""

from __future__ import annotations

import logging
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from eva_lightning import plots
from eva_lightning.files import only_process, replacing, writable_folder, write_json
from eva_lightning.ours import claim
from eva_lightning.tensor_files import are_whole, write_tensors
from experiments.analysis import figures, parts
from experiments.analysis.settings import PartSettings, Settings, part_settings
from experiments.analysis.sources import Digits, Source, Streamed, open_source
from experiments.runner.run_folder import RunFolder, perform

Numbers = dict[str, Any]


def analyse(settings: Settings) -> Numbers:
    """Do all analyses that are not done yet, write figures and numbers, and print what they say."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    output = writable_folder(settings.output)
    claim(output, ("analysis.json", "fig*.png", "table6_*.png", "parts", "cache"), "choose another --output")
    with only_process(output / ".lock", f"another analysis is at work in {output}"):
        return _Analysis(settings, output).run()


class _Analysis:
    def __init__(self, settings: Settings, output: Path) -> None:
        self.settings = settings
        self.output = output

    @cached_property
    def source(self) -> Source:
        return open_source(self.settings)

    @cached_property
    def streamed(self) -> Streamed:
        return Streamed(self.source)

    def run(self) -> Numbers:
        settings = self.settings
        numbers: Numbers = {"model": self.source.model_text, "data": self.source.data_text}
        if isinstance(self.source, Digits):
            numbers["pretraining_accuracy"] = self.source.pretrained["accuracy"]
        for part in settings.parts:
            numbers[part] = self._distances() if part == "distances" else self._stream(part)
            for name, figure in figures.DRAW[part](settings, numbers[part]).items():
                plots.save(figure, self.output / f"{name}.png", dpi=110)
        write_json(self.output / "analysis.json", numbers)
        print("\n".join([f"{numbers['model']}; {numbers['data']}", *figures.report(settings, numbers)]))
        print(f"figures and analysis.json in {self.output}")
        return numbers

    def _folder(self, own: PartSettings) -> RunFolder:
        folder = RunFolder("", own)
        name = "-".join(filter(None, (own.part, own.method and own.method.replace(":", ""), str(own.seed), folder.id)))
        return RunFolder(self.output / "parts" / name, own)

    def _stream(self, part: str) -> Numbers:
        folder = self._folder(part_settings(self.settings, part))
        work = parts.STREAMING[part]
        return perform(
            folder,
            lambda: lambda _: work(self.settings, self.streamed),
            terminal=False,
            overwrite=self.settings.overwrite,
        )

    def _distances(self) -> Numbers:
        """Tables 5 and 6: A before and after training, by LoRA and by EVA."""
        moved: dict[str, list[Any]] = {key.entry.label: [] for key in parts.METHODS}
        between, diverged = [], []
        for seed in range(self.settings.seeds):
            files = {}
            for key in parts.METHODS:
                metrics, files[key.key] = self._train(part_settings(self.settings, "distances", key.key, seed))
                moved[key.entry.label].append(metrics["moved"])
                if "diverged" in metrics:
                    diverged.append(f"{key.label}, seed {seed}: {metrics['diverged']}")
            between.append(parts.between(files))
        table6 = {method: figures.by_kind(runs) for method, runs in moved.items()}
        numbers: Numbers = {"table5": figures.by_kind(between), "table6": table6}
        return {**numbers, "diverged": diverged} if diverged else numbers

    def _train(self, own: PartSettings) -> tuple[Numbers, Path]:
        folder = self._folder(own)
        file = folder.path / "weights.safetensors"

        def work(_: RunFolder) -> Numbers:
            if self.settings.progress:
                print(f"training {own.method}, seed {own.seed}", file=sys.stderr, flush=True)
            last, numbers = parts.train(own, self.source, self.settings.progress and sys.stderr.isatty())
            with replacing(file) as temporary:
                write_tensors(temporary, last)
            return numbers

        lost = folder.result() is not None and not are_whole(file)
        return perform(folder, lambda: work, terminal=False, overwrite=self.settings.overwrite or lost), file
