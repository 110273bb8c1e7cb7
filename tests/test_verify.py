"""`verify`: healthy checkpoints pass, each planted fault is found, named, and told what servers make of it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import array_of, config_of, noise, read_raw, tree, write_model
from click.testing import CliRunner
from faults import FAULTS, Tensors, edit_json, edit_tensors, fault_named, inside, planted, weight_only

import fp4conv
from fp4conv.checks.own import BrokenResultError
from fp4conv.cli import main
from fp4conv.commands import convert as conversion
from fp4conv.errors import SourceError
from fp4conv.faults import ABOUT, Kind, Severity
from fp4conv.plan import Plan
from fp4conv.report.verified import Verified, grouped
from fp4conv.servers import SERVERS
from fp4conv.staging import Staging

Bytes = npt.NDArray[np.uint8]
Reference = Callable[[str], Path]
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@dataclass(frozen=True)
class Says:
    """What must be said of a planted fault: its kind, where, and of whom; `count` problems of that kind."""

    kind: str
    where: str
    words: str = ""
    server: str | None = None
    severity: str = "error"
    count: int = 1


# The layers of the cut-down checkpoints; whole ones have more, where `count` is not looked at.
EXPECTED = {
    "missing-scales": Says("incomplete-weight", "layers.0.mlp.experts.gate_up_proj_scales", "memory", "vllm"),
    "missing-tensor-scale": Says("incomplete-weight", "layers.0.mlp.down_proj.weight_scale_2", "memory", "vllm"),
    "missing-norm": Says("missing-tensor", "layers.0.input_layernorm.weight", "memory", "sglang"),
    "missing-bias": Says("missing-expert", "layers.0.mlp.experts.down_proj_bias", "memory", "vllm"),
    "missing-expert": Says("missing-expert", "layers.1.mlp.experts.3.down_proj.weight", "memory", "vllm"),
    "missing-layer": Says("missing-tensor", "model.layers.2", "memory", "sglang"),
    "shard-not-in-index": Says("not-in-index", "model-00002-of-00004.safetensors", "names and no other", "sglang"),
    "index-to-missing-shard": Says("missing-shard", "model-00002-of-00004.safetensors", "FileNotFound", "vllm"),
    "index-to-wrong-shard": Says("wrong-shard", "model.norm.weight", "Mismatch between weight map", "llamacpp"),
    "tensor-in-two-shards": Says("duplicate-tensor", "model.", "order of files"),
    "truncated-shard": Says("unreadable-file", "model-00002-of-00002.safetensors", "no program can open it"),
    "broken-config": Says("bad-config", "config.json", "no program can tell"),
    "orphan-tensor": Says("unknown-tensor", "self_attn.r_proj.weight", "not found in", "sglang", "warning"),
    "wrong-dtype": Says("wrong-dtype", "layers.0.mlp.up_proj.weight_scale", "something else"),
    "wrong-rows": Says("wrong-shape", "layers.0.mlp.up_proj.weight", "another shape", "vllm"),
    "wrong-vocabulary": Says("wrong-shape", "lm_head.weight", "another shape", "vllm"),
    "expert-count": Says("wrong-shape", "layers.0.mlp.experts.gate_up_proj_blocks", "refuse", "vllm", count=6),
    "qkv-tensor-scales": Says("tensor-scales-differ", "layers.0.self_attn.", "the largest for all", "vllm"),
    "gate-up-tensor-scales": Says("tensor-scales-differ", "layers.1.mlp.experts.2.", "the scale of gate", "vllm"),
    "set-in-part": Says("set-in-part", "layers.0.self_attn.", "some but not all shards", "vllm"),
    "missing-input-scale": Says("missing-input-scale", "layers.1.mlp.down_proj.input_scale", "memory", "vllm"),
    "nan-block-scale": Says("nan-block-scale", "layers.0.mlp.up_proj.weight_scale", "not looked at", "sglang"),
    "nan-block-scale-mxfp4": Says("nan-block-scale", "experts.down_proj_scales", "become NaN", "vllm"),
    "zero-block-scale": Says("zero-block-scale", "layers.0.mlp.up_proj.weight_scale", "reads as zeros", "vllm"),
    "overflowing-block-scale": Says("overflowing-block", "experts.down_proj_scales", "infinity", "vllm"),
    "zero-tensor-scale": Says("bad-tensor-scale", "layers.0.mlp.down_proj.weight_scale_2", "lost", "vllm"),
    "nan-tensor-scale": Says("bad-tensor-scale", "layers.0.mlp.down_proj.weight_scale_2", "lost", "vllm"),
    "nan-in-norm": Says("nonfinite-values", "model.norm.weight", "NaN"),
    "layer-prefix-ignored": Says("quantised-but-ignored", "model.layers.10.", "'layers.1' takes", "vllm", count=8),
    "quantised-but-ignored": Says("quantised-but-ignored", "layers.0.mlp.down_proj", "takes", "vllm", count=3),
    "nested-only-file": Says("nested-weight-only", "config.json", "Unknown ModelOpt quant algo", "vllm"),
    "nested-only-key": Says("nested-weight-only", "config.json", "Unknown ModelOpt quant algo", "vllm"),
    "transposed-experts-bf16": Says("transposed-experts", "experts.gate_up_proj", "another shape", "vllm", count=2),
    "transposed-experts-mxfp4": Says("transposed-experts", "gate_up_proj_blocks", "wider than", "vllm", count=2),
    "transposed-experts-nvfp4": Says("transposed-experts", "experts.gate_up_proj", "wrong matrix", "vllm", count=2),
    "bf16-under-blocks": Says("misnamed-experts", "experts.gate_up_proj_blocks", "memory", "sglang", count=2),
    "group-size-in-neither": Says("group-size-missing", "hf_quant_config.json", "guess the block length"),
    "group-size-differs": Says("group-size-differs", "config.json", "the next the other"),
    "algorithms-differ": Says("algorithm-differs", "hf_quant_config.json", "the next the other"),
    "ignore-lists-differ": Says("ignore-lists-differ", "hf_quant_config.json", "the next the other"),
}
KNOWN_COMPANIONS = {
    "group-size-differs": {"group-size-wrong"},
    "ignore-lists-differ": {"dense-but-not-ignored"},
    "broken-config": {"nested-only"},
}
MODELOPT_NOTE = "group-size-nested"  # of every export of ModelOpt: a warning


def kinds(found: Verified, *severities: str) -> set[str]:
    wanted = severities or ("error", "warning")
    return {problem.kind for problem in found.problems if problem.severity.value in wanted}


def saying(key: str, value: object) -> Callable[[dict[str, object]], object]:
    """A change of a config: `key` says `value`."""
    return lambda config: config.update({key: value})


# ---- planted faults


def test_every_fault_has_an_expectation() -> None:
    assert {fault.name for fault in FAULTS} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_planted_fault_is_found(tmp_path: Path, name: str) -> None:
    """In the cut-down checkpoint; and nothing else is called an error."""
    fault, says = fault_named(name), EXPECTED[name]
    found = fp4conv.verify(planted(fault, FIXTURES / fault.base, tmp_path / "src"))
    hits = [problem for problem in found.problems if problem.kind == says.kind]
    assert len(hits) == says.count, [problem.found for problem in hits]
    hit = next(problem for problem in hits if says.where in (problem.tensor or problem.file or ""))
    assert hit.severity.value == says.severity
    assert says.words in hit.consequence
    assert hit.server == says.server
    assert found.ok is (says.severity != "error")
    assert kinds(found, "error") - KNOWN_COMPANIONS.get(name, set()) == ({says.kind} if not found.ok else set())


def test_the_healthy_bases_of_the_faults_pass() -> None:
    for base in {fault.base for fault in FAULTS}:
        found = fp4conv.verify(FIXTURES / base)
        assert found.ok
        assert kinds(found) <= {MODELOPT_NOTE}


def test_several_faults_at_once_are_all_told(tmp_path: Path) -> None:
    names = ("qkv-tensor-scales", "zero-block-scale", "missing-input-scale", "algorithms-differ")
    folder = planted(fault_named(names[0]), FIXTURES / "llama-nvfp4-default", tmp_path / "src")
    for name in names[1:]:
        fault_named(name).plant(folder)
    assert {EXPECTED[name].kind for name in names} <= kinds(fp4conv.verify(folder), "error")


def test_a_source_is_not_written_to(tmp_path: Path) -> None:
    folder = planted(fault_named("truncated-shard"), FIXTURES / "gptoss-mxfp4-native-like", tmp_path / "src")
    before = tree(tmp_path)
    fp4conv.verify(folder)
    assert tree(tmp_path) == before


def test_a_shard_that_cannot_be_read_does_not_hide_what_else_is_wrong(tmp_path: Path) -> None:
    """Its own tensors are not called missing a second time: the index names them."""
    folder = planted(fault_named("truncated-shard"), FIXTURES / "gptoss-mxfp4-native-like", tmp_path / "src")
    first = sorted(folder.glob("*.safetensors"))[0]
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    for other in alone.glob("*.safetensors"):
        if other.name != first.name:
            other.unlink()
    assert kinds(fp4conv.verify(folder), "error") == {"unreadable-file"}
    assert kinds(fp4conv.verify(alone), "error") == {"missing-shard"}


def test_reciprocals_that_differ_in_compressed_tensors(tmp_path: Path, reference: Reference) -> None:
    fp4conv.convert(reference("llama-bf16"), tmp_path / "out", to="nvfp4", layout="compressed-tensors")
    name = "model.layers.1.mlp.up_proj.weight_global_scale"
    edit_tensors(tmp_path / "out", lambda tensors: tensors.update({name: tensors[name] * np.float32(2)}))  # type: ignore[operator]
    [hit] = [problem for problem in fp4conv.verify(tmp_path / "out").problems if problem.severity is Severity.ERROR]
    assert hit.kind == "tensor-scales-differ"
    assert "the smallest scale" in hit.consequence


def test_fp8_with_a_scale_a_tile(tmp_path: Path, reference: Reference) -> None:
    """Sound, and with a NaN among its codes and another among its scales."""
    tensors: Tensors = {name: array_of(raw) for name, raw in read_raw(reference("llama-bf16")).items()}
    stem = "model.layers.0.mlp.up_proj.weight"
    tensors[stem] = tensors[stem].astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    tensors[stem + "_scale_inv"] = np.ones((2, 1), np.float32)
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {**config_of(reference("llama-bf16")), "quantization_config": said}
    assert kinds(fp4conv.verify(write_model(tmp_path / "sound", tensors, config))) == set()
    tensors[stem].view(np.uint8)[0, 0] = 0x7F
    tensors[stem + "_scale_inv"][1] = np.nan
    found = fp4conv.verify(write_model(tmp_path / "nan", tensors, config))
    assert {problem.tensor for problem in found.problems} == {stem, stem + "_scale_inv"}


# ---- for one server


@pytest.mark.parametrize(
    ("name", "server", "severity"),
    [
        ("shard-not-in-index", "vllm", "error"),
        ("index-to-wrong-shard", "vllm", "warning"),
        ("nan-block-scale", "vllm", "error"),
        ("gate-up-tensor-scales", "llamacpp", "warning"),
        ("qkv-tensor-scales", "trtllm", "error"),
        ("missing-input-scale", "trtllm", "warning"),
        ("nested-only-file", "sglang", "warning"),
        ("group-size-in-neither", "sglang", "warning"),
        ("algorithms-differ", "vllm", "warning"),
        ("orphan-tensor", "vllm", "error"),
    ],
)
def test_a_fault_matters_as_the_server_reads_it(tmp_path: Path, name: str, server: str, severity: str) -> None:
    fault = fault_named(name)
    folder = planted(fault, FIXTURES / fault.base, tmp_path / "src")
    found = fp4conv.verify(folder, for_server=server)
    [hit] = [problem for problem in found.problems if problem.kind == EXPECTED[name].kind]
    assert (hit.severity.value, hit.server) == (severity, server)
    [reading] = hit.readings
    assert reading.source.startswith("https://github.com/")


def test_only_the_servers_own_list_matching_counts(tmp_path: Path) -> None:
    """vLLM takes any part of a name; SGLang and TensorRT-LLM do not, and read the same list well."""
    fault = fault_named("layer-prefix-ignored")
    folder = planted(fault, FIXTURES / fault.base, tmp_path / "src")
    assert not fp4conv.verify(folder, for_server="vllm").ok
    assert fp4conv.verify(folder, for_server="sglang").ok


@pytest.mark.parametrize("server", ["vllm", "sglang", "transformers", "llamacpp"])
def test_a_sound_checkpoint_that_a_server_cannot_read(server: str) -> None:
    found = fp4conv.verify(FIXTURES / "gptoss-nvfp4-default", for_server=server)
    assert not found.ok
    first = found.problems[0]
    assert (first.kind, first.server) == ("will-not-load", server)
    assert first.consequence
    assert fp4conv.verify(FIXTURES / "gptoss-nvfp4-default").ok


def test_a_missing_top_level_group_size_is_no_error_for_tensorrt_llm() -> None:
    """Its flat reader leaves it None and refuses nothing; with hf_quant_config.json beside, that file is read."""
    found = fp4conv.verify(FIXTURES / "llama-nvfp4-default", for_server="trtllm")
    assert found.ok
    assert kinds(found, "note") == {MODELOPT_NOTE}


def test_weight_only_in_both_forms_is_sound(tmp_path: Path) -> None:
    folder = tmp_path / "src"
    shutil.copytree(FIXTURES / "llama-nvfp4-default", folder)
    weight_only(folder)
    found = fp4conv.verify(folder, for_server="vllm")
    assert found.ok
    assert kinds(found) == set()


# ---- reference checkpoints


GROUP_32 = ("weight-only",)
BROKEN = {
    "gptoss-bf16-from-mxfp4-hf523-blocks-names": "misnamed-experts",
    "gptoss-qat-fakequant-mxfp4-from-mxfp4base": "misnamed-experts",
    "gptoss-mxfp4-attempt-export": "no-reader",
    "llama-mxfp4-attempt-default": "no-reader",
    "llama-mxfp4-attempt-mlp-weight-only": "no-reader",
    "qwen3moe-mxfp4-attempt-default": "no-reader",
    "qwen3moe-mxfp4-attempt-mlp-weight-only": "no-reader",
    "gptoss-nvfp4-weight-only": "block-length",
    "gptoss-nvfp4-from-qat-weight-only": "block-length",
    "llama-nvfp4-weight-only": "block-length",
    "qwen3moe-nvfp4-weight-only": "block-length",
}


def verdict_of(folder: Path, name: str) -> None:
    """A reference checkpoint passes, or is one of those of which it is known what is wrong."""
    found = fp4conv.verify(folder)
    if (folder / "adapter_config.json").exists():
        assert kinds(found, "error") == {"not-a-checkpoint"}, name
        assert "adapter" in found.problems[0].found
    elif name in BROKEN:
        assert kinds(found, "error") == {BROKEN[name]}, name
    else:
        assert kinds(found, "error") == set(), (name, found.problems)
        assert kinds(found, "warning") <= {MODELOPT_NOTE}, name


def test_the_cut_down_reference_checkpoints() -> None:
    folders = [path.parent for path in FIXTURES.rglob("config.json")] + [
        path.parent for path in FIXTURES.rglob("adapter_config.json")
    ]
    assert len(folders) > 20
    for folder in folders:
        verdict_of(folder, folder.name)


def test_the_whole_reference_checkpoints(full_reference: Reference) -> None:
    root = full_reference("llama-bf16").parent
    folders = {path.parent for path in root.rglob("*.safetensors")}
    assert len(folders) > 50
    for folder in sorted(folders):
        verdict_of(folder, folder.name)


# ---- what convert writes


@pytest.mark.parametrize(
    ("source", "to", "layout"),
    [
        ("gptoss-bf16", "mxfp4", None),
        ("gptoss-bf16", "mxfp4", "openai-original"),
        ("gptoss-bf16", "nvfp4", None),
        ("gptoss-mxfp4-native-like", "bf16", None),
        ("gptoss-mxfp4-native-like", "nvfp4", None),
        ("gptoss-nvfp4-default", "nvfp4", None),
        ("llama-bf16", "f32", None),
        ("llama-bf16", "mxfp4", None),
        ("llama-bf16", "nvfp4", "compressed-tensors"),
        ("llama-nvfp4-default", "nvfp4", "modelopt"),
        ("llama-nvfp4-default", "nvfp4", "compressed-tensors"),
        ("llama-nvfp4-weight-only", "nvfp4", None),
        ("llama-qat-fakequant-nvfp4-default", "nvfp4", None),
        ("qwen3moe-bf16", "nvfp4", None),
        ("qwen3moe-bf16", "mxfp4", None),
        ("qwen3moe-nvfp4-default", "mxfp4", None),
    ],
)
def test_our_own_output_has_no_problem(
    reference: Reference, tmp_path: Path, source: str, to: str, layout: str | None
) -> None:
    fp4conv.convert(reference(source), tmp_path / "out", to=to, layout=layout, max_shard_size=150_000)
    found = fp4conv.verify(tmp_path / "out")
    assert kinds(found) == set(), found.problems
    for server in SERVERS:
        verdict = next(verdict for verdict in found.servers if verdict.server == server)
        assert fp4conv.verify(tmp_path / "out", for_server=server).ok is (verdict.outcome in ("loads", "unknown"))


def test_a_result_that_is_not_what_was_planned_gets_no_name(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug is planted: configs are written with another group size than the weights have."""
    written = conversion.write_files

    def broken(plan: Plan, out: Staging) -> None:
        written(plan, out)
        edit_json(out.root, "config.json", lambda model: inside(model, "quantization_config").update(group_size=32))

    monkeypatch.setattr(conversion, "write_files", broken)
    with pytest.raises(BrokenResultError, match=r"bug in fp4conv.*group_size"):
        fp4conv.convert(reference("llama-bf16"), tmp_path / "out", to="nvfp4")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()


