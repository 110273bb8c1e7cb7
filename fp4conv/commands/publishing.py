"""What `convert --push-to-hub` and `push` share: the repository looked at first, one pull request, the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fp4conv.errors import OutputError, ResumeError, UsageError
from fp4conv.hints.values import LOG
from fp4conv.model import JSON
from fp4conv.plan import Plan
from fp4conv.publishing.card import write_card
from fp4conv.publishing.card_facts import base_card, card_of
from fp4conv.publishing.content import Content
from fp4conv.publishing.publication import Publication
from fp4conv.publishing.repository import CARD, Pull, Repository, has_model
from fp4conv.report.converted import ConvertResult
from fp4conv.staging import Staging
from fp4conv.version import __version__

# Keys of the journal.
_PULL, _SENT = "pull", "sent "


@dataclass(frozen=True)
class Push:
    """Where to publish. `drop`: keep nothing of the result here. `overwrite`: a model that is there is replaced."""

    repo: str
    private: bool = False
    overwrite: bool = False
    drop: bool = False
    on_bytes: Callable[[int, int], None] | None = None  # bytes that are sent, and in all
    on_note: Callable[[str], None] | None = None

    @classmethod
    def of(
        cls,
        repo: str | None,
        *,
        private: bool,
        overwrite: bool,
        stream: bool,
        on_bytes: Callable[[int, int], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Push | None:
        """None without a repository; UsageError for options that need one."""
        if repo is None:
            if private:
                raise UsageError("--private is about the repository that --push-to-hub makes", hint="add --push-to-hub")
            return None
        return cls(repo, private, overwrite, stream, on_bytes, on_note)

    def sent_of(self, total: int) -> Callable[[int], None] | None:
        """What tells `on_bytes` how many of `total` bytes are sent."""
        if self.on_bytes is None:
            return None
        told = self.on_bytes
        return lambda sent: told(min(sent, total), total)

    @property
    def url(self) -> str:
        return Repository(self.repo).url

    def note(self, text: str) -> None:
        if self.on_note is not None:
            self.on_note(text)

    @property
    def words(self) -> tuple[str, ...]:
        """Its options as they are typed."""
        flags = (("--private", self.private), ("--overwrite", self.overwrite), ("--stream", self.drop))
        return ("--push-to-hub", self.repo, *(flag for flag, given in flags if given))


def place_of(destination: str | Path | None, push: Push | None) -> Path:
    """Where the run works: DST, or beside it the folder that stands for a repository when nothing is kept."""
    if destination is not None:
        return Path(destination)
    if push is None or not push.drop:
        raise UsageError(
            "a DST is needed: the folder to write",
            hint="only with --push-to-hub REPO --stream is nothing kept here, and none needed",
        )
    return Path(f"fp4conv-{push.repo.replace('/', '--')}")


def check_not_source(push: Push, plan: Plan) -> None:
    """OutputError where the result would replace what it is made from: no source is ever written to."""
    model = plan.model
    for pinned in (model.source.pinned, *(adapter.pinned for adapter in model.adapters)):
        if pinned is not None and pinned.repo.lower() == push.repo.lower():
            raise OutputError(
                "is what is converted, and a source is never written to",
                where=push.url,
                hint="Give another repository.",
            )


def check_repository(push: Push) -> None:
    """OutputError where the model could not be published, as far as the Hub says beforehand. Makes nothing."""
    repository = Repository(push.repo)
    repository.check_login()
    _check_content(repository, push)


def _check_content(repository: Repository, push: Push) -> None:
    found = repository.look()
    if found is None:
        return
    private, files = found
    if push.private and not private:
        raise OutputError(
            "exists already and is public: --private is for one that is to be made",
            where=repository.url,
            hint=f"Make it private in its settings first ({repository.url}/settings), or give another name.",
        )
    model = has_model(files)
    if model and not push.overwrite:
        shown = ", ".join(model[:3]) + (", ..." if len(model) > 3 else "")
        raise OutputError(
            f"has a model already ({shown})",
            where=repository.url,
            hint="Give another repository, or add --overwrite: what is there stays until the new one is whole.",
        )


class _Journal:
    """The pull request and what it has, in the journal of the run."""

    def __init__(self, out: Staging) -> None:
        self._out = out

    def note(self, name: str, payload: Mapping[str, JSON]) -> None:
        self._out.note(_SENT + name, payload)

    def note_pull(self, repo: str, pull: Pull) -> None:
        self._out.note(_PULL, {"repo": repo, "number": pull.number, "title": pull.title})

    def number(self, repo: str) -> int | None:
        match self._out.finished.get(_PULL):
            case {"repo": str(noted), "number": int(number)} if noted == repo:
                return number
        return None

    def known(self) -> dict[str, Content]:
        found = {
            key.removeprefix(_SENT): Content.from_payload(payload)
            for key, payload in self._out.finished.items()
            if key.startswith(_SENT)
        }
        return {name: content for name, content in found.items() if content is not None}


@contextmanager
def publishing(push: Push | None, plan: Plan, out: Staging, command: str) -> Iterator[Publication | None]:
    """A publication of what is made in `out`, begun or taken up again; None where nothing is published."""
    if push is None:
        yield None
        return
    repository, journal = Repository(push.repo, on_note=push.on_note), _Journal(out)
    title = f"{plan.target.upper()} by fp4conv ({plan.fingerprint[:12]})"
    number = journal.number(push.repo)
    if number is None:
        pull = begin(repository, push, title, command)
        journal.note_pull(push.repo, pull)
    else:
        pull = _taken_up(repository, number, out)
    push.note(f"publishing by {repository.url_of(pull)}")
    publication = Publication(
        repository,
        pull,
        out.root,
        notes=journal,
        known=journal.known(),
        drop=push.drop,
        on_sent=push.sent_of(plan.total_bytes),
    )
    with publication:
        yield publication


def begin(repository: Repository, push: Push, title: str, command: str) -> Pull:
    """A draft pull request: one that a killed run has left under this title, or a new one."""
    account = repository.check_login()
    _check_content(repository, push)
    repository.make(private=push.private)
    return repository.open_pull(
        title,
        account,
        f"A model on its way, uploaded file by file by fp4conv {__version__} and merged when it is whole. "
        f"Please do not merge it by hand.\n\n```\n{command}\n```",
    )


def _taken_up(repository: Repository, number: int, out: Staging) -> Pull:
    pull = repository.pull(number)[0]
    if pull.status == "closed":
        raise ResumeError(
            "the pull request that this command began was closed",
            where=repository.url_of(pull),
            hint=f"Reopen it there to go on; to start over, delete {out.root}.",
        )
    return pull


def publish(
    push: Push, publication: Publication, out: Staging, plan: Plan, *, result: ConvertResult, command: str
) -> ConvertResult:
    """Send what is left of the result and its card, and merge; `result` with what came of it."""
    paths = [path.relative_to(out.root) for path in out.root.rglob("*") if path.is_file()]
    here = {path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)}
    files = (here | set(plan.shards)) - {CARD, LOG}
    base, card = base_card(plan), card_of(plan, result, push.repo, command)
    published = publication.finish(sorted(files), partial(write_card, card, base), overwrite=push.overwrite)
    return replace(result, published=published, destination=published.url if push.drop else result.destination)
