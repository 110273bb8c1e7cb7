"""What `fp4conv qat` refuses of a model before it is decoded, loaded or trained."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("trl")

import torch
import transformers
from safetensors.torch import load_file, save_file

import fp4conv
from fp4conv.errors import Fp4convError
from fp4conv.qat import admission
from fp4conv.qat.data import Example
from fp4conv.qat.made import Task, tokenizer_for, write_model, write_task
from fp4conv.qat.models import check_memory, empty_model, host_bytes, load_model, load_tokenizer, parsed, training_bytes
from fp4conv.qat.settings import PRESETS, settings_from
from fp4conv.qat.work import Work

TASK = Task(rules=2, prime=5, length=2, held_out=2)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXAMPLE = Example((1, 5, 2), 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models by family, and gpt-oss in MXFP4 and Llama in NVFP4, which a run decodes first."""
    root = tmp_path_factory.mktemp("models")
    write_task(root / "data", TASK)
    for family in ("gpt-oss", "llama", "qwen3-moe"):
        write_model(root / family, TASK, family=family)
    fp4conv.convert(root / "gpt-oss", root / "gpt-oss-mxfp4", to="mxfp4")
    fp4conv.convert(root / "llama", root / "llama-nvfp4", to="nvfp4")
    return root


def check(root: Path, model: str, **options: object) -> None:
    given = {"model": str(root / model), "dataset": str(root / "data"), "format": "mxfp4", "backend": "fp4conv"}
    Work(settings_from({**given, "output": "none", **options}), None, {}).check()