@pytest.mark.parametrize("name", ["missing-norm", "wrong-rows", "orphan-tensor"])
def test_what_the_source_lacks_is_no_bug_of_ours(tmp_path: Path, name: str) -> None:
    fault = fault_named(name)
    source = planted(fault, FIXTURES / fault.base, tmp_path / "src")
    fp4conv.convert(source, tmp_path / "out", to="nvfp4", max_shard_size=150_000)
    assert EXPECTED[name].kind in kinds(fp4conv.verify(tmp_path / "out"))


def test_damaged_hints_are_told(reference: Reference, tmp_path: Path) -> None:
    fp4conv.convert(reference("gptoss-mxfp4-native-like"), tmp_path / "out", to="bf16")
    assert fp4conv.verify(tmp_path / "out").hints
    hints = next((tmp_path / "out" / "fp4conv").glob("*.safetensors"))
    content = bytearray(hints.read_bytes())
    content[-1] ^= 1
    hints.write_bytes(content)
    found = fp4conv.verify(tmp_path / "out")
    assert kinds(found, "error") == {"hints-damaged"}


# ---- against what it was made from


def test_a_lossless_conversion_is_called_so(reference: Reference, tmp_path: Path) -> None:
    """Of another format, orientation and sharding."""
    source = reference("gptoss-mxfp4-native-like")
    fp4conv.convert(source, tmp_path / "out", to="bf16", max_shard_size=150_000)
    found = fp4conv.verify(tmp_path / "out", original=source)
    assert found.ok
    assert found.against is not None
    assert (found.against.lossless, found.against.sqnr_db) == (True, None)
    assert set(found.against.per_tensor.values()) == {None}


