"""Which server loads a result, and what it makes of it: a table of rules read in pinned sources.

This module owns the statements and their sources. It loads nothing and probes no machine: whether a
GPU has the kernels that a rule names is not its business. Where nothing was read, it says so; silence
is never taken for a yes. `docs/servers.md` renders the table and tells what each reader looks at.

'run' in a note: tried with small models of random weights, on a CPU. All else was read in source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fp4conv.formats import DENSE_FORMATS

SERVERS = ("vllm", "sglang", "trtllm", "transformers", "llamacpp")
NAMES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "trtllm": "TensorRT-LLM",
    "transformers": "transformers",
    "llamacpp": "llama.cpp convert",
}
# What was read. TensorRT-LLM: files of its main branch, each at the commit that the rule's link names.
VERSIONS = {
    "vllm": "0.33.0",
    "sglang": "0.5.23",
    "trtllm": "main, 2026",
    "transformers": "5.23.0",
    "llamacpp": "0c1e57098",
}

Outcome = Literal["loads", "refuses", "silent-damage", "unknown"]


@dataclass(frozen=True)
class Artifact:
    """What `convert` wrote, as far as a server's reader could tell it apart.

    `format`: bf16 | f16 | f32 | mxfp4 | nvfp4. `layout`: hf | openai | modelopt | compressed-tensors |
    openai-original. `family`: a name of `families.FAMILIES`, or unknown. `input_scales`: NVFP4 with
    quantised inputs (W4A4). `k_multiple`: the greatest common divisor of all quantised K. `model_type`:
    that of config.json. `quantised`: last parts of the names of the quantised modules (`kv_b_proj`).
    `dense_experts`: there are experts that are not quantised.
    """

    format: str
    layout: str
    family: str
    input_scales: bool
    k_multiple: int
    model_type: str = ""
    quantised: frozenset[str] = frozenset()
    dense_experts: bool = False


@dataclass(frozen=True)
class Rule:
    """One row: a condition on an artifact and what the server does with it. An empty tuple is 'any'.

    `k_not_multiple_of` holds when K is no multiple of it; `quantised` when one of these modules is; `dense_experts`
    when there are some.
    `source` is a link pinned to a commit or a release.
    """

    server: str
    verdict: Outcome
    note: str
    source: str
    formats: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    input_scales: bool | None = None
    k_not_multiple_of: int | None = None
    model_types: tuple[str, ...] = ()
    quantised: tuple[str, ...] = ()
    dense_experts: bool = False

    @property
    def version(self) -> str:
        return VERSIONS[self.server]

    def matches(self, artifact: Artifact) -> bool:
        return (
            _one_of(artifact.format, self.formats)
            and _one_of(artifact.layout, self.layouts)
            and _one_of(artifact.family, self.families)
            and _one_of(artifact.model_type, self.model_types)
            and self.input_scales in (None, artifact.input_scales)
            and (self.k_not_multiple_of is None or artifact.k_multiple % self.k_not_multiple_of != 0)
            and (not self.quantised or not artifact.quantised.isdisjoint(self.quantised))
            and (not self.dense_experts or artifact.dense_experts)
        )


@dataclass(frozen=True)
class Verdict:
    """What one server does with one artifact. 'silent-damage': it loads, without an error, something else."""

    server: str
    version: str
    outcome: Outcome
    note: str
    source: str

    @property
    def loads(self) -> bool:
        return self.outcome == "loads"


def _one_of(value: str, allowed: Iterable[str]) -> bool:
    allowed = tuple(allowed)
    return not allowed or value in allowed


_VLLM = "https://github.com/vllm-project/vllm/blob/4ba787ec9/vllm/"
_VLLM_QUANT = _VLLM + "model_executor/layers/quantization/"
_SGLANG = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/"
_SGLANG_QUANT = _SGLANG + "layers/quantization/"
_TRTLLM = "https://github.com/NVIDIA/TensorRT-LLM/blob/"
_TRT_CONFIG = _TRTLLM + "008e0af8980fc560003631ba4ac37828836a91c8/tensorrt_llm/_torch/model_config.py"
_TRT_LINEAR = _TRTLLM + "00bbf71e796406ea8593a77cbfb828356182db16/tensorrt_llm/_torch/modules/linear.py"
_TRT_MOE = _TRTLLM + "002366a4074cacd4f7be481727bea2e1eb9136a5/tensorrt_llm/_torch/modules/fused_moe/quantization.py"
_TRT_GPT_OSS = _TRTLLM + "050b6cb92871a4ed73486c5e5a573d4198d1a6d9/tensorrt_llm/_torch/models/modeling_gpt_oss.py"
_TRT_CT = _TRTLLM + "21156a7a57acd21e17feb5c2721c30f035e0f2af/tensorrt_llm/models/quant_config_utils.py"
_HF = "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/"
_LLAMACPP = "https://github.com/ggml-org/llama.cpp/blob/0c1e57098bba43ac29e6e3b677cdceebdd22334f/"

# Where what was read begins: to be followed by a path, but for TensorRT-LLM, whose files are of several commits.
LINKS = {
    "vllm": _VLLM,
    "sglang": _SGLANG,
    "transformers": _HF,
    "llamacpp": _LLAMACPP,
    "trtllm-config": _TRT_CONFIG,
    "trtllm-linear": _TRT_LINEAR,
    "trtllm-moe": _TRT_MOE,
}

_PLAIN = DENSE_FORMATS
_LINEAR = ("dense", "moe", "mla-moe", "encoder")  # families whose quantised weights are linear modules
_EXPERTS = ("moe", "mla-moe")
_CT = ("compressed-tensors",)
_NO_MODEL_TYPE = "OpenAI's config.json has no model_type, so no reader of Hugging Face folders knows the model"
# llama.cpp: graphs that pass NVFP4's tensor scale to every product, and graphs that leave it out of the MLP's.
_LLAMACPP_SCALED = ("llama", "mistral", "qwen3", "ministral3")
_LLAMACPP_UNSCALED = ("qwen2", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "olmo2", "smollm3")

# The first row that matches an artifact is the server's verdict.
RULES: tuple[Rule, ...] = (
    # --- vLLM ---------------------------------------------------------------------------------------------------
    Rule("vllm", "refuses", _NO_MODEL_TYPE, _VLLM + "transformers_utils/config.py#L445", layouts=("openai-original",)),
    Rule("vllm", "loads", "float32 runs in 16 bits unless --dtype float32", _VLLM + "config/model.py#L2440",
         formats=("f32",), layouts=("hf",), families=("gpt-oss", *_LINEAR)),
    Rule("vllm", "loads", "", _VLLM + "model_executor/models/gpt_oss.py#L1147",
         formats=_PLAIN, layouts=("hf",), families=("gpt-oss",)),
    Rule("vllm", "loads", "every parameter must be found, else an error",
         _VLLM + "model_executor/model_loader/default_loader.py#L510",
         formats=_PLAIN, layouts=("hf",), families=_LINEAR),
    Rule("vllm", "refuses", "run: RuntimeError: a dense matrix does not fit the parameter that is made for codes",
         _VLLM + "model_executor/layers/fused_moe/routed_experts.py#L706",
         formats=("mxfp4",), layouts=("openai",), families=("gpt-oss",), dense_experts=True),
    Rule("vllm", "loads", "compute capability 8.0 or later; unknown tensor names are skipped in silence",
         _VLLM + "model_executor/models/gpt_oss.py#L554",
         formats=("mxfp4",), layouts=("openai",), families=("gpt-oss",)),
    Rule("vllm", "refuses",
         "run: KeyError '...experts.w2_bias' (or w13): its ModelOpt experts have no biases, and gpt-oss brings some",
         _VLLM + "model_executor/models/gpt_oss.py#L1213",
         formats=("nvfp4",), layouts=("modelopt",), families=("gpt-oss",)),
    Rule("vllm", "refuses", "in-features that are no multiple of 16", _VLLM_QUANT + "modelopt.py#L2028",
         formats=("nvfp4",), layouts=("modelopt",), k_not_multiple_of=16),
    Rule("vllm", "loads",
         "inputs in FP4 on Blackwell; Marlin, with 16-bit inputs, on other GPUs from capability 7.5",
         _VLLM_QUANT + "modelopt.py#L2098",
         formats=("nvfp4",), layouts=("modelopt",), families=_LINEAR, input_scales=True),
    Rule("vllm", "loads",
         "needs quantization_config in config.json: from hf_quant_config.json alone W4A16_NVFP4 is refused",
         _VLLM + "transformers_utils/model_arch_config_convertor.py#L270",
         formats=("nvfp4",), layouts=("modelopt",), families=_LINEAR, input_scales=False),
    Rule("vllm", "loads",
         "weight-only (Marlin) from capability 8.0; on Blackwell its kernels quantise the inputs to MXFP4 as well",
         _VLLM_QUANT + "compressed_tensors/schemes/compressed_tensors_w4a4_mxfp4.py#L38",
         formats=("mxfp4",), layouts=_CT, families=_LINEAR),
    Rule("vllm", "loads", "", _VLLM_QUANT + "compressed_tensors/compressed_tensors.py#L795",
         formats=("nvfp4",), layouts=_CT, families=_LINEAR),
    # --- SGLang -------------------------------------------------------------------------------------------------
    Rule("sglang", "refuses", _NO_MODEL_TYPE, _SGLANG + "utils/hf_transformers/config.py#L228",
         layouts=("openai-original",)),
    Rule("sglang", "loads", "", _SGLANG + "models/gpt_oss.py#L1143",
         formats=_PLAIN, layouts=("hf",), families=("gpt-oss",)),
    Rule("sglang", "loads", "", _SGLANG + "models/llama.py#L701", formats=_PLAIN, layouts=("hf",), families=("dense",)),
    Rule("sglang", "loads", "", _SGLANG + "models/qwen3_moe.py#L1157",
         formats=_PLAIN, layouts=("hf",), families=_EXPERTS),
    Rule("sglang", "silent-damage", "run: passes dense experts over; theirs stay as memory was",
         _SGLANG + "models/gpt_oss.py#L985",
         formats=("mxfp4",), layouts=("openai",), families=("gpt-oss",), dense_experts=True),
    Rule("sglang", "loads", "compute capability 8.0 or later", _SGLANG + "models/gpt_oss.py#L954",
         formats=("mxfp4",), layouts=("openai",), families=("gpt-oss",)),
    Rule("sglang", "refuses",
         "run: ValueError 'Expected 2D tensors': its ModelOpt experts take one expert at a time, gpt-oss brings all",
         _SGLANG + "layers/moe/fused_moe_triton/layer.py#L902",
         formats=("nvfp4",), layouts=("modelopt",), families=("gpt-oss",)),
    Rule("sglang", "refuses", "in-features that are no multiple of 16", _SGLANG_QUANT + "modelopt_quant.py#L1820",
         formats=("nvfp4",), layouts=("modelopt",), k_not_multiple_of=16),
    Rule("sglang", "refuses",
         "splits kv_b_proj's weight by heads as if it were not packed: leave kv_b_proj unquantised",
         _SGLANG + "models/deepseek_common/deepseek_weight_loader.py#L639",
         formats=("nvfp4", "mxfp4"), families=("mla-moe",), quantised=("kv_b_proj",)),
    Rule("sglang", "loads",
         "Blackwell; other GPUs from capability 8.0 with --fp4-gemm-backend marlin and 16-bit inputs",
         _SGLANG_QUANT + "modelopt_quant.py#L1933",
         formats=("nvfp4",), layouts=("modelopt",), families=("dense", *_EXPERTS), input_scales=True),
    Rule("sglang", "loads", "Marlin, from capability 8.0", _SGLANG_QUANT + "modelopt_quant.py#L2186",
         formats=("nvfp4",), layouts=("modelopt",), families=("dense",), input_scales=False),
    Rule("sglang", "loads",
         "on Blackwell pass --moe-runner-backend marlin: the default quantises the experts' inputs with scale 1.0",
         _SGLANG + "arg_groups/model_overrides/qwen3_moe.py#L86",
         formats=("nvfp4",), layouts=("modelopt",), families=_EXPERTS, input_scales=False),
    Rule("sglang", "refuses",
         "NotImplementedError 'No compressed-tensors compatible scheme was found.' at the first MXFP4 linear layer",
         _SGLANG_QUANT + "compressed_tensors/compressed_tensors.py#L862",
         formats=("mxfp4",), layouts=_CT, families=_LINEAR),
    Rule("sglang", "loads", "", _SGLANG_QUANT + "compressed_tensors/compressed_tensors.py#L754",
         formats=("nvfp4",), layouts=_CT, families=("dense", *_EXPERTS)),
    # --- TensorRT-LLM -------------------------------------------------------------------------------------------
    Rule("trtllm", "loads", "", _TRT_GPT_OSS, formats=_PLAIN, layouts=("hf",), families=("gpt-oss",)),
    Rule("trtllm", "loads", "", _TRT_LINEAR, formats=_PLAIN, layouts=("hf",), families=("dense",)),
    Rule("trtllm", "unknown", "whether the experts of a layer may be dense was not read", _TRT_GPT_OSS,
         formats=("mxfp4",), layouts=("openai",), families=("gpt-oss",), dense_experts=True),
    Rule("trtllm", "loads", "inputs in MXFP8 on Blackwell, in 16 bits on Hopper", _TRT_GPT_OSS,
         formats=("mxfp4",), layouts=("openai",), families=("gpt-oss",)),
    Rule("trtllm", "unknown",
         "two revisions have no NVFP4 branch for gpt-oss (KeyError on the scales), a third, of unknown commit, has",
         _TRT_GPT_OSS, formats=("nvfp4",), layouts=("modelopt",), families=("gpt-oss",)),
    Rule("trtllm", "refuses", "in-features that are no multiple of 16", _TRT_LINEAR,
         formats=("nvfp4",), layouts=("modelopt",), k_not_multiple_of=16),
    Rule("trtllm", "loads", "Blackwell; q/k/v or gate/up whose tensor scales differ fail an assertion", _TRT_LINEAR,
         formats=("nvfp4",), layouts=("modelopt",), families=("dense",), input_scales=True),
    Rule("trtllm", "loads", "Blackwell; every expert needs its input_scale", _TRT_MOE,
         formats=("nvfp4",), layouts=("modelopt",), families=("moe",), input_scales=True),
    Rule("trtllm", "unknown",
         "W4A16_NVFP4 is known to the main branch of 2026 (Hopper and Blackwell); its loader was not read",
         _TRT_CONFIG, formats=("nvfp4",), layouts=("modelopt",), input_scales=False),
    Rule("trtllm", "refuses",
         "'unsupported quant mode': the config reads as W4A16_MXFP4, for which there is no linear layer", _TRT_LINEAR,
         formats=("mxfp4",), layouts=_CT, families=_LINEAR),
    Rule("trtllm", "refuses", "weight-only: input_activations null is indexed (TypeError)", _TRT_CT,
         formats=("nvfp4",), layouts=_CT, input_scales=False),
    # --- transformers -------------------------------------------------------------------------------------------
    Rule("transformers", "refuses", "run: 'Should have a `model_type` key in its config.json'",
         _HF + "models/auto/configuration_auto.py#L452", layouts=("openai-original",)),
    Rule("transformers", "loads", "run", _HF + "modeling_utils.py",
         formats=_PLAIN, layouts=("hf",), families=("gpt-oss", *_LINEAR)),
    Rule("transformers", "loads", "run: dequantised to BF16 where triton or `kernels` is missing; needs accelerate",
         _HF + "quantizers/quantizer_mxfp4.py#L94", formats=("mxfp4",), layouts=("openai",), families=("gpt-oss",)),
    Rule("transformers", "refuses", "run: unknown quantization type 'modelopt' is skipped, then the shapes mismatch",
         _HF + "quantizers/auto.py#L298", formats=("nvfp4",), layouts=("modelopt",)),
    Rule("transformers", "loads", "run, equal logits; needs compressed-tensors >= 0.15, decompresses to BF16",
         _HF + "quantizers/quantizer_compressed_tensors.py", formats=("mxfp4",), layouts=_CT, families=_LINEAR),
    Rule("transformers", "silent-damage", "run: the experts' tensor scales are left out when experts are stacked",
         _HF + "integrations/compressed_tensors.py#L128", formats=("nvfp4",), layouts=_CT, families=_EXPERTS),
    Rule("transformers", "loads", "run, equal logits; needs compressed-tensors >= 0.15, decompresses to BF16",
         _HF + "quantizers/quantizer_compressed_tensors.py",
         formats=("nvfp4",), layouts=_CT, families=("dense", "encoder"), input_scales=False),
    # --- llama.cpp ----------------------------------------------------------------------------------------------
    Rule("llamacpp", "refuses", "run: 'Failed to detect model architecture'",
         _LLAMACPP + "convert_hf_to_gguf.py", layouts=("openai-original",)),
    Rule("llamacpp", "loads", "run (the conversion)", _LLAMACPP + "conversion/base.py#L958",
         formats=_PLAIN, layouts=("hf",), families=("gpt-oss", *_LINEAR)),
    Rule("llamacpp", "loads", "run (the conversion); blocks must come before their scales in the shard",
         _LLAMACPP + "conversion/gpt_oss.py#L67", formats=("mxfp4",), layouts=("openai",), families=("gpt-oss",)),
    Rule("llamacpp", "refuses", "run: the experts' fused names fail (IndexError on a scalar tensor scale)",
         _LLAMACPP + "conversion/gpt_oss.py#L101", formats=("nvfp4",), layouts=("modelopt",), families=("gpt-oss",)),
    Rule("llamacpp", "refuses", "run: 'Quant format 'mxfp4-pack-quantized' ... is not yet supported'",
         _LLAMACPP + "conversion/base.py#L557", formats=("mxfp4",), layouts=_CT, families=_LINEAR),
    Rule("llamacpp", "refuses", "in-features that are no multiple of 64 do not fit its blocks (reshape error)",
         _LLAMACPP + "conversion/base.py#L843", formats=("nvfp4",), k_not_multiple_of=64),
    Rule("llamacpp", "refuses", "run: 'Can not map tensor': per-expert w1, w2, w3 are not gathered",
         _LLAMACPP + "conversion/base.py#L896", formats=("nvfp4",), model_types=("mixtral",)),
    Rule("llamacpp", "refuses",
         "the conversion passes, then the model lacks attn_k_b: leave kv_b_proj unquantised",
         _LLAMACPP + "src/models/deepseek2.cpp#L115",
         formats=("nvfp4",), families=("mla-moe",), quantised=("kv_b_proj",)),
    Rule("llamacpp", "silent-damage", "its graph does not apply the tensor scales of the MLP and of the experts",
         _LLAMACPP + "src/models/deepseek2.cpp#L655", formats=("nvfp4",), families=("mla-moe",)),
    Rule("llamacpp", "silent-damage", "its graph does not apply the tensor scales of the MLP",
         _LLAMACPP + "src/models/qwen2.cpp#L119", formats=("nvfp4",), model_types=_LLAMACPP_UNSCALED),
    Rule("llamacpp", "silent-damage", "its graph does not apply the tensor scales of the experts",
         _LLAMACPP + "src/models/qwen2moe.cpp#L132", formats=("nvfp4",), model_types=("qwen2_moe",)),
    Rule("llamacpp", "silent-damage", "its graph does not apply the tensor scales of the MLP",
         _LLAMACPP + "src/models/bert.cpp#L181", formats=("nvfp4",), families=("encoder",)),
    Rule("llamacpp", "loads", "run (the conversion); an MLP with biases aborts", _LLAMACPP + "conversion/llama.py#L183",
         formats=("nvfp4",), families=("dense",), model_types=_LLAMACPP_SCALED),
    Rule("llamacpp", "loads", "run (the conversion)", _LLAMACPP + "src/models/qwen3moe.cpp#L137",
         formats=("nvfp4",), families=("moe",), model_types=("qwen3_moe",)),
    Rule("llamacpp", "unknown", "whether the tensor scales are applied differs from architecture to architecture",
         _LLAMACPP + "src/llama-graph.cpp#L1777", formats=("nvfp4",)),
)  # fmt: skip


def verdicts(artifact: Artifact) -> tuple[Verdict, ...]:
    """What each server of `SERVERS` does with `artifact`, in that order. Nothing read: it does not count as loading."""
    return tuple(_verdict(server, artifact) for server in SERVERS)


def _verdict(server: str, artifact: Artifact) -> Verdict:
    for rule in RULES:
        if rule.server == server and rule.matches(artifact):
            return Verdict(server, rule.version, rule.verdict, rule.note, rule.source)
    return Verdict(server, VERSIONS[server], "unknown", "not read, no statement", "")


def rules_as_markdown() -> str:
    """The table of docs/servers.md: one row a rule, in the order in which they are tried."""
    rows = ["| server | what | verdict | note | source |", "|---|---|---|---|---|"]
    for rule in RULES:
        cells = (NAMES[rule.server], _condition(rule), f"**{rule.verdict}**", rule.note, f"[source]({rule.source})")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _condition(rule: Rule) -> str:
    words = ["/".join(rule.formats), "/".join(rule.layouts), "/".join(rule.families), "/".join(rule.model_types)]
    if rule.input_scales is not None:
        words.append("W4A4" if rule.input_scales else "W4A16")
    if rule.k_not_multiple_of is not None:
        words.append(f"K % {rule.k_not_multiple_of} != 0")
    if rule.quantised:
        words.append(f"with {'/'.join(rule.quantised)} quantised")
    if rule.dense_experts:
        words.append("with experts of some layers dense")
    return ", ".join(word for word in words if word)
