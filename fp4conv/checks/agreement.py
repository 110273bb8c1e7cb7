"""Do configs and tensors say the same, in the words of each server that reads them? From headers and configs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from fp4conv.checks.claims import Claim
from fp4conv.checks.matching import MATCHERS, Asked, Matcher, Undecided, experts_always, held_as
from fp4conv.checks.weights import KV_SCALES, Held
from fp4conv.families import Role, shared_set_of
from fp4conv.faults import Found, Kind
from fp4conv.formats import NVFP4
from fp4conv.layouts.compressed_tensors import FORMATS as CT_FORMATS
from fp4conv.layouts.parts import INPUT_SCALE, PACKED
from fp4conv.layouts.quant_config import HF_QUANT_CONFIG, MODEL_CONFIG

_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")
_NUMBERS = ("4-bit float", "4-bit ?", "?-bit float")  # what E2M1 is called, in whole or in part
# Roles of modules that servers make quantisable layers of; embeddings, norms and routers are never asked about.
_ASKED = frozenset({Role.ATTENTION, Role.MLP, Role.EXPERT, Role.HEAD, Role.ABSORBED})


def agreement_faults(
    weights: Sequence[Held], claims: tuple[Claim | None, Claim | None], layout: str, *, whole: bool = True
) -> Iterator[Found]:
    """`claims`: of config.json and of hf_quant_config.json. `whole`: every file could be read."""
    quantized = [weight for weight in weights if weight.quantized]
    model, separate = claims
    if not quantized:
        if whole and (claim := model or separate):
            said = claim.algorithm or claim.format or claim.method or "quantisation"
            expected = "codes and scales among the tensors, or no such claim"
            yield Found(Kind.CLAIM_WITHOUT_CODES, f"it claims {said}", expected, file=claim.file)
        return
    yield from _sets_in_part(weights)
    if layout == "openai-original":
        return
    if model is None and (separate is None or layout != "modelopt"):
        yield Found(Kind.NO_QUANT_CONFIG, "no quantization_config", f"one for {layout}", file=MODEL_CONFIG)
        return
    if layout == "modelopt":
        yield from _modelopt(quantized, model, separate)
    elif model is not None:
        yield from _other(quantized, model, layout)
    yield from _other_numbers(model)
    yield from _missing_kv_scales(weights, model or separate)
    yield from _ignore_faults(weights, model, separate, layout)
    yield from _missing_inputs(quantized, model, separate, layout)


# ---- sets


def _sets_in_part(weights: Iterable[Held]) -> Iterator[Found]:
    """Sets that servers fuse, and the experts of a layer, of which some are quantised and some are not."""
    sets: dict[str, list[Held]] = {}
    for weight in weights:
        matrix = weight.quantized or linear(weight)
        key = fused_set_of(weight)
        if key and matrix and weight.role is not Role.MTP:
            sets.setdefault(key, []).append(weight)
    for key, members in sets.items():
        formats = {weight.format_name if weight.quantized else "dense" for weight in members}
        if len(formats) > 1:
            odd = next(weight for weight in members if not weight.quantized or weight.format_name != min(formats))
            ref = odd.parts[PACKED] if PACKED in odd.parts else next(iter(odd.parts.values()))
            found = f"{odd.module} is {odd.format_name}, others of {key} are not"
            experts = odd.role is Role.EXPERT
            yield Found(Kind.SET_IN_PART, found, "all of the set alike", ref.name, ref.file, key, experts=experts)


def fused_set_of(weight: Held) -> str | None:
    """What a server holds as one: a set that shares a tensor scale, or all the experts of a layer."""
    if weight.role is Role.EXPERT and ".experts." in weight.module:
        return weight.module.partition(".experts.")[0] + ".experts"
    return shared_set_of(weight.module)


# ---- ModelOpt's two files


def _modelopt(quantized: Sequence[Held], model: Claim | None, separate: Claim | None) -> Iterator[Found]:
    formats = {weight.format_name for weight in quantized}
    if formats != {NVFP4.name} or all("mxfp4" in (claim.algorithm or "") for claim in (model, separate) if claim):
        return  # ModelOpt's MXFP4, which no server reads: that is said elsewhere
    flat = model is not None and not model.nested
    main = model or separate
    assert main is not None
    if not flat:
        weight_only = main.algorithm == "W4A16_NVFP4"
        kind = Kind.NESTED_WEIGHT_ONLY if weight_only else Kind.NESTED_ONLY
        where = HF_QUANT_CONFIG if model is None else "config.json's 'quantization'"
        found = f"{main.algorithm} is said in {where} alone"
        yield Found(kind, found, "quant_algo in config.json's quantization_config", file=MODEL_CONFIG)
    for claim in (model, separate):
        if claim and (claim.algorithm or "").upper() not in _ALGORITHMS:
            expected = " or ".join(_ALGORITHMS)
            yield Found(Kind.WRONG_ALGORITHM, f"quant_algo {claim.algorithm!r}", expected, file=claim.file)
    if model and separate:
        yield from _between(model, separate)
    yield from _group_sizes({weight.block for weight in quantized if weight.block}, model, separate)


def _between(model: Claim, separate: Claim) -> Iterator[Found]:
    """Where the two files say different things."""
    file = separate.file
    if (model.algorithm or "").upper() != (separate.algorithm or "").upper():
        expected = f"{model.algorithm}, as {model.file} says"
        yield Found(Kind.ALGORITHM_DIFFERS, f"quant_algo {separate.algorithm}", expected, file=file)
    if set(model.ignore) != set(separate.ignore):
        apart = sorted(set(model.ignore) ^ set(separate.ignore))
        found = f"its list of excluded modules differs in {len(apart)} entries, such as {apart[0]}"
        yield Found(Kind.IGNORE_LISTS_DIFFER, found, f"the list of {model.file}", file=file)
    if model.kv_cache != separate.kv_cache:
        found = f"KV cache {'quantised' if separate.kv_cache else 'not quantised'}"
        yield Found(Kind.KV_CACHE_DIFFERS, found, f"what {model.file} says", file=file)


def _group_sizes(blocks: set[int], model: Claim | None, separate: Claim | None) -> Iterator[Found]:
    said = {
        (claim.file, size)
        for claim in (model, separate)
        if claim
        for size in (claim.group_size, *claim.group_sizes)
        if size is not None
    }
    expected = f"group_size {', '.join(map(str, sorted(blocks)))}" if blocks else "a group_size"
    first = model or separate
    assert first is not None
    if not said:
        file = " and ".join(claim.file for claim in (model, separate) if claim)
        yield Found(Kind.GROUP_SIZE_MISSING, "no group_size", expected, file=file)
        return
    sizes = {size for _, size in said}
    if len(sizes) > 1:
        words = ", ".join(f"{size} in {file}" for size, file in sorted((size, file) for file, size in said))
        yield Found(Kind.GROUP_SIZE_DIFFERS, f"group_size {words}", expected, file=first.file)
        if blocks and model and model.group_size is not None and model.group_size not in blocks:
            yield Found(Kind.GROUP_SIZE_WRONG, f"group_size {model.group_size}", expected, file=model.file)
    elif blocks and sizes != blocks:
        yield Found(Kind.GROUP_SIZE_WRONG, f"group_size {sizes.pop()}", expected, file=first.file)
    if model and not model.nested and model.group_size is None:
        beside = separate is not None and separate.group_size is not None
        kind = Kind.GROUP_SIZE_NESTED if beside else Kind.GROUP_SIZE_NESTED_ONLY
        yield Found(kind, "no group_size at the top level of quantization_config", "one", file=model.file)


def _other_numbers(claim: Claim | None) -> Iterator[Found]:
    """Groups that promise other numbers than E2M1, and none that promises these."""
    if claim and claim.numbers and not set(claim.numbers) & set(_NUMBERS):
        found = f"config_groups say {', '.join(dict.fromkeys(claim.numbers))}"
        yield Found(Kind.WRONG_ALGORITHM, found, "num_bits 4, type 'float'", file=claim.file)


def _missing_kv_scales(weights: Sequence[Held], claim: Claim | None) -> Iterator[Found]:
    if claim and claim.kv_cache and not any(weight.name.endswith(KV_SCALES) for weight in weights):
        expected = f"k_proj.k_scale and v_proj.v_scale, since {claim.file} says that the KV cache is quantised"
        yield Found(Kind.MISSING_KV_SCALE, "no tensor has a scale of the KV cache", expected, file=claim.file)


# ---- the other layouts


def _other(quantized: Sequence[Held], claim: Claim, layout: str) -> Iterator[Found]:
    formats = sorted({weight.format_name for weight in quantized})
    if layout == "openai":
        if claim.method != "mxfp4":
            yield Found(Kind.WRONG_ALGORITHM, f"quant_method {claim.method!r}", "'mxfp4'", file=claim.file)
        return
    expected = [CT_FORMATS[name] for name in formats]
    if claim.method != "compressed-tensors":
        yield Found(Kind.WRONG_ALGORITHM, f"quant_method {claim.method!r}", "'compressed-tensors'", file=claim.file)
    elif len(expected) == 1 and claim.format not in (expected[0], "mixed-precision"):
        yield Found(Kind.WRONG_ALGORITHM, f"format {claim.format!r}", repr(expected[0]), file=claim.file)
    blocks = {weight.block for weight in quantized if weight.block}
    if claim.group_sizes and len(blocks) == 1 and set(claim.group_sizes) != blocks:
        found = f"group_size {claim.group_sizes[0]}"
        yield Found(Kind.GROUP_SIZE_WRONG, found, f"group_size {blocks.pop()}", file=claim.file)


def _missing_inputs(
    quantized: Sequence[Held], model: Claim | None, separate: Claim | None, layout: str
) -> Iterator[Found]:
    """W4A4 is claimed, and weights lack the scale of their inputs."""
    claim = model or separate
    assert claim is not None
    if layout == "modelopt":
        claimed = claim.algorithm == "NVFP4" and claim.inputs is not False
    else:
        claimed = bool(claim.inputs)
    if not claimed:
        return
    for weight in quantized:
        if weight.table and weight.table.input_scale and INPUT_SCALE not in weight.parts and not weight.faults:
            ref = weight.parts[PACKED]
            name = weight.table.stem_of(weight.name) + weight.table.input_scale
            expected = f"the scale of its inputs, since {claim.file} claims W4A4"
            experts = weight.role is Role.EXPERT
            yield Found(
                Kind.MISSING_INPUT_SCALE, "it is not there", expected, name, ref.file, weight.name, experts=experts
            )


# ---- ignore lists


def _ignore_faults(
    weights: Sequence[Held], model: Claim | None, separate: Claim | None, layout: str
) -> Iterator[Found]:
    """Modules that a server would take for dense though they are quantised, or the other way round."""
    asked = {
        weight.module: weight for weight in weights if weight.role in _ASKED and (weight.quantized or linear(weight))
    }
    groups = held_as(asked)
    for (server, of), matcher in MATCHERS.items():
        claim = (separate or model) if server == "trtllm" else (model or separate)
        if of == layout and claim is not None:
            yield from _by_server(server, matcher, groups, asked, claim)


def linear(weight: Held) -> bool:
    """Whether it is, by name and shape, a matrix of a linear layer, or a matrix an expert in one tensor."""
    shape = weight.shape or ()
    return (len(shape) == 2 and weight.name.endswith(".weight")) or (len(shape) == 3 and weight.role is Role.EXPERT)


def _by_server(
    server: str,
    matcher: Matcher,
    groups: Mapping[Asked, tuple[str, ...]],
    asked: Mapping[str, Held],
    claim: Claim,
) -> Iterator[Found]:
    for module, members in groups.items():
        quantized = [name for name in members if asked[name].quantized]
        if quantized and len(quantized) != len(members):
            continue  # a set in part, which is said elsewhere
        try:
            ignored = matcher(module, claim.ignore)
        except Undecided:
            found, expected = "the list names some of its members and not others", "all of them or none"
        else:
            if bool(quantized) is not ignored:
                continue
            if quantized:
                hit = next((entry for entry in claim.ignore if _takes(matcher, module, entry)), claim.ignore[0])
                found = f"the entry {hit!r} takes it, though it is quantised"
                expected = "entries that take dense modules only"
            elif matcher is experts_always:
                found, expected = "dense, where experts of other layers are not", "all experts in MXFP4, or none"
            else:
                found, expected = "no entry takes it, though it is dense", "an entry for every dense linear layer"
        kind = Kind.QUANTISED_BUT_IGNORED if quantized else Kind.DENSE_BUT_NOT_IGNORED
        if not quantized and matcher is experts_always:
            kind = Kind.DENSE_EXPERTS
        weight = asked[members[0]]
        experts = weight.role is Role.EXPERT
        yield Found(kind, found, expected, module.name, claim.file, weight.name, server=server, experts=experts)


def _takes(matcher: Matcher, module: Asked, entry: str) -> bool:
    try:
        return matcher(module, (entry,))
    except Undecided:
        return True
