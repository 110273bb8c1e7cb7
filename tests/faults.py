"""Checkpoints with one fault each: copies of healthy ones, changed in the way that tools in the field get them wrong.

`FAULTS` names each fault, the healthy checkpoint it is planted in, and what plants it. Nothing here uses fp4conv, so
that any program can be fed the same folders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from checkpoints import INDEX, Array, array_of, bf16, noise, read_raw, write_shard

CONFIG, HF_QUANT_CONFIG = "config.json", "hf_quant_config.json"
Tensors = dict[str, Array]
Object = dict[str, "object"]


@dataclass(frozen=True)
class Fault:
    """`base`: a healthy reference checkpoint. `plant` changes a copy of it in place."""

    name: str
    base: str
    plant: Callable[[Path], None]


def planted(fault: Fault, healthy: Path, folder: Path) -> Path:
    """A copy of `healthy` in `folder`, with the fault."""
    shutil.copytree(healthy, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    fault.plant(folder)
    return folder


# ---- means


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Write the shards again with the tensors changed; a new tensor goes to the last shard, and the index follows."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    homes: dict[str, str] = {}
    tensors: Tensors = {}
    for shard in shards:
        part = folder / f"only-{shard}"
        part.mkdir()
        shutil.move(folder / shard, part / shard)
        found = {name: array_of(raw) for name, raw in read_raw(part).items()}
        homes |= dict.fromkeys(found, shard)
        tensors |= found
        shutil.rmtree(part)
    change(tensors)
    for shard in shards:
        write_shard(
            folder / shard, {name: held for name, held in tensors.items() if homes.get(name, shards[-1]) == shard}
        )
    if (folder / INDEX).exists():
        weight_map = {name: homes.get(name, shards[-1]) for name in tensors}
        edit_json(folder, INDEX, lambda index: index.update(weight_map=weight_map))


def edit_json(folder: Path, name: str, change: Callable[[Object], object]) -> None:
    content: Object = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def inside(content: Mapping[str, object], *keys: str) -> Object:
    """The object at content[key][key]..."""
    found: object = content
    for key in keys:
        assert isinstance(found, Mapping)
        found = found[key]
    assert isinstance(found, dict)
    return found


def lose(*names: str) -> Callable[[Path], None]:
    """Tensors of these names, or ends of names, are gone."""

    def change(tensors: Tensors) -> None:
        lost = [name for name in tensors if name.endswith(names)]
        assert lost
        for name in lost:
            del tensors[name]

    return lambda folder: edit_tensors(folder, change)


def replaced(name: str, with_what: Callable[[Array], Array]) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = with_what(tensors[name])

    return lambda folder: edit_tensors(folder, change)


def config(change: Callable[[Object], object], name: str = CONFIG) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, name, change)


def times(factor: float) -> Callable[[Array], Array]:
    """F32 values, multiplied."""
    return lambda held: held.astype(np.float32) * np.float32(factor)


def set_byte(value: int) -> Callable[[Array], Array]:
    """The first byte that is neither zero nor `value` becomes `value`."""

    def change(scales: Array) -> Array:
        held = np.ascontiguousarray(scales).copy()
        flat = held.reshape(-1).view(np.uint8)
        flat[np.flatnonzero(flat)[0]] = value
        return held

    return change


def both_configs(change: Callable[[Object, Object], object]) -> Callable[[Path], None]:
    """Change config.json's quantization_config and hf_quant_config.json's quantization."""

    def plant(folder: Path) -> None:
        def one(model: Object) -> None:
            edit_json(
                folder,
                HF_QUANT_CONFIG,
                lambda other: change(inside(model, "quantization_config"), inside(other, "quantization")),
            )

        edit_json(folder, CONFIG, one)

    return plant


# ---- faults of files


def _shard_not_in_index(folder: Path) -> None:
    def change(index: Object) -> None:
        weight_map = inside(index, "weight_map")
        gone = sorted({str(shard) for shard in weight_map.values()})[1]
        for name in [name for name, shard in weight_map.items() if shard == gone]:
            del weight_map[name]

    edit_json(folder, INDEX, change)


def _index_to_missing_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _index_to_wrong_shard(folder: Path) -> None:
    def change(index: Object) -> None:
        weight_map = inside(index, "weight_map")
        other = next(shard for shard in weight_map.values() if shard != weight_map["model.norm.weight"])
        weight_map["model.norm.weight"] = other

    edit_json(folder, INDEX, change)


def _tensor_in_two_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    parts = []
    for shard in (first, second):
        alone = folder / "alone"
        alone.mkdir()
        shutil.copy(shard, alone / shard.name)
        parts.append({name: array_of(raw) for name, raw in read_raw(alone).items()})
        shutil.rmtree(alone)
    name = min(parts[0])
    write_shard(second, {**parts[1], name: parts[0][name]})


def _truncated(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    content = shard.read_bytes()
    shard.write_bytes(content[: -len(content) // 4])


def _broken_config(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:-40])


# ---- faults of tensors


def _qkv_scales_differ(folder: Path) -> None:
    replaced("model.layers.0.self_attn.q_proj.weight_scale_2", times(1.25))(folder)


def _gate_up_scales_differ(folder: Path) -> None:
    replaced("model.layers.1.mlp.experts.2.up_proj.weight_scale_2", times(1.25))(folder)


def _zero_block_scale(folder: Path) -> None:
    """The scale of the first block that has values becomes zero."""

    def change(tensors: Tensors) -> None:
        stem = "model.layers.0.mlp.up_proj.weight"
        scales = np.ascontiguousarray(tensors[stem + "_scale"]).copy()
        magnitudes = tensors[stem].reshape(*scales.shape, -1).astype(np.uint8) & 0x77
        scales.view(np.uint8).reshape(-1)[np.flatnonzero(magnitudes.any(axis=-1))[0]] = 0
        tensors[stem + "_scale"] = scales

    edit_tensors(folder, change)


def _transposed(*names: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        turned = [name for name in tensors if name.endswith(names)]
        assert turned
        for name in turned:
            tensors[name] = np.ascontiguousarray(np.swapaxes(tensors[name], 1, 2))

    return lambda folder: edit_tensors(folder, change)


def _blocks_along_rows(folder: Path) -> None:
    """MXFP4 experts as they come out when [E, in, out] is quantised without turning it: sound but for the shape."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_blocks")]:
            scales = name.removesuffix("_blocks") + "_scales"
            experts, n, groups = tensors[scales].shape
            turned = (experts, groups * 32, n // 32)
            tensors[scales] = tensors[scales].reshape(turned)
            tensors[name] = tensors[name].reshape(*turned, 16)

    edit_tensors(folder, change)


def _bf16_under_blocks(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
            tensors[name + "_blocks"] = tensors.pop(name)

    edit_tensors(folder, change)


def _missing_layer(folder: Path) -> None:
    edit_json(folder, CONFIG, lambda model: model.update(num_hidden_layers=int(str(model["num_hidden_layers"])) + 1))


def _orphan(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.r_proj.weight": noise((128, 128))}))


def _dense_member(folder: Path) -> None:
    """k_proj is dense beside quantised q_proj and v_proj, and the configs say so."""

    def change(tensors: Tensors) -> None:
        packed = tensors.pop("model.layers.0.self_attn.k_proj.weight")
        for part in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"model.layers.0.self_attn.k_proj.{part}"]
        tensors["model.layers.0.self_attn.k_proj.weight"] = noise((packed.shape[0], 2 * packed.shape[1]))

    edit_tensors(folder, change)
    _ignoring("model.layers.0.self_attn.k_proj")(folder)


def _ignoring(*entries: str) -> Callable[[Path], None]:
    def change(model: Object, separate: Object) -> None:
        for held, key in ((model, "ignore"), (separate, "exclude_modules")):
            before = held[key]
            assert isinstance(before, list)
            held[key] = [*before, *entries]

    return both_configs(change)


def _layer_prefix(folder: Path) -> None:
    """Twelve layers, number 1 of them dense; the lists name it as 'model.layers.1', which begins 10 and 11 too."""

    def change(tensors: Tensors) -> None:
        first = {name: held for name, held in tensors.items() if name.startswith("model.layers.0.")}
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            del tensors[name]
        for layer in range(2, 12):
            tensors |= {name.replace(".layers.0.", f".layers.{layer}."): held for name, held in first.items()}
        for name, held in first.items():
            if name.endswith(".weight"):
                wide = (*held.shape[:-1], 2 * held.shape[-1]) if held.dtype == np.uint8 else held.shape
                tensors[name.replace(".layers.0.", ".layers.1.")] = noise(wide)

    edit_tensors(folder, change)
    edit_json(folder, CONFIG, lambda model: model.update(num_hidden_layers=12))
    _ignoring("model.layers.1")(folder)


def weight_only(folder: Path) -> None:
    """No fault: the W4A16 form of a W4A4 checkpoint, said in both configs."""
    lose(".input_scale")(folder)

    def change(model: Object, separate: Object) -> None:
        model["quant_algo"] = separate["quant_algo"] = "W4A16_NVFP4"
        model["group_size"] = 16
        del inside(model, "config_groups", "group_0")["input_activations"]

    both_configs(change)(folder)


def _weight_only_nested_file(folder: Path) -> None:
    weight_only(folder)
    edit_json(folder, CONFIG, lambda model: model.pop("quantization_config"))


def _weight_only_nested_key(folder: Path) -> None:
    weight_only(folder)
    separate = json.loads((folder / HF_QUANT_CONFIG).read_text())
    (folder / HF_QUANT_CONFIG).unlink()
    edit_json(folder, CONFIG, lambda model: model.update(quantization_config={**separate, "quant_method": "modelopt"}))


# ---- faults of configs


def _no_group_size(model: Object, separate: Object) -> None:
    del separate["group_size"]
    for held in inside(model, "config_groups", "group_0").values():
        if isinstance(held, dict):
            held.pop("group_size", None)


def _other_group_size(model: Object, separate: Object) -> None:
    model["group_size"] = 32


FAULTS: tuple[Fault, ...] = (
    Fault("missing-scales", "gptoss-mxfp4", lose("layers.0.mlp.experts.gate_up_proj_scales")),
    Fault("missing-tensor-scale", "llama-nvfp4-default", lose("layers.0.mlp.down_proj.weight_scale_2")),
    Fault("missing-norm", "llama-bf16", lose("layers.0.input_layernorm.weight")),
    Fault("missing-bias", "gptoss-mxfp4", lose("layers.0.mlp.experts.down_proj_bias")),
    Fault("missing-expert", "qwen3moe-nvfp4-default", lose("layers.1.mlp.experts.3.down_proj.weight",
          "layers.1.mlp.experts.3.down_proj.weight_scale", "layers.1.mlp.experts.3.down_proj.weight_scale_2",
          "layers.1.mlp.experts.3.down_proj.input_scale")),
    Fault("missing-layer", "llama-nvfp4-default", _missing_layer),
    Fault("shard-not-in-index", "llama-bf16", _shard_not_in_index),
    Fault("index-to-missing-shard", "llama-bf16", _index_to_missing_shard),
    Fault("index-to-wrong-shard", "llama-bf16", _index_to_wrong_shard),
    Fault("tensor-in-two-shards", "llama-bf16", _tensor_in_two_shards),
    Fault("truncated-shard", "gptoss-mxfp4-native-like", _truncated),
    Fault("broken-config", "llama-nvfp4-default", _broken_config),
    Fault("orphan-tensor", "llama-bf16", _orphan),
    Fault("wrong-dtype", "llama-nvfp4-default",
          replaced("model.layers.0.mlp.up_proj.weight_scale", lambda held: bf16(held.astype(np.float32)))),
    Fault("wrong-rows", "llama-bf16", replaced("model.layers.0.mlp.up_proj.weight", lambda held: held[:-16])),
    Fault("wrong-vocabulary", "llama-bf16", replaced("lm_head.weight", lambda held: held[:-8])),
    Fault("expert-count", "gptoss-mxfp4", config(lambda model: model.update(num_local_experts=8))),
    Fault("qkv-tensor-scales", "llama-nvfp4-default", _qkv_scales_differ),
    Fault("gate-up-tensor-scales", "qwen3moe-nvfp4-default", _gate_up_scales_differ),
    Fault("set-in-part", "llama-nvfp4-default", _dense_member),
    Fault("missing-input-scale", "llama-nvfp4-default", lose("layers.1.mlp.down_proj.input_scale")),
    Fault("nan-block-scale", "llama-nvfp4-default", replaced("model.layers.0.mlp.up_proj.weight_scale", set_byte(127))),
    Fault("nan-block-scale-mxfp4", "gptoss-mxfp4",
          replaced("model.layers.0.mlp.experts.down_proj_scales", set_byte(255))),
    Fault("zero-block-scale", "llama-nvfp4-default", _zero_block_scale),
    Fault("overflowing-block-scale", "gptoss-mxfp4-native-like",
          replaced("model.layers.0.mlp.experts.down_proj_scales", lambda held: np.full_like(held, 254))),
    Fault("zero-tensor-scale", "llama-nvfp4-default",
          replaced("model.layers.0.mlp.down_proj.weight_scale_2", np.zeros_like)),
    Fault("nan-tensor-scale", "llama-nvfp4-default",
          replaced("model.layers.0.mlp.down_proj.weight_scale_2", times(np.nan))),
    Fault("nan-in-norm", "llama-bf16", replaced("model.norm.weight", lambda held: bf16(np.full(held.shape, np.nan)))),
    Fault("layer-prefix-ignored", "llama-nvfp4-default", _layer_prefix),
    Fault("quantised-but-ignored", "llama-nvfp4-default", _ignoring("model.layers.0.mlp.down_proj")),
    Fault("nested-only-file", "llama-nvfp4-default", _weight_only_nested_file),
    Fault("nested-only-key", "llama-nvfp4-default", _weight_only_nested_key),
    Fault("transposed-experts-bf16", "gptoss-bf16", _transposed(".experts.gate_up_proj", ".experts.down_proj")),
    Fault("transposed-experts-mxfp4", "gptoss-mxfp4", _blocks_along_rows),
    Fault("transposed-experts-nvfp4", "gptoss-nvfp4-default",
          _transposed(".experts.gate_up_proj", ".experts.down_proj", "experts.gate_up_proj_weight_scale",
                      "experts.down_proj_weight_scale")),
    Fault("bf16-under-blocks", "gptoss-bf16-from-mxfp4", _bf16_under_blocks),
    Fault("group-size-in-neither", "llama-nvfp4-default", both_configs(_no_group_size)),
    Fault("group-size-differs", "llama-nvfp4-default", both_configs(_other_group_size)),
    Fault("algorithms-differ", "llama-nvfp4-default",
          both_configs(lambda model, separate: separate.update(quant_algo="W4A16_NVFP4"))),
    Fault("ignore-lists-differ", "llama-nvfp4-mlp-only",
          both_configs(lambda model, separate: separate.update(exclude_modules=["lm_head"]))),
)  # fmt: skip


def fault_named(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)
