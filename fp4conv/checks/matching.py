"""How each server reads a list of modules that are not quantised: which modules does an entry take?

One function a server, from `docs/servers.md`, which links to the code that each was read from. Servers ask about the
modules that they hold: q, k and v are one, gate and up are one, and all experts of a layer are one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fp4conv.patterns import LONGEST_NAME, compile_bounded, matches

_FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_FUSED_NAME = {member: fused for fused, members in _FUSED.items() for member in members}
_EXPERT = re.compile(r"^(?P<experts>.*\.experts)(\..+)?$")


@dataclass(frozen=True)
class Asked:
    """A module as a server holds it: `name` in its own code, `members` as the checkpoint names them."""

    name: str
    members: tuple[str, ...]


class Undecided(Exception):
    """Some members of a fused module are listed and some are not: the server raises ValueError."""


def held_as(modules: Iterable[str]) -> dict[Asked, tuple[str, ...]]:
    """The modules that a server holds -> those of `modules` that are part of each."""
    groups: dict[Asked, list[str]] = {}
    for module in modules:
        groups.setdefault(_asked(module), []).append(module)
    return {asked: tuple(inside) for asked, inside in groups.items()}


def _asked(module: str) -> Asked:
    if found := _EXPERT.match(module):
        return Asked(found["experts"], (found["experts"],))
    parent, dot, leaf = module.rpartition(".")
    fused = _FUSED_NAME.get(leaf)
    if fused is None:
        return Asked(module, (module,))
    return Asked(parent + dot + fused, tuple(parent + dot + member for member in _FUSED[fused]))


def _all_or_none(asked: Asked, listed: Callable[[str], bool]) -> bool:
    found = {listed(member) for member in asked.members}
    if len(found) > 1:
        raise Undecided(asked.name)
    return found.pop()


def vllm_modelopt(asked: Asked, entries: Sequence[str]) -> bool:
    """Exact names, members of a fused one all or none; then any entry that is part of the name; then globs."""
    name = asked.name
    if name.endswith(".experts"):
        exact = any(name in entry for entry in entries if "experts" in entry)
    else:
        exact = name in entries or _all_or_none(asked, lambda member: member in entries)
    return exact or any(entry in name or fnmatchcase(name, entry) for entry in entries)


def vllm_compressed_tensors(asked: Asked, entries: Sequence[str]) -> bool:
    """Exact, or 're:' from the start of the name; the fused name decides, else its members, all or none."""

    def listed(name: str) -> bool:
        return any(name == entry or _by_pattern(entry, name) for entry in entries)

    if asked.name.endswith(".experts"):
        experts = [f"{asked.name}.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
        return listed(asked.name) or all(map(listed, experts))
    return listed(asked.name) or _all_or_none(asked, listed)


def sglang_modelopt(asked: Asked, entries: Sequence[str]) -> bool:
    """A dotted path, or a run of its parts; or a glob that is all of the name or all of one part of it."""

    def on_path(entry: str, name: str) -> bool:
        return f".{entry.rstrip('.')}." in f".{name}."

    name = asked.name
    if not name.endswith(".experts") and _all_or_none(
        asked, lambda member: any(on_path(entry, member) for entry in entries)
    ):
        return True
    return any(_sglang_excludes(entry, name) for entry in entries)


def _sglang_excludes(entry: str, name: str) -> bool:
    parts = (name, *name.split("."))
    if any(fnmatchcase(part, entry) for part in parts):
        return True
    tail = entry.rpartition(".")[2]
    return tail in _MLA_LEAVES and tail in parts[-1]


_MLA_LEAVES = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def trtllm(asked: Asked, entries: Sequence[str]) -> bool:
    """Globs, or 're:' for the whole name, on the name of a member or of anything above it."""

    def listed(name: str) -> bool:
        parts = name.split(".")
        names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(
            fnmatchcase(each, entry) or _by_pattern(entry, each, whole=True) for entry in entries for each in names
        )

    return _all_or_none(asked, listed)


def exact(asked: Asked, entries: Sequence[str]) -> bool:
    """Exact, or 're:' from the start, module by module: what transformers and compressed-tensors do."""
    return all(any(member == entry or _by_pattern(entry, member) for entry in entries) for member in asked.members)


def experts_always(asked: Asked, entries: Sequence[str]) -> bool:
    """MXFP4 of gpt-oss: experts are quantised whatever the list says, and nothing else is."""
    return not asked.name.endswith(".experts")


def transformers_mxfp4(asked: Asked, entries: Sequence[str]) -> bool:
    """Patterns from the start of the name to the end of a part, or ends of it; the experts that are left are MXFP4."""

    def takes(entry: str) -> bool:
        pattern = f"re:{entry}" if entry.endswith(".") else f"re:(?:{entry})(?:\\.|$)"
        return asked.name.endswith(entry) or _by_pattern(pattern, asked.name)

    return experts_always(asked, entries) or any(map(takes, entries))


def _by_pattern(entry: str, name: str, *, whole: bool = False) -> bool:
    if not entry.startswith("re:"):
        return False
    try:
        pattern = compile_bounded(entry.removeprefix("re:"))
    except ValueError:
        return False
    if whole:
        return len(name) <= LONGEST_NAME and pattern.fullmatch(name) is not None
    return matches(pattern, name)


Matcher = Callable[[Asked, Sequence[str]], bool]
MATCHERS: Mapping[tuple[str, str], Matcher] = {
    ("vllm", "openai"): experts_always,
    ("sglang", "openai"): experts_always,
    ("transformers", "openai"): transformers_mxfp4,
    ("vllm", "modelopt"): vllm_modelopt,
    ("vllm", "compressed-tensors"): vllm_compressed_tensors,
    ("sglang", "modelopt"): sglang_modelopt,
    ("sglang", "compressed-tensors"): vllm_compressed_tensors,
    ("trtllm", "modelopt"): trtllm,
    ("transformers", "compressed-tensors"): exact,
}
