"""Steps of a run by themselves: what calibration looks at, and what training's forward pass goes through."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import fp4conv
from fp4conv.errors import Fp4convError, PlanError, SourceError, ValuesError
from fp4conv.qat import steps
from fp4conv.qat.admission import check_packing
from fp4conv.qat.backend import Recipe, open_backend
from fp4conv.qat.data import load_data
from fp4conv.qat.in_force import check_in_force
from fp4conv.qat.made import Task, tokenizer_for, write_model
from fp4conv.qat.models import parsed
from fp4conv.qat.scoring import Scoring
from fp4conv.qat.settings import settings_from
from fp4conv.qat.work import Work

TASK = Task(rules=2, prime=5)
SETTINGS: Mapping[str, object] = {
    "backend": "fp4conv",
    "format": "nvfp4",
    "quant_cfg": "NVFP4_DEFAULT_CFG",
    "dtype": "float32",
}


@pytest.mark.parametrize("samples", [1, 128])
def test_calibration_sees_the_first_examples_and_no_padding(tmp_path: Path, samples: int) -> None:
    """Amax of inputs by torch's hooks, text by text; padding is made to stand out, and texts are of all lengths."""
    write_model(tmp_path / "model", TASK, family="llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
        model.model.embed_tokens.weight[0, 7] = 1  # after the norm no input can be larger
    model.save_pretrained(tmp_path / "model")
    texts = [" ".join(map(str, range(1, 2 + i % 4))) for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    here = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "d.jsonl"), "calib_samples": samples}
    settings, places = settings_from(SETTINGS, here), steps.Places(tmp_path / "out")
    steps.calibrate(tmp_path / "model", places, settings)
    found = load_file(places.quantizers / "fp4conv/training.safetensors")

    seen: list[float] = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    with torch.no_grad():
        for example in load_data(settings, tokenizer_for(TASK.words())).train:
            model(torch.tensor([example.ids]))
    assert max(seen[1:]) > seen[0]
    amax = float(found["model.layers.0.self_attn.q_proj.input_quantizer._amax"])
    assert amax == pytest.approx(max(seen[:samples]))


@pytest.mark.parametrize(
    ("family", "options", "quantised"),
    [
        ("llama", {}, r"_proj\.weight$"),
        ("llama", {"modules": "mlp"}, r"mlp\."),
        ("llama", {"modules": "mlp", "include": "*.o_proj"}, r"mlp\.|o_proj\."),
        ("llama", {"exclude": "*layers.1.*"}, r"layers\.0\."),
        ("llama", {"quant_cfg": "MXFP4_MLP_WEIGHT_ONLY_CFG"}, r"mlp\."),
        ("gpt-oss", {}, r"\.experts\.\w+_proj$"),
        ("gpt-oss", {"exclude": "*layers.1.mlp.experts.*"}, r"layers\.0\.\S+\.experts\.\w+_proj$"),
    ],
    ids=str,
)
def test_what_is_quantised_is_what_the_settings_choose(
    tmp_path: Path, family: str, options: Mapping[str, object], quantised: str
) -> None:
    write_model(tmp_path / "model", TASK, family=family)
    (tmp_path / "d.jsonl").write_text('{"text": "1 2 3"}\n' * 4)
    words = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "d.jsonl"), "backend": "fp4conv"}
    found = steps.calibrate(
        tmp_path / "model", steps.Places(tmp_path / "out"), settings_from(words, {"format": "mxfp4"}, options)
    )
    matrices = [weight.name for weight in parsed(tmp_path / "model").weights if len(weight.shape) > 1]
    assert sorted(found.names) == sorted(name for name in matrices if re.search(quantised, name))


