"""A hub on this machine: repositories are folders, and what is fetched is noted."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class FakeHub:
    """The repository `acme/tiny`, its branches by name, and the paths of the files that were fetched."""

    def __init__(self, branches: dict[str, Path]) -> None:
        self.branches = branches
        self.fetched: set[str] = set()

    def folder(self, revision: str) -> Path | None:
        """The files at a branch or commit."""
        by_commit = {COMMITS[name]: folder for name, folder in self.branches.items()}
        return by_commit.get(revision, self.branches.get(revision))

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        if "acme" not in parts:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if parts[:1] == ["api"]:
            _, _, owner, name, kind, revision, *_ = parts
        else:
            owner, name, kind, revision, *_ = parts
        if (owner, name) != ("acme", "tiny"):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        folder = self.folder(revision)
        if folder is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit = COMMITS.get(revision, revision)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if kind == "resolve":
            file = folder.joinpath(*parts[4:])
            data = file.read_bytes()
            self.fetched.add(file.relative_to(folder).as_posix())
            return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data
        if kind == "tree":
            listing = [
                {"type": "file", "path": f.relative_to(folder).as_posix(), "size": f.stat().st_size, "oid": "0" * 40}
                for f in files
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        siblings = [{"rfilename": f.relative_to(folder).as_posix()} for f in files]
        info = {"id": "acme/tiny", "modelId": "acme/tiny", "sha": commit, "siblings": siblings, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()


@contextmanager
def serve(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let huggingface_hub ask this hub, with an empty cache."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", endpoint)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
