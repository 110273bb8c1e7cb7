"""Names of repositories as users write them: org/name, org/name@revision, hf://org/name@revision/folder."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from urllib.parse import unquote

from fp4conv.errors import SourceError

SCHEME = "hf://"
MAIN = "main"
_PART = r"[A-Za-z0-9][\w.-]*"
_PLAIN = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>[^@\s]+))?")
# A revision of pull requests and conversions has slashes of its own; another that has them writes them as %2F.
_WITH_SCHEME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>refs/(pr|convert)/[^/@\s]+|[^/@\s]+))?(/(?P<folder>.+))?"
)
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")


_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str) -> bool:
    """Whether it is the name of a commit, which never changes, and not of a branch or tag."""
    return _COMMIT.fullmatch(revision) is not None


def stays_inside(path: str) -> bool:
    """Whether a path with slashes leads to a place below the folder that it is joined to, on any system."""
    if "\\" in path or any(unicodedata.category(char) in ("Cc", "Cs") for char in path):  # controls, half characters
        return False
    return not any(part in ("", ".", "..") for part in path.split("/"))


@dataclass(frozen=True)
class HubName:
    """A folder of a repository ('' is its top) at a revision, and the text that named it."""

    text: str
    repo: str
    revision: str = MAIN
    folder: str = ""


def parse_name(text: str) -> HubName | None:
    """The repository that `text` names; None where it can only be a path. SourceError for a malformed hf:// name."""
    if not text.startswith(SCHEME):
        found = _PLAIN.fullmatch(text)
        if found is None:
            return None
        return HubName(text, found["repo"], _checked(found["revision"] or MAIN, text))
    rest = text.removeprefix(SCHEME).strip("/")
    hint = "Write it like hf://org/name, hf://org/name@revision or hf://org/name@revision/folder."
    if rest.startswith(tuple(f"{kind}/" for kind in _OTHER_KINDS)):
        raise SourceError("is no repository of a model", where=text, hint=hint)
    found = _WITH_SCHEME.fullmatch(rest.removeprefix("models/"))
    folder = (found["folder"] or "") if found else ""
    if found is None or (folder and not stays_inside(folder)):
        raise SourceError("is not the name of a repository on the Hub", where=text, hint=hint)
    return HubName(text, found["repo"], _checked(unquote(found["revision"] or MAIN), text), folder)


def _checked(revision: str, text: str) -> str:
    if not stays_inside(revision):
        hint = "It is the name of a branch, a tag or a commit, as in org/name@main."
        raise SourceError(f"{revision!a} is no revision", where=text, hint=hint)
    return revision
