"""Plans, from headers alone: what is done to each weight, what makes two commands the same, what is refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Array, array_of, bf16, config_of, decode_mxfp4, noise, read_raw, write_model

import fp4conv
from fp4conv.commands.convert import plan_conversion
from fp4conv.errors import Fp4convError, PlanError, SourceError, UsageError
from fp4conv.plan import Action, Plan, Span, Unit, units
from fp4conv.safetensors_io import Reader, TensorRef

Reference = Callable[[str], Path]
LAYER = "model.layers.0"


def actions(plan: Plan) -> Counter[str]:
    return Counter(step.action.value for step in plan.steps)


@pytest.fixture(autouse=True)
def no_reads_while_planning(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """In the tests that only plan, reading a tensor is an error."""
    if "tmp_path" not in request.fixturenames:

        def refuse(*_: object, **__: object) -> None:
            pytest.fail("a plan reads no tensor")

        monkeypatch.setattr(Reader, "read_into", refuse)
        monkeypatch.setattr(Reader, "read_strided", refuse)


# ---- what happens to each weight


@pytest.mark.parametrize(
    ("name", "to", "expected"),
    [
        ("gptoss-bf16", "mxfp4", {"quantize"}),
        ("gptoss-bf16", "f32", {"cast"}),
        ("gptoss-bf16", "bf16", set()),
        ("gptoss-mxfp4", "mxfp4", set()),
        ("gptoss-mxfp4", "bf16", {"dequantize"}),
        ("gptoss-mxfp4", "f16", {"dequantize", "cast"}),
        ("gptoss-mxfp4", "nvfp4", {"transcode"}),
        ("gptoss-nvfp4-mlp-only", "mxfp4", {"transcode"}),
        ("gptoss-nvfp4-weight-only", "nvfp4", {"reblock"}),
        ("gptoss-nvfp4-default", "nvfp4", set()),
    ],
)
def test_actions(reference: Reference, name: str, to: str, expected: set[str]) -> None:
    plan = plan_conversion(reference(name), to=to)
    assert set(actions(plan)) - {"copy"} == expected
    assert sum(step.bytes_written for step in plan.steps) == sum(
        ref.spec.nbytes for shard in plan.shards.values() for ref in shard.tensors
    )
    names = [output.part.name for step in plan.steps for output in step.outputs]
    assert len(names) == len(set(names))


def test_a_quantised_source_keeps_its_choice_of_modules(reference: Reference) -> None:
    """What the source has in four bits stays in four bits, and nothing else is quantised unasked."""
    source = reference("llama-nvfp4-mlp-only")
    before = {f.name for f in fp4conv.inspect(source, headers_only=True).tensors if f.format.startswith("nvfp4")}
    assert before
    plan = plan_conversion(source, to="mxfp4")
    assert {step.weight.name for step in plan.steps if step.target == "mxfp4" and step.weight} == before
    wider = plan_conversion(source, to="nvfp4", modules="all", input_scales="none")
    assert actions(wider)["quantize"] == 8
    assert {step.weight.name for step in wider.steps if step.action is Action.COPY and step.weight} >= before


def test_excluding_from_the_own_format_decodes(reference: Reference, tmp_path: Path) -> None:
    source = reference("llama-nvfp4-default")
    fp4conv.convert(source, tmp_path / "out", to="nvfp4", exclude=["*.self_attn.*"])
    fp4conv.convert(source, tmp_path / "bf16", to="bf16")
    raw, dense = read_raw(tmp_path / "out"), read_raw(tmp_path / "bf16")
    for leaf in "qkvo":
        assert raw[f"{LAYER}.self_attn.{leaf}_proj.weight"] == dense[f"{LAYER}.self_attn.{leaf}_proj.weight"]
    assert raw[f"{LAYER}.mlp.up_proj.weight"] == read_raw(source)[f"{LAYER}.mlp.up_proj.weight"]
    written = config_of(tmp_path / "out")["quantization_config"]
    assert isinstance(written, dict)
    assert f"{LAYER}.self_attn.q_proj" in written["ignore"]


def test_a_set_of_which_a_part_is_quantised_already(reference: Reference, tmp_path: Path) -> None:
    """The stored tensor scale of one member and a new one for another: servers would take the larger, in silence."""
    source = tmp_path / "src"
    fp4conv.convert(reference("llama-bf16"), source, to="nvfp4")
    raw = read_raw(source)
    dense = read_raw(reference("llama-bf16"))
    name = f"{LAYER}.self_attn.k_proj"
    tensors: dict[str, Array] = {key: array_of(value) for key, value in raw.items() if not key.startswith(name)}
    tensors[f"{name}.weight"] = array_of(dense[f"{name}.weight"])
    config = config_of(source)
    shutil.rmtree(source)
    write_model(source, tensors, config)
    for options in ({"modules": "all"}, {"include": ["*.k_proj"]}):
        with pytest.raises(PlanError, match="stored tensor scale"):
            plan_conversion(source, to="nvfp4", **options)
    plan_conversion(source, to="bf16")
    plan_conversion(source, to="nvfp4")


def test_include_names_what_is_left_out_by_default(reference: Reference) -> None:
    plan = plan_conversion(reference("llama-bf16"), to="nvfp4", include=["lm_head"])
    assert "lm_head" in {step.weight.module for step in plan.steps if step.action is Action.QUANTIZE and step.weight}
    both = plan_conversion(reference("llama-bf16"), to="nvfp4", include=["*_proj"], exclude=["*.mlp.*"])
    assert actions(both)["quantize"] == 2 * 4, "--exclude wins over --include"


def test_tensors_of_another_type_keep_it(tmp_path: Path) -> None:
    """A router's F32 bias among BF16 weights was put so on purpose; the plan says so."""
    tensors: dict[str, Array] = {
        f"{LAYER}.mlp.down_proj.weight": noise((64, 64)),
        f"{LAYER}.mlp.gate.e_score_correction_bias": np.ones(8, np.float32),
        "ids": np.arange(4),
    }
    source = write_model(tmp_path / "src", tensors)
    result = fp4conv.convert(source, tmp_path / "out", to="f16")
    raw = read_raw(tmp_path / "out")
    assert {name: value[0] for name, value in raw.items()} == {
        f"{LAYER}.mlp.down_proj.weight": "F16",
        f"{LAYER}.mlp.gate.e_score_correction_bias": "F32",
        "ids": "I64",
    }
    assert any("e_score_correction_bias" in warning for warning in result.warnings)


