"""What a tensor is for, told from its name and shape: four tables that a reader can check.

`ROLES` says what each module is, `EXCLUDED` which roles stay unquantised unless named, `SHARED_SETS`
which sibling modules a server runs as one matrix (so they must share an NVFP4 tensor scale and be
quantised all or none), `FAMILIES` what kind of model it is. No model class is imported and no
architecture is looked up: a new model needs a new row, if anything.

Sources of the rows: `packed_modules_mapping` and weight loaders of vLLM's models (docs/servers.md
pins them), the default exclusions of ModelOpt 0.47 (`disabled_quantizers`), and the names that
transformers 5 saves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class Role(str, Enum):
    VISION = "vision"
    AUDIO = "audio"
    PROJECTOR = "projector"
    MTP = "mtp"
    EMBEDDING = "embedding"
    HEAD = "head"
    ROUTER = "router"
    NORM = "norm"
    CONV = "conv"
    SSM = "ssm"
    ABSORBED = "absorbed"
    ADAPTER = "adapter"
    EXPERT = "expert"
    ATTENTION = "attention"
    MLP = "mlp"
    OTHER = "other"


def _part(words: str, *, top: str = "") -> re.Pattern[str]:
    """Matches a dotted name that has one of `words` (a regex alternation) as a whole part, or is one of `top`."""
    whole = rf"|^(model\.)?({top})$" if top else ""
    return re.compile(rf"(^|\.)({words})(\.|$){whole}")


# The first row that matches a module's dotted name decides its role. Towers come first: what is inside
# one is the tower's, whatever its own name.
ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (Role.ADAPTER, _part(r"lora_\w+|base_layer|modules_to_save|original_module")),
    (
        Role.VISION,
        _part(
            r"vision_tower|vision_model|vision|visual|vision_encoder|image_encoder|image_tower|image_newline|"
            r"vision_embed_tokens|vpm|vit|patch_embed\w*"
        ),
    ),
    (
        Role.AUDIO,
        _part(r"audio_tower|audio_model|audio|audio_encoder|speech_encoder|audio_encoder_layer|apm"),
    ),
    (
        Role.PROJECTOR,
        _part(
            r"multi_modal_projector|mm_projector|projector|connector|merger|aligner|embed_vision|embed_audio|"
            r"vision_projection|vision_language_adapter|vision_adapter|resampler|perceiver\w*|mlp1"
        ),
    ),
    (Role.MTP, _part(r"mtp|nextn|eh_proj|shared_head")),
    (Role.CONV, _part(r"\w*conv\w*")),
    (Role.SSM, _part(r"A_log|D|dt_bias|dt_proj|x_proj|in_proj_a|in_proj_b|in_proj_ba|ssm")),
    (Role.NORM, _part(r"\w*[nN]orm\w*|ln_?\w{0,2}|\w+_ln")),
    (
        Role.EMBEDDING,
        _part(
            r"embed_tokens\w*|embeddings?|wte|wpe|tok_embeddings|embed_positions|embed_in|\w+_embeddings?|"
            r"relative_attention_bias",
            top=r"shared",
        ),
    ),
    (
        Role.HEAD,
        # InternLM2 and Meta's own names call the head 'output', which inside a layer is a part of BERT's MLP.
        _part(
            r"lm_head|output_layer|embed_out|score|classifier|qa_outputs|pooler|cls|value_head", top="output|proj_out"
        ),
    ),
    (Role.ROUTER, _part(r"router|gate|shared_expert_gate|indexer")),
    (Role.ABSORBED, _part(r"kv_b_proj")),
    (Role.EXPERT, re.compile(r"(^|\.)experts\.(\d+\.)?\w+")),
    (Role.ATTENTION, _part(r"self_attn|attention|attn|linear_attn|self_attention|cross_attn|mixer")),
    (Role.MLP, _part(r"mlp|feed_forward|ffn|block_sparse_moe|moe|intermediate|output|shared_experts?|fc1|fc2")),
)

# Left as they are unless --include names them: small, sensitive, or not a matrix that servers run in four bits.
EXCLUDED: Mapping[Role, str] = {
    Role.HEAD: "output heads decide the token; servers expect them unquantised",
    Role.EMBEDDING: "a lookup table, not a matrix product",
    Role.NORM: "normalisation vectors",
    Role.ROUTER: "a router's small errors change which expert runs",
    Role.VISION: "vision towers",
    Role.AUDIO: "audio towers",
    Role.PROJECTOR: "projectors between modalities",
    Role.MTP: "multi-token-prediction heads",
    Role.CONV: "convolutions",
    Role.SSM: "state-space parameters",
    Role.ADAPTER: "an adapter's tensors inside the model, and what they are added to",
    Role.ABSORBED: "DeepSeek's kv_b_proj: servers split it by heads (SGLang as if it were dense)",
}

# Modules of one parent that a server stacks into one matrix with one tensor scale.
SHARED_SETS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),  # BERT-like encoders
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),  # Mixtral: w1 = gate, w3 = up
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek's latent attention
    ("in_proj_qkv", "in_proj_z"),  # gated delta nets
    ("c_fc_0", "c_fc_1"),  # EXAONE
)

# --modules NAME -> the roles it selects.
SCOPES: Mapping[str, frozenset[Role]] = {
    "experts": frozenset({Role.EXPERT}),
    "mlp": frozenset({Role.EXPERT, Role.MLP}),
    "all": frozenset({Role.EXPERT, Role.MLP, Role.ATTENTION, Role.OTHER}),
}


@dataclass(frozen=True)
class Family:
    """A kind of model. `marks` are patterns on tensor names that must each match somewhere.

    `experts_kn`: a 3-D expert parameter is stored [E, K, N], K (the in-features) before N.
    `scope`: which `--modules` is the default.
    """

    name: str
    marks: tuple[re.Pattern[str], ...]
    scope: str = "all"
    experts_kn: bool = False


# The first row whose marks all match decides.
FAMILIES: tuple[Family, ...] = (
    Family(
        "gpt-oss",
        (
            re.compile(r"\.mlp\.experts\.(gate_up|down)_proj(_blocks|_scales|_weight_scale)?$"),
            re.compile(r"\.self_attn\.sinks$"),
        ),
        scope="experts",
        experts_kn=True,
    ),
    Family(  # the same model under the names of OpenAI's own code
        "gpt-oss",
        (re.compile(r"^block\.\d+\.mlp\.mlp1_weight"), re.compile(r"^block\.\d+\.attn\.sinks$")),
        scope="experts",
        experts_kn=True,
    ),
    Family("mla-moe", (re.compile(r"\.experts\.\d+\."), re.compile(r"\.kv_a_proj_with_mqa\."))),
    Family("moe", (re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\."),)),
    Family("encoder", (re.compile(r"(^|\.)encoder\.layer\.\d+\.attention\."),)),
    Family("dense", (re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.(self_attn|attention|attn|mlp|feed_forward)\."),)),
)
UNKNOWN = Family("unknown", ())

# Layers of the language model itself: what num_hidden_layers counts, and no tower's or encoder's.
_LAYER = re.compile(r"^(?:(?:model|language_model)\.)*layers\.(\d{1,6})\.")

# Models that store linear weights [in, out] (transformers' Conv1D), and the modules that are such.
IN_OUT_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
IN_OUT_LEAVES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def family_of(names: Iterable[str]) -> Family:
    """The first family all of whose marks match some of `names` (tensor names as stored)."""
    names = list(names)
    for family in FAMILIES:
        if all(any(mark.search(name) for name in names) for mark in family.marks):
            return family
    return UNKNOWN


def module_of(tensor_name: str) -> str:
    """The dotted module (or bare parameter) that a tensor belongs to: what globs and ignore lists name."""
    return tensor_name.removesuffix(".weight").removesuffix(".bias")


def role_of(module: str, layers: int | None = None) -> Role:
    """The role of a module. A layer past `layers` (config num_hidden_layers) is a prediction head (DeepSeek's MTP)."""
    found = _LAYER.search(module)
    if layers and found and int(found[1]) >= layers:
        return Role.MTP
    return next((role for role, pattern in ROLES if pattern.search(module)), Role.OTHER)


# The number of a decoder or encoder layer in a dotted name.
_ANY_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d{1,6})(?:\.|$)")


def layer_of(module: str) -> int | None:
    """The number of the layer that a module lies in; None for what lies in none."""
    found = _ANY_LAYER.search(module)
    return int(found[1]) if found else None


def shared_set_of(module: str) -> str | None:
    """The name of the set that `module` shares a tensor scale with, or None: 'parent.{q_proj,k_proj,v_proj}'."""
    parent, _, leaf = module.rpartition(".")
    for members in SHARED_SETS:
        if leaf in members:
            return f"{parent}.{{{','.join(members)}}}"
    return None


_DIGITS = re.compile(r"([0-9]+)")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which layer 2 comes before layer 10, with numbers of any length."""
    pieces = _DIGITS.split(name)
    pieces[1::2] = [piece.lstrip("0") for piece in pieces[1::2]]
    return tuple((0, len(piece), piece) if i % 2 else (1, 0, piece) for i, piece in enumerate(pieces))
