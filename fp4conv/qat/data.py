"""Datasets: local JSONL and parquet, or a Hub dataset, as examples of token ids with the labels of their loss.

Three kinds of rows are known, by their columns: `messages` (a chat; the loss is over all of it), `prompt` and
`completion` (text or messages; the loss is over the completion, which is also the right answer), and `text`.
Everything that can be wrong with them is found here, before a model is loaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fp4conv.errors import SourceError, UsageError

if TYPE_CHECKING:
    import transformers

    from fp4conv.qat.settings import Settings

KINDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
IGNORED = -100  # the label of a token that the loss leaves out
SUFFIXES = (".jsonl", ".parquet")
# Not the seed of training: a run that goes on from another's model must not be judged by what that one has seen.
_HELD_OUT_SEED = 0

Rows: TypeAlias = Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Example:
    """Token ids, and where the completion starts (0: the loss is over all). `answer`: the right completion, as text."""

    ids: tuple[int, ...]
    start: int
    answer: str | None = None

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * self.start + list(self.ids[self.start :])


@dataclass(frozen=True)
class Data:
    """`train` and `test` examples, of one of KINDS."""

    kind: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def repeated(self) -> int:
        """How many of `test` are in `train` too, token for token."""
        known = {example.ids for example in self.train}
        return sum(example.ids in known for example in self.test)

    @property
    def has_answers(self) -> bool:
        return any(example.answer is not None for example in self.test)


def load_data(settings: Settings, tokenizer: transformers.PreTrainedTokenizerBase) -> Data:
    """The dataset of `settings`, tokenized. UsageError or SourceError for what cannot be trained on."""
    assert settings.dataset is not None, "checked with the other words of the command"
    train, test = _splits(settings)
    where = settings.dataset
    kind = kind_of(list(train[0]), where)
    _check_template(kind, train[0], tokenizer, where)
    data = Data(kind, _examples(kind, train, tokenizer, settings), _examples(kind, test, tokenizer, settings))
    if not any(label != IGNORED for example in data.train for label in example.labels):
        raise UsageError(
            f"no example has a token to learn within max_length {settings.max_length}",
            where=where,
            hint="raise --max-length",
        )
    return data


def held_out(settings: Settings, tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[Example, ...]:
    """The `test` examples that `load_data` gives, without the work of tokenizing the others."""
    train, test = _splits(settings)
    return _examples(kind_of(list(train[0]), str(settings.dataset)), test, tokenizer, settings)


def first_examples(
    settings: Settings, tokenizer: transformers.PreTrainedTokenizerBase, count: int
) -> tuple[Example, ...]:
    """At most `count` examples from the beginning of the training split, of which nothing is held out."""
    where = str(settings.dataset)
    rows = _training_rows(_read(settings), settings)[:count]
    kind = kind_of(list(rows[0]), where)
    _check_template(kind, rows[0], tokenizer, where)
    return tuple(example for example in _examples(kind, rows, tokenizer, settings) if example.ids)


def kind_of(columns: Sequence[str], where: str) -> str:
    """Which of KINDS the columns make; UsageError that lists the columns where they make none."""
    for kind, needed in KINDS.items():
        if all(column in columns for column in needed):
            return kind
    expected = "; or ".join(" and ".join(needed) for needed in KINDS.values())
    raise UsageError(
        f"has the columns {', '.join(columns) or '(none)'}; expected {expected}",
        where=where,
        hint="rename the columns, or write a JSONL file with them: one JSON object a line",
    )


def _splits(settings: Settings) -> tuple[Rows, Rows]:
    """Training and held-out rows; the second is taken out of the first where the dataset has no such split."""
    found = _read(settings)
    where = str(settings.dataset)
    train = _training_rows(found, settings)
    if settings.test_split in found and settings.test_split != settings.train_split:
        return train, found[settings.test_split][: settings.eval_samples]
    if len(train) < 2:
        raise UsageError("has one row: nothing is left to hold out", where=where)
    order = list(range(len(train)))
    random.Random(_HELD_OUT_SEED).shuffle(order)
    count = min(max(1, round(len(train) * settings.test_size)), len(train) - 1)
    return [train[i] for i in sorted(order[count:])], [train[i] for i in order[:count]][: settings.eval_samples]


def _training_rows(found: Mapping[str, Rows], settings: Settings) -> Rows:
    where = str(settings.dataset)
    if settings.train_split not in found:
        likely = next((name for name in found if "train" in name), next(iter(found)))
        raise UsageError(
            f"has no split {settings.train_split!r}; it has {', '.join(found)}",
            where=where,
            hint=f"--train-split {likely}",
        )
    train = found[settings.train_split]
    if not train:
        raise UsageError(f"its split {settings.train_split!r} has no rows", where=where)
    return train


def _read(settings: Settings) -> Mapping[str, Rows]:
    """Every split by name. A local file or folder wins over a Hub id."""
    path = Path(str(settings.dataset))
    if path.exists():
        return {split: _read_file(file) for split, file in _local_files(path, settings.train_split).items()}
    if path.suffix or str(settings.dataset).count("/") > 1:
        raise UsageError("there is no such file or folder", where=str(path))
    return _read_hub(settings)


def _read_file(file: Path) -> Rows:
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows: Rows = pyarrow.parquet.read_table(file).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise SourceError(f"cannot be read as parquet: {_first_line(error)}", where=str(file)) from error
        return rows
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot be read: {error}", where=str(file)) from error
    return [_row(line, f"{file}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _row(line: str, where: str) -> Mapping[str, object]:
    try:
        row: object = json.loads(line)
    except ValueError as error:
        raise SourceError(f"is not JSON: {error}", where=where, hint="write one JSON object a line") from error
    if not isinstance(row, dict):
        raise SourceError(f"is {type(row).__name__}, expected an object", where=where, hint="write one object a line")
    return row


def _read_hub(settings: Settings) -> Mapping[str, Rows]:
    from datasets import load_dataset

    try:
        found = load_dataset(str(settings.dataset), settings.subset)
        return {str(split): list(rows) for split, rows in found.items()}
    except Exception as error:
        # The libraries beneath raise nearly anything for a name that is not there, or without a network.
        raise SourceError(
            f"is no file or folder, and cannot be had from the Hub: {_first_line(error)}",
            where=str(settings.dataset),
            hint="give a JSONL or parquet file, a folder of them, or a dataset of the Hub (org/name)",
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _local_files(path: Path, train_split: str) -> dict[str, Path]:
    """Split -> file. A folder's files are its splits, by stem; one file is the training split."""
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in SUFFIXES]
    if not files:
        raise UsageError(f"is or holds no {', '.join(SUFFIXES)} file", where=str(path))
    if len(files) == 1:
        return {train_split: files[0]}
    stems = {file.stem: file for file in files}
    if len(stems) < len(files):
        raise UsageError("has two files of one name", where=str(path), hint="keep one of them for each split")
    return stems


