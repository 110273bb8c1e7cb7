"""A disk or a GPU that is full while a run works."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch

from fp4conv.errors import OutputError, PlanError, UsageError
from fp4conv.qat.shortages import shortages


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"the disk is full[^$]*make room"), shortages(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("fp4conv.qat.shortages.free_bytes", lambda _: 4096)
    with pytest.raises(OutputError, match="the disk is full"), shortages(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/1")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OutputError, match=r"report.json: Is a directory"), shortages(tmp_path):
        (tmp_path / "report.json").write_text("x")


def test_a_full_gpu_says_what_takes_less(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"the GPU's memory is at an end[^$]*--batch-size"), shortages(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_ctrl_c_says_that_nothing_is_lost(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="The same command goes on"), shortages(tmp_path):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match="what a conversion says"), shortages(tmp_path):
        raise KeyboardInterrupt("what a conversion says")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("a"), UsageError("b")])
def test_other_errors_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as found, shortages(tmp_path):
        raise error
    assert found.value is error
