"""Which tensors a config promises, and in which shapes, for the model types whose every tensor is known.

One table: a model type -> rows of a name, a shape in the config's own words, and when the row applies. Of any other
type the layers are compared with one another (`layouts.completeness`). Names and shapes are those of the BF16
checkpoint that transformers 5.23.0 saves, whatever the format on disk.
Sources: modeling_*.py of these models in transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fp4conv.model import JSON

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """`name` within a layer, or of the whole model. `shape`: names of sizes (`_SIZES`), 'a*b' for a product.

    `when`: True where the tensor is there; by the config and the layer's number (-1 for the whole model).
    `each`: 'E' where there is one a routed expert, whose number stands for {e}.
    """

    name: str
    shape: tuple[str, ...]
    when: Callable[[Mapping[str, JSON], int], bool] = lambda config, layer: True
    each: str = ""


def _says(key: str, default: bool = False) -> Callable[[Mapping[str, JSON], int], bool]:
    return lambda config, _: bool(config.get(key, default))


def _untied(config: Mapping[str, JSON], _: int) -> bool:
    return not config.get("tie_word_embeddings", False)


def _sparse(config: Mapping[str, JSON], layer: int) -> bool:
    """Whether a layer of Qwen's MoE models has routed experts."""
    dense = config.get("mlp_only_layers")
    step = _integer(config.get("decoder_sparse_step"))
    return not (isinstance(dense, list) and layer in dense) and (layer + 1) % (step or 1) == 0


def _not_sparse(config: Mapping[str, JSON], layer: int) -> bool:
    return not _sparse(config, layer)


_WHOLE = (
    Row("model.embed_tokens.weight", ("vocab", "hidden")),
    Row("model.norm.weight", ("hidden",)),
    Row("lm_head.weight", ("vocab", "hidden"), _untied),
)
_NORMS = (Row("input_layernorm.weight", ("hidden",)), Row("post_attention_layernorm.weight", ("hidden",)))
_ATTENTION = (
    Row("self_attn.q_proj.weight", ("heads*head", "hidden")),
    Row("self_attn.k_proj.weight", ("kv*head", "hidden")),
    Row("self_attn.v_proj.weight", ("kv*head", "hidden")),
    Row("self_attn.o_proj.weight", ("hidden", "heads*head")),
)
_QKV_BIASES = (
    Row("self_attn.q_proj.bias", ("heads*head",)),
    Row("self_attn.k_proj.bias", ("kv*head",)),
    Row("self_attn.v_proj.bias", ("kv*head",)),
)
_O_BIAS = (Row("self_attn.o_proj.bias", ("hidden",)),)
_QK_NORMS = (Row("self_attn.q_norm.weight", ("head",)), Row("self_attn.k_norm.weight", ("head",)))
_MLP = (
    Row("mlp.gate_proj.weight", ("intermediate", "hidden")),
    Row("mlp.up_proj.weight", ("intermediate", "hidden")),
    Row("mlp.down_proj.weight", ("hidden", "intermediate")),
)
_MLP_BIASES = (
    Row("mlp.gate_proj.bias", ("intermediate",)),
    Row("mlp.up_proj.bias", ("intermediate",)),
    Row("mlp.down_proj.bias", ("hidden",)),
)


