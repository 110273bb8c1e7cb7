"""gpt-oss in OpenAI's own layout, in and out, against what OpenAI's own torch model asks for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Raw, array_of, bf16, config_of, read_raw, tree, write_model, write_shard
from conftest import FIXTURES

import fp4conv
from fp4conv.errors import Fp4convError, PlanError, SourceError

Reference = Callable[[str], Path]
OPENAI_KEYS = set(json.loads((FIXTURES / "openai-model.json").read_text())["config"])


@pytest.fixture
def original(reference: Reference, tmp_path: Path) -> Path:
    """gptoss-mxfp4 as we write it in OpenAI's layout."""
    fp4conv.convert(reference("gptoss-mxfp4"), tmp_path / "original", to="mxfp4", layout="openai-original")
    return tmp_path / "original"


def openai_model(layers: int) -> dict[str, dict[str, list[object]]]:
    """Parameter of OpenAI's model -> its shape, and the tensors that its loader reads for it."""
    listing = json.loads((FIXTURES / "openai-model.json").read_text())
    parameters: dict[str, dict[str, list[object]]] = listing["parameters"]
    return {n: p for n, p in parameters.items() if not n.startswith("block.") or int(n.split(".")[1]) < layers}


def altered(folder: Path, tmp_path: Path, changes: Mapping[str, object]) -> Path:
    """A copy whose config.json has `changes`; None takes a key out."""
    copy = tmp_path / "altered"
    shutil.copytree(folder, copy)
    config = {**config_of(folder), **changes}
    (copy / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return copy


def refused(source: Path, tmp_path: Path, **options: str) -> Fp4convError:
    """The error of a conversion that leaves nothing behind."""
    before = tree(tmp_path)
    with pytest.raises(Fp4convError) as caught:
        fp4conv.convert(source, tmp_path / "refused", **options)  # type: ignore[arg-type]
    assert tree(tmp_path) == before
    return caught.value


# ---- against OpenAI's own


def test_it_holds_what_openais_model_asks_for(original: Path) -> None:
    """Names, and shapes as its loader makes them of codes and scales; nothing missing, nothing over."""
    raw, config = read_raw(original), config_of(original)
    assert isinstance(config["num_hidden_layers"], int)
    asked = openai_model(config["num_hidden_layers"])
    assert sorted(raw) == sorted(str(name) for parameter in asked.values() for name in parameter["read_from"])
    for name, parameter in asked.items():
        shapes = [raw[str(stored)][1] for stored in parameter["read_from"]]
        if len(shapes) == 1:
            assert list(shapes[0]) == parameter["shape"], name
            continue
        codes, scales = shapes
        assert codes[:-1] == scales
        assert [*codes[:-2], codes[-2] * codes[-1] * 2] == parameter["shape"], name
    assert set(config) == OPENAI_KEYS  # it takes no other


def test_openais_own_model_loads_it(original: Path, reference: Reference, tmp_path: Path) -> None:
    """With the package `gpt-oss` (Python 3.12 and newer): its model runs, and says what transformers' says."""
    model = pytest.importorskip("gpt_oss.torch.model", reason="gpt-oss is not installed")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(5, 40)
    with torch.inference_mode():
        theirs = model.Transformer.from_checkpoint(str(original), device="cpu")(ids).float()
        fp4conv.convert(reference("gptoss-mxfp4"), tmp_path / "bf16", to="bf16")
        hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
        ours = hf(ids[None]).logits[0].float()
    assert torch.nn.functional.cosine_similarity(theirs, ours, dim=-1).min() > 0.999


def test_it_equals_the_reference_both_ways(full_reference: Reference, original: Path, tmp_path: Path) -> None:
    theirs = full_reference("gptoss-original") / "original"
    assert read_raw(original) == read_raw(theirs)
    assert config_of(original) == config_of(theirs)
    assert config_of(original, "dtypes.json") == config_of(theirs, "dtypes.json")
    fp4conv.convert(theirs, tmp_path / "hf", to="mxfp4")
    assert read_raw(tmp_path / "hf") == read_raw(full_reference("gptoss-mxfp4"))
    fp4conv.convert(theirs, tmp_path / "bf16", to="bf16")
    assert read_raw(tmp_path / "bf16") == read_raw(full_reference("gptoss-bf16-from-mxfp4"))


# ---- round trips


def test_there_and_back_gives_every_byte(reference: Reference, original: Path, tmp_path: Path) -> None:
    source = reference("gptoss-mxfp4")
    result = fp4conv.convert(original, tmp_path / "back", to="mxfp4")
    assert (result.source_format, result.layout) == ("mxfp4", "openai")
    assert read_raw(tmp_path / "back") == read_raw(source)
    fp4conv.convert(original, tmp_path / "again", to="mxfp4", layout="openai-original")
    assert read_raw(tmp_path / "again") == read_raw(original)
    assert config_of(tmp_path / "again") == config_of(original)


def test_q_k_and_v_are_rows_of_one_tensor(reference: Reference, original: Path) -> None:
    theirs, ours = read_raw(reference("gptoss-mxfp4")), read_raw(original)
    for leaf in ("weight", "bias"):
        stacked = b"".join(theirs[f"model.layers.0.self_attn.{part}_proj.{leaf}"][2] for part in "qkv")
        assert ours[f"block.0.attn.qkv.{leaf}"][2] == stacked


def test_the_config_made_of_openais_gives_the_same_logits(reference: Reference, original: Path, tmp_path: Path) -> None:
    """rope, attention and routing as in the Hugging Face config that OpenAI's was derived from."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fp4conv.convert(original, tmp_path / "hf", to="bf16")
    fp4conv.convert(reference("gptoss-mxfp4"), tmp_path / "expected", to="bf16")
    logits = []
    for folder in ("hf", "expected"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        with torch.inference_mode():
            logits.append(model(torch.arange(3, 60)[None]).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("size", [1, "100KB"])
def test_parts_of_one_tensor_share_a_shard(
    reference: Reference, original: Path, tmp_path: Path, size: int | str
) -> None:
    out = tmp_path / "sharded"
    fp4conv.convert(
        reference("gptoss-mxfp4"), out, to="mxfp4", layout="openai-original", max_shard_size=size, workers=1
    )
    assert len(list(out.glob("*.safetensors"))) > 1
    assert read_raw(out) == read_raw(original)


def test_quantised_on_the_way(reference: Reference, tmp_path: Path) -> None:
    source = reference("gptoss-bf16")
    fp4conv.convert(source, tmp_path / "one", to="mxfp4", layout="openai-original", workers=3, max_memory="340MB")
    fp4conv.convert(source, tmp_path / "hf", to="mxfp4")
    fp4conv.convert(tmp_path / "hf", tmp_path / "two", to="mxfp4", layout="openai-original")
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two")


def test_open_reads_slices_by_hugging_faces_names(reference: Reference, original: Path) -> None:
    expected = read_raw(reference("gptoss-mxfp4"))
    with fp4conv.open(original) as checkpoint:
        for part in "qkv":
            name = f"model.layers.0.self_attn.{part}_proj.weight"
            assert np.array_equal(checkpoint.read(name), array_of(expected[name]))
        assert checkpoint.read("model.layers.0.mlp.experts.down_proj", rows=slice(1, 2)).shape == (1, 96, 128)


def test_what_is_not_in_the_folder_is_told(original: Path, tmp_path: Path) -> None:
    for path in original.glob("tokenizer*"):
        path.unlink()
    result = fp4conv.convert(original, tmp_path / "hf", to="mxfp4")
    assert any("tokenizer" in warning for warning in result.warnings)
    assert not (tmp_path / "hf" / "dtypes.json").exists()


def test_servers_are_told_apart_from_openais_loader(reference: Reference, tmp_path: Path) -> None:
    error = refused(reference("gptoss-mxfp4"), tmp_path, to="mxfp4", layout="openai-original", for_server="vllm")
    assert "model_type" in str(error)


def test_a_folder_that_holds_it_says_so(original: Path, tmp_path: Path) -> None:
    parent = tmp_path / "gpt-oss-20b"
    parent.mkdir()
    shutil.move(original, parent / "original")
    for call in (fp4conv.inspect, lambda folder: fp4conv.convert(folder, tmp_path / "out", to="bf16")):
        with pytest.raises(SourceError, match="original"):
            call(parent)


# ---- configs that the other side cannot say


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"swiglu_limit": None}, "swiglu_limit"),
        ({"num_local_experts": None}, "num_local_experts"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "original_max_position_embeddings"),
        ({"rope_parameters": None}, "original_max_position_embeddings"),
    ],
)
def test_a_config_that_openais_model_cannot_have(
    reference: Reference, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    source = altered(reference("gptoss-mxfp4"), tmp_path, changes)
    error = refused(source, tmp_path, to="mxfp4", layout="openai-original")
    assert isinstance(error, PlanError)
    assert says in str(error)


def test_rope_as_transformers_4_spelt_it(reference: Reference, original: Path, tmp_path: Path) -> None:
    config = config_of(reference("gptoss-mxfp4"))
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    changes = {"rope_parameters": None, "rope_scaling": scaling, "rope_theta": rope["rope_theta"]}
    source = altered(reference("gptoss-mxfp4"), tmp_path, changes)
    fp4conv.convert(source, tmp_path / "out", to="mxfp4", layout="openai-original")
    assert config_of(tmp_path / "out") == config_of(original)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"head_dim": 16}, "qkv"),
        ({"num_key_value_heads": None}, "num_key_value_heads"),
        ({"model_type": "gpt_oss"}, "model_type"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_config_that_is_not_openais(original: Path, tmp_path: Path, changes: dict[str, object], says: str) -> None:
    error = refused(altered(original, tmp_path, changes), tmp_path, to="bf16")
    assert isinstance(error, SourceError)
    assert says in str(error)


def test_openais_defaults_are_stated(original: Path, tmp_path: Path) -> None:
    result = fp4conv.convert(altered(original, tmp_path, {"swiglu_limit": None}), tmp_path / "out", to="bf16")
    assert any("swiglu_limit: 7.0" in warning for warning in result.warnings)
    assert config_of(tmp_path / "out")["swiglu_limit"] == 7.0


def test_no_config(original: Path, tmp_path: Path) -> None:
    (original / "config.json").unlink()
    assert "config.json" in str(refused(original, tmp_path, to="bf16"))


# ---- tensors that the layout does not have


def rewritten(folder: Path, tmp_path: Path, change: Callable[[Raw], object]) -> Path:
    raw = read_raw(folder)
    change(raw)
    copy = tmp_path / "rewritten"
    write_model(copy, {name: array_of(value) for name, value in raw.items()}, config_of(folder))
    return copy


def test_dense_experts_are_refused(original: Path, tmp_path: Path) -> None:
    """OpenAI's loader reads codes and scales of every expert weight."""

    def change(raw: Raw) -> None:
        del raw["block.0.mlp.mlp1_weight.blocks"], raw["block.0.mlp.mlp1_weight.scales"]
        raw["block.0.mlp.mlp1_weight"] = ("BF16", (4, 192, 128), bytes(2 * 4 * 192 * 128))

    assert "block.0.mlp.mlp1_weight" in str(refused(rewritten(original, tmp_path, change), tmp_path, to="bf16"))


def test_unknown_names_are_refused(original: Path, tmp_path: Path) -> None:
    source = rewritten(original, tmp_path, lambda raw: raw.update({"block.0.attn.more": raw["norm.scale"]}))
    assert "block.0.attn.more" in str(refused(source, tmp_path, to="bf16"))


@pytest.mark.parametrize("lost", ["block.0.mlp.mlp1_weight.scales", "block.0.mlp.mlp2_weight.blocks"])
def test_lost_parts_of_experts_are_refused(original: Path, tmp_path: Path, lost: str) -> None:
    assert "experts" in str(refused(rewritten(original, tmp_path, lambda raw: raw.pop(lost)), tmp_path, to="bf16"))


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("model.layers.0.self_attn.k_proj.weight", "block.0.attn.qkv.weight"),
        ("lm_head.weight", "unembedding.weight"),
        ("model.layers.0.mlp.router.bias", "block.0.mlp.gate.bias"),
    ],
)
def test_a_model_that_lacks_something_is_refused(reference: Reference, tmp_path: Path, lost: str, says: str) -> None:
    source = rewritten(reference("gptoss-mxfp4"), tmp_path, lambda raw: raw.pop(lost))
    assert says in str(refused(source, tmp_path, to="mxfp4", layout="openai-original"))


