"""`--backend modelopt` in training: under adapters, with recomputed layers, stopped and gone on.

As in test_qat_backends, ModelOpt's kernel is replaced by fp4conv's arithmetic, all else is ModelOpt's own. So its
forward pass must be that of the own backend, bit for bit; that one's goldens are in test_qat_run and test_qat_adapters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("modelopt.torch.quantization")

import torch
from click.testing import CliRunner
from test_qat_backends import BATCHES, IDS, load
from test_qat_backends import logits as logits_of
from test_qat_run import Stop, command, make, weights

from fp4conv.cli import main
from fp4conv.qat import steps, train
from fp4conv.qat.adapters import with_adapters
from fp4conv.qat.backend import Recipe, open_backend
from fp4conv.qat.settings import Settings, settings_from

Reference = Callable[[str], Path]

pytestmark = [
    pytest.mark.usefixtures("kernels_on_cpu", "one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


# ---- adapters


def adapted(kind: str, source: Path, recipe: Recipe, **settings: object) -> torch.nn.Module:
    """The model in `source`, calibrated, with adapters that are not zero, as training has it."""
    backend, model = open_backend(kind), load(source)
    backend.prepare(model, recipe)
    if backend.calibrates(recipe):
        backend.calibrate(model, BATCHES)
    quantized = [name for name, _ in backend.weights(model)]
    found = with_adapters(model, settings_from({"lora": True, "lora_rank": 2, **settings}), quantized)
    backend.see_adapters(found)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
    return found.eval()


def outcome(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of each factor."""
    model.zero_grad()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("name", "recipe", "settings"),
    [
        ("gptoss-bf16", Recipe("mxfp4"), {}),
        ("gptoss-bf16", Recipe("nvfp4", "NVFP4_DEFAULT_CFG"), {"lora_layers": [0]}),
        ("llama-bf16", Recipe("nvfp4", "NVFP4_DEFAULT_CFG"), {"lora_modules": ["q_proj", "down_proj"]}),
        ("qwen3moe-bf16", Recipe("mxfp4", "MXFP4_DEFAULT_CFG"), {}),
    ],
    ids=str,
)
def test_the_sum_of_a_weight_and_its_adapters_is_quantised(
    reference: Reference, name: str, recipe: Recipe, settings: dict[str, object]
) -> None:
    own, theirs = (adapted(kind, reference(name), recipe, **settings) for kind in ("fp4conv", "modelopt"))
    (logits, grads), (found, found_grads) = outcome(own), outcome(theirs)
    assert torch.equal(found, logits)
    assert found_grads.keys() == grads.keys() == {name for name, p in own.named_parameters() if p.requires_grad}
    for factor, grad in grads.items():  # gpt-oss's experts lie transposed here: sums run in another order
        assert torch.allclose(found_grads[factor], grad, rtol=2**-6, atol=2**-10 * float(grad.abs().max())), factor
    assert torch.equal(outcome(theirs)[0], logits), "peft takes the weights out and puts them back at each call"
    with own.disable_adapter(), theirs.disable_adapter():
        base = logits_of(theirs)
        assert torch.equal(base, logits_of(own))
    assert not torch.equal(base, logits)


# ---- recomputed layers


def quantised(root: Path, family: str, **settings: object) -> tuple[Settings, steps.Places]:
    """A model of `family` with its quantisers in `root`, ready to be trained."""
    make(root, family)
    places = steps.Places(root / "out")
    values = {"dataset": str(root / "data"), "backend": "modelopt", "qat_max_steps": 3, "batch_size": 8, **settings}
    made = settings_from({"model": str(root / "model"), "dtype": "bfloat16", "qat_learning_rate": 1e-3, **values})
    steps.calibrate(root / "model", places, made)
    return made, places