def test_a_lossy_conversion_has_its_figures(reference: Reference, tmp_path: Path) -> None:
    """Those that convert gave, tensor by tensor; what it copied is the same."""
    source = reference("llama-bf16")
    converted = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    found = fp4conv.verify(tmp_path / "out", original=source)
    assert found.ok
    assert found.against is not None
    assert not found.against.lossless
    assert found.against.same == found.against.tensors - len(converted.per_tensor)
    for name, db in converted.per_tensor.items():
        assert found.against.per_tensor[name] == pytest.approx(db, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
        (lambda tensors: tensors.update({"model.extra.weight": noise((4, 4))}), "model.extra.weight"),
        (lambda tensors: tensors.update({"model.norm.weight": noise((128,), 9)}), "model.norm.weight"),
        (lambda tensors: tensors.update({"lm_head.weight": noise((64, 128))}), "lm_head.weight"),
    ],
)
def test_what_was_not_made_from_the_source(
    reference: Reference, tmp_path: Path, change: Callable[[Tensors], object], tensor: str
) -> None:
    source = reference("llama-bf16")
    folder = tmp_path / "src"
    shutil.copytree(source, folder)
    edit_tensors(folder, change)
    found = fp4conv.verify(folder, original=source)
    [hit] = [problem for problem in found.problems if problem.kind == "source-mismatch"]
    assert hit.tensor == tensor
    assert not found.ok


