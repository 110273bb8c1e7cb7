"""adapter_config.json: ranks, scalings, and whatever makes an adapter more than a sum of W and a product.

The fields are those of peft 0.21's LoraConfig. What changes the merged weights in a way that is not computed
here is refused by name; what concerns training alone (dropout, targets, layers) is not looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fp4conv.errors import PlanError, SourceError
from fp4conv.model import JSON, Source
from fp4conv.patterns import LONGEST_NAME, compile_bounded, matches

CONFIG = "adapter_config.json"
_LARGEST_RANK = 2**31 - 1
_LARGEST_NUMBER = 3.4e38  # scalings are F32 in the merge

# Fields that, when set, make the forward pass something else than W + scaling x B A.
_UNSUPPORTED: Mapping[str, str] = {
    "use_qalora": "QALoRA pools the inputs by groups",
    "alora_invocation_tokens": "an activated LoRA works on some tokens only, so it cannot be merged",
    "arrow_config": "Arrow chooses among adapters for each token, so it cannot be merged",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA truncates the base weights and trains singular values",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA",
    "layer_replication": "the adapter was trained on a base with replicated layers",
    "trainable_token_indices": "single rows of the embedding were trained",
    "megatron_config": "an adapter of Megatron's parallel layers",
}
# Ways of initialising that also change the base weights: A and B belong to a base that is not the one given.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """`patterns`: (compiled pattern, value) for ranks and alphas, the first that matches decides."""

    rank: int
    alpha: float
    rank_patterns: tuple[tuple[re.Pattern[str], float], ...]
    alpha_patterns: tuple[tuple[re.Pattern[str], float], ...]
    rslora: bool
    dora: bool
    fan_in_fan_out: bool
    target_parameters: tuple[str, ...]
    peft_version: tuple[int, ...] | None

    def rank_of(self, key: str) -> int:
        return int(_first_match(self.rank_patterns, key, self.rank))

    def scaling_of(self, key: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA; `key` is the module's or parameter's name."""
        rank, alpha = self.rank_of(key), _first_match(self.alpha_patterns, key, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def targets(self, parameter: str) -> bool:
        """Whether peft wrapped this parameter itself (target_parameters), rather than its module."""
        return any(parameter == target or parameter.endswith("." + target) for target in self.target_parameters)


def _first_match(patterns: tuple[tuple[re.Pattern[str], float], ...], key: str, default: float) -> float:
    if patterns and len(key) > LONGEST_NAME:
        raise SourceError(f"a name of {len(key):,} characters is not matched with patterns", where=key[:80])
    return next((value for pattern, value in patterns if matches(pattern, key)), default)


def read_config(adapter: Source) -> AdapterConfig:
    """The config of an adapter's folder. SourceError when it is no LoRA's, PlanError for a variant not merged here."""
    found = adapter.json(CONFIG)
    if found is None:
        raise SourceError(
            f"has no {CONFIG}", where=adapter.name, hint="Give the folder that peft saved the adapter in."
        )
    where = f"{adapter.name}/{CONFIG}"
    if found.get("peft_type") != "LORA":
        raise PlanError(
            f"peft_type is {found.get('peft_type')!r}; only LORA adapters can be merged",
            where=where,
            hint="merge it with the tool that made it, then convert the result",
        )
    _refuse_variants(found, where)
    return AdapterConfig(
        rank=_positive_int(found.get("r"), "r", where),
        alpha=_number(found.get("lora_alpha"), "lora_alpha", where),
        rank_patterns=_patterns(found, "rank_pattern", where),
        alpha_patterns=_patterns(found, "alpha_pattern", where),
        rslora=bool(found.get("use_rslora")),
        dora=bool(found.get("use_dora")),
        fan_in_fan_out=bool(found.get("fan_in_fan_out")),
        target_parameters=_names(found.get("target_parameters"), "target_parameters", where),
        peft_version=_version(found.get("peft_version")),
    )


def _refuse_variants(found: Mapping[str, JSON], where: str) -> None:
    for key, what in _UNSUPPORTED.items():
        if found.get(key):
            raise PlanError(
                f"{key} is set: {what}; such an adapter cannot be merged here",
                where=where,
                hint="merge it with peft, where peft can, then convert the result",
            )
    init = found.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASES):
        raise PlanError(
            f"init_lora_weights is {init!r}, which changed the base weights too: this adapter does not fit the base "
            "that it names",
            where=where,
            hint="save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it an "
            "ordinary LoRA adapter",
        )


def _patterns(found: Mapping[str, JSON], key: str, where: str) -> tuple[tuple[re.Pattern[str], float], ...]:
    table = found.get(key) or {}
    if not isinstance(table, dict):
        raise SourceError(f"{key} is {type(table).__name__}, expected an object of patterns", where=where)
    made = []
    for pattern, value in table.items():
        number = _positive_int(value, key, where) if key == "rank_pattern" else _number(value, key, where)
        try:
            made.append((compile_bounded(rf"(.*\.)?({pattern})$"), float(number)))
        except ValueError as error:
            raise SourceError(
                f"{key} has {pattern[:80]!r}: {error}",
                where=where,
                hint="Write module names, or patterns with few * and +, in its place.",
            ) from error
    return tuple(made)


def _positive_int(value: JSON, key: str, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_RANK:
        return value
    found = repr(value)[:80]
    raise SourceError(f"{key} is {found}, expected a whole number from 1 to {_LARGEST_RANK:,}", where=where)


def _number(value: JSON, key: str, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER:
        return float(value)
    raise SourceError(f"{key} is {repr(value)[:80]}, expected a number", where=where)


def _names(value: JSON, key: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(str(name) for name in value)
    raise SourceError(f"{key} is {value!r}, expected a list of names", where=where)


def _version(value: JSON) -> tuple[int, ...] | None:
    """The numbers of '0.21.2' or '0.19.0.dev0'; None when there is none (peft before 0.18 wrote none)."""
    parts = re.match(r"([0-9]{1,9})\.([0-9]{1,9})", value) if isinstance(value, str) else None
    return (int(parts[1]), int(parts[2])) if parts else None
