"""A Hugging Face Hub on this machine: the endpoints by which huggingface_hub reads and writes a model."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The one commit of every repository, which `main` means."""


@dataclass
class Hub:
    """`repositories` are their files by name; `log` has "METHOD path range" of every request, and the bytes sent."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    n_sent: int = 0
    gated: set[str] = field(default_factory=set)
    url: str = ""

    def add_folder(self, name: str, folder: Path) -> None:
        """Publish a folder."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.repositories[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path, *, offline: bool = False) -> None:
        """Make this the Hub of this process, with a cache of its own: what its environment would have set at start."""
        changes = {
            "ENDPOINT": self.url,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_DISABLE_XET": True,
        }
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {**changes, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)

    def run(self, *arguments: object, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
        """Run moe2gguf in a process of its own, for which this is the Hub and `home` has its cache."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", "from moe2gguf.cli import main; main()", *map(str, arguments)]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """Start a Hub without repositories."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._read_model()

    def do_GET(self) -> None:
        self._read_model()

    def do_PUT(self) -> None:
        self.hub.log.append(f"PUT {self.path}")
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._send(b"")

    def do_POST(self) -> None:
        self.hub.log.append(f"POST {self.path}")
        path, body = unquote(self.path.partition("?")[0]), self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            self._send_json({"url": f"{self.hub.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+/.+)/preupload/.+", path):
            modes = {True: "lfs", False: "regular"}
            files = [one["path"] for one in json.loads(body)["files"]]
            answers = [
                {"path": one, "uploadMode": modes[one.endswith(".gguf")], "shouldIgnore": False} for one in files
            ]
            self._send_json({"files": answers})
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            self._send_json({"transfer": "basic", "objects": [self._describe_upload(one) for one in asked]})
        elif found := re.fullmatch(r"/api/models/(.+/.+)/commit/.+", path):
            self._commit(self.hub.repositories[found[1]], [json.loads(line) for line in body.splitlines()])
            self._send_json({"commitUrl": f"{self.hub.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._send(b"", 404)

    def _describe_upload(self, one: dict[str, Any]) -> dict[str, Any]:
        """Where to send an object, unless it is here."""
        upload = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}", "header": {}}}
        return one if one["oid"] in self.hub.objects else {**one, "actions": upload}

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for one in lines:
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]

    def _read_model(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.log.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        match = re.fullmatch(r"(/api/models)?/([^/]+/[^/]+)(?:/(resolve|tree|revision)/([^/]+)(?:/(.+))?)?", path)
        files = self.hub.repositories.get(match[2]) if match else None
        if match is None or files is None:
            self._send(b"", 404, {"X-Error-Code": "RepoNotFound"})
        elif match[2] in self.hub.gated:
            self._send(b"", 403, {"X-Error-Code": "GatedRepo"})
        elif match[4] not in (None, "main", COMMIT):
            self._send(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        elif match[3] == "tree":
            self._send_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                    for name, data in files.items()
                ]
            )
        elif match[3] == "resolve":
            self._send_file(files.get(match[5]))
        else:
            self._send_json({"id": match[2], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})

    def _send_file(self, data: bytes | None) -> None:
        if data is None:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers, code = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, code = data[first : last + 1], 206
        self._send(data, code, headers)

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _send(self, data: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            self.hub.n_sent += len(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while n_byte := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(n_byte))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
