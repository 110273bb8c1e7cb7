"""What each server makes of a fault: one table a server, each row read in a pinned source.

`servers.py` says which sound checkpoints a server loads; this module says what it does with one that is not sound, or
that others understand and it does not. It owns statements and links, and finds nothing itself. What was not read is
not in the table, and then the words of `faults.py` stand.

'run' in a note: tried on a CPU with small models. All else was read in source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fp4conv.faults import Kind
from fp4conv.servers import LINKS, NAMES, SERVERS, VERSIONS, Outcome

Part = Literal["", "linear", "experts"]


@dataclass(frozen=True)
class Checkpoint:
    """What a rule may ask of the checkpoint that has the fault: as `servers.Artifact`."""

    format: str = ""
    layout: str = ""
    family: str = ""


@dataclass(frozen=True)
class Reading:
    """One row: what the server does with a fault of one of `kinds`. An empty tuple is 'any'.

    `part`: only of linear layers, or only of experts. `source` is a link pinned to a commit or a release.
    """

    kinds: tuple[Kind, ...]
    outcome: Outcome
    note: str
    source: str
    part: Part = ""
    layouts: tuple[str, ...] = ()
    families: tuple[str, ...] = ()

    def matches(self, kind: Kind, checkpoint: Checkpoint, *, experts: bool) -> bool:
        return (
            kind in self.kinds
            and self.part in ("", "experts" if experts else "linear")
            and (not self.layouts or checkpoint.layout in self.layouts)
            and (not self.families or checkpoint.family in self.families)
        )


@dataclass(frozen=True)
class Consequence:
    """What one server does with one fault."""

    server: str
    version: str
    outcome: Outcome
    note: str
    source: str


_VLLM, _VLLM_QUANT = LINKS["vllm"], LINKS["vllm"] + "model_executor/layers/quantization/"
_VLLM_LOADER = _VLLM + "model_executor/model_loader/"
_SGLANG, _SGLANG_QUANT = LINKS["sglang"], LINKS["sglang"] + "layers/quantization/"
_HF, _LLAMACPP = LINKS["transformers"], LINKS["llamacpp"]
_TRT_CONFIG, _TRT_LINEAR, _TRT_MOE = LINKS["trtllm-config"], LINKS["trtllm-linear"], LINKS["trtllm-moe"]
_DENSE = ("hf",)
_PACKED = ("modelopt", "compressed-tensors", "openai")
_NV = ("modelopt",)
_CT = ("compressed-tensors",)
_LOST = (Kind.MISSING_TENSOR, Kind.MISSING_EXPERT)
_NOT_WHOLE = (Kind.MISSING_TENSOR, Kind.MISSING_EXPERT, Kind.INCOMPLETE_WEIGHT)
_SHAPES = (Kind.WRONG_SHAPE, Kind.TRANSPOSED_EXPERTS)
_IGNORE = (Kind.QUANTISED_BUT_IGNORED, Kind.DENSE_BUT_NOT_IGNORED)

# The first row of a server that matches counts.
READINGS: Mapping[str, tuple[Reading, ...]] = {
    "vllm": (
        Reading((Kind.MISSING_SHARD,), "refuses", "FileNotFoundError 'Weight files referenced in index but missing'",
                _VLLM_LOADER + "weight_utils.py#L610"),
        Reading((Kind.NOT_IN_INDEX,), "refuses",
                "opens the files that the index names and no other, then misses the parameters (ValueError)",
                _VLLM_LOADER + "weight_utils.py#L615", layouts=_DENSE),
        Reading((Kind.NOT_IN_INDEX,), "silent-damage",
                "opens the files that the index names and no other, and checks for what is missing in unquantised "
                "models alone", _VLLM_LOADER + "default_loader.py#L512"),
        Reading((Kind.WRONG_SHARD,), "loads", "goes by the index for files, and finds the tensor in any of them",
                _VLLM_LOADER + "weight_utils.py#L615"),
        Reading((Kind.MISNAMED_EXPERTS,), "loads",
                "run: takes *_blocks for the experts' weights, and BF16 under these names as under the right ones",
                _VLLM + "model_executor/models/gpt_oss.py#L1382", layouts=_DENSE, families=("gpt-oss",)),
        Reading((*_LOST, Kind.LOST_EXPERTS, Kind.MISNAMED_EXPERTS), "refuses",
                "ValueError: parameters that were not initialised from the checkpoint",
                _VLLM_LOADER + "default_loader.py#L512", layouts=_DENSE),
        Reading((Kind.INCOMPLETE_WEIGHT,), "silent-damage",
                "run: a tensor scale that lacks stays as memory was; where block scales lack, RuntimeError 'was never "
                "loaded (still NaN)'", _VLLM_QUANT + "modelopt.py#L2076", "linear", _NV),
        Reading(_LOST, "refuses", "RuntimeError: weight_scale 'was never loaded (still NaN)'",
                _VLLM_QUANT + "modelopt.py#L2076", "linear", _NV),
        Reading(_NOT_WHOLE, "silent-damage",
                "checks for missing parameters in unquantised models alone: these stay as memory was",
                _VLLM_LOADER + "default_loader.py#L512"),
        Reading(_SHAPES, "refuses",
                "RuntimeError for scales that are wider than the parameter; codes are taken in any order, and what is "
                "smaller goes to a corner of the parameter",
                _VLLM + "model_executor/layers/fused_moe/routed_experts.py#L706", "experts", ("openai",)),
        Reading(_SHAPES, "refuses", "RuntimeError when the turned slice is copied into a parameter of another shape",
                _VLLM + "model_executor/models/gpt_oss.py#L1186", "experts", families=("gpt-oss",)),
        Reading(_SHAPES, "refuses", "AssertionError: the parameter has another shape",
                _VLLM + "model_executor/parameter.py#L172"),
        Reading((Kind.BLOCK_LENGTH,), "refuses", "its NVFP4 kernels take blocks of 16",
                _VLLM_QUANT + "utils/marlin_utils_fp4.py#L29"),
        Reading((Kind.NAN_BLOCK_SCALE,), "refuses",
                "RuntimeError 'weight_scale ... was never loaded (still NaN)', which names a wrong reason",
                _VLLM_QUANT + "modelopt.py#L2076", "linear", _NV),
        Reading((Kind.NAN_BLOCK_SCALE, Kind.OVERFLOWING_BLOCK), "silent-damage",
                "scales are copied as they are: outputs become NaN",
                _VLLM + "model_executor/layers/fused_moe/routed_experts.py#L706", "experts", ("openai",)),
        Reading((Kind.NAN_BLOCK_SCALE,), "silent-damage", "scales of experts are not looked at: outputs become NaN",
                _VLLM_QUANT + "modelopt.py#L985", "experts", _NV),
        Reading((Kind.ZERO_BLOCK_SCALE, Kind.NEGATIVE_BLOCK_SCALE, Kind.OVERFLOWING_BLOCK, Kind.BAD_TENSOR_SCALE),
                "silent-damage", "values of scales are not looked at, but for NaN in linear layers",
                _VLLM_QUANT + "modelopt.py#L2076", layouts=_NV),
        Reading((Kind.TENSOR_SCALES_DIFFER,), "silent-damage",
                "takes the scale of gate for up too, and logs one warning", _VLLM_QUANT + "modelopt.py#L1063",
                "experts", _NV),
        Reading((Kind.TENSOR_SCALES_DIFFER,), "silent-damage",
                "takes the largest for all of the set, and logs one warning", _VLLM_QUANT + "modelopt.py#L2093",
                "linear", _NV),
        Reading((Kind.TENSOR_SCALES_DIFFER,), "silent-damage",
                "takes the scale of gate for up too, and logs one warning",
                _VLLM_QUANT + "compressed_tensors/compressed_tensors_moe/compressed_tensors_moe_w4a4_nvfp4.py#L231",
                "experts", _CT),
        Reading((Kind.TENSOR_SCALES_DIFFER,), "silent-damage",
                "takes the largest reciprocal, so the smallest scale, for all of the set, and logs one warning",
                _VLLM_QUANT + "compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py#L111", "linear", _CT),
        Reading((Kind.INPUT_SCALES_DIFFER,), "loads", "takes the largest, and logs one warning",
                _VLLM_QUANT + "modelopt.py#L2126", "linear", _NV),
        Reading((Kind.MISSING_INPUT_SCALE,), "silent-damage",
                "input_scale is never checked: inputs are scaled by whatever memory held",
                _VLLM_QUANT + "modelopt.py#L2108", layouts=_NV),
        Reading((Kind.SET_IN_PART,), "refuses", "ValueError 'Detected some but not all shards of ... are quantized'",
                _VLLM_QUANT + "utils/quant_utils.py#L680", "linear", _NV),
        Reading((Kind.SET_IN_PART,), "refuses", "ValueError 'Found different quantization schemes for the shards of'",
                _VLLM_QUANT + "compressed_tensors/utils.py#L66", "linear", _CT),
        Reading((Kind.DENSE_EXPERTS, Kind.SET_IN_PART), "refuses",
                "run: RuntimeError: a dense matrix does not fit the parameter that is made for codes",
                _VLLM + "model_executor/layers/fused_moe/routed_experts.py#L706", "experts", ("openai",)),
        Reading((Kind.QUANTISED_BUT_IGNORED,), "refuses",
                "any entry that is a part of the name takes the module ('layers.1' takes 'layers.10'): a dense layer "
                "is made, and its packed weight does not fit", _VLLM_QUANT + "modelopt.py#L213", layouts=_NV),
        Reading((Kind.DENSE_BUT_NOT_IGNORED,), "refuses",
                "a quantised layer is made, and a dense weight does not fit it", _VLLM_QUANT + "modelopt.py#L201",
                layouts=_NV),
        Reading(_IGNORE, "refuses", "the layer is made for the other kind of weight, which does not fit it",
                _VLLM_QUANT + "compressed_tensors/utils.py#L53", layouts=_CT),
        Reading((Kind.NO_QUANT_CONFIG,), "refuses", "takes the model for unquantised, and packed weights do not fit",
                _VLLM + "transformers_utils/model_arch_config_convertor.py#L242"),
        Reading((Kind.CLAIM_WITHOUT_CODES,), "refuses", "makes quantised layers, and dense weights do not fit them",
                _VLLM_QUANT + "modelopt.py#L201"),
        Reading((Kind.ALGORITHM_DIFFERS, Kind.IGNORE_LISTS_DIFFER, Kind.KV_CACHE_DIFFERS, Kind.GROUP_SIZE_DIFFERS),
                "loads", "reads config.json alone where it has a quantization_config",
                _VLLM_LOADER + "weight_utils.py#L240"),
        Reading((Kind.GROUP_SIZE_MISSING, Kind.GROUP_SIZE_NESTED, Kind.GROUP_SIZE_NESTED_ONLY), "loads",
                "takes 16 where none is at the top level", _VLLM_QUANT + "modelopt.py#L814", layouts=_NV),
        Reading((Kind.GROUP_SIZE_WRONG,), "refuses", "block scales have another shape than the parameter",
                _VLLM_QUANT + "modelopt.py#L2058", layouts=_NV),
        Reading((Kind.NESTED_WEIGHT_ONLY,), "refuses", "ValueError 'Unknown ModelOpt quant algo: W4A16_NVFP4'",
                _VLLM + "transformers_utils/model_arch_config_convertor.py#L270"),
        Reading((Kind.NESTED_ONLY,), "loads", "reads the nested form where producer.name is modelopt",
                _VLLM + "transformers_utils/model_arch_config_convertor.py#L255"),
        Reading((Kind.TIED_HEAD_DIFFERS,), "loads",
                "run: keeps both, with a warning; Cohere's models have no head of their own",
                _VLLM + "config/model.py#L1255"),
        Reading((Kind.UNKNOWN_TENSOR,), "refuses", "ValueError: there is no module or parameter of this name",
                _VLLM + "model_executor/models/utils.py#L443", families=("dense",)),
    ),
    "sglang": (
        Reading((Kind.MISSING_SHARD,), "refuses", "an error names the shards that the index has and the folder has not",
                _SGLANG + "model_loader/weight_utils.py#L784"),
        Reading((Kind.NOT_IN_INDEX,), "silent-damage",
                "opens the files that the index names and no other; parameters that are missing are not looked for",
                _SGLANG + "model_loader/weight_utils.py#L807"),
        Reading((Kind.WRONG_SHARD,), "loads", "goes by the index for files, and finds the tensor in any of them",
                _SGLANG + "model_loader/weight_utils.py#L807"),
        Reading((*_NOT_WHOLE, Kind.LOST_EXPERTS, Kind.MISNAMED_EXPERTS), "silent-damage",
                "parameters that no tensor fills stay as memory was", _SGLANG + "models/gpt_oss.py#L1313",
                families=("gpt-oss",)),
        Reading(_NOT_WHOLE, "silent-damage", "parameters that no tensor fills stay as memory was",
                _SGLANG + "models/llama.py#L770"),
        Reading(_SHAPES, "refuses",
                "RuntimeError for scales that are wider than the parameter; codes are taken in any order, and what is "
                "smaller goes to a corner of the parameter",
                _SGLANG + "layers/moe/fused_moe_triton/layer.py#L1185", "experts", ("openai",)),
        Reading((Kind.WRONG_SHAPE,), "refuses", "AssertionError: the parameter has another shape",
                _SGLANG + "layers/parameter.py#L223", "linear"),
        Reading((Kind.BLOCK_LENGTH,), "refuses", "ValueError 'NVFP4 Marlin requires group_size=16'",
                _SGLANG_QUANT + "modelopt_quant.py#L1920", layouts=_NV),
        Reading((Kind.NAN_BLOCK_SCALE, Kind.ZERO_BLOCK_SCALE, Kind.OVERFLOWING_BLOCK, Kind.BAD_TENSOR_SCALE),
                "silent-damage", "values of scales are not looked at", _SGLANG_QUANT + "modelopt_quant.py#L1886",
                layouts=_NV),
        Reading((Kind.TENSOR_SCALES_DIFFER,), "silent-damage",
                "on Marlin and others takes the scale of gate for up too, and logs one warning",
                _SGLANG_QUANT + "modelopt_quant.py#L2747", "experts", _NV),
        Reading((Kind.TENSOR_SCALES_DIFFER,), "silent-damage", "takes the largest for all of the set, without a word",
                _SGLANG_QUANT + "modelopt_quant.py#L1888", "linear", _NV),
        Reading((Kind.TENSOR_SCALES_DIFFER,), "silent-damage",
                "takes the largest reciprocal, so the smallest scale, for all of the set, without a word",
                _SGLANG_QUANT + "compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py#L99", "linear", _CT),
        Reading((Kind.INPUT_SCALES_DIFFER,), "loads", "takes the largest", _SGLANG_QUANT + "modelopt_quant.py#L1887",
                "linear", _NV),
        Reading((Kind.MISSING_INPUT_SCALE,), "silent-damage", "takes 1.0 for a scale that is not there",
                _SGLANG_QUANT + "modelopt_quant.py#L1846", layouts=_NV),
        Reading((Kind.SET_IN_PART,), "refuses", "ValueError 'Detected some but not all shards of ... are quantized'",
                _SGLANG_QUANT + "utils.py#L102", "linear"),
        Reading((Kind.DENSE_EXPERTS, Kind.SET_IN_PART), "silent-damage",
                "run: passes dense experts over; theirs stay as memory was", _SGLANG + "models/gpt_oss.py#L985",
                "experts", ("openai",)),
        Reading((Kind.QUANTISED_BUT_IGNORED,), "refuses",
                "entries take whole paths, prefixes and single parts of a name: a dense layer is made, and its packed "
                "weight does not fit", _SGLANG_QUANT + "modelopt_quant.py#L379", layouts=_NV),
        Reading((Kind.DENSE_BUT_NOT_IGNORED,), "refuses",
                "a quantised layer is made, and a dense weight does not fit it",
                _SGLANG_QUANT + "modelopt_quant.py#L341", layouts=_NV),
        Reading((Kind.ALGORITHM_DIFFERS, Kind.IGNORE_LISTS_DIFFER, Kind.KV_CACHE_DIFFERS, Kind.GROUP_SIZE_DIFFERS),
                "loads", "reads config.json alone where it has a quantization_config",
                _SGLANG + "configs/model_config.py#L1748"),
        Reading((Kind.GROUP_SIZE_MISSING, Kind.GROUP_SIZE_NESTED, Kind.GROUP_SIZE_NESTED_ONLY), "loads",
                "looks at the top level, then in the first group, and else takes 16",
                _SGLANG_QUANT + "modelopt_quant.py#L1640", layouts=_NV),
        Reading((Kind.GROUP_SIZE_WRONG,), "refuses", "block scales have another shape than the parameter",
                _SGLANG_QUANT + "modelopt_quant.py#L1876", layouts=_NV),
        Reading((Kind.NESTED_WEIGHT_ONLY, Kind.NESTED_ONLY), "loads",
                "reads the nested form where there is no flat one", _SGLANG_QUANT + "modelopt_quant.py#L1657",
                layouts=_NV),
        Reading((Kind.TIED_HEAD_DIFFERS,), "loads", "always has a head of its own, and takes what is stored",
                _SGLANG + "models/gpt_oss.py#L768", families=("gpt-oss",)),
        Reading((Kind.TIED_HEAD_DIFFERS,), "loads", "always has a head of its own, and takes what is stored",
                _SGLANG + "models/qwen3_moe.py#L1017", families=("moe",)),
        Reading((Kind.TIED_HEAD_DIFFERS,), "silent-damage", "leaves the head out, and computes with the embeddings",
                _SGLANG + "models/llama.py#L744", families=("dense",)),
        Reading((Kind.TIED_HEAD_DIFFERS,), "silent-damage",
                "leaves the head out with a line in its log, and computes with the embeddings",
                _SGLANG + "models/deepseek_v2.py#L3288", families=("mla-moe",)),
        Reading((Kind.UNKNOWN_TENSOR,), "silent-damage", "logs 'Parameter ... not found in params_dict' and goes on",
                _SGLANG + "models/llama.py#L779", families=("dense",)),
    ),
    "trtllm": (
        Reading((Kind.TENSOR_SCALES_DIFFER,), "silent-damage", "warns, and takes the larger of gate and up",
                _TRT_MOE, "experts", _NV),
        Reading((Kind.TENSOR_SCALES_DIFFER,), "refuses", "an assertion on the tensor scales of fused layers fails",
                _TRT_LINEAR, "linear", _NV),
        Reading((Kind.MISSING_INPUT_SCALE,), "refuses", "KeyError: every expert needs its input_scale", _TRT_MOE,
                "experts", _NV),
        Reading((Kind.MISSING_INPUT_SCALE,), "loads", "scales inputs dynamically where a dense layer has no scale",
                _TRT_LINEAR, "linear", _NV),
        Reading((Kind.GROUP_SIZE_NESTED,), "loads", "reads hf_quant_config.json first, which has it", _TRT_CONFIG,
                layouts=_NV),
        Reading((Kind.GROUP_SIZE_NESTED_ONLY, Kind.GROUP_SIZE_MISSING), "unknown",
                "reads the flat form's top level and goes on with none; what its kernels do then was not read",
                _TRT_CONFIG, layouts=_NV),
        Reading((Kind.ALGORITHM_DIFFERS, Kind.IGNORE_LISTS_DIFFER, Kind.GROUP_SIZE_DIFFERS, Kind.KV_CACHE_DIFFERS),
                "loads", "hf_quant_config.json wins, with a warning", _TRT_CONFIG, layouts=_NV),
    ),
    "transformers": (
        Reading((Kind.MISSING_SHARD,), "refuses", "OSError: it cannot find the file that the index names",
                _HF + "utils/hub.py#L968"),
        Reading((Kind.NOT_IN_INDEX, *_LOST, Kind.LOST_EXPERTS, Kind.MISNAMED_EXPERTS), "silent-damage",
                "a report lists them as MISSING, and random values take their place",
                _HF + "utils/loading_report.py#L213"),
        Reading((Kind.INCOMPLETE_WEIGHT,), "silent-damage",
                "a report lists the parameter as MISSING, and random values take its place",
                _HF + "utils/loading_report.py#L213", layouts=("openai", "compressed-tensors")),
        Reading((Kind.WRONG_SHAPE, Kind.TRANSPOSED_EXPERTS), "refuses",
                "RuntimeError: mismatched sizes, unless ignore_mismatched_sizes", _HF + "utils/loading_report.py#L315"),
        Reading((*_IGNORE, Kind.SET_IN_PART), "silent-damage",
                "where it has kernels for MXFP4, it makes the experts of the layer for the other kind: a report "
                "lists theirs as MISSING, and random values take their place",
                _HF + "integrations/mxfp4.py#L525", "experts", ("openai",)),
        Reading((Kind.TIED_HEAD_DIFFERS,), "loads",
                "run: keeps both, with a warning", _HF + "modeling_utils.py#L2566"),
        Reading((Kind.UNKNOWN_TENSOR,), "loads", "a report lists it as UNEXPECTED",
                _HF + "utils/loading_report.py#L213"),
    ),
    "llamacpp": (
        Reading((Kind.NOT_IN_INDEX, Kind.WRONG_SHARD), "refuses",
                "ValueError 'Mismatch between weight map and model parts for tensor names'",
                _LLAMACPP + "conversion/base.py#L303"),
        Reading((Kind.MISSING_SHARD,), "refuses", "the conversion cannot open the file that the index names",
                _LLAMACPP + "conversion/base.py#L265"),
        Reading((Kind.INCOMPLETE_WEIGHT,), "silent-damage",
                "writes an expert tensor when its scales come by: without them the GGUF lacks it, and is refused later",
                _LLAMACPP + "conversion/gpt_oss.py#L70", "experts", ("openai",)),
        Reading((Kind.TIED_HEAD_DIFFERS,), "loads", "keeps both; of Gemma it leaves the head out",
                _LLAMACPP + "src/models/llama.cpp#L41", families=("dense",)),
        Reading((Kind.TENSOR_SCALES_DIFFER,), "loads", "keeps each weight's own scale",
                _LLAMACPP + "conversion/base.py#L872", layouts=_NV),
        Reading((Kind.QUANTISED_BUT_IGNORED, Kind.DENSE_BUT_NOT_IGNORED), "loads",
                "reads no list: a weight is quantised when its scale is there", _LLAMACPP + "conversion/base.py#L872"),
    ),
}  # fmt: skip


def reading(server: str, kind: Kind, checkpoint: Checkpoint, *, experts: bool) -> Consequence | None:
    """What `server` does with a fault of `kind`; None where nothing was read."""
    for row in READINGS[server]:
        if row.matches(kind, checkpoint, experts=experts):
            return Consequence(server, VERSIONS[server], row.outcome, row.note, row.source)
    return None


def consequences(kind: Kind, checkpoint: Checkpoint, *, experts: bool) -> tuple[Consequence, ...]:
    """What the servers do with a fault, as far as it was read."""
    found = (reading(server, kind, checkpoint, experts=experts) for server in SERVERS)
    return tuple(each for each in found if each is not None)


def readings_as_markdown() -> str:
    """The second table of docs/servers.md: one row a reading, in the order in which they are tried."""
    rows = ["| server | fault | outcome | note | source |", "|---|---|---|---|---|"]
    for server, readings in READINGS.items():
        for row in readings:
            fault = ", ".join(kind.value for kind in row.kinds)
            words = [row.part, "/".join(row.layouts), "/".join(row.families)]
            where = ", ".join(word for word in words if word)
            cells = (
                NAMES[server],
                f"{fault} ({where})" if where else fault,
                f"**{row.outcome}**",
                row.note,
                f"[source]({row.source})",
            )
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
