"""Put adapters on a model: every tensor of every adapter becomes part of a weight, or the merge is refused by name.

Adapters are merged in the order given, each into what the ones before have left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fp4conv.deltas import Added, Delta, Factor, LowRank
from fp4conv.errors import PlanError
from fp4conv.formats import MergeRounding
from fp4conv.lora import experts
from fp4conv.lora.config import read_config
from fp4conv.lora.names import AdapterTensors, candidates, sort_tensors, unused, unwrapped
from fp4conv.model import FLOAT_DTYPES, Adapter, LoraMerged, Model, OnDisk, Source, Stored, Weight
from fp4conv.safetensors_io import TensorRef

# What LoRA-QAT with ModelOpt leaves beside an adapter. Their presence is all that is looked at.
_TRAINING_STATES = ("peft_modelopt_state.pth", "quantizer_state_dict.pth", "modelopt_state_train.pth")
_COMPANIONS = ("chat_template.jinja", "tokenizer.json")
_WRONG_BASE = "is this the base that the adapter was trained on?"


def is_trained(adapter: Source) -> bool:
    """Whether the adapter comes from quantisation-aware training: its folder carries a ModelOpt state."""
    return any(file.name in _TRAINING_STATES for file in adapter.files)


def merge(model: Model, adapters: Sequence[Source], rounding: MergeRounding | None = None) -> Model:
    """`model` with the adapters merged, in order; only names, shapes and configs are read.

    `rounding` None: as training did where an adapter comes from quantisation-aware training, else once. Raises
    PlanError or SourceError, naming the adapter's tensor, for anything that would be lost.
    """
    if rounding is None:
        rounding = MergeRounding.TRAINING if any(map(is_trained, adapters)) else MergeRounding.ONCE
    weights = {weight.name: weight for weight in model.weights}
    notes: list[str] = []
    for adapter in adapters:
        _Merge(weights, adapter, rounding).run()
        notes += [f"{adapter.name}: {note}" for note in adapter.warnings]
        notes += _companion_notes(model.source, adapter)
        notes += _tied_notes(model, weights)
    return replace(
        model,
        weights=tuple(weights[weight.name] for weight in model.weights),
        adapters=tuple(Adapter(a.name, a.root, a.fingerprint(), is_trained(a), a.pinned) for a in adapters),
        warnings=(*model.warnings, *dict.fromkeys(notes)),
    )


class _Merge:
    """One adapter on its way into `weights`, which it replaces one by one."""

    def __init__(self, weights: dict[str, Weight], adapter: Source, rounding: MergeRounding) -> None:
        self._weights = weights
        self._name = adapter.name
        self._rounding = rounding
        self._trained = is_trained(adapter)
        self._config = read_config(adapter)
        self._tensors: AdapterTensors = sort_tensors(
            # one reader serves base and adapter: a joined path that is absolute stays itself
            {name: replace(ref, file=str(adapter.root / ref.file)) for name, ref in adapter.tensors.items()},
            adapter.name,
        )
        if not self._tensors.parts and not self._tensors.whole:
            raise PlanError("the adapter has no tensors", where=adapter.name)

    def run(self) -> None:
        for name, ref in self._tensors.whole.items():
            self._replace(name, ref)
        wrapped: dict[str, list[str]] = {}
        for module in self._tensors.parts:
            weight = self._find(unwrapped(module) + ".weight")
            if weight is not None:
                self._adapt(weight, module)
            else:
                wrapped.setdefault(unwrapped(module), []).append(module)
        self._adapt_experts(wrapped)

    # ---- whole tensors

    def _replace(self, name: str, ref: TensorRef) -> None:
        weight = self._find(name)
        if weight is None:
            hint = _WRONG_BASE
            if name.endswith("lm_head.weight"):
                hint = "the base ties it to its embeddings: a result would need both, untied, which convert does not do"
            raise unused(ref, self._name, f"the base has no tensor {name}", hint)
        if ref.spec.shape != weight.shape:
            raise unused(
                ref, self._name, f"its shape is {list(ref.spec.shape)}, the base has {list(weight.shape)}", _WRONG_BASE
            )
        self._check_float(ref)
        if weight.base.refs[0].spec.dtype not in FLOAT_DTYPES and isinstance(weight.base, Stored):
            raise unused(ref, self._name, f"the base has {weight.base.ref.spec.dtype} there", _WRONG_BASE)
        self._put(weight, Stored(ref), ())

    # ---- linear layers and embeddings

    def _adapt(self, weight: Weight, module: str) -> None:
        parts = self._tensors.parts[module]
        if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
            self._adapt_embedding(weight, module)
            return
        a, b = self._pair(parts, "lora_A", "lora_B")
        if len(weight.shape) != 2 or not weight.is_matrix:
            shape = list(weight.shape)
            raise unused(a, self._name, f"{weight.name} is {shape}: only matrices are merged", "merge it with peft")
        if weight.kn or self._is_turned(weight, a, b):
            weight = replace(weight, kn=True)
        rank = self._rank(a, unwrapped(module))
        if a.spec.shape != (rank, weight.k) or b.spec.shape != (weight.n, rank):
            raise unused(
                a,
                self._name,
                f"lora_A {list(a.spec.shape)} and lora_B {list(b.spec.shape)} do not fit {weight.name}, "
                f"[N, K] = [{weight.n}, {weight.k}], at rank {rank}",
                _WRONG_BASE,
            )
        magnitude = self._magnitude(parts, weight)
        scaling = self._config.scaling_of(unwrapped(module))
        rows, columns = Factor(b, True, rank), Factor(a, False, rank)
        linear = not self._config.targets(weight.name)
        self._add(weight, LowRank(self._name, rows, columns, scaling, magnitude, linear))
        if bias := parts.get("lora_B.bias"):
            self._adapt_bias(weight, bias, scaling)

    def _is_turned(self, weight: Weight, a: TensorRef, b: TensorRef) -> bool:
        """Whether the base holds it [in, out]: fan_in_fan_out says so, unless only the other way fits, as in peft."""
        sides = (a.spec.shape[-1], b.spec.shape[0])
        return self._config.fan_in_fan_out and sides == weight.shape

    def _adapt_embedding(self, weight: Weight, module: str) -> None:
        """delta = scaling x (B A)^T: lora_embedding_A [r, vocabulary], lora_embedding_B [width, r]."""
        parts = self._tensors.parts[module]
        a, b = self._pair(parts, "lora_embedding_A", "lora_embedding_B")
        if magnitude := parts.get("lora_magnitude_vector"):
            raise unused(magnitude, self._name, "DoRA on an embedding", "merge it with peft, then convert the result")
        rank = self._rank(a, unwrapped(module))
        if len(weight.shape) != 2 or a.spec.shape != (rank, weight.n) or b.spec.shape != (weight.k, rank):
            raise unused(
                a,
                self._name,
                f"lora_embedding_A {list(a.spec.shape)} and lora_embedding_B {list(b.spec.shape)} do not fit "
                f"{weight.name}, {list(weight.shape)}",
                _WRONG_BASE,
            )
        scaling = self._config.scaling_of(unwrapped(module))
        rows, columns = Factor(a, False, rank), Factor(b, True, rank)
        self._add(weight, LowRank(self._name, rows, columns, scaling, linear=False))

    def _adapt_bias(self, weight: Weight, ref: TensorRef, scaling: float) -> None:
        bias = self._weights.get(weight.name.removesuffix(".weight") + ".bias")
        if bias is None:
            raise unused(ref, self._name, f"{weight.module} has no bias in the base", "merge without lora_bias")
        if bias.shape != ref.spec.shape:
            raise unused(ref, self._name, f"its shape is {list(ref.spec.shape)}, not {list(bias.shape)}", _WRONG_BASE)
        self._check_float(ref)
        self._add(bias, Added(self._name, ref, scaling))

    def _magnitude(self, parts: Mapping[str, TensorRef], weight: Weight) -> TensorRef | None:
        found = parts.get("lora_magnitude_vector")
        if found is None:
            if self._config.dora:
                raise unused(parts["lora_A"], self._name, "DoRA without its lora_magnitude_vector", "save it again")
            return None
        if not self._config.dora:
            raise unused(found, self._name, "the config does not say use_dora", "give the config saved with it")
        if found.spec.elements != weight.n:
            raise unused(found, self._name, f"{found.spec.elements} magnitudes for N = {weight.n}", _WRONG_BASE)
        self._check_float(found)
        return found

    # ---- expert parameters

    def _adapt_experts(self, wrapped: Mapping[str, Sequence[str]]) -> None:
        pairs: list[tuple[experts.Level, experts.Parameter]] = []
        for path, modules in wrapped.items():
            parameters = experts.parameters_of(path, self._weights)
            if not parameters:
                first = next(iter(self._tensors.parts[modules[0]].values()))
                raise unused(first, self._name, f"the base has no module {path}", _WRONG_BASE)
            pairs += experts.assign([self._level(module) for module in modules], parameters, self._config, self._name)
        swapped = experts.swapped_of(pairs, self._config, self._name)
        for level, parameter in pairs:
            for weight, delta in experts.deltas_of(level, parameter, swapped[level.module], self._config, self._name):
                self._add(weight, delta)

    def _level(self, module: str) -> experts.Level:
        parts = self._tensors.parts[module]
        a, b = self._pair(parts, "lora_A", "lora_B")
        for part, ref in parts.items():
            if part not in ("lora_A", "lora_B"):
                raise unused(ref, self._name, f"{part} on an expert parameter", "merge it with peft")
        return experts.Level(module, a, b)

    # ---- parts of all

    def _find(self, name: str) -> Weight | None:
        return next((self._weights[found] for found in candidates(name) if found in self._weights), None)

    def _pair(self, parts: Mapping[str, TensorRef], first: str, second: str) -> tuple[TensorRef, TensorRef]:
        a, b = parts.get(first), parts.get(second)
        if a is None or b is None:
            alone = next(iter(parts.values()))
            missing = first if a is None else second
            raise unused(alone, self._name, f"its {missing} is missing", "the adapter is incomplete: save it again")
        for ref in (a, b):
            self._check_float(ref)
            if len(ref.spec.shape) != 2 or not ref.spec.elements:
                hint = "under DeepSpeed ZeRO-3 or FSDP, gather the weights before saving the adapter"
                raise unused(ref, self._name, f"its shape is {list(ref.spec.shape)}, expected two axes", hint)
        return a, b

    def _rank(self, a: TensorRef, key: str) -> int:
        rank, expected = a.spec.shape[0], self._config.rank_of(key)
        if rank != expected:
            hint = "give the adapter_config.json that was saved with these tensors"
            raise unused(a, self._name, f"its rank is {rank}, the config says {expected}", hint)
        return rank

    def _check_float(self, ref: TensorRef) -> None:
        if ref.spec.dtype not in FLOAT_DTYPES:
            known = ", ".join(FLOAT_DTYPES)
            raise unused(ref, self._name, f"its dtype is {ref.spec.dtype}, expected {known}", "save it again")

    def _add(self, weight: Weight, delta: Delta) -> None:
        before = weight.value.deltas if isinstance(weight.value, LoraMerged) else ()
        self._put(weight, weight.base, (*before, delta))

    def _put(self, weight: Weight, base: OnDisk, deltas: tuple[Delta, ...]) -> None:
        if isinstance(weight.value, LoraMerged):
            dtype = weight.value.dtype
        else:
            dtype = weight.base.ref.spec.dtype if isinstance(weight.base, Stored) else "BF16"
        linear = any(isinstance(delta, LowRank) and delta.linear for delta in deltas)
        value = LoraMerged(base, deltas, self._rounding, dtype, beside=self._trained and linear)
        self._weights[weight.name] = replace(weight, value=value)


def _companion_notes(base: Source, adapter: Source) -> Iterable[str]:
    """A word where the adapter was trained with another tokenizer or chat template than the one that goes along."""
    here = {file.name: file.nbytes for file in base.files}
    other = [
        file.name
        for file in adapter.files
        if file.name in _COMPANIONS
        and (here.get(file.name) != file.nbytes or base.read_bytes(file.name) != adapter.read_bytes(file.name))
    ]
    if other:
        yield f"{adapter.name} has another {' and '.join(other)} than the base, whose files go along"


def _tied_notes(model: Model, weights: Mapping[str, Weight]) -> Iterable[str]:
    """A word where an embedding changes that is the output head as well."""
    if not model.config.get("tie_word_embeddings"):
        return
    heads = [name for name in weights if name.endswith("lm_head.weight")]
    for name, weight in weights.items():
        if not heads and name.endswith("embed_tokens.weight") and isinstance(weight.value, LoraMerged):
            yield f"{name} is tied to the output head, which therefore changes with it"
