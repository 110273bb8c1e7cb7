"""FP4 as compressed-tensors packs it: linear layers of any model, an expert a module included.

`mxfp4-pack-quantized`: `X.weight_packed` U8 [N, K/2], `X.weight_scale` U8 [N, K/32] (E8M0 bytes). The only MXFP4 that
vLLM serves for models other than gpt-oss. `nvfp4-pack-quantized`: the same names, `weight_scale` F8_E4M3 [N, K/16],
and `X.weight_global_scale` F32 [1], with quantised activations `X.input_global_scale` F32 [1]: both are the
reciprocals of what ModelOpt stores. transformers decompresses either.
The keys of `quantization_config` are those that compressed-tensors 0.20.0 writes for MXFP4A16, NVFP4A16 and NVFP4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fp4conv.errors import SourceError
from fp4conv.families import Family
from fp4conv.formats import MXFP4, NVFP4, BlockFormat
from fp4conv.layouts.base import Parsed, Written, layer_count
from fp4conv.layouts.parts import Part, PartNames, collect, dense_part, dense_weight, spell
from fp4conv.layouts.quant_config import MODEL_CONFIG, QuantConfig, contradictions, read_quant_config
from fp4conv.model import JSON, Decoded, Source, Weight
from fp4conv.safetensors_io import TensorRef

MX = PartNames(MXFP4, False, ".weight_packed", ".weight_scale", "U8")
NV = PartNames(
    NVFP4,
    False,
    ".weight_packed",
    ".weight_scale",
    "F8_E4M3",
    ".weight_global_scale",
    ".input_global_scale",
    scalar=(1,),
    inverse=True,
)
_TABLES = {MXFP4.name: MX, NVFP4.name: NV}
FORMATS = {MXFP4.name: "mxfp4-pack-quantized", NVFP4.name: "nvfp4-pack-quantized"}
_INPUT_SCALE = ".input_scale"  # under this name input scales are known inside
_KV_SCALES = (".k_scale", ".v_scale", ".q_scale")
_WRITTEN_AS = "0.20.0"  # the compressed-tensors release whose config this is; readers compare it


class CompressedTensors:
    name = "compressed-tensors"
    formats = tuple(_TABLES)
    kv_scales = False

    def recognises(self, source: Source) -> bool:
        return any(name.endswith((MX.packed, NV.tensor_scale or "")) for name in source.tensors)

    def parse(self, source: Source, family: Family) -> Parsed:
        claim = read_quant_config(source)
        self._refuse_other_formats(source, claim.format if claim else None)
        layers = layer_count(source)
        found = collect(source, family, _TABLES.values(), layers)
        kv = [name for name in source.tensors if name.endswith(_KV_SCALES)]
        used = found.used.union(kv)
        rest = [ref for name, ref in source.tensors.items() if name not in used]
        quantized = {w.module: w.value for w in found.weights if isinstance(w.value, Decoded)}
        _refuse_strangers(rest, quantized)
        warnings = contradictions(claim, {m: value.block for m, value in quantized.items()}) if claim else []
        warnings += _left_out(claim, kv, {value.format_name for value in quantized.values()})
        calibration = {module + _INPUT_SCALE: ref for module, ref in found.input_scales.items()}
        dense = (dense_weight(ref, family, layers) for ref in rest)
        return Parsed((*found.weights, *dense), calibration, tuple(warnings))

    def _refuse_other_formats(self, source: Source, said: str | None) -> None:
        for name, ref in source.tensors.items():
            if not name.endswith(MX.packed):
                continue
            scale = source.tensors.get(name.removesuffix(MX.packed) + MX.block_scale)
            known = (MX.scale_dtype, NV.scale_dtype)
            if ref.spec.dtype != "U8" or (scale is not None and scale.spec.dtype not in known):
                found = f"codes {ref.spec.dtype}, scales {scale.spec.dtype if scale else 'missing'}"
                raise SourceError(
                    f"{found} (the config says {said}); fp4conv reads {' and '.join(FORMATS.values())}: codes U8, "
                    f"scales {' or '.join(known)}",
                    where=f"{name} ({ref.file})",
                    hint="convert from the BF16 checkpoint instead",
                )

    def refusal(self, weight: Weight, family: Family) -> str | None:
        if len(weight.shape) != 2:
            return "compressed-tensors holds linear layers only; gpt-oss takes --layout openai, or modelopt for NVFP4"
        return None

    def place(self, weight: Weight, target: BlockFormat, input_scale: bool) -> tuple[Part, ...]:
        return spell(_TABLES[target.name], weight, input_scale)

    def place_dense(self, weight: Weight, dtype: str) -> Part:
        return dense_part(weight, dtype)

    def config(self, written: Written) -> Mapping[str, JSON]:
        form = FORMATS[written.format_name]
        group: dict[str, JSON] = {
            "format": form,
            "input_activations": {**_NV_VALUES, **_NV_INPUTS} if written.input_scales else None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": _MX_VALUES if written.format_name == MXFP4.name else _NV_VALUES,
        }
        quantization: dict[str, JSON] = {
            "config_groups": {"group_0": group},
            "format": form,
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


_VALUES: dict[str, JSON] = {"dynamic": False, "num_bits": 4, "symmetric": True, "type": "float"}
_MX_VALUES: dict[str, JSON] = {
    **_VALUES,
    "group_size": MXFP4.block,
    "scale_dtype": "torch.uint8",
    "strategy": "group",
}
_NV_VALUES: dict[str, JSON] = {
    **_VALUES,
    "group_size": NVFP4.block,
    "scale_dtype": "torch.float8_e4m3fn",
    "strategy": "tensor_group",
}
_NV_INPUTS: dict[str, JSON] = {"dynamic": "local", "observer": "static_minmax"}


def _refuse_strangers(rest: Iterable[TensorRef], quantized: Mapping[str, Decoded]) -> None:
    """A tensor beside packed codes that no table names (a zero point) changes what they mean; so do FP8 layers."""
    for ref in rest:
        module, _, leaf = ref.name.rpartition(".")
        beside = module in quantized and leaf != "bias"
        if beside or ref.spec.dtype.startswith("F8_") or ref.name.endswith(MX.block_scale):
            found = f"what {leaf!r} beside packed codes means" if beside else "layers in other formats than FP4"
            raise SourceError(
                f"{ref.spec.dtype} {list(ref.spec.shape)}: fp4conv does not know {found}",
                where=f"{ref.name} ({ref.file})",
                hint="convert from the BF16 checkpoint instead",
            )


def _left_out(claim: QuantConfig | None, kv: list[str], formats: set[str]) -> list[str]:
    notes = []
    if kv:
        notes.append(f"{len(kv)} scales of a quantised KV cache are left out ({kv[0]}, ...)")
    if claim and claim.inputs_quantized and formats == {MXFP4.name}:
        notes.append("the config quantises activations to MXFP4 as well: that is not kept, weights only are")
    return notes
