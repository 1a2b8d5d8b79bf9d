"""Load checkpoints as a fresh process does, with or without ``import eva_lightning``; prints what came of each as JSON.

    python -m tests.fresh_reader FOLDER with|without

In FOLDER: checkpoints, and what their modules computed (expected.pt).
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

folder, ours = Path(sys.argv[1]), sys.argv[2] == "with"
if ours:  # before Lightning, as sorted imports have it
    import eva_lightning  # importing is all that it does

import torch  # noqa: E402

from tests import fresh_modules as m  # noqa: E402

found: dict[str, str] = {}
x, expected = torch.load(folder / "expected.pt", weights_only=True)


def attempt(name: str, load: Callable[[], Any], of: str) -> None:
    try:
        module = load().eval()
        with torch.no_grad():
            found[name] = str(float((module(x) - expected[of]).abs().max()))
        if hasattr(module, "mine"):
            assert module.mine == 7
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"


def path(name: str) -> str:
    return str(folder / f"{name}.ckpt")


for name, cls in {
    "plain": m.Plain, "weights only": m.Plain, "adapter only": m.Plain, "any keywords": m.AnyKeywords,
    "dict": m.OneConfig, "bare": m.Bare, "late": m.Late, "outer": m.Outer, "hooked": m.Hooked,
    "old": m.Plain, "old dict": m.OneConfig, "old any keywords": m.AnyKeywords, "base": m.Plain,
}.items():  # fmt: skip
    attempt(name, lambda cls=cls, name=name: cls.load_from_checkpoint(path(name)), name)  # type: ignore[misc]
# Lightning stores a Namespace as it is, which the safe loader refuses, with the callback and without
attempt("namespace", lambda: m.OneConfig.load_from_checkpoint(path("namespace"), weights_only=False), "namespace")
attempt("override", lambda: m.Plain.load_from_checkpoint(path("plain"), rate=3.0), "plain")
attempt("map_location", lambda: m.Plain.load_from_checkpoint(path("plain"), map_location="cpu"), "plain")
attempt("strict=False", lambda: m.Plain.load_from_checkpoint(path("plain"), strict=False), "plain")
attempt("hparams_file", lambda: m.Plain.load_from_checkpoint(path("plain"), hparams_file=folder / "h.yaml"), "plain")
for name in ("plain", "old"):
    stream = io.BytesIO((folder / f"{name}.ckpt").read_bytes())
    attempt(f"{name} stream", lambda stream=stream: m.Plain.load_from_checkpoint(stream), name)  # type: ignore[misc]
for name in ("plain", "dict"):
    cls = m.Plain if name == "plain" else m.OneConfig
    attempt(f"{name} converted", lambda cls=cls, name=name: cls.load_from_checkpoint(path(f"{name} converted")), name)  # type: ignore[misc]
module = m.Plain(40)
m.quiet_trainer().validate(module, m.data(), ckpt_path=path("plain converted"))
attempt("validate converted", lambda: module, "plain")
if (folder / "cli.ckpt").exists():
    for name in ("cli", "old cli", "cli subclass", "old cli subclass"):
        asked = m.pl.LightningModule if "subclass" in name else m.Plain
        attempt(name, lambda asked=asked, name=name: asked.load_from_checkpoint(path(name)), name)  # type: ignore[misc]

for stage in ("fit", "validate", "test", "predict"):
    callbacks = [eva_lightning.EVAInitCallback(r=4, verbose=False)] if ours else []
    module = m.Plain(40)

    def run(stage: str = stage, module: m.Plain = module, callbacks: list[Any] = callbacks) -> m.Plain:
        # an epoch that the checkpoint has behind it: nothing more is trained
        getattr(m.quiet_trainer(*callbacks), stage)(module, m.data(), ckpt_path=path("plain"))
        return module

    attempt(stage, run, "plain")
if ours:
    import pytorch_lightning  # a copy of Lightning that comes after us: our callbacks are its callbacks too

    assert isinstance(eva_lightning.EVAInitCallback(), pytorch_lightning.Callback)
    assert type(vars(pytorch_lightning.LightningModule)["load_from_checkpoint"]).__name__ == "Loading"
print(json.dumps({"imported": "eva_lightning" in sys.modules, **found}))