@pytest.mark.parametrize("model", ["gpt-oss", "llama", "qwen3-moe", "gpt-oss-mxfp4", "llama-nvfp4"])
@pytest.mark.parametrize("format_name", ["mxfp4", "nvfp4"])
def test_models_that_can_be_trained_pass_in_any_format(models: Path, model: str, format_name: str) -> None:
    check(models, model, format=format_name)
    check(models, model, format=format_name, lora=True, lora_modules=("q_proj",), lora_layers=(1,))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("gpt-oss-mxfp4", {"include": "*.nothing"}, r"--include '\*\.nothing' matches no module"),
        ("gpt-oss-mxfp4", {"layout": "modelopt"}, "the modelopt layout does not hold mxfp4"),
        ("gpt-oss-mxfp4", {"quant_cfg": "MXFP4_DEFAULT_CFG"}, "only the experts are quantised"),
        ("llama-nvfp4", {"layout": "none"}, "there is no layout 'none'"),
        ("llama", {"attn_implementation": "none"}, 'transformers cannot make this model: .*"none"'),
        ("llama", {"scheduler": "none"}, "scheduler is 'none', which transformers does not know"),
        ("llama", {"scheduler": "warmup_stable_decay"}, "takes more than a rate[^$]*choose one of linear, cosine,"),
        ("llama", {"scheduler": "reduce_lr_on_plateau"}, "takes more than a rate"),
        ("gpt-oss", {"packing": True}, "packed examples would see one another"),
        (
            "llama",
            {"lora": True, "lora_layers": (0, 9)},
            "lora_layers names 9, and there is none in this model\n.* 0, 1",
        ),
        ("llama", {"lora": True, "lora_modules": ("q_proj", "c_attn")}, "lora_modules names c_attn"),
    ],
)
def test_what_the_model_cannot_be_told(models: Path, model: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(Fp4convError, match=message):
        check(models, model, **options)


def changed(models: Path, folder: Path, name: str, **keys: object) -> Path:
    """A copy of Llama with other values in a JSON file; None takes a key away."""
    shutil.copytree(models / "llama", folder)
    values = json.loads((folder / name).read_text())
    kept = {key: value for key, value in {**values, **keys}.items() if value is not None}
    (folder / name).write_text(json.dumps(kept))
    return folder


def test_an_error_of_transformers_without_words(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(Fp4convError, match=r"has no tokenizer that transformers reads[^$]*copy tokenizer.json"):
        load_tokenizer(models / "llama")


def test_a_model_type_that_is_not_known_and_code_that_would_have_to_run(models: Path, tmp_path: Path) -> None:
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    folder = changed(models, tmp_path / "own", "config.json", model_type="own", auto_map=code)
    (folder / "own.py").write_text("raise SystemExit('this must not run')\n")
    with pytest.raises(Fp4convError, match="transformers cannot make this model"):
        check(tmp_path, "own", dataset=str(models / "data"))


def test_an_encoder_is_no_causal_model(models: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertForMaskedLM(config).bfloat16().save_pretrained(tmp_path / "bert")
    tokenizer_for(TASK.words()).save_pretrained(tmp_path / "bert")
    with pytest.raises(Fp4convError, match="is a BertForMaskedLM; expected a causal language model"):
        check(tmp_path, "bert", dataset=str(models / "data"))


def test_experts_that_transformers_calls_otherwise_than_the_checkpoint(models: Path, tmp_path: Path) -> None:
    """Mixtral: `block_sparse_moe.experts.0.w1` is read as `mlp.experts.gate_up_proj`, and no export could be named."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "mixtral")
    tokenizer_for(TASK.words()).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(
        Fp4convError, match=r"transformers calls a layer .*experts.*the checkpoint has none of that name"
    ):
        check(tmp_path, "mixtral", dataset=str(models / "data"))


def test_a_tokenizer_without_an_end_of_text(models: Path, tmp_path: Path) -> None:
    changed(models, tmp_path / "endless", "tokenizer_config.json", eos_token=None, pad_token=None)
    with pytest.raises(Fp4convError, match="names no end of text"):
        check(tmp_path, "endless", dataset=str(models / "data"))
    load_tokenizer(tmp_path / "endless")  # calibration needs none


def test_a_token_without_an_embedding(models: Path) -> None:
    settings = settings_from({"model": str(models / "llama"), "format": "mxfp4", "backend": "fp4conv"})
    model = empty_model(models / "llama", settings)
    count = model.get_input_embeddings().weight.shape[0]
    assert model.device == torch.device("meta")
    admission.check_vocabulary(model, [Example((1, count - 1), 0), EXAMPLE], settings)
    with pytest.raises(Fp4convError, match=f"its tokenizer gives token {count}, and there are {count} embeddings"):
        admission.check_vocabulary(model, [EXAMPLE, Example((1, count), 0)], settings)


def test_a_tokenizer_of_another_model(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama", tmp_path / "llama")
    tokenizer_for([*TASK.words(), "new"]).save_pretrained(tmp_path / "llama")
    (tmp_path / "d.jsonl").write_text('{"text": "1 2"}\n' * 3)
    check(tmp_path, "llama", dataset=str(tmp_path / "d.jsonl"))
    (tmp_path / "d.jsonl").write_text('{"text": "1 2"}\n' * 3 + '{"text": "1 new"}\n')
    with pytest.raises(Fp4convError, match="put the tokenizer of this very model into its folder"):
        check(tmp_path, "llama", dataset=str(tmp_path / "d.jsonl"))


def test_a_disk_that_is_too_small(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4conv.qat.disk.free_bytes", lambda _: 1000)
    with pytest.raises(Fp4convError, match="the disk is too small"):
        check(models, "llama")


def test_what_is_told_of_the_examples(models: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "1 2"}\n{"text": "1 2 3 4"}\n{"text": ""}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "1 2"}\n{"text": "2 1"}\n')
    words = {"model": str(models / "llama"), "dataset": str(tmp_path), "format": "mxfp4", "backend": "fp4conv"}
    told: list[str] = []
    Work(settings_from({**words, "output": "none", "max_length": 5}), told.append, {}).check()
    assert told[0] == "2 examples to train on, 2 held out; text, no answers (only prompt/completion rows have them)"
    assert told[1:4] == [
        "note: examples longer than max_length 5, which are cut: 1 (--max-length)",
        "note: examples without a token to learn, which are left out: 1",
        "warning: 1 held-out examples are among those to train on too",
    ]


def test_zero3_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    admission.check_sharing(settings_from({"gpus": 8}))
    admission.check_sharing(settings_from({"sharding": "zero3"}))  # one process shares nothing
    with pytest.raises(Fp4convError, match="DeepSpeed, which is not installed") as caught:
        admission.check_sharing(settings_from({"gpus": 8, "sharding": "zero3"}))
    assert "pip install 'fp4conv[zero3]'" in str(caught.value)


def test_what_several_processes_would_not_train_as_it_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    shared = settings_from({"gpus": 8, "sharding": "zero3"})
    wide = replace(shared, dtype="float32")
    with pytest.raises(Fp4convError, match="several processes compute in BF16"):
        admission.check_sharing(wide)
    admission.check_sharing(replace(wide, gpus=1))
    admission.check_sharing(shared)
    for family, refused in (("moe", True), ("gpt-oss", False)):
        model = SimpleNamespace(family=SimpleNamespace(name=family))
        with pytest.raises(Fp4convError, match="finds no experts") if refused else nullcontext():
            admission.check_counted_experts(model, shared)  # type: ignore[arg-type]
        admission.check_counted_experts(model, replace(shared, backend="fp4conv"))  # type: ignore[arg-type]
        admission.check_counted_experts(model, replace(shared, sharding="fsdp2"))  # type: ignore[arg-type]
    for preset in PRESETS.values():
        admission.check_sharing(settings_from(preset.values))


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "several processes compute in BF16"),
        ({"sharding": "zero3", "backend": "modelopt"}, "finds no experts"),
    ],
    ids=str,
)
def test_they_are_refused_before_anything_is_done(
    models: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # there may be fewer
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "deepspeed" else find(name))
    with pytest.raises(Fp4convError, match=message):
        check(models, "qwen3-moe", gpus=8, **options)


def gpus_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=size))


def test_what_training_takes_at_the_least(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    """gpt-oss-20b has 20.9 billion parameters: 334 GB with gradients and optimizer, in 8 x 80 GB and not in 4."""
    twenty, preset = 20_900_000_000, settings_from(PRESETS["gpt-oss-20b"].values)
    assert 4 * 80e9 < training_bytes(twenty, preset) < 8 * 80e9
    assert host_bytes(twenty, preset) == 83_600_000_000
    assert host_bytes(twenty, replace(preset, sharding="zero3")) == 41_800_000_000
    large = settings_from(PRESETS["gpt-oss-120b-lora"].values)
    assert training_bytes(117_000_000_000, large) == host_bytes(117_000_000_000, large) == 234_000_000_000

    model = parsed(models / "llama")
    count = sum(int(np.prod(weight.shape)) for weight in model.weights)
    quantised = sum(int(np.prod(weight.shape)) for weight in model.weights if "_proj" in weight.name)
    whole = 16 * count + 2 * 2 * quantised  # without recomputing, each of two GPUs holds what was quantised
    settings = settings_from({"format": "mxfp4", "gpus": 2, "gradient_checkpointing": False})
    for needed, taken in ((whole, settings), (16 * count, replace(settings, gradient_checkpointing=True))):
        gpus_of(monkeypatch, needed // 2)
        check_memory(model, taken)
        gpus_of(monkeypatch, needed // 2 - 1)
        with pytest.raises(Fp4convError, match=r"training takes at least .*, 2 GPUs have"):
            check_memory(model, taken)
    gpus_of(monkeypatch, whole)
    monkeypatch.setattr("os.sysconf", lambda name: 4 * count - 1 if name == "SC_PHYS_PAGES" else 1)
    with pytest.raises(Fp4convError, match="the process that reads the model takes at least"):
        check_memory(model, settings)
    check_memory(model, replace(settings, sharding="zero3"))


def with_tensors(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the checkpoint in `folder` whose tensors `change` has changed."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def with_another(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head.weight"), r"^lm_head\.weight .*random values"),
        (with_another("model.layers.7.mtp.weight"), r"^model\.layers\.7\.mtp\.weight .*it would be lost"),
    ],
)
def test_tensors_that_transformers_makes_up_or_passes_over(
    models: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    """Where a lone process loads the model, and before, with nothing but names: so that several need not compare."""
    with_tensors(models / "llama", tmp_path / "llama", change)
    with pytest.raises(Fp4convError, match=message):
        load_model(tmp_path / "llama", settings_from({"format": "mxfp4"}))
    load_model(models / "llama", settings_from({"format": "mxfp4"}))
    with pytest.raises(Fp4convError, match=message):
        check(tmp_path, "llama", dataset=str(models / "data"))


def test_a_head_that_is_the_embedding_need_not_be_there(models: Path, tmp_path: Path) -> None:
    changed(models, tmp_path / "tied", "config.json", tie_word_embeddings=True)
    with_tensors(tmp_path / "tied", tmp_path / "headless", without("lm_head.weight"))
    check(tmp_path, "headless", dataset=str(models / "data"))


def test_they_are_found_of_a_model_that_is_decoded_first(models: Path, tmp_path: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    with_tensors(models / "gpt-oss-mxfp4", tmp_path / "gpt-oss", without(norm))
    with pytest.raises(Fp4convError, match=rf"^{re.escape(norm)} .*random values"):
        check(tmp_path, "gpt-oss", dataset=str(models / "data"))


def test_a_tensor_of_another_shape_than_the_config_says(models: Path, tmp_path: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    with_tensors(models / "llama", tmp_path / "llama", with_another(norm))
    with pytest.raises(Fp4convError, match=rf"^{re.escape(norm)} .*: has shape \[2, 2\], expected \[32\] \(one of 1\)"):
        check(tmp_path, "llama", dataset=str(models / "data"))


def test_a_process_in_which_modelopt_has_trained_checks_the_next_model_too(models: Path) -> None:
    """Its trainer does this for good: transformers' way to load a model is its own from then on."""
    pytest.importorskip("modelopt.torch.opt").enable_huggingface_checkpointing()
    check(models, "llama")
