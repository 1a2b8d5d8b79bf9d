"""The pretrain command under SIGKILL right after its checkpoints, as a cluster or a power failure does it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eva_lightning.sealed import damage, previous
from tests.eva_lightning.rl.synthetic import write_synthetic
from tests.paths import ROOT

#: EVA_KILLS=14 for as many as in the report of the losses.
KILLS = int(os.environ.get("EVA_KILLS", "2"))


def modified(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


@pytest.mark.slow  # every kill costs a start of torch and Lightning
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_kills_after_checkpoints_leave_one_to_resume_from(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "data", ["reach-v3"], episodes=6)
    options = (
        f"--tasks reach-v3 --data {tmp_path / 'data'} --width 512 --layers 2 --heads 2 --context 4 --batch-size 2 "
        "--max-steps 100000 --val-every 50000 --checkpoint-every 1 --accelerator cpu --progress false "
        f"--output {tmp_path / 'runs'} --name run"
    )
    command = [sys.executable, "-m", "experiments.metaworld", "pretrain", *options.split()]
    last, delays = tmp_path / "runs" / "run" / "checkpoints" / "last.ckpt", random.Random(0)
    said = tmp_path / "said.txt"
    for _ in range(KILLS):
        before = modified(last)
        with said.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            deadline = time.monotonic() + 200
            while modified(last) == before and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.002)
            assert modified(last) != before, said.read_text()
            time.sleep(delays.uniform(0, 1.2))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert "damaged" not in said.read_text()
        assert ("resuming from" in said.read_text()) == (before != 0)
        assert damage(last) is None
        assert not previous(last).exists() or damage(previous(last)) is None
