"""What listens while a comparison runs: nothing beyond this machine, and nothing that answers without the token."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.experiments.runner.test_interruption import journal, started, wait_for

pytestmark = pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss, of iproute2")

LOOPBACK = {"127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"}


def sockets(pid: int) -> list[tuple[str, str, int]]:
    """(program, address, port) of what waits for connections or datagrams in a process and all below it."""
    root = psutil.Process(pid)
    tree = {process.pid for process in [root, *root.children(recursive=True)]}
    lines = subprocess.run(["ss", "-Hltunp"], capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for line in lines:
        if tree & {int(each) for each in re.findall(r"pid=(\d+)", line)}:
            address, _, port = line.split()[4].rpartition(":")
            found.append((re.findall(r'\(\("([^"]+)"', line)[0], address, int(port)))
    return found


@pytest.mark.slow
def test_ray_listens_on_the_loopback_interface_and_wants_its_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # what a user has set for a cluster does not open this one
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    output = tmp_path / "out"
    with started(output, "--backend", "ray", "--workers", "1", "--wait", "1000") as process:
        wait_for(lambda: journal(output, "begin") or process.poll() is not None, 240)
        assert process.poll() is None
        found = sockets(process.pid)
        assert {"gcs_server", "raylet"} <= {program for program, _, _ in found}
        assert {address for _, address, _ in found} <= LOOPBACK, found
        (port,) = {port for program, _, port in found if program == "gcs_server"}
        for token in (None, "0" * 64):
            assert "InvalidAuthToken" in knock(f"127.0.0.1:{port}", token)


def knock(address: str, token: str | None) -> str:
    """What a stranger who knows the address hears from Ray."""
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    code = f"""
import os
os.environ.update({mode!r}, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_gcs_rpc_server_connect_timeout_s="2")
import ray._raylet as raylet
print(raylet.GcsClient(address={address!r}).internal_kv_keys(b"", None, timeout=10))
"""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired as error:  # it asks again and again
        return str(error.stderr)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_local_processes_listen_nowhere(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with started(output, "--workers", "2", "--wait", "1000") as process:
        wait_for(lambda: len(journal(output, "begin")) >= 2 or process.poll() is not None, 240)
        assert process.poll() is None
        assert len(psutil.Process(process.pid).children()) >= 2
        assert sockets(process.pid) == []