def _if(when: Callable[[Mapping[str, JSON], int], bool], rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(Row(row.name, row.shape, when, row.each) for row in rows)


_ATTENTION_BIASES = _if(_says("attention_bias"), (*_QKV_BIASES, *_O_BIAS))

LAYERS: Mapping[str, tuple[Row, ...]] = {
    "llama": (*_NORMS, *_ATTENTION, *_ATTENTION_BIASES, *_MLP, *_if(_says("mlp_bias"), _MLP_BIASES)),
    "mistral": (*_NORMS, *_ATTENTION, *_MLP),
    "qwen2": (*_NORMS, *_ATTENTION, *_QKV_BIASES, *_MLP),
    "qwen3": (*_NORMS, *_ATTENTION, *_ATTENTION_BIASES, *_QK_NORMS, *_MLP),
    "qwen3_moe": (
        *_NORMS,
        *_ATTENTION,
        *_ATTENTION_BIASES,
        *_QK_NORMS,
        *_if(_not_sparse, _MLP),
        Row("mlp.gate.weight", ("experts", "hidden"), _sparse),
        Row("mlp.experts.{e}.gate_proj.weight", ("moe", "hidden"), _sparse, "E"),
        Row("mlp.experts.{e}.up_proj.weight", ("moe", "hidden"), _sparse, "E"),
        Row("mlp.experts.{e}.down_proj.weight", ("hidden", "moe"), _sparse, "E"),
    ),
    "mixtral": (
        *_NORMS,
        *_ATTENTION,
        Row("block_sparse_moe.gate.weight", ("experts", "hidden")),
        Row("block_sparse_moe.experts.{e}.w1.weight", ("intermediate", "hidden"), each="E"),
        Row("block_sparse_moe.experts.{e}.w2.weight", ("hidden", "intermediate"), each="E"),
        Row("block_sparse_moe.experts.{e}.w3.weight", ("intermediate", "hidden"), each="E"),
    ),
    "gpt_oss": (
        *_NORMS,
        *_ATTENTION,
        *_if(_says("attention_bias", True), (*_QKV_BIASES, *_O_BIAS)),
        Row("self_attn.sinks", ("heads",)),
        Row("mlp.router.weight", ("experts", "hidden")),
        Row("mlp.router.bias", ("experts",)),
        Row("mlp.experts.gate_up_proj", ("experts", "hidden", "2*intermediate")),
        Row("mlp.experts.gate_up_proj_bias", ("experts", "2*intermediate")),
        Row("mlp.experts.down_proj", ("experts", "intermediate", "hidden")),
        Row("mlp.experts.down_proj_bias", ("experts", "hidden")),
    ),
}

# A size's name -> the keys of config.json that say it; the first that is there counts.
_SIZES: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size",),
    "intermediate": ("intermediate_size",),
    "moe": ("moe_intermediate_size",),
    "vocab": ("vocab_size",),
    "heads": ("num_attention_heads",),
    "kv": ("num_key_value_heads", "num_attention_heads"),
    "head": ("head_dim",),
    "experts": ("num_local_experts", "num_experts"),
    "layers": ("num_hidden_layers",),
}
MOST_LAYERS, MOST_EXPERTS = 10_000, 100_000  # more than any model has; a config cannot make a check count for ever


@dataclass(frozen=True)
class Promise:
    """What a config promises. `shapes`: every tensor -> its shape, with None for a size that the config leaves out.

    `layers`: how many decoder layers; tensors of later ones (prediction heads) are not promised and not strange.
    """

    model_type: str
    layers: int
    shapes: Mapping[str, tuple[int | None, ...]]


def promised(config: Mapping[str, JSON]) -> Promise | None:
    """What `config` promises; None for a model type that is not in the table, or sizes that are no numbers."""
    model_type = config.get("model_type")
    rows = LAYERS.get(model_type) if isinstance(model_type, str) else None
    sizes = _sizes(config)
    layers = 0 if config.get("num_hidden_layers") == 0 else sizes.get("layers")
    if rows is None or layers is None or layers > MOST_LAYERS or sizes.get("experts", 0) > MOST_EXPERTS:
        return None
    shapes = {row.name: _shape(row, sizes) for row in _WHOLE if row.when(config, -1)}
    for layer in range(layers):
        for row in rows:
            if row.when(config, layer):
                for name in _names(row, sizes):
                    shapes[f"model.layers.{layer}.{name}"] = _shape(row, sizes)
    return Promise(str(model_type), layers, shapes)


def odd_sizes(config: Mapping[str, JSON]) -> list[str]:
    """Keys of sizes that are no numbers of anything, for the model types of the table; null is as good as nothing."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in LAYERS:
        return []
    keys = dict.fromkeys(key for keys in _SIZES.values() for key in keys)
    stated = {key: config.get(key) for key in keys}
    return [key for key, size in stated.items() if size is not None and (type(size) is not int or size < 0)]


def _names(row: Row, sizes: Mapping[str, int]) -> Iterator[str]:
    if not row.each:
        yield row.name
        return
    for expert in range(sizes.get("experts", 0)):
        yield row.name.format(e=expert)


def _sizes(config: Mapping[str, JSON]) -> dict[str, int]:
    found = {}
    for name, keys in _SIZES.items():
        stated = (_integer(config.get(key)) for key in keys)
        if (size := next((size for size in stated if size is not None), None)) is not None:
            found[name] = size
    derives = not str(config.get("model_type")).startswith(("qwen3", "gpt_oss"))  # those have a default of their own
    if derives and "head" not in found and found.get("heads") and "hidden" in found:
        found["head"] = found["hidden"] // found["heads"]
    return found


def _shape(row: Row, sizes: Mapping[str, int]) -> tuple[int | None, ...]:
    return tuple(_size(words, sizes) for words in row.shape)


def _size(words: str, sizes: Mapping[str, int]) -> int | None:
    product = 1
    for word in words.split("*"):
        size = int(word) if word.isdigit() else sizes.get(word)
        if size is None:
            return None
        product *= size
    return product


def _integer(value: JSON) -> int | None:
    return value if type(value) is int and value > 0 else None  # type(): True is an int by isinstance
