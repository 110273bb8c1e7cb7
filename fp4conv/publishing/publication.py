"""Files on their way to a pull request: sent on a thread of their own as they become whole, checked, and merged."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from fp4conv.errors import Fp4convError, OutputError
from fp4conv.hints.values import FOLDER
from fp4conv.model import JSON
from fp4conv.publishing.card import with_own_metadata
from fp4conv.publishing.content import Content
from fp4conv.publishing.published import Published
from fp4conv.publishing.repository import CARD, Pull, Repository, has_model, replaced

# The Hub takes 128 commits an hour. The first ones go out at once, more than these at even distances.
BURST = 40
SPACING_SECONDS = 45.0
_HOUR = 3600.0


class Notes(Protocol):
    """Where it is written down what the Hub has, so that a later run knows digests of files that are gone."""

    def note(self, name: str, payload: Mapping[str, JSON]) -> None: ...


class Publication:
    """Sends files of `root` to `pull`. `take` is called as they become whole, `finish` when all are there.

    `on_sent` is told how many bytes the pull request has. With `drop`, a file is removed when the pull request has it.
    `known`: what an earlier run noted as sent; of those the ones that the pull request has are not sent again. Used as
    a context: what is under way when it ends in an error is let go of.
    """

    def __init__(
        self,
        repository: Repository,
        pull: Pull,
        root: Path,
        *,
        notes: Notes | None = None,
        known: Mapping[str, Content] | None = None,
        drop: bool = False,
        on_sent: Callable[[int], None] | None = None,
    ) -> None:
        self._repository = repository
        self._pull = pull
        self._root = root
        self._notes = notes
        self._drop = drop
        self._on_sent = on_sent or (lambda _: None)
        tree = repository.files(pull.ref)
        self._sent = {name: content for name, content in (known or {}).items() if content.is_in(tree, name)}
        self._before = tree
        self._waiting: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._errors: list[BaseException] = []
        self._bars = ExitStack()
        self._stop = threading.Event()
        self._commits: deque[float] = deque()
        self._thread = threading.Thread(target=self._work, name="fp4conv-upload", daemon=True)
        if drop:
            for name in self._sent:  # of a run that was killed between the two
                (root / name).unlink(missing_ok=True)

    # ---- as a taker of shards

    @property
    def sent(self) -> Collection[str]:
        """Files that need not be here any more."""
        return frozenset(self._sent) if self._drop else frozenset()

    @property
    def sent_bytes(self) -> int:
        """Bytes that the pull request has, by this run and earlier ones."""
        return sum(content.nbytes for content in self._sent.values())

    def take(self, file: str, gone: Callable[[], None]) -> None:
        """Send a file when its turn comes; then `gone` is called."""
        self._waiting.put((file, gone))

    def check(self) -> None:
        """Raise what went wrong on the way."""
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> Publication:
        self._bars.enter_context(_quiet_bars())
        self._on_sent(self.sent_bytes)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._repository.stop()
        self._waiting.put(None)
        # An upload cannot be broken off: after an error the process may end before it, and nothing counts on it.
        self._thread.join(timeout=None if error is None else 1.0)
        self._bars.close()

    # ---- the thread

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                batch = self._next_batch()
                if not batch:
                    return
                self._send({name: self._root / name for name, _ in batch}, _title(batch[0][0], len(batch)))
                if self._stop.is_set():
                    return  # nobody wrote down that it was sent
                for name, gone in batch:
                    if self._drop:
                        (self._root / name).unlink(missing_ok=True)
                    gone()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            self._errors.append(error)

    def _next_batch(self) -> list[tuple[str, Callable[[], None]]]:
        """The next file that is to be sent; several where the Hub's quota has held the first one up. Empty: no more."""
        batch: list[tuple[str, Callable[[], None]]] = []
        due = 0.0
        while True:
            try:
                item = self._waiting.get(timeout=max(0.0, due - time.monotonic()) if batch else None)
            except queue.Empty:
                return batch
            if item is None:
                self._waiting.put(None)
                return batch
            name, gone = item
            if name in self._sent:
                gone()
                continue
            batch.append(item)
            due = due or self._due()
            if due <= time.monotonic():
                return batch

    def _due(self) -> float:
        """When the next commit may be made."""
        now = time.monotonic()
        while self._commits and now - self._commits[0] > _HOUR:
            self._commits.popleft()
        return now if len(self._commits) < BURST else self._commits[-1] + SPACING_SECONDS

    def _send(self, files: Mapping[str, Path | bytes], message: str, deleted: Collection[str] = ()) -> None:
        sent = self._repository.commit(self._pull, files, message, deleted=deleted)
        self._commits.append(time.monotonic())
        if self._stop.is_set():
            return
        for name, content in sent.items():
            if self._notes is not None:
                self._notes.note(name, content.payload())
            self._sent[name] = content
        self._on_sent(self.sent_bytes)

    # ---- the end

    def finish(self, files: Collection[str], card: Callable[[str], str], *, overwrite: bool) -> Published:
        """Send what is left of `files`, all that the model has, then the card; check that all is there, and merge.

        `card`: makes the model card of the text that the repository has as one.
        """
        self._waiting.put(None)
        while self._thread.is_alive():
            self._thread.join(0.2)
        self.check()
        merged = self._repository.pull(self._pull.number)[0].status == "merged"
        left = self.recognise(files)
        if left and not merged:
            self._send(left, "Add configs, tokenizer and index")
        if not overwrite and not merged and (model := has_model(self._repository.files("main"))):
            raise OutputError(
                f"main has got a model meanwhile ({', '.join(model[:3])})",
                where=self._repository.url,
                hint=f"Merge {self._repository.url_of(self._pull)} there if it may be replaced, or close it.",
            )
        wanted = {*files, CARD}
        stale = replaced([*self._before, *self._repository.files("main")], wanted, FOLDER) if overwrite else ()
        if not merged:
            self._send_card(card, stale)
        self._check_whole(files, stale, self._pull.ref)
        if not merged:
            self._merge()
        self._check_whole(files, stale, "main")
        return Published(
            self._repository.repo,
            self._repository.url,
            self._repository.url_of(self._pull),
            self._repository.commit_of("main"),
            len(wanted),
            stale,
        )

    def recognise(self, names: Collection[str]) -> dict[str, Path]:
        """Take for sent what the pull request has as it is here; those of `names` that it does not have."""
        tree = self._repository.files(self._pull.ref)
        left: dict[str, Path] = {}
        for name in names:
            path = self._root / name
            if name in self._sent:
                continue
            if name in tree and (content := Content.of_file(path)).is_in(tree, name):
                self._sent[name] = content
            else:
                left[name] = path
        return left

    def _send_card(self, card: Callable[[str], str], stale: Collection[str]) -> None:
        tree = self._repository.files(self._pull.ref)
        old = self._repository.read(CARD, self._pull.ref) if CARD in tree else b""
        text = card(old.decode("utf-8", "replace"))
        gone = [name for name in stale if name in tree]
        if not gone and Content.of_bytes(text.encode()).is_in(tree, CARD):
            return
        message = "Add the model card" + (", remove what it replaces" if gone else "")
        try:
            self._send({CARD: text.encode()}, message, gone)
        except OutputError as error:
            if "Invalid metadata" not in error.what:
                raise
            self._repository.note(f"metadata of the base's card is left out, since {error.what}")
            self._send({CARD: with_own_metadata(text).encode()}, message, gone)

    def _check_whole(self, files: Collection[str], stale: Collection[str], revision: str) -> None:
        """OutputError unless `revision` has every file as it was sent, a card, and nothing that was replaced."""
        tree = self._repository.files(revision)
        wrong = [name for name in sorted(files) if name not in self._sent or not self._sent[name].is_in(tree, name)]
        wrong += [name for name in stale if name in tree] + ([] if CARD in tree else [CARD])
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise OutputError(
                f"{revision} does not have what was sent: {shown}",
                where=self._repository.url_of(self._pull),
                hint="Somebody else has changed it. Close that pull request, and start over.",
            )

    def _merge(self) -> None:
        pull, conflicts = self._repository.pull(self._pull.number)
        url = self._repository.url_of(self._pull)
        if conflicts:
            raise OutputError(
                f"main has changed meanwhile, and conflicts in {', '.join(conflicts[:5])}",
                where=url,
                hint="The whole model is in the pull request: merge it there, or close it and start over.",
            )
        try:
            self._repository.merge(pull)
        except Fp4convError as error:
            error.hint = f"The whole model is in the pull request {url}: who may, can merge it there.\n  {error.hint}"
            raise


def _title(name: str, count: int) -> str:
    return f"Add {name}" + (f" and {count - 1} more" if count > 1 else "")


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Without the bars of huggingface_hub, which would run into ours."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variable of the user's may forbid it
        disable_progress_bars()
        try:
            yield
        finally:
            enable_progress_bars()
