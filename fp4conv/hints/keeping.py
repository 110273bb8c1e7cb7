"""Plan the hints of a dense result: what is copied at known places, what is noted, and how large it can get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fp4conv.formats import BLOCK_FORMATS, MXFP4
from fp4conv.hints.values import (
    BESIDE,
    FACTS,
    FACTS_VERSION,
    INDEX_BYTES,
    PARTS,
    RECORDS,
    Hint,
    Hints,
    Kept,
    block_scale_name,
    calibration_name,
    tensor_scale_name,
)
from fp4conv.layouts.parts import Part
from fp4conv.layouts.quant_config import HF_QUANT_CONFIG, MODEL_CONFIG
from fp4conv.model import FLOAT_DTYPES, JSON, Decoded, LoraMerged, Model, Source, Stored, Weight
from fp4conv.plan import Action, Output, PlannedFile, Step
from fp4conv.safetensors_io import ShardLayout, TensorRef, TensorSpec, lay_out

HINT = "hint"  # the kind of a part that is a hint


@dataclass(frozen=True)
class Beside:
    """Steps and shards of a dense result with those of its hints, what is noted, and small files."""

    steps: tuple[Step, ...]
    shards: Mapping[str, ShardLayout]
    kept: Kept | None = None
    files: tuple[PlannedFile, ...] = ()


def with_hints(model: Model, steps: tuple[Step, ...], shards: Mapping[str, ShardLayout], version: str) -> Beside:
    """What a conversion to a dense format keeps of the formats that it decodes; or what a dense source kept itself."""
    decoded = {step.key: step.weight for step in steps if _is_hinted(step) and step.weight}
    if any(isinstance(weight.base, Decoded) for weight in model.weights):
        return _keep(model, decoded, steps, shards, version)
    return _carry(model.source, steps, shards)


def _keep(
    model: Model,
    decoded: Mapping[str, Weight],
    steps: Sequence[Step],
    shards: Mapping[str, ShardLayout],
    version: str,
) -> Beside:
    """NVFP4's block scales and tensor scale are copied with their weight, scales of activations in steps of their own:
    their places are known. What the kernels note of other blocks has no place before it is counted.
    """
    copies = {key: _copies(weight) for key, weight in decoded.items()}
    loose = {BESIDE + name: [(calibration_name(name), ref)] for name, ref in model.calibration.items()}
    named = [(name, ref.spec) for refs in (*copies.values(), *loose.values()) for name, ref in refs]
    files = dict(shards)
    offsets: dict[str, int] = {}
    if named:
        files[PARTS] = lay_out(named, file=PARTS)
        offsets = {ref.name: ref.offset for ref in files[PARTS].tensors}

    def outputs(refs: Sequence[tuple[str, TensorRef]]) -> tuple[Output, ...]:
        return tuple(Output(Part(HINT, name, ref.spec), PARTS, offsets[name], ref) for name, ref in refs)

    hinted = [
        replace(step, outputs=(*step.outputs, *outputs(copies.get(step.key, ()))), beside=_beside(step, decoded))
        for step in steps
    ]
    hinted += [Step(key, Action.COPY, outputs(refs), "f32") for key, refs in loose.items()]
    return Beside(tuple(hinted), files, _kept(model, decoded, hinted, version))


def _is_hinted(step: Step) -> bool:
    weight = step.weight
    return (
        step.action is Action.DEQUANTIZE
        and weight is not None
        and isinstance(weight.value, Decoded)
        and weight.value.format_name in BLOCK_FORMATS
    )


def _is_merged(weight: Weight) -> bool:
    return isinstance(weight.value, LoraMerged)


def _copies(weight: Weight) -> list[tuple[str, TensorRef]]:
    value = weight.value
    assert isinstance(value, Decoded)
    if value.tensor_scale is None:
        return []
    return [(block_scale_name(weight.name), value.block_scale), (tensor_scale_name(weight.name), value.tensor_scale)]


def _blocks(weight: Weight) -> int:
    """How many blocks a weight's hints count."""
    value = weight.value
    assert isinstance(value, Decoded)
    return weight.elements // value.format.block


