"""What is asked of the Hub about a repository that is read: its files, ranges of them, whole files.

All of it goes through huggingface_hub: login, HF_ENDPOINT, HF_HUB_OFFLINE, the cache and its layout are its own.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fp4conv.errors import SourceError
from fp4conv.hub.failures import explained, is_transient
from fp4conv.hub.names import HubName, is_commit, stays_inside
from fp4conv.model import Pinned, RemoteFile

# Seconds between attempts, on top of what huggingface_hub tries itself: a conversion of hours outlives a hiccup.
PAUSES = (1.0, 4.0, 15.0, 60.0)
_UNTRUSTED = "Do not trust this repository, or HF_ENDPOINT. A copy that you have checked can be given as a folder."
_CHUNK = 1 << 20
_Found = TypeVar("_Found")


class Stopped(BaseException):
    """Leaves a download in the middle, raised by its `on_bytes`.

    No Exception: nothing on the way may take it for a failure of the Hub.
    """


def pin(name: HubName, commit: str | None = None) -> Pinned:
    """The repository at the commit that its revision stands for now, or at `commit`, with its list of files.

    One request; with HF_HUB_OFFLINE none: then it is what the cache has. SourceError says what is wrong.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _pin_in_cache(name, commit)
    with explained(name.repo, name.text):
        info = patiently(
            lambda: HfApi().model_info(name.repo, revision=commit or name.revision, files_metadata=True), first=True
        )
    if not is_commit(info.sha or ""):
        raise SourceError(f"the Hub calls its commit {ascii(info.sha)[:100]}", where=name.text, hint=_UNTRUSTED)
    assert info.sha is not None, "it is a commit"
    if commit is None:
        _remember(name, info.sha)
    files = {
        file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or ()
    }
    return _pinned(name, info.sha, files)


def dataset_commit(repo: str, revision: str) -> str | None:
    """The commit that `revision` of the dataset `repo` stands for now; None with HF_HUB_OFFLINE.

    One request. SourceError says what is wrong.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    with explained(f"datasets/{repo}", repo):
        info = patiently(lambda: HfApi().dataset_info(repo, revision=revision), first=True)
    if not is_commit(info.sha or ""):
        raise SourceError(f"the Hub calls its commit {ascii(info.sha)[:100]}", where=repo, hint=_UNTRUSTED)
    return info.sha


def _pinned(name: HubName, commit: str, files: dict[str, RemoteFile]) -> Pinned:
    for path in files:
        if not stays_inside(path):
            found = f"its list of files has {ascii(path)[:200]}, which is no name for a file inside a repository"
            raise SourceError(found, where=name.text, hint=_UNTRUSTED)
    prefix = f"{name.folder}/" if name.folder else ""
    inside = {path.removeprefix(prefix): file for path, file in files.items() if path.startswith(prefix)}
    if not inside:
        folders = sorted({path.rpartition("/")[0] for path in files} - {""})
        hint = f"It has {', '.join(folders[:8])}." if folders else "It has no folders."
        raise SourceError(f"there is no folder {name.folder!r} in this repository", where=name.text, hint=hint)
    return Pinned(name.repo, commit, name.revision, name.folder, inside)


# ---- the cache


def cache_folder(repo: str) -> Path:
    """Where huggingface_hub keeps a model's blobs, snapshots and refs."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def snapshot_folder(pinned: Pinned) -> Path:
    """Where the cache has, or will have, the files."""
    return cache_folder(pinned.repo) / "snapshots" / pinned.commit / pinned.folder


def in_cache(pinned: Pinned, name: str) -> Path | None:
    """The file in the cache; None where it is not, or not whole."""
    path = snapshot_folder(pinned) / name
    try:
        whole = path.stat().st_size == pinned.files[name].nbytes
    except OSError:
        return None
    return path if whole else None


def _pin_in_cache(name: HubName, commit: str | None) -> Pinned:
    folder = cache_folder(name.repo)
    if commit is None and is_commit(name.revision):
        commit = name.revision
    try:
        commit = commit or (folder / "refs" / name.revision).read_text().strip()
        root = folder / "snapshots" / commit
        paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    except OSError:
        paths = []
    if not paths or commit is None:
        hint = f"The cache is {folder.parent}. Unset HF_HUB_OFFLINE to download it."
        raise SourceError("HF_HUB_OFFLINE is set, and this is not in the cache", where=name.text, hint=hint)
    return _pinned(name, commit, {path.relative_to(root).as_posix(): RemoteFile(path.stat().st_size) for path in paths})


