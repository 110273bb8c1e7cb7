"""What a checkpoint's configs claim about its quantisation, in one value whatever file said it.

ModelOpt writes `hf_quant_config.json` (0.37 only that) and later releases the same again in config.json's
`quantization_config`; both are read, config.json first. The tensors decide what a checkpoint is; a claim is only
compared with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fp4conv.model import JSON, Source
from fp4conv.patterns import compile_bounded, matches

MODEL_CONFIG, HF_QUANT_CONFIG = "config.json", "hf_quant_config.json"


@dataclass(frozen=True)
class QuantConfig:
    """`ignore`: modules said to be unquantised, as exact names, globs, prefixes of dotted names, or 're:PATTERN'.

    `inputs_quantized`: some group of config_groups quantises activations. `block_shape`: FP8's weight_block_size.
    """

    method: str
    algo: str | None = None
    group_size: int | None = None
    ignore: tuple[str, ...] = ()
    format: str | None = None
    inputs_quantized: bool = False
    block_shape: tuple[int, ...] = ()


def read_quant_config(source: Source) -> QuantConfig | None:
    """The claim of config.json's quantization_config, else of hf_quant_config.json, else None."""
    config = source.json(MODEL_CONFIG) or {}
    claim = config.get("quantization_config")
    if isinstance(claim, dict):
        return _from_model_config(claim)
    separate = (source.json(HF_QUANT_CONFIG) or {}).get("quantization")
    return _from_hf_quant_config(separate) if isinstance(separate, dict) else None


def _from_model_config(claim: Mapping[str, JSON]) -> QuantConfig:
    nested = claim.get("quantization")  # some exporters put the hf_quant_config form under config.json's key
    if isinstance(nested, dict):
        return _from_hf_quant_config(nested)
    ignore = claim.get("ignore") or claim.get("modules_to_not_convert") or claim.get("exclude_modules")
    return QuantConfig(
        method=str(claim.get("quant_method") or "unknown"),
        algo=_text(claim.get("quant_algo")),
        group_size=_group_size(claim),
        ignore=_names(ignore),
        format=_text(claim.get("format")),
        inputs_quantized=any(isinstance(group.get("input_activations"), dict) for group in _groups(claim)),
        block_shape=_integers(claim.get("weight_block_size")),
    )


def _from_hf_quant_config(claim: Mapping[str, JSON]) -> QuantConfig:
    return QuantConfig(
        method="modelopt",
        algo=_text(claim.get("quant_algo")),
        group_size=_integer(claim.get("group_size")),
        ignore=_names(claim.get("exclude_modules")),
    )


def _group_size(claim: Mapping[str, JSON]) -> int | None:
    if (top := _integer(claim.get("group_size"))) is not None:
        return top
    for group in _groups(claim):
        weights = group.get("weights")
        if isinstance(weights, dict) and (size := _integer(weights.get("group_size"))) is not None:
            return size
    return None


def _groups(claim: Mapping[str, JSON]) -> list[dict[str, JSON]]:
    groups = claim.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _integers(value: JSON) -> tuple[int, ...]:
    items = value if isinstance(value, list) else []
    return tuple(item for item in items if isinstance(item, int) and not isinstance(item, bool))


def _text(value: JSON) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: JSON) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _names(value: JSON) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def ignored(modules: Iterable[str], entries: Sequence[str]) -> list[str]:
    """Those of `modules` that an ignore list names: exactly, by a glob, by the start of the dotted name, by a pattern.

    A pattern is written 're:PATTERN' and matched from the name's start, as compressed-tensors does; one that is none,
    or could take too long to match (fp4conv.patterns), names nothing.
    """
    taken = [pattern for entry in entries if entry.startswith("re:") and (pattern := _pattern(entry))]
    plain = [entry for entry in entries if not entry.startswith("re:")]

    def is_named(module: str) -> bool:
        by_name = any(module == e or module.startswith(e + ".") or fnmatchcase(module, e) for e in plain)
        return by_name or any(matches(pattern, module) for pattern in taken)

    return [module for module in modules if is_named(module)]


def _pattern(entry: str) -> re.Pattern[str] | None:
    try:
        return compile_bounded(entry.removeprefix("re:"))
    except ValueError:
        return None


def contradictions(claim: QuantConfig, quantized: Mapping[str, int]) -> list[str]:
    """Sentences on where the claim and the tensors differ. `quantized`: module -> block length as the shapes say."""
    found = []
    wrong = ignored(quantized, claim.ignore)
    if wrong:
        found.append(
            f"the quantisation config lists {len(wrong)} modules as unquantised that have codes and scales "
            f"({wrong[0]}, ...): the tensors were believed"
        )
    sizes = set(quantized.values())
    if claim.group_size is not None and sizes and sizes != {claim.group_size}:
        found.append(
            f"the quantisation config says group_size {claim.group_size}, the shapes say "
            f"{', '.join(map(str, sorted(sizes)))}: the shapes were believed"
        )
    return found
