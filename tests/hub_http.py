"""Requests and answers of the Hub of the tests: those that huggingface_hub makes and reads.

From file_download, hf_api, lfs and _commit_api of its 1.x and 2.x releases. Large files are answered by a redirect to
a second port, which stands for the CDN: it takes no credentials. Xet is never offered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_state import Fault, Hub, Request
from hub_store import MAIN, Blob, Commit, Pull, Refused, Repo, is_large

Query: TypeAlias = Mapping[str, list[str]]
DATE = "2026-01-01T00:00:00.000Z"
PART_BYTES = 4 * 2**20  # larger uploads come in parts
PIECE_BYTES = 2**16


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed in the middle is part of the tests: nothing to print."""


class _Answered(Exception):
    """The answer is on its way, or cut on purpose."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is written in two parts: the second would wait for an acknowledgement
    server: Server
    record: Request
    fault: Fault | None
    content_left: int

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names that http.server asks for

    def _answer(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.record = Request(f"{self.command} {self.path}", self.headers.get("Range", ""), token)
        self.fault = self.hub.take_fault(self.record.line)
        self.hub.requests.append(self.record)
        self._body: bytes | None = None
        try:
            if self.fault and self.fault.until and not self.fault.until.wait(60):
                raise Refused(400, message="nobody set what this request was waiting for")
            if self.fault and self.fault.status:
                raise Refused(self.fault.status, message="a fault on purpose")
            self._route()
        except Refused as refused:
            self._read_body()
            head = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.reply(refused.status, {k: v for k, v in head.items() if v}, {"error": refused.message})
        except (ConnectionError, _Answered):
            self.close_connection = True

    @property
    def hub(self) -> Hub:
        return self.server.hub

    @property
    def user(self) -> str:
        """The name behind the token; '' without one."""
        if self.record.token and self.record.token not in self.hub.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(self.record.token, "")

    # ---- in and out

    def _read_body(self) -> bytes:
        if self._body is None:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                self._body = b"".join(parts)
            else:
                self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self._body

    def _json(self) -> Any:
        return json.loads(self._read_body() or b"{}")

    def reply(self, status: int, headers: Mapping[str, str] | None = None, payload: object = None) -> None:
        """A small answer in JSON; without a payload, one without a body."""
        self._read_body()
        body = b"" if payload is None else json.dumps(payload).encode()
        self.record.status = status
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.record.sent += len(body)

    def _send_content(self, path: Path, headers: Mapping[str, str]) -> None:
        """A file's bytes, or the range that was asked for, with what the fault does to them."""
        fault = self.fault or Fault("")
        size = path.stat().st_size - fault.shorter
        start, stop = 0, size
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.record.range):
            start, stop = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
            if start >= size:
                self.reply(416, {"Content-Range": f"bytes */{size}"})
                return
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self.record.status = 206 if self.record.range else 200
        self.send_response(self.record.status)
        for name, value in {"Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as stream:
            stream.seek(start)
            self._pour(stream.read, start, stop, fault)

    def _pour(self, read: Callable[[int], bytes], start: int, stop: int, fault: Fault) -> None:
        place = start
        while place < stop:
            piece = bytearray(read(min(PIECE_BYTES, stop - place)))
            if fault.flip is not None and place <= fault.flip < place + len(piece):
                piece[fault.flip - place] ^= 0x10
            if fault.cut_after is not None and place - start + len(piece) > fault.cut_after:
                self.wfile.write(piece[: fault.cut_after - (place - start)])
                self.wfile.flush()
                self.record.sent += fault.cut_after - (place - start)
                self.connection.shutdown(2)
                raise _Answered
            time.sleep(fault.pause)
            self.wfile.write(piece)
            self.record.sent += len(piece)
            place += len(piece)

    # ---- what is asked

    def _route(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {url.path}"):
                method(self, query, **{name: unquote(text or "") for name, text in found.groupdict().items()})
                return
        raise Refused(404, message=f"this Hub knows no {self.record.line}")

    def _repo(self, repo_id: str, *, write: bool = False, content: bool = False) -> Repo:
        """The repository, where this user may do that; what the Hub answers otherwise."""
        repo, user = self.hub.store.repos.get(repo_id), self.user
        hidden = repo is not None and repo.private and user != repo.owner and user not in repo.readers
        if repo is None or hidden:
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated and user != repo.owner and user not in repo.readers:
            message = f"Access to model {repo_id} is restricted. Visit {self.hub.endpoint}/{repo_id} to ask for access."
            raise Refused(403 if user else 401, "GatedRepo", message)
        if write and user != repo.owner:
            raise Refused(403 if user else 401, message="You don't have the rights to write here")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.commit_at(revision or MAIN)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def whoami(self, query: Query) -> None:
        if not self.user:
            raise Refused(401, message="Invalid username or password.")
        self.reply(200, None, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def model_info(self, query: Query, repo: str, revision: str = "") -> None:
        found = self._repo(repo)
        commit = self._commit(found, revision)
        blobs = "blobs" in query
        siblings = [self._sibling(path, blob, blobs) for path, blob in sorted(commit.files.items())]
        fields = {"id": repo, "modelId": repo, "sha": commit.sha, "private": found.private, "tags": []}
        gated = "manual" if found.gated else False
        self.reply(200, None, {**fields, "author": found.owner, "gated": gated, "siblings": siblings})

    def _sibling(self, path: str, blob: Blob, blobs: bool) -> dict[str, object]:
        if not blobs:
            return {"rfilename": path}
        lfs = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        facts = {"rfilename": path, "size": blob.size, "blobId": self.hub.store.oid(blob)}
        return {**facts, "lfs": lfs} if blob.lfs else facts

    def _entry(self, path: str, blob: Blob) -> dict[str, object]:
        facts = {"type": "file", "path": path, "size": blob.size, "oid": self.hub.store.oid(blob)}
        lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        return {**facts, "lfs": lfs} if blob.lfs else facts

    def tree(self, query: Query, repo: str, revision: str, folder: str = "") -> None:
        files = self._commit(self._repo(repo), revision).files
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(prefix)}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, object]] = {}
        for path, blob in inside.items():
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    oid = hashlib.sha1(name.encode()).hexdigest()
                    entries[name] = {"type": "directory", "path": name, "size": 0, "oid": oid}
            if recursive or len(parts) == 1:
                entries[path] = self._entry(path, blob)
        first = int(query.get("cursor", ["0"])[0])
        last = first + self.hub.page_length
        headers = {}
        if last < len(entries):
            there = self.path.partition("?")[0]
            headers["Link"] = f'<{self.hub.endpoint}{there}?recursive={recursive}&cursor={last}>; rel="next"'
        self.reply(200, headers, list(entries.values())[first:last])

    def paths_info(self, query: Query, repo: str, revision: str) -> None:
        files = self._commit(self._repo(repo), revision).files
        wanted = parse_qs(self._read_body().decode()).get("paths", [])
        found: list[dict[str, object]] = [self._entry(path, files[path]) for path in wanted if path in files]
        folders = [path for path in wanted if any(name.startswith(f"{path}/") for name in files)]
        self.reply(200, None, found + [{"type": "directory", "path": path, "size": 0, "oid": "0"} for path in folders])

    def refs(self, query: Query, repo: str) -> None:
        found = self._repo(repo)
        pulls = [{"name": p.ref, "ref": p.ref, "targetCommit": found.refs[p.ref]} for p in found.pulls.values()]
        names = [name for name in found.refs if not name.startswith("refs/")]
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": found.refs[n]} for n in names]
        self.reply(200, None, {"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})

    def commits(self, query: Query, repo: str, revision: str) -> None:
        found = self._repo(repo)
        self._commit(found, revision)
        shas = [sha for ref, sha in reversed(found.log) if ref in (revision, MAIN)]
        listed = [{"id": s, "title": found.commits[s].title, "message": "", "date": DATE, "authors": []} for s in shas]
        self.reply(200, None, listed)

    def resolve(self, query: Query, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo, content=True)
        commit = self._commit(found, revision)
        blob = commit.files.get(path)
        if blob is None:
            self._read_body()
            head = {"X-Repo-Commit": commit.sha, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.reply(404, head, {"error": "Entry not found"})
            return
        changed = f"{self.fault.etag}{blob.sha256[:8]}" if self.fault and self.fault.etag else ""
        etag = f'"{changed or (blob.sha256 if blob.lfs else self.hub.store.oid(blob))}"'
        head = {"X-Repo-Commit": commit.sha, "ETag": etag}
        if not blob.lfs:
            self._send_content(self.hub.store.path(blob.sha256), head)
            return
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-Etag": etag}
        place = f"{self.hub.cdn}/cdn/{blob.sha256}?path={quote(path, safe='')}&signature=1"
        self.reply(302, {**head, **linked, "Location": place})

    def cdn(self, query: Query, digest: str) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, message="Only one auth mechanism allowed")
        self._send_content(self.hub.store.path(digest), {"ETag": f'"{digest}"'})

    # ---- what is written

    def create_repo(self, query: Query) -> None:
        asked, user = self._json(), self.user
        if not user:
            raise Refused(401, message="Invalid username or password.")
        owner = asked.get("organization") or user
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if owner != user:
            raise Refused(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        with self.hub.store.lock:
            if repo_id in self.hub.store.repos:
                self.reply(409, None, {"error": "You already created this model repo", "url": url})
                return
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.store.create(repo_id, owner=owner, private=private)
        self.reply(200, None, {"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self, query: Query) -> None:
        self.reply(200, None, {"errors": [], "warnings": []})

    def preupload(self, query: Query, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        files = self._commit(found, revision).files
        modes = []
        for asked in self._json()["files"]:
            path, blob = asked["path"], files.get(asked["path"])
            mode = "lfs" if is_large(path, asked["size"]) else "regular"
            oid = None if blob is None else blob.sha256 if blob.lfs else self.hub.store.oid(blob)
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, None, {"files": modes})

    def lfs_batch(self, query: Query, repo: str) -> None:
        self._repo(repo, write=True)
        objects = []
        for asked in self._json()["objects"]:
            oid, size = asked["oid"], asked["size"]
            told: dict[str, object] = {"oid": oid, "size": size}
            if not self.hub.store.has(oid, size):
                verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"}
                told["actions"] = {"upload": self._upload_action(repo, oid, size), "verify": verify}
            objects.append(told)
        self.reply(200, None, {"transfer": "basic", "objects": objects})

    def _upload_action(self, repo: str, oid: str, size: int) -> dict[str, object]:
        if size <= PART_BYTES:
            return {"href": f"{self.hub.cdn}/upload/{oid}"}
        count = -(-size // PART_BYTES)
        parts = {str(n): f"{self.hub.cdn}/upload/{oid}/{n}" for n in range(1, count + 1)}
        href = f"{self.hub.endpoint}/{repo}.git/info/lfs/complete"
        return {"href": href, "header": {"chunk_size": str(PART_BYTES), **parts}}

    def upload(self, query: Query, digest: str, part: str = "") -> None:
        if self.fault and self.fault.cut_after is not None:
            self.rfile.read(self.fault.cut_after)
            self.connection.shutdown(2)
            raise _Answered
        content = self._read_body()
        if part:
            self.hub.store.path(f"{digest}.part{part}").write_bytes(content)
        elif hashlib.sha256(content).hexdigest() != digest:
            raise Refused(400, message="the content has another SHA-256")
        else:
            self.hub.store.put(content)
        self.reply(200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def complete(self, query: Query, repo: str) -> None:
        asked = self._json()
        store, digest = self.hub.store, asked["oid"]
        parts = [store.path(f"{digest}.part{part['partNumber']}") for part in asked["parts"]]
        whole = store.path(f"{digest}.whole")
        with whole.open("wb") as out:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, out)
                part.unlink()
        if hashlib.sha256(whole.read_bytes()).hexdigest() != digest:
            raise Refused(400, message="the content has another SHA-256")
        whole.rename(store.path(digest))
        self.reply(200, None, {})

    def verify(self, query: Query, repo: str) -> None:
        asked = self._json()
        if not self.hub.store.has(asked["oid"], asked["size"]):
            raise Refused(404, message="not uploaded")
        self.reply(200, None, {})

    def commit(self, query: Query, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        current = self._commit(found, revision)
        lines = [json.loads(line) for line in self._read_body().splitlines() if line]
        added: dict[str, Blob] = {}
        deleted: list[str] = []
        title, parent = "", None
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title, parent = value["summary"], value.get("parentCommit")
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                added[value["path"]] = Blob(self.hub.store.put(content), len(content), False)
            elif line["key"] == "lfsFile":
                if not self.hub.store.has(value["oid"]):
                    raise Refused(400, message=f"{value['path']}: the LFS object was not uploaded")
                size = self.hub.store.path(value["oid"]).stat().st_size
                added[value["path"]] = Blob(value["oid"], size, True)
            else:
                deleted.append(value["path"].rstrip("/") + "/" * (line["key"] == "deletedFolder"))
        if parent is not None and parent != current.sha:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        answer: dict[str, object] = {"success": True}
        ref = revision
        if "create_pr" in query:
            pull = self.hub.store.open_pull(found, title, status="open")
            ref = pull.ref
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{pull.num}"
        elif ref not in found.refs:
            raise Refused(400, message=f"{revision} is no branch")
        made = self.hub.store.commit(found, added, deleted, ref=ref, title=title)
        url = f"{self.hub.endpoint}/{repo}/commit/{made.sha}"
        self.reply(200, None, {**answer, "commitUrl": url, "commitOid": made.sha})

    # ---- pull requests

    def _pull(self, repo: Repo, num: str) -> Pull:
        pull = repo.pulls.get(int(num))
        if pull is None:
            raise Refused(404, message="Discussion not found")
        return pull

    def _discussion(self, repo: Repo, pull: Pull) -> dict[str, object]:
        return {
            "num": pull.num,
            "title": pull.title,
            "status": pull.status,
            "isPullRequest": True,
            "createdAt": DATE,
            "author": {"name": repo.owner},
            "repo": {"name": repo.id, "type": "model"},
            "events": [],
            "changes": {"base": f"refs/heads/{MAIN}", "mergeCommitId": pull.merge_commit},
            "filesWithConflicts": [],
            "diff": "",
        }

    def discussions(self, query: Query, repo: str) -> None:
        found = self._repo(repo)
        wanted = query.get("status", ["all"])[0]
        states = {"open": ("open", "draft"), "closed": ("closed", "merged")}.get(wanted)
        listed = [self._discussion(found, p) for p in found.pulls.values() if states is None or p.status in states]
        self.reply(200, None, {"count": len(listed), "start": 0, "discussions": listed})

    def open_discussion(self, query: Query, repo: str) -> None:
        found, asked = self._repo(repo, write=True), self._json()
        if not asked.get("pullRequest"):
            raise Refused(400, message="this Hub has pull requests alone")
        if repo in self.hub.without_pulls:
            raise Refused(403, message="Discussions are disabled for this repo.")
        pull = self.hub.store.open_pull(found, asked["title"])
        self.reply(200, None, {"num": pull.num, "url": f"{self.hub.endpoint}/{repo}/discussions/{pull.num}"})

    def discussion(self, query: Query, repo: str, num: str) -> None:
        found = self._repo(repo)
        self.reply(200, None, self._discussion(found, self._pull(found, num)))

    def set_status(self, query: Query, repo: str, num: str) -> None:
        found = self._repo(repo, write=True)
        pull, status = self._pull(found, num), self._json()["status"]
        if pull.status == "merged":
            raise Refused(400, message="it is merged")
        pull.status = status
        event = {"id": "e1", "type": "status-change", "createdAt": DATE, "author": {"name": self.user}}
        self.reply(200, None, {"newStatus": {**event, "data": {"status": status}}})

    def merge(self, query: Query, repo: str, num: str) -> None:
        found = self._repo(repo, write=True)
        self.hub.store.merge(found, self._pull(found, num))
        self.reply(200, None, {})


_R = r"(?P<repo>(datasets/)?[\w.-]+/[\w.-]+)"  # a dataset is kept under its name with datasets/ before it
_READ = rf"/api/(models/|(?=datasets/)){_R}"
_ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create_repo),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"GET {_READ}", Handler.model_info),
    (rf"GET {_READ}/revision/(?P<revision>[^/]+)", Handler.model_info),
    (rf"GET {_READ}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", Handler.tree),
    (rf"POST {_READ}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (rf"GET {_READ}/refs", Handler.refs),
    (rf"GET /api/models/{_R}/commits/(?P<revision>[^/]+)", Handler.commits),
    (rf"POST /api/models/{_R}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (rf"POST /api/models/{_R}/commit/(?P<revision>[^/]+)", Handler.commit),
    (rf"GET /api/models/{_R}/discussions", Handler.discussions),
    (rf"POST /api/models/{_R}/discussions", Handler.open_discussion),
    (rf"GET /api/models/{_R}/discussions/(?P<num>\d+)", Handler.discussion),
    (rf"POST /api/models/{_R}/discussions/(?P<num>\d+)/status", Handler.set_status),
    (rf"POST /api/models/{_R}/discussions/(?P<num>\d+)/merge", Handler.merge),
    (rf"POST /{_R}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (rf"POST /{_R}\.git/info/lfs/verify", Handler.verify),
    (rf"POST /{_R}\.git/info/lfs/complete", Handler.complete),
    (r"PUT /upload/(?P<digest>[0-9a-f]{64})(/(?P<part>\d+))?", Handler.upload),
    (rf"(GET|HEAD) /{_R}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (r"(GET|HEAD) /cdn/(?P<digest>[0-9a-f]{64})", Handler.cdn),
)
