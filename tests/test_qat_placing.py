"""A model over several devices: which layer lies where, and that quantisers are in force under accelerate's hooks.

All devices here are the processor: accelerate puts its hooks on whatever is asked, and hooks are what can go wrong.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from fp4conv.errors import PlanError
from fp4conv.qat.backend import Recipe, open_backend
from fp4conv.qat.calibrating import observe
from fp4conv.qat.made import Task, write_model
from fp4conv.qat.placing import device_map, run_where_they_lie, without_hooks
from fp4conv.qat.quantizers import FakeQuantizer, attach
from fp4conv.qat.targets import all_targets

IDS = torch.arange(24)[None] % 19
TASK = Task(rules=4, prime=13, length=6, held_out=8)
RECIPES = [("gpt-oss", Recipe("mxfp4")), ("llama", Recipe("nvfp4", "NVFP4_DEFAULT_CFG"))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family, _ in RECIPES:
        write_model(root / family, TASK, family=family)
    return root


def loaded(folder: Path, *, hooked: bool) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if hooked:
        parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
        parts += [f"model.layers.{number}" for number in range(len(model.model.layers))]
        dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def hooks(model: torch.nn.Module) -> int:
    return sum(hasattr(module, "_hf_hook") for module in model.modules())


@pytest.fixture(params=["fp4conv", "modelopt"])
def backend_name(request: pytest.FixtureRequest) -> str:
    if request.param == "modelopt":
        request.getfixturevalue("kernels_on_cpu")
    name: str = request.param
    return name


@pytest.mark.parametrize(("family", "recipe"), RECIPES, ids=["gpt-oss", "llama-inputs"])
def test_quantisers_are_in_force_under_hooks(
    folders: Path, tmp_path: Path, backend_name: str, family: str, recipe: Recipe
) -> None:
    """Put on by prepare and by load, the logits are those of the model without hooks, bit for bit."""
    backend = open_backend(backend_name)
    found = []
    for hooked in (False, True):
        model = loaded(folders / family, hooked=hooked)
        dense = logits(model)
        backend.prepare(model, recipe)
        if backend.calibrates(recipe):
            backend.calibrate(model, [{"input_ids": IDS}])
        found.append(logits(model))
        assert not torch.equal(found[-1], dense)
        backend.save(model, tmp_path)
        again = loaded(folders / family, hooked=hooked)
        backend.load(again, tmp_path)
        assert torch.equal(logits(again), found[-1])
        assert bool(hooks(model)) == bool(hooks(again)) == hooked
        weights = dict(backend.weights(again))
        backend.set_weights(again, False)
        backend.set_inputs(again, False)
        assert torch.equal(logits(again), dense)
        assert backend.names(again) == list(weights)
    assert torch.equal(*found)


def test_calibration_sees_the_same_inputs_under_hooks(folders: Path) -> None:
    alone, hooked = (
        observe(loaded(folders / "llama", hooked=hooked), [{"input_ids": IDS}], kv=True) for hooked in (False, True)
    )
    assert alone == hooked


def test_a_module_whose_forward_is_wrapped_is_not_quantised_in_vain(folders: Path) -> None:
    model = loaded(folders / "llama", hooked=True)
    target = all_targets(model)[0]
    with pytest.raises(PlanError, match="would go past the fake quantisers"):
        attach(target, FakeQuantizer(target.name, "mxfp4"), None)
    with without_hooks(model):
        attach(target, FakeQuantizer(target.name, "mxfp4"), None)
    assert hooks(model)


@pytest.fixture(scope="module")
def empty() -> GptOssForCausalLM:
    """Four layers of 1,056,768 parameters in experts, and small change; on meta."""
    config = GptOssConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_local_experts=4, vocab_size=512,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    with torch.device("meta"):
        return GptOssForCausalLM(config)


def test_layers_lie_whole_and_in_order(empty: GptOssForCausalLM) -> None:
    layer = sum(p.numel() for p in empty.model.layers[0].parameters()) * 2
    places = device_map(empty, torch.bfloat16, {0: 5 * layer, 1: 5 * layer, 2: 5 * layer})
    of_layers = [places[f"model.layers.{number}"] for number in range(4)]
    assert of_layers == sorted(of_layers)
    for gpu in range(3):
        assert of_layers.count(gpu) <= 4  # one of five stays free
    assert set(places.values()) <= {0, 1, 2}
    named = {name for name, _ in empty.named_parameters()}
    assert all(any(name == part or name.startswith(f"{part}.") for part in places) for name in named)


def test_what_does_not_fit_is_an_error_and_lies_on_no_processor(empty: GptOssForCausalLM) -> None:
    layer = sum(p.numel() for p in empty.model.layers[0].parameters()) * 2
    with pytest.raises(PlanError, match=r"evaluation takes .* on each GPU; the GPUs have"):
        device_map(empty, torch.bfloat16, {0: 3 * layer, 1: 2 * layer})
    fits = {0: 5 * layer, 1: 4 * layer}
    assert set(device_map(empty, torch.bfloat16, fits).values()) == {0, 1}
    with pytest.raises(PlanError):
        device_map(empty, torch.float32, fits)


def test_kernels_are_launched_where_a_module_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device follows the modules, and is what it was when they are done, also when one fails."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    seen = []

    class Note(torch.nn.Module):  # type: ignore[misc]
        def forward(self, fails: bool) -> None:
            seen.append(current[-1])
            if fails:
                raise ValueError("as asked")

    model = torch.nn.ModuleList([Note(), Note()])
    run_where_they_lie(model, {"0": 1, "1": 2})
    for part in model:
        part(False)
    with pytest.raises(ValueError, match="as asked"):
        model[1](True)
    assert (seen, current[-1]) == ([1, 2, 2], 0)
