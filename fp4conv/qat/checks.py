"""What must hold at each step of a training run, as functions that raise where it does not.

Before training the fake-quantised weights are what fp4conv's codec makes of the masters, and sets that servers fuse
have one amax; after saving the checkpoint has the names and shapes of its source; after an export the decoded weights
are those that the forward pass used. Each reads real values, and names the first tensor that fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fp4conv.codecs import codec_named
from fp4conv.codecs.base import Codes, Coding, Rows, Tally
from fp4conv.codecs.nvfp4 import tensor_scale
from fp4conv.errors import SourceError, ValuesError
from fp4conv.formats import BLOCK_FORMATS, Ties
from fp4conv.layouts import parse
from fp4conv.qat.amax import unequal_sets
from fp4conv.qat.backend import QuantizedWeight
from fp4conv.qat.targets import checkpoint_tensors, weight_set_of
from fp4conv.qat.windows import explained_blocks
from fp4conv.sources import open_source
from fp4conv.training_rules import FORWARD_RULES

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ForwardReport:
    """`weights`, `values`: how many were compared.

    `explained`: tensor -> how many of its blocks differ as ModelOpt is known to; all other values are equal.
    """

    weights: int
    values: int
    explained: dict[str, int]

    @property
    def notes(self) -> list[str]:
        return [
            f"{name}: {count} blocks have another scale than in fp4conv's codec, as ModelOpt's kernels are known to "
            "give them; an export has the codec's values there"
            for name, count in self.explained.items()
        ]


def check_forward(weights: Iterable[QuantizedWeight]) -> ForwardReport:
    """Compare what the forward pass uses with what the codec decodes to, value by value; zeros of both signs are equal.

    Raises ValuesError with the first weight that differs in another way than ModelOpt's known ones, or is not finite.
    """
    compared = values = 0
    explained: dict[str, int] = {}
    for weight in weights:
        for name, master, used, amax in _matrices(weight):
            expected, bad = decoded(master, weight.format_name, amax)
            if bad >= 0:
                raise ValuesError("has a NaN or an Inf, which no block format holds", where=name)
            rounded = _rounded(expected, weight.master.dtype)
            different = rounded != used
            count = int(np.count_nonzero(different))
            if count:
                exact = weight.master.dtype == torch.float32
                known = explained_blocks(weight.format_name, (master, used, rounded), amax, exact=exact)
                if known is None:
                    raise _forward_differs(name, different, rounded, used)
                explained[name] = explained.get(name, 0) + known
            values += master.size
        compared += 1
    return ForwardReport(compared, values, explained)


def check_shared(weights: Iterable[QuantizedWeight]) -> None:
    """Every set that servers run with one tensor scale has one amax. Raises ValuesError with a pair that has two."""
    holders = [_Amax(weight.name.removesuffix(".weight"), weight.amax) for weight in weights if weight.amax is not None]
    pairs = unequal_sets(holders, weight_set_of)
    if pairs:
        first, other = pairs[0]
        raise ValuesError(
            f"its amax is not that of {first}, with which servers run it under one tensor scale "
            f"({len(pairs)} such pairs): an export could not have the trained values",
            where=other,
            hint="calibrate again; for a state that another tool calibrated, export with fp4conv convert, which tells "
            "the difference",
        )


def check_saved(folder: Path, source: Path) -> int:
    """The checkpoint in `folder` has the tensors of `source`, by name and shape; how many there are.

    Both are read by their headers. Raises SourceError with the first that is missing, new or of another shape.
    """
    (found, tied), (expected, _) = _shapes(folder), _shapes(source)
    missing = [name for name in expected if name not in found and not (tied and name == "lm_head.weight")]
    extra = [name for name in found if name not in expected]
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    hint = (
        f"{folder} must not be converted: this release of transformers saves the model in another way than it reads it"
    )
    if missing:
        raise SourceError(f"was not saved, one of {len(missing)} tensors of {source}", where=missing[0], hint=hint)
    if extra:
        raise SourceError(f"was saved, one of {len(extra)} tensors that {source} has not", where=extra[0], hint=hint)
    if changed:
        name = changed[0]
        what = (
            f"was saved as {list(found[name])}, expected {list(expected[name])}; {len(changed)} tensors changed shape"
        )
        raise SourceError(what, where=name, hint=hint)
    return len(expected)


def check_exported(weights: Iterable[QuantizedWeight], folder: Path) -> int:
    """The checkpoint in `folder` decodes to the values that the forward pass used, in their dtype; how many values.

    Raises ValuesError with the first weight that does not, SourceError with one that is not there or is not quantised.
    """
    from fp4conv.commands.open import open as open_checkpoint

    values = 0
    with open_checkpoint(folder) as checkpoint:
        formats = {weight.name: weight.format_name for weight in checkpoint.model.weights}
        for weight in weights:
            for name, used in checkpoint_tensors(weight.name, weight.values, each=weight.each):
                if formats.get(name) != weight.format_name:
                    found = f"is {formats[name]}" if name in formats else "is not there"
                    raise SourceError(f"{found}, expected {weight.format_name}", where=f"{name} ({folder})")
                exported = _rounded(checkpoint.read(name).astype(np.float32, copy=False), weight.master.dtype)
                different = exported != _numpy(used)
                if different.any():
                    raise ValuesError(
                        f"{_share(different)} of the exported values are not those of training, "
                        f"{_first(different, exported, _numpy(used))}",
                        where=f"{name} ({folder})",
                        hint="export again from the checkpoint that was trained last, without --scale-rule and --ties",
                    )
                values += used.numel()
    return values


@dataclass
class _Amax:
    name: str
    amax: torch.Tensor | None


def decoded(matrix: Values, format_name: str, amax: float | None) -> tuple[Values, int]:
    """(float32 values of `matrix` [N, K] after the codec, by the rules of training; -1, or the first bad index)."""
    codec, (n, k) = codec_named(format_name), matrix.shape
    rule = FORWARD_RULES[format_name]
    coding = Coding(rule, Ties.EVEN, 1.0 if amax is None else tensor_scale(amax, rule))
    codes = Codes(np.empty((n, k // 2), np.uint8), np.empty((n, k // BLOCK_FORMATS[format_name].block), np.uint8))
    out = np.empty((n, k), np.float32)
    bad = codec.encode(Rows(matrix), coding, codes, Tally(np.empty(n), np.empty(n)))
    if bad < 0:
        codec.decode(codes, coding.tensor_scale, Rows(out))
    return out, bad


def _matrices(weight: QuantizedWeight) -> Iterator[tuple[str, Values, Values, float | None]]:
    """(name, master [N, K], used [N, K], amax) of each matrix of a weight, K last."""
    linear = weight.master.ndim == 2
    masters = [weight.master] if linear else list(weight.master)
    used = [weight.values] if linear else list(weight.values)
    amax = None if weight.amax is None else weight.amax.detach().cpu().reshape(-1).tolist()
    for number, (master, values) in enumerate(zip(masters, used, strict=True)):
        if weight.axis == -2:
            master, values = master.T, values.T
        own = None if amax is None else amax[number if weight.each else 0]
        name = weight.name if linear else f"{weight.name}[{number}]"
        yield name, np.ascontiguousarray(_numpy(master)), np.ascontiguousarray(_numpy(values)), own


def _numpy(tensor: torch.Tensor) -> Values:
    values: Values = tensor.detach().to(device="cpu", dtype=torch.float32).numpy()
    return values


def _rounded(values: Values, dtype: torch.dtype) -> Values:
    """`values` rounded to `dtype`, the master's, in which the forward pass computes."""
    return values if dtype == torch.float32 else _numpy(torch.from_numpy(values).to(dtype))


def _shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], bool]:
    """(tensor -> shape, whether the output head is the embedding, so that it need not be stored)."""
    model = parse(open_source(folder))
    shapes = {weight.name: weight.shape for weight in model.weights}
    return shapes, model.config.get("tie_word_embeddings") is True


def _forward_differs(name: str, different: npt.NDArray[np.bool_], expected: Values, used: Values) -> ValuesError:
    return ValuesError(
        f"{_share(different)} of the fake-quantised values are not those of fp4conv's codec, "
        f"{_first(different, expected, used)}",
        where=name,
        hint="an export could not have the trained values: train with --backend fp4conv",
    )


def _share(different: npt.NDArray[np.bool_]) -> str:
    return f"{np.count_nonzero(different):,} of {different.size:,}"


def _first(different: npt.NDArray[np.bool_], expected: Values, used: Values) -> str:
    place = tuple(int(axis[0]) for axis in np.nonzero(different))
    return f"at {list(place)} {used[place]:.9g} instead of {expected[place]:.9g}"


__all__ = ["ForwardReport", "check_exported", "check_forward", "check_saved", "check_shared", "decoded"]
