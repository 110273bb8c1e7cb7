"""How much disk a run says that it takes, beside what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

from fp4conv.errors import OutputError
from fp4conv.qat.disk import Disk, check_disk, disk_of
from fp4conv.qat.settings import Settings


def test_a_run_of_all_parameters_of_gpt_oss_20b_takes_hundreds_of_gigabytes() -> None:
    """By hand: 41.8 GB of upcast and of the SFT model, two checkpoints of 14 bytes a parameter in QAT."""
    need = disk_of(20_900_000_000, 10_000, Settings(format="mxfp4"), upcasts=True)
    assert need.most == 2 * 41_800_000_000 + 2 * 14 * 20_900_000_000
    assert need.stays == 3 * 41_800_000_000 + 11_756_250_000


def test_adapters_and_few_steps_take_less() -> None:
    options = {"format": "mxfp4", "batch_size": 1, "gradient_accumulation": 1}
    full = disk_of(1000, 5000, Settings(**options), upcasts=False)  # type: ignore[arg-type]
    few = disk_of(1000, 5000, Settings(**options, save_steps=5000), upcasts=False)  # type: ignore[arg-type]
    lora = disk_of(1000, 5000, Settings(**options, lora=True), upcasts=False)  # type: ignore[arg-type]
    assert (
        full.most - few.most == 14_000 - 4_000
    )  # then saving the model takes most: twice 2 bytes beside one checkpoint
    assert lora.most < few.most < full.most
    assert lora.stays == full.stays


def test_a_disk_that_is_too_small_is_refused_and_what_the_run_holds_counts(tmp_path: Path) -> None:
    (tmp_path / "held").write_bytes(bytes(10_000))
    assert "stay" in check_disk(Disk(20_000, 10_000), tmp_path / "new")
    with pytest.raises(OutputError, match=r"the disk is too small: the run takes up to .* TB"):
        check_disk(Disk(10**18, 1), tmp_path)


def test_held_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "held").write_bytes(bytes(900))
    monkeypatch.setattr("fp4conv.qat.disk.free_bytes", lambda _: 100)
    check_disk(Disk(1000, 1), tmp_path)
    with pytest.raises(OutputError):
        check_disk(Disk(1001, 1), tmp_path)
