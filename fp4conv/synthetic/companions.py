"""The small files beside the weights: configs that transformers loads, and a tokenizer of single bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from fp4conv.model import JSON
from fp4conv.synthetic.shapes import Geometry

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|pad|>")  # ids 0, 1, 2
BOS, EOS, PAD = range(3)
CONTEXT = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}<|startoftext|>{{ message['role'] }}: {{ message['content'] }}<|endoftext|>"
    "{% endfor %}{% if add_generation_prompt %}<|startoftext|>assistant: {% endif %}\n"
)
# Beside what follows from the geometry.
FAMILY_CONFIG: Mapping[str, Mapping[str, JSON]] = MappingProxyType(
    {
        "gpt-oss": {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "attention_bias": True,
            "rope_theta": 150000.0,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
        },
        "llama": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": 500000.0,
        },
        "qwen3-moe": {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "rope_theta": 1000000.0,
        },
    }
)
MXFP4_CONFIG: Mapping[str, JSON] = MappingProxyType(
    {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
)


def companion_files(geometry: Geometry) -> Mapping[str, str]:
    """File name -> text of everything but the weights and their index."""
    tokens: dict[str, JSON] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    tokenizer: dict[str, JSON] = {
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "pad_token": SPECIAL_TOKENS[PAD],
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "config.json": as_text({**model_config(geometry), **tokens}),
        "generation_config.json": as_text({**tokens, "do_sample": False}),
        "tokenizer.json": as_text(byte_tokenizer()),
        "tokenizer_config.json": as_text(tokenizer),
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def model_config(geometry: Geometry) -> dict[str, JSON]:
    config: dict[str, JSON] = {
        **FAMILY_CONFIG[geometry.family],
        "head_dim": geometry.head_dim,
        "hidden_act": "silu",
        "hidden_size": geometry.hidden,
        "initializer_range": 0.02,
        "intermediate_size": geometry.intermediate,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": geometry.heads,
        "num_hidden_layers": geometry.layers,
        "num_key_value_heads": geometry.kv_heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": geometry.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": geometry.vocab,
    }
    if geometry.experts:
        config["num_experts_per_tok"] = geometry.experts_per_token
    if geometry.family == "gpt-oss":
        config["num_local_experts"] = geometry.experts
        config["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(geometry.layers)]
    if geometry.family == "qwen3-moe":
        config["num_experts"] = geometry.experts
        config["moe_intermediate_size"] = geometry.intermediate
        config["intermediate_size"] = 3 * geometry.hidden  # of a dense layer; there is none
    if geometry.format == "mxfp4":
        config["quantization_config"] = dict(MXFP4_CONFIG)
    return config


def byte_tokenizer() -> dict[str, JSON]:
    """A tokenizer.json that gives each byte a token of its own, after the special ones."""
    plain: dict[str, JSON] = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special: list[JSON] = [
        {"id": number, "content": token, "special": True, **plain} for number, token in enumerate(SPECIAL_TOKENS)
    ]
    symbols = (*SPECIAL_TOKENS, *byte_symbols())
    vocabulary: dict[str, JSON] = {symbol: number for number, symbol in enumerate(symbols)}
    return {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level tokenizer.

    Printable characters of Latin-1 stand for themselves; the other bytes take the characters from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def as_text(value: Mapping[str, JSON]) -> str:
    return json.dumps(value, indent=2) + "\n"
