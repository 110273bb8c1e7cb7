"""The amax of sets that servers run with one scale, made one before training: the largest of the set.

Owns the rule for every backend. Without it an export would take the largest after training, and its weights would have
other values than those that were trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from fp4conv.errors import ValuesError


class Holder(Protocol):
    """What has the amax of one quantiser: `name` is the module's, `amax` None, or one value or one a matrix."""

    @property
    def name(self) -> str: ...
    @property
    def amax(self) -> torch.Tensor | None: ...
    @amax.setter
    def amax(self, value: torch.Tensor) -> None: ...


def share(holders: Iterable[Holder], set_of: Callable[[str], str], *, inputs: bool = False) -> int:
    """Give the members of each set their largest amax; how many changed. Raises ValuesError for what was never seen.

    `inputs`: the amax is of inputs, not of weights, which only the words of an error tell apart. An expert that no
    calibration token reached has none of its own, and takes that of its set.
    """
    sets: dict[str, list[Holder]] = {}
    for holder in holders:
        sets.setdefault(set_of(holder.name), []).append(holder)
    changed = 0
    for members in sets.values():
        seen = [member.amax for member in members if member.amax is not None]
        if not seen:
            raise _unseen(members[0].name)
        largest = seen[0].clone()
        for amax in seen[1:]:
            largest = torch.maximum(largest, amax.to(largest.device))
        if not bool(torch.isfinite(largest).all() and (largest > 0).all()):
            raise _unusable(members[0].name, largest, inputs)
        for member in members:
            own = largest if member.amax is None else largest.to(member.amax.device)
            if member.amax is None or not torch.equal(member.amax, own):
                changed += 1
                member.amax = own.clone()
    return changed


def unequal_sets(holders: Iterable[Holder], set_of: Callable[[str], str]) -> list[tuple[str, str]]:
    """Pairs of modules of one set whose amax differ: the first of each set, and one that is not like it."""
    first: dict[str, Holder] = {}
    found = []
    for holder in holders:
        other = first.setdefault(set_of(holder.name), holder)
        if other is holder:
            continue
        if holder.amax is None or other.amax is None or not torch.equal(holder.amax.cpu(), other.amax.cpu()):
            found.append((other.name, holder.name))
    return found


def _unseen(name: str) -> ValuesError:
    return ValuesError(
        "no value reached it in calibration",
        where=name,
        hint="calibrate on more samples (--calib-samples N), or leave it out with --exclude 'GLOB'",
    )


def _unusable(name: str, amax: torch.Tensor, inputs: bool) -> ValuesError:
    found = next((each for each in amax.reshape(-1).tolist() if not 0 < each < float("inf")), 0.0)
    return ValuesError(
        f"the amax of its {'inputs' if inputs else 'weight'} is {found}; expected finite and greater than zero",
        where=name,
        hint="look at what the model computes there: is the checkpoint whole, and the dtype wide enough?"
        if inputs
        else "zeros or NaN cannot be held in NVFP4: leave it out with --exclude 'GLOB'",
    )
