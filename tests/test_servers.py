"""The table of servers: complete, without dead rows, pinned, and the same in the docs as in the code."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from fp4conv.families import FAMILIES
from fp4conv.servers import NAMES, RULES, SERVERS, VERSIONS, Artifact, Rule, rules_as_markdown, verdicts

DOC = Path(__file__).resolve().parent.parent / "docs" / "servers.md"
PINNED = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/blob/([0-9a-f]{9,40}|v\d[\w.]*)/[\w./-]+(#L\d+)?")
LAYOUTS = {
    "bf16": ("hf",),
    "f16": ("hf",),
    "f32": ("hf",),
    "mxfp4": ("openai", "openai-original", "compressed-tensors"),
    "nvfp4": ("modelopt", "compressed-tensors"),
}
FAMILY_NAMES = (*(family.name for family in FAMILIES), "unknown")


def artifact(spec: str, *, family: str = "dense", k: int = 128, model_type: str = "", quantised: str = "") -> Artifact:
    """`spec`: 'format layout', then 'W4A4' where the inputs are quantised, 'part' where experts are dense."""
    format_, layout, *more = spec.split()
    inputs, part = "W4A4" in more, "part" in more
    return Artifact(format_, layout, family, inputs, k, model_type, frozenset(quantised.split()), part)


def outcomes(made: Artifact) -> dict[str, str]:
    """Server -> one letter: L loads, D silent damage, - refuses or unknown."""
    return {v.server: "L" if v.loads else "D" if v.outcome == "silent-damage" else "-" for v in verdicts(made)}


def first_match(server: str, made: Artifact) -> Rule | None:
    return next((rule for rule in RULES if rule.server == server and rule.matches(made)), None)


def test_every_artifact_gets_one_verdict_a_server() -> None:
    for format_, family, inputs in product(LAYOUTS, FAMILY_NAMES, (False, True)):
        for layout in LAYOUTS[format_]:
            found = verdicts(Artifact(format_, layout, family, inputs, 128))
            assert tuple(v.server for v in found) == SERVERS
            for verdict in found:
                assert verdict.version == VERSIONS[verdict.server]
                assert verdict.outcome in ("loads", "refuses", "silent-damage", "unknown")
                assert verdict.loads or verdict.note


def test_what_nobody_read_is_no_yes() -> None:
    found = verdicts(Artifact("nvfp4", "modelopt", "unknown", True, 128))
    assert not any(v.loads for v in found)
    vllm = found[0]
    assert (vllm.outcome, vllm.note) == ("unknown", "not read, no statement")
    assert vllm.source == ""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.server}-{RULES.index(rule)}")
def test_no_row_is_shadowed(rule: Rule) -> None:
    """Each row is the first match of some artifact of the grid, so none is dead."""
    formats = rule.formats or tuple(LAYOUTS)
    grid = (
        Artifact(format_, layout, family, inputs, k, model_type, frozenset(rule.quantised[:1]), rule.dense_experts)
        for format_ in formats
        for layout in rule.layouts or LAYOUTS[format_]
        for family in rule.families or FAMILY_NAMES
        for inputs in (False, True)
        for k in ((8,) if rule.k_not_multiple_of else (128,))
        for model_type in rule.model_types or ("",)
    )
    assert any(first_match(rule.server, made) is rule for made in grid)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.server}-{RULES.index(rule)}")
def test_each_row_is_pinned_and_fits_a_table(rule: Rule) -> None:
    assert rule.server in NAMES
    assert PINNED.fullmatch(rule.source), rule.source
    assert "|" not in rule.note
    assert "\n" not in rule.note
    assert set(rule.formats) <= set(LAYOUTS)
    assert set(rule.families) <= set(FAMILY_NAMES)


def test_the_docs_show_this_table() -> None:
    assert rules_as_markdown() in DOC.read_text(encoding="utf-8")


# The cells that a user of each output meets first, in the order of SERVERS: vLLM, SGLang, TensorRT-LLM,
# transformers, llama.cpp. Read in the sources that the rules link; scripts/servers runs what runs without a GPU.
@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (artifact("bf16 hf", family="gpt-oss"), "LLLLL"),
        (artifact("mxfp4 openai", family="gpt-oss"), "LLLLL"),
        (artifact("mxfp4 openai part", family="gpt-oss"), "-D-LL"),
        (artifact("mxfp4 openai-original", family="gpt-oss"), "-----"),
        (artifact("mxfp4 compressed-tensors part", family="moe"), "L--L-"),
        (artifact("nvfp4 modelopt", family="gpt-oss"), "-----"),
        (artifact("nvfp4 modelopt W4A4", family="gpt-oss"), "-----"),
        (artifact("nvfp4 modelopt W4A4", model_type="llama"), "LLL-L"),
        (artifact("nvfp4 modelopt W4A4", model_type="qwen2"), "LLL-D"),
        (artifact("nvfp4 modelopt", model_type="llama"), "LL--L"),
        (artifact("nvfp4 modelopt", model_type="llama", k=96), "LL---"),
        (artifact("nvfp4 modelopt W4A4", family="moe", model_type="qwen3_moe"), "LLL-L"),
        (artifact("nvfp4 modelopt W4A4", family="moe", model_type="mixtral"), "LLL--"),
        (artifact("nvfp4 modelopt W4A4", family="mla-moe"), "LL--D"),
        (artifact("nvfp4 modelopt W4A4", family="mla-moe", quantised="kv_b_proj"), "L----"),
        (artifact("mxfp4 compressed-tensors"), "L--L-"),
        (artifact("mxfp4 compressed-tensors", family="moe"), "L--L-"),
        (artifact("nvfp4 compressed-tensors", family="moe", model_type="qwen3_moe"), "LL-DL"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.format}-{value.layout}-{value.family}",
)
def test_known_cells(made: Artifact, expected: str) -> None:
    assert "".join(outcomes(made)[server] for server in SERVERS) == expected


def test_k_narrower_than_a_block_is_refused_by_name() -> None:
    made = artifact("nvfp4 modelopt W4A4", model_type="llama")
    for k, refused in ((128, set()), (32, {"llamacpp"}), (24, {"vllm", "sglang", "trtllm", "llamacpp"})):
        notes = {v.server: v.note for v in verdicts(replace(made, k_multiple=k))}
        assert {server for server, note in notes.items() if "multiple of" in note} == refused


def test_transformers_knows_these_quant_methods() -> None:
    """The pinned release itself: it has a reader for MXFP4 and compressed-tensors and none for ModelOpt."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ != VERSIONS["transformers"]:
        pytest.skip(f"the rules are of transformers {VERSIONS['transformers']}")
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert {"mxfp4", "compressed-tensors"} <= set(AUTO_QUANTIZER_MAPPING)
    assert "modelopt" not in AUTO_QUANTIZER_MAPPING