def _remember(name: HubName, commit: str) -> None:
    """Note in the cache what the revision stands for, as huggingface_hub does: HF_HUB_OFFLINE looks there."""
    path = cache_folder(name.repo) / "refs" / name.revision
    try:
        if commit != name.revision and (not path.is_file() or path.read_text() != commit):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit)
    except OSError:  # a cache that cannot be written to: the download will say so where it matters
        return


# ---- bytes


def patiently(ask: Callable[[], _Found], *, first: bool = False) -> _Found:
    """`ask()`, again after a while where the Hub or the network has a hiccup; the last error as it is.

    `first`: nothing has been asked before. Whoever has no network then wants to know, and not wait for it.
    """
    for pause in PAUSES:
        try:
            return ask()
        except Exception as error:
            if not is_transient(error) or (first and type(error).__name__ == "ConnectError"):
                raise
            time.sleep(pause)
    return ask()


def read_range(pinned: Pinned, name: str, start: int, stop: int) -> bytes:
    """Bytes start:stop of a file, by one request; SourceError when the Hub has another size or does not answer."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(pinned.repo, pinned.path(name), revision=pinned.commit)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

    def ask() -> bytes:
        got = bytearray()
        with http_stream_backoff("GET", url, headers=headers, max_retries=0, follow_redirects=True) as response:
            hf_raise_for_status(response)
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if total.isdigit() and int(total) != pinned.files[name].nbytes:
                raise _other_size(pinned, name, int(total))
            if response.status_code == 200 and start:
                hint = "Is there a proxy between? Download the repository first: hf download " + pinned.repo
                raise SourceError("the server sends whole files where a part was asked for", where=name, hint=hint)
            for piece in response.iter_bytes():
                got += piece
                if len(got) >= stop - start:
                    break
        return bytes(got[: stop - start])

    with explained(pinned.repo, f"{pinned.repo}: {name}"):
        found = patiently(ask)
    if len(found) != stop - start:
        raise _other_size(pinned, name, start + len(found))
    return found


def download(
    pinned: Pinned,
    name: str,
    *,
    folder: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Path:
    """The whole file, in the cache or (`folder`) below that folder: its size and SHA-256 are what the Hub says.

    `on_bytes` is told of bytes as they come; what it raises stops the download. A file with the wrong content is
    removed, asked for once more, and then an error.
    """
    path = in_cache(pinned, name)
    if path is not None:
        return path
    for last in (False, True):
        path = _download_once(pinned, name, folder, on_bytes)
        found = _fault_of(path, pinned.files[name])
        if not found:
            return path
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        if last:
            hint = "A proxy or mirror may be at fault (HF_ENDPOINT). Run the same command again."
            raise SourceError(found, where=f"{pinned.repo}: {name}", hint=hint)
    raise AssertionError("the loop returns or raises")


def _download_once(pinned: Pinned, name: str, folder: Path | None, on_bytes: Callable[[int], None] | None) -> Path:
    from huggingface_hub import hf_hub_download

    from fp4conv.hub.meter import meter_class

    counted = 0

    def count(nbytes: int) -> None:
        nonlocal counted
        fresh = min(counted + nbytes, pinned.files[name].nbytes) - counted  # a download that began anew counts once
        counted += fresh
        if on_bytes is not None:
            on_bytes(fresh)

    def ask() -> str:
        return hf_hub_download(
            pinned.repo,
            pinned.path(name),
            revision=pinned.commit,
            local_dir=folder,
            tqdm_class=meter_class(count),
        )

    with explained(pinned.repo, f"{pinned.repo}: {name}"):
        path = Path(patiently(ask))
    count(pinned.files[name].nbytes)
    return path


def _fault_of(path: Path, expected: RemoteFile) -> str:
    """What is wrong with a file that came down; '' where nothing is."""
    found = path.stat().st_size
    if found != expected.nbytes:
        return f"what came down has {found:,} bytes, the Hub said {expected.nbytes:,}"
    if expected.sha256 is None:
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected.sha256:
        return f"what came down has the SHA-256 {digest.hexdigest()[:12]}..., the Hub said {expected.sha256[:12]}..."
    return ""


def _other_size(pinned: Pinned, name: str, found: int) -> SourceError:
    return SourceError(
        f"it has {found:,} bytes there, its list of files says {pinned.files[name].nbytes:,}",
        where=f"{pinned.repo}: {name}",
        hint="A proxy or mirror may be at fault (HF_ENDPOINT). Run the same command again.",
    )
