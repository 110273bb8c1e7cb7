"""What the configs of a checkpoint say of its quantisation, file by file: to be compared, not to be believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fp4conv.layouts.quant_config import HF_QUANT_CONFIG, MODEL_CONFIG
from fp4conv.model import JSON


@dataclass(frozen=True)
class Claim:
    """`nested`: the facts lie in an object 'quantization', as hf_quant_config.json has them.

    `group_size`: at the top level. `group_sizes`: those of the groups' weights. `inputs`: whether some group quantises
    inputs, None where there are no groups. `numbers`: what the groups' weights are, '4-bit float', as far as said.
    `kv_cache`: whether the KV cache is said to be quantised.
    """

    file: str
    nested: bool
    method: str | None
    algorithm: str | None
    group_size: int | None
    group_sizes: tuple[int, ...]
    inputs: bool | None
    numbers: tuple[str, ...]
    ignore: tuple[str, ...]
    kv_cache: bool
    producer: str | None = None
    format: str | None = None

    @property
    def says_something(self) -> bool:
        """Whether it names any quantisation: files of unquantised models may be there with nothing in them."""
        return bool(self.method or self.algorithm or self.format)

    @property
    def size(self) -> int | None:
        """The block length that it says anywhere."""
        return self.group_size if self.group_size is not None else next(iter(self.group_sizes), None)


def read_claims(configs: Mapping[str, Mapping[str, JSON] | None]) -> tuple[Claim | None, Claim | None]:
    """(config.json's quantization_config, hf_quant_config.json)."""
    model = (configs.get(MODEL_CONFIG) or {}).get("quantization_config")
    if model is None:
        model = (configs.get(MODEL_CONFIG) or {}).get("compression_config")
    separate = configs.get(HF_QUANT_CONFIG)
    found = (
        _claim(MODEL_CONFIG, model) if isinstance(model, dict) else None,
        _claim(HF_QUANT_CONFIG, separate) if separate else None,
    )
    model_claim, separate_claim = (claim if claim and claim.says_something else None for claim in found)
    return model_claim, separate_claim


def _claim(file: str, said: Mapping[str, JSON]) -> Claim:
    inside = said.get("quantization")
    nested = isinstance(inside, dict)
    facts: Mapping[str, JSON] = inside if isinstance(inside, dict) else said
    groups = [group for group in _values(said.get("config_groups")) if isinstance(group, dict)]
    weights = [group.get("weights") for group in groups]
    producer = said.get("producer")
    ignore = facts.get("exclude_modules") if nested else facts.get("ignore", facts.get("modules_to_not_convert"))
    return Claim(
        file=file,
        nested=nested,
        method=_text(said.get("quant_method")),
        algorithm=_text(facts.get("quant_algo")),
        group_size=_integer(facts.get("group_size")),
        group_sizes=tuple(
            size
            for held in weights
            if isinstance(held, dict) and (size := _integer(held.get("group_size"))) is not None
        ),
        inputs=any(isinstance(group.get("input_activations"), dict) for group in groups) if groups else None,
        numbers=tuple(words for held in weights if isinstance(held, dict) and (words := _numbers(held))),
        ignore=tuple(entry for entry in ignore if isinstance(entry, str)) if isinstance(ignore, list) else (),
        kv_cache=bool(facts.get("kv_cache_quant_algo") or facts.get("kv_cache_scheme")),
        producer=_text(producer.get("name")) if isinstance(producer, dict) else None,
        format=_text(said.get("format")),
    )


def _numbers(held: Mapping[str, JSON]) -> str:
    """'4-bit float'; '' where it is not said."""
    bits, kind = _integer(held.get("num_bits")), _text(held.get("type"))
    return "" if bits is None and kind is None else f"{bits or '?'}-bit {kind or '?'}"


def _values(found: JSON) -> list[JSON]:
    return list(found.values()) if isinstance(found, dict) else []


def _text(value: JSON) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: JSON) -> int | None:
    return value if type(value) is int else None  # type(): True is an int by isinstance