def test_other_models_and_formats_are_refused(reference: Reference, tmp_path: Path) -> None:
    error = refused(reference("llama-bf16"), tmp_path, to="mxfp4", layout="openai-original")
    assert "gpt-oss" in str(error)
    assert "does not hold" in str(refused(reference("gptoss-bf16"), tmp_path, to="bf16", layout="openai-original"))
    experts = "model.layers.0.mlp.experts.down_proj"
    error = refused(
        reference("gptoss-bf16"),
        tmp_path,
        to="mxfp4",
        layout="openai-original",
        exclude=(experts,),  # type: ignore[arg-type]
    )
    assert experts in str(error)


def test_q_k_v_in_two_dtypes_are_refused(reference: Reference, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.v_proj.bias"
    source = tmp_path / "src"
    raw = {key: array_of(value) for key, value in read_raw(reference("gptoss-mxfp4")).items()}
    raw[name] = raw[name].astype(np.float32)
    write_model(source, raw, config_of(reference("gptoss-mxfp4")))
    error = refused(source, tmp_path, to="mxfp4", layout="openai-original")
    assert "block.0.attn.qkv.bias" in str(error)


def test_extra_tensors_have_no_place(reference: Reference, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(reference("gptoss-mxfp4"), source)
    write_shard(source / "model.safetensors", {
        **{key: array_of(value) for key, value in read_raw(source).items()}, "model.more": bf16(np.ones(3))
    })  # fmt: skip
    assert "model.more" in str(refused(source, tmp_path, to="mxfp4", layout="openai-original"))
