"""A stand-in for the Hugging Face hub on this machine: what its file system asks of it over HTTP."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_COMMIT = "0" * 40


@contextmanager
def hub(repository: str, files: Mapping[str, bytes]) -> Iterator[list[str]]:
    """A hub with one data set repository of `files`, which may change; yields the ranges that are fetched."""
    import huggingface_hub

    ranges: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/datasets/{repository}/resolve/main/"):
                self._content(path.removeprefix(f"/datasets/{repository}/resolve/main/"))
            elif path.startswith(f"/api/datasets/{repository}/tree/main"):
                below = path.removeprefix(f"/api/datasets/{repository}/tree/main").strip("/")
                self._json(_entries(files, below, "recursive=true" in self.path.lower()))
            elif path in (f"/api/datasets/{repository}", f"/api/datasets/{repository}/revision/main"):
                self._json({"id": repository, "sha": _COMMIT, "siblings": []})
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            if urlsplit(self.path).path != f"/api/datasets/{repository}/paths-info/main":
                self.send_error(404)
                return
            known = _entries(files, "", recursive=True)
            self._json([entry for entry in known if entry["path"] in form.get("paths", ())])

        def _content(self, name: str) -> None:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            ranges.append(f"{name}:{first}-{last}")
            content = files[name][int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _json(self, value: object) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with pytest.MonkeyPatch.context() as patch:
        address = f"http://127.0.0.1:{server.server_port}"
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        patch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield ranges
    huggingface_hub.HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def _entries(files: Mapping[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    prefix = f"{below}/" if below else ""
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            folder = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                found[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            oid = hashlib.sha1(content).hexdigest()
            found[name] = {"type": "file", "oid": oid, "size": len(content), "path": name}
    return list(found.values())
