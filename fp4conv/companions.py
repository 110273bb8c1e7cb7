"""Which small files of a source go along: tokenizer, chat template, generation config, licences.

Never weights in other forms, pickles or trainer state. Python files go along only when config.json's auto_map
names them, as bytes: nothing here or anywhere in fp4conv runs them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fp4conv.hints.values import FOLDER
from fp4conv.model import JSON, Source
from fp4conv.plan import PlannedFile

_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".vocab", ".spm", ".merges")
_PLAIN_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USAGE_POLICY", "COPYING")
# Written anew.
_OURS = ("config.json", "hf_quant_config.json", "dtypes.json")  # the last: of OpenAI's layout
# What belongs to a training run or to another form of the weights.
_NEVER = (
    "trainer_state.json",
    "training_args.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "adapter_config.json",
)
_LARGEST = 64 * 2**20  # tokenizers are below it; a larger .json or .txt is data of some other kind


def companion_files(source: Source, config: Mapping[str, JSON]) -> tuple[tuple[PlannedFile, ...], tuple[str, ...]]:
    """(files to copy, warnings that name what is left out)."""
    code = code_modules(source)
    copied, left = [], []
    for file in source.files:
        name = file.name
        if (
            name in config
            or name in _OURS
            or name in _NEVER
            or name.endswith(".safetensors.index.json")
            or file.weights
        ):
            continue
        if name.startswith(FOLDER + "/"):
            continue  # the planner decides about round-trip hints
        if is_companion(name, file.nbytes, code):
            copied.append(PlannedFile(name, file.nbytes))
        else:
            left.append(name)
    left += [f"{folder}/" for folder in source.folders]
    warnings = (f"not copied: {', '.join(sorted(left))}",) if left else ()
    return tuple(copied), warnings


def is_companion(name: str, nbytes: int, code: Collection[str]) -> bool:
    """Whether a file that has no weights belongs to a checkpoint. `code`: modules that its configs name."""
    if name in _NEVER or nbytes > _LARGEST:
        return False
    plain = name.endswith(_SUFFIXES) or name.split(".", maxsplit=1)[0].upper() in _PLAIN_NAMES
    return plain or (name.endswith(".py") and name.removesuffix(".py") in code)


def code_modules(source: Source) -> set[str]:
    """Modules of code of its own that the configs of a checkpoint name."""
    configs = (source.json("config.json"), source.json("tokenizer_config.json"))
    return {module for config in configs for module in _auto_map_modules(config or {})}


def _auto_map_modules(config: Mapping[str, JSON]) -> set[str]:
    """Module names in values such as 'modeling_x.XForCausalLM' or ['tokenization_x.XTokenizer', null]."""
    auto_map = config.get("auto_map")
    found: set[str] = set()
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                found.add(item.rpartition("--")[2].partition(".")[0])
    return found
