"""Published trajectories, imported by the command: statistics, resuming, refusals, training, and the hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eva_lightning.rl import importing as work
from eva_lightning.rl.demonstrations import load_task, read_index
from eva_lightning.rl.trajectories import TrajectoryDataModule
from eva_lightning.rl.trajectory_store import TrajectoryStore
from experiments.metaworld import collect, importing, pretrain
from experiments.metaworld.demonstration_table import statistics
from tests.eva_lightning.rl.published_files import FORMATS, HORIZON, episodes, stream
from tests.paths import ROOT

TASKS = ("push-v3", "reach-v3", "window-close-v3")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with three tasks in three formats."""
    folder = tmp_path / "published"
    folder.mkdir()
    for number, (task, form) in enumerate(zip(TASKS, ("buffer.pkl", "stream.npz", "episodes.hdf5"), strict=True)):
        FORMATS[form](folder, task.replace("-v3", "-v2"), episodes(4, seed=number))
    (folder / "README.md").write_text("nothing to see")
    return folder


def words(published: Path, out: Path, *more: str) -> list[str]:
    return [f"--from={published}", f"--out={out}", f"--horizon={HORIZON}", f"--tasks={','.join(TASKS)}", *more]


def test_it_writes_what_collect_writes_and_says_what_it_is_worth(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    index = importing.main(words(published, out))
    assert list(index) == sorted(TASKS)
    printed = " ".join(capsys.readouterr().out.split())
    assert "push-v3: 4 episodes from push-v2.pkl" in printed
    assert "the files do not say which steps were solved" in printed
    table = statistics(index, TASKS)
    for number, task in enumerate(TASKS):
        returns = [each["rewards"].sum(dtype=np.float64) for each in episodes(4, seed=number)]
        assert table.loc[task, "episodes"] == 4
        assert table.loc[task, "mean return"] == pytest.approx(np.mean(returns))
        assert table.loc[task, "max return"] == pytest.approx(np.max(returns))
        assert f"{np.mean(returns):.0f}" in printed
    assert table[["any step", "last step"]].isna().all(axis=None)
    # reach-v2 has 1858.99 in the paper's Table 22; push and window-close are of CW10, which it leaves out
    assert "1859" in printed
    store = TrajectoryStore.build(out, TASKS)
    assert store.returns[4] == pytest.approx(episodes(1, seed=1)[0]["rewards"].sum(dtype=np.float64), rel=1e-6)
    np.testing.assert_array_equal(store.states(4), episodes(1, seed=1)[0]["observations"][:-1])


def test_it_is_trained_on_like_collected_ones_but_for_the_experts_actions(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    importing.main(words(published, out))
    metrics = pretrain.main(
        [
            "--tasks=push,reach", f"--data={out}", "--width=16", "--layers=1", "--heads=2", "--context=4",
            "--batch-size=4", "--max-steps=2", "--val-every=2", "--val-episodes=1", "--accelerator=cpu",
            f"--output={tmp_path / 'runs'}", "--progress=false", "--protocol=l2m",
        ]
    )  # fmt: skip
    assert metrics["steps"] == 2
    assert np.isfinite(metrics["val_loss"])
    with pytest.raises(ValueError, match=r"push-v3 in .* were imported from push-v2\.pkl .* use target executed"):
        TrajectoryDataModule(out, ["push-v3"], context=4, target="expert", val_episodes=1)


def test_it_resumes_where_it_stopped_and_repairs_what_is_damaged(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, read, asked = tmp_path / "out", work.read_published, []

    def power_cut(task: str, *args: Any, **options: Any) -> Any:
        asked.append(task)
        if task == "reach-v3" and asked.count(task) == 1:
            raise KeyboardInterrupt
        return read(task, *args, **options)

    monkeypatch.setattr(work, "read_published", power_cut)
    with pytest.raises(KeyboardInterrupt):
        importing.main(words(published, out))
    assert list(read_index(out)) == ["push-v3"]
    assert {path.name for path in out.iterdir()} <= {"push-v3.npz", "index.json", ".lock"}
    importing.main(words(published, out))
    assert asked == ["push-v3", "reach-v3", "reach-v3", "window-close-v3"]
    assert "push-v3: there already, from push-v2.pkl" in capsys.readouterr().out
    file = out / read_index(out)["reach-v3"].file
    file.write_bytes(file.read_bytes()[:-50])
    importing.main(words(published, out))
    assert asked[4:] == ["reach-v3"]
    assert len(load_task(out, "reach-v3")) == 4
    # fewer episodes, or other files, are another import
    assert importing.main(words(published, out, "--episodes=2"))["push-v3"].episodes == 2
    np.savez(published / "reach-v2.npz", **stream(episodes(3, seed=9)))  # type: ignore[arg-type]
    assert importing.main(words(published, out))["reach-v3"].episodes == 3


def test_a_damaged_file_ends_it_with_one_sentence_and_leaves_nothing_half_made(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (published / "reach-v2.npz").write_bytes(b"PK")
    assert importing.command_line(words(published, out)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "reach-v2.npz is damaged" in error
    assert error.count("\n") == 1
    assert list(read_index(out)) == ["push-v3"]
    assert {path.name for path in out.iterdir()} <= {"push-v3.npz", "index.json", ".lock"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--from=nowhere", "there is no folder nowhere with published trajectories"),
        ("--from=ml-jku/meta-world", "(a data set of the hub is written hub:ml-jku/meta-world)"),
        ("--from=hub:meta-world", "a data set of the hub is written hub:OWNER/NAME, got hub:meta-world"),
        ("--from=hub:ml-jku/meta-world", "the Hugging Face hub does not answer (HF_HUB_OFFLINE is set): download it"),
        ("--tasks=push,hammer", "there are no trajectories of hammer-v3: hammer-v2.npz, hammer-v2.hdf5"),
        ("--tasks=push-v2", "did you mean push-v3"),
        ("--horizon=5", "push-v2.pkl: episode 0 has 6 steps, and 5 are expected"),
        ("--episodes=9", "has 4 episodes of push-v3, and 9 were asked for"),
        ("--episodes=0", "--episodes must be a whole number of at least 1, got 0"),
        ("--form=x", "unknown option '--form': did you mean --from"),
    ],
)
def test_bad_input_is_one_sentence(
    change: str, message: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert importing.command_line([*words(published, tmp_path / "out"), change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "index.json").exists()


def test_the_source_is_required_and_can_stand_in_a_file(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--from is required"):
        importing.parse([])
    (tmp_path / "import.yaml").write_text(f"from: {published}\ntasks: [push]\n")
    assert importing.parse([f"--config={tmp_path / 'import.yaml'}"]).from_ == str(published)


def test_imported_and_collected_demonstrations_are_not_mixed(published: Path, tmp_path: Path) -> None:
    importing.main(words(published, tmp_path / "a"))
    with pytest.raises(ValueError, match=r"were imported from push-v2\.pkl .*: choose another folder for those of the"):
        collect.main(["--tasks=push", "--episodes=1", f"--out={tmp_path / 'a'}", "--progress=false"])
    collect.main(["--tasks=push", "--episodes=1", "--horizon=3", f"--out={tmp_path / 'b'}", "--progress=false"])
    with pytest.raises(ValueError, match="holds demonstrations of push-v3 by the scripted expert"):
        importing.main(words(published, tmp_path / "b"))


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client needs for one data set; the first download of a file is cut off."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"
    ranges: list[str | None]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        if self.path.startswith("/api/datasets/ml-jku/meta-world"):
            files = sorted(file.name for file in self.folder.iterdir())
            about = {"id": "ml-jku/meta-world", "sha": self.commit, "siblings": [{"rfilename": name} for name in files]}
            self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"}, body)
            return
        file = self.folder / self.path.rpartition("/")[2]
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        content, wanted = file.read_bytes(), self.headers.get("Range")
        tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.commit}
        if not body:
            self._send(200, content, tag, body)
            return
        self.ranges.append(wanted)
        start = 0 if wanted is None else int(wanted.removeprefix("bytes=").partition("-")[0])
        if wanted:
            tag["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = len(content) // 2 if len(self.ranges) == 1 else None
        self._send(206 if wanted else 200, content[start:], tag, body, cut)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
        self.close_connection = True


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, list[str | None]]]:
    ranges: list[str | None] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": folder, "ranges": ranges}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", ranges
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow  # a process of its own, for the client reads its settings once
def test_the_hub_is_asked_and_a_download_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    folder, out = tmp_path / "remote", tmp_path / "out"
    folder.mkdir()
    # the client keeps what it has got in pieces of 10 MiB
    padding = np.zeros(25 * 2**20, np.uint8)
    np.savez(folder / "push-v2.npz", **stream(episodes(40)), padding=padding)  # type: ignore[arg-type]
    line = [sys.executable, "-m", "experiments.metaworld", "import", "--from=hub:ml-jku/meta-world", "--tasks=push"]
    line += [f"--out={out}", f"--horizon={HORIZON}", f"--downloads={tmp_path / 'downloads'}"]
    with _serving(folder) as (address, ranges):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        found = subprocess.run(
            line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
    assert found.returncode == 0, found.stderr
    assert len(ranges) == 2
    assert ranges[0] is None
    assert int(str(ranges[1]).removeprefix("bytes=").removesuffix("-")) > 0
    assert read_index(out)["push-v3"].source == "ml-jku/meta-world@0123456789ab push-v2.npz"
    expected = episodes(40)[39]["rewards"]
    np.testing.assert_array_equal(load_task(out, "push-v3").rewards[39], expected)
