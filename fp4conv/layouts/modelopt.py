"""What ModelOpt's `export_hf_checkpoint` lays out: NVFP4, read and written, and MXFP4 of linear layers, read only.

A linear layer: `X.weight` U8 [N, K/2], `X.weight_scale` E4M3 [N, K/16], `X.weight_scale_2` F32 [], and with
quantised activations `X.input_scale` F32 []. The 3-D experts of gpt-oss: the same with underscores and no
`.weight`, packed along axis 1 and not turned ([E, H/2, 2I]), one tensor scale for all experts.
Both hf_quant_config.json and config.json say the same; the top-level `group_size` is for TensorRT-LLM.

Asked for MXFP4, the export has `X.weight` U8 [N, K/2] and `X.weight_scale` U8 [N, K/32] (E8M0), `quant_algo` "mxfp4"
and no group size. That serves nowhere, but the values are whole. Of gpt-oss it quantises along the out-features.
"""

from __future__ import annotations

from collections.abc import Mapping

from fp4conv.errors import SourceError
from fp4conv.families import Family, Role
from fp4conv.formats import MXFP4, NVFP4, BlockFormat
from fp4conv.layouts.base import Parsed, Written, layer_count
from fp4conv.layouts.parts import Part, PartNames, collect, dense_part, dense_weight, looks_packed, spell
from fp4conv.layouts.quant_config import HF_QUANT_CONFIG, MODEL_CONFIG, contradictions, read_quant_config
from fp4conv.model import JSON, Decoded, Source, Weight

LINEAR = PartNames(NVFP4, False, ".weight", ".weight_scale", "F8_E4M3", ".weight_scale_2", ".input_scale")
MX_LINEAR = PartNames(MXFP4, False, ".weight", ".weight_scale", "U8")
EXPERTS = PartNames(NVFP4, True, "", "_weight_scale", "F8_E4M3", "_weight_scale_2", "_input_scale", kn=True)
_KV_SCALES = (".k_scale", ".v_scale")


class ModelOpt:
    name = "modelopt"
    formats = (NVFP4.name,)
    kv_scales = True

    def recognises(self, source: Source) -> bool:
        scales = (LINEAR.block_scale, EXPERTS.block_scale, LINEAR.tensor_scale or "", EXPERTS.tensor_scale or "")
        packed = any(looks_packed(ref, names) for ref in source.tensors.values() for names in (LINEAR, EXPERTS))
        return packed or any(name.endswith(scales) for name in source.tensors)

    def parse(self, source: Source, family: Family) -> Parsed:
        claim = read_quant_config(source)
        self._refuse_other_formats(source, claim.algo if claim else None)
        layers = layer_count(source)
        found = collect(source, family, (LINEAR, MX_LINEAR, EXPERTS), layers)
        calibration = {ref.name: ref for ref in found.input_scales.values()}
        calibration |= {name: ref for name, ref in source.tensors.items() if name.endswith(_KV_SCALES)}
        dense = [
            dense_weight(ref, family, layers)
            for name, ref in source.tensors.items()
            if name not in found.used and name not in calibration
        ]
        blocks = {w.module: w.value.block for w in found.weights if isinstance(w.value, Decoded)}
        warnings = (
            contradictions(claim, blocks)
            if claim
            else ["no config says how the weights are quantised: read from shapes"]
        )
        return Parsed((*found.weights, *dense), calibration, tuple(warnings))

    def _refuse_other_formats(self, source: Source, algo: str | None) -> None:
        hint = "convert from the checkpoint that this one was exported from"
        for name, ref in source.tensors.items():
            where, dtype = f"{name} ({ref.file})", ref.spec.dtype
            if name.endswith(EXPERTS.block_scale) and dtype == MX_LINEAR.scale_dtype:
                raise SourceError(
                    "ModelOpt's MXFP4 export of gpt-oss has its blocks along the out-features of the experts: no "
                    "program reads that, and its values are not those of blocks along the in-features",
                    where=where,
                    hint=hint,
                )
            wanted = {EXPERTS.scale_dtype}
            if name.endswith(LINEAR.block_scale):
                wanted = {LINEAR.scale_dtype, MX_LINEAR.scale_dtype}
            elif not name.endswith(EXPERTS.block_scale):
                continue
            if dtype not in wanted:
                weight = source.tensors.get(name.removesuffix("_scale"))
                kind = "FP8 with a scale a tensor or a row" if weight and weight.spec.dtype == "F8_E4M3" else "no FP4"
                raise SourceError(
                    f"scales of dtype {dtype} (the config says {algo}): this is {kind}; of ModelOpt's exports "
                    f"fp4conv reads NVFP4 (scales F8_E4M3) and MXFP4 (scales U8)",
                    where=where,
                    hint=hint,
                )

    def refusal(self, weight: Weight, family: Family) -> str | None:
        if len(weight.shape) == 3 and not weight.kn:
            return "ModelOpt has no layout for this model's 3-D experts"
        return None

    def place(self, weight: Weight, target: BlockFormat, input_scale: bool) -> tuple[Part, ...]:
        fused = len(weight.shape) == 3 and weight.role is Role.EXPERT
        return spell(EXPERTS if fused else LINEAR, weight, input_scale)

    def place_dense(self, weight: Weight, dtype: str) -> Part:
        return dense_part(weight, dtype)

    def config(self, written: Written) -> Mapping[str, JSON]:
        algo = "NVFP4" if written.input_scales else "W4A16_NVFP4"
        values: dict[str, JSON] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4.block}
        group: dict[str, JSON] = {"weights": values, "targets": ["Linear"]}
        if written.input_scales:
            group["input_activations"] = dict(values)
        producer: dict[str, JSON] = {"name": "fp4conv", "version": written.version}
        ignore: list[JSON] = list(written.unquantized)
        quantization: dict[str, JSON] = {
            "config_groups": {"group_0": group},
            "group_size": NVFP4.block,
            "ignore": ignore,
            "quant_algo": algo,
            "producer": producer,
            "quant_method": "modelopt",
        }
        if written.kv_scales:
            quantization["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        separate: dict[str, JSON] = {
            "producer": producer,
            "quantization": {
                "quant_algo": algo,
                "kv_cache_quant_algo": "FP8" if written.kv_scales else None,
                "group_size": NVFP4.block,
                "exclude_modules": ignore,
            },
        }
        return {MODEL_CONFIG: {**written.config, "quantization_config": quantization}, HF_QUANT_CONFIG: separate}
