"""gpt-oss in MXFP4 under its Hugging Face names, as OpenAI published it.

Only the experts are quantised: `…gate_up_proj_blocks` U8 [E, 2I, H/32, 16] and `…_scales` U8 [E, 2I, H/32],
blocks along the in-features. The BF16 parameter is [E, H, 2I], so a matrix is turned on the way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fp4conv.families import Family, Role
from fp4conv.formats import MXFP4, BlockFormat
from fp4conv.layouts.base import Parsed, Written, layer_count
from fp4conv.layouts.damaged import misnamed_experts
from fp4conv.layouts.parts import Part, PartNames, collect, dense_part, dense_weight, spell
from fp4conv.layouts.quant_config import MODEL_CONFIG
from fp4conv.model import JSON, Source, Weight

EXPERTS = PartNames(MXFP4, experts=True, packed="_blocks", block_scale="_scales", scale_dtype="U8", grouped=True)
_MARK = re.compile(r"\.experts\.\w+_(blocks|scales)$")

# What transformers, vLLM and SGLang expect of gpt-oss, as in OpenAI's own config.json.
_NOT_CONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


class OpenAI:
    name = "openai"
    formats = (MXFP4.name,)
    kv_scales = False

    def recognises(self, source: Source) -> bool:
        return any(_MARK.search(name) for name in source.tensors) and not misnamed_experts(source.tensors)

    def parse(self, source: Source, family: Family) -> Parsed:
        layers = layer_count(source)
        found = collect(source, family, (EXPERTS,), layers)
        rest = (ref for name, ref in source.tensors.items() if name not in found.used)
        return Parsed((*found.weights, *(dense_weight(ref, family, layers) for ref in rest)))

    def refusal(self, weight: Weight, family: Family) -> str | None:
        if family.name != "gpt-oss":
            return "the openai layout is gpt-oss's own; other models take --layout compressed-tensors"
        if weight.role is not Role.EXPERT or len(weight.shape) != 3:
            return "in gpt-oss MXFP4 only the experts are quantised: no server reads more (--modules experts)"
        return None

    def place(self, weight: Weight, target: BlockFormat, input_scale: bool) -> tuple[Part, ...]:
        return spell(EXPERTS, weight, input_scale=False)

    def place_dense(self, weight: Weight, dtype: str) -> Part:
        return dense_part(weight, dtype)

    def config(self, written: Written) -> Mapping[str, JSON]:
        quantization: dict[str, JSON] = {"modules_to_not_convert": list(_NOT_CONVERTED), "quant_method": "mxfp4"}
        return {MODEL_CONFIG: {**written.config, "quantization_config": quantization}}
