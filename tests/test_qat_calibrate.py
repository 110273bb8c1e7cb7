"""`calibrate`: the amax of inputs and of the KV cache against ModelOpt's calibration, and what convert makes of it."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import array_of, config_of, read_raw
from click.testing import CliRunner, Result
from hub_server import Hub
from safetensors import safe_open
from safetensors.numpy import load_file

import fp4conv
from fp4conv.cli import main
from fp4conv.errors import OutputError, PlanError, UsageError, ValuesError
from fp4conv.layouts import parse
from fp4conv.qat.calibrating import observe
from fp4conv.sources import open_source

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

pytestmark = pytest.mark.usefixtures("one_thread")

Reference = Callable[[str], Path]
TEXTS = ["one small step", "two ferries cross at dawn, and a third waits", "3 + 4 = 7 " * 9]
BATCHES = [{"input_ids": torch.arange(40)[None] * 7 % 200}, {"input_ids": torch.arange(20)[None] * 11 % 300}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def load(folder: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()


def calibrated_by_modelopt(model: torch.nn.Module) -> dict[str, float]:
    """Quantiser -> amax after ModelOpt's max calibration of NVFP4 inputs and an FP8 KV cache."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    config["quant_cfg"] = [*config["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]
    mtq.quantize(model, config, lambda each: [each(**batch) for batch in BATCHES])
    names = ("input_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")
    found = {name: quantizer for name, quantizer in model.named_modules() if name.endswith(names)}
    return {name: float(each.amax) for name, each in found.items() if each.is_enabled and each.amax is not None}


def ours_for(quantizer: str, amax: dict[str, float]) -> float:
    """What `observe` found for a quantiser of ModelOpt."""
    stem, _, leaf = quantizer.rpartition(".")
    if leaf in ("k_bmm_quantizer", "v_bmm_quantizer"):
        return amax[f"{stem}.{leaf[0]}_proj.{leaf[0]}_amax"]
    if leaf == "input_quantizer":
        return amax[f"{stem}.input_amax"]
    parameter = leaf.removesuffix("_input_quantizer")
    each = [f"{stem}.0.{name}.input_amax" for name in ("gate_proj", "up_proj", "down_proj") if name[:2] in parameter]
    return amax.get(f"{stem}.{parameter}.input_amax") or amax[each[0]]


@pytest.mark.parametrize("name", ["llama-bf16", "gptoss-bf16", "qwen3moe-bf16"])
def test_every_amax_is_that_of_modelopts_calibration(reference: Reference, name: str) -> None:
    ours = observe(load(reference(name)), BATCHES, kv=True)
    theirs = calibrated_by_modelopt(load(reference(name)))
    assert len(theirs) >= 8
    assert {quantizer: ours_for(quantizer, ours) for quantizer in theirs} == theirs


def test_observing_is_only_looking(reference: Reference) -> None:
    """Every product of the model sees what it sees without: by forward hooks of the plain model's layers."""
    model = load(reference("llama-bf16"))
    seen: dict[str, float] = {}

    def hook(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: seen.update({name: max(seen.get(name, 0), float(inputs[0].abs().max()))})

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(f"{name}.input_amax"))
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    assert observe(load(reference("llama-bf16")), BATCHES) == seen


# ---- the command


@pytest.mark.parametrize("name", ["llama-bf16", "gptoss-bf16", "qwen3moe-bf16", "gptoss-mxfp4"])
def test_w4a4_without_training(reference: Reference, tmp_path: Path, data: Path, name: str) -> None:
    result = fp4conv.calibrate(reference(name), dataset=data, output=tmp_path / "amax.safetensors")
    amax = load_file(tmp_path / "amax.safetensors")
    assert (result.inputs, result.kv, result.samples) == (len(amax), 0, 3)
    assert all(value.dtype == np.float32 and value.shape == () for value in amax.values())
    fp4conv.convert(reference(name), tmp_path / "out", to="nvfp4", input_scales=str(tmp_path / "amax.safetensors"))
    raw = read_raw(tmp_path / "out")
    suffixes = (".input_scale", "_input_scale")
    scales = {key.removesuffix(s): array_of(raw[key]) for s in suffixes for key in raw if key.endswith(s)}
    assert scales
    for module, scale in scales.items():
        assert scale.reshape(()) == np.float32(amax[f"{module}.input_amax"] / np.float32(2688))
    config = config_of(tmp_path / "out")["quantization_config"]
    assert isinstance(config, dict)
    assert config["quant_algo"] == "NVFP4"
    assert "kv_cache_scheme" not in config


