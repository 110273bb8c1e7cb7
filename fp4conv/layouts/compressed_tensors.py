"""MXFP4 as compressed-tensors packs it (`mxfp4-pack-quantized`): linear layers of any model.

`X.weight_packed` U8 [N, K/2], `X.weight_scale` U8 [N, K/32] (E8M0 bytes). The only MXFP4 that vLLM serves for
models other than gpt-oss, and transformers decompresses it. Weight-only: activations stay as they are.
The keys of `quantization_config` are those that compressed-tensors 0.20.0 writes for the scheme MXFP4A16.
"""

from __future__ import annotations

from collections.abc import Mapping

from fp4conv.errors import SourceError
from fp4conv.families import Family
from fp4conv.formats import MXFP4
from fp4conv.layouts.base import Parsed, Written, layer_count
from fp4conv.layouts.parts import Part, PartNames, collect, dense_weight, spell
from fp4conv.layouts.quant_config import MODEL_CONFIG, contradictions, read_quant_config
from fp4conv.model import JSON, Decoded, Source, Weight

LINEAR = PartNames(MXFP4, False, ".weight_packed", ".weight_scale", "U8")
FORMAT = "mxfp4-pack-quantized"
_WRITTEN_AS = "0.20.0"  # the compressed-tensors release whose config this is; readers compare it


class CompressedTensors:
    name = "compressed-tensors"
    formats = (MXFP4.name,)

    def recognises(self, source: Source) -> bool:
        return any(name.endswith(LINEAR.packed) for name in source.tensors)

    def parse(self, source: Source, family: Family) -> Parsed:
        claim = read_quant_config(source)
        self._refuse_other_formats(source, claim.format if claim else None)
        layers = layer_count(source)
        found = collect(source, family, (LINEAR,), layers)
        rest = (ref for name, ref in source.tensors.items() if name not in found.used)
        blocks = {w.module: w.value.block for w in found.weights if isinstance(w.value, Decoded)}
        warnings = contradictions(claim, blocks) if claim else []
        return Parsed((*found.weights, *(dense_weight(ref, family, layers) for ref in rest)), {}, tuple(warnings))

    def _refuse_other_formats(self, source: Source, said: str | None) -> None:
        for name, ref in source.tensors.items():
            if not name.endswith(LINEAR.packed):
                continue
            scale = source.tensors.get(name.removesuffix(LINEAR.packed) + LINEAR.block_scale)
            if ref.spec.dtype != "U8" or (scale is not None and scale.spec.dtype != LINEAR.scale_dtype):
                found = f"codes {ref.spec.dtype}, scales {scale.spec.dtype if scale else 'missing'}"
                raise SourceError(
                    f"{found} (the config says {said}); fp4conv reads {FORMAT}: codes U8, scales U8",
                    where=f"{name} ({ref.file})",
                    hint="convert from the BF16 checkpoint instead",
                )

    def refusal(self, weight: Weight, family: Family) -> str | None:
        if len(weight.shape) != 2:
            return "compressed-tensors holds linear layers only; gpt-oss takes --layout openai"
        return None

    def place(self, weight: Weight, input_scale: bool) -> tuple[Part, ...]:
        return spell(LINEAR, weight, input_scale=False)

    def config(self, written: Written) -> Mapping[str, JSON]:
        weights: dict[str, JSON] = {
            "dynamic": False,
            "group_size": MXFP4.block,
            "num_bits": 4,
            "scale_dtype": "torch.uint8",
            "strategy": "group",
            "symmetric": True,
            "type": "float",
        }
        group: dict[str, JSON] = {
            "format": FORMAT,
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": weights,
        }
        quantization: dict[str, JSON] = {
            "config_groups": {"group_0": group},
            "format": FORMAT,
            "global_compression_ratio": None,
            "ignore": list(written.unquantized),
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": _WRITTEN_AS,
        }
        return {MODEL_CONFIG: {**written.config, "quantization_config": quantization}}
