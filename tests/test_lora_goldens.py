"""Merged adapters against what peft and ModelOpt's converter script made of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapters import SHARE, assert_merged_alike
from checkpoints import array_of, read_raw, tree, write_shard

import fp4conv
from fp4conv.report.converted import ConvertResult

Reference = Callable[[str], Path]
BASES = {"llama": "llama-bf16", "gptoss": "gptoss-bf16", "qwen3moe": "qwen3moe-bf16"}
VARIANTS = (
    "llama-plain",
    "llama-patterns",
    "llama-savehead",
    "gptoss-gateup-only",
    "gptoss-down-only",
    "qwen3moe-experts",
)


def find(reference: Reference, full_reference: Reference, name: str) -> Path:
    """A folder of the whole reference where there is one, else of fixtures/; skips where neither has it."""
    try:
        return reference(name)
    except pytest.skip.Exception:
        return full_reference(name)


def in_fixtures(golden: Path) -> bool:
    """A golden of fixtures/ holds a few of the tensors, and no config."""
    return not (golden / "config.json").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_rounding_gives_what_merge_and_unload_gives(
    reference: Reference, full_reference: Reference, tmp_path: Path, variant: str
) -> None:
    golden = find(reference, full_reference, f"lora-variants/{variant}/merged")
    adapter = find(reference, full_reference, f"lora-variants/{variant}/adapter")
    base = reference(BASES[variant.partition("-")[0]])
    result = fp4conv.convert(base, tmp_path / "out", to="bf16", lora=[adapter], merge_rounding="peft")
    ours, theirs, before = read_raw(tmp_path / "out"), read_raw(golden), read_raw(base)
    if not in_fixtures(golden):
        assert sorted(ours) == sorted(theirs)
    assert_merged_alike(ours, theirs, before)
    assert set(result.merged) == {name for name in ours if ours[name] != before[name]}
    untouched = set(ours) - set(result.merged)
    assert untouched
    assert all(ours[name] == before[name] for name in untouched)


def trained_adapter(adapter: Path, folder: Path) -> Path:
    """The adapter with a ModelOpt state beside it, of which nothing is ever read."""
    shutil.copytree(adapter, folder)
    for name in ("peft_modelopt_state.pth", "quantizer_state_dict.pth", "modelopt_state_train.pth"):
        (folder / name).write_bytes(b"\x80\x05not a pickle to be read")
    return folder


@pytest.mark.parametrize(
    ("adapter", "base", "golden"),
    [
        ("gptoss-lora-qat", "gptoss-bf16", "gptoss-lora-qat-merged-mxfp4"),
        ("gptoss-lora-qat-mxfp4base", "gptoss-mxfp4", "gptoss-lora-qat-mxfp4base-merged-mxfp4"),
    ],
)
def test_modelopts_script_with_lora_path(
    reference: Reference, full_reference: Reference, tmp_path: Path, *, adapter: str, base: str, golden: str
) -> None:
    theirs = find(reference, full_reference, golden)
    result = fp4conv.convert(
        reference(base),
        tmp_path / "out",
        to="mxfp4",
        lora=[find(reference, full_reference, adapter)],
        merge_rounding="peft",
        scale_rule="rceil",
        ties="down",
    )
    ours, expected = read_raw(tmp_path / "out"), read_raw(theirs)
    if not in_fixtures(theirs):
        assert sorted(ours) == sorted(expected)
    differing = scales = codes = 0
    for name, raw in expected.items():
        if not name.endswith(("_blocks", "_scales")):
            continue
        assert ours[name][:2] == raw[:2]
        left, right = (array_of(one[name]).astype(np.uint8) for one in (ours, expected))
        if name.endswith("_scales"):
            differing, scales = differing + int((left != right).sum()), scales + left.size
            continue
        for one, other in ((left & 15, right & 15), (left >> 4, right >> 4)):
            zeros = (one & 7 == 0) & (other & 7 == 0)  # the script writes zeros of either sign as code 8
            differing, codes = differing + int((~zeros & (one != other)).sum()), codes + one.size
    assert differing <= SHARE * (scales + codes)
    dense = {name: raw for name, raw in expected.items() if not name.endswith(("_blocks", "_scales"))}
    assert_merged_alike(ours, dense, read_raw(reference(base)))
    assert all(size is not None and 0.05 < size < 1 for size in result.merged.values())


# ---- what training saw


def test_lora_qat_is_merged_as_its_forward_pass_by_default(reference: Reference, tmp_path: Path) -> None:
    """Factors in BF16, an F32 sum, one rounding to BF16, then rceil and half to even: here in torch, by baddbmm.

    peft's other modes differ from it, so a default that was another would show.
    """
    torch = pytest.importorskip("torch")
    base, adapter = reference("gptoss-bf16"), trained_adapter(reference("gptoss-lora-qat"), tmp_path / "adapter")
    fp4conv.convert(base, tmp_path / "bf16", to="bf16", lora=[adapter])
    by_default = fp4conv.convert(base, tmp_path / "out", to="mxfp4", lora=[adapter])
    fp4conv.convert(tmp_path / "bf16", tmp_path / "same", to="mxfp4", scale_rule="rceil")
    ours, same = read_raw(tmp_path / "out"), read_raw(tmp_path / "same")
    assert {name: raw[2] for name, raw in ours.items()} == {name: raw[2] for name, raw in same.items()}
    assert by_default.beside_sqnr_db is None, "no linear layer was quantised"
    before, tensors, dense = read_raw(base), read_raw(adapter), read_raw(tmp_path / "bf16")
    path = "model.layers.0.mlp.experts"
    for stem, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        w = torch.from_numpy(array_of(before[f"{path}.{stem}"]).astype(np.float32)).bfloat16()
        experts = w.shape[0]
        a, b = (
            torch.from_numpy(array_of(tensors[f"base_model.model.{path}{inner}.lora_{side}.weight"]).copy()).bfloat16()
            for side in "AB"
        )
        left = a.reshape(experts, -1, a.shape[-1]).transpose(-2, -1).float()
        right = b.reshape(b.shape[0], -1, experts).permute(2, 1, 0).float()
        expected = torch.baddbmm(w.float(), left, right, alpha=16 / 8).bfloat16().float().numpy()
        found = array_of(dense[f"{path}.{stem}"]).astype(np.float32)
        assert (found != expected).mean() <= SHARE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "mxfp4"}, []),
        ({"to": "bf16"}, ["unquantised"]),
        ({"to": "nvfp4"}, ["not opened"]),
        ({"to": "mxfp4", "merge_rounding": "peft"}, ["--merge-rounding peft"]),
        ({"to": "mxfp4", "scale_rule": "mse", "ties": "down"}, ["--scale-rule mse", "--ties down"]),
    ],
)
def test_what_departs_from_training_is_said(
    reference: Reference, tmp_path: Path, options: dict[str, str], words: list[str]
) -> None:
    adapter = trained_adapter(reference("gptoss-lora-qat"), tmp_path / "adapter")
    result = fp4conv.convert(reference("gptoss-bf16"), tmp_path / "out", lora=[adapter], **options)  # type: ignore[arg-type]
    told = [warning for warning in result.warnings if "train" in warning]
    assert len(told) == len(words), told
    for word, warning in zip(words, told, strict=True):
        assert word in warning


def test_another_tokenizer_is_worth_a_word(reference: Reference, tmp_path: Path) -> None:
    adapter = shutil.copytree(reference("gptoss-lora-qat"), tmp_path / "adapter")
    base = reference("gptoss-bf16")
    shutil.copyfile(base / "tokenizer.json", adapter / "tokenizer.json")
    (adapter / "chat_template.jinja").write_text("another")
    result = fp4conv.merge_lora(base, adapter, tmp_path / "out")
    assert any("another chat_template.jinja than the base" in warning for warning in result.warnings)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()


def test_rounding_modes_differ(reference: Reference, tmp_path: Path) -> None:
    base, adapter = reference("gptoss-bf16"), reference("gptoss-lora-qat")
    results = {}
    for rounding in ("once", "peft", "training"):
        fp4conv.convert(base, tmp_path / rounding, to="bf16", lora=[adapter], merge_rounding=rounding)
        results[rounding] = read_raw(tmp_path / rounding)["model.layers.0.mlp.experts.gate_up_proj"]
    assert len({raw[2] for raw in results.values()}) == 3
    fp4conv.convert(base, tmp_path / "plain", to="bf16", lora=[adapter])
    states = sorted(file.name for file in adapter.glob("*.pth"))
    expected = results["training" if states else "once"]
    assert read_raw(tmp_path / "plain")["model.layers.0.mlp.experts.gate_up_proj"] == expected


def test_linear_layers_that_training_quantised_alone_are_measured_against_it(
    reference: Reference, tmp_path: Path
) -> None:
    """LoRA-QAT of linear layers runs Q(W) x + B A x: computed here from our own exports of W and of the merge."""
    base = reference("llama-bf16")
    plain = reference("lora-variants/llama-patterns/adapter")
    adapter = trained_adapter(plain, tmp_path / "adapter")
    result = fp4conv.convert(base, tmp_path / "out", to="mxfp4", lora=[adapter])
    assert isinstance(result, ConvertResult)
    assert result.beside_sqnr_db is not None
    assert any("Q(W)" in warning for warning in result.warnings)
    fp4conv.convert(base, tmp_path / "alone", to="mxfp4", scale_rule="rceil")
    fp4conv.convert(base, tmp_path / "delta", to="f32", lora=[plain])
    signal = noise = 0.0
    with (
        fp4conv.open(tmp_path / "out") as merged,
        fp4conv.open(tmp_path / "alone") as alone,
        fp4conv.open(base) as before,
        fp4conv.open(tmp_path / "delta") as after,
    ):
        for name in result.merged:
            delta = after.read(name).astype(np.float64) - before.read(name).astype(np.float64)
            forward = alone.read(name).astype(np.float64) + delta
            signal += float((forward**2).sum())
            noise += float(((merged.read(name).astype(np.float64) - forward) ** 2).sum())
    assert result.beside_sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)


# ---- what must not change


def test_an_mxfp4_base_keeps_the_bytes_of_every_tensor_that_no_adapter_touches(
    reference: Reference, tmp_path: Path
) -> None:
    """Native-like codes: zeros of both signs, scales that no encoder would choose."""
    base = reference("gptoss-mxfp4-native-like")
    adapter = tmp_path / "attention"
    shutil.copytree(reference("gptoss-lora-qat"), adapter)
    keep_tensors(adapter / "adapter_model.safetensors", lambda name: "self_attn" in name)
    result = fp4conv.merge_lora(base, adapter, tmp_path / "out", merge_rounding="once")
    assert result.format == "mxfp4"
    assert result.merged
    assert all("self_attn" in name for name in result.merged)
    ours, before = read_raw(tmp_path / "out"), read_raw(base)
    assert sorted(ours) == sorted(before)
    changed = {name for name in ours if ours[name] != before[name]}
    assert changed == set(result.merged)


def keep_tensors(file: Path, keeps: Callable[[str], bool]) -> None:
    raw = read_raw(file.parent)
    write_shard(file, {name: array_of(one) for name, one in raw.items() if keeps(name)})


def test_bytes_do_not_depend_on_workers_or_memory(reference: Reference, tmp_path: Path) -> None:
    base, adapter = reference("gptoss-mxfp4"), reference("gptoss-lora-qat")
    first = fp4conv.merge_lora(base, adapter, tmp_path / "first", workers=1, merge_rounding="training")
    second = fp4conv.merge_lora(
        base, adapter, tmp_path / "second", workers=3, max_memory="304MB", merge_rounding="training"
    )
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    assert first.merged == second.merged
    assert first.per_tensor == second.per_tensor
