"""How many threads merge an adapter within the memory that a run has: against the plan of that very merge."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft")

from transformers import AutoModelForCausalLM

from fp4conv.commands.convert import plan_conversion
from fp4conv.errors import PlanError, UsageError
from fp4conv.plan import block_budget, reserved_bytes
from fp4conv.qat.adapters import with_adapters
from fp4conv.qat.converting import threads
from fp4conv.qat.made import FAMILIES, Task, write_model
from fp4conv.qat.models import parsed
from fp4conv.qat.settings import settings_from
from fp4conv.sizes import parse_size

CORES = 400


@pytest.mark.parametrize("family", FAMILIES)
def test_on_many_cores_as_many_threads_merge_as_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """On 192 cores the factors of gpt-oss-120b's experts would take more than 4 GB, which came out after training."""
    monkeypatch.setattr("fp4conv.qat.converting.available_cores", lambda: CORES)
    folder, memory = tmp_path / "model", "700MB"
    write_model(folder, Task(rules=2, prime=5), family=family)
    settings = settings_from({"model": str(folder), "lora": True, "lora_rank": 512, "max_memory": memory})
    with_adapters(AutoModelForCausalLM.from_pretrained(folder), settings, ()).save_pretrained(tmp_path / "adapter")
    plan = plan_conversion(folder, to="bf16", lora=[tmp_path / "adapter"])
    found = threads(parsed(folder), settings, merges=True)
    assert 1 <= found < CORES
    block_budget(parse_size(memory), found, reserved_bytes(plan, found))
    with pytest.raises(PlanError):
        block_budget(parse_size(memory), CORES, reserved_bytes(plan, CORES))


def test_where_not_one_has_room_it_is_said_with_what_would_do(tmp_path: Path) -> None:
    write_model(tmp_path, Task(rules=2, prime=5))
    words = {"model": str(tmp_path), "lora": True, "lora_rank": 9000}
    with pytest.raises(UsageError, match=r"leaves no room .*\n  give at least [3-9]\d\d\S*MB") as refused:
        threads(parsed(tmp_path), settings_from({**words, "max_memory": "310MB"}), merges=True)
    enough = str(refused.value).rpartition(" ")[2]
    assert threads(parsed(tmp_path), settings_from({**words, "max_memory": enough}), merges=True) == 1