def test_weights_of_another_model_are_told(reference: Reference, tmp_path: Path) -> None:
    """Codes that say something else than the source, in a checkpoint that is sound by itself."""
    source = reference("llama-bf16")
    fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    stem = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(tmp_path / "out", lambda tensors: tensors.update({stem: np.roll(tensors[stem], 1, axis=0)}))
    assert fp4conv.verify(tmp_path / "out").ok
    found = fp4conv.verify(tmp_path / "out", original=source)
    assert [problem.tensor for problem in found.problems if problem.severity is Severity.ERROR] == [stem]


def test_a_broken_checkpoint_beside_its_source(reference: Reference, tmp_path: Path) -> None:
    fault = fault_named("missing-scales")
    folder = planted(fault, FIXTURES / fault.base, tmp_path / "src")
    found = fp4conv.verify(folder, original=reference("gptoss-bf16"))
    assert kinds(found, "error") == {"incomplete-weight", "source-mismatch"}
    with pytest.raises(SourceError):
        fp4conv.verify(FIXTURES / "llama-bf16", original=folder)


# ---- what no config's table knows


def test_a_model_type_that_is_not_known_is_compared_layer_by_layer(tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.mlp.up_proj.weight": noise((32, 32), layer) for layer in range(3)}
    tensors |= {f"model.layers.{layer}.mlp.down_proj.weight": noise((32, 32), layer) for layer in range(2)}
    folder = write_model(tmp_path / "src", tensors, {"model_type": "novel", "num_hidden_layers": 3})
    found = fp4conv.verify(folder)
    assert found.ok
    assert kinds(found) == {"poorer-layer"}
    assert not found.known_type


def test_a_checkpoint_of_another_kind_is_said_to_be_unchecked(tmp_path: Path, reference: Reference) -> None:
    """bitsandbytes: an integer weight and its scales."""
    folder = tmp_path / "src"
    shutil.copytree(reference("llama-bf16"), folder)

    def change(tensors: Tensors) -> None:
        stem = "model.layers.0.mlp.up_proj"
        tensors[f"{stem}.weight"] = np.ones((192, 128), np.int8)
        tensors[f"{stem}.SCB"] = np.ones(192, np.float32)

    edit_tensors(folder, change)
    found = fp4conv.verify(folder)
    [problem] = found.problems
    assert problem.kind == "foreign-format"
    assert "nothing of it was checked" in problem.consequence


def test_an_empty_quantisation_config_claims_nothing(tmp_path: Path, reference: Reference) -> None:
    folder = tmp_path / "src"
    shutil.copytree(reference("llama-bf16"), folder)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    assert kinds(fp4conv.verify(folder)) == set()


def test_gpt_oss_that_lacks_its_marks_is_still_read_as_such(tmp_path: Path, reference: Reference) -> None:
    """Without sinks its tensors look like another family's; its experts are not called turned for that."""
    folder = tmp_path / "src"
    shutil.copytree(reference("gptoss-nvfp4-default"), folder)
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("sinks")])
    assert kinds(fp4conv.verify(folder), "error") == {"missing-tensor"}


