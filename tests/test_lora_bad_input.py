"""Adapters that do not fit: the error names the tensor and the reason, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from adapters import factors, write_adapter
from checkpoints import Array, noise, read_raw, tree, write_model
from click.testing import CliRunner

import fp4conv
from fp4conv.cli import main
from fp4conv.errors import Fp4convError, OutputError, PlanError, SourceError, UsageError, ValuesError

LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"


def base_tensors() -> dict[str, Array]:
    return {
        "lm_head.weight": noise((40, 64), 1),
        "model.embed_tokens.weight": noise((40, 64), 2),
        f"{Q}.weight": noise((32, 64), 3),
        f"{Q}.bias": noise((32,), 4),
        f"{LAYER}.self_attn.k_proj.weight": noise((64, 64), 5),
        f"{LAYER}.mlp.experts.gate_up_proj": noise((4, 64, 96), 6),
        f"{LAYER}.mlp.experts.down_proj": noise((4, 64, 64), 7),
        f"{LAYER}.self_attn.sinks": noise((8,), 8),
        f"{LAYER}.mlp.conv.weight": noise((8, 4, 3), 9),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", base_tensors())


def refused(tmp_path: Path, base: Path, adapter: Path, *, to: str = "bf16") -> Fp4convError:
    """The error of merging `adapter`; the folder is as it was."""
    before = tree(tmp_path)
    with pytest.raises(Fp4convError) as caught:
        fp4conv.convert(base, tmp_path / "out", to=to, lora=[adapter])
    assert tree(tmp_path) == before
    return caught.value


EXPERTS = f"{LAYER}.mlp.experts"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def packed(path: str, n: int, k: int, experts: int = 4, rank: int = 4) -> dict[str, Array]:
    return factors(path, n, k, rank=rank * experts)


CASES: dict[str, tuple[dict[str, Array], dict[str, object], str]] = {
    "a module that the base has not": (factors(f"{LAYER}.self_attn.w_proj", 32, 64), {}, "w_proj"),
    "in-features of another base": (factors(Q, 32, 48), {}, "do not fit"),
    "out-features of another base": (factors(Q, 48, 64), {}, "do not fit"),
    "a rank other than the config's": (factors(Q, 32, 64, rank=5), {}, "rank is 5, the config says 4"),
    "a pattern's rank": (factors(Q, 32, 64), {"rank_pattern": {"q_proj": 2}}, "rank is 4, the config says 2"),
    "half a pair": (
        {name: value for name, value in factors(Q, 32, 64).items() if "lora_A" in name},
        {},
        "lora_B is missing",
    ),
    "an empty factor": (
        factors(Q, 32, 64) | {f"{Q}.lora_A.weight": np.zeros((0,), np.float32)},
        {},
        "ZeRO-3 or FSDP",
    ),
    "integer factors": (factors(Q, 32, 64) | {f"{Q}.lora_A.weight": np.zeros((4, 64), np.int64)}, {}, "I64"),
    "a convolution": (factors(f"{LAYER}.mlp.conv", 8, 4), {}, "only matrices"),
    "a tensor of an unknown kind": ({f"{Q}.lora_C.weight": noise((4, 4))}, {}, "no tensor"),
    "a saved module of another size": ({"lm_head.weight": noise((48, 64))}, {}, "[48, 64], the base has [40, 64]"),
    "a saved module that the base ties": ({"other.lm_head.weight": noise((2, 64))}, {}, "ties it"),
    "a bias where the base has none": (
        factors(f"{LAYER}.self_attn.k_proj", 64, 64)
        | {f"{LAYER}.self_attn.k_proj.lora_B.bias": np.zeros(64, np.float32)},
        {"lora_bias": True},
        "has no bias in the base",
    ),
    "DoRA without magnitudes": (factors(Q, 32, 64), {"use_dora": True}, "without its lora_magnitude_vector"),
    "magnitudes without DoRA": (
        factors(Q, 32, 64) | {f"{Q}.lora_magnitude_vector": np.ones(32, np.float32)},
        {},
        "does not say use_dora",
    ),
    "magnitudes of another size": (
        factors(Q, 32, 64) | {f"{Q}.lora_magnitude_vector": np.ones(31, np.float32)},
        {"use_dora": True},
        "31 magnitudes for N = 32",
    ),
    "a rank that the experts do not divide": (
        factors(EXPERTS, 96, 64, rank=15),
        {"target_parameters": BOTH[:1]},
        "do not fit",
    ),
    "factors for two parameters, one named": (
        packed(EXPERTS, 64, 64) | packed(f"{EXPERTS}.base_layer", 96, 64),
        {"target_parameters": BOTH[:1]},
        "names 1 of the expert parameters",
    ),
    "expert factors that no parameter is named for": (packed(EXPERTS, 96, 64), {}, "names 0 of the expert parameters"),
    "an expert's rank other than the config's": (
        packed(EXPERTS, 96, 64, rank=2),
        {"target_parameters": BOTH[:1]},
        "rank is 2 (8 / 4 experts)",
    ),
    "a square expert parameter alone, from a release that may have turned it": (
        packed(EXPERTS, 64, 64),
        {"target_parameters": BOTH[1:]},
        "square",
    ),
    "DoRA on experts": (
        packed(EXPERTS, 96, 64) | {f"{EXPERTS}.lora_magnitude_vector": np.ones(4, np.float32)},
        {"target_parameters": BOTH[:1], "use_dora": True},
        "on an expert parameter",
    ),
    "the same tensor twice": (
        factors(Q, 32, 64) | {f"{Q}.lora_A.default.weight": np.zeros((4, 64), np.float32)},
        {},
        "the same by another name",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_would_be_lost_is_refused_by_name(
    tmp_path: Path, base: Path, case: tuple[dict[str, Array], dict[str, object], str]
) -> None:
    tensors, config, expected = case
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    error = refused(tmp_path, base, adapter)
    assert isinstance(error, PlanError)
    assert expected in str(error)
    assert error.where is not None
    assert any(f"base_model.model.{name}" in error.where for name in tensors), error.where
    assert str(adapter) in error.where
    assert error.hint


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base weights"),
        ({"r": 0}, "r is 0"),
        ({"r": "eight"}, "r is 'eight'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "'lora_alpha' is NaN"),
        ({"rank_pattern": [1]}, "rank_pattern is list"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern is -1"),
        ({"alpha_pattern": {"(": 4}}, "no regular expression"),
        ({"alpha_pattern": {"(a+)+b": 4}}, "take forever"),
        ({"rank_pattern": {"(q|q)" * 40: 4}}, "take forever"),
        ({"rank_pattern": {"q" * 2_000: 4}}, "2,010 characters"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"r": 10**400}, "expected a whole number"),
        ({"target_parameters": "experts"}, "target_parameters is 'experts'"),
    ],
)
def test_configs_of_what_is_not_merged_here_are_refused(
    tmp_path: Path, base: Path, config: dict[str, object], expected: str
) -> None:
    error = refused(tmp_path, base, write_adapter(tmp_path / "adapter", factors(Q, 32, 64), **config))
    assert expected in error.what
    assert "adapter_config.json" in str(error.where)


def test_a_folder_that_is_not_there_is_not_asked_for_a_model(tmp_path: Path, base: Path) -> None:
    error = refused(tmp_path, base, tmp_path / "no" / "such" / "adapter")
    assert error.where == str(tmp_path / "no" / "such" / "adapter")
    assert "the folder that has adapter_config.json and adapter_model.safetensors" in str(error.hint)


def test_a_folder_that_is_no_adapter(tmp_path: Path, base: Path) -> None:
    assert "has no adapter_model.safetensors" in refused(tmp_path, base, base).what
    adapter = write_adapter(tmp_path / "adapter", factors(Q, 32, 64))
    (adapter / "adapter_config.json").unlink()
    assert "has no adapter_config.json" in refused(tmp_path, base, adapter).what
    (adapter / "adapter_config.json").write_text("[1]")
    assert isinstance(refused(tmp_path, base, adapter), SourceError)
    (tmp_path / "empty").mkdir()
    assert isinstance(refused(tmp_path, base, tmp_path / "empty"), SourceError)
    assert isinstance(refused(tmp_path, base, tmp_path / "nowhere"), SourceError)
    assert "no tensors" in refused(tmp_path, base, write_adapter(tmp_path / "none", {})).what


def test_a_truncated_adapter(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(Q, 32, 64))
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    error = refused(tmp_path, base, adapter)
    assert isinstance(error, SourceError)
    assert "adapter_model.safetensors" in str(error)


def test_the_destination_is_not_the_adapter(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(Q, 32, 64))
    before = tree(tmp_path)
    for destination in (adapter, adapter / "out", tmp_path):
        with pytest.raises(OutputError):
            fp4conv.convert(base, destination, to="bf16", lora=[adapter], overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("to", ["bf16", "mxfp4", "nvfp4"])
def test_a_merged_value_that_is_not_finite_is_an_error_with_its_place(
    tmp_path: Path, base: Path, bad: float, to: str
) -> None:
    tensors = factors(Q, 32, 64)
    tensors[f"{Q}.lora_A.weight"][:, 5] = bad
    tensors[f"{Q}.lora_B.weight"][:] = 0
    tensors[f"{Q}.lora_B.weight"][7] = 4
    adapter = write_adapter(tmp_path / "adapter", tensors)
    base = write_model(tmp_path / "dense", {f"{Q}.weight": noise((32, 64)), "model.norm.weight": noise((64,))})
    with pytest.raises(ValuesError) as caught:
        fp4conv.convert(base, tmp_path / "out", to=to, lora=[adapter])
    assert caught.value.where == f"{Q}.weight"
    assert "[7, 5]" in caught.value.what or not np.isfinite(bad)
    assert not (tmp_path / "out").exists()


def test_dora_on_a_row_of_zeros_is_an_error(tmp_path: Path) -> None:
    weight = noise((32, 64))
    weight[3] = 0
    tensors: dict[str, Array] = {**factors(Q, 32, 64), f"{Q}.lora_magnitude_vector": np.ones(32, np.float32)}
    tensors[f"{Q}.lora_B.weight"][3] = 0
    adapter = write_adapter(tmp_path / "adapter", tensors, use_dora=True)
    base = write_model(tmp_path / "base", {f"{Q}.weight": weight})
    with pytest.raises(ValuesError, match=r"\[3, 0\]"):
        fp4conv.convert(base, tmp_path / "out", to="bf16", lora=[adapter])


def test_a_matrix_that_an_adapter_says_is_turned_is_not_quantised(tmp_path: Path) -> None:
    weight = f"{LAYER}.attn.c_attn"
    base = write_model(tmp_path / "base", {f"{weight}.weight": noise((64, 32))})
    adapter = write_adapter(tmp_path / "adapter", factors(weight, 32, 64), fan_in_fan_out=True)
    assert "fan_in_fan_out" in refused(tmp_path, base, adapter, to="mxfp4").what
    fp4conv.merge_lora(base, adapter, tmp_path / "dense")


def test_merge_rounding_needs_an_adapter(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UsageError, match="no --lora"):
        fp4conv.convert(base, tmp_path / "out", to="bf16", merge_rounding="peft")
    adapter = write_adapter(tmp_path / "adapter", factors(Q, 32, 64))
    with pytest.raises(UsageError, match="none of once, peft, training"):
        fp4conv.convert(base, tmp_path / "out", to="bf16", lora=[adapter], merge_rounding="twice")


# ---- what is not lost


def test_names_of_other_roots_are_found(tmp_path: Path, base: Path) -> None:
    """An adapter of a class without a head says layers.0...; the base says model.layers.0..."""
    inner = Q.removeprefix("model.")
    result = fp4conv.merge_lora(base, write_adapter(tmp_path / "adapter", factors(inner, 32, 64)), tmp_path / "out")
    assert list(result.merged) == [f"{Q}.weight"]


@pytest.mark.parametrize("version", [None, "0.18.1"])
def test_a_square_expert_parameter_of_an_older_peft_lies_as_stored(
    tmp_path: Path, base: Path, version: str | None
) -> None:
    """Before 0.19 lora_A lay along axis 1 whatever the model; here the base is [E, N, K], so that is N."""
    tensors = packed(EXPERTS, 64, 64)
    adapter = write_adapter(tmp_path / "adapter", tensors, target_parameters=BOTH[1:], peft_version=version)
    fp4conv.convert(base, tmp_path / "out", to="f32", lora=[adapter])
    a = np.asarray(tensors[f"{EXPERTS}.lora_A.weight"], np.float64).reshape(4, 4, 64)
    b = np.asarray(tensors[f"{EXPERTS}.lora_B.weight"], np.float64).reshape(64, 4, 4)
    delta = 2 * np.einsum("ore,eri->eio", b, a)
    name = f"{EXPERTS}.down_proj"
    found = np.frombuffer(read_raw(tmp_path / "out")[name][2], np.float32).reshape(4, 64, 64)
    assert np.allclose(found, np.asarray(base_tensors()[name], np.float64) + delta, atol=1e-6)


def test_a_square_expert_parameter_lies_as_the_other(tmp_path: Path, base: Path) -> None:
    """gate_up_proj is [E, N, K] = [4, 64, 96] to this base: lora_A [., 64] lies along N, so down_proj's does."""
    tensors = packed(EXPERTS, 64, 64) | packed(f"{EXPERTS}.base_layer", 96, 64)
    adapter = write_adapter(tmp_path / "adapter", tensors, target_parameters=BOTH)
    fp4conv.convert(base, tmp_path / "out", to="f32", lora=[adapter])
    a = np.asarray(tensors[f"{EXPERTS}.lora_A.weight"], np.float64).reshape(4, 4, 64)
    b = np.asarray(tensors[f"{EXPERTS}.lora_B.weight"], np.float64).reshape(64, 4, 4)
    name = f"{EXPERTS}.down_proj"
    found = np.frombuffer(read_raw(tmp_path / "out")[name][2], np.float32).reshape(4, 64, 64)
    expected = np.asarray(base_tensors()[name], np.float64) + 2 * np.einsum("ore,eri->eio", b, a)
    assert np.allclose(found, expected, atol=1e-6)


