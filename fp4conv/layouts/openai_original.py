"""gpt-oss as OpenAI's own code reads it (the `original/` folder of the release): MXFP4 experts under other names.

The bytes of codes and scales are those of the Hugging Face layout; q, k and v are one tensor, rows q, k, v;
config.json has the keys of OpenAI's `ModelConfig` and no other. So reading is renaming and slicing, then reading as
`openai`; and writing is the same table the other way. OpenAI's loader asks for `.blocks` and `.scales` of every
expert weight, so this layout holds MXFP4 alone.
Names: gpt_oss/torch/model.py and weights.py of github.com/openai/gpt-oss at 0568dfc.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fp4conv.errors import PlanError, SourceError
from fp4conv.families import Family
from fp4conv.formats import MXFP4, BlockFormat
from fp4conv.layouts.base import Parsed, Written
from fp4conv.layouts.openai import OpenAI
from fp4conv.layouts.openai_config import from_openai, to_openai
from fp4conv.layouts.parts import PACKED, Part, dense_part
from fp4conv.layouts.quant_config import MODEL_CONFIG
from fp4conv.model import JSON, Pinned, Source, SourceFile, Weight
from fp4conv.safetensors_io import DTYPE_BYTES, Reader, TensorRef, TensorSpec

# Hugging Face's name -> OpenAI's; {n} is the layer.
NAMES: Mapping[str, str] = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.layers.{n}.input_layernorm.weight": "block.{n}.attn.norm.scale",
    "model.layers.{n}.self_attn.sinks": "block.{n}.attn.sinks",
    "model.layers.{n}.self_attn.o_proj.weight": "block.{n}.attn.out.weight",
    "model.layers.{n}.self_attn.o_proj.bias": "block.{n}.attn.out.bias",
    "model.layers.{n}.post_attention_layernorm.weight": "block.{n}.mlp.norm.scale",
    "model.layers.{n}.mlp.router.weight": "block.{n}.mlp.gate.weight",
    "model.layers.{n}.mlp.router.bias": "block.{n}.mlp.gate.bias",
    "model.layers.{n}.mlp.experts.gate_up_proj_blocks": "block.{n}.mlp.mlp1_weight.blocks",
    "model.layers.{n}.mlp.experts.gate_up_proj_scales": "block.{n}.mlp.mlp1_weight.scales",
    "model.layers.{n}.mlp.experts.gate_up_proj_bias": "block.{n}.mlp.mlp1_bias",
    "model.layers.{n}.mlp.experts.down_proj_blocks": "block.{n}.mlp.mlp2_weight.blocks",
    "model.layers.{n}.mlp.experts.down_proj_scales": "block.{n}.mlp.mlp2_weight.scales",
    "model.layers.{n}.mlp.experts.down_proj_bias": "block.{n}.mlp.mlp2_bias",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
}
# What OpenAI holds as one tensor: its name -> Hugging Face's, from the first row to the last.
STACKED: Mapping[str, tuple[str, ...]] = {
    f"block.{{n}}.attn.qkv.{leaf}": tuple(f"model.layers.{{n}}.self_attn.{part}_proj.{leaf}" for part in "qkv")
    for leaf in ("weight", "bias")
}
DTYPES_FILE = "dtypes.json"  # OpenAI's listing of tensors; nothing is known to read it
_MARK = re.compile(r"^block\.\d+\.(mlp\.mlp1_weight|attn\.qkv\.weight)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class OpenAIOriginal:
    name = "openai-original"
    formats = (MXFP4.name,)
    kv_scales = False

    def recognises(self, source: Source) -> bool:
        return any(_MARK.search(name) for name in source.tensors)

    def parse(self, source: Source, family: Family) -> Parsed:
        renamed, notes = with_hugging_face_names(source)
        config = renamed.json(MODEL_CONFIG)
        parsed = OpenAI().parse(renamed, family)
        if not any(file.name.startswith("tokenizer") for file in source.files):
            notes.append(
                "there is no tokenizer, chat template or generation config in the folder, so there is none in the "
                "result: copy them from the model's Hugging Face folder"
            )
        return replace(parsed, warnings=(*parsed.warnings, *notes), config=config)

    def refusal(self, weight: Weight, family: Family) -> str | None:
        return OpenAI().refusal(weight, family)

    def place(self, weight: Weight, target: BlockFormat, input_scale: bool) -> tuple[Part, ...]:
        return tuple(_rename(part) for part in OpenAI().place(weight, target, input_scale))

    def place_dense(self, weight: Weight, dtype: str) -> Part:
        return _rename(dense_part(weight, dtype))

    def config(self, written: Written) -> Mapping[str, JSON]:
        config = to_openai(written.config)
        _check_whole({part.name for part in written.parts}, config)
        dtypes: dict[str, JSON] = {part.name: _listed_dtype(part) for part in written.parts}
        return {MODEL_CONFIG: config, DTYPES_FILE: dtypes}


# ---- reading


def with_hugging_face_names(source: Source) -> tuple[Source, list[str]]:
    """(`source` as Hugging Face names its tensors and says its config, warnings); SourceError where it is none such."""
    stated = source.json(MODEL_CONFIG)
    if stated is None:
        raise SourceError(
            "is not there: without it the rows of q, k and v cannot be told apart",
            where=MODEL_CONFIG,
            hint="download the whole folder original/, its config.json too",
        )
    config, notes = from_openai(stated)
    tensors = {ref.name: ref for old in source.tensors.values() for ref in _hugging_face(old, stated)}
    return _Renamed(source, tensors, config), notes


@dataclass(frozen=True)
class _Renamed:
    """A source whose tensors have Hugging Face's names and whose config says what such a config would."""

    source: Source
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, JSON]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def root(self) -> Path:
        return self.source.root

    @property
    def pinned(self) -> Pinned | None:
        return self.source.pinned

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return self.source.files

    @property
    def folders(self) -> tuple[str, ...]:
        return self.source.folders

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.source.warnings

    def json(self, name: str) -> dict[str, JSON] | None:
        return dict(self.config) if name == MODEL_CONFIG else self.source.json(name)

    def read_bytes(self, name: str, limit: int = 64 * 2**20) -> bytes:
        return self.source.read_bytes(name, limit)

    def reader(self) -> Reader:
        return self.source.reader()

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def _hugging_face(ref: TensorRef, config: Mapping[str, JSON]) -> Iterator[TensorRef]:
    """The tensor under Hugging Face's name, or, of a stacked one, the slices that have such names."""
    plain, number = _split(ref.name)
    if plain in STACKED:
        yield from _slices(ref, [name.format(n=number) for name in STACKED[plain]], config)
        return
    found = next((theirs for theirs, openai in NAMES.items() if openai == plain), None)
    if found is None:
        known = plain.endswith(("mlp1_weight", "mlp2_weight"))
        raise SourceError(
            "experts that are not MXFP4: OpenAI's own loader reads .blocks and .scales only"
            if known
            else "OpenAI's gpt-oss has no tensor of this name",
            where=f"{ref.name} ({ref.file})",
            hint="convert from the Hugging Face form of the model instead",
        )
    yield replace(ref, name=found.format(n=number))


