"""Figures of models that were never there, as many tensors as a test of the page asks for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fp4conv.formats import BLOCK_FORMATS
from fp4conv.report.facts import ErrorFacts, Estimate, Inspected, TensorFacts, ValueFacts

_SHAPES = {"q_proj": (512, 256), "k_proj": (128, 256), "v_proj": (128, 256), "o_proj": (256, 512)}
_MLP = {"gate_proj": (768, 256), "up_proj": (768, 256), "down_proj": (256, 768)}
E4M3_VALUES = [code * 2.0**-9 if code < 8 else (1 + code % 8 / 8) * 2.0 ** (code // 8 - 7) for code in range(127)]


def error(rng: np.random.Generator, values: int, decibels: float) -> ErrorFacts:
    """About as many dB as said, with figures that belong together."""
    signal = values * 4e-4 * float(rng.uniform(0.5, 2))
    noise = signal / 10 ** ((decibels + float(rng.normal(0, 0.2))) / 10)
    return ErrorFacts(
        values=values,
        signal=signal,
        noise=noise,
        dot=signal - noise / 2,
        power=signal,
        max_abs_error=math.sqrt(noise / values) * 5,
        max_rel_error=1.0,
        differ=values // 2,
    )


def values_of(rng: np.random.Generator, values: int, target: str) -> ValueFacts:
    """The figures of normal numbers in blocks, with a few blocks of zeros."""
    if target not in BLOCK_FORMATS:
        return ValueFacts(smallest=-0.31, largest=0.29, zeros=values // 1000, nan=0)
    blocks = values // BLOCK_FORMATS[target].block
    shares = np.array([0.06, 0.11, 0.1, 0.085, 0.07, 0.055, 0.035, 0.02])
    codes = rng.multinomial(values, np.concatenate([shares, shares]) / (2 * shares.sum()))
    if target == "mxfp4":
        places: list[float] = [float(exponent) for exponent in range(-12, -3)]
        counts = rng.multinomial(blocks, np.exp(-0.7 * (np.arange(len(places)) - 5.0) ** 2) / 3)
    else:
        places = E4M3_VALUES[40:]
        counts = rng.multinomial(blocks, np.exp(-((np.arange(len(places)) - 60) ** 2) / 300) / 40)
    return ValueFacts(
        smallest=-0.3125,
        largest=0.28,
        zeros=int(codes[0] + codes[8]),
        nan=0,
        blocks=blocks,
        zero_blocks=blocks // 500,
        saturated=int(blocks * 0.7),
        unused_range=blocks // 300,
        codes=tuple(int(code) for code in codes),
        scales=tuple((place, int(count)) for place, count in zip(places, counts, strict=True) if count),
        tensor_scale=float(np.float32(1.7e-4)) if target == "nvfp4" else None,
    )


def tensor(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], target: str, *, layer: int | None, kind: str, role: str
) -> TensorFacts:
    values = math.prod(shape)
    bits = BLOCK_FORMATS[target].bits_per_value if target in BLOCK_FORMATS else 16.0
    exact = ErrorFacts(values, 1e6, 0.0, 1e6, 1e6, 0.0, 0.0)
    depth = 0.08 * (layer or 0) - (1.2 if kind == "down_proj" else 0.0)
    return TensorFacts(
        name=name,
        format=target,
        shape=shape,
        bytes=int(values * bits / 8),
        bits_per_weight=bits,
        role=role,
        file="model-00001-of-00002.safetensors",
        layer=layer,
        kind=kind,
        values=values_of(rng, values, target),
        error=error(rng, values, 19.5 + depth) if target in BLOCK_FORMATS else exact,
    )


def model(layers: int, *, experts: int = 0, target: str = "nvfp4", seed: int = 1) -> Inspected:
    """A Llama-like model, or with `experts` a mixture, converted to `target` and compared with its source."""
    rng = np.random.default_rng(seed)
    found = [
        tensor(rng, "model.embed_tokens.weight", (2000, 256), "bf16", layer=None, kind="embed_tokens", role="embedding")
    ]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for kind, shape in _SHAPES.items():
            name = f"{at}.self_attn.{kind}.weight"
            found.append(tensor(rng, name, shape, target, layer=layer, kind=kind, role="attention"))
        for part in (f"experts.{n}." for n in range(experts)) if experts else ("",):
            for kind, shape in _MLP.items():
                name = f"{at}.mlp.{part}{kind}.weight"
                found.append(tensor(rng, name, shape, target, layer=layer, kind=kind, role="mlp"))
        name = f"{at}.input_layernorm.weight"
        found.append(tensor(rng, name, (256,), "bf16", layer=layer, kind="input_layernorm", role="norm"))
    return Inspected(
        source="/models/my-llama-nvfp4",
        format=target,
        layout="modelopt",
        family="llama",
        parameters=sum(math.prod(facts.shape) for facts in found),
        bytes=sum(facts.bytes for facts in found),
        tensors=tuple(found),
        warnings=(),
        reference="/models/my-llama",
    )


def dense(layers: int) -> Inspected:
    """The same in BF16, with what each format and rule would cost."""
    rng = np.random.default_rng(2)
    costs = {"floor": 18.0, "rceil": 17.7, "even": 18.3, "amax": 20.4, "four-over-six": 21.1, "mse": 19.0}
    offers = [(target.name, rule.value) for target in BLOCK_FORMATS.values() for rule in target.rules]

    def estimated(facts: TensorFacts) -> TensorFacts:
        if facts.role not in ("attention", "mlp"):
            return replace(facts, error=None)
        size = math.prod(facts.shape)
        estimates = tuple(
            Estimate(target, rule, error(rng, size, costs[rule] + 2.6 * (target == "nvfp4" and rule == "mse")))
            for target, rule in offers
        )
        return replace(facts, error=None, estimates=estimates)

    made = model(layers, target="bf16")
    tensors = tuple(estimated(facts) for facts in made.tensors)
    return replace(made, source="/models/my-llama", layout="hf", tensors=tensors, reference=None)
