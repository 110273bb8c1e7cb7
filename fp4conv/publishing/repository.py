"""What is asked of the Hub about a repository that is written to: made, a pull request, commits to it, its merge.

All of it goes through huggingface_hub: login, HF_ENDPOINT, uploads by xet where the repository has it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fp4conv.errors import OutputError, UsageError
from fp4conv.hub.failures import explained, is_transient
from fp4conv.publishing.content import Content

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

# Seconds between attempts, on top of what huggingface_hub tries itself: a conversion of hours outlives a hiccup.
PAUSES = (1.0, 4.0, 15.0, 60.0)
# The Hub takes 128 commits an hour; it says so with 429, and goes on when some time has passed.
QUOTA_PAUSE = 300.0
QUOTA_ATTEMPTS = 14
CARD = "README.md"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# What belongs to a checkpoint and would be wrong beside another one.
_REPLACED = re.compile(
    r".*\.safetensors(\.index\.json)?|(pytorch_)?model[\w.-]*\.bin(\.index\.json)?|hf_quant_config\.json|dtypes\.json"
)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Pull:
    """A pull request. `status`: draft, open, merged or closed."""

    number: int
    title: str
    status: str

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"


class Repository:
    """One model repository on the Hub, written to with the user's login."""

    def __init__(self, repo: str, *, on_note: Callable[[str], None] | None = None) -> None:
        """UsageError where `repo` is no name for one. `on_note` is told of long waits."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        try:
            validate_repo_id(repo)
            if repo.count("/") != 1:
                raise HFValidationError(repo)
        except HFValidationError:
            hint = "Write it like org/name, where org is you or an organisation that you may write to."
            raise UsageError(f"{repo[:100]!r} is not the name of a repository", hint=hint) from None
        self.repo = repo
        self._on_note = on_note or (lambda _: None)
        self._stop = threading.Event()
        self._answered = False

    @property
    def url(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repo}"

    def url_of(self, pull: Pull) -> str:
        return f"{self.url}/discussions/{pull.number}"

    # ---- the repository

    def check_login(self) -> str:
        """Name of the account that is logged in; OutputError where there is none. Asks nothing of the repository."""
        from huggingface_hub.errors import LocalTokenNotFoundError

        try:
            with self._explained():
                return str(self._patiently(lambda: self._api().whoami())["name"])
        except OutputError as error:
            if isinstance(error.__cause__, LocalTokenNotFoundError):
                error.what = "publishing needs a login, and there is none"
                error.hint = "Log in with a token that may write: hf auth login, or HF_TOKEN."
            raise

    def look(self) -> tuple[bool, Mapping[str, RepoFile]] | None:
        """(whether it is private, the files on main); None where there is no such repository, or none to be seen."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._explained():
            try:
                info = self._patiently(lambda: self._api().model_info(self.repo))
            except RepositoryNotFoundError:
                return None
        return bool(info.private), self.files("main")

    def make(self, *, private: bool) -> None:
        """Make the repository where there is none."""
        with self._explained():
            self._patiently(lambda: self._api().create_repo(self.repo, private=private or None, exist_ok=True))

    def files(self, revision: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        with self._explained():
            listed = self._patiently(
                lambda: list(self._api().list_repo_tree(self.repo, recursive=True, revision=revision))
            )
        return {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}

    def read(self, name: str, revision: str) -> bytes:
        """A small file, through the cache."""
        with self._explained():
            path = self._patiently(lambda: self._api().hf_hub_download(self.repo, name, revision=revision))
        return Path(path).read_bytes()

    def card(self, revision: str) -> str:
        """The model card; '' where there is none."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            with self._explained():
                return self.read(CARD, revision).decode("utf-8", "replace")
        except OutputError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return ""
            raise

    def commit_of(self, revision: str) -> str:
        with self._explained():
            return str(self._patiently(lambda: self._api().model_info(self.repo, revision=revision)).sha)

    # ---- the pull request

    def find_pull(self, title: str, author: str) -> Pull | None:
        """The pull request that an earlier run of `author` has left under this title."""
        with self._explained():
            found = self._patiently(
                lambda: list(self._api().get_repo_discussions(self.repo, discussion_type="pull_request"))
            )
        own = [each for each in found if each.title == title and each.author == author and each.is_pull_request]
        going = [each for each in own if each.status in ("draft", "open")]
        return Pull(going[0].num, title, going[0].status) if going else None

    def open_pull(self, title: str, author: str, description: str) -> Pull:
        """The pull request that `find_pull` finds, or a new draft, which shows what main shows."""

        def ask() -> Pull:
            found = self.find_pull(title, author)  # also where an answer was lost: a second one would be too many
            if found is not None:
                return found
            made = self._api().create_pull_request(self.repo, title, description=description)
            return Pull(made.num, title, made.status)

        with self._explained():
            return self._patiently(ask)

    def pull(self, number: int) -> tuple[Pull, tuple[str, ...]]:
        """(the pull request as it is now, files in conflict with what main has become)."""
        with self._explained():
            found = self._patiently(lambda: self._api().get_discussion_details(self.repo, number))
        conflicts = found.conflicting_files
        names = tuple(conflicts) if isinstance(conflicts, list) else ("some files",) if conflicts else ()
        return Pull(found.num, found.title, found.status), names

    def commit(
        self, pull: Pull, added: Mapping[str, Path | bytes], message: str, *, deleted: Collection[str] = ()
    ) -> dict[str, Content]:
        """One commit to the pull request; what the Hub then has is what was given, or OutputError says which not."""
        with self._explained():
            return self._patiently(lambda: self._commit_once(pull, added, message, deleted), quota=QUOTA_ATTEMPTS)

    def _commit_once(
        self, pull: Pull, added: Mapping[str, Path | bytes], message: str, deleted: Collection[str]
    ) -> dict[str, Content]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in added.items()
        ]
        there = self.files(pull.ref) if deleted else {}
        removals = [CommitOperationDelete(name, is_folder=False) for name in sorted(deleted) if name in there]
        self._api().create_commit(
            self.repo, [*additions, *removals], commit_message=message, revision=pull.ref, num_threads=2
        )
        tree = {entry.path: entry for entry in self._api().get_paths_info(self.repo, list(added), revision=pull.ref)}
        sent: dict[str, Content] = {}
        for addition in additions:
            name, given, found = addition.path_in_repo, added[addition.path_in_repo], tree.get(addition.path_in_repo)
            if getattr(found, "lfs", None) is not None:
                info = addition.upload_info  # its digest was made of the bytes that went out
                content = Content(info.size, info.sha256.hex(), "")
            else:
                content = Content.of_bytes(given if isinstance(given, bytes) else given.read_bytes())
            if not content.is_in(tree, name):  # type: ignore[arg-type]
                hint = "Run the same command again: it sends what is missing."
                raise OutputError("the Hub has other bytes than were sent", where=f"{self.repo}: {name}", hint=hint)
            sent[name] = content
        return sent

    def merge(self, pull: Pull) -> None:
        """Open the draft and merge it; nothing where an answer was lost and it is merged already."""

        def ask() -> None:
            now = self.pull(pull.number)[0]
            if now.status == "draft":
                self._api().change_discussion_status(self.repo, pull.number, new_status="open")
            if now.status != "merged":
                self._api().merge_pull_request(self.repo, pull.number)

        with self._explained():
            self._patiently(ask)

    def note(self, text: str) -> None:
        self._on_note(text)

    def stop(self) -> None:
        """Nobody waits for an answer any more."""
        self._stop.set()

    # ---- how it is asked

    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

        try:
            with explained(self.repo, kind=OutputError):
                yield
        except OutputError as error:
            cause = error.__cause__
            while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # 'error while uploading'
                cause = cause.__cause__
            if isinstance(cause, OfflineModeIsEnabled):
                error.what = "HF_HUB_OFFLINE is set, so nothing can be published"
                error.hint = "Unset it and run the same command again."
            elif isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
                error.what = "there is no such repository, or your login may not see it"
                error.hint = "Is it spelled right? Use a token that may write there: hf auth login, or HF_TOKEN."
            elif "disabled" in error.what:
                error.hint = f"Allow pull requests in its settings ({self.url}/settings), or give another repository."
            elif getattr(getattr(cause, "response", None), "status_code", None) == 403:
                error.hint = (
                    f"Your login may not do this in {self.repo}. Give a repository of your own, or log in with a token "
                    "that may write there: hf auth login, or HF_TOKEN."
                )
            elif "cannot be reached" in error.what:
                error.hint = "Check the connection and HF_ENDPOINT, and run the same command again."
            raise

    def _patiently(self, ask: Callable[[], _Answer], quota: int = 0) -> _Answer:
        """`ask()`, again after a while where the Hub or the network has a hiccup; the last error as it is.

        `quota`: how often to wait until the Hub takes more of this user's requests.
        """
        pauses = list(PAUSES)
        while True:
            try:
                answer = ask()
                self._answered = True
                return answer
            except Exception as error:
                # Whoever has no network wants to know, and not wait for it; an hour later it is worth a wait.
                nobody = type(error).__name__ == "ConnectError" and not self._answered
                if self._stop.is_set() or nobody or not is_transient(error):
                    raise
                if getattr(getattr(error, "response", None), "status_code", None) == 429 and quota:
                    quota -= 1
                    pause = QUOTA_PAUSE
                    self._on_note(f"the Hub takes no more commits for now; asking again in {pause / 60:.0f} minutes")
                elif pauses:
                    pause = pauses.pop(0)
                else:
                    raise
            if self._stop.wait(pause):
                raise OutputError("stopped while the Hub was asked again", where=self.repo)


def has_model(names: Collection[str]) -> tuple[str, ...]:
    """Those of a repository's files that make it a model."""
    return tuple(sorted(name for name in names if name.endswith(_WEIGHTS) or name == "config.json"))


def replaced(names: Collection[str], new: Collection[str], hints_folder: str) -> tuple[str, ...]:
    """Files of an older checkpoint that must not stay beside the `new` one: weights, indexes, hints, claims."""
    old = {name for name in names if _REPLACED.fullmatch(name) or name.startswith(f"{hints_folder}/")}
    return tuple(sorted(old - set(new)))
