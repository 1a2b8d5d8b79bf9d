"""Everything that needs a CUDA GPU, in one go: ``python -m tools.gpu_checks`` writes its result to docs/gpu-checks.md.

Exit status 0: all passed; 1: something failed; 77: there is no GPU, and nothing was run or written.
"""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import find_adapters
from eva_lightning.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "gpu-checks.md"
NO_GPU = 77
_WIDTH, _CLASSES, _SAMPLES = 64, 4, 128


class _Network(pl.LightningModule):
    """Three linear layers and a head; loses the same on the CPU and on a GPU."""

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        hidden = [m for _ in range(3) for m in (linear(_WIDTH, _WIDTH), nn.GELU())]
        self.net: Any = nn.Sequential(*hidden, nn.Linear(_WIDTH, _CLASSES))
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def _data() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_SAMPLES, _WIDTH, generator=generator) * torch.logspace(0.5, -1.5, _WIDTH)
    return DataLoader(TensorDataset(x, (x.sum(1) * 3).long().remainder(_CLASSES)), 16)


def _fit(module: _Network, accelerator: str = "gpu", precision: Any = "32-true") -> dict[str, Tensor]:
    """Fit for five epochs; A as it was after the initialisation, in fp32 on the CPU."""
    callback = EVAInitCallback(rho=2, r=8, engine="exact", verbose=False)
    trainer = pl.Trainer(
        accelerator=accelerator, devices=1, max_epochs=5, precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, _data())
    assert callback.state is not None
    assert all(bool(torch.isfinite(x.b).all()) and bool(x.b.any()) for x in find_adapters(module).values())
    first, last = sum(module.losses[:4]), sum(module.losses[-4:])
    assert last < first, f"the loss went from {first / 4:.3f} to {last / 4:.3f}"
    return {n: v[: callback.state.ranks[n]].float().cpu() for n, v in callback.state.components.items()}


def _same_as_on_the_cpu(precision: str, least: float) -> str:
    """Train with `precision`; the subspaces of A overlap with those of the CPU in fp32 by `least` of 1."""
    found = []
    for accelerator, how in (("cpu", "32-true"), ("gpu", precision)):
        torch.manual_seed(0)
        found.append(_fit(_Network(), accelerator, how))
    expected, got = found
    overlaps = []
    for name, a in expected.items():
        k = min(len(a), len(got[name]))
        overlaps.append(float((a[:k] @ got[name][:k].T).square().sum()) / max(1, k))
    assert min(overlaps) >= least, f"overlap {min(overlaps):.4f}, at least {least} expected"
    return f"overlap of A with the CPU's at least {min(overlaps):.4f}"


def _quantised(kind: str) -> str:
    layers: Any = importlib.import_module("bitsandbytes.nn")

    def linear(inputs: int, outputs: int) -> nn.Module:
        if kind == "8-bit":
            layer: nn.Module = layers.Linear8bitLt(inputs, outputs, has_fp16_weights=False)
        else:
            layer = layers.Linear4bit(inputs, outputs, quant_type="nf4", compute_dtype=torch.bfloat16)
        return layer

    torch.manual_seed(0)
    a = _fit(_Network(linear), precision="bf16-mixed")
    return f"{len(a)} adapters on quantised layers trained"


def _compiled() -> str:
    torch.manual_seed(0)
    module = _Network()
    module.net = torch.compile(module.net)
    return f"{len(_fit(module))} adapters in a compiled network trained"


def _tests() -> str:
    """The tests that are marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, done.stdout[-2000:]
    return last


CHECKS: dict[str, Callable[[], str]] = {
    "CUDA tests (pytest -m gpu)": _tests,
    "fp32": partial(_same_as_on_the_cpu, "32-true", 0.999),
    "bf16-mixed": partial(_same_as_on_the_cpu, "bf16-mixed", 0.98),
    "16-mixed, with its gradient scaler": partial(_same_as_on_the_cpu, "16-mixed", 0.98),
    "8-bit base layers": partial(_quantised, "8-bit"),
    "4-bit base layers": partial(_quantised, "4-bit"),
    "torch.compile": _compiled,
}


def run(checks: dict[str, Callable[[], str]]) -> list[tuple[str, bool, str, float]]:
    """Each check's name, whether it passed, what it found, and its seconds; one that fails does not end the others."""
    rows = []
    for name, check in checks.items():
        started = time.perf_counter()
        try:
            passed, found = True, check()
        except Exception as error:
            traceback.print_exc()
            passed, found = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rows.append((name, passed, found, time.perf_counter() - started))
        print(f"{name}: {'passed' if passed else 'FAILED'}: {found}", flush=True)
    return rows


def page(rows: list[tuple[str, bool, str, float]], where: str) -> str:
    """docs/gpu-checks.md."""
    lines = [f"| {n} | {'passed' if ok else '**failed**'} | {found} | {s:.0f} |" for n, ok, found, s in rows]
    return "\n".join(
        [
            "# GPU checks",
            "",
            f"Written by `make gpu-checks` ({date.today().isoformat()}): {where}.",
            "",
            "| check | result | what was found | seconds |",
            "| --- | --- | --- | --- |",
            *lines,
            "",
        ]
    )


def main() -> int:
    """The command; its exit status."""
    if not torch.cuda.is_available():
        print("There is no CUDA GPU here. Not run:")
        for name in CHECKS:
            print(f"  {name}")
        print(f"Nothing was checked, and {RESULT.relative_to(ROOT)} stays as it is. Exit status {NO_GPU}.")
        return NO_GPU
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}"
    rows = run(CHECKS)
    write_text(RESULT, page(rows, where))
    return 0 if all(passed for _, passed, _, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
