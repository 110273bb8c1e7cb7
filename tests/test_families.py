"""Roles, default exclusions and shared sets on the tensor names of real models: headers alone, no values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Array, config_of, noise, read_raw, write_model

import fp4conv
from fp4conv.commands.convert import plan_conversion
from fp4conv.families import EXCLUDED, Role, family_of, role_of, shared_set_of
from fp4conv.layouts import parse
from fp4conv.plan import Action, Plan
from fp4conv.planner import Options, make_plan
from fp4conv.selection import Selection
from fp4conv.sources import open_source

Shapes = dict[str, tuple[int, ...]]
H = 64  # hidden


def model(folder: Path, shapes: Shapes, config: Mapping[str, object] | None = None, spread: int = 1) -> Path:
    """A BF16 checkpoint of these shapes; its tensors are dealt out to `spread` shards, neighbours to different ones."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Array] = {name: _bf16(rng, shape) for name, shape in shapes.items()}
    names = list(tensors)
    shards = [names[i::spread] for i in range(spread)] if spread > 1 else []
    return write_model(folder, tensors, config or {"model_type": "x", "num_hidden_layers": 2}, shards)


def _bf16(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    import ml_dtypes

    return (rng.standard_normal(shape) * 0.05).astype(np.float32).astype(ml_dtypes.bfloat16)


def plan(folder: Path, to: str = "nvfp4", **selection: object) -> Plan:
    return make_plan(parse(open_source(folder)), Options(to, selection=Selection(**selection)))  # type: ignore[arg-type]


def quantised(made: Plan) -> set[str]:
    return {step.weight.module for step in made.steps if step.action is Action.QUANTIZE and step.weight}


def groups(made: Plan) -> dict[str, set[str]]:
    """Shared set -> its members, for sets of more than one."""
    found: dict[str, set[str]] = {}
    for step in made.steps:
        if step.group and step.weight:
            found.setdefault(step.group, set()).add(step.weight.module)
    return {key: members for key, members in found.items() if len(members) > 1}


def common(layers: int) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (128, H), "model.norm.weight": (H,), "lm_head.weight": (128, H)}
    for i in range(layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (H,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (H,)
    return shapes


def attention(layer: str) -> Shapes:
    return {f"{layer}.self_attn.{leaf}_proj.weight": (H, H) for leaf in "qkvo"}


def mlp(parent: str) -> Shapes:
    return {f"{parent}.{leaf}_proj.weight": (H, H) for leaf in ("gate", "up", "down")}


def mixtral() -> Shapes:
    shapes = common(2)
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= attention(layer) | {f"{layer}.block_sparse_moe.gate.weight": (4, H)}
        shapes |= {f"{layer}.block_sparse_moe.experts.{e}.w{w}.weight": (H, H) for e in range(4) for w in (1, 2, 3)}
    return shapes


def deepseek() -> Shapes:
    """Layer 0 dense, layer 1 with experts, layer 2 the MTP layer past num_hidden_layers."""
    shapes = common(3)
    for i in range(3):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.{leaf}.weight": (H, H)
            for leaf in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        }
        shapes |= {f"{layer}.self_attn.q_a_layernorm.weight": (H,), f"{layer}.self_attn.kv_a_layernorm.weight": (H,)}
        if i == 0:
            shapes |= mlp(f"{layer}.mlp")
            continue
        shapes |= {f"{layer}.mlp.gate.weight": (4, H), f"{layer}.mlp.gate.e_score_correction_bias": (4,)}
        shapes |= mlp(f"{layer}.mlp.shared_experts")
        for e in range(4):
            shapes |= mlp(f"{layer}.mlp.experts.{e}")
    mtp = "model.layers.2"
    shapes |= {f"{mtp}.eh_proj.weight": (H, 2 * H), f"{mtp}.enorm.weight": (H,), f"{mtp}.hnorm.weight": (H,)}
    shapes |= {f"{mtp}.embed_tokens.weight": (128, H), f"{mtp}.shared_head.head.weight": (128, H)}
    return shapes


def bert() -> Shapes:
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (128, H),
        "embeddings.position_embeddings.weight": (32, H),
        "embeddings.token_type_embeddings.weight": (2, H),
        "embeddings.LayerNorm.weight": (H,),
        "pooler.dense.weight": (H, H),
        "pooler.dense.bias": (H,),
    }
    for i in range(2):
        layer = f"encoder.layer.{i}"
        shapes |= {f"{layer}.attention.self.{leaf}.weight": (H, H) for leaf in ("query", "key", "value")}
        shapes |= {f"{layer}.attention.output.dense.weight": (H, H), f"{layer}.attention.output.LayerNorm.weight": (H,)}
        shapes |= {f"{layer}.intermediate.dense.weight": (H, H), f"{layer}.output.dense.weight": (H, H)}
    return shapes


