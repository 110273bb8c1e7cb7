"""What must hold at each step of a training run, as functions that raise where it does not.

Before training the fake-quantised weights are what fp4conv's codec makes of the masters, and sets that servers fuse
have one amax; after saving the checkpoint has the names and shapes of its source; after an export the decoded weights
are those that the forward pass used. Each reads real values, and names the first tensor that fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
from fp4conv.model import Stored
from fp4conv.qat.amax import unequal_sets
from fp4conv.qat.backend import QuantizedWeight
from fp4conv.qat.targets import checkpoint_tensors, weight_set_of
from fp4conv.qat.windows import differing_blocks, rounded
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
            f"{name}: {count} blocks have other values in training than any file can give them, as ModelOpt's CUDA "
            "kernels are known to round; --backend fp4conv trains with those of the export"
            for name, count in self.explained.items()
        ]


def check_forward(weights: Iterable[QuantizedWeight]) -> ForwardReport:
    """Compare what the forward pass uses with what the codec decodes to, value by value; zeros of both signs are equal.

    Raises ValuesError with the first weight that differs in another way than ModelOpt's known ones, or is not finite.
    """

    return _compare(weights)


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
    hint = f"do not use {folder}: this release of transformers saves the model in another way than it reads it"
    if missing:
        raise SourceError(f"was not saved, one of {len(missing)} tensors of {source}", where=missing[0], hint=hint)
    if extra:
        raise SourceError(f"was saved, one of {len(extra)} tensors that {source} has not", where=extra[0], hint=hint)
    if changed:
        name = changed[0]
        what = f"was saved as {list(found[name])}, expected {list(expected[name])} ({len(changed)} such tensors)"
        raise SourceError(what, where=name, hint=hint)
    return len(expected)


def check_exported(weights: Iterable[QuantizedWeight], folder: Path) -> ForwardReport:
    """The checkpoint in `folder` decodes to the values that the forward pass used, in their dtype.

    Raises ValuesError with the first weight that does not, SourceError with one that is not there or is not quantised.
    Blocks that ModelOpt's kernels give other values than any file can hold are reported, as by `check_forward`.
    """
    from fp4conv.commands.open import open as open_checkpoint

    with open_checkpoint(folder) as checkpoint:
        formats = {weight.name: weight.format_name for weight in checkpoint.model.weights}

        def exported(weight: QuantizedWeight, name: str) -> Values:
            if formats.get(name) != weight.format_name:
                found = f"is {formats[name]}" if name in formats else "is not there"
                raise SourceError(f"{found}, expected {weight.format_name}", where=f"{name} ({folder})")
            values: Values = checkpoint.read(name).astype(np.float32, copy=False)
            return values

        return _compare(weights, exported)


def check_dense(folder: Path, trained: Path) -> int:
    """Tensors of the checkpoint in `folder` that are not quantised are those of `trained`, bit by bit; how many.

    Raises ValuesError with the first that is not, SourceError with one that `trained` has not.
    """
    from fp4conv.commands.open import open as open_checkpoint

    with open_checkpoint(folder) as export, open_checkpoint(trained) as masters:
        known = set(masters.names)
        names = [weight.name for weight in export.model.weights if isinstance(weight.value, Stored)]
        for name in names:
            if name not in known:
                raise SourceError(f"is in the export, and not among what was trained ({trained})", where=name)
            found, expected = (_bits(checkpoint.read(name)) for checkpoint in (export, masters))
            if not np.array_equal(found, expected):
                raise ValuesError(
                    f"is not quantised, and in the export it is not what was trained ({trained})",
                    where=f"{name} ({folder})",
                    hint="export again: remove the folder of the export, and give the same command",
                )
    return len(names)


def _bits(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a checkpoint: its master and what the forward pass used, as stacks [E, N, K], or [E, K, N] with kn.

    `exported`: float32 values read from an export, in the same shape, or None.
    """

    weight: QuantizedWeight
    name: str
    master: torch.Tensor
    used: torch.Tensor
    amax: float | None
    exported: Values | None = None

    @property
    def kn(self) -> bool:
        return self.weight.axis == -2

    def expected(self, number: int) -> Values:
        """float32: what the codec makes of matrix `number`, rounded to the master's dtype."""
        values, bad = decoded(_numpy(self.master[number]), self.weight.format_name, self.amax, kn=self.kn)
        if bad >= 0:
            raise ValuesError("has a NaN or an Inf, which no block format holds", where=self.name)
        return rounded(values, self.weight.master.dtype)


_FORWARD = ("the forward pass", "an export could not have the trained values: train with --backend fp4conv")
_EXPORT = ("the export", "export again from the checkpoint that was trained last, without --scale-rule and --ties")