def fused(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return torch.nn.functional.linear(hidden, self.down_proj.weight)


def wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic of some other format."""
    monkeypatch.setattr("fp4conv.qat.quantizers.fake_quantise", lambda x, *_: torch.round(x * 64) / 64)


def scales_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4conv.qat.own.share", lambda *_, **__: 0)


def fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", fused)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (wrong_values, "are not those of fp4conv's codec"),
        (scales_of_their_own, "its amax is not that of"),
        (fused_kernel, "past its quantiser"),
    ],
)
def test_a_fault_of_the_quantisers_stops_a_run_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None], message: str
) -> None:
    write_model(tmp_path / "model", TASK, family="llama")
    (tmp_path / "d.jsonl").write_text('{"text": "1 2 3"}\n' * 4)
    words = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "d.jsonl"), "backend": "fp4conv"}
    settings, places = settings_from({**words, "format": "nvfp4"}), steps.Places(tmp_path / "out")
    steps.calibrate(tmp_path / "model", places, settings)
    fault(monkeypatch)
    with pytest.raises(Fp4convError, match=message):
        steps.calibrate(tmp_path / "model", places, settings)


# ---- what a trained model has beside its tensors


def test_a_tensor_that_the_trainer_did_not_save_stops_a_run(tmp_path: Path) -> None:
    source, saved = tmp_path / "source", tmp_path / "out" / "saved"
    for folder in (source, saved):
        write_model(folder, TASK, family="llama")
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj\.weight: was not saved"):
        steps._keep(source, tmp_path / "out", settings_from({"format": "mxfp4"}))


def test_the_small_files_of_a_trained_model_are_those_of_its_source(tmp_path: Path) -> None:
    """Releases of transformers before 5, which servers have, read `rope_theta`, and do not know TokenizersBackend."""
    source, saved = tmp_path / "source", tmp_path / "out" / "saved"
    write_model(source, TASK, family="llama")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 500_000.0}))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (source / "LICENSE").write_text("as it was")
    (source / "pytorch_model.bin").write_bytes(b"of another form")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.use_cache = False
    model.save_pretrained(saved)
    (saved / "training_args.bin").write_bytes(b"of training")
    (saved / "additional_chat_templates").mkdir()

    steps._keep(source, tmp_path / "out", settings_from({"format": "mxfp4"}))
    kept = tmp_path / "out" / "model"
    assert {file.name for file in kept.iterdir()} == {file.name for file in source.iterdir()} - {"pytorch_model.bin"}
    assert (kept / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert json.loads((kept / "config.json").read_text()) == json.loads((source / "config.json").read_text())


# ---- what a kill leaves


@pytest.mark.parametrize("place", ["upcast", "sft/model", "export", "ptq/mxfp4", "ptq/mxfp4-dense"])
def test_a_conversion_that_was_killed_is_begun_anew_when_its_source_was_written_again(
    tmp_path: Path, place: str
) -> None:
    """What the trainer saved is made again of its last checkpoint, for one: with another time of writing."""
    write_model(tmp_path / "model", TASK, family="llama")
    places, target = steps.Places(tmp_path / "out"), tmp_path / "out" / place
    shutil.copytree(tmp_path / "model", places.sft / "saved")
    target.parent.mkdir(exist_ok=True)

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fp4conv.convert(places.sft / "saved", target, to="bf16", max_shard_size=20_000, hints=False, on_bytes=killed)
    assert target.with_name(f"{target.name}.partial").is_dir()
    settings = settings_from(SETTINGS, {"model": str(tmp_path / "model"), "dtype": "bfloat16"})
    scoring = Scoring(tmp_path / "model", tmp_path / "model", places, settings, ())
    chosen = steps.selection(parsed(tmp_path / "model"), ("model.layers.0.mlp.down_proj.weight",))
    if place == "upcast":
        steps.upcast(tmp_path / "model", places, settings)
    elif place == "sft/model":
        steps._keep(tmp_path / "model", places.sft, settings)
    elif place == "export":
        steps.quantise(tmp_path / "model", target, "nvfp4", settings, chosen=chosen)
    else:
        steps.quantise(tmp_path / "model", places.ptq / "mxfp4", "mxfp4", settings, chosen=chosen)
        scoring._loaded_again(places.ptq / "mxfp4")
    assert (target / "config.json").is_file() or place == "ptq/mxfp4-dense"


@pytest.mark.parametrize(
    ("recipe", "inputs", "cast"),
    [
        ("general/ptq/nvfp4_default-kv_fp8", True, False),
        ("general/ptq/nvfp4_default-kv_fp8_cast", True, True),
        ("general/ptq/nvfp4_weight_only-kv_fp8_cast", False, True),
    ],
)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_an_export_without_qat_has_the_scales_of_the_kv_cache(
    tmp_path: Path, recipe: str, inputs: bool, cast: bool
) -> None:
    """Values go into the cache as v_proj gives them: torch's hooks see the largest. What is cast has a scale of 1."""
    write_model(tmp_path / "model", TASK, family="llama")
    texts = [" ".join(map(str, range(1, 2 + i % 4))) for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    here = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "d.jsonl"), "skip": "qat"}
    settings = settings_from(SETTINGS, here, {"backend": "modelopt", "quant_cfg": recipe})
    places = steps.Places(tmp_path / "out")
    found = steps.calibrate(tmp_path / "model", places, settings)
    steps.export(tmp_path / "model", places, settings, found.names)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    seen: list[float] = []
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda *at: seen.append(float(at[2].abs().max())))
    tokenizer = tokenizer_for(TASK.words())
    with torch.no_grad():
        for text in set(texts):
            model(torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]))
    tensors = load_file(places.export / "model.safetensors")
    value = tensors["model.layers.1.self_attn.v_proj.v_scale"].item()
    assert value == pytest.approx(1.0 if cast else max(seen) / 448, rel=1e-6)
    scales = {name.rpartition(".")[2] for name in tensors if name.endswith("_scale")}
    assert scales == {"weight_scale", "k_scale", "v_scale", *(["input_scale"] if inputs else [])}
    config = json.loads((places.export / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "compressed-tensors"}, "the compressed-tensors layout has no place for its scales"),
        ({"layout": "none"}, "there is no layout 'none'"),
        ({"skip": "calibrate"}, "whose scales calibration finds"),
    ],
)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_a_kv_cache_that_could_not_be_exported_is_refused_before_anything_is_trained(
    tmp_path: Path, settings: Mapping[str, object], message: str
) -> None:
    write_model(tmp_path / "model", TASK, family="llama")
    (tmp_path / "d.jsonl").write_text('{"text": "1 2"}\n' * 4)
    here = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "d.jsonl"), "output": str(tmp_path / "out")}
    recipe = {"backend": "modelopt", "quant_cfg": "general/ptq/nvfp4_default-kv_fp8"}
    with pytest.raises(Fp4convError, match=message):
        Work(settings_from(SETTINGS, here, recipe, settings), None, {}).check()
    Work(settings_from(SETTINGS, here, recipe), None, {}).check()
    cast = {"skip": "calibrate", "quant_cfg": "general/ptq/nvfp4_weight_only-kv_fp8_cast"}
    Work(settings_from(SETTINGS, here, recipe, cast), None, {}).check()