def test_tied_heads_are_named_in_the_list_of_exclusions(reference: Reference, tmp_path: Path) -> None:
    raw = read_raw(reference("llama-bf16"))
    tensors: dict[str, Array] = {name: array_of(value) for name, value in raw.items() if name != "lm_head.weight"}
    source = write_model(tmp_path / "src", tensors, {**config_of(reference("llama-bf16")), "tie_word_embeddings": True})
    for to in ("nvfp4", "mxfp4"):
        fp4conv.convert(source, tmp_path / to, to=to)
        written = config_of(tmp_path / to)["quantization_config"]
        assert isinstance(written, dict)
        assert "lm_head" in written["ignore"]


def test_biases_and_odd_names_come_along(tmp_path: Path) -> None:
    tensors: dict[str, Array] = {
        f"{LAYER}.mlp.down_proj.weight": noise((32, 64)),
        f"{LAYER}.mlp.down_proj.bias": noise((32,), 1),
        "weird name ü.weight": noise((3,), 2),
        "no_suffix_matrix": noise((32, 32), 3),
    }
    source = write_model(tmp_path / "src", tensors)
    result = fp4conv.convert(source, tmp_path / "out", to="mxfp4")
    raw = read_raw(tmp_path / "out")
    assert (result.converted, result.copied) == (1, 3)
    for name in list(tensors)[1:]:
        assert raw[name] == read_raw(source)[name]
    parts = (array_of(raw[f"{LAYER}.mlp.down_proj.{part}"]) for part in ("weight_packed", "weight_scale"))
    error = decode_mxfp4(*parts) - tensors[f"{LAYER}.mlp.down_proj.weight"].astype(np.float64)
    assert np.abs(error).max() < 0.05