def with_room(steps: Sequence[Step], hints: Hints) -> tuple[Step, ...]:
    """The steps that will ask a hint, with the memory that takes."""
    return tuple(
        replace(step, beside=_room(step.weight, hints.weights[step.weight.name]))
        if step.weight is not None and step.action is Action.QUANTIZE and step.weight.name in hints.weights
        else step
        for step in steps
    )


def _room(weight: Weight, hint: Hint) -> int:
    """Planes of scales, their numbers, and where codes were noted those."""
    blocks = weight.elements // hint.format.block
    return blocks * (24 + (hint.format.block if hint.codes is not None else 0))


def _beside(step: Step, decoded: Mapping[str, Weight]) -> int:
    """Bytes that a worker holds for the hints of a whole weight: the plane of scales, and numbers of blocks."""
    return 24 * _blocks(decoded[step.key]) if step.key in decoded else step.beside


def _kept(model: Model, decoded: Mapping[str, Weight], steps: Sequence[Step], version: str) -> Kept:
    blocks = {key: _blocks(weight) for key, weight in decoded.items()}
    formats = {key: BLOCK_FORMATS[weight.format_name] for key, weight in decoded.items()}
    # A dense plane or fewer sparse records, once in the log and once in its final place.
    planes = 2 * sum(count for key, count in blocks.items() if formats[key] is MXFP4)
    # BF16 and F32 hold every MXFP4 value apart from every other, so no code needs to be noted there.
    telling = {step.key for step in steps if step.target in ("bf16", "f32")}
    unsure = {key: count for key, count in blocks.items() if formats[key] is not MXFP4 or key not in telling}
    codes = sum(count * (formats[key].block // 2 + INDEX_BYTES) for key, count in unsure.items())
    return Kept(formats, _facts(model, decoded, steps, version), planes, 2 * codes)


def _facts(model: Model, decoded: Mapping[str, Weight], steps: Sequence[Step], version: str) -> dict[str, JSON]:
    """What FACTS says but for the digests of the data."""
    weights: dict[str, JSON] = {}
    targets = {step.key: step.target.upper() for step in steps}
    for key, weight in decoded.items():
        value = weight.value
        assert isinstance(value, Decoded)
        facts: dict[str, JSON] = {
            "format": value.format_name,
            "block": value.block,
            "shape": list(weight.shape),
            "dtype": targets[key],
        }
        lies = {"kn": value.kn, "inverse": value.inverse}
        weights[weight.name] = {**facts, **{how: True for how, so in lies.items() if so}}
    dense: dict[str, JSON] = {}
    for dtype in FLOAT_DTYPES:
        names: list[JSON] = [
            w.name for w in model.weights if isinstance(w.base, Stored) and w.base.ref.spec.dtype == dtype
        ]
        if names:
            dense[dtype] = names
    claims: dict[str, JSON] = {
        MODEL_CONFIG: model.config.get("quantization_config"),
        HF_QUANT_CONFIG: model.source.json(HF_QUANT_CONFIG),
    }
    return {
        "fp4conv_hints": FACTS_VERSION,
        "written_by": f"fp4conv {version}",
        "layout": model.layout,
        "config_dtype": model.config.get("dtype") or model.config.get("torch_dtype"),
        "quantization": {name: claim for name, claim in claims.items() if claim is not None},
        "weights": weights,
        "merged": {w.name: w.base.format_name for w in model.weights if _is_merged(w) and isinstance(w.base, Decoded)},
        "calibration": list(model.calibration),
        "inverse": any(isinstance(w.base, Decoded) and w.base.inverse for w in model.weights),
        "dense": dense,
    }


def _carry(source: Source, steps: tuple[Step, ...], shards: Mapping[str, ShardLayout]) -> Beside:
    """The hints of a dense source as they are: whether they still say something is found on the way back."""
    sizes = {file.name: file.nbytes for file in source.files}
    if FACTS not in sizes:
        return Beside(steps, shards)
    carried, files = list(steps), dict(shards)
    for name in (PARTS, RECORDS):
        if name in sizes:
            ref = TensorRef(name, name, TensorSpec("U8", (sizes[name],)), 0)
            carried.append(Step(name, Action.COPY, (Output(Part(HINT, name, ref.spec), name, 0, ref),), "u8"))
            files[name] = ShardLayout(b"", (ref,), sizes[name])
    return Beside(tuple(carried), files, None, (PlannedFile(FACTS, sizes[FACTS]),))