# ---- what the forward pass goes through


@pytest.mark.parametrize("family", ["gpt-oss", "llama", "qwen3-moe"])
@pytest.mark.parametrize("format_name", ["mxfp4", "nvfp4"])
def test_quantisers_are_in_force(tmp_path: Path, family: str, format_name: str) -> None:
    write_model(tmp_path, TASK, family=family)
    model, backend = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), open_backend("fp4conv")
    batch = {"input_ids": torch.arange(12)[None] + 3}
    backend.prepare(model, Recipe(format_name))
    if format_name == "nvfp4":
        backend.calibrate(model, [batch])
    check_in_force(model, backend, batch)


def test_what_a_device_adds_in_another_order_each_time_is_not_taken_for_a_weight_past_its_quantiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA experts are added up by atomic additions, unless torch is asked to repeat itself: each pass differs."""
    passes: list[None] = []

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        out = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        if torch.are_deterministic_algorithms_enabled():
            return out
        passes.append(None)
        return out * (1 + 1e-6 * 10 ** len(passes))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    write_model(tmp_path, TASK, family="llama")
    model, backend = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), open_backend("fp4conv")
    backend.prepare(model, Recipe("mxfp4"))
    check_in_force(model, backend, {"input_ids": torch.arange(12)[None] + 3})
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_weight_that_is_read_past_its_quantiser_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused kernel takes weights out of their modules; the codec's comparison cannot see it."""
    monkeypatch.setattr(LlamaMLP, "forward", fused)
    write_model(tmp_path, TASK, family="llama")
    model, backend = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), open_backend("fp4conv")
    backend.prepare(model, Recipe("mxfp4"))
    with pytest.raises(PlanError, match=r"past its quantiser, such as model\.layers\.0\.mlp\.down_proj"):
        check_in_force(model, backend, {"input_ids": torch.arange(12)[None] + 3})


@pytest.mark.parametrize("values", [float("nan"), float("-inf")])
def test_logits_that_are_no_numbers_show_nothing_and_masked_ones_are_no_difference(
    tmp_path: Path, values: float
) -> None:
    write_model(tmp_path, TASK, family="llama")
    model, backend = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), open_backend("fp4conv")
    backend.prepare(model, Recipe("mxfp4"))
    mask = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor([4]), values)
    model.lm_head.register_forward_hook(lambda _, __, out: out + mask)
    with pytest.raises(ValuesError, match="are no numbers") if math.isnan(values) else nullcontext():
        check_in_force(model, backend, {"input_ids": torch.arange(12)[None] + 3})


def packed_and_alone(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a text after another in one pack, and by itself."""
    first, second = torch.tensor([[1, 5, 6, 7, 8]]), torch.tensor([[1, 9, 10]])
    places = torch.cat([torch.arange(5), torch.arange(3)])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second], 1), position_ids=places, use_cache=False).logits[:, 5:]
        return packed, model(input_ids=second).logits


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("gpt-oss", "eager"),
        *((family, attention) for family in ("llama", "qwen3-moe") for attention in ("eager", "sdpa")),
    ],
)
def test_packed_examples_see_one_another_only_where_packing_is_refused(
    tmp_path: Path, family: str, attention: str
) -> None:
    write_model(tmp_path, TASK, family=family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention).eval()
    packed, alone = packed_and_alone(model)
    settings = settings_from({"packing": True, "attn_implementation": attention})
    if torch.allclose(packed, alone, atol=1e-5):
        check_packing(model, settings)
    else:
        with pytest.raises(PlanError, match="--no-packing"):
            check_packing(model, settings)
    check_packing(model, settings_from({"attn_implementation": attention}))
    check_packing(model, settings_from({"packing": True, "attn_implementation": "kernels-community/vllm-flash-attn3"}))
