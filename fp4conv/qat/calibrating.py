"""What a model's inputs and its KV cache reach over a dataset: the largest magnitudes, for `convert --input-scales`.

Nothing is trained or quantised: the model runs as it is, and is looked at. A linear layer and the experts of a layer
see what goes into their matrix product; the KV cache what is put into it, after rotary embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from fp4conv.errors import PlanError
from fp4conv.families import EXCLUDED, role_of
from fp4conv.formats import NVFP4
from fp4conv.qat.amax import share
from fp4conv.qat.backend import Batch
from fp4conv.qat.placing import without_hooks
from fp4conv.qat.quantizers import FakeQuantizer, attach, observing
from fp4conv.qat.targets import Target, all_targets, canonical, checkpoint_modules, input_set_of


def observe(model: torch.nn.Module, batches: Iterable[Batch], *, kv: bool = False) -> dict[str, float]:
    """'<module>.input_amax' of every layer that a conversion quantises by default, over `batches`.

    Modules are named as a checkpoint names them; sets that servers run on one scale have one value. With `kv` also
    '<k_proj>.k_amax' and '<v_proj>.v_amax'. `model` is changed, and of no use after it. Raises ValuesError for an
    input that is not finite, is always zero, or that no token reached.
    """
    targets = _looked_at(model)
    inputs = [FakeQuantizer(target.name, NVFP4.name) for target in targets]
    with without_hooks(model):
        for target, quantizer in zip(targets, inputs, strict=True):
            attach(target, FakeQuantizer(target.name, NVFP4.name, target.axis), quantizer)
    caches = _Caches(model) if kv else None
    with observing(model, inputs), torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=kv, **({} if caches is None else {"past_key_values": caches.new()}))
    share(inputs, input_set_of, inputs=True)
    found: dict[str, float] = {}
    for target, quantizer in zip(targets, inputs, strict=True):
        assert quantizer.amax is not None, "share has seen to it"
        found |= {f"{name}.input_amax": float(quantizer.amax) for name in checkpoint_modules(target)}
    if caches is not None:
        share(caches.held, lambda name: name, inputs=True)
        found |= {held.name: float(held.amax) for held in caches.held if held.amax is not None}
    return found


def looked_at(model: torch.nn.Module) -> list[str]:
    """The modules of a checkpoint whose inputs `observe` will look at."""
    return [name for target in _looked_at(model) for name in checkpoint_modules(target)]


def _looked_at(model: torch.nn.Module) -> list[Target]:
    targets = [target for target in all_targets(model) if role_of(target.name) not in EXCLUDED]
    if not targets:
        raise PlanError("no linear layer was found in this model", hint="is it a language model of transformers?")
    return targets


def one_by_one(
    texts: Sequence[Sequence[int]], device: torch.device, tell: Callable[[int, int], None] | None = None
) -> Iterator[Batch]:
    """A batch for each list of token ids, for padding would be looked at too; `tell(done, of)` after each."""
    for number, ids in enumerate(texts, 1):
        yield {"input_ids": torch.tensor([list(ids)], device=device)}
        if tell is not None:
            tell(number, len(texts))


class _Caches:
    """Makes KV caches that note the largest magnitude of what each layer puts into them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._config = model.config
        self._layers = {
            int(module.layer_idx): canonical(name)
            for name, module in model.named_modules()
            if hasattr(module, "layer_idx") and hasattr(module, "k_proj") and hasattr(module, "v_proj")
        }
        if not self._layers:
            raise PlanError(
                "no attention layer with a k_proj and a v_proj was found, whose KV cache could be looked at",
                hint="calibrate without --kv-cache",
            )
        self._of = {
            (layer, letter): FakeQuantizer(f"{name}.{letter}_proj.{letter}_amax", NVFP4.name)
            for layer, name in self._layers.items()
            for letter in "kv"
        }

    @property
    def held(self) -> list[FakeQuantizer]:
        return list(self._of.values())

    def new(self) -> object:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._config)
        put = cache.update

        def update(key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: object, **kwargs: object) -> object:
            for letter, states in (("k", key), ("v", value)):
                if (layer_idx, letter) in self._of:
                    self._of[layer_idx, letter].observe(states)
            return put(key, value, layer_idx, *args, **kwargs)

        cache.update = update
        return cache
