"""FP8 with a scale a tile, as DeepSeek-V3/R1 and the FP8 releases of Qwen3 and GLM are published: read only.

`X.weight` F8_E4M3 [N, K] and `X.weight_scale_inv` [ceil(N / rows), ceil(K / columns)], F32 or (newer Qwen) BF16: the
scale itself, whatever its name says. config.json: `quantization_config` {"quant_method": "fp8",
"weight_block_size": [rows, columns]}. Activations are scaled as they come, so nothing of them is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

from fp4conv.errors import SourceError
from fp4conv.families import Family, module_of, role_of
from fp4conv.formats import BlockFormat
from fp4conv.layouts.base import Parsed, Written, layer_count
from fp4conv.layouts.parts import DENSE_SUFFIX, Part, dense_weight
from fp4conv.layouts.quant_config import ignored, read_quant_config
from fp4conv.model import FP8, JSON, BlockScaled, Source, Weight
from fp4conv.safetensors_io import TensorRef

VALUES, SCALE = DENSE_SUFFIX, ".weight_scale_inv"
_INPUT_SCALES = (".input_scale", ".activation_scale")  # of releases that fix them: FP8's, of no use to FP4
_VALUE_DTYPE, _SCALE_DTYPES = "F8_E4M3", ("F32", "BF16")


class Fp8:
    name = FP8
    formats = (FP8,)  # so that no target fits: this layout is not written
    kv_scales = False

    def recognises(self, source: Source) -> bool:
        return any(name.endswith(SCALE) for name in source.tensors)

    def parse(self, source: Source, family: Family) -> Parsed:
        claim = read_quant_config(source)
        block = _block_shape(claim.block_shape if claim else ())
        layers = layer_count(source)
        weights, used = [], set()
        for name in source.tensors:
            if name.endswith(SCALE):
                value = _block_scaled(source, name, block)
                module = module_of(value.values.name)
                shape = value.values.spec.shape
                weights.append(Weight(value.values.name, module, role_of(module, layers), shape, value))
                used |= {ref.name for ref in value.refs}
        modules = {weight.module for weight in weights}
        inputs = [
            name for name in source.tensors if name.endswith(_INPUT_SCALES) and name.rpartition(".")[0] in modules
        ]
        used.update(inputs)
        rest = [ref for name, ref in source.tensors.items() if name not in used]
        _refuse_unscaled(rest)
        warnings = [f"FP8 scales of activations are left out: {len(inputs)} such as {inputs[0]}"] if inputs else []
        wrong = ignored(modules, claim.ignore) if claim else []
        if wrong:
            warnings.append(f"the config lists {len(wrong)} modules as unquantised that are FP8 ({min(wrong)}, ...)")
        return Parsed((*weights, *(dense_weight(ref, family, layers) for ref in rest)), {}, tuple(warnings))

    def refusal(self, weight: Weight, family: Family) -> str | None:
        return "fp4conv reads FP8 and does not write it"

    def place(self, weight: Weight, target: BlockFormat, input_scale: bool) -> tuple[Part, ...]:
        raise AssertionError("FP8 is read only")

    def place_dense(self, weight: Weight, dtype: str) -> Part:
        raise AssertionError("FP8 is read only")

    def config(self, written: Written) -> Mapping[str, JSON]:
        raise AssertionError("FP8 is read only")


def _block_shape(stated: tuple[int, ...]) -> tuple[int, int]:
    if len(stated) != 2 or min(stated) < 1:
        raise SourceError(
            f"its quantization_config says weight_block_size {list(stated) or 'nothing'}; expected two numbers, as in "
            "[128, 128], without which the scales of FP8 weights cannot be placed",
            where="config.json",
            hint="take the config.json that was published with these weights",
        )
    return stated[0], stated[1]


def _block_scaled(source: Source, scale_name: str, block: tuple[int, int]) -> BlockScaled:
    scale = source.tensors[scale_name]
    values = source.tensors.get(scale_name.removesuffix(SCALE) + VALUES)
    if values is None:
        raise _damaged(scale, f"scales without their weight {scale_name.removesuffix(SCALE) + VALUES}")
    if values.spec.dtype != _VALUE_DTYPE or len(values.spec.shape) != 2 or not values.spec.elements:
        found = f"{values.spec.dtype} {list(values.spec.shape)}"
        raise _damaged(values, f"{found} beside {scale_name}; expected {_VALUE_DTYPE} [N, K]")
    if scale.spec.dtype not in _SCALE_DTYPES:
        raise _damaged(scale, f"scales of dtype {scale.spec.dtype}; fp4conv reads {' and '.join(_SCALE_DTYPES)}")
    expected = tuple(-(-size // tile) for size, tile in zip(values.spec.shape, block, strict=True))
    if scale.spec.shape != expected:
        raise _damaged(
            scale,
            f"scales {list(scale.spec.shape)}; expected {list(expected)} for a weight {list(values.spec.shape)} in "
            f"tiles of {list(block)} (weight_block_size in config.json)",
        )
    return BlockScaled(values, scale, block)


def _refuse_unscaled(rest: list[TensorRef]) -> None:
    for ref in rest:
        if ref.spec.dtype.startswith("F8_"):
            raise _damaged(ref, f"an FP8 weight without its {SCALE.removeprefix('.')}")


def _damaged(ref: TensorRef, found: str) -> SourceError:
    hint = "the checkpoint is incomplete, or FP8 of another kind: convert from a complete or a BF16 one"
    return SourceError(found, where=f"{ref.name} ({ref.file})", hint=hint)
