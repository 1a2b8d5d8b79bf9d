"""A Hugging Face hub on this machine: repositories are folders, and the client's requests are answered from them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import yaml

_COMMIT = "0" * 39 + "1"


class _Hub(BaseHTTPRequestHandler):
    """The part of its interface that creating, uploading and downloading need."""

    root: Path
    token: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self._json({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            (self.root / name).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})
        elif self.path == "/api/validate-yaml":
            metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            errors = [] if metadata.get("library_name") else [{"message": "library_name is missing"}]
            self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif "/preupload/" in self.path:
            files = [each["path"] for each in json.loads(body)["files"]]
            self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._json({"error": "not found"}, 404)

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        self._file(with_body=True)

    def _commit(self, body: bytes) -> None:
        name = self.path.removeprefix("/api/models/").split("/commit/")[0]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                (self.root / name / entry["value"]["path"]).write_bytes(base64.b64decode(entry["value"]["content"]))
        url = f"http://{self.headers['Host']}/{name}/commit/{_COMMIT}"
        self._json({"commitUrl": url, "commitOid": _COMMIT, "success": True})

    def _file(self, with_body: bool) -> None:
        name, found, path = self.path.partition("/resolve/main/")
        if not found:
            name, found, path = self.path.partition(f"/resolve/{_COMMIT}/")
        file = self.root / name.strip("/") / path
        if not (found and file.is_file()):
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT}, with_body)
            return
        content = file.read_bytes()
        tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": _COMMIT}
        self._send(200, content, tag, with_body)

    def _json(self, document: Any, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"}, True)

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@contextmanager
def hub(root: Path, monkeypatch: pytest.MonkeyPatch, token: str = "hf_test") -> Iterator[str]:
    """A hub of the repositories in `root`, which the client of this process takes for the hub; gives its address.

    The client reads ``HF_ENDPOINT`` and its like once, as it is imported: its constants are set instead.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"root": root, "token": token}))
    address = f"http://127.0.0.1:{server.server_port}"
    constants = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(root / ".cache"),
    }
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    # what the package's own functions, such as file_exists, ask
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    monkeypatch.setenv("HF_TOKEN", token)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
