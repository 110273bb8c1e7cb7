"""What it means when the Hub, the network or the disk says no: what happened, and what to do next.

One place, so that reading, downloading and publishing explain the same refusal in the same words.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

from fp4conv.errors import Fp4convError, SourceError

_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
Refusal = TypeVar("Refusal", bound=Fp4convError)
Words: TypeAlias = tuple[str, str]  # what was found, and what to do


@contextmanager
def explained(repo: str, where: str | None = None, kind: type[Fp4convError] = SourceError) -> Iterator[None]:
    """Around calls of huggingface_hub about `repo`: its errors leave as `kind`, ours as they are."""
    try:
        yield
    except Fp4convError:
        raise
    except Exception as error:  # the client, its HTTP library and xet have a family of errors each
        raise explain(error, repo, where or repo, kind) from error


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    if error.__cause__ is not None and _only_wraps(error):
        return is_transient(error.__cause__)
    return _is_network(error) or _sizes(error) is not None


def explain(error: BaseException, repo: str, where: str, kind: type[Refusal]) -> Refusal:
    """`error` in words: what was found about `repo`, and the next thing to try."""
    while error.__cause__ is not None and _only_wraps(error):
        error = error.__cause__
    found, hint = _of_repository(error, repo) or _of_answer(error) or _of_machine(error)
    return kind(found, where=where, hint=hint)


def _of_repository(error: BaseException, repo: str) -> Words | None:
    """What the Hub refuses by a name of its own."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return (
            "access to this repository is restricted (gated)",
            f"Accept its terms at {endpoint}/{repo}, then log in with an account that has: hf auth login\n"
            "  (or put that account's token in HF_TOKEN), and run the same command again.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision", f"See its branches, tags and commits: {endpoint}/{repo}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no such folder, and no such repository at {endpoint}, or your login may not see it",
            "Is it spelled right? A private repository needs a login that may see it: hf auth login, or HF_TOKEN.",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set, and this is not in the cache",
            "Unset HF_HUB_OFFLINE, or download it while there is a network.",
        )
    return None


def _of_answer(error: BaseException) -> Words | None:
    """Any other answer than that all is well."""
    status = _status(error)
    if status is None:
        return None
    message = " ".join(str(getattr(error, "server_message", None) or "").split())[:200]
    found = f"the Hub answers {status}" + (f" ({message})" if message else "")
    if status in _HINTS:
        return found, _HINTS[status]
    if status in _TRANSIENT:
        return found, "The Hub has a problem: run the same command again a little later."
    return found, "Run the same command again; https://status.huggingface.co says whether the Hub is well."


_HINTS = {
    401: "Your token is not valid (any more): hf auth login, or mend or unset HF_TOKEN.",
    403: "Use a token that has the right to do this: hf auth login, or HF_TOKEN.",
    429: "Too many requests for now: run the same command again in a few minutes. With a login more are allowed.",
}


def _of_machine(error: BaseException) -> Words:
    """The network, the disk, or the client itself."""
    from huggingface_hub import constants

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            "the disk is full: the download stopped",
            f"Free some space. The cache may be on another disk: HF_HUB_CACHE (now {constants.HF_HUB_CACHE}); with\n"
            "  --stream it takes no copy, and --max-disk bounds what lies beside DST. The same command goes on.",
        )
    if _is_network(error):
        return (
            f"{constants.ENDPOINT} cannot be reached: {_one_line(error)}",
            "Check the connection and HF_ENDPOINT. What is in the cache already can be used with HF_HUB_OFFLINE=1.",
        )
    sizes = _sizes(error)
    if sizes is not None:
        return (
            f"what came down has {int(sizes[1]):,} bytes, the Hub said {int(sizes[0]):,}",
            "A proxy may have cut it short. Run the same command again.",
        )
    return (
        f"the Hub's client failed: {type(error).__name__}: {_one_line(error)}",
        "Run the same command again; what is done is kept.",
    )


def _only_wraps(error: BaseException) -> bool:
    """Whether its cause is what happened: the client says 'not in the cache' and 'error while uploading' about it."""
    return type(error).__name__ in ("LocalEntryNotFoundError", "RuntimeError")


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_network(error: BaseException) -> bool:
    """By name: huggingface_hub 1 stands on httpx, 2 on httpx2, and neither gives its errors a name of its own."""
    return isinstance(error, ConnectionError) or any(
        found.__name__ in ("TransportError", "StreamError") for found in type(error).__mro__
    )


def _sizes(error: BaseException) -> tuple[str, str] | None:
    """(bytes promised, bytes that came), where that is what huggingface_hub complains about."""
    found = re.search(r"should be of size (\d+) but has size (\d+)", str(error))
    return (found[1], found[2]) if found else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
