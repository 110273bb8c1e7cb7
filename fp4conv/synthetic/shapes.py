"""The layer shapes of three real families, and the model of one of them that comes nearest to a size.

Shapes are those of the published config.json of gpt-oss-20b, Llama-3.2-1B and Qwen3-30B-A3B. Where a size is too
small for them, first the vocabulary, the layers and the experts become fewer, then the layers narrower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType

from fp4conv.errors import UsageError
from fp4conv.safetensors_io import TensorSpec

FORMATS = ("bf16", "mxfp4")
MIN_VOCAB = 512  # more than the 259 tokens of the byte tokenizer that comes along
VOCAB_STEP = 64
MIN_LAYERS = 2
MIN_EXPERTS = 4
VOCAB_SHARE = 0.15  # of the bytes, where the whole vocabulary would take more


class Fill(Enum):
    """What kind of values a tensor holds."""

    WEIGHT = "weight"  # around zero: outliers, exact zeros, magnitudes that differ from row to row
    NORM = "norm"  # a little above one
    CODES = "codes"  # packed MXFP4 codes
    SCALES = "scales"  # E8M0 bytes


@dataclass(frozen=True)
class Tensor:
    """One tensor to write. `weight` names the weight that it is a part of: its own name unless quantised."""

    name: str
    spec: TensorSpec
    fill: Fill
    weight: str


@dataclass(frozen=True)
class Geometry:
    """The numbers from which every shape of a model follows."""

    family: str
    format: str
    hidden: int
    intermediate: int  # of one expert where there are experts
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    experts: int  # 0: a dense model
    experts_per_token: int
    tied: bool  # the embedding is the output matrix too


FAMILIES = MappingProxyType(
    {
        "gpt-oss": Geometry("gpt-oss", "bf16", 2880, 2880, 64, 8, 64, 24, 201088, 32, 4, False),
        "llama": Geometry("llama", "bf16", 2048, 8192, 32, 8, 64, 16, 128256, 0, 0, True),
        "qwen3-moe": Geometry("qwen3-moe", "bf16", 2048, 768, 32, 4, 128, 48, 151936, 128, 8, False),
    }
)


def fit(family: str, format: str, nbytes: int) -> Geometry:
    """The widest model of `family` whose tensors come to about `nbytes` bytes, in `format`."""
    if family not in FAMILIES:
        raise UsageError(f"unknown family {family!r}", hint=f"Choose one of {', '.join(FAMILIES)}.")
    if format not in FORMATS or (format == "mxfp4" and family != "gpt-oss"):
        hint = "bf16 for any family, mxfp4 for gpt-oss."
        raise UsageError(f"no synthetic {family} checkpoint in {format!r}", hint=hint)
    real = replace(FAMILIES[family], format=format)
    candidates = [smallest(real, divisor) for divisor in (1, 2, 4, 8, 16)]
    chosen = next((one for one in candidates if model_bytes(one) <= nbytes), candidates[-1])
    while chosen.experts < real.experts:
        more = with_experts(chosen, min(real.experts, 2 * chosen.experts), real)
        if model_bytes(more) > nbytes:
            break
        chosen = more
    row_bytes = 2 * chosen.hidden * (1 if chosen.tied else 2)
    chosen = replace(chosen, vocab=vocab_for(int(nbytes * VOCAB_SHARE), row_bytes, real))
    bare = model_bytes(replace(chosen, layers=0))
    layers = (nbytes - bare) // (model_bytes(replace(chosen, layers=1)) - bare)
    chosen = replace(chosen, layers=max(MIN_LAYERS, layers))
    left = nbytes - model_bytes(replace(chosen, vocab=0))
    return replace(chosen, vocab=vocab_for(left, row_bytes, real))


def smallest(real: Geometry, divisor: int) -> Geometry:
    """`real` made `divisor` times narrower, with the fewest layers, experts and tokens; widths stay whole blocks."""
    kv_heads = max(1, real.kv_heads // divisor)
    few = replace(
        real,
        hidden=-(-real.hidden // divisor // 32) * 32,
        intermediate=-(-real.intermediate // divisor // 32) * 32,
        heads=max(kv_heads, real.heads // divisor),
        kv_heads=kv_heads,
        layers=MIN_LAYERS,
        vocab=MIN_VOCAB,
    )
    return with_experts(few, min(MIN_EXPERTS, real.experts), real)


def with_experts(geometry: Geometry, experts: int, real: Geometry) -> Geometry:
    return replace(geometry, experts=experts, experts_per_token=min(real.experts_per_token, experts // 2))


def vocab_for(nbytes: int, row_bytes: int, real: Geometry) -> int:
    """As many tokens as `nbytes` hold, from MIN_VOCAB to the family's own number."""
    return min(real.vocab, max(MIN_VOCAB, nbytes // row_bytes // VOCAB_STEP * VOCAB_STEP))


def model_bytes(geometry: Geometry) -> int:
    """Bytes of all tensors. Layers are alike, so two of them tell the sum for any number."""
    if geometry.layers > 1:
        bare, one = (model_bytes(replace(geometry, layers=layers)) for layers in (0, 1))
        return bare + geometry.layers * (one - bare)
    return sum(tensor.spec.nbytes for tensor in model_tensors(geometry))


def model_tensors(geometry: Geometry) -> list[Tensor]:
    """Every tensor of the model, in the order of its modules, by the names that transformers uses."""
    rows = (geometry.vocab, geometry.hidden)
    tensors = [weight("model.embed_tokens.weight", *rows)]
    for layer in range(geometry.layers):
        prefix = f"model.layers.{layer}."
        tensors += attention(geometry, prefix + "self_attn.")
        tensors += feed_forward(geometry, prefix + "mlp.")
        tensors += [norm(f"{prefix}{name}.weight", geometry.hidden) for name in NORMS]
    tensors.append(norm("model.norm.weight", geometry.hidden))
    if not geometry.tied:
        tensors.append(weight("lm_head.weight", *rows))
    return tensors


NORMS = ("input_layernorm", "post_attention_layernorm")


def attention(geometry: Geometry, prefix: str) -> Iterator[Tensor]:
    queries = geometry.heads * geometry.head_dim
    keys = geometry.kv_heads * geometry.head_dim
    biased = geometry.family == "gpt-oss"
    for name, rows, columns in (
        ("q_proj", queries, geometry.hidden),
        ("k_proj", keys, geometry.hidden),
        ("v_proj", keys, geometry.hidden),
        ("o_proj", geometry.hidden, queries),
    ):
        yield weight(f"{prefix}{name}.weight", rows, columns)
        if biased:
            yield weight(f"{prefix}{name}.bias", rows)
    if geometry.family == "gpt-oss":
        yield weight(f"{prefix}sinks", geometry.heads)
    if geometry.family == "qwen3-moe":
        yield norm(f"{prefix}q_norm.weight", geometry.head_dim)
        yield norm(f"{prefix}k_norm.weight", geometry.head_dim)


def feed_forward(geometry: Geometry, prefix: str) -> Iterator[Tensor]:
    hidden, inner, experts = geometry.hidden, geometry.intermediate, geometry.experts
    if geometry.family == "gpt-oss":
        yield weight(f"{prefix}router.weight", experts, hidden)
        yield weight(f"{prefix}router.bias", experts)
        yield from fused_experts(geometry, f"{prefix}experts.gate_up_proj", 2 * inner, hidden)
        yield from fused_experts(geometry, f"{prefix}experts.down_proj", hidden, inner)
        return
    modules = [f"{prefix}experts.{expert}." for expert in range(experts)] or [prefix]
    if experts:
        yield weight(f"{prefix}gate.weight", experts, hidden)
    for module in modules:
        yield weight(f"{module}gate_proj.weight", inner, hidden)
        yield weight(f"{module}up_proj.weight", inner, hidden)
        yield weight(f"{module}down_proj.weight", hidden, inner)


def fused_experts(geometry: Geometry, name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """All experts of one gpt-oss projection [N, K]: BF16 as [E, K, N], MXFP4 as [E, N, K/32, 16] and [E, N, K/32]."""
    experts = geometry.experts
    if geometry.format == "mxfp4":
        grid = (experts, rows, columns // 32)
        yield Tensor(f"{name}_blocks", TensorSpec("U8", (*grid, 16)), Fill.CODES, name)
        yield Tensor(f"{name}_scales", TensorSpec("U8", grid), Fill.SCALES, name)
    else:
        yield weight(name, experts, columns, rows)
    yield weight(f"{name}_bias", experts, rows)


def weight(name: str, *shape: int) -> Tensor:
    return Tensor(name, TensorSpec("BF16", shape), Fill.WEIGHT, name)


def norm(name: str, size: int) -> Tensor:
    return Tensor(name, TensorSpec("BF16", (size,)), Fill.NORM, name)