def test_kv_cache_scales_come_along_when_asked_for(reference: Reference, tmp_path: Path, data: Path) -> None:
    file = tmp_path / "amax.safetensors"
    result = fp4conv.calibrate(reference("llama-bf16"), dataset=data, output=file, kv_cache=True)
    amax = load_file(file)
    assert result.kv == 2 * 2
    fp4conv.convert(reference("llama-bf16"), tmp_path / "out", to="nvfp4", input_scales=str(file))
    raw = read_raw(tmp_path / "out")
    for letter in "kv":
        scale = array_of(raw[f"model.layers.1.self_attn.{letter}_proj.{letter}_scale"]).reshape(())
        assert scale == np.float32(amax[f"model.layers.1.self_attn.{letter}_proj.{letter}_amax"] / np.float32(448))


def test_the_first_samples_count_and_are_cut(reference: Reference, tmp_path: Path, data: Path) -> None:
    made = {}
    for count, length in ((1, 100), (2, 100), (3, 100), (3, 4)):
        file = tmp_path / f"{count}-{length}.safetensors"
        result = fp4conv.calibrate(
            reference("llama-bf16"), dataset=data, output=file, calib_samples=count, max_length=length
        )
        assert result.samples == count
        assert length > 4 or result.tokens == 12
        made[count, length] = load_file(file)
    for name, value in made[3, 100].items():
        assert made[1, 100][name] <= made[2, 100][name] <= value
        assert made[3, 4][name] <= value
    assert any(made[1, 100][name] < value for name, value in made[3, 100].items())


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["calibrate", *(str(argument) for argument in arguments)])


def test_words_and_json(reference: Reference, tmp_path: Path, data: Path) -> None:
    file = tmp_path / "the amax.safetensors"
    words = (reference("llama-bf16"), "--dataset", data, "--output", file)
    said = run(*words)
    assert said.exit_code == 0, said.output
    assert "the amax of 14 inputs, over 3 examples with " in said.stdout
    assert f"fp4conv convert {reference('llama-bf16')} DST --to nvfp4 --input-scales '{file}'" in said.stdout
    refused = run(*words)
    assert refused.exit_code == 1
    assert "exists already" in refused.stderr
    again = run(*words, "--overwrite", "--json")
    found = json.loads(again.stdout)
    assert {key: found[key] for key in ("inputs", "kv", "samples")} == {"inputs": 14, "kv": 0, "samples": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "the amax.safetensors"]
    less = run(*words, "--overwrite", "--json", "--kv-cache", "--calib-samples", "2", "--max-length", "4")
    found = json.loads(less.stdout)
    assert {key: found[key] for key in ("kv", "samples", "tokens")} == {"kv": 2 * 2, "samples": 2, "tokens": 2 * 4}
    assert len(load_file(file)) == 14 + 4


def test_a_model_on_the_hub_is_taken_at_the_revision_that_was_asked_for(
    hub: Hub, reference: Reference, tmp_path: Path, data: Path
) -> None:
    commit = hub.add("owner/tiny", reference("llama-bf16"))
    hub.change("owner/tiny", {"config.json": b"{}"})
    file = tmp_path / "amax.safetensors"
    made = fp4conv.calibrate(f"owner/tiny@{commit}", dataset=data, output=file)
    assert made.inputs == 14
    assert made.commits == {f"owner/tiny@{commit}": commit}


def test_the_file_says_of_what_it_is(data_hub: Hub, reference: Reference, tmp_path: Path, data: Path) -> None:
    commit = data_hub.add("datasets/owner/data", {"train.jsonl": data.read_bytes()})
    file, model = tmp_path / "amax.safetensors", str(reference("llama-bf16"))
    result = run(model, "--dataset", "owner/data", "--output", str(file), "--calib-samples", "2")
    assert f"of datasets/owner/data@main: commit {commit}\n" in result.stdout
    with safe_open(file, "np") as opened:
        facts = json.loads(opened.metadata()["fp4conv"])
    assert facts.pop("by") == f"fp4conv {fp4conv.__version__}"
    assert facts.pop("tokens") > 2
    commits = {"datasets/owner/data@main": commit}
    assert facts == {"model": model, "dataset": "owner/data", "samples": 2, "commits": commits}