def _check_template(
    kind: str, row: Mapping[str, object], tokenizer: transformers.PreTrainedTokenizerBase, where: str
) -> None:
    chat = kind == "messages" or isinstance(row.get("prompt"), list)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "its rows are chats, and the tokenizer of the model has no chat template",
            where=where,
            hint="use the instruction-tuned model's folder, or rows with text, or prompt and completion as text",
        )


def _examples(
    kind: str, rows: Rows, tokenizer: transformers.PreTrainedTokenizerBase, settings: Settings
) -> tuple[Example, ...]:
    texts = _Texts(tokenizer, rows)
    where = settings.dataset
    return tuple(
        _example(kind, row, texts, settings.max_length, f"{where}, row {number}") for number, row in enumerate(rows)
    )


def _example(kind: str, row: Mapping[str, object], texts: _Texts, longest: int, where: str) -> Example:
    if missing := [column for column in KINDS[kind] if column not in row]:
        raise UsageError(f"has no {missing[0]}, which other rows have", where=where)
    if kind == "messages":
        return Example(_chat(texts.tokenizer, row["messages"], where)[:longest], 0)
    if kind == "text":
        return Example(texts.ids(_words(row["text"], "text", where), end=True)[:longest], 0)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        start = _chat(texts.tokenizer, prompt, where, generate=True)
        whole = _chat(texts.tokenizer, [*prompt, *completion], where)
        if whole[: len(start)] != start:
            raise UsageError(
                "the chat template renders the prompt otherwise alone than with its completion",
                where=where,
                hint="give the rows as text: prompt and completion as the model should see them",
            )
        answer = str(completion[-1].get("content", "")) if completion and isinstance(completion[-1], dict) else None
        return Example(whole[:longest], min(len(start), longest), answer)
    begin = texts.ids(_words(prompt, "prompt", where))
    ids = begin + texts.ids(_words(completion, "completion", where), start=False, end=True)
    return Example(ids[:longest], min(len(begin), longest), str(completion))


def _words(value: object, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise UsageError(f"{column} is {type(value).__name__}, expected text", where=where)


class _Texts:
    """Token ids of the texts in rows, made in one call a column: many times faster than row by row."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, rows: Rows) -> None:
        self.tokenizer = tokenizer
        self._begun = self._of(rows, ("prompt", "text"), special=True)
        self._going_on = self._of(rows, ("completion",), special=False)

    def _of(self, rows: Rows, columns: Sequence[str], *, special: bool) -> Mapping[str, list[int]]:
        values = (row.get(column) for row in rows for column in columns)
        texts = list(dict.fromkeys(value for value in values if isinstance(value, str)))
        if not texts:
            return {}
        return dict(zip(texts, self.tokenizer(texts, add_special_tokens=special)["input_ids"], strict=True))

    def ids(self, text: str, *, start: bool = True, end: bool = False) -> tuple[int, ...]:
        """Those of one text; with the special tokens that the tokenizer starts a text with, and the end of text."""
        ids = list((self._begun if start else self._going_on)[text])
        last = self.tokenizer.eos_token_id
        if end and last is not None and ids[-1:] != [last]:
            ids.append(last)
        return tuple(ids)


def _chat(
    tokenizer: transformers.PreTrainedTokenizerBase, messages: object, where: str, *, generate: bool = False
) -> tuple[int, ...]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise UsageError("messages is no list of objects with a role and a content", where=where)
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=generate, return_dict=True
        )
    except Exception as error:
        # Templates are programs of their own, and raise what they like.
        raise UsageError(f"the chat template refuses it: {error}", where=where) from error
    return tuple(rendered["input_ids"])
