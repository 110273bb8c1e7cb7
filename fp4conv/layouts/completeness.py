"""Is anything missing? Layers and experts of a parsed model against one another and against its config.

Missing experts are an error: programs fill them with random values without a word. A layer that lacks what layers of
its kind have is named in a warning. Kinds are told by the tensors: a layer that has less than another and nothing of
its own is taken for a poorer one of the same kind; layers that differ both ways (dense and expert layers, linear and
full attention) are two kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fp4conv.errors import SourceError
from fp4conv.families import Role
from fp4conv.model import JSON, Weight

_LAYER = re.compile(r"^(?P<stack>.*?\b(?:layers|h|layer|blocks))\.(?P<number>[0-9]{1,6})\.(?P<rest>.+)$")
_EXPERT = re.compile(r"^(?P<parent>.*\bexperts)\.(?P<number>[0-9]{1,6})\.(?P<rest>.+)$")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ANY_EXPERT = r"\g<parent>.*.\g<rest>"
_ROUTER = re.compile(r"(^|\.)(gate|router)\.weight$")
_FUSED = ("gate_up_proj", "down_proj")
_MOST_LAYERS = 100_000
_HINT = "the checkpoint is incomplete, and nothing is ever filled in: download or save it again"


def check_size(config: Mapping[str, JSON]) -> None:
    """SourceError for a number of layers that no model has: whoever counts to it would not come to an end."""
    for part in (config, config.get("text_config")):
        total = part.get("num_hidden_layers") if isinstance(part, Mapping) else None
        if isinstance(total, (int, float)) and abs(total) > _MOST_LAYERS:
            raise SourceError(
                f"num_hidden_layers is {str(total)[:40]}, more than any model has",
                where="config.json",
                hint="Mend the file, or download it again.",
            )


@dataclass(frozen=True)
class Gap:
    """What is missing. `where`: a tensor, a layer or a stack of layers. `fatal`: nothing can stand in for it."""

    where: str
    found: str
    fatal: bool = False


def check_complete(weights: Sequence[Weight], config: Mapping[str, JSON]) -> tuple[str, ...]:
    """Warnings. SourceError where experts are missing."""
    notes: list[str] = []
    for gap in gaps([(weight.name, weight.role) for weight in weights], config):
        if gap.fatal:
            raise SourceError(gap.found, where=gap.where, hint=_HINT)
        notes.append(f"{gap.where} {gap.found}")
    return tuple(notes)


def gaps(weights: Sequence[tuple[str, Role]], config: Mapping[str, JSON]) -> Iterator[Gap]:
    """Everything that `weights` (names and roles) lack, layer by layer, those of experts first."""
    stated = config.get("text_config")
    config = stated if isinstance(stated, dict) else config
    total = config.get("num_hidden_layers")
    layers = _layers(name for name, role in weights if role not in (Role.MTP, Role.VISION, Role.AUDIO))
    for stack, found in layers.items():
        yield from _expert_gaps(stack, found, config)
        if config.get("model_type") == "gpt_oss":
            yield from _gpt_oss_gaps(stack, found, total if isinstance(total, int) else 0)
        yield from _poorer(stack, found)
        absent = [layer for layer in range(total) if layer not in found] if isinstance(total, int) else []
        if absent and len(layers) == 1:
            there = f"has none numbered {_some(map(str, absent))}; the config says {total} layers"
            yield Gap(stack, there)


def _layers(names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Stack ('model.layers') -> layer -> names within the layer. Numbers within a layer's name begin no new stack."""
    found: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if match := _LAYER.match(name):
            found.setdefault(match["stack"], {}).setdefault(int(match["number"]), set()).add(match["rest"])
    return found


def _gpt_oss_gaps(stack: str, found: Mapping[int, set[str]], total: int) -> Iterator[Gap]:
    """Every layer has both expert parameters; experts in a form that is not known here are left alone."""
    for layer in range(max(total, max(found) + 1)):
        inside = found.get(layer, set())
        unknown = [name for name in inside if ".experts." in name and not name.endswith((*_FUSED, "_bias"))]
        for leaf in () if unknown else _FUSED:
            if f"mlp.experts.{leaf}" not in inside:
                where = f"{stack}.{layer}.mlp.experts.{leaf}"
                yield Gap(where, "is not there: the experts of this layer are lost", fatal=True)


def _expert_gaps(stack: str, found: Mapping[int, set[str]], config: Mapping[str, JSON]) -> Iterator[Gap]:
    """Every expert of a layer has the tensors that the others have, and there are as many as in other layers."""
    experts = {layer: _experts(inside) for layer, inside in found.items()}
    if not any(experts.values()):
        return
    stated = next((count for key in _EXPERT_COUNTS if isinstance(count := config.get(key), int)), 0)
    most = max(max(numbers) + 1 for groups in experts.values() for numbers in groups.values())
    for layer, groups in sorted(experts.items()):
        if not groups and (router := next((name for name in found[layer] if _ROUTER.search(name)), None)):
            where = f"{stack}.{layer}.{router}"
            yield Gap(where, "a router without experts; other layers have some", fatal=True)
        for parent, members in groups.items():
            wanted = set().union(*members.values())
            for number in range(max(stated, most)):
                for lacking in sorted(wanted - members.get(number, set())):
                    there = f"is not there, other experts have it ({len(members)} experts of {max(stated, most)} found)"
                    yield Gap(f"{stack}.{layer}.{parent}.{number}.{lacking}", there, fatal=True)


def _experts(inside: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """'mlp.experts' -> expert -> names within the expert."""
    found: dict[str, dict[int, set[str]]] = {}
    for name in inside:
        if match := _EXPERT.match(name):
            found.setdefault(match["parent"], {}).setdefault(int(match["number"]), set()).add(match["rest"])
    return found


def _poorer(stack: str, found: Mapping[int, set[str]]) -> Iterator[Gap]:
    kinds = {layer: frozenset(_EXPERT.sub(_ANY_EXPERT, name) for name in rest) for layer, rest in found.items()}
    distinct = set(kinds.values())
    for layer, kind in sorted(kinds.items()):
        richer = [other for other in distinct if kind < other]
        if richer:
            lacking = min(richer, key=len) - kind
            there = f"lacks {len(lacking)} tensors that other layers have: {_some(sorted(lacking), 3)}"
            yield Gap(f"{stack}.{layer}", there)


def _some(items: Iterable[str], most: int = 5) -> str:
    listed = list(items)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
