"""Local fakes of object stores that have no server to run: they answer the requests of their file systems."""

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
    """Starts a Hugging Face hub with one data set repository of `files`, which the test may change.

    Yields a list that gets the name of the file for each range fetched.
    """
    import huggingface_hub

    fetched: list[str] = []

    class Hub(_Handler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/datasets/{repository}/resolve/main/"):
                fetched.append(path.removeprefix(f"/datasets/{repository}/resolve/main/"))
                self.answer_range(files[fetched[-1]])
            elif path.startswith(f"/api/datasets/{repository}/tree/main"):
                below = path.removeprefix(f"/api/datasets/{repository}/tree/main").strip("/")
                self.answer(_tree(files, below, "recursive=true" in self.path.lower()))
            elif path in (f"/api/datasets/{repository}", f"/api/datasets/{repository}/revision/main"):
                self.answer({"id": repository, "sha": _COMMIT, "siblings": []})
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            if urlsplit(self.path).path != f"/api/datasets/{repository}/paths-info/main":
                self.send_error(404)
                return
            known = _tree(files, "", recursive=True)
            self.answer([entry for entry in known if entry["path"] in form.get("paths", ())])

    with _served(Hub) as address, pytest.MonkeyPatch.context() as patch:
        huggingface_hub.HfFileSystem.clear_instance_cache()
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        patch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield fetched
        huggingface_hub.HfFileSystem.clear_instance_cache()


@contextmanager
def google_storage(bucket: str, files: Mapping[str, bytes]) -> Iterator[list[str]]:
    """Starts Google Cloud Storage with one bucket of `files`; the list gets a file name per range fetched."""
    import gcsfs

    fetched: list[str] = []

    class Storage(_Handler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            if url.path.startswith(f"/download/storage/v1/b/{bucket}/o/"):
                fetched.append(unquote(url.path.removeprefix(f"/download/storage/v1/b/{bucket}/o/")))
                self.answer_range(files[fetched[-1]])
            elif url.path == f"/storage/v1/b/{bucket}/o":
                self.answer(_listing(bucket, files, query.get("prefix", ""), query.get("delimiter", "")))
            elif (name := unquote(url.path.removeprefix(f"/storage/v1/b/{bucket}/o/"))) in files:
                self.answer(_object(bucket, name, files[name]))
            else:
                self.send_error(404)

    with _served(Storage) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield fetched
        gcsfs.GCSFileSystem.clear_instance_cache()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: object) -> None:
        self._send(200, json.dumps(value).encode())

    def answer_range(self, content: bytes) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        self._send(206, content[int(first) : int(last) + 1])

    def _send(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json" if code == 200 else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def _served(handler: type[_Handler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _tree(files: Mapping[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    prefix = f"{below}/" if below else ""
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            folder = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                found[folder] = {"type": "directory", "oid": _COMMIT, "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            oid = hashlib.sha1(content).hexdigest()
            found[name] = {"type": "file", "oid": oid, "size": len(content), "path": name}
    return list(found.values())


def _listing(bucket: str, files: Mapping[str, bytes], prefix: str, delimiter: str) -> dict[str, Any]:
    items, prefixes = [], set()
    for name in sorted(files):
        below = name.removeprefix(prefix)
        if not name.startswith(prefix):
            continue
        if delimiter and delimiter in below:
            prefixes.add(prefix + below.partition(delimiter)[0] + delimiter)
        else:
            items.append(_object(bucket, name, files[name]))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


def _object(bucket: str, name: str, content: bytes) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "name": name,
        "bucket": bucket,
        "size": str(len(content)),
        "etag": hashlib.sha1(content).hexdigest(),
        "generation": "1",
        "updated": "2026-01-01T00:00:00.000Z",
        "timeCreated": "2026-01-01T00:00:00.000Z",
    }
