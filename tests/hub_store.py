"""What a Hub keeps, for tests: repositories with commits, branches, pull requests, and content by its SHA-256.

Content lies in a folder under its digest, a commit is a mapping of paths to blobs, so a test can look at any
revision at any time. `hub_server` speaks HTTP in front of it.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MAIN = "main"
LARGE_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
LARGE_BYTES = 10 * 2**20


@dataclass(frozen=True)
class Blob:
    """`sha256` names the content; `oid` is what git calls it: of an LFS file, the digest of its pointer."""

    sha256: str
    size: int
    lfs: bool

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: Mapping[str, Blob]


@dataclass
class Pull:
    """A pull request; `status` is draft, open, closed or merged. `base`: the commit of main that it began from."""

    num: int
    title: str
    base: str
    status: str = "draft"
    merge_commit: str | None = None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """`readers`: users who may read a private or gated repository; `owner` may write."""

    id: str
    owner: str = "owner"
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)  # (ref, commit) in order

    def commit_at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


class Refused(Exception):
    """What the Hub will not do: an HTTP status, X-Error-Code and X-Error-Message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()
        self._numbers = itertools.count(1)

    # ---- content

    def put(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / digest
        if not path.exists():
            draft = self.folder / f"{digest}.{next(self._numbers)}"
            draft.write_bytes(content)
            draft.rename(path)
        return digest

    def has(self, sha256: str, size: int | None = None) -> bool:
        path = self.folder / sha256
        return path.is_file() and (size is None or path.stat().st_size == size)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def content(self, blob: Blob) -> bytes:
        return self.path(blob.sha256).read_bytes()

    def oid(self, blob: Blob) -> str:
        raw = blob.pointer if blob.lfs else self.content(blob)
        return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()

    # ---- repositories

    def create(
        self, repo_id: str, *, owner: str = "owner", private: bool = False, gated: bool = False, readers: str = ""
    ) -> Repo:
        """A new repository; main begins at a first commit that only holds .gitattributes."""
        with self.lock:
            repo = self.repos[repo_id] = Repo(repo_id, owner, private, gated, set(readers.split()))
            attributes = Blob(self.put(b"*.safetensors filter=lfs\n"), 25, False)
            self._advance(repo, MAIN, "initial commit", {".gitattributes": attributes})
            return repo

    def blob(self, path: str, content: bytes) -> Blob:
        return Blob(self.put(content), len(content), is_large(path, len(content)))

    def commit(
        self,
        repo: Repo,
        added: Mapping[str, Blob],
        deleted: Iterable[str] = (),
        *,
        ref: str = MAIN,
        title: str = "change",
    ) -> Commit:
        """A path in `deleted` that ends in '/' is a folder."""
        with self.lock:
            current = repo.commit_at(ref)
            assert current is not None, f"{ref} is no branch of {repo.id}"
            gone = tuple(deleted)
            folders = tuple(path for path in gone if path.endswith("/"))
            kept = {
                path: blob
                for path, blob in current.files.items()
                if path not in gone and not (folders and path.startswith(folders))
            }
            return self._advance(repo, ref, title, {**kept, **added})

    def _advance(self, repo: Repo, ref: str, title: str, files: Mapping[str, Blob]) -> Commit:
        text = f"{repo.id} {ref} {title} {next(self._numbers)} {sorted(files.items())}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), title, dict(files))
        repo.commits[commit.sha] = commit
        repo.refs[ref] = commit.sha
        repo.log.append((ref, commit.sha))
        return commit

    def open_pull(self, repo: Repo, title: str, *, status: str = "draft") -> Pull:
        with self.lock:
            pull = Pull(len(repo.pulls) + 1, title, repo.refs[MAIN], status)
            repo.pulls[pull.num] = pull
            repo.refs[pull.ref] = pull.base
            return pull

    def merge(self, repo: Repo, pull: Pull) -> None:
        """Bring what the pull request changed to main."""
        with self.lock:
            if pull.status != "open":
                raise Refused(403, message=f"Cannot merge a pull request that is {pull.status}")
            base, head = repo.commits[pull.base], repo.commit_at(pull.ref)
            assert head is not None
            added = {path: blob for path, blob in head.files.items() if base.files.get(path) != blob}
            deleted = [path for path in base.files if path not in head.files]
            pull.merge_commit = self.commit(repo, added, deleted, title=f"{pull.title} (#{pull.num})").sha
            pull.status = "merged"


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps a file of this name outside git."""
    return size > 0 and (path.endswith(LARGE_SUFFIXES) or size > LARGE_BYTES)