TORCHS_OWN = (torch.nn.functional.linear, torch.bmm, torch.Tensor.__matmul__)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt-oss", {"format": "nvfp4", "quant_cfg": "NVFP4_DEFAULT_CFG"}),
        pytest.param("qwen3-moe", {"format": "mxfp4", "lora": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recomputed_layers_train_as_kept_ones(tmp_path: Path, family: str, settings: dict[str, object]) -> None:
    made, places = quantised(tmp_path, family, **settings)
    saved = {}
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        own = settings_from({**made.values(), "gradient_checkpointing": checkpointing})
        train.train(train.Job("qat", str(tmp_path / "model"), str(out), str(places.quantizers)), own)
        saved[checkpointing] = weights(out / "saved")
        assert (torch.nn.functional.linear, torch.bmm, torch.Tensor.__matmul__) == TORCHS_OWN
    assert saved[True] == saved[False] != {}


def test_an_error_among_the_experts_leaves_torchs_functions_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, places = quantised(tmp_path, "qwen3-moe", format="mxfp4", gradient_checkpointing=False)
    seen: list[object] = []

    def full(x: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append(torch.nn.functional.linear)
        if seen[-1] is not TORCHS_OWN[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    job = train.Job("qat", str(tmp_path / "model"), str(tmp_path / "qat"), str(places.quantizers))
    monkeypatch.setattr("modelopt_cpu.fake_quantise", full)
    with pytest.raises(torch.OutOfMemoryError):
        train.train(job, made)
    assert seen[-1] is not TORCHS_OWN[0]
    assert (torch.nn.functional.linear, torch.bmm, torch.Tensor.__matmul__) == TORCHS_OWN


# ---- the whole of it


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt-oss", "qwen3-moe"])
def test_stopped_in_training_adapters_it_goes_on_and_ends_as_without_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    made, places = quantised(tmp_path, family, format="mxfp4", lora=True, save_steps=1)
    undisturbed, stopped = (
        train.Job("qat", str(tmp_path / "model"), str(tmp_path / name), str(places.quantizers))
        for name in ("undisturbed", "stopped")
    )
    train.train(undisturbed, made)
    with monkeypatch.context() as stopping:
        stopping.setattr(train, "progress", lambda _: Stop(2))
        with pytest.raises(KeyboardInterrupt):
            train.train(stopped, made)
    assert (tmp_path / "stopped" / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors").is_file()
    train.train(stopped, made)
    assert weights(tmp_path / "stopped" / "saved") == weights(tmp_path / "undisturbed" / "saved") != {}
    assert not list((tmp_path / "stopped" / "saved").glob("*.pth")), "fp4conv's own files say it all"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt-oss", {"format": "mxfp4"}),
        ("gpt-oss", {"format": "nvfp4", "quant_cfg": "NVFP4_DEFAULT_CFG"}),
        ("llama", {"format": "nvfp4", "quant_cfg": "NVFP4_DEFAULT_CFG"}),
        ("llama", {"format": "mxfp4", "lora_layers": 1}),
        ("qwen3-moe", {"format": "mxfp4", "quant_cfg": "MXFP4_DEFAULT_CFG", "lora_modules": "none"}),
        ("qwen3-moe", {"format": "nvfp4", "quant_cfg": "NVFP4_DEFAULT_CFG", "lora": False}),
    ],
    ids=str,
)
def test_the_whole_command_trains_as_with_the_own_backend(
    tmp_path: Path, family: str, settings: dict[str, object]
) -> None:
    make(tmp_path, family)
    common = {"lora": True, "gradient_checkpointing": True, "dtype": "bfloat16", **settings}
    curves = {}
    for kind in ("fp4conv", "modelopt"):
        words = command(tmp_path, backend=kind, output=tmp_path / kind, **common)
        result = CliRunner().invoke(main, [*words, "--json"])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        rows = {row["name"]: row for row in report["rows"]}
        assert rows["sft + qat"]["loss"] == rows["exported"]["loss"]
        assert report["export"]["largest"] == 0
        curves[kind] = [loss for _, loss in report["training"]["qat"]["curve"]]
    assert curves["modelopt"] == pytest.approx(curves["fp4conv"], rel=2e-3)
    assert curves["modelopt"][0] == curves["fp4conv"][0], "the same forward pass"
