"""The Hub of the tests as they see it: what it holds, what it was asked, and what is to go wrong."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_store import MAIN, Store


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that `where` is found in, as 'GET /org/name/resolve/...'.

    `status`: answered by this instead. `cut_after`: the connection ends after so many bytes of the body, of an
    answer or of an upload. `shorter`:
    the body lacks so many bytes, and says so. `flip`: this byte of the file is another. `etag`: what the ETag begins
    with, in place of the true one. `pause`: seconds before each 64 KiB. `until`: nothing is sent before it is set.
    """

    where: str
    times: int = 1
    status: int | None = None
    cut_after: int | None = None
    shorter: int = 0
    flip: int | None = None
    etag: str | None = None
    pause: float = 0.0
    until: threading.Event | None = None


@dataclass
class Request:
    """One request as it came, and how many bytes of a body it was sent."""

    line: str
    range: str
    token: str
    status: int = 0
    sent: int = 0


@dataclass
class Hub:
    """The server as tests see it. `users`: token -> name. `faults` are used up in order."""

    store: Store
    endpoint: str
    cdn: str
    users: dict[str, str] = field(default_factory=lambda: {"hf_owner": "owner", "hf_reader": "reader"})
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    page_length: int = 1000
    without_pulls: set[str] = field(default_factory=set)

    def add(self, repo_id: str, files: Mapping[str, bytes] | Path, **options: Any) -> str:
        """A repository with these files, or those of a folder, on main; the commit's name."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repo = self.store.create(repo_id, **options)
        blobs = {path: self.store.blob(path, content) for path, content in files.items()}
        return self.store.commit(repo, blobs, title="add files").sha

    def change(self, repo_id: str, files: Mapping[str, bytes], *deleted: str, ref: str = MAIN) -> str:
        blobs = {path: self.store.blob(path, content) for path, content in files.items()}
        return self.store.commit(self.store.repos[repo_id], blobs, deleted, ref=ref).sha

    def files(self, repo_id: str, revision: str = MAIN) -> dict[str, bytes]:
        """What a revision holds, but for .gitattributes."""
        commit = self.store.repos[repo_id].commit_at(revision)
        assert commit is not None, f"{repo_id} has no {revision}"
        return {p: self.store.content(b) for p, b in commit.files.items() if p != ".gitattributes"}

    def sent(self, pattern: str = "") -> int:
        """Bytes of bodies sent in answer to requests that `pattern` is found in."""
        return sum(request.sent for request in self.requests if re.search(pattern, request.line))

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request.line) is not None for request in self.requests)

    def environment(self, cache: Path, token: str = "") -> dict[str, str]:
        """Variables that turn the client of another process to this server."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def take_fault(self, line: str) -> Fault | None:
        with self.store.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.where, line):
                    fault.times -= 1
                    return fault
        return None
