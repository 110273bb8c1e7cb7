"""config.json of gpt-oss, OpenAI's `ModelConfig` and Hugging Face's `GptOssConfig`, each derived from the other.

OpenAI's has sixteen keys; what its model fixes in code (the norm's epsilon, the activation, which layers slide) is
checked on the way out and stated on the way in. Nothing that the other side cannot say is dropped in silence.
Sources: gpt_oss/torch/model.py of github.com/openai/gpt-oss at 0568dfc; the config.json of openai/gpt-oss-20b.
"""

from __future__ import annotations

from collections.abc import Mapping

from fp4conv.errors import PlanError, SourceError
from fp4conv.layouts.quant_config import MODEL_CONFIG
from fp4conv.model import JSON

# OpenAI's key -> Hugging Face's, where only the name differs.
_SAME: Mapping[str, str] = {
    "num_hidden_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit",
    "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
}
# OpenAI's key -> the key in Hugging Face's rope_parameters (rope_scaling before transformers 5).
_ROPE: Mapping[str, str] = {
    "initial_context_length": "original_max_position_embeddings",
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "factor",
    "rope_ntk_alpha": "beta_slow",
    "rope_ntk_beta": "beta_fast",
}
# What ModelConfig takes for keys that a config.json leaves out, sizes aside.
_DEFAULTS: Mapping[str, JSON] = {
    "swiglu_limit": 7.0,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000.0,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1.0,
    "rope_ntk_beta": 32.0,
}
# What OpenAI's model has in code, not in its config.
_FIXED: Mapping[str, JSON] = {
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
_FIXED_MORE: Mapping[str, JSON] = {"swiglu_alpha": 1.702}  # newer configs alone say it
_FIXED_ROPE: Mapping[str, JSON] = {"rope_type": "yarn", "truncate": False}
_UNSAID_ROPE = ("attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor")
_HARMONY_VOCABULARY = 201088
_HARMONY_TOKENS: Mapping[str, JSON] = {"eos_token_id": 200002, "pad_token_id": 199999}


def from_openai(stated: Mapping[str, JSON]) -> tuple[dict[str, JSON], list[str]]:
    """(Hugging Face's config, warnings). SourceError for a key that is missing, unknown, or no number."""
    notes: list[str] = []
    known = {**_SAME, **_ROPE}
    for key, value in stated.items():
        if key not in known:
            raise _source_error(f"has the key {key!r}, which OpenAI's ModelConfig does not have")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _source_error(f"says {key} {value!r}; expected a number")
    filled = dict(stated)
    for key in known:
        if key in filled:
            continue
        if key not in _DEFAULTS:
            raise _source_error(f"has no {key}")
        filled[key] = _DEFAULTS[key]
        notes.append(f"config.json has no {key}: {_DEFAULTS[key]}, OpenAI's default, was taken")
    layers, factor, context = (
        filled["num_hidden_layers"],
        filled["rope_scaling_factor"],
        filled["initial_context_length"],
    )
    assert isinstance(layers, (int, float))
    assert isinstance(factor, (int, float))
    assert isinstance(context, (int, float))
    config: dict[str, JSON] = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", **_FIXED}
    config |= {theirs: filled[key] for key, theirs in _SAME.items()}
    config |= {
        "layer_types": list(_alternating(int(layers))),
        "initial_context_length": context,
        "max_position_embeddings": int(context * factor),
        "rope_scaling": {**_FIXED_ROPE, **{theirs: filled[k] for k, theirs in _ROPE.items() if k != "rope_theta"}},
        "rope_theta": filled["rope_theta"],
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if filled["vocab_size"] == _HARMONY_VOCABULARY:
        config |= _HARMONY_TOKENS
    return config, notes


def to_openai(config: Mapping[str, JSON]) -> dict[str, JSON]:
    """OpenAI's ModelConfig. PlanError for what it cannot say, or for a key that is missing."""
    found = {key: config.get(theirs) for key, theirs in _SAME.items()}
    if found["experts_per_token"] is None:
        found["experts_per_token"] = config.get("experts_per_token")
    rope = _rope(config)
    found |= {key: rope.get(theirs) for key, theirs in _ROPE.items()}
    if found["initial_context_length"] is None:
        found["initial_context_length"] = config.get("initial_context_length")
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            named = {**_SAME, **_ROPE}[key]
            raise _plan_error(f"says {named} {value!r}: OpenAI's {key} cannot be derived from it")
    for key, fixed in _FIXED.items():
        _check(key, config.get(key, fixed), fixed)
    for key, fixed in _FIXED_MORE.items():
        _check(key, config.get(key, fixed), fixed)
    for key, fixed in _FIXED_ROPE.items():
        _check(f"rope_parameters.{key}", rope.get(key), fixed)
    for key in _UNSAID_ROPE:
        _check(f"rope_parameters.{key}", rope.get(key), None)
    layers = found["num_hidden_layers"]
    assert isinstance(layers, (int, float))
    types: JSON = list(_alternating(int(layers)))
    _check("layer_types", config.get("layer_types", types), types)
    return found


def _rope(config: Mapping[str, JSON]) -> dict[str, JSON]:
    """rope_parameters as transformers 5 spells them, also from rope_scaling and rope_theta as 4 did."""
    stated = config.get("rope_parameters") or config.get("rope_scaling")
    rope = dict(stated) if isinstance(stated, dict) else {}
    rope.setdefault("rope_theta", config.get("rope_theta"))
    rope.setdefault("rope_type", rope.get("type"))
    return rope


def _alternating(layers: int) -> tuple[str, ...]:
    """OpenAI's model slides in every even layer."""
    return tuple("sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers))


def _check(key: str, found: JSON, fixed: JSON) -> None:
    if found != fixed:
        raise _plan_error(f"says {key} {found!r}; OpenAI's model has {fixed!r} and no key to say otherwise")


def _plan_error(found: str) -> PlanError:
    hint = "this model has no openai-original form: leave --layout out"
    return PlanError(found, where=MODEL_CONFIG, hint=hint)


def _source_error(found: str) -> SourceError:
    hint = "download the config.json of the folder original/ again"
    return SourceError(found, where=MODEL_CONFIG, hint=hint)
