"""What ModelOpt's constants and recipes mean, for a backend that does the same without ModelOpt.

A table: the patterns of quantised modules, and whether inputs are quantised too. It holds those recipes whose result
fp4conv can export: one block format for weights, dynamic blocks, scales by the largest magnitude. Read off
`modelopt_recipes` 0.47 (configs/ptq/presets/model, general/ptq); the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fp4conv.errors import UsageError
from fp4conv.formats import BLOCK_FORMATS, MXFP4, NVFP4, TARGETS
from fp4conv.qat.backend import Recipe

_ALL = ("*",)
_MLP = ("*mlp*", "*block_sparse_moe*")
_MLP_ONLY = (*_MLP, "*.experts.*", "*.mixer.up_proj", "*.mixer.down_proj")
_EXPERTS = ("*block_sparse_moe*", "*.experts.*")


@dataclass(frozen=True)
class Scheme:
    """`patterns` are globs on module names. What is never quantised (lm_head, routers, ...) is said elsewhere."""

    format_name: str
    patterns: tuple[str, ...]
    inputs: bool

    def takes(self, module: str) -> bool:
        return any(fnmatchcase(module, pattern) for pattern in self.patterns)


SCHEMES: Mapping[str, Scheme] = {
    "MXFP4_DEFAULT_CFG": Scheme(MXFP4.name, _ALL, True),
    "MXFP4_MLP_WEIGHT_ONLY_CFG": Scheme(MXFP4.name, _MLP, False),
    "NVFP4_DEFAULT_CFG": Scheme(NVFP4.name, _ALL, True),
    "NVFP4_MLP_WEIGHT_ONLY_CFG": Scheme(NVFP4.name, _MLP, False),
    "NVFP4_MLP_ONLY_CFG": Scheme(NVFP4.name, _MLP_ONLY, True),
    "NVFP4_EXPERTS_ONLY_CFG": Scheme(NVFP4.name, _EXPERTS, True),
    "NVFP4_OMLP_ONLY_CFG": Scheme(NVFP4.name, ("*o_proj", *_MLP, "*.mixer.up_proj", "*.mixer.down_proj"), True),
    "W4A16_NVFP4_CFG": Scheme(NVFP4.name, _ALL, False),
    "general/ptq/mxfp4_mlp_weight_only": Scheme(MXFP4.name, _MLP, False),
    "general/ptq/nvfp4_mlp_weight_only": Scheme(NVFP4.name, _MLP, False),
    "general/ptq/nvfp4_weight_only-kv_fp16": Scheme(NVFP4.name, _ALL, False),
}


def scheme_of(recipe: Recipe) -> Scheme | None:
    """What `recipe.quant_cfg` means, or None where the recipe names none. UsageError for a name not in the table."""
    check_format(recipe.format_name)
    if recipe.quant_cfg is None:
        return None
    scheme = SCHEMES.get(recipe.quant_cfg.removesuffix(".yaml").removesuffix(".yml"))
    if scheme is None:
        raise UsageError(
            f"--quant-cfg {recipe.quant_cfg} is none that --backend fp4conv knows",
            hint=f"choose one of {', '.join(SCHEMES)}; or train with --backend modelopt, on a GPU",
        )
    if scheme.format_name != recipe.format_name:
        raise UsageError(
            f"--quant-cfg {recipe.quant_cfg} is {scheme.format_name}, but --format is {recipe.format_name}",
            hint=f"say --format {scheme.format_name}, or choose another --quant-cfg",
        )
    return scheme


def check_format(name: str) -> None:
    if name not in BLOCK_FORMATS:
        dense = f"; {name} is a target of fp4conv convert" if name in TARGETS else ""
        raise UsageError(f"--format {name} is none to train for{dense}", hint=f"choose {' or '.join(BLOCK_FORMATS)}")
