"""A dataset on the Hub: how it is named, the commit that a run keeps to, and its rows.

Where the Hub does not answer, the datasets library takes the newest copy in its cache, whatever commit was asked for:
here that is an error. What a row means, and which split is for what, is `rows`' and `data`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.errors import SourceError, UsageError
from fp4conv.hub.client import dataset_commit
from fp4conv.hub.names import MAIN, is_commit, stays_inside

if TYPE_CHECKING:
    from fp4conv.qat.settings import Settings

SCHEME = "hf://datasets/"
_INSTEAD = "give a JSONL or parquet file, a folder of them, or a dataset of the Hub: org/name or org/name@revision"
_NAME = re.compile(r"(?P<repo>([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s]+))?")
_SUFFIX = re.compile(r"\.[A-Za-z]\w*")  # of a file; a name may end in a version: org/name-v1.0


@dataclass(frozen=True)
class HubData:
    """`repo`: 'org/name', or 'name' of the few that have no owner."""

    repo: str
    revision: str = MAIN

    @property
    def key(self) -> str:
        """What the journal calls it, beside models."""
        return f"datasets/{self.repo}@{self.revision}"


def hub_data(text: str) -> HubData:
    """The dataset that `text` names, as org/name or org/name@revision. UsageError where it can only be a path."""
    found = _NAME.fullmatch(text.removeprefix(SCHEME))
    is_file = found is not None and found["revision"] is None and _SUFFIX.fullmatch(Path(text).suffix)
    if found is None or is_file or not stays_inside(found["revision"] or MAIN):
        raise UsageError("there is no such file or folder", where=text, hint=_INSTEAD)
    return HubData(found["repo"], found["revision"] or MAIN)


def pin_dataset(settings: Settings, pins: dict[str, str]) -> Settings:
    """`settings` with the commit of a Hub dataset in its name: that of `pins`, or the one of now, which is added.

    Without a network (HF_HUB_OFFLINE) the commit is that of the cache; where that has none, nothing changes. Raises
    UsageError or SourceError for a dataset that is not there.
    """
    text = str(settings.dataset)
    if _is_here(text):
        return settings
    named = hub_data(text)
    try:
        commit = pins.get(named.key) or dataset_commit(named.repo, named.revision)
    except SourceError as error:
        raise SourceError(
            f"is no file or folder, and cannot be had from the Hub: {error.what}", where=text, hint=error.hint
        ) from error
    commit = commit or read_hub(named, settings.subset)[1]
    if commit is None:
        return settings
    pins[named.key] = commit
    return replace(settings, dataset=f"{named.repo}@{commit}")


def read_hub(named: HubData, subset: str | None) -> tuple[Mapping[str, Iterable[Mapping[str, object]]], str | None]:
    """(split -> rows, the commit that they are of, where the library tells it)."""
    from datasets import load_dataset

    try:
        splits = load_dataset(named.repo, subset, revision=None if named.revision == MAIN else named.revision)
        found = _commit_of(next(iter(splits.values())))
    except Exception as error:
        # The libraries beneath raise nearly anything for a name that is not there, or without a network.
        raise SourceError(
            f"is no file or folder, and cannot be had from the Hub: {_first_line(error)}",
            where=named.repo,
            hint=_INSTEAD,
        ) from error
    if is_commit(named.revision) and found not in (None, named.revision):
        raise SourceError(
            f"the Hub does not give its commit {named.revision[:12]}, and the cache has {str(found)[:12]}",
            where=named.repo,
            hint="see that the Hub can be reached, and that HF_HUB_OFFLINE is not set; then run the same command again",
        )
    return splits, found


def _is_here(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:
        return False  # a name that the system does not take


def _commit_of(split: object) -> str | None:
    """The library keeps a split in a folder that has the name of its commit."""
    files = [str(entry["filename"]) for entry in getattr(split, "cache_files", ())]
    commit = Path(files[0]).parent.name if files else ""
    return commit if is_commit(commit) else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