def test_a_model_within_another_is_compared_layer_by_layer(tmp_path: Path, reference: Reference) -> None:
    tensors = {f"language_model.{name}": array_of(raw) for name, raw in read_raw(reference("llama-bf16")).items()}
    folder = write_model(tmp_path / "src", tensors, config_of(reference("llama-bf16")))
    found = fp4conv.verify(folder)
    assert found.ok
    assert kinds(found) == set()


def test_tied_embeddings_need_no_head(tmp_path: Path, reference: Reference) -> None:
    source = reference("llama-bf16")
    tensors = {name: array_of(raw) for name, raw in read_raw(source).items() if name != "lm_head.weight"}
    tied = write_model(tmp_path / "tied", tensors, {**config_of(source), "tie_word_embeddings": True})
    assert kinds(fp4conv.verify(tied)) == set()
    untied = write_model(tmp_path / "untied", tensors, config_of(source))
    assert kinds(fp4conv.verify(untied), "error") == {"missing-tensor"}


def test_a_config_cannot_make_it_count_for_ever(tmp_path: Path, reference: Reference) -> None:
    for key in ("num_hidden_layers", "num_local_experts"):
        folder = tmp_path / key
        shutil.copytree(reference("qwen3moe-bf16"), folder)
        edit_json(folder, "config.json", saying(key, 10**12))
        assert not fp4conv.verify(folder).ok


