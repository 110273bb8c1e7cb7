"""`push`: a finished folder as a repository on the Hub."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fp4conv.commands.publishing import Push, begin, check_repository
from fp4conv.commands.verify import verify
from fp4conv.companions import code_modules, is_companion
from fp4conv.errors import SourceError
from fp4conv.faults import Severity
from fp4conv.hints.values import FOLDER
from fp4conv.layouts import parse
from fp4conv.model import JSON
from fp4conv.publishing.card import Card, write_card
from fp4conv.publishing.card_facts import parts_of_model
from fp4conv.publishing.publication import Publication
from fp4conv.publishing.published import Published
from fp4conv.publishing.repository import CARD, Repository
from fp4conv.report.verified import Verified
from fp4conv.sources.listing import INDEX_SUFFIX
from fp4conv.sources.local import LocalSource, existing_folder
from fp4conv.version import __version__


@dataclass(frozen=True)
class Pushed:
    """What came of a push: what was found in the folder, where it is now, and the files that were left out."""

    verified: Verified
    published: Published
    left_out: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        left = (f"not published: {', '.join(self.left_out)}",) if self.left_out else ()
        return (*self.verified.warnings, *left)

    def to_json(self) -> dict[str, JSON]:
        return {
            "source": self.verified.source,
            "format": self.verified.format,
            "layout": self.verified.layout,
            "published": self.published.to_json(),
            "left_out": list(self.left_out),
            "warnings": list(self.warnings),
        }


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    on_verify: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    on_upload: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Pushed:
    """Publish the checkpoint in `folder` as `repo` on the Hub, once `verify` has found no error in it.

        fp4conv.push("my-llama-nvfp4", "my-org/my-llama-nvfp4", private=True)

    Files go to a draft pull request, which is merged when all are there. A run that was stopped goes on when called
    again. `private` counts where there is no such repository yet; `overwrite` replaces the model in it. `on_verify`
    gets the bytes that are about to be read for the check, `on_bytes` those that were, `on_upload` the bytes that the
    Hub has and those in all, `on_note` what happens meanwhile. Raises the errors of fp4conv.errors.
    """
    where = Push(repo, private, overwrite, on_bytes=on_upload, on_note=on_note)
    root = existing_folder(folder, or_hub=False)
    check_repository(where)
    verified = verify(folder, on_start=on_verify, on_bytes=on_bytes)
    _check_sound(verified)
    source = LocalSource(root, name=str(folder))
    files, left_out = _files(source)
    sizes = {file.name: file.nbytes for file in source.files}
    repository = Repository(repo, on_note=on_note)
    title = f"{verified.format.upper()} by fp4conv ({source.fingerprint()[:12]})"
    pull = begin(repository, where, title, f"fp4conv push {Path(folder).name} {repo}")
    where.note(f"publishing by {repository.url_of(pull)}")
    total = sum(sizes[name] for name in files)
    publication = Publication(repository, pull, source.root, on_sent=where.sent_of(total))
    with publication:
        publication.recognise(files)
        for file in source.files:
            if file.weights:
                publication.take(file.name, _stays)
        card = _card(source, verified, repo)
        own = source.read_bytes(CARD).decode("utf-8", "replace") if CARD in sizes else ""
        published = publication.finish(files, partial(_with_own, card, own), overwrite=overwrite)
    return Pushed(verified, published, left_out)


def _stays() -> None:
    """A folder that was given is never taken apart."""


def _check_sound(verified: Verified) -> None:
    if verified.ok:
        return
    errors = [problem for problem in verified.problems if problem.severity is Severity.ERROR]
    first = errors[0]
    raise SourceError(
        f"it has {len(errors)} error{'s' if len(errors) > 1 else ''}, so it is not published. The first: "
        f"{first.tensor or first.file or 'the folder'}: found {first.found}; expected {first.expected}",
        where=verified.source,
        hint=f"fp4conv verify {shlex.quote(verified.source)} shows them all, and what to do.",
    )


def _files(source: LocalSource) -> tuple[list[str], tuple[str, ...]]:
    """(what belongs to the checkpoint, without its card; what is left out)."""
    code = code_modules(source)
    wanted: list[str] = []
    left: list[str] = []
    for file in source.files:
        if file.name == CARD:
            continue
        ours = file.weights or file.name.endswith(INDEX_SUFFIX) or file.name.startswith(f"{FOLDER}/")
        fits = ours or is_companion(file.name, file.nbytes, code)
        (wanted if fits else left).append(file.name)
    return wanted, (*left, *(f"{folder}/" for folder in source.folders))


def _card(source: LocalSource, verified: Verified, repo: str) -> Card:
    return Card(
        repo=repo,
        source="",
        bases=(),
        relation="",
        format=verified.format,
        layout=verified.layout,
        rule="",
        parts=parts_of_model(parse(source)),
        servers=verified.servers,
        version=__version__,
    )


def _with_own(card: Card, own: str, old: str) -> str:
    """The card; what was written in the folder's, or else in the repository's, stays below ours."""
    return write_card(card, own, old or own)
