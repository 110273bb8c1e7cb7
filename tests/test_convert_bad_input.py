"""Bad input: each refusal names the file or tensor, says what to do, exits 1, and leaves nothing behind.

What only the values can tell is found while running: then DST.partial stays, and the message gives the command that
goes on.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from checkpoints import (
    INDEX,
    Array,
    array_of,
    bf16,
    config_of,
    decode_nvfp4,
    e4m3,
    noise,
    read_raw,
    tree,
    write_model,
    write_shard,
)
from click.testing import CliRunner

import fp4conv
from fp4conv.cli import main
from fp4conv.errors import ResumeError, ValuesError
from fp4conv.formats import ScaleRule
from fp4conv.staging import JOURNAL_NAME

Reference = Callable[[str], Path]
Tensors = dict[str, Array]
ROOT = Path(__file__).resolve().parent.parent
LAYER = "model.layers.0"
DOWN = f"{LAYER}.mlp.down_proj"
EXPERTS = f"{LAYER}.mlp.experts.down_proj"


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


def run(*arguments: str | Path) -> Run:
    words = [str(argument) for argument in arguments]
    with patch.object(sys, "argv", ["fp4conv", *words]):
        result = CliRunner().invoke(main, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Run(result.exit_code, result.stdout, result.stderr)


def refused(source: Path, *options: str | Path, to: str, says: tuple[str, ...], code: int = 1) -> str:
    """Convert `source`, which must fail with `code`, say all of `says`, and leave every file as it was."""
    parent = source.parent
    before = tree(parent)
    result = run("convert", source, parent / "dst", "--to", to, *options)
    assert result.code == code, result.err
    assert result.out == ""
    message = result.err.replace("\n", " ")
    assert "error: " in message.lower()
    for words in says:
        assert words in message, result.err
    assert tree(parent) == before, "something was left behind"
    return message


def dense(k: int = 64) -> Tensors:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    tensors = {f"{LAYER}.{name}.weight": noise((32, k), seed) for seed, name in enumerate(names)}
    tensors[f"{DOWN}.weight"] = noise((64, 32), 9)
    tensors["model.embed_tokens.weight"] = noise((16, 64), 10)
    tensors["model.norm.weight"] = bf16(np.ones(64))
    return tensors


def nvfp4(tensor_scale: float = 0.25) -> Tensors:
    packed = np.random.default_rng(0).integers(0, 256, (8, 32), dtype=np.uint8)
    return {
        f"{DOWN}.weight": packed,
        f"{DOWN}.weight_scale": e4m3(np.full((8, 4), 1.5)),
        f"{DOWN}.weight_scale_2": np.full((), tensor_scale, np.float32),
        "model.norm.weight": bf16(np.ones(64)),
    }


def nvfp4_experts() -> Tensors:
    """As ModelOpt lays gpt-oss out: [E, K/2, N], K-major."""
    return {
        EXPERTS: np.random.default_rng(0).integers(0, 256, (2, 32, 8), dtype=np.uint8),
        f"{EXPERTS}_weight_scale": e4m3(np.ones((2, 4, 8))),
        f"{EXPERTS}_weight_scale_2": np.full((), 0.5, np.float32),
        f"{LAYER}.self_attn.sinks": noise((4,)),
    }


def mxfp4() -> Tensors:
    """As gpt-oss is published: [E, N, K/32, 16]."""
    return {
        f"{EXPERTS}_blocks": np.random.default_rng(0).integers(0, 256, (2, 8, 2, 16), dtype=np.uint8),
        f"{EXPERTS}_scales": np.full((2, 8, 2), 120, np.uint8),
        f"{LAYER}.self_attn.sinks": noise((4,)),
    }


def changed(tensors: Tensors, changes: Mapping[str, Array | None]) -> Tensors:
    """`tensors` with some replaced, or (None) left out."""
    merged = {**tensors, **changes}
    return {name: value for name, value in merged.items() if value is not None}


# ---- files


def test_truncated_shard(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", dense())
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-10])
    refused(source, to="nvfp4", says=("model.safetensors", "ownload"))


def sharded(tmp_path: Path) -> tuple[Path, dict[str, object]]:
    tensors = dense()
    names = list(tensors)
    source = write_model(tmp_path / "src", tensors, shards=(names[:4], names[4:]))
    index = json.loads((source / INDEX).read_text())
    return source, index


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    source, _ = sharded(tmp_path)
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, to="nvfp4", says=(INDEX, "model-00002-of-00002.safetensors", "ownload"))


def test_index_names_a_missing_tensor(tmp_path: Path) -> None:
    source, index = sharded(tmp_path)
    weight_map = index["weight_map"]
    assert isinstance(weight_map, dict)
    weight_map["model.layers.7.lost.weight"] = "model-00001-of-00002.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    refused(source, to="nvfp4", says=("model.layers.7.lost.weight", "model-00001-of-00002.safetensors"))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/x.safetensors", "a/../../x.safetensors"])
def test_index_that_leads_out_of_the_folder(tmp_path: Path, shard: str) -> None:
    source, index = sharded(tmp_path)
    write_shard(tmp_path / "secret.safetensors", {"x": noise((4,))})
    weight_map = index["weight_map"]
    assert isinstance(weight_map, dict)
    weight_map["x"] = shard
    (source / INDEX).write_text(json.dumps(index))
    refused(source, to="nvfp4", says=(INDEX, shard))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe\x00", b""])
def test_unreadable_config(tmp_path: Path, content: bytes) -> None:
    source = write_model(tmp_path / "src", dense())
    (source / "config.json").write_bytes(content)
    refused(source, to="nvfp4", says=("config.json",))


def test_no_config_at_all(tmp_path: Path) -> None:
    """Nobody can load the result without one, but the values need none: the result has the config that it needs."""
    source = write_model(tmp_path / "src", dense())
    (source / "config.json").unlink()
    result = run("convert", source, tmp_path / "dst", "--to", "nvfp4", "--json")
    assert result.code == 0
    assert any("config.json" in warning for warning in json.loads(result.out)["warnings"])


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, to="nvfp4", says=(str(empty),))
    refused(tmp_path / "nowhere", to="nvfp4", says=(str(tmp_path / "nowhere"),))
    file = write_model(tmp_path / "model", dense()) / "model.safetensors"
    refused(file, to="nvfp4", says=(str(file), str(file.parent)))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused(pickled, to="nvfp4", says=("pytorch_model.bin",))


def test_adapter_folder(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "adapter_config.json").write_text("{}")
    write_shard(source / "adapter_model.safetensors", {"base_model.model.x.lora_A.weight": noise((4, 8))})
    refused(source, to="nvfp4", says=("adapter", "merge-lora"))


FOREIGN: dict[str, tuple[Tensors, dict[str, object], str]] = {
    "gptq": (
        {
            f"{DOWN}.qweight": np.zeros((8, 8), np.uint8),
            f"{DOWN}.scales": noise((1, 8)),
            f"{DOWN}.g_idx": np.zeros(8, np.int64),
        },
        {"quant_method": "gptq", "bits": 4},
        f"{DOWN}.qweight",
    ),
    "fp8 of compressed-tensors": (
        {f"{DOWN}.weight": e4m3(np.ones((8, 8))), f"{DOWN}.weight_scale": bf16(np.ones((8, 1)))},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        f"{DOWN}.weight_scale",
    ),
    "int4 of compressed-tensors": (
        {f"{DOWN}.weight_packed": np.zeros((8, 8), np.int64), f"{DOWN}.weight_scale": bf16(np.ones((8, 1)))},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        f"{DOWN}.weight_packed",
    ),
    "bitsandbytes": (
        {f"{DOWN}.weight": np.zeros((32, 1), np.uint8), f"{DOWN}.weight.absmax": np.ones(1, np.float32)},
        {"quant_method": "bitsandbytes"},
        DOWN,
    ),
    "int8 of bitsandbytes": (
        {f"{DOWN}.SCB": np.ones(8, np.float32), f"{DOWN}.weight": np.zeros((8, 8), np.int8)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        DOWN,
    ),
    "HQQ": ({f"{DOWN}.W_q": np.zeros((8, 8), np.uint8)}, {"quant_method": "hqq"}, f"{DOWN}.W_q"),
    "integers of a kind unknown (MLX)": (
        {f"{DOWN}.weight": np.zeros((8, 4), np.int64), f"{DOWN}.scales": noise((8, 1))},
        {"group_size": 32, "bits": 4},
        f"{DOWN}.weight",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("to", ["bf16", "mxfp4", "nvfp4"])
def test_other_quantisations_are_named(tmp_path: Path, kind: str, to: str) -> None:
    tensors, quantization, where = FOREIGN[kind]
    tensors = {**tensors, "model.norm.weight": bf16(np.ones(8))}
    source = write_model(tmp_path / "src", tensors, {"quantization_config": quantization})
    refused(source, to=to, says=(where, "model.safetensors"))


# ---- tensors that do not fit together

BROKEN: dict[str, tuple[Tensors, str]] = {
    "MXFP4 blocks without scales": (changed(mxfp4(), {f"{EXPERTS}_scales": None}), f"{EXPERTS}_blocks"),
    "MXFP4 scales without blocks": (changed(mxfp4(), {f"{EXPERTS}_blocks": None}), f"{EXPERTS}_blocks"),
    "MXFP4 blocks in BF16": (changed(mxfp4(), {f"{EXPERTS}_blocks": noise((2, 8, 2, 16))}), f"{EXPERTS}_blocks"),
    "MXFP4 scales in F32": (changed(mxfp4(), {f"{EXPERTS}_scales": np.ones((2, 8, 2), np.float32)}), EXPERTS),
    "MXFP4 scales of another shape": (
        changed(mxfp4(), {f"{EXPERTS}_scales": np.ones((2, 8, 3), np.uint8)}),
        f"{EXPERTS}_blocks",
    ),
    "MXFP4 blocks of 64": (
        changed(
            mxfp4(),
            {f"{EXPERTS}_blocks": np.ones((2, 8, 1, 32), np.uint8), f"{EXPERTS}_scales": np.ones((2, 8, 1), np.uint8)},
        ),
        f"{EXPERTS}_blocks",
    ),
    "NVFP4 codes without block scales": (changed(nvfp4(), {f"{DOWN}.weight_scale": None}), DOWN),
    "NVFP4 codes without any scales": (
        changed(nvfp4(), {f"{DOWN}.weight_scale": None, f"{DOWN}.weight_scale_2": None}),
        f"{DOWN}.weight",
    ),
    "NVFP4 block scales without a tensor scale": (
        changed(nvfp4(), {f"{DOWN}.weight_scale_2": None}),
        f"{DOWN}.weight_scale_2",
    ),
    "NVFP4 scales without codes": (changed(nvfp4(), {f"{DOWN}.weight": None}), f"{DOWN}.weight"),
    "NVFP4 scales of a BF16 weight": (changed(nvfp4(), {f"{DOWN}.weight": noise((8, 64))}), f"{DOWN}.weight"),
    "NVFP4 tensor scale alone": (
        changed(nvfp4(), {f"{DOWN}.weight": noise((8, 64)), f"{DOWN}.weight_scale": None}),
        f"{DOWN}.weight_scale_2",
    ),
    "NVFP4 block scales in BF16": (changed(nvfp4(), {f"{DOWN}.weight_scale": bf16(np.ones((8, 4)))}), DOWN),
    "NVFP4 block scales as bytes": (changed(nvfp4(), {f"{DOWN}.weight_scale": np.ones((8, 4), np.uint8)}), DOWN),
    "NVFP4 tensor scale in BF16": (
        changed(nvfp4(), {f"{DOWN}.weight_scale_2": bf16(np.ones(()))}),
        f"{DOWN}.weight_scale_2",
    ),
    "NVFP4 a tensor scale a row": (
        changed(nvfp4(), {f"{DOWN}.weight_scale_2": np.ones((8, 1), np.float32)}),
        f"{DOWN}.weight_scale_2",
    ),
    "NVFP4 blocks of 8": (changed(nvfp4(), {f"{DOWN}.weight_scale": e4m3(np.ones((8, 8)))}), f"{DOWN}.weight"),
    "NVFP4 expert codes without block scales": (changed(nvfp4_experts(), {f"{EXPERTS}_weight_scale": None}), EXPERTS),
    "NVFP4 expert scales without codes": (changed(nvfp4_experts(), {EXPERTS: None}), EXPERTS),
    "NVFP4 experts turned": (
        changed(nvfp4_experts(), {EXPERTS: np.zeros((2, 8, 32), np.uint8)}),
        EXPERTS,
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("to", ["bf16", "mxfp4", "nvfp4"])
def test_parts_that_do_not_fit_together(tmp_path: Path, kind: str, to: str) -> None:
    tensors, where = BROKEN[kind]
    source = write_model(tmp_path / "src", tensors, {"model_type": "gpt_oss"})
    refused(source, to=to, says=(where,))


@pytest.mark.parametrize(("to", "k"), [("nvfp4", 40), ("mxfp4", 48), ("nvfp4", 8)])
def test_k_that_is_no_multiple_of_the_block(tmp_path: Path, to: str, k: int) -> None:
    source = write_model(tmp_path / "src", changed(dense(), {f"{DOWN}.weight": noise((8, k))}))
    refused(source, to=to, says=(f"{DOWN}.weight", f"K = {k}", f"--exclude '{DOWN}'"))


def test_k_of_experts_is_their_first_axis(tmp_path: Path) -> None:
    tensors = {EXPERTS: noise((2, 48, 64)), f"{LAYER}.self_attn.sinks": noise((4,))}
    source = write_model(tmp_path / "src", tensors)
    refused(source, to="mxfp4", says=(EXPERTS, "K = 48"))


# ---- requests that this model cannot meet


def test_gpt_oss_mxfp4_holds_experts_only(reference: Reference, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(reference("gptoss-bf16"), source)
    for options in (("--modules", "all"), ("--include", "*q_proj", "--include", "*k_proj", "--include", "*v_proj")):
        refused(source, *options, to="mxfp4", says=("_proj.weight", "experts"))
    refused(source, "--layout", "compressed-tensors", to="mxfp4", says=("experts", "--layout openai"))


def test_layouts_that_cannot_hold_the_format(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", dense())
    for layout, to in (("hf", "nvfp4"), ("modelopt", "mxfp4"), ("openai", "nvfp4"), ("modelopt", "bf16")):
        refused(source, "--layout", layout, to=to, says=(layout, to, "--layout"), code=2)
    refused(source, "--layout", "openai", to="mxfp4", says=("gpt-oss", "--layout compressed-tensors"))


@pytest.mark.parametrize(
    ("excluded", "stays"),
    [("*.k_proj", "k_proj"), ("*.up_proj", "up_proj"), ("*layers.0.self_attn.[qk]_proj", "q_proj")],
)
def test_sets_in_part(tmp_path: Path, excluded: str, stays: str) -> None:
    source = write_model(tmp_path / "src", dense())
    refused(source, "--exclude", excluded, to="nvfp4", says=(stays, "all or none", "--exclude"))


def test_nothing_to_quantise(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", {"model.embed_tokens.weight": noise((32, 64))})
    refused(source, to="nvfp4", says=(str(source), "--include"))
    refused(write_model(tmp_path / "dense", dense()), "--modules", "experts", to="nvfp4", says=("--include",))


def test_servers_that_would_not_load_it(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", dense())
    refused(source, "--for", "transformers", to="nvfp4", says=("transformers", "not load"))


def test_usage_errors_exit_2(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", dense())
    dst = tmp_path / "dst"
    before = tree(tmp_path)
    for options in (
        ("--to", "fp8"),
        ("--to", "nvfp4", "--layout", "pretty"),
        ("--to", "nvfp4", "--modules", "some"),
        ("--to", "nvfp4", "--scale-rule", "best"),
        ("--to", "nvfp4", "--scale-rule", "rceil"),
        ("--to", "mxfp4", "--scale-rule", "amax"),
        ("--to", "bf16", "--scale-rule", "mse"),
        ("--to", "bf16", "--ties", "down"),
        ("--to", "f32", "--ties", "even"),
        ("--to", "bf16", "--modules", "all"),
        ("--to", "nvfp4", "--ties", "up"),
        ("--to", "nvfp4", "--input-scales", "guess"),
        ("--to", "nvfp4", "--max-shard-size", "big"),
        ("--to", "nvfp4", "--max-shard-size", "0"),
        ("--to", "nvfp4", "--max-memory", "-1GB"),
        ("--to", "nvfp4", "--max-memory", "1 fortnight"),
        ("--to", "nvfp4", "--workers", "0"),
        ("--to", "nvfp4", "--workers", "many"),
        ("--to", "nvfp4", "--for", "ollama"),
        ("--to", "nvfp4", "--include", "*.nothing*"),
        ("--to", "nvfp4", "--exclude", "model.norm.weight.x"),
        ("--to", "nvfp4", "--colour"),
        (),
    ):
        result = run("convert", source, dst, *options)
        assert result.code == 2, (options, result.err)
        assert result.err.strip()
        assert result.out == ""
    assert run("convert", source, "--to", "bf16").code == 2
    assert run("transmute").code == 2
    assert tree(tmp_path) == before


# ---- the destination


def test_destination_inside_the_source_and_the_like(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", dense())
    before = tree(tmp_path)
    (tmp_path / "link").symlink_to(source)
    for destination in (source / "dst", source / "deep" / "dst", source, tmp_path, tmp_path / "link" / "dst"):
        result = run("convert", source, destination, "--to", "nvfp4")
        assert result.code == 1, destination
        assert "source" in result.err
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before


def test_destination_that_exists(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", dense())
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious").write_text("old")
    refused(source, to="nvfp4", says=("dst", "--overwrite"))


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    source = write_model(tmp_path / "src", dense())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1_000_000, 995_000, 5_000))
    refused(source, to="nvfp4", says=("disk is too small", "dst"))


def test_file_size_limit_met_while_running(tmp_path: Path) -> None:
    """What the disk check cannot foresee: an error that names the file, no traceback, and the source is whole."""
    source = write_model(tmp_path / "src", {f"{DOWN}.weight": noise((1024, 512))})
    before = tree(source)
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from fp4conv.cli import main; main()"
    )
    words = [sys.executable, "-c", limited, "convert", str(source), str(tmp_path / "dst"), "--to", "nvfp4"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "model.safetensors" in done.stderr
    assert not (tmp_path / "dst").exists()
    assert tree(source) == before
    assert run("convert", source, tmp_path / "dst", "--to", "nvfp4", "--overwrite").code == 0


def test_too_little_memory(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", dense())
    refused(source, "--max-memory", "10MB", to="nvfp4", says=("--max-memory", "--workers"))


# ---- values: found while running


def failed(source: Path, *options: str, to: str, says: tuple[str, ...]) -> str:
    """Convert `source`, which must fail while running: DST.partial stays, and the message says how to go on."""
    parent, before = source.parent, tree(source)
    result = run("convert", source, parent / "dst", "--to", to, *options)
    assert result.code == 1, result.err
    for words in says:
        assert words in result.err
    assert not (parent / "dst").exists()
    assert (parent / "dst.partial" / JOURNAL_NAME).exists()
    assert "fp4conv convert" in result.err
    assert str(parent / "dst.partial") in result.err
    assert tree(source) == before
    return result.err


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("to", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, None])
def test_value_that_cannot_be_quantised(tmp_path: Path, value: float, to: str, dtype: type | None) -> None:
    weight = noise((64, 32), 1).astype(np.float32)
    weight[41, 17] = value
    stored = bf16(weight) if dtype is None else weight.astype(dtype)
    source = write_model(tmp_path / "src", {f"{DOWN}.weight": stored, "model.norm.weight": bf16(np.ones(64))})
    failed(source, to=to, says=(f"{DOWN}.weight", "[41, 17]", "NaN or Inf", f"--exclude '{DOWN}'"))


@pytest.mark.parametrize("to", ["mxfp4", "nvfp4"])
def test_position_in_experts_is_that_of_the_stored_tensor(tmp_path: Path, to: str) -> None:
    experts = noise((3, 64, 96)).astype(np.float32)
    experts[2, 33, 95] = np.nan
    source = write_model(tmp_path / "src", {EXPERTS: bf16(experts), f"{LAYER}.self_attn.sinks": noise((4,))})
    failed(source, to=to, says=(EXPERTS, "[2, 33, 95]"))


def test_nonfinite_values_that_are_only_copied_are_reported(tmp_path: Path) -> None:
    tensors = changed(dense(), {"model.norm.weight": bf16([1, np.nan, np.inf, 2])})
    source = write_model(tmp_path / "src", tensors)
    result = run("convert", source, tmp_path / "dst", "--to", "nvfp4", "--json")
    assert result.code == 0
    assert any("2 NaN or Inf" in w and "model.norm.weight" in w for w in json.loads(result.out)["warnings"])
    assert read_raw(tmp_path / "dst")["model.norm.weight"] == read_raw(source)["model.norm.weight"]


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_overflow_of_f16(tmp_path: Path, dtype: str) -> None:
    weight = noise((64, 32), 1).astype(np.float32)
    weight[3, 5] = -70000.0
    source = write_model(tmp_path / "src", {f"{DOWN}.weight": bf16(weight) if dtype == "BF16" else weight})
    failed(source, to="f16", says=(f"{DOWN}.weight", "[3, 5]", "--to"))


def test_inf_stays_inf_in_f16(tmp_path: Path) -> None:
    """An infinity is no overflow: it was there before. It is reported."""
    weight = noise((64, 32), 1).astype(np.float32)
    weight[3, 5] = -np.inf
    source = write_model(tmp_path / "src", {f"{DOWN}.weight": weight})
    result = run("convert", source, tmp_path / "dst", "--to", "f16", "--json")
    assert result.code == 0
    assert array_of(read_raw(tmp_path / "dst")[f"{DOWN}.weight"])[3, 5] == -np.inf
    assert any(f"{DOWN}.weight" in warning for warning in json.loads(result.out)["warnings"])


def test_overflow_of_f32_to_bf16(tmp_path: Path) -> None:
    weight = np.zeros((4, 32), np.float32)
    weight[2, 30] = np.finfo(np.float32).max
    source = write_model(tmp_path / "src", {f"{DOWN}.weight": weight})
    failed(source, to="bf16", says=(f"{DOWN}.weight", "[2, 30]"))


@pytest.mark.parametrize(("to", "byte"), [("bf16", 255), ("f32", 255), ("f16", 255), ("nvfp4", 255), ("f16", 200)])
def test_scale_byte_that_is_nan_or_too_large(tmp_path: Path, to: str, byte: int) -> None:
    tensors = mxfp4()
    tensors[f"{EXPERTS}_scales"] = scales = np.full((2, 8, 2), 120, np.uint8)
    scales[1, 7, 1] = byte
    tensors[f"{EXPERTS}_blocks"] = np.full((2, 8, 2, 16), 0x77, np.uint8)
    source = write_model(tmp_path / "src", tensors)
    failed(source, to=to, says=(EXPERTS, "[1, 32, 7]"))  # K before N, as the BF16 checkpoint has it


def test_largest_scale_overflows_bf16(tmp_path: Path) -> None:
    tensors = changed(mxfp4(), {f"{EXPERTS}_scales": np.full((2, 8, 2), 254, np.uint8)})
    source = write_model(tmp_path / "src", tensors)
    failed(source, to="bf16", says=(EXPERTS,))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, -0.0])
@pytest.mark.parametrize("to", ["bf16", "mxfp4"])
def test_tensor_scale_that_is_no_scale(tmp_path: Path, scale: float, to: str) -> None:
    source = write_model(tmp_path / "src", nvfp4(scale))
    failed(source, to=to, says=(f"{DOWN}.weight_scale_2", "tensor scale"))


@pytest.mark.parametrize("scale", [1e37, 1e-37])
def test_tensor_scale_near_the_ends_of_f32(tmp_path: Path, scale: float) -> None:
    source = write_model(tmp_path / "src", nvfp4(scale))
    assert run("convert", source, tmp_path / "dst", "--to", "f32").code == 0
    before = read_raw(source)
    parts = [array_of(before[f"{DOWN}.{suffix}"]) for suffix in ("weight", "weight_scale", "weight_scale_2")]
    after = array_of(read_raw(tmp_path / "dst")[f"{DOWN}.weight"])
    assert np.allclose(after.astype(np.float64), decode_nvfp4(*parts), rtol=1e-6, atol=2.0**-149)


@pytest.mark.parametrize("to", ["bf16", "f32", "mxfp4"])
def test_tensor_scale_that_overflows(tmp_path: Path, to: str) -> None:
    source = write_model(tmp_path / "src", nvfp4(3e38))
    failed(source, to=to, says=(f"{DOWN}.weight", "not finite"))


@pytest.mark.parametrize("to", ["bf16", "mxfp4"])
def test_nan_block_scale(tmp_path: Path, to: str) -> None:
    scales = e4m3(np.full((8, 4), 1.5)).copy()
    scales[5, 2] = np.nan
    source = write_model(tmp_path / "src", changed(nvfp4(), {f"{DOWN}.weight_scale": scales}))
    failed(source, to=to, says=(f"{DOWN}.weight", "[5, 32]"))


def test_the_function_gives_the_command_too(tmp_path: Path) -> None:
    tensors = changed(dense(), {f"{DOWN}.weight": bf16(np.full((8, 32), np.nan))})
    source = write_model(tmp_path / "a source", tensors)
    with pytest.raises(ValuesError) as caught:
        fp4conv.convert(source, tmp_path / "dst", to="nvfp4", scale_rule=ScaleRule.AMAX, exclude=["*.self_attn.*"])
    line = str(caught.value).splitlines()[-1].strip()
    words = shlex.split(line)
    assert words[:4] == ["fp4conv", "convert", str(source), str(tmp_path / "dst")]
    shutil.rmtree(source)
    write_model(source, dense())
    (tmp_path / "dst.partial").rename(tmp_path / "aside")
    assert run(*words[1:]).code == 0, line
    layers = config_of(tmp_path / "dst")["quantization_config"]
    assert isinstance(layers, dict)
    assert f"{LAYER}.self_attn.q_proj" in layers["ignore"]


def test_a_mended_source_does_not_go_on_from_the_broken_one(tmp_path: Path) -> None:
    """What another source left is refused, with what helps: --overwrite starts over."""
    broken, good = noise((64, 32), 1).astype(np.float32), noise((64, 32), 1)
    broken[0, 0] = np.nan
    source = write_model(tmp_path / "src", {f"{DOWN}.weight": bf16(broken)})
    failed(source, to="mxfp4", says=(DOWN,))
    shutil.rmtree(source)
    write_model(source, {f"{DOWN}.weight": good})
    result = run("convert", source, tmp_path / "dst", "--to", "mxfp4")
    assert result.code == 1
    assert "dst.partial" in result.err
    assert "the source or fp4conv has changed" in result.err
    assert "Run that command" not in result.err
    assert run("convert", source, tmp_path / "dst", "--to", "mxfp4", "--overwrite").code == 0
    assert not (tmp_path / "dst.partial").exists()


# ---- shapes at the edge


@pytest.mark.parametrize("to", ["bf16", "f32", "mxfp4", "nvfp4"])
def test_empty_tensors_and_scalars_come_along(tmp_path: Path, to: str) -> None:
    odd: Tensors = {
        f"{LAYER}.mlp.gate.weight": noise((0, 64)),
        f"{LAYER}.self_attn.o_proj.weight": noise((0, 64)),
        f"{LAYER}.mlp.fc1.weight": noise((64, 0)),
        "model.rotary.inv_freq": np.ones((), np.float32),
        "model.position_ids": np.arange(5),
    }
    source = write_model(tmp_path / "src", {**dense(), **odd})
    result = run("convert", source, tmp_path / "dst", "--to", to)
    assert result.code == 0, result.err
    after = read_raw(tmp_path / "dst")
    for name, value in odd.items():
        assert after[name][1] == value.shape


def test_the_hint_to_exclude_a_module_excludes_it(tmp_path: Path) -> None:
    """Names with the signs of globs are escaped in what the message says to type."""
    odd = f"{LAYER}.mlp.[ab]*"
    source = write_model(tmp_path / "src", {**dense(), f"{odd}.weight": noise((8, 40))})
    message = refused(source, to="mxfp4", says=("--exclude", "block of 32"))
    option, glob = shlex.split(message[message.index("--exclude") :])[:2]
    assert run("convert", source, tmp_path / "dst", "--to", "mxfp4", option, glob).code == 0
    assert f"{odd}.weight" in read_raw(tmp_path / "dst")


# ---- a dry run says what the run would say of DST


def test_a_dry_run_refuses_the_destinations_that_a_run_refuses(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", dense())
    write_model(tmp_path / "old", dense())
    (tmp_path / "home" / "docs").mkdir(parents=True)
    (tmp_path / "home" / "docs" / "thesis.txt").write_text("mine")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "old")
    (tmp_path / "taken.partial").mkdir()
    (tmp_path / "taken.partial" / "mine").touch()
    write_model(tmp_path / "x", dense())
    (tmp_path / "x.replaced").mkdir()
    before = tree(tmp_path)
    for name, *options in (
        ["old"],
        ["home"],
        ["home", "--overwrite"],
        ["file", "--overwrite"],
        ["link", "--overwrite"],
        ["src", "--overwrite"],
        ["src/dst"],
        ["taken", "--overwrite"],
        ["x", "--overwrite"],
        ["d" * 250],
    ):
        words: list[str | Path] = ["convert", source, tmp_path / name, "--to", "mxfp4", *options]
        dry, wet = run(*words, "--dry-run"), run(*words)
        assert (dry.code, dry.out) == (1, ""), name
        assert dry.err == wet.err
        assert run(*words, "--dry-run", "--json").err == wet.err
        assert tree(tmp_path) == before
    assert run("convert", source, tmp_path / "old", "--to", "mxfp4", "--overwrite", "--dry-run").code == 0
    assert tree(tmp_path) == before


def test_a_dry_run_beside_a_half_done_output(tmp_path: Path) -> None:
    """The same command would go on, another is refused, and so is this one once the source has changed."""
    values = noise((64, 32), 1).astype(np.float32)
    values[63, 31] = np.nan
    source = write_model(tmp_path / "src", {f"{DOWN}.weight": bf16(values)})
    words = ("convert", source, tmp_path / "dst", "--to", "mxfp4")
    assert run(*words).code == 1
    journal = tmp_path / "dst.partial" / JOURNAL_NAME
    with journal.open("a") as stream:
        stream.write('{"done": "torn')
    before = tree(tmp_path)
    assert run(*words, "--dry-run").code == 0
    other = run(*words, "--scale-rule", "floor", "--dry-run")
    assert other.code == 1
    assert "another command" in other.err
    assert run(*words, "--scale-rule", "floor", "--overwrite", "--dry-run").code == 0
    assert tree(tmp_path) == before
    (source / "config.json").write_text("{}")
    changed = run(*words, "--dry-run")
    assert changed.code == 1
    assert "the source or fp4conv has changed" in changed.err


def test_a_dry_run_beside_an_output_that_lacks_its_last_rename(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", dense())
    words = ("convert", source, tmp_path / "dst", "--to", "mxfp4")

    def stop(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with patch.object(Path, "unlink", stop):
        assert run(*words).code == 130
    assert (tmp_path / "dst" / JOURNAL_NAME).exists()
    before = tree(tmp_path)
    assert run(*words, "--dry-run").code == 0
    assert "exists already" in run(*words, "--scale-rule", "floor", "--dry-run").err
    assert tree(tmp_path) == before


def test_the_way_on_from_a_value_that_cannot_be_quantised(tmp_path: Path) -> None:
    """What the message says is what works: other options, with --overwrite beside what was done."""
    names = [f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")]
    held = {name: noise((64, 64), seed).copy() for seed, name in enumerate(names)}
    held[names[2]][0, 0] = np.inf
    source = write_model(tmp_path / "src", held)
    with pytest.raises(ValuesError, match="begin anew, and need --overwrite"):
        fp4conv.convert(source, tmp_path / "out", to="mxfp4")
    exclude = ["model.layers.0.mlp.down_proj"]
    with pytest.raises(ResumeError):
        fp4conv.convert(source, tmp_path / "out", to="mxfp4", exclude=exclude)
    fp4conv.convert(source, tmp_path / "out", to="mxfp4", exclude=exclude, overwrite=True)
    assert not (tmp_path / "out.partial").exists()