# ---- what makes two commands the same


def test_the_fingerprint_follows_what_changes_bytes(reference: Reference, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(reference("llama-bf16"), source)
    base: dict[str, object] = {"to": "nvfp4"}
    variants: list[Mapping[str, object]] = [
        {"to": "mxfp4"},
        {"to": "bf16"},
        {"scale_rule": "amax"},
        {"ties": "down"},
        {"modules": "mlp"},
        {"exclude": ["*.mlp.*"]},
        {"include": ["lm_head"]},
        {"input_scales": "constant"},
        {"max_shard_size": "100KB"},
    ]
    prints = [plan_conversion(source, **{**base, **variant}).fingerprint for variant in ({}, *variants)]  # type: ignore[arg-type]
    assert len(set(prints)) == len(prints)
    again = plan_conversion(source, to="nvfp4", scale_rule="mse", ties="even", max_shard_size=5_000_000_000)
    assert again.fingerprint == prints[0], "spelling out a default is the same command"
    config = source / "config.json"
    config.chmod(0o644)
    config.write_text(config.read_text().replace("llama", "lhama"))
    assert plan_conversion(source, to="nvfp4").fingerprint != prints[0]


def test_a_source_touched_meanwhile_is_another_one(reference: Reference, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(reference("llama-bf16"), source)
    before = plan_conversion(source, to="nvfp4").fingerprint
    shard = next(source.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    assert plan_conversion(source, to="nvfp4").fingerprint != before


# ---- places and pieces


def shards(plan: Plan) -> Iterator[tuple[str, list[TensorRef]]]:
    for name, shard in plan.shards.items():
        yield name, sorted(shard.tensors, key=lambda ref: ref.offset)


@pytest.mark.parametrize("size", ["1", "100KB", "5GB"])
@pytest.mark.parametrize(
    ("name", "to"), [("gptoss-bf16", "mxfp4"), ("qwen3moe-bf16", "nvfp4"), ("llama-nvfp4-default", "f32")]
)
def test_every_byte_of_a_shard_has_one_owner(reference: Reference, name: str, to: str, size: str) -> None:
    plan = plan_conversion(reference(name), to=to, max_shard_size=size)
    for file, refs in shards(plan):
        end = len(plan.shards[file].header)
        for ref in refs:
            assert ref.offset == end
            end += ref.spec.nbytes
        assert end == plan.shards[file].nbytes
    placed = {(output.file, output.part.name): output.offset for step in plan.steps for output in step.outputs}
    assert placed == {(file, ref.name): ref.offset for file, refs in shards(plan) for ref in refs}


def test_blocks_come_before_their_scales(reference: Reference) -> None:
    """llama.cpp wants it so, in one shard."""
    plan = plan_conversion(reference("gptoss-bf16"), to="mxfp4", max_shard_size="100KB")
    for step in plan.steps:
        if step.action is Action.QUANTIZE:
            blocks, scales = step.outputs
            assert (blocks.part.name[-7:], scales.part.name[-7:]) == ("_blocks", "_scales")
            assert blocks.file == scales.file
            assert blocks.offset < scales.offset


@pytest.mark.parametrize("budget", [20_000, 100_000, 1_000_000, 64_000_000])
@pytest.mark.parametrize(("name", "to"), [("gptoss-bf16", "mxfp4"), ("gptoss-mxfp4", "nvfp4"), ("gptoss-bf16", "f32")])
def test_pieces_cover_every_row_once(reference: Reference, name: str, to: str, budget: int) -> None:
    plan = plan_conversion(reference(name), to=to)
    for step in plan.steps:
        rows: Counter[tuple[int, int]] = Counter()
        elements: dict[int, int] = {}
        for piece in units(step, budget):
            if isinstance(piece, Unit):
                rows.update((piece.index, n) for n in range(piece.n0, piece.n1))
            else:
                assert isinstance(piece, Span)
                assert piece.start == elements.get(piece.output, 0)
                elements[piece.output] = piece.stop
        for output, stop in elements.items():
            assert stop == step.outputs[output].part.spec.elements
        if rows:
            assert step.weight is not None
            assert set(rows.values()) == {1}
            assert len(rows) == step.weight.matrices * step.weight.n


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    """Also when the two would lie in different shards."""
    tensors = {f"{LAYER}.mlp.experts.down_proj": noise((2, 32, 32)), f"{LAYER}.self_attn.sinks": noise((4,))}
    tensors[f"{LAYER}.mlp.experts.down_proj_scales"] = noise((4,))
    source = write_model(tmp_path / "src", tensors)
    for size in ("5GB", "1"):
        with pytest.raises(PlanError, match="down_proj_scales: both"):
            plan_conversion(source, to="mxfp4", max_shard_size=size)


@pytest.mark.parametrize("left", ["*.experts.1.*", "*.down_proj", "*.experts.2.gate_proj"])
def test_experts_of_a_layer_are_quantised_all_or_none(tmp_path: Path, left: str) -> None:
    """Servers hold them as one stack with one quantisation method."""
    names = [f"{LAYER}.mlp.experts.{e}.{leaf}_proj.weight" for e in range(3) for leaf in ("gate", "up", "down")]
    source = write_model(tmp_path / "src", {name: noise((32, 32), seed) for seed, name in enumerate(names)})
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.experts.*all or none"):
        plan_conversion(source, to="nvfp4", exclude=[left])


def test_both_expert_parameters_of_gpt_oss_are_quantised_or_none(reference: Reference) -> None:
    with pytest.raises(PlanError, match="all or none"):
        plan_conversion(reference("gptoss-bf16"), to="mxfp4", exclude=["*.experts.down_proj"])


# ---- words that do not fit together


def test_requests_that_contradict_themselves(reference: Reference) -> None:
    source = reference("llama-bf16")
    cases: list[tuple[dict[str, object], type[Fp4convError]]] = [
        ({"to": "int4"}, UsageError),
        ({"to": "bf16", "scale_rule": "mse"}, UsageError),
        ({"to": "bf16", "exclude": ["*"]}, UsageError),
        ({"to": "nvfp4", "scale_rule": "floor"}, UsageError),
        ({"to": "nvfp4", "scale_rule": "nicest"}, UsageError),
        ({"to": "nvfp4", "ties": "up"}, UsageError),
        ({"to": "nvfp4", "for_server": "ollama"}, UsageError),
        ({"to": "nvfp4", "layout": "hf"}, UsageError),
        ({"to": "mxfp4", "input_scales": "constant"}, UsageError),
        ({"to": "nvfp4", "exclude": ["*"]}, PlanError),
        ({"to": "mxfp4", "for_server": "trtllm"}, PlanError),
        ({"to": "nvfp4", "include": ["nothing.*"]}, UsageError),
    ]
    for options, error in cases:
        with pytest.raises(error) as caught:
            plan_conversion(source, **options)  # type: ignore[arg-type]
        assert type(caught.value) is error
        assert str(caught.value)


def test_plans_are_values(reference: Reference) -> None:
    plan = plan_conversion(reference("llama-bf16"), to="nvfp4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.target = "bf16"  # type: ignore[misc]
    again = plan_conversion(reference("llama-bf16"), to="nvfp4")
    assert (again.steps, again.files, again.fingerprint) == (plan.steps, plan.files, plan.fingerprint)


# ---- extremes of values


@pytest.mark.parametrize("to", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("rule", ["mse", None])
def test_weights_of_zeros_come_back_as_zeros(tmp_path: Path, to: str, rule: str | None) -> None:
    zeros = bf16(np.copysign(np.zeros((8, 64)), np.arange(-4, 4)[:, None]))
    source = write_model(tmp_path / "src", {f"{LAYER}.mlp.down_proj.weight": zeros})
    result = fp4conv.convert(source, tmp_path / "out", to=to, scale_rule=rule)
    assert result.sqnr_db is None
    fp4conv.convert(tmp_path / "out", tmp_path / "back", to="bf16")
    assert not array_of(read_raw(tmp_path / "back")[f"{LAYER}.mlp.down_proj.weight"]).astype(np.float32).any()


@pytest.mark.parametrize("to", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("magnitude", [3e38, 1e-38, 1e-45])
def test_magnitudes_at_the_ends_of_f32(tmp_path: Path, to: str, magnitude: float) -> None:
    """Held within the format's error, or as near as its smallest scale comes; never NaN, never Inf."""
    values = (np.random.default_rng(0).uniform(-1, 1, (8, 64)) * magnitude).astype(np.float32)
    source = write_model(tmp_path / "src", {f"{LAYER}.mlp.down_proj.weight": values})
    fp4conv.convert(source, tmp_path / "out", to=to)
    with fp4conv.open(tmp_path / "out") as checkpoint:
        decoded = checkpoint.read(f"{LAYER}.mlp.down_proj.weight").astype(np.float64)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - values).max() <= max(0.2 * magnitude, 2.0**-126)


def test_matrices_stored_in_by_out_are_refused(tmp_path: Path) -> None:
    """GPT-2's Conv1D: the bias has as many values as the matrix has columns."""
    tensors = {
        "h.0.attn.c_attn.weight": noise((64, 192)),
        "h.0.attn.c_attn.bias": noise((192,)),
        "h.0.mlp.c_fc.weight": noise((64, 256), 1),
        "h.0.mlp.c_fc.bias": noise((256,), 1),
    }
    write_model(tmp_path / "source", tensors, {"model_type": "gpt2"})
    with pytest.raises(PlanError, match=r"c_attn.weight.*\[64, 192\].*\[192\]"):
        plan_conversion(tmp_path / "source", to="nvfp4")


def test_a_scale_rule_without_work_is_said(reference: Reference) -> None:
    for name, to in (("gptoss-mxfp4", "nvfp4"), ("llama-nvfp4-default", "nvfp4")):
        plan = plan_conversion(reference(name), to=to, scale_rule="amax")
        assert any("--scale-rule amax had nothing to choose" in warning for warning in plan.warnings)
    plan = plan_conversion(reference("llama-nvfp4-default"), to="mxfp4", scale_rule="floor")
    assert not any("nothing to choose" in warning for warning in plan.warnings)


def test_one_matrix_in_by_out_casts_doubt_on_those_that_tell_nothing(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.c_attn.weight": noise((64, 192)),
        "h.0.attn.c_attn.bias": noise((192,)),
        "h.0.attn.c_proj.weight": noise((64, 64), 1),
        "h.0.attn.c_proj.bias": noise((64,), 1),
    }
    write_model(tmp_path / "source", tensors, {"model_type": "other"})
    with pytest.raises(PlanError, match=r"c_proj.weight.*c_attn.weight is \[in, out\] by its bias"):
        plan_conversion(tmp_path / "source", to="nvfp4", exclude=("*c_attn",))
    write_model(tmp_path / "gpt2", {"h.0.mlp.c_fc.weight": noise((64, 64))}, {"model_type": "gpt2"})
    with pytest.raises(PlanError, match="models of type gpt2"):
        plan_conversion(tmp_path / "gpt2", to="nvfp4")


def test_experts_whose_bias_contradicts_their_orientation_are_refused(reference: Reference, tmp_path: Path) -> None:
    tensors = {name: array_of(raw) for name, raw in read_raw(reference("gptoss-bf16")).items()}
    turned = {
        name: np.ascontiguousarray(np.swapaxes(value, 1, 2)) if name.endswith("experts.gate_up_proj") else value
        for name, value in tensors.items()
    }
    write_model(tmp_path / "source", turned, config_of(reference("gptoss-bf16")))
    with pytest.raises(PlanError, match=r"gate_up_proj.*do not fit \[E, in, out\]"):
        plan_conversion(tmp_path / "source", to="mxfp4")


def test_quantised_experts_of_unknown_orientation_are_refused(reference: Reference, tmp_path: Path) -> None:
    for name in ("gptoss-mxfp4", "gptoss-nvfp4-mlp-only"):
        tensors = {key: array_of(raw) for key, raw in read_raw(reference(name)).items() if "sinks" not in key}
        write_model(tmp_path / name, tensors, config_of(reference(name)))
        with pytest.raises(SourceError, match="known of gpt-oss alone"):
            plan_conversion(tmp_path / name, to="bf16")


def llama_attention(**changed: Array) -> dict[str, Array]:
    prefix = "model.layers.0.self_attn."
    made = {f"{prefix}{leaf}_proj.weight": noise((64, 64), seed) for seed, leaf in enumerate("qkvo")}
    return made | {f"{prefix}{leaf}_proj.weight": value for leaf, value in changed.items()}


def test_a_member_of_another_type_breaks_its_set(tmp_path: Path) -> None:
    tensors = llama_attention(k=np.zeros((64, 64), np.float64))
    write_model(tmp_path / "source", tensors, {"model_type": "llama"})
    with pytest.raises(PlanError, match=r"all or none.*k_proj"):
        plan_conversion(tmp_path / "source", to="nvfp4")


def test_matrices_that_no_rule_quantises_are_named_and_excluded(tmp_path: Path) -> None:
    """Granite's fused experts, a bare parameter, an F64 layer: said, in the ignore list, and no server vouched for."""
    odd = {
        "model.layers.0.block_sparse_moe.input_linear.weight": noise((4, 64, 64)),
        "model.layers.0.attn.in_proj_weight": noise((64, 64)),
        "model.layers.0.self_attn.x_out.weight": np.zeros((64, 64), np.float64),
    }
    write_model(tmp_path / "source", llama_attention() | odd, {"model_type": "granitemoe"})
    plan = plan_conversion(tmp_path / "source", to="nvfp4")
    assert any("3 matrices of a kind that fp4conv does not quantise" in warning for warning in plan.warnings)
    assert {verdict.outcome for verdict in plan.servers if verdict.server in ("vllm", "sglang")} == {"unknown"}
    fp4conv.convert(tmp_path / "source", tmp_path / "out", to="nvfp4")
    quantization = config_of(tmp_path / "out")["quantization_config"]
    assert isinstance(quantization, dict)
    assert {name.removesuffix(".weight") for name in odd} <= set(quantization["ignore"])


def test_what_no_source_speaks_of_is_unknown(reference: Reference, tmp_path: Path) -> None:
    """No model type, or a module quantised that servers hold dense: no rule read in a server's source covers it."""
    write_model(tmp_path / "source", llama_attention(), {"hidden_size": 64})
    plan = plan_conversion(tmp_path / "source", to="nvfp4")
    assert not [verdict for verdict in plan.servers if verdict.loads]
    plan = plan_conversion(reference("llama-bf16"), to="nvfp4", include=("model.embed_tokens",))
    assert not [verdict for verdict in plan.servers if verdict.loads]
    with pytest.raises(PlanError, match=r"vllm .* is not known to load"):
        plan_conversion(reference("llama-bf16"), to="nvfp4", include=("model.embed_tokens",), for_server="vllm")
