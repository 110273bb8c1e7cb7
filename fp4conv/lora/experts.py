"""Expert parameters: which 3-D parameter an adapter's tensors belong to, and which way its factors lie.

peft's names say only that a parameter of '<path>.experts' was wrapped. With several, wrappers nest in the order in
which the model registers its parameters: the innermost ('base_layer' most often) is gate_up_proj, the outermost
down_proj. Shapes confirm it.

A checkpoint may hold such a parameter as one tensor [E, K, N] (gpt-oss) or [E, N, K], or as a module an expert, where
gate_up_proj is gate_proj's rows on top of up_proj's (transformers 5 fuses them so when it loads).

Which axis lora_A lies along: before peft 0.19 always axis 1 of the parameter; since then the in-features, unless a
transformers release that does not yet tell that gpt-oss keeps them on axis 1 makes it the other. Shapes tell, except
for a square matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fp4conv.deltas import Factor, LowRank
from fp4conv.errors import PlanError
from fp4conv.families import natural_key
from fp4conv.lora.config import AdapterConfig
from fp4conv.lora.names import candidates, depth, unused, unwrapped
from fp4conv.model import Weight
from fp4conv.safetensors_io import TensorRef

# A fused parameter -> the modules of an expert that it is made of, stacked along N; a row for each naming.
_MEMBERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("down_proj", ("down_proj",)),
    ("down_proj", ("w2",)),
)
_ORDER = ("gate_up_proj", "down_proj")  # as transformers' expert modules register them
_OTHER_PATHS = ((".mlp.experts", ".block_sparse_moe.experts"),)  # Mixtral's checkpoints, and its model since 5.0
_SWAPS_SINCE = (0, 19)  # peft puts lora_A along the in-features of [E, N, K] too


@dataclass(frozen=True)
class Member:
    """A weight that holds rows start:start + N of the parameter: of expert `expert`, or of all when None."""

    weight: Weight
    expert: int | None
    start: int


@dataclass(frozen=True)
class Parameter:
    """A 3-D parameter as the trained model had it: `experts` matrices [n, k]. `kn`: stored [E, K, N]."""

    name: str
    experts: int
    n: int
    k: int
    kn: bool
    members: tuple[Member, ...]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Level:
    """One wrapper's factors: lora_A [r x E, a], lora_B [b, r x E]."""

    module: str
    a: TensorRef
    b: TensorRef


def parameters_of(path: str, weights: Mapping[str, Weight]) -> tuple[Parameter, ...]:
    """The expert parameters of module `path` that the base has, fused or a module an expert, in wrapping order."""
    paths = [path, *(path.replace(old, new) for old, new in _OTHER_PATHS if path.endswith(old))]
    for place in (name for one in paths for name in candidates(one)):
        found = [*_fused(place, weights), *_by_module(place, weights)]
        if found:
            rank = {leaf: number for number, leaf in enumerate(_ORDER)}
            found.sort(key=lambda parameter: (rank.get(parameter.leaf, len(rank)), natural_key(parameter.name)))
            return tuple(found)
    return ()


def _fused(path: str, weights: Mapping[str, Weight]) -> list[Parameter]:
    prefix = path + "."
    return [
        Parameter(name, weight.matrices, weight.n, weight.k, weight.kn, (Member(weight, None, 0),))
        for name, weight in weights.items()
        if name.startswith(prefix) and "." not in name[len(prefix) :] and len(weight.shape) == 3 and weight.is_matrix
    ]


def _by_module(path: str, weights: Mapping[str, Weight]) -> list[Parameter]:
    found = []
    for fused, leaves in _MEMBERS:
        if f"{path}.0.{leaves[0]}.weight" not in weights:
            continue
        members: list[Member] = []
        expert = 0
        while f"{path}.{expert}.{leaves[0]}.weight" in weights:
            start = 0
            for leaf in leaves:
                weight = weights.get(f"{path}.{expert}.{leaf}.weight")
                if weight is None:
                    raise PlanError(f"expert {expert} has no {leaf}", where=f"{path}.{expert}")
                members.append(Member(weight, expert, start))
                start += weight.n
            expert += 1
        first = members[: len(leaves)]
        n, k = sum(member.weight.n for member in first), first[0].weight.k
        found.append(Parameter(f"{path}.{fused}", expert, n, k, False, tuple(members)))
    return found