def _slices(ref: TensorRef, names: list[str], config: Mapping[str, JSON]) -> Iterator[TensorRef]:
    heads = [config.get(key) for key in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")]
    size = config.get("head_dim")
    rows = [head * size for head in heads if isinstance(head, int) and isinstance(size, int)]
    if len(rows) != len(names) or not ref.spec.shape or ref.spec.shape[0] != sum(rows):
        raise SourceError(
            f"has shape {list(ref.spec.shape)}; expected {' + '.join(map(str, rows)) or 'known'} rows of q, k and v by "
            f"the config's num_attention_heads, num_key_value_heads and head_dim",
            where=f"{ref.name} ({ref.file})",
            hint="the config.json is not that of these weights: download both again",
        )
    offset = ref.offset
    for name, count in zip(names, rows, strict=True):
        spec = TensorSpec(ref.spec.dtype, (count, *ref.spec.shape[1:]))
        yield TensorRef(ref.file, name, spec, offset)
        offset += spec.elements * DTYPE_BYTES[spec.dtype]


# ---- writing


def _rename(part: Part) -> Part:
    plain, number = _split(part.name)
    for openai, theirs in STACKED.items():
        if plain in theirs:
            return replace(part, name=openai.format(n=number), stack=(theirs.index(plain), len(theirs)))
    found = NAMES.get(plain)
    if found is None:
        expert = re.search(r"\.experts\.(gate_up|down)_proj$", plain)
        raise PlanError(
            "OpenAI's loader reads experts in MXFP4 only, this one would stay dense"
            if expert
            else "OpenAI's gpt-oss has no tensor for it",
            where=part.name,
            hint="quantise all experts (--modules experts)" if expert else "leave --layout out",
        )
    return replace(part, name=found.format(n=number))


def _split(name: str) -> tuple[str, str]:
    """('block.{n}.attn.out.bias', '7') of 'block.7.attn.out.bias'."""
    number = _NUMBER.search(name)
    return _NUMBER.sub("{n}", name, count=1), number[0] if number else ""


def _check_whole(names: set[str], config: Mapping[str, JSON]) -> None:
    """OpenAI's loader asks for every parameter of its model by name; PlanError for the first that is not there."""
    layers = config["num_hidden_layers"]
    assert isinstance(layers, int)
    for name in (*NAMES.values(), *STACKED):
        for layer in range(layers) if "{n}" in name else (0,):
            if name.format(n=layer) not in names:
                raise PlanError(
                    "OpenAI's loader needs this tensor, and nothing in the model becomes it",
                    where=name.format(n=layer),
                    hint="the model is incomplete, or has tied embeddings; leave --layout out",
                )


def _listed_dtype(part: Part) -> str:
    if part.kind != PACKED or part.spec.dtype != "U8":
        return "UE8" if part.name.endswith(".scales") else part.spec.dtype
    return "FP4"