# ---- Mixtral


def test_mixtral(tmp_path: Path) -> None:
    made = plan(model(tmp_path / "m", mixtral(), spread=5))
    assert made.model.family.name == "moe"
    experts = {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.w{w}" for i in range(2) for e in range(4) for w in (1, 2, 3)
    }
    heads = {f"model.layers.{i}.self_attn.{leaf}_proj" for i in range(2) for leaf in "qkvo"}
    assert quantised(made) == experts | heads
    assert quantised(plan(tmp_path / "m", scope="experts")) == experts
    assert quantised(plan(tmp_path / "m", scope="mlp")) == experts
    fused = groups(made)
    for i in range(2):
        for e in range(4):
            parent = f"model.layers.{i}.block_sparse_moe.experts.{e}"
            assert {f"{parent}.w1", f"{parent}.w3"} in fused.values()
    assert len(fused) == 2 + 8


def test_mixtral_shares_scales_over_shards(tmp_path: Path) -> None:
    source = model(tmp_path / "m", mixtral(), spread=5)
    fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    raw = read_raw(tmp_path / "out")
    parent = "model.layers.1.block_sparse_moe.experts.2"
    assert raw[f"{parent}.w1.weight_scale_2"] == raw[f"{parent}.w3.weight_scale_2"]
    assert raw[f"{parent}.w1.weight_scale_2"] != raw[f"{parent}.w2.weight_scale_2"]


# ---- DeepSeek


def test_deepseek(tmp_path: Path) -> None:
    made = plan(model(tmp_path / "m", deepseek(), spread=3))
    assert made.model.family.name == "mla-moe"
    chosen = quantised(made)
    assert not any(".layers.2." in module for module in chosen), "the MTP layer stays"
    for i in range(2):
        inside = {
            f"model.layers.{i}.self_attn.{leaf}" for leaf in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
        }
        assert inside <= chosen
        assert (
            inside - {f"model.layers.{i}.self_attn.q_b_proj", f"model.layers.{i}.self_attn.o_proj"}
            in groups(made).values()
        )
    assert {f"model.layers.1.mlp.shared_experts.{leaf}_proj" for leaf in ("gate", "up", "down")} <= chosen
    assert {
        f"model.layers.1.mlp.experts.{e}.{leaf}_proj" for e in range(4) for leaf in ("gate", "up", "down")
    } <= chosen
    assert "model.layers.1.mlp.gate" not in chosen
    assert not any("kv_b_proj" in module for module in chosen), "servers split it by heads"
    experts = quantised(plan(tmp_path / "m", scope="experts"))
    assert experts == {
        f"model.layers.1.mlp.experts.{e}.{leaf}_proj" for e in range(4) for leaf in ("gate", "up", "down")
    }
    assert "model.layers.1.mlp.shared_experts.up_proj" in quantised(plan(tmp_path / "m", scope="mlp"))