def test_a_saved_module_of_another_dtype_is_rounded_to_the_bases(tmp_path: Path, base: Path) -> None:
    head = np.asarray(noise((40, 64)), np.float32) * 1.0001
    adapter = write_adapter(tmp_path / "adapter", {"lm_head.weight": head}, modules_to_save=["lm_head"])
    result = fp4conv.merge_lora(base, adapter, tmp_path / "out")
    assert result.merged == {"lm_head.weight": None}
    assert read_raw(tmp_path / "out")["lm_head.weight"] == (
        "BF16",
        (40, 64),
        head.astype(ml_dtypes.bfloat16).tobytes(),
    )


def test_a_tied_head_is_worth_a_word(tmp_path: Path) -> None:
    tensors = {name: value for name, value in base_tensors().items() if name != "lm_head.weight"}
    base = write_model(tmp_path / "base", tensors, {"model_type": "test", "tie_word_embeddings": True})
    adapter = write_adapter(tmp_path / "adapter", {"model.embed_tokens.weight": noise((40, 64), 11)})
    result = fp4conv.merge_lora(base, adapter, tmp_path / "out")
    assert any("tied to the output head" in warning for warning in result.warnings)


def test_another_adapter_is_another_command(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stopped goes on with its own adapter only."""
    import fp4conv.commands.convert as command

    adapters = [write_adapter(tmp_path / name, factors(Q, 32, 64, seed=seed)) for seed, name in enumerate("ab")]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "write_files", stop)
        with pytest.raises(KeyboardInterrupt):
            fp4conv.merge_lora(base, adapters[0], tmp_path / "out")
    with pytest.raises(Fp4convError, match="another"):
        fp4conv.merge_lora(base, adapters[1], tmp_path / "out")
    resumed = fp4conv.merge_lora(base, adapters[0], tmp_path / "out")
    whole = fp4conv.merge_lora(base, adapters[0], tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert resumed.merged == whole.merged


# ---- the command


def run(*arguments: str | Path) -> dict[str, object]:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    parsed = json.loads(result.stdout)
    assert isinstance(parsed, dict)
    return parsed


def test_merge_lora_is_convert_with_lora(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(Q, 32, 64))
    merged = run("merge-lora", base, adapter, tmp_path / "merged")
    converted = run("convert", base, tmp_path / "converted", "--to", "bf16", "--lora", adapter)
    assert tree(tmp_path / "merged") == tree(tmp_path / "converted")
    assert merged["tensors"] == {"converted": 1, "copied": 8, "merged": 1}
    assert merged["merged"] == converted["merged"]
    assert merged["format"] == "bf16"
    plan = run("merge-lora", base, adapter, tmp_path / "dry", "--dry-run")
    assert plan["tensors"] == merged["tensors"]
    assert not (tmp_path / "dry").exists()


def test_merge_lora_takes_options_of_convert(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {f"{LAYER}.mlp.up_proj.weight": noise((32, 64))})
    adapter = write_adapter(tmp_path / "adapter", factors(f"{LAYER}.mlp.up_proj", 32, 64))
    done = run("merge-lora", base, adapter, tmp_path / "out", "--to", "mxfp4", "--scale-rule", "rceil")
    assert done["format"] == "mxfp4"
    view = CliRunner().invoke(main, ["merge-lora", str(base), str(adapter), str(tmp_path / "seen")])
    assert "1 tensors with adapters" in view.output
    assert f"{LAYER}.mlp.up_proj.weight" in view.output
