"""Compiles kernels with Numba, and keeps the machine code between runs in a folder that is safe to read.

Numba alone refuses, at import, to cache a package in a read-only place for a user without a writable
home, raises when the disk is full, and does not notice a change in a helper of another file. Here the
folder is looked for at the first call of a kernel, every failure of the cache means compiling instead,
and an entry is fresh only for the exact text of all kernel sources.

The index files of Numba are pickles: reading one runs what it says. So a folder that another user could
write to is refused, except the one that the user names in NUMBA_CACHE_DIR.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache, _CacheLocator

Function = TypeVar("Function", bound=Callable[..., object])

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}
_kernels: list[object] = []  # every dispatcher made by `kernel`, for `is_cold` and the tests
_failures: list[str] = []


def kernel(function: Function) -> Function:
    """Compile `function` for the types of its first call; load it from the cache when it is there."""
    dispatcher = numba.njit(**_OPTIONS)(function)
    if hasattr(dispatcher, "_cache"):  # not when NUMBA_DISABLE_JIT hands back the function itself
        dispatcher._cache = _LazyCache(function)
        _kernels.append(dispatcher)
    return cast(Function, dispatcher)


def device(function: Function) -> Function:
    """Compile `function` into the kernels that call it; it has no cache entry of its own."""
    return cast(Function, numba.njit(forceinline=True, **_OPTIONS)(function))


def helper(function: Function) -> Function:
    """Compile `function` once for all its callers, to be called from kernels; it has no cache entry either."""
    return cast(Function, numba.njit(**_OPTIONS)(function))


def cache_note() -> str | None:
    """One sentence for the user when machine code is not kept between runs, else None."""
    folder, why_not = _cache_folder()
    if folder is None:
        return f"compiled kernels are not kept between runs: {why_not}; set NUMBA_CACHE_DIR to a folder of yours"
    if _failures:
        return f"compiled kernels could not be kept in {folder}: {_failures[0]}"
    return None


def is_cold() -> bool:
    """Whether no kernel of these sources was compiled yet, in this process or, kept in the cache, in an earlier one."""
    if any(cast(Any, dispatcher).signatures for dispatcher in _kernels):
        return False
    folder = _cache_folder()[0]
    return folder is None or not any(_entries(folder).glob(f"*.py{sys.version_info[0]}{sys.version_info[1]}*.nbi"))


class _LazyCache(NullCache):  # type: ignore[misc]
    """Numba's function cache, made at first use; any failure of it counts as a miss."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    @functools.cached_property
    def _files(self) -> FunctionCache | None:
        if _cache_folder()[0] is None:
            return None
        try:
            return _FolderCache(self._function)
        except (OSError, RuntimeError) as error:
            _failures.append(str(error))
            return None

    @property
    def cache_path(self) -> str | None:
        return None if self._files is None else str(self._files.cache_path)

    def _readable(self) -> bool:
        try:
            self._files._cache_file._load_index()  # type: ignore[union-attr]
        except Exception:  # noqa: BLE001 -- whatever reading a damaged index raises, it is replaced
            return False
        return True

    def load_overload(self, sig: object, target_context: object) -> object | None:
        if self._files is None:
            return None
        try:
            return cast("object | None", self._files.load_overload(sig, target_context))
        except Exception:  # noqa: BLE001 -- whatever a damaged file raises, compiling again mends it
            return None

    def save_overload(self, sig: object, data: object) -> None:
        if self._files is None:
            return
        try:
            if not self._readable():
                self._files.flush()
            self._files.save_overload(sig, data)
        except OSError as error:  # a full disk or a quota must not end a conversion
            _failures.append(str(error))


class _SourcesLocator(_CacheLocator):  # type: ignore[misc]
    """Puts entries in our folder, stamped with the text of every kernel source."""

    def __init__(self, function: Callable[..., object]) -> None:
        folder = _cache_folder()[0]
        assert folder is not None, "asked for a cache where there is none"
        self._path = _entries(folder)
        self._line = function.__code__.co_firstlineno  # type: ignore[attr-defined]

    @classmethod
    def from_function(cls, function: Callable[..., object], source: str) -> _SourcesLocator:
        locator = cls(function)
        locator.ensure_cache_path()
        return locator

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> str:
        return _sources_digest()

    def get_disambiguator(self) -> str:
        return str(self._line)


class _FolderCacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes: list[type[object]] = [_SourcesLocator]  # noqa: RUF012 -- Numba reads it from the class, and declares it so


class _FolderCache(FunctionCache):  # type: ignore[misc]
    _impl_class = _FolderCacheImpl


def _sources() -> list[Path]:
    """What compiled code is made of: these modules, and the constants of the formats."""
    here = Path(__file__).parent
    return [*sorted(here.glob("*.py")), *here.parent.glob("formats.py")]


@functools.cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def _entries(folder: Path) -> Path:
    """The folder of these sources' entries: another version of fp4conv has one beside it."""
    return folder / f"kernels-{_sources_digest()[:16]}"


# -- the folder ---------------------------------------------------------------------------------


@functools.cache
def _cache_folder() -> tuple[Path | None, str]:
    """The folder to keep machine code in, or None and the reason."""
    if len(_sources()) < 2:
        return None, "the sources of fp4conv are not plain files"
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        return _try_named(Path(named))
    reasons = []
    for candidate in _candidates():
        reason = _make_private(candidate)
        if reason is None:
            return candidate, ""
        reasons.append(reason)
    return None, "; ".join(reasons)


def _try_named(folder: Path) -> tuple[Path | None, str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return None, f"NUMBA_CACHE_DIR cannot be written ({error})"
    return folder, ""


def _candidates() -> list[Path]:
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    folders = []
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if xdg and Path(xdg).is_absolute():
        folders.append(Path(xdg) / "fp4conv")
    elif home is not None and sys.platform == "darwin":
        folders.append(home / "Library" / "Caches" / "fp4conv")
    elif home is not None:
        folders.append(home / ".cache" / "fp4conv")
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    folders.append(Path(tempfile.gettempdir()) / f"fp4conv-{user}")
    return folders


def _make_private(folder: Path) -> str | None:
    """Make `folder` with mode 0700, or check that it is ours alone. Returns why it cannot be used."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        reason = _not_private(folder)
        if reason is None:
            tempfile.TemporaryFile(dir=folder).close()
        return reason
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"


def _not_private(folder: Path) -> str | None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is not a folder"
    if not hasattr(os, "getuid"):
        return None  # Windows: the folders of a user are private by their access lists
    if found.st_uid != os.getuid():
        return f"{folder} belongs to another user"
    if found.st_mode & 0o022:
        return f"{folder} can be written by others"
    parent = folder.parent.stat()
    if parent.st_mode & 0o002 and not parent.st_mode & stat.S_ISVTX:
        return f"{folder.parent} lets others replace {folder.name}"
    return None
