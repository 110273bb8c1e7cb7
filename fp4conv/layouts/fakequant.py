"""Checkpoints of quantisation-aware training: dense masters, and beside them what the forward pass did to them.

ModelOpt saves the unquantised weights; `modelopt_state.pth` says which were fake-quantised and how, and NVFP4 adds
the frozen amax of each quantiser as a BF16 scalar among the tensors. fp4conv's own runs say the same in files of their
own (`training_state`), which come first. This module takes those facts out of a parsed model and attaches them to its
weights. Tensors decide, never a claim: amax tensors count without a state file too.

    X.weight_quantizer            -> X.weight
    experts.P_weight_quantizer    -> experts.P             (3-D parameter)
    experts.P_weight_quantizers.E -> experts.E.*.weight    (P = gate_up_proj: gate_proj and up_proj)
    *_input_quantizer likewise, for all experts at once
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from fp4conv import training_state
from fp4conv.errors import SourceError
from fp4conv.formats import BLOCK_FORMATS, NVFP4
from fp4conv.model import Model, Source, Stored, Trained, Weight
from fp4conv.modelopt_state import MAX_STATE_BYTES, STATE_FILE, Quantizer, read_state
from fp4conv.safetensors_io import TensorRef, header_at

_BUFFER = re.compile(r"(?P<quantizer>.*_quantizer(s\.\d+)?)\.(?P<buffer>_\w+)$")
_EXPERT_QUANTIZER = re.compile(
    r"(?P<experts>.*experts)\.(?P<param>\w+_proj)_(?P<kind>weight|input)_quantizer(s\.(?P<e>\d+))?$"
)
_MODULE_QUANTIZER = re.compile(r"(?P<module>.+)\.(?P<kind>weight|input)_quantizer$")
_KV_QUANTIZER = re.compile(r"(?P<attention>.+)\.(?P<letter>[kv])_bmm_quantizer$")
_LEAVES = {"gate_up_proj": ("gate_proj", "up_proj")}  # what one fused parameter is in a checkpoint of single experts
_EXPERT = re.compile(r"experts\.\d+\.")


def attach_training(model: Model, source: Source) -> Model:
    """`model` with `trained` filled in and the quantisers' buffers taken out of its weights."""
    buffers, others = _split_buffers(model.weights)
    files = {file.name: file.nbytes for file in source.files}
    own = training_state.STATE in files
    has_state = own or STATE_FILE in files
    if not has_state and not buffers:
        return model
    model = replace(model, weights=others)
    if own:
        state, buffers = _own_state(source, files)
    else:
        state = read_state(source.read_bytes(STATE_FILE, MAX_STATE_BYTES)) if has_state else _assumed(buffers)
    _refuse_altered(state.values())
    trained = _trained(model, state, buffers)
    kv = {
        f"{kept}_scale": ref
        for name, ref in buffers.items()
        if (kept := kv_target(name)) and (name not in state or state[name].enabled)
    }
    return replace(
        model, trained=trained, trained_kv=kv, warnings=(*model.warnings, *_notes(has_state, buffers, state))
    )


def _split_buffers(weights: Iterable[Weight]) -> tuple[dict[str, TensorRef], tuple[Weight, ...]]:
    """(quantiser -> its amax, the weights that are no quantiser's). Other buffers change the weights: refused."""
    buffers: dict[str, TensorRef] = {}
    others = []
    for weight in weights:
        found = _BUFFER.fullmatch(weight.name)
        if found is None or not isinstance(weight.value, Stored):
            others.append(weight)
            continue
        ref = weight.value.ref
        if found["buffer"] != "_amax":
            raise SourceError(
                f"a quantiser's {found['buffer']}: this training changed the weights beside rounding them, which "
                "fp4conv cannot repeat",
                where=f"{weight.name} ({ref.file})",
                hint="export this checkpoint with the ModelOpt release that trained it",
            )
        if ref.spec.elements == 1:
            buffers[found["quantizer"]] = ref
        elif found["quantizer"].endswith("weight_quantizer"):
            raise SourceError(
                f"an amax of shape {list(ref.spec.shape)}; NVFP4 has one for a tensor",
                where=f"{weight.name} ({ref.file})",
                hint="this quantiser is of a kind that fp4conv does not write",
            )
    return buffers, tuple(others)