def test_prediction_layers_are_quantised_when_they_are_named(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", deepseek())
    assert "model.layers.2.mlp.experts.0.down_proj" in quantised(
        plan(folder, include=("model.layers.2.mlp.experts.*",))
    )


def test_the_last_layer_is_no_prediction_layer_when_the_config_counts_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", deepseek(), {"num_hidden_layers": 3})
    assert "model.layers.2.mlp.experts.0.down_proj" in quantised(plan(folder))


# ---- BERT


def test_bert(tmp_path: Path) -> None:
    made = plan(model(tmp_path / "m", bert()))
    assert made.model.family.name == "encoder"
    chosen = quantised(made)
    layers = {module for module in chosen if module.startswith("encoder.layer.")}
    assert len(layers) == 2 * 6
    assert not any("embeddings" in module or "LayerNorm" in module for module in chosen)
    assert {
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.attention.self.key",
        "encoder.layer.0.attention.self.value",
    } in groups(made).values()


def test_every_encoder_matrix_can_be_read_back(tmp_path: Path) -> None:
    fp4conv.convert(model(tmp_path / "m", bert()), tmp_path / "out", to="mxfp4")
    fp4conv.convert(tmp_path / "out", tmp_path / "back", to="bf16")
    before, after = read_raw(tmp_path / "m"), read_raw(tmp_path / "back")
    assert {name: value[:2] for name, value in before.items()} == {name: value[:2] for name, value in after.items()}


# ---- everything that stays dense

STAYS = [
    "lm_head",
    "model.embed_tokens",
    "transformer.wte",
    "model.layers.0.mlp.router",
    "model.layers.0.mlp.gate",
    "model.layers.0.block_sparse_moe.gate",
    "model.layers.0.mlp.shared_expert_gate",
    "model.visual.blocks.0.attn.qkv",
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
    "model.vision_tower.encoder.layers.3.self_attn.q_proj",
    "audio_tower.layers.0.self_attn.q_proj",
    "multi_modal_projector.linear_1",
    "model.visual.merger.mlp.0",
    "mtp.layers.0.mlp.down_proj",
    "mtp.fc",
    "model.layers.0.mamba.conv1d",
    "model.layers.0.linear_attn.conv1d",
]


@pytest.mark.parametrize("module", STAYS)
def test_what_stays_dense_unless_named(tmp_path: Path, module: str) -> None:
    shapes = {**common(1), **attention("model.layers.0"), **mlp("model.layers.0.mlp"), f"{module}.weight": (64, H)}
    folder = model(tmp_path / "m", shapes, {"num_hidden_layers": 1})
    assert module not in quantised(plan(folder))
    assert module not in quantised(plan(folder, scope="all"))
    assert module in quantised(plan(folder, include=(module,)))
    out = tmp_path / "out"
    fp4conv.convert(folder, out, to="nvfp4")
    written = config_of(out)["quantization_config"]
    assert isinstance(written, dict)
    assert module in written["ignore"], "spelled in full: servers ask about every module"


@pytest.mark.parametrize("shape", [(64, 4, 16), (64, 1, 4), (8, 3, 14, 14), (64,), ()])
def test_convolutions_vectors_and_scalars_are_no_matrices(tmp_path: Path, shape: tuple[int, ...]) -> None:
    shapes = {**attention("model.layers.0"), "model.layers.0.linear_attn.thing.weight": shape}
    folder = model(tmp_path / "m", shapes)
    assert quantised(plan(folder)) == {f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo"}


# ---- rules, name by name


def real_names() -> Iterator[tuple[list[str], str]]:
    yield ["model.layers.0.self_attn.sinks", "model.layers.0.mlp.experts.gate_up_proj_blocks"], "gpt-oss"
    yield ["model.layers.0.self_attn.sinks", "model.layers.0.mlp.experts.down_proj"], "gpt-oss"
    yield ["model.layers.0.self_attn.sinks", "model.layers.0.mlp.experts.down_proj_weight_scale"], "gpt-oss"
    yield ["model.layers.3.mlp.experts.7.up_proj.weight", "model.layers.3.self_attn.q_proj.weight"], "moe"
    yield list(mixtral()), "moe"
    yield list(deepseek()), "mla-moe"
    yield list(bert()), "encoder"
    yield ["bert." + name for name in bert()], "encoder"
    yield ["model.layers.0.self_attn.q_proj.weight"], "dense"
    yield ["model.language_model.layers.0.mlp.up_proj.weight"], "dense"
    yield ["transformer.h.0.attn.c_attn.weight"], "dense"
    yield ["unet.down.0.weight"], "unknown"


@pytest.mark.parametrize(("names", "family"), list(real_names()))
def test_family(names: list[str], family: str) -> None:
    assert family_of(names).name == family


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", "expert"),
        ("model.layers.0.mlp.experts.3.w1", "expert"),
        ("model.layers.0.mlp.gate_proj", "mlp"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.self_attn.o_proj", "attention"),
        ("model.layers.9.self_attn.o_proj", "mtp"),
        ("model.vision_tower.layers.9.self_attn.o_proj", "vision"),
        ("model.layers.0.input_layernorm", "norm"),
        ("lm_head", "head"),
        ("score", "head"),
        ("something.else", "other"),
    ],
)
def test_role(module: str, role: str) -> None:
    assert role_of(module, layers=4).value == role


def test_sets_are_those_of_one_parent() -> None:
    assert shared_set_of("a.q_proj") == shared_set_of("a.k_proj") == shared_set_of("a.v_proj")
    assert shared_set_of("a.q_proj") != shared_set_of("b.q_proj")
    assert shared_set_of("experts.1.gate_proj") != shared_set_of("experts.2.up_proj")
    for alone in ("a.o_proj", "a.down_proj", "a.w2", "a.kv_b_proj", "a.q_b_proj", "a.mlp.gate"):
        assert shared_set_of(alone) is None


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("output", Role.HEAD),  # InternLM2, Meta's own names
        ("model.output", Role.HEAD),
        ("proj_out", Role.HEAD),  # Whisper
        ("encoder.layer.0.output.dense", Role.MLP),  # BERT
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", Role.EMBEDDING),
        ("shared", Role.EMBEDDING),  # T5
        ("mlp1.1", Role.PROJECTOR),  # InternVL
        ("vpm.encoder.layers.0.mlp.fc1", Role.VISION),  # MiniCPM-V
        ("resampler.kv_proj", Role.PROJECTOR),
        ("vision.blocks.0.mlp.fc1", Role.VISION),  # DeepSeek-VL2
        ("projector.layers.0", Role.PROJECTOR),
        ("vision_language_adapter.w_in", Role.PROJECTOR),  # Pixtral
        ("model.layers.0.self_attn.qkv_proj.lora_A.vision", Role.ADAPTER),  # Phi-4-multimodal
        ("model.layers.0.self_attn.qkv_proj.base_layer", Role.ADAPTER),
    ],
)
def test_heads_towers_and_projectors_by_their_odd_names(module: str, role: Role) -> None:
    assert role_of(module) is role
    assert (role in EXCLUDED) == (role is not Role.MLP)


def test_only_layers_of_the_language_model_are_counted() -> None:
    """Whisper with two encoder and four decoder layers has num_hidden_layers 2."""
    assert role_of("model.decoder.layers.3.fc1", 2) is Role.MLP
    assert role_of("model.layers.61.mlp.up_proj", 61) is Role.MTP
    assert role_of("model.language_model.layers.2.mlp.up_proj", 2) is Role.MTP


@pytest.mark.parametrize("count", [True, -1, 0, "2", 2.5, None])
def test_a_layer_count_that_is_none_counts_nothing(tmp_path: Path, count: object) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": noise((32, 32), i) for i in range(3)}
    write_model(tmp_path / "source", tensors, {"model_type": "llama", "num_hidden_layers": count})
    plan = plan_conversion(tmp_path / "source", to="nvfp4")
    assert plan.count(Action.QUANTIZE) == 3