# ---- what is refused


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_a_name_that_no_file_can_have(reference: Reference, tmp_path: Path, data: Path, what: str) -> None:
    words = {"model": str(reference("llama-bf16")), "dataset": str(data), what: "a" * 300}
    refused = run(words["model"], "--dataset", words["dataset"], "--output", tmp_path / "amax.safetensors")
    assert isinstance(refused.exception, SystemExit)
    assert "aaa" in refused.stderr


def test_wrong_words_are_found_before_the_model_is_loaded(
    reference: Reference, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp4conv.qat import models

    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    model, file = reference("llama-bf16"), tmp_path / "amax.safetensors"
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(UsageError, match="has the columns question, answer; expected messages"):
        fp4conv.calibrate(model, dataset=other, output=file)
    folder = tmp_path / "splits"
    folder.mkdir()
    for split in ("train", "held-out"):
        (folder / f"{split}.jsonl").write_text(data.read_text())
    with pytest.raises(UsageError, match="has no split 'valid'; it has held-out, train"):
        fp4conv.calibrate(model, dataset=folder, output=file, train_split="valid")
    with pytest.raises(OutputError, match=f"mkdir -p '{tmp_path}/no such'"):
        fp4conv.calibrate(model, dataset=data, output=tmp_path / "no such" / "amax.safetensors")
    with pytest.raises(OutputError, match="is a folder"):
        fp4conv.calibrate(model, dataset=data, output=tmp_path)
    with pytest.raises(OutputError, match="is the dataset, which is only read"):
        fp4conv.calibrate(model, dataset=data, output=data, overwrite=True)
    with pytest.raises(OutputError, match="lies in the dataset, which is only read"):
        fp4conv.calibrate(model, dataset=folder, output=folder / "train.jsonl", overwrite=True)
    with pytest.raises(PlanError, match=r"are nvfp4[^$]*--to bf16"):
        fp4conv.calibrate(reference("llama-nvfp4-default"), dataset=data, output=file)
    with pytest.raises(PlanError, match="transformers cannot make this model"):
        fp4conv.calibrate(model, dataset=data, output=file, attn_implementation="none")
    with pytest.raises(OutputError, match="cannot be written"):
        fp4conv.calibrate(model, dataset=data, output="/proc/amax.safetensors")
    assert not file.exists()


def test_the_model_is_only_read(reference: Reference, tmp_path: Path, data: Path) -> None:
    """Under whatever name it has, and with --overwrite too."""
    model, link = tmp_path / "model", tmp_path / "link"
    shutil.copytree(reference("llama-bf16"), model)
    link.symlink_to(model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for folder in (model, link):
        for file in (sorted(before)[-3], "amax.safetensors"):
            with pytest.raises(OutputError, match="lies in the model, which is only read"):
                fp4conv.calibrate(model, dataset=data, output=folder / file, overwrite=True)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_missing_packages_are_named(
    reference: Reference, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "datasets" else object())
    with pytest.raises(UsageError, match=r"needs datasets[^$]*pip install 'fp4conv\[qat\]'"):
        fp4conv.calibrate(reference("llama-bf16"), dataset=data, output=tmp_path / "amax.safetensors")


def test_a_model_whose_layers_have_other_names_than_its_checkpoint(
    reference: Reference, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before the first example: convert would not find these amax."""
    other = parse(open_source(reference("gptoss-bf16")))
    monkeypatch.setattr("fp4conv.commands.calibrate.parse", lambda _: other)
    monkeypatch.setattr("fp4conv.qat.calibrating.observe", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(PlanError, match=r"calls a layer model\.layers\.0\.mlp\.\S+_proj, and the checkpoint has none"):
        fp4conv.calibrate(reference("llama-bf16"), dataset=data, output=tmp_path / "amax.safetensors")


def test_inputs_that_are_not_finite_are_refused(reference: Reference) -> None:
    model = load(reference("llama-bf16"))
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(ValuesError, match=r"layers\.1\.self_attn\.q_proj: [^$]*nan[^$]*what the model computes there"):
        observe(model, BATCHES)
    with pytest.raises(ValuesError, match="no value reached it"):
        observe(load(reference("llama-bf16")), [])