def assign(
    levels: Sequence[Level], parameters: Sequence[Parameter], config: AdapterConfig, adapter: str
) -> list[tuple[Level, Parameter]]:
    """Which level adapts which parameter. `parameters` in wrapping order. PlanError where that cannot be told."""
    path = unwrapped(levels[0].module)
    targeted = [parameter for parameter in parameters if config.targets(f"{path}.{parameter.leaf}")]
    inner_first = sorted(levels, key=lambda level: -depth(level.module))
    names = ", ".join(parameter.leaf for parameter in parameters)
    if len(targeted) != len(levels):
        raise unused(
            levels[0].a,
            adapter,
            f"target_parameters names {len(targeted)} of the expert parameters ({names}), the adapter has factors "
            f"for {len(levels)}",
            "give the adapter_config.json that was saved with these tensors",
        )
    for order in (targeted, targeted[::-1]):
        if all(_orientations(level, parameter) for level, parameter in zip(inner_first, order, strict=True)):
            return list(zip(inner_first, order, strict=True))
    level, parameter = inner_first[0], targeted[0]
    raise unused(
        level.a,
        adapter,
        f"lora_A {list(level.a.spec.shape)} and lora_B {list(level.b.spec.shape)} do not fit {parameter.name}, "
        f"{parameter.experts} experts of [N, K] = [{parameter.n}, {parameter.k}]",
        "is this the base that the adapter was trained on?",
    )


def _orientations(level: Level, parameter: Parameter) -> tuple[bool, ...]:
    """The ways in which the factors can lie: True when lora_A lies along N instead of K. None when nothing fits."""
    a, b = level.a.spec.shape, level.b.spec.shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % parameter.experts:
        return ()
    fits = ((False, (parameter.k, parameter.n)), (True, (parameter.n, parameter.k)))
    return tuple(swapped for swapped, sides in fits if (a[1], b[0]) == sides)


def swapped_of(pairs: Iterable[tuple[Level, Parameter]], config: AdapterConfig, adapter: str) -> dict[str, bool]:
    """Module of each level -> whether its lora_A lies along N. Square ones do as others, else as the version says."""
    known: dict[str, bool] = {}
    square: list[tuple[Level, Parameter]] = []
    for level, parameter in pairs:
        ways = _orientations(level, parameter)
        if len(ways) == 1:
            known[level.module] = ways[0]
        else:
            square.append((level, parameter))
    seen = set(known.values())
    for level, parameter in square:
        known[level.module] = seen.copy().pop() if len(seen) == 1 else _by_version(level, parameter, config, adapter)
    return known


def _by_version(level: Level, parameter: Parameter, config: AdapterConfig, adapter: str) -> bool:
    if config.peft_version is None or config.peft_version < _SWAPS_SINCE:
        return not parameter.kn  # along axis 1, which is K where the parameter is stored [E, K, N]
    if parameter.members[0].expert is not None:
        return False  # a module an expert: the fused parameter is [E, N, K]
    raise unused(
        level.a,
        adapter,
        f"{parameter.name} is square (K = N = {parameter.k}), so its shape does not tell which way lora_A lies: that "
        "depends on the transformers release that trained it, which the adapter does not name",
        "merge it with the peft and transformers that trained it: merge_and_unload(), then convert the result",
    )


def deltas_of(
    level: Level, parameter: Parameter, swapped: bool, config: AdapterConfig, adapter: str
) -> list[tuple[Weight, LowRank]]:
    """The delta of every weight that holds a part of the parameter."""
    key = f"{unwrapped(level.module)}.{parameter.leaf}"
    rank = level.a.spec.shape[0] // parameter.experts
    if rank != config.rank_of(key):
        raise unused(
            level.a,
            adapter,
            f"its rank is {rank} ({level.a.spec.shape[0]} / {parameter.experts} experts), the config says "
            f"{config.rank_of(key)}",
            "give the adapter_config.json that was saved with these tensors",
        )
    made = []
    for member in parameter.members:
        along_n, along_k = (level.a, level.b) if swapped else (level.b, level.a)
        rows = Factor(along_n, not swapped, rank, parameter.experts, member.expert, member.start)
        columns = Factor(along_k, swapped, rank, parameter.experts, member.expert)
        made.append((member.weight, LowRank(adapter, rows, columns, config.scaling_of(key), linear=False)))
    return made
