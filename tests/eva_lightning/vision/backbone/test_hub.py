from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from eva_lightning.vision.backbone.hub import require_hub, silence


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[int]:
    """A hub that answers everything with one HTTP status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    yield request.param
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("status", [200, 401, 404], indirect=True)
def test_any_answer_below_500_will_do(status: int) -> None:
    require_hub("a/b", "it is not here", "do without")


@pytest.mark.parametrize("status", [500, 503], indirect=True)
def test_server_errors_are_no_answer(status: int) -> None:
    with pytest.raises(ConnectionError, match=rf"^it is not here and .* answer \(HTTP status {status}\): do without$"):
        require_hub("a/b", "it is not here", "do without")


def test_no_network_and_offline_mode_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.perf_counter()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for endpoint in ("http://127.0.0.1:9", "no address"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(ConnectionError, match=r"does not answer \(.+\): do without$"):
            require_hub("a/b", "it is not here", "do without")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match=r"does not answer \(HF_HUB_OFFLINE is set\)"):
        require_hub("a/b", "it is not here", "do without")
    assert time.perf_counter() - began < 6


def test_a_search_for_the_address_that_does_not_end_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: ended.wait(60))
    began = time.perf_counter()
    assert silence("a/b", 0.2) == "no answer within 0.2 s"
    assert time.perf_counter() - began < 30
    ended.set()
