"""The two backends on models of three architectures: what is quantised, calibrated, saved, loaded again and exported.

ModelOpt's fake quantisation runs as a CUDA kernel; here its one entry is replaced by fp4conv's arithmetic, all else is
ModelOpt's own. scripts/compare_cuda compares the kernels themselves.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import array_of, read_raw
from safetensors.numpy import load_file

import fp4conv
from fp4conv import training_state
from fp4conv.errors import PlanError, SourceError, UsageError, ValuesError
from fp4conv.qat import modelopt as modelopt_backend
from fp4conv.qat.backend import Backend, Recipe, open_backend
from fp4conv.qat.checks import check_exported, check_forward, check_saved, check_shared
from fp4conv.qat.fake_quant import fake_quantise
from fp4conv.qat.quantizers import FakeQuantizer
from fp4conv.qat.recipes import SCHEMES
from fp4conv.qat.targets import canonical

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

Reference = Callable[[str], Path]
MODELS = ("gptoss-bf16", "llama-bf16", "qwen3moe-bf16")
IDS = torch.arange(24)[None] * 7 % 200
BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(1) // 2}]


def load(folder: Path, dtype: str = "bfloat16") -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def prepared(backend: Backend, model: torch.nn.Module, recipe: Recipe) -> torch.nn.Module:
    backend.check(recipe)
    backend.prepare(model, recipe)
    if backend.calibrates(recipe):
        backend.calibrate(model, BATCHES)
    return model


def check_input_scales(trained: Path, exported: Path) -> None:
    """What servers scale inputs by is what training froze, for every input quantiser and every tensor."""
    suffix = "input_quantizer._amax"
    state = trained / training_state.AMAX
    stored = load_file(state) if state.exists() else {}
    amax = {key: value for key, value in stored.items() if key.endswith(suffix)}
    raw, used = read_raw(exported), set()
    for key in raw:
        if not key.endswith("input_scale"):
            continue
        module = key.removesuffix("input_scale")[:-1]
        expert = re.fullmatch(r"(.+\.experts)\.\d+\.(gate|up|down)_proj", module)
        stem = (
            f"{expert[1]}.{'down' if expert[2] == 'down' else 'gate_up'}_proj_" if expert else module + key[len(module)]
        )
        assert array_of(raw[key]).reshape(()) == np.float32(amax[stem + suffix] / np.float32(2688)), key
        used.add(stem + suffix)
    assert used == amax.keys()


def round_trip(backend: Backend, source: Path, recipe: Recipe, folder: Path) -> torch.nn.Module:
    """Prepare, check, save, export, load again; every check must hold. Returns the prepared model."""
    model = prepared(backend, load(source), recipe)
    assert model.state_dict().keys() == load(source).state_dict().keys()
    report = check_forward(backend.quantized(model))
    assert report.explained == {}
    assert report.values > 0
    check_shared(backend.quantized(model))
    model.save_pretrained(folder / "trained")
    backend.save(model, folder / "trained")
    assert check_saved(folder / "trained", source) > report.weights
    result = fp4conv.convert(folder / "trained", folder / "out", to=recipe.format_name)
    assert not any("other values" in warning for warning in result.warnings)
    assert check_exported(backend.quantized(model), folder / "out") == report
    check_input_scales(folder / "trained", folder / "out")
    again = load(folder / "trained")
    plain = logits(again)
    backend.load(again, folder / "trained")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), plain)
    backend.set_weights(again, False)
    backend.set_inputs(again, False)
    assert torch.equal(logits(again), plain)
    return model


CASES = [
    ("gptoss-bf16", Recipe("mxfp4")),
    ("gptoss-bf16", Recipe("nvfp4", "NVFP4_DEFAULT_CFG")),
    ("llama-bf16", Recipe("mxfp4", "MXFP4_DEFAULT_CFG")),
    ("llama-bf16", Recipe("nvfp4", "NVFP4_MLP_ONLY_CFG")),
    ("qwen3moe-bf16", Recipe("mxfp4")),
    ("qwen3moe-bf16", Recipe("nvfp4", "NVFP4_DEFAULT_CFG")),
]


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=str)
def test_own_backend(reference: Reference, tmp_path: Path, name: str, recipe: Recipe) -> None:
    round_trip(open_backend("fp4conv"), reference(name), recipe, tmp_path)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("gptoss-bf16", Recipe("nvfp4", "NVFP4_DEFAULT_CFG")),
        ("llama-bf16", Recipe("mxfp4", "MXFP4_MLP_WEIGHT_ONLY_CFG")),
        ("qwen3moe-bf16", Recipe("nvfp4")),
    ],
    ids=str,
)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_modelopt_backend(reference: Reference, tmp_path: Path, name: str, recipe: Recipe) -> None:
    model = round_trip(open_backend("modelopt"), reference(name), recipe, tmp_path)
    assert not list((tmp_path / "trained").glob("*.pth")), "fp4conv's own files say it all"
    own = {weight.name: weight.values for weight in open_backend("modelopt").quantized(model)}
    ours = prepared(open_backend("fp4conv"), load(reference(name)), recipe)
    theirs = dict(open_backend("fp4conv").weights(ours))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[weight], theirs[weight]) for weight in own)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_calibration_is_that_of_modelopt(reference: Reference, tmp_path: Path, name: str) -> None:
    """Amax of inputs and weights, quantiser by quantiser, under the recipe that quantises everything."""
    recipe = Recipe("nvfp4", "NVFP4_DEFAULT_CFG")
    states = {}
    for kind in ("fp4conv", "modelopt"):
        backend = open_backend(kind)
        model = prepared(backend, load(reference(name)), recipe)
        (tmp_path / kind).mkdir()
        backend.save(model, tmp_path / kind)
        states[kind] = json.loads((tmp_path / kind / "fp4conv/training.json").read_text())["quantizers"]
    assert states["fp4conv"] == states["modelopt"]
    ours, theirs = (load_file(tmp_path / kind / "fp4conv/training.safetensors") for kind in states)
    assert ours.keys() == theirs.keys() != set()
    assert {key: float(value) for key, value in ours.items()} == {key: float(value) for key, value in theirs.items()}


# ---- recipes


def quantizers_of(backend: Backend, model: torch.nn.Module, recipe: Recipe, folder: Path) -> dict[str, object]:
    """Quantiser -> what the state says of it, after `prepare` alone."""
    backend.check(recipe)
    backend.prepare(model, recipe)
    folder.mkdir(parents=True)
    backend.save(model, folder)
    found: dict[str, object] = json.loads((folder / "fp4conv/training.json").read_text())["quantizers"]
    return found


@pytest.mark.parametrize("name", [*SCHEMES])
@pytest.mark.usefixtures("kernels_on_cpu")
def test_the_table_of_recipes_says_what_modelopt_does(reference: Reference, tmp_path: Path, name: str) -> None:
    recipe = Recipe(SCHEMES[name].format_name, name)
    for model in MODELS if name != "NVFP4_EXPERTS_ONLY_CFG" else ("gptoss-bf16", "qwen3moe-bf16"):
        own, theirs = (
            quantizers_of(open_backend(kind), load(reference(model)), recipe, tmp_path / model / kind)
            for kind in ("fp4conv", "modelopt")
        )
        assert own == theirs != {}, model


@pytest.mark.parametrize("kind", ["fp4conv", "modelopt"])
@pytest.mark.usefixtures("kernels_on_cpu")
def test_a_recipe_that_matches_nothing(reference: Reference, kind: str) -> None:
    with pytest.raises(PlanError, match="nothing to quantise"):
        open_backend(kind).prepare(load(reference("llama-bf16")), Recipe("nvfp4", "NVFP4_EXPERTS_ONLY_CFG"))


@pytest.mark.usefixtures("kernels_on_cpu")
def test_a_recipe_with_an_fp8_kv_cache_brings_its_scales(reference: Reference, tmp_path: Path) -> None:
    recipe = Recipe("nvfp4", "general/ptq/nvfp4_default-kv_fp8")
    backend = open_backend("modelopt")
    model = prepared(backend, load(reference("llama-bf16")), recipe)
    model.save_pretrained(tmp_path / "trained")
    backend.save(model, tmp_path / "trained")
    fp4conv.convert(tmp_path / "trained", tmp_path / "out", to="nvfp4")
    raw = read_raw(tmp_path / "out")
    amax = load_file(tmp_path / "trained/fp4conv/training.safetensors")
    for layer, letter in ((0, "k"), (1, "v")):
        stem = f"model.layers.{layer}.self_attn"
        frozen = amax[f"{stem}.{letter}_bmm_quantizer._amax"]
        scale = array_of(raw[f"{stem}.{letter}_proj.{letter}_scale"]).reshape(())
        assert scale == np.float32(frozen / np.float32(448))
    again = load(reference("llama-bf16"))
    backend.load(again, tmp_path / "trained")
    assert torch.equal(logits(again), logits(model))
    backend.set_weights(again, False)
    backend.set_inputs(again, False)  # the cache's too: what is compared with the export has none
    assert torch.equal(logits(again), logits(load(reference("llama-bf16"))))
    cast = Recipe("nvfp4", "general/ptq/nvfp4_default-kv_fp8_cast")
    backend.save(prepared(backend, load(reference("llama-bf16")), cast), tmp_path)
    assert load_file(tmp_path / "fp4conv/training.safetensors")["model.layers.0.self_attn.k_bmm_quantizer._amax"] == 448


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        (Recipe("nvfp4", "NVFP4_AWQ_LITE_CFG"), "calibrates by 'awq_lite'"),
        (Recipe("nvfp4", "NVFP4_SVDQUANT_DEFAULT_CFG"), "calibrates by 'svdquant'"),
        (Recipe("nvfp4", "NVFP4_FOUR_OVER_SIX_CFG"), "calibrates by 'mse'"),
        (Recipe("nvfp4", "MXFP4_DEFAULT_CFG"), "not for --format nvfp4"),
        (Recipe("mxfp4", "FP8_DEFAULT_CFG"), "not for --format mxfp4"),
        (Recipe("mxfp4", "NO_SUCH_CFG"), "neither a constant of ModelOpt nor a recipe[^$]*choose one of MAMBA"),
        (Recipe("mxfp4", "no/such/recipe"), "neither a constant"),
        (Recipe("nvfp4", "NVFP4_DEFAULT_CFG", include=("*",)), "--include does not go with"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_what_no_export_can_repeat_is_refused_before_a_model_is_loaded(recipe: Recipe, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        open_backend("modelopt").check(recipe)


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        (Recipe("nvfp4", "NVFP4_DEFAULT_CFG", exclude=("*v_proj",)), "servers fuse"),
        (Recipe("nvfp4", "general/ptq/nvfp4_default-kv_nvfp4_cast"), "quantises the KV cache by"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_quantisers_that_no_export_can_repeat(reference: Reference, recipe: Recipe, match: str) -> None:
    backend = open_backend("modelopt")
    backend.check(recipe)
    with pytest.raises(PlanError, match=match):
        backend.prepare(load(reference("llama-bf16")), recipe)


@pytest.mark.usefixtures("kernels_on_cpu")
def test_a_recipe_that_quantises_the_output_head(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"quantizer_name": "*lm_head.weight_quantizer", "cfg": modelopt_backend._entry("", "nvfp4")["cfg"]}
    monkeypatch.setattr(modelopt_backend, "entries_of", lambda _: [entry])
    with pytest.raises(PlanError, match="the loss multiplies by its weight itself"):
        open_backend("modelopt").prepare(load(reference("llama-bf16")), Recipe("nvfp4", "any"))


@pytest.mark.usefixtures("kernels_on_cpu")
def test_modules_can_be_left_out_of_a_recipe(reference: Reference, tmp_path: Path) -> None:
    recipe = Recipe("nvfp4", "NVFP4_DEFAULT_CFG", exclude=("*o_proj", "model.layers.0.mlp.experts.*"))
    states = [
        quantizers_of(open_backend(kind), load(reference("gptoss-bf16")), recipe, tmp_path / kind)
        for kind in ("fp4conv", "modelopt")
    ]
    assert states[0] == states[1]
    assert not any("o_proj" in name or "layers.0.mlp" in name for name in states[0])


# ---- adapters


@pytest.mark.parametrize("first", ["adapters", "quantisers"])
def test_adapters_on_experts_are_quantised_with_their_weight(reference: Reference, first: str) -> None:
    """peft changes expert parameters while its module runs: the forward pass is that of the sum, quantised."""
    peft = pytest.importorskip("peft")
    model = load(reference("gptoss-bf16"))
    stems = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[stem[13:] for stem in stems])
    backend = open_backend("fp4conv")
    if first == "quantisers":
        backend.prepare(model, Recipe("mxfp4"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
    if first == "adapters":
        backend.prepare(adapted, Recipe("mxfp4"))
    assert {canonical(stem) for stem, _ in backend.weights(adapted)} >= set(stems)
    passed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in adapted.modules():
        if isinstance(module, FakeQuantizer):
            module.register_forward_hook(lambda each, args, out: passed.update({each.name: (args[0], out)}))
    adapted(IDS, labels=IDS).loss.backward()
    seen = dict(passed)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable.values())
    masters = {weight.name: weight.master.clone() for weight in backend.quantized(adapted)}
    merged = adapted.merge_and_unload()
    for stem in stems:
        went_in, came_out = seen[stem]
        assert torch.equal(came_out, fake_quantise(went_in, "mxfp4", axis=-2))
        # Merging rounds the delta before it adds it, the forward pass rounds the sum alone.
        assert not torch.allclose(went_in, masters[stem], atol=0.01)
        assert torch.allclose(went_in, merged.get_parameter(stem), rtol=2**-6, atol=2**-8)


# ---- what is refused


def test_no_gpu_names_the_other_backend() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=r"CUDA kernels[^$]*--backend fp4conv"):
        open_backend("modelopt").check(Recipe("mxfp4"))


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        (Recipe("mxfp5"), "--format mxfp5"),
        (Recipe("bf16"), "target of fp4conv convert"),
        (Recipe("mxfp4", "NVFP4_DEFAULT_CFG"), "--format is mxfp4"),
        (Recipe("mxfp4", "INT4_AWQ_CFG"), "choose one of MXFP4_DEFAULT_CFG"),
    ],
)
def test_recipes_that_are_refused_before_a_model_is_loaded(recipe: Recipe, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        open_backend("fp4conv").check(recipe)


@pytest.mark.parametrize(
    ("recipe", "error", "match"),
    [
        (Recipe("mxfp4", include=("*nothing*",)), UsageError, "matches no module"),
        (Recipe("mxfp4", exclude=("*k_proj",)), PlanError, "servers fuse"),
        (Recipe("mxfp4", include=("lm_head",)), PlanError, r"lm_head[^$]*the loss multiplies by its weight itself"),
        (Recipe("mxfp4", exclude=("*",)), PlanError, "nothing to quantise"),
    ],
)
def test_choices_that_are_refused(reference: Reference, recipe: Recipe, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        open_backend("fp4conv").prepare(load(reference("llama-bf16")), recipe)


def test_a_length_that_no_block_divides(reference: Reference) -> None:
    model = load(reference("llama-bf16"))
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(90, model.config.hidden_size)
    with pytest.raises(PlanError, match=r"down_proj[^$]*90 values"):
        open_backend("fp4conv").prepare(model, Recipe("mxfp4"))


def test_nothing_runs_before_calibration(reference: Reference) -> None:
    model, backend = load(reference("llama-bf16")), open_backend("fp4conv")
    backend.prepare(model, Recipe("nvfp4"))
    with pytest.raises(PlanError, match=r"q_proj: nothing was calibrated"):
        logits(model)


def test_a_weight_of_zeros_cannot_be_calibrated(reference: Reference) -> None:
    model, backend = load(reference("llama-bf16")), open_backend("fp4conv")
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    backend.prepare(model, Recipe("nvfp4"))
    with pytest.raises(ValuesError, match=r"o_proj: the amax of its weight is 0"):
        backend.calibrate(model, BATCHES)


def test_a_state_of_another_model_is_refused(reference: Reference, tmp_path: Path) -> None:
    backend = open_backend("fp4conv")
    backend.save(prepared(backend, load(reference("llama-bf16")), Recipe("nvfp4")), tmp_path)
    with pytest.raises(SourceError, match="belong to no weight of this model"):
        backend.load(load(reference("gptoss-bf16")), tmp_path)
    (tmp_path / "fp4conv/training.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has no model\.layers\.0\S+_amax"):
        backend.load(load(reference("llama-bf16")), tmp_path)
    with pytest.raises(SourceError, match="no run of fp4conv wrote it"):
        backend.load(load(reference("llama-bf16")), tmp_path / "fp4conv")


# ---- what a converter makes of a state


def test_a_state_without_its_amax_is_not_converted(reference: Reference, tmp_path: Path) -> None:
    backend, folder = open_backend("fp4conv"), tmp_path / "trained"
    model = prepared(backend, load(reference("llama-bf16")), Recipe("nvfp4"))
    model.save_pretrained(folder)
    backend.save(model, folder)
    (folder / "fp4conv/training.safetensors").unlink()
    with pytest.raises(SourceError, match="has no scalar amax"):
        fp4conv.convert(folder, tmp_path / "out", to="nvfp4")
    state = folder / "fp4conv/training.json"
    for damage, match in (("{}", "of version None"), (state.read_text().replace("nvfp4", "int3"), "its entry of")):
        state.write_text(damage)
        with pytest.raises(SourceError, match=match):
            fp4conv.convert(folder, tmp_path / "out", to="nvfp4")


def test_training_files_are_no_hints_and_do_not_come_along(reference: Reference, tmp_path: Path) -> None:
    backend, folder = open_backend("fp4conv"), tmp_path / "trained"
    model = prepared(backend, load(reference("llama-bf16")), Recipe("nvfp4"))
    model.save_pretrained(folder)
    backend.save(model, folder)
    result = fp4conv.convert(folder, tmp_path / "bf16", to="bf16")
    assert any("trained with nvfp4 fake quantisers" in warning for warning in result.warnings)
    assert not any("hints" in warning for warning in result.warnings)
    assert not (tmp_path / "bf16/fp4conv/training.json").exists()
    masters = fp4conv.open(tmp_path / "bf16")
    for name in masters.names:
        assert np.array_equal(masters.read(name), fp4conv.open(folder).read(name))
