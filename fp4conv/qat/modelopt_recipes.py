"""ModelOpt's own constants and recipes, as the entries that turn its quantisers on.

What no export of fp4conv could repeat is refused here, before a model is loaded.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from fp4conv.errors import UsageError
from fp4conv.formats import MXFP4, NVFP4
from fp4conv.qat.backend import Recipe

Config: TypeAlias = dict[str, object]
SCALE_BITS: Mapping[str, tuple[int, int]] = {MXFP4.name: (8, 0), NVFP4.name: (4, 3)}
_LARGEST = (None, "max")  # algorithms that leave weights and inputs as they are


def entries_of(recipe: Recipe) -> list[Config]:
    """The `quant_cfg` list of what `recipe.quant_cfg` names.

    Raises UsageError for a name that is none, for another format than the recipe's, for an algorithm that changes
    weights or scales in training (AWQ, SVDQuant, searched scales), and for --include.
    """
    assert recipe.quant_cfg is not None
    config = _named(recipe.quant_cfg)
    algorithm = config.get("algorithm")
    method = algorithm.get("method") if isinstance(algorithm, dict) else algorithm
    if method not in _LARGEST:
        raise UsageError(
            f"--quant-cfg {recipe.quant_cfg} calibrates by {method!r}; fp4conv exports scales by the largest magnitude",
            hint="choose one whose algorithm is max",
        )
    if recipe.include:
        raise UsageError(
            "--include does not go with --quant-cfg and --backend modelopt, whose recipe says what is quantised",
            hint="leave one of them out, or write a recipe of your own and give its path",
        )
    listed = config.get("quant_cfg")
    assert isinstance(listed, list), "a list since ModelOpt 0.40"
    for entry in listed:
        _check_format(recipe, str(entry.get("quantizer_name")), entry.get("cfg"))
    # 'X.weight_quantizer' of a module, 'P_weight_quantizer' of a parameter.
    left_out = [f"*{glob}{sign}*" for glob in recipe.exclude for sign in "._"]
    return [*listed, *({"quantizer_name": name, "enable": False} for name in left_out)]


def kv_cache_of(recipe: Recipe) -> Config | None:
    """How the recipe quantises the KV cache; None where it does not."""
    return _last_of(entries_of(recipe), "model.layers.0.self_attn.k_bmm_quantizer")


def needs_examples(recipe: Recipe) -> bool:
    """Whether calibration has to see examples: for scales of inputs, or of a KV cache that is not just cast."""
    kv_cache = kv_cache_of(recipe)
    if kv_cache is not None and not kv_cache.get("use_constant_amax"):
        return True
    return recipe.format_name == NVFP4.name and any(
        "input_quantizer" in str(entry.get("quantizer_name")) and isinstance(entry.get("cfg"), dict)
        for entry in entries_of(recipe)
    )


def _last_of(entries: list[Config], quantizer: str) -> Config | None:
    """What the last entry that names `quantizer` gives it; None where that turns it off."""
    found: Config | None = None
    for entry in entries:
        if "parent_class" not in entry and fnmatchcase(quantizer, str(entry.get("quantizer_name"))):
            facts = entry.get("cfg")
            on = entry.get("enable", isinstance(facts, dict))
            found = facts if on and isinstance(facts, dict) else found if on else None
    return found


def _named(name: str) -> Config:
    """The configuration of a constant of modelopt.torch.quantization, of a recipe of its library, or of a YAML file."""
    import modelopt.torch.quantization as mtq

    found = getattr(mtq, name, None) if name.endswith("_CFG") else None
    if isinstance(found, dict):
        return dict(found)
    try:
        from modelopt.recipe import load_recipe

        with contextlib.redirect_stdout(sys.stderr):  # it tells what it loads
            quantize = load_recipe(name).quantize
    except (ImportError, AttributeError, ValueError, OSError) as error:
        known = sorted(each for each in dir(mtq) if each.endswith("_CFG") and "FP4" in each)
        raise UsageError(
            f"--quant-cfg {name} is neither a constant of ModelOpt nor a recipe for quantisation: {error}",
            hint=f"choose one of {', '.join(known)}; or a recipe such as general/ptq/nvfp4_mlp_weight_only",
        ) from error
    return dict(quantize.model_dump(exclude_unset=True))


def _check_format(recipe: Recipe, name: str, facts: object) -> None:
    """The format that an entry gives to weights, against the one that is wanted."""
    if not isinstance(facts, dict) or "input_quantizer" in name or "bmm" in name:
        return
    sizes = facts.get("block_sizes")
    bits = sizes.get("scale_bits") if isinstance(sizes, dict) else None
    if bits is None or tuple(bits) != SCALE_BITS[recipe.format_name]:
        raise UsageError(
            f"--quant-cfg {recipe.quant_cfg} is not for --format {recipe.format_name}",
            hint="say the --format that it is for, or choose another --quant-cfg",
        )