def _own_state(source: Source, files: Mapping[str, int]) -> tuple[dict[str, Quantizer], dict[str, TensorRef]]:
    """(quantisers, the amax of each) of a run of fp4conv. Raises SourceError where NVFP4 lacks what was frozen."""
    state = training_state.parse_state(source.json(training_state.STATE) or {})
    refs: Iterable[TensorRef] = ()
    if training_state.AMAX in files:
        with source.reader() as reader:
            refs = header_at(reader, training_state.AMAX, files[training_state.AMAX]).tensors
    buffers = {ref.name.removesuffix("._amax"): ref for ref in refs}
    for quantizer in state.values():
        ref = buffers.get(quantizer.name)
        if quantizer.enabled and quantizer.format_name == NVFP4.name and (ref is None or ref.spec.elements != 1):
            raise SourceError(
                f"{quantizer.name} has no scalar amax, which {training_state.STATE} says was frozen in training",
                where=training_state.AMAX,
                hint="the file is damaged or of another run: copy it again, or train again",
            )
    return state, buffers


def _assumed(buffers: Mapping[str, TensorRef]) -> dict[str, Quantizer]:
    """Without a state file a stored scalar amax speaks for NVFP4: MXFP4 needs none."""
    return {name: Quantizer(name, True, "fp8" if _KV_QUANTIZER.fullmatch(name) else NVFP4.name) for name in buffers}


def _refuse_altered(quantizers: Iterable[Quantizer]) -> None:
    for quantizer in quantizers:
        if quantizer.enabled and quantizer.altered:
            raise SourceError(
                f"its forward pass applied a {quantizer.altered} before rounding, which fp4conv cannot repeat",
                where=f"{quantizer.name} ({STATE_FILE})",
                hint="export this checkpoint with the ModelOpt release that trained it",
            )


def _trained(model: Model, state: Mapping[str, Quantizer], buffers: Mapping[str, TensorRef]) -> dict[str, Trained]:
    """Weight name -> how the forward pass saw it, for every enabled weight quantiser."""
    names = {weight.name for weight in model.weights}
    inputs: dict[str, TensorRef] = {}
    trained: dict[str, Trained] = {}
    for name, quantizer in state.items():
        targets = list(_targets(name.removeprefix("module."), "input", names))
        if quantizer.enabled and name in buffers:
            inputs.update(dict.fromkeys(targets, buffers[name]))
    for name, quantizer in state.items():
        if not quantizer.enabled or (not name.endswith(("weight_quantizer",)) and "weight_quantizers." not in name):
            continue
        targets = list(_targets(name.removeprefix("module."), "weight", names))
        if not targets:
            raise SourceError(
                f"{name} quantised a weight in training, but no tensor of that name is there",
                where=STATE_FILE,
                hint="the state belongs to another checkpoint, or tensors are missing",
            )
        for target in targets:
            trained[target] = Trained(quantizer.format_name, buffers.get(name), inputs.get(target))
    return trained


def input_targets(quantizer: str, names: set[str]) -> Iterator[str]:
    """The weights of `names` whose inputs go through `quantizer`, as training names it; none where it is of weights."""
    return _targets(quantizer.removeprefix("module."), "input", names)


def kv_target(quantizer: str) -> str | None:
    """'<attention>.k_proj.k' of a quantiser of the KV cache, whose scale is '..._scale'; None for any other."""
    found = _KV_QUANTIZER.fullmatch(quantizer)
    return f"{found['attention']}.{found['letter']}_proj.{found['letter']}" if found else None


def _targets(quantizer: str, kind: str, names: set[str]) -> Iterator[str]:
    """The weights whose `kind` ('weight' or 'input') goes through this quantiser."""
    if found := _EXPERT_QUANTIZER.fullmatch(quantizer):
        if found["kind"] != kind:
            return
        if (whole := f"{found['experts']}.{found['param']}") in names:
            yield whole
            return
        for leaf in _LEAVES.get(found["param"], (found["param"],)):
            if found["e"] is not None:
                candidates: Iterable[str] = (f"{found['experts']}.{found['e']}.{leaf}.weight",)
            else:
                start, end = f"{found['experts']}.", f".{leaf}.weight"
                candidates = [n for n in names if n.startswith(start) and n.endswith(end)]
            yield from (candidate for candidate in candidates if candidate in names)
    elif (found := _MODULE_QUANTIZER.fullmatch(quantizer)) and found["kind"] == kind:
        yield from {f"{found['module']}.weight"} & names


def _notes(has_state: bool, buffers: Mapping[str, TensorRef], state: Mapping[str, Quantizer]) -> list[str]:
    if not has_state:
        return [
            f"no {STATE_FILE}, but {len(buffers)} quantisers' amax tensors: the modules that have one were taken as "
            "trained for nvfp4"
        ]
    foreign = sorted({q.format_name for n, q in state.items() if q.enabled and "weight_quantizer" in n})
    foreign = [name for name in foreign if name not in BLOCK_FORMATS]
    return (
        [f"trained in formats that fp4conv does not write ({'; '.join(foreign)}): those stay dense"] if foreign else []
    )
