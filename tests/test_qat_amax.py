"""Sets that servers run with one scale get the largest amax of their members."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fp4conv.errors import ValuesError
from fp4conv.qat.amax import share, unequal_sets
from fp4conv.qat.targets import input_set_of, weight_set_of

LAYER = "model.layers.0"


@dataclass
class Held:
    name: str
    amax: torch.Tensor | None


def held(**amax: float | list[float] | None) -> list[Held]:
    """Quantisers of an attention layer, by leaf name."""
    paths = {leaf: f"{LAYER}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")}
    return [Held(paths[leaf], None if value is None else torch.tensor(value)) for leaf, value in amax.items()]


def test_the_largest_counts_and_other_sets_keep_theirs() -> None:
    members = held(q_proj=1.5, k_proj=4.0, v_proj=0.25, o_proj=7.0)
    assert share(members, weight_set_of) == 2
    assert [float(each.amax) for each in members if each.amax is not None] == [4.0, 4.0, 4.0, 7.0]
    assert unequal_sets(members, weight_set_of) == []
    assert share(members, weight_set_of) == 0


def test_scales_of_each_expert_are_shared_expert_by_expert() -> None:
    members = held(q_proj=[1.0, 5.0], k_proj=[3.0, 2.0])
    share(members, weight_set_of)
    assert all(torch.equal(each.amax, torch.tensor([3.0, 5.0])) for each in members if each.amax is not None)


def test_what_no_token_reached_takes_the_amax_of_its_set_and_none_is_an_error() -> None:
    experts = [Held(f"{LAYER}.mlp.experts.{number}.down_proj", None) for number in range(3)]
    experts[1].amax = torch.tensor(2.5)
    assert share(experts, input_set_of, inputs=True) == 2
    assert {float(each.amax) for each in experts if each.amax is not None} == {2.5}
    with pytest.raises(ValuesError, match="no value reached it"):
        share(held(o_proj=None), weight_set_of)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_amax_that_makes_no_scale_is_refused(bad: float) -> None:
    with pytest.raises(ValuesError, match="expected finite and greater than zero"):
        share(held(o_proj=bad), weight_set_of)