def _compare(
    found: Iterable[QuantizedWeight], exported: Callable[[QuantizedWeight, str], Values] | None = None
) -> ForwardReport:
    weights = values = 0
    explained: dict[str, int] = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # the kernels hold no lock; a model of experts is many matrices
        for weight in found:
            weights += 1
            for tensor in _tensors(weight, exported):
                if blocks := sum(threads.map(partial(_explained, tensor), range(len(tensor.master)))):
                    explained[tensor.name] = blocks
                values += tensor.master.numel()
    return ForwardReport(weights, values, explained)


def _explained(tensor: _Tensor, number: int) -> int:
    """How many blocks of matrix `number` differ as ModelOpt is known to; ValuesError where one differs otherwise."""
    expected, dtype = tensor.expected(number), tensor.weight.master.dtype
    if tensor.exported is not None and not np.array_equal(rounded(tensor.exported[number], dtype), expected):
        raise _differs(tensor, rounded(tensor.exported, dtype), _EXPORT)
    used = _numpy(tensor.used[number])
    if np.array_equal(used, expected):
        return 0
    matrices = (_numpy(tensor.master[number]), used, expected)
    master, used, expected = (np.ascontiguousarray(each.T if tensor.kn else each) for each in matrices)
    blocks, known = differing_blocks(tensor.weight.format_name, (master, used, expected), tensor.amax, dtype)
    if not known.all():
        raise _differs(tensor, _numpy(tensor.used), _FORWARD)
    return int(blocks.size)


def _tensors(weight: QuantizedWeight, exported: Callable[[QuantizedWeight, str], Values] | None) -> Iterator[_Tensor]:
    """Each tensor of a checkpoint that this weight becomes."""
    masters = checkpoint_tensors(weight.name, weight.master, each=weight.each)
    used = checkpoint_tensors(weight.name, weight.values, each=weight.each)
    amax: list[float | None] = [None] if weight.amax is None else weight.amax.detach().cpu().reshape(-1).tolist()
    own = list(zip(masters, used, strict=True))
    for number, ((name, master), (_, values)) in enumerate(own):
        read = None if exported is None else exported(weight, name).reshape(-1, *master.shape[-2:])
        # Experts with a scale each have one or two tensors: all of one expert, then all of the next.
        scale = amax[number * len(amax) // len(own)]
        stack, used_stack = (each.detach().reshape(-1, *master.shape[-2:]) for each in (master, values))
        yield _Tensor(weight, name, stack, used_stack, scale, read)


@dataclass
class _Amax:
    name: str
    amax: torch.Tensor | None


def decoded(matrix: Values, format_name: str, amax: float | None, *, kn: bool = False) -> tuple[Values, int]:
    """(float32 values of `matrix` after the codec, by the rules of training; -1, or the first bad index).

    `matrix`: float32 [N, K], or [K, N] with `kn`.
    """
    codec, (n, k) = codec_named(format_name), matrix.T.shape if kn else matrix.shape
    rule = FORWARD_RULES[format_name]
    coding = Coding(rule, Ties.EVEN, 1.0 if amax is None else tensor_scale(amax, rule))
    codes = Codes(np.empty((n, k // 2), np.uint8), np.empty((n, k // BLOCK_FORMATS[format_name].block), np.uint8))
    out = np.zeros_like(matrix)
    bad = codec.encode(Rows(matrix, kn), coding, codes, Tally(np.empty(n), np.empty(n)))
    if bad < 0:
        codec.decode(codes, coding.tensor_scale, Rows(out, kn))
    return out, bad


def _numpy(tensor: torch.Tensor) -> Values:
    values: Values = tensor.detach().to(device="cpu", dtype=torch.float32).numpy()
    return values


def _shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], bool]:
    """(tensor -> shape, whether the output head is the embedding, so that it need not be stored)."""
    model = parse(open_source(folder))
    shapes = {weight.name: weight.shape for weight in model.weights}
    return shapes, model.config.get("tie_word_embeddings") is True


def _differs(tensor: _Tensor, found: Values, what: tuple[str, str]) -> ValuesError:
    shape = tuple(tensor.master.shape[1:] if len(tensor.master) == 1 else tensor.master.shape)
    expected = np.stack([tensor.expected(number) for number in range(len(tensor.master))]).reshape(shape)
    found = found.reshape(shape)
    different = found != expected
    place = tuple(int(axis[0]) for axis in np.nonzero(different))
    whose, hint = what
    return ValuesError(
        f"{np.count_nonzero(different):,} of {different.size:,} values of {whose} are not those of fp4conv's codec: at "
        f"{list(place)} {found[place]:.9g}, expected {expected[place]:.9g}",
        where=tensor.name,
        hint=hint,
    )


__all__ = ["ForwardReport", "check_dense", "check_exported", "check_forward", "check_saved", "check_shared", "decoded"]