# ---- values


def numpy_counts(scales: Bytes, codes: Bytes) -> tuple[int, int]:
    """(NaN scales, zero scales over values) of E4M3 bytes [..., N, B] and codes [..., N, B, 8], by ml_dtypes."""
    values = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    any_value = ((codes & 0x77) != 0).any(axis=-1)
    return int(np.isnan(values).sum()), int(((values == 0) & any_value).sum())


@pytest.mark.parametrize("turned", [False, True])
def test_counts_of_block_scales_are_numpys(tmp_path: Path, reference: Reference, turned: bool) -> None:
    """Random scale bytes, NaN and zeros of both signs among them; K-major for the experts of gpt-oss."""
    folder = tmp_path / "src"
    shutil.copytree(reference("gptoss-nvfp4-default"), folder)
    stem = "model.layers.0.mlp.experts.gate_up_proj" if turned else "model.layers.0.self_attn.q_proj.weight"
    rng = np.random.default_rng(7)
    kept: dict[str, Bytes] = {}

    def change(tensors: Tensors) -> None:
        scale_name = stem + ("_weight_scale" if turned else "_scale")
        scales = rng.integers(0, 256, tensors[scale_name].shape).astype(np.uint8)
        scales[rng.random(scales.shape) < 0.3] = 0
        codes = rng.integers(0, 256, tensors[stem].shape).astype(np.uint8)
        codes[..., : codes.shape[-1] // 2] &= 0x88  # zeros of both signs
        tensors[scale_name] = scales.view(ml_dtypes.float8_e4m3fn)
        tensors[stem] = codes
        if turned:
            scales, codes = np.swapaxes(scales, -1, -2), np.swapaxes(codes, -1, -2)
        kept["scales"] = np.ascontiguousarray(scales)
        kept["codes"] = np.ascontiguousarray(codes).reshape(*scales.shape, 8)

    edit_tensors(folder, change)
    nan, zero = numpy_counts(kept["scales"], kept["codes"])
    assert nan
    assert zero
    for memory, workers in (("200MB", 1), ("1GB", 3)):
        found = fp4conv.verify(folder, max_memory=memory, workers=workers)
        counts = {problem.kind: problem.found for problem in found.problems if (problem.weight or "").startswith(stem)}
        assert counts["nan-block-scale"].startswith(f"{nan:,} of ")
        assert counts["zero-block-scale"].startswith(f"{zero:,} of ")


def test_a_zero_scale_over_zero_codes_is_fine(tmp_path: Path) -> None:
    folder = tmp_path / "src"
    shutil.copytree(FIXTURES / "llama-nvfp4-default", folder)

    def change(tensors: Tensors) -> None:
        stem = "model.layers.0.mlp.up_proj.weight"
        codes, scales = np.array(tensors[stem]), np.array(tensors[stem + "_scale"])
        codes[:, :8], scales.view(np.uint8)[:, 0] = 0, 0
        tensors[stem], tensors[stem + "_scale"] = codes, scales

    edit_tensors(folder, change)
    assert fp4conv.verify(folder).ok


# ---- the tables and the command


def test_every_kind_has_its_words() -> None:
    assert set(ABOUT) == set(Kind)
    for about in ABOUT.values():
        assert isinstance(about.severity, Severity)
        assert about.consequence
        assert about.remedy


def test_a_fault_of_many_layers_is_one_line(tmp_path: Path) -> None:
    """And of many modules, where the same is said of all."""
    folder = planted(fault_named("layer-prefix-ignored"), FIXTURES / "llama-nvfp4-default", tmp_path / "src")
    errors = [group for group in grouped(fp4conv.verify(folder).problems) if group.first.severity is Severity.ERROR]
    [group] = errors
    assert group.count == 8
    assert "model.layers.{10..11}.self_attn.qkv_proj" in group.places
    assert len(group.places) == 4


def test_the_command(tmp_path: Path) -> None:
    folder = planted(fault_named("gate-up-tensor-scales"), FIXTURES / "qwen3moe-nvfp4-default", tmp_path / "src")
    run = CliRunner().invoke(main, ["verify", str(folder)])
    assert run.exit_code == 1
    words = " ".join(run.stdout.split())
    for part in ("error", "experts.2.gate_proj.weight_scale_2", "vLLM 0.33.0 goes wrong in silence", "--repair"):
        assert part in words
    run = CliRunner().invoke(main, ["verify", str(folder), "--json"])
    assert run.exit_code == 1
    said = json.loads(run.stdout)
    assert said["ok"] is False
    [problem] = [problem for problem in said["problems"] if problem["severity"] == "error"]
    assert {"severity", "tensor", "file", "found", "expected", "consequence", "server"} <= set(problem)
    assert [reading["server"] for reading in problem["servers"]] == ["vllm", "sglang", "trtllm", "llamacpp"]


def test_the_command_with_a_source() -> None:
    folder = str(FIXTURES / "llama-bf16")
    run = CliRunner().invoke(main, ["verify", folder, "--source", folder])
    assert run.exit_code == 0
    assert "lossless, every value of 21 tensors is the same" in " ".join(run.stdout.split())
    run = CliRunner().invoke(main, ["verify", folder, "--source", folder, "--json"])
    assert json.loads(run.stdout)["against"]["lossless"] is True


@pytest.mark.parametrize("name", ["group-size-differs", "algorithms-differ", "qkv-tensor-scales", "nested-only-file"])
def test_the_remedy_mends_it(tmp_path: Path, name: str) -> None:
    """The command that a problem names, typed as it stands."""
    fault = fault_named(name)
    folder = planted(fault, FIXTURES / fault.base, tmp_path / "src")
    error = next(problem for problem in fp4conv.verify(folder).problems if problem.severity is Severity.ERROR)
    words = shlex.split(error.remedy.partition("fp4conv ")[2].partition(" (")[0].replace("DST", str(tmp_path / "out")))
    assert CliRunner().invoke(main, words).exit_code == 0
    assert kinds(fp4conv.verify(tmp_path / "out")) == set()


def test_the_command_on_a_sound_checkpoint() -> None:
    run = CliRunner().invoke(main, ["verify", str(FIXTURES / "llama-bf16")])
    assert run.exit_code == 0
    assert "every name and shape that config.json promises" in " ".join(run.stdout.split())
    assert "no problem found" in run.stdout


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        fp4conv.verify(tmp_path / "nowhere")
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "nowhere")]).exit_code == 1


def test_configs_of_odd_shapes_are_problems_not_tracebacks(tmp_path: Path) -> None:
    oddities: list[object] = [[], "x", {"config_groups": [1]}, {"ignore": {"a": 1}}, {"quantization": 3}, None]
    for number, odd in enumerate(oddities):
        folder = tmp_path / str(number)
        shutil.copytree(FIXTURES / "llama-nvfp4-default", folder)
        edit_json(folder, "config.json", saying("quantization_config", odd))
        edit_json(folder, "hf_quant_config.json", lambda other: inside(other, "quantization").clear())
        assert not fp4conv.verify(folder).ok
