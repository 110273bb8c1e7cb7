"""Rows of a dataset, each with the place that it stands in: local JSONL and parquet, or a dataset of the Hub.

Owns files, splits and what is held out. What a row means is `data`'s.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fp4conv.errors import SourceError, UsageError
from fp4conv.qat.hub_data import hub_data, read_hub

if TYPE_CHECKING:
    from fp4conv.qat.settings import Settings

SUFFIXES = (".jsonl", ".parquet")
# Not the seed of training: a run that goes on from another's model must not be judged by what that one has seen.
_HELD_OUT_SEED = 0
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")  # as the Hub names the files of a split


@dataclass(frozen=True)
class Row:
    """`values` by column. `where`: file or split, and line or row, counted from 1."""

    values: Mapping[str, object]
    where: str


Rows: TypeAlias = Sequence[Row]


@dataclass(frozen=True)
class Splits:
    """`unread`: names of splits that are neither trained on nor held out, where a share of the training is held out."""

    train: Rows
    test: Rows
    unread: tuple[str, ...] = ()


def splits(settings: Settings) -> Splits:
    """Training and held-out rows; the second is taken out of the first where the dataset has no such split."""
    found = _read(settings)
    where = str(settings.dataset)
    train = _training_rows(found, settings)
    if settings.test_split in found and settings.test_split != settings.train_split:
        test = found[settings.test_split]
        if not test:
            raise UsageError(f"its split {settings.test_split!r} has no rows", where=where)
        return Splits(train, test[: settings.eval_samples])
    if len(train) < 2:
        raise UsageError("has one row: nothing is left to hold out", where=where)
    order = list(range(len(train)))
    random.Random(_HELD_OUT_SEED).shuffle(order)
    count = min(max(1, round(len(train) * settings.test_size)), len(train) - 1)
    test = [train[i] for i in order[:count]][: settings.eval_samples]
    unread = tuple(sorted(set(found) - {settings.train_split}))
    return Splits([train[i] for i in sorted(order[count:])], test, unread)


def training_rows(settings: Settings) -> Rows:
    """Every row of the training split; nothing is held out."""
    return _training_rows(_read(settings), settings)


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
        if settings.subset is not None:
            raise UsageError(
                f"is a {'folder' if path.is_dir() else 'file'}, but --subset {settings.subset} is that of a dataset of "
                "the Hub",
                where=str(path),
                hint="leave --subset out, or give the folder or file of the subset",
            )
        return {
            split: [row for file in files for row in _read_file(file)]
            for split, files in _local_files(path, settings).items()
        }
    return _read_hub(settings)


def _read_file(file: Path) -> Iterator[Row]:
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows: list[dict[str, object]] = pyarrow.parquet.read_table(file).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise SourceError(f"cannot be read as parquet: {_first_line(error)}", where=str(file)) from error
        yield from (Row(_columns(row), f"{file}, row {number}") for number, row in enumerate(rows, 1))
        return
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors on Windows put a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"cannot be read: {error}", where=str(file), hint="write it in UTF-8, one JSON object a line"
        ) from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _row(line, f"{file}, line {number}")


def _columns(row: Mapping[str, object]) -> dict[str, object]:
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: object) -> object:
    """`value` of a table: every object there has the keys of all others, null where it has none of its own."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _row(line: str, where: str) -> Row:
    try:
        row: object = json.loads(line)
        if "\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            "has half of a character: an escape of \\ud800 to \\udfff without its other half",
            where=where,
            hint="write the text in UTF-8, or leave the row out",
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"is not JSON: {error}", where=where, hint="write one JSON object a line") from error
    if not isinstance(row, dict):
        raise SourceError(f"is {type(row).__name__}, expected an object", where=where, hint="write one object a line")
    return Row(row, where)


def _read_hub(settings: Settings) -> Mapping[str, Rows]:
    named = hub_data(str(settings.dataset))
    found, _ = read_hub(named, settings.subset)
    return {
        str(split): [
            Row(_columns(row), f"{named.repo}, split {split}, row {number}") for number, row in enumerate(rows, 1)
        ]
        for split, rows in found.items()
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _local_files(path: Path, settings: Settings) -> dict[str, list[Path]]:
    """Split -> its files, in order. A folder's files are its splits, by stem; one file is the training split."""
    files = [file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.suffix in SUFFIXES]
    if not files:
        what = f"{'holds' if path.is_dir() else 'is'} no {' or '.join(SUFFIXES)} file"
        raise UsageError(what, where=str(path), hint=_instead(path))
    if not path.is_dir():
        return {settings.train_split: files}
    found: dict[str, list[Path]] = {}
    for file in files:
        shard = _SHARD.fullmatch(file.stem)
        found.setdefault(shard["split"] if shard else file.stem, []).append(file)
    for split, some in found.items():
        _check_whole(path, split, some)
    if len(found) == 1 and settings.test_split not in found:
        return {settings.train_split: next(iter(found.values()))}
    return found


def _check_whole(path: Path, split: str, files: Sequence[Path]) -> None:
    """A split is one file, or as many as their names say."""
    shards = [_SHARD.fullmatch(file.stem) for file in files]
    counts = {int(shard["count"]) for shard in shards if shard}
    numbers = {int(shard["number"]) for shard in shards if shard}
    if not counts and len(files) == 1:
        return
    if None in shards or len(counts) > 1 or len(numbers) < len(files):
        raise UsageError(
            f"has two files of one name for split {split}: {', '.join(file.name for file in files)}",
            where=str(path),
            hint="keep one of them for each split",
        )
    if len(files) != max(counts):
        raise UsageError(
            f"has {len(files)} of the {max(counts)} files of split {split}",
            where=str(path),
            hint="download the missing files",
        )


def _instead(path: Path) -> str:
    """What to do about a file or folder without rows that are read here."""
    if path.is_dir():
        inner = [f for f in sorted(path.iterdir()) if f.is_dir() and any(g.suffix in SUFFIXES for g in f.iterdir())]
        return f"give the folder {inner[0]}" if inner else "put train.jsonl, and test.jsonl if there is one, into it"
    ways: Mapping[str, Callable[[], str]] = {
        ".gz": lambda: f"unpack it: gunzip {path}",
        ".json": lambda: "if it has one object a line, name it .jsonl; else write it so",
    }
    return ways.get(path.suffix, lambda: "write a .jsonl file: one JSON object a line")()


__all__ = ["SUFFIXES", "Row", "Rows", "Splits", "splits", "training_rows"]
