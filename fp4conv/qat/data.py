"""Datasets as examples of token ids with the labels of their loss.

Three kinds of rows are known, by their columns: `messages` (a chat; the loss is over all of it), `prompt` and
`completion` (text or messages; the loss is over the completion, which is also the right answer), and `text`.
Everything that can be wrong with them is found here, before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4conv.errors import UsageError
from fp4conv.qat.chats import Chats
from fp4conv.qat.rows import Row, Splits, splits, training_rows

if TYPE_CHECKING:
    import transformers

    from fp4conv.qat.settings import Settings

KINDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
IGNORED = -100  # the label of a token that the loss leaves out


@dataclass(frozen=True)
class Example:
    """Token ids, and where the completion starts (0: the loss is over all). `answered`: the completion is right.

    An example without a token to learn has nothing after `start`, or no token before its last.
    """

    ids: tuple[int, ...]
    start: int
    answered: bool = False

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * self.start + list(self.ids[self.start :])

    @property
    def learnable(self) -> bool:
        """Whether the loss is over any token: the first of a text is predicted from nothing."""
        return len(self.ids) > max(1, self.start)


@dataclass(frozen=True)
class Data:
    """`train` and `test` examples, of one of KINDS. `notes`: what was cut, left out or not read, a sentence each."""

    kind: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...] = ()

    @property
    def repeated(self) -> int:
        """How many of `test` are in `train` too, token for token."""
        known = {example.ids for example in self.train}
        return sum(example.ids in known for example in self.test)

    @property
    def has_answers(self) -> bool:
        return any(example.answered for example in self.test)


def load_data(settings: Settings, tokenizer: transformers.PreTrainedTokenizerBase) -> Data:
    """The dataset of `settings`, tokenized. UsageError or SourceError for what cannot be trained on."""
    assert settings.dataset is not None, "checked with the other words of the command"
    found, where = splits(settings), settings.dataset
    kind = _kind(found.train, tokenizer, where)
    chats = Chats(tokenizer, settings.chat_date)
    whole = [_examples(kind, rows, tokenizer, chats) for rows in (found.train, found.test)]
    train, test = (_usable(examples, settings) for examples in whole)
    for examples, which in ((train, "example"), (test, "held-out example")):
        if not examples:
            raise UsageError(
                f"no {which} has a token to learn within max_length {settings.max_length}",
                where=where,
                hint="raise --max-length, and see that completions and texts are not empty",
            )
    notes = [*_notes(whole, train, test, found, settings), *_passed_over(chats)]
    return Data(kind, train, test, tuple(notes))


def held_out(settings: Settings, tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[Example, ...]:
    """The `test` examples that `load_data` gives, without the work of tokenizing the others."""
    found, chats = splits(settings), Chats(tokenizer, settings.chat_date)
    kind = _kind(found.train, tokenizer, str(settings.dataset))
    return _usable(_examples(kind, found.test, tokenizer, chats), settings)


def first_examples(
    settings: Settings, tokenizer: transformers.PreTrainedTokenizerBase, count: int
) -> tuple[Example, ...]:
    """At most `count` examples from the beginning of the training split, of which nothing is held out."""
    rows = training_rows(settings)[:count]
    kind = _kind(rows, tokenizer, str(settings.dataset))
    chats = Chats(tokenizer, settings.chat_date)
    return tuple(example for example in _cut(_examples(kind, rows, tokenizer, chats), settings) if example.ids)


def _kind(rows: Sequence[Row], tokenizer: transformers.PreTrainedTokenizerBase, where: str) -> str:
    """Which of KINDS the rows are, by the first."""
    kind = kind_of(list(rows[0].values), where)
    _check_template(kind, rows[0].values, tokenizer, where)
    return kind


def _cut(examples: Sequence[Example], settings: Settings) -> list[Example]:
    """`examples` within max_length; what is cut has no answer left that could be given in full."""
    longest = settings.max_length
    return [
        Example(each.ids[:longest], min(each.start, longest)) if len(each.ids) > longest else each for each in examples
    ]


def _usable(examples: Sequence[Example], settings: Settings) -> tuple[Example, ...]:
    return tuple(example for example in _cut(examples, settings) if example.learnable)


def _notes(
    whole: Sequence[Sequence[Example]],
    train: Sequence[Example],
    test: Sequence[Example],
    found: Splits,
    settings: Settings,
) -> Iterator[str]:
    both = [example for examples in whole for example in examples]
    cut = sum(len(example.ids) > settings.max_length for example in both)
    if cut:
        yield f"examples longer than max_length {settings.max_length:,}, which are cut: {cut:,} (--max-length)"
    if left := len(both) - len(train) - len(test):
        yield f"examples without a token to learn, which are left out: {left:,}"
    answers = [len(example.ids) - example.start for example in test if example.answered]
    if long := sum(length > settings.max_new_tokens for length in answers):
        yield (
            f"answers of more than {settings.max_new_tokens:,} tokens, which is all that is generated, so that they "
            f"are not asked for: {long:,} (--max-new-tokens)"
        )
    if found.unread:
        yield (
            f"a share of {settings.test_size:g} is held out of {settings.train_split}, and {', '.join(found.unread)} "
            f"not read (--test-split {found.unread[0]} holds that out)"
        )


def _passed_over(chats: Chats) -> Iterator[str]:
    if chats.passed_over:
        yield (
            f"messages that the chat template leaves out: {len(chats.passed_over):,} (the first: "
            f"{chats.passed_over[0]}; it may take only one, at the beginning)"
        )


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
    kind: str, rows: Sequence[Row], tokenizer: transformers.PreTrainedTokenizerBase, chats: Chats
) -> list[Example]:
    texts = _Texts(tokenizer, rows)
    return [_example(kind, row, texts, chats) for row in rows]


def _example(kind: str, row: Row, texts: _Texts, chats: Chats) -> Example:
    """The whole of `row`. What has no text to learn gets no token for it, not even the end of text."""
    values, where = row.values, row.where
    if missing := [column for column in KINDS[kind] if column not in values]:
        raise UsageError(f"has no {missing[0]}, which other rows have", where=where)
    if kind == "messages":
        return Example(chats.ids(values["messages"], values, where) if values["messages"] != [] else (), 0)
    if kind == "text":
        text = _words(values["text"], "text", where)
        return Example(texts.ids(text, end=True) if text.strip() else (), 0)
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat_example(chats, prompt, completion, row)
    begin = texts.ids(_words(prompt, "prompt", where))
    words = _words(completion, "completion", where)
    if not words.strip():
        return Example(begin, len(begin))
    whole = begin + texts.ids(words, start=False, end=True)
    return Example(whole, len(begin), answered=bool(begin))  # generation has to start from something


def _chat_example(chats: Chats, prompt: list[object], completion: list[object], row: Row) -> Example:
    start = chats.ids(prompt, row.values, row.where, generate=True)
    whole = chats.ids([*prompt, *completion], row.values, row.where)
    if whole[: len(start)] != start:
        raise UsageError(
            "the chat template renders the prompt otherwise alone than with its completion",
            where=row.where,
            hint="give the rows as text: prompt and completion as the model should see them",
        )
    return Example(whole, len(start), answered=True)


def _words(value: object, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise UsageError(f"{column} is {type(value).__name__}, expected text", where=where)


class _Texts:
    """Token ids of the texts in rows, made in one call a column: many times faster than row by row."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, rows: Sequence[Row]) -> None:
        self._tokenizer = tokenizer
        self._begun = self._of(rows, ("prompt", "text"), special=True)
        self._going_on = self._of(rows, ("completion",), special=False)

    def _of(self, rows: Sequence[Row], columns: Sequence[str], *, special: bool) -> Mapping[str, list[int]]:
        values = (row.values.get(column) for row in rows for column in columns)
        texts = list(dict.fromkeys(value for value in values if isinstance(value, str)))
        if not texts:
            return {}
        return dict(zip(texts, self._tokenizer(texts, add_special_tokens=special)["input_ids"], strict=True))

    def ids(self, text: str, *, start: bool = True, end: bool = False) -> tuple[int, ...]:
        """Those of one text; with the special tokens that the tokenizer starts a text with, and the end of text."""
        ids = list((self._begun if start else self._going_on)[text])
        last = self._tokenizer.eos_token_id
        if end and last is not None and ids[-1:] != [last]:
            ids.append(last)
        return tuple(ids)
