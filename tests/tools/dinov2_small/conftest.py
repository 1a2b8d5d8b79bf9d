from __future__ import annotations

import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tools.dinov2_small.tiny import tiny_release
from tools.dinov2_small.release import Release

#: Where nothing listens.
CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return tmp_path / "index" / "tiny_focus-0.1-py3-none-any.whl"


@pytest.fixture
def release(wheel: Path) -> Release:
    """A release whose wheel is in a folder of its own."""
    return tiny_release(wheel)


@pytest.fixture
def silent() -> Iterator[str]:
    """Address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> Callable[[str | None], None]:
    """Sets where pip gets packages from: an address, or the wheel's folder for None."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def use(address: str | None) -> None:
        if address is None:
            monkeypatch.setenv("PIP_NO_INDEX", "1")
            monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
        else:
            monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")

    return use


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str | int], None]]:
    """Sets the Hugging Face hub: an address, or a server here that answers everything with one status."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    servers: list[http.server.HTTPServer] = []

    def use(answer: str | int) -> None:
        if isinstance(answer, int):
            server = _serving(answer)
            servers.append(server)
            answer = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", answer)

    yield use
    for server in servers:
        server.shutdown()
        server.server_close()


def _serving(status: int) -> http.server.HTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("ETag", '"a"')
            self.send_header("X-Repo-Commit", 40 * "a")
            self.send_header("Content-Length", "4" if status == 200 else "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if status == 200:
                self.wfile.write(b"file")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server
