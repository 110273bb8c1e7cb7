"""The model card of a published checkpoint: what it is, what it cost, who loads it, and how it was made.

Pure: what is known comes in as values. What the base's card says of its licence and language is taken over; what
somebody else wrote into the repository's card stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from fp4conv.formats import BLOCK_FORMATS, MXFP4, NVFP4
from fp4conv.model import JSON
from fp4conv.servers import Verdict
from fp4conv.sizes import format_size

if TYPE_CHECKING:
    import yaml

BEGIN, END = "<!-- fp4conv: written by the command below; what is outside of these lines stays -->", "<!-- /fp4conv -->"
_OURS = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n?", re.DOTALL)
_HEAD = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_LARGEST_HEAD = 500_000  # results of a benchmark take some hundred thousand
_MOST_NODES, _DEEPEST = 100_000, 50
# What holds for a copy in another number format as it does for the base.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
_OWN = ("base_model", "base_model_relation", "library_name", "tags")
_FORMATS = {
    MXFP4.name: "E2M1 codes, one E8M0 scale for 32 values",
    NVFP4.name: "E2M1 codes, one E4M3 scale for 16 values, one F32 scale for a tensor",
}
_OUTCOMES = {"loads": "loads", "refuses": "refuses", "silent-damage": "computes something else", "unknown": "unknown"}
_MOST_NAMES = 12
OPENAI_ORIGINAL = "openai-original"  # a layout that no library of the Hub's list reads


@dataclass(frozen=True)
class Part:
    """Tensors of one kind: 'quantised to nvfp4', how many, how large, the names of their modules and how often."""

    what: str
    count: int
    nbytes: int
    modules: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """What a card says. `bases`: ids on the Hub of the model and adapters that it was made from.

    `relation`: 'quantized', 'finetune' or '' as the Hub knows them. `source`: how to name where it comes from.
    `quantised`: how many weights' error was measured, None where only finished files were at hand; `sqnr_db` of all
    their values, None where nothing was lost, and `worst` (tensor, dB). `command`: what to type for the same bytes.
    """

    repo: str
    source: str
    bases: tuple[str, ...]
    relation: str
    format: str
    layout: str
    rule: str
    parts: tuple[Part, ...]
    servers: tuple[Verdict, ...]
    version: str
    command: str = ""
    quantised: int | None = None
    sqnr_db: float | None = None
    worst: tuple[str, float] | None = None
    lossy_blocks: int = 0
    adapters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def write_card(card: Card, base: str, old: str) -> str:
    """README.md. `base`: that of the model it was made from. `old`: the repository's own; all but our part stays."""
    metadata = {**_metadata(card, read_metadata(base)), **_own_metadata(old)}
    metadata["tags"] = _tags(card, metadata.get("tags"))
    rest = _OURS.sub("", _HEAD.sub("", old, count=1)).strip()
    text = f"---\n{_yaml(metadata)}\n---\n\n{BEGIN}\n{_body(card)}\n{END}\n"
    return f"{text}\n{rest}\n" if rest else text


def read_metadata(text: str) -> dict[str, JSON]:
    """What a card says at its head in YAML; empty where that is missing, broken or absurdly long."""
    import yaml

    found = _HEAD.match(text)
    if found is None or len(found[1]) > _LARGEST_HEAD:
        return {}
    try:
        parsed = yaml.load(found[1], _loader())
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(parsed, dict):
        return {}
    return {key: value for key, value in parsed.items() if isinstance(key, str) and _is_json(value)}


@cache
def _loader() -> type[yaml.SafeLoader]:
    """Reads YAML 1.2, as the Hub does: in PyYAML's 1.1 the language `no` is a truth value, and 1:30 a number."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # C where it is there
        yaml_implicit_resolvers: ClassVar[dict[str, object]] = {}

    for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(\.[0-9]*)?[eE][-+][0-9]+)", "-+.0123456789"),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), list(first))
    return Loader


def _is_json(value: object) -> bool:
    """Whether it is made of plain values, and not too many: aliases can make a few lines endless."""
    todo, seen = [(value, 0)], 0
    while todo:
        each, depth = todo.pop()
        seen += 1
        if isinstance(each, dict):
            if not all(isinstance(key, str) for key in each):
                return False
            todo += [(inside, depth + 1) for inside in each.values()]
        elif isinstance(each, list):
            todo += [(inside, depth + 1) for inside in each]
        elif not (each is None or isinstance(each, (str, bool, int, float))):
            return False
        if depth > _DEEPEST or len(todo) + seen > _MOST_NODES:
            return False
    return True


def with_own_metadata(text: str) -> str:
    """A card of ours without what it took over from others, for a Hub that does not accept that."""
    kept = {key: value for key, value in read_metadata(text).items() if key in _OWN}
    return f"---\n{_yaml(kept)}\n---\n" + _HEAD.sub("", text, count=1)


def _is_plain(value: JSON) -> bool:
    """Text, or a list of texts: all that is taken over from somebody else's card."""
    if isinstance(value, list):
        return len(value) <= 200 and all(isinstance(item, str) for item in value)
    return isinstance(value, (str, bool))


def _metadata(card: Card, base: Mapping[str, JSON]) -> dict[str, JSON]:
    base = {key: value for key, value in base.items() if _is_plain(value)}
    metadata: dict[str, JSON] = {key: base[key] for key in _KEPT if key in base}
    bases: JSON = list(card.bases) if card.bases else base.get("base_model")
    if bases:
        metadata["base_model"] = bases
    if card.bases and card.relation:
        metadata["base_model_relation"] = card.relation
    if card.layout != OPENAI_ORIGINAL:
        metadata["library_name"] = base.get("library_name", "transformers")
    if base.get("tags"):
        metadata["tags"] = base["tags"]
    return metadata


def _own_metadata(old: str) -> dict[str, JSON]:
    """What the repository's owner has said there; what we say of the base is said anew."""
    ours = ("base_model", "base_model_relation", "tags") if _OURS.search(old) else ("tags",)
    return {key: value for key, value in read_metadata(old).items() if key not in ours}


def _tags(card: Card, found: JSON) -> list[JSON]:
    formats = ("mxfp4", "nvfp4", "fp4", "bf16", "fp8", "8-bit", "4-bit")
    kept = [tag for tag in found if isinstance(tag, str) and tag not in formats] if isinstance(found, list) else []
    own = ["fp4conv", card.format, *(["fp4", "4-bit"] if card.format in BLOCK_FORMATS else [])]
    if card.layout in ("compressed-tensors", "modelopt"):
        own.append(card.layout)
    tags: list[JSON] = list(dict.fromkeys([*kept, *own]))
    return tags


def _yaml(metadata: Mapping[str, JSON]) -> str:
    import yaml

    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=1000).strip()


def _body(card: Card) -> str:
    blocks = [f"# {card.repo.rpartition('/')[2]}", _headline(card), "## What is in it", _contents(card)]
    blocks += ["## What the format costs", _cost(card)]
    if card.servers:
        blocks += ["## Servers", _servers(card.servers)]
    blocks += ["## How it was made", _how(card)]
    return "\n\n".join(blocks)


def _headline(card: Card) -> str:
    if not card.source:
        return f"A checkpoint in {card.format.upper()}, uploaded by fp4conv {card.version}."
    merged = f", with {_listed([_link(name) for name in card.adapters])} merged into it" if card.adapters else ""
    return (
        f"{_link(card.source)}{merged}, in {card.format.upper()}. "
        f"Written by fp4conv {card.version}, which converts checkpoints between BF16, MXFP4 and NVFP4."
    )


def _contents(card: Card) -> str:
    rows = [("format", card.format.upper() + (f": {_FORMATS[card.format]}" if card.format in _FORMATS else ""))]
    rows += [("layout", card.layout)]
    if card.rule:
        rows.append(("scale rule", f"`{card.rule}`"))
    rows.append(("size", format_size(sum(part.nbytes for part in card.parts))))
    rows += [(part.what, _part(part)) for part in card.parts]
    return _table(("", ""), rows)


def _part(part: Part) -> str:
    names = [f"`{name}`" + (f" x{count}" if count > 1 else "") for name, count in part.modules.items()]
    more = f", and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    shown = ": " + ", ".join(names[:_MOST_NAMES]) + more if names else ""
    return f"{part.count:,} tensor{'s' * (part.count != 1)}, {format_size(part.nbytes)}{shown}"


def _cost(card: Card) -> str:
    if card.quantised is None:
        return "Not measured: only the finished files were at hand."
    if not card.quantised:
        words = f"Nothing was quantised. Values are those of the source, rounded where {card.format.upper()} needs it."
    elif card.sqnr_db is None:
        words = "Nothing was lost: every value is as it was in the source."
    else:
        words = f"The signal-to-noise ratio of the quantised weights against the source's is {card.sqnr_db:.2f} dB"
        words += f"; the lowest is {card.worst[1]:.2f} dB, in `{card.worst[0]}`." if card.worst else "."
    if card.lossy_blocks:
        words += f" {card.lossy_blocks:,} blocks of 16 values could not be held exactly."
    return "\n\n".join([words, *(f"Note: {note}." for note in card.notes)])


def _servers(servers: Sequence[Verdict]) -> str:
    rows = [(v.server, v.version, _OUTCOMES[v.outcome], v.note) for v in servers]
    return "As read in their sources:\n\n" + _table(("server", "version", "", ""), rows)


def _how(card: Card) -> str:
    if not card.command:
        return f"By `fp4conv push`, from a finished folder in which `fp4conv verify` {card.version} found no error."
    fence = "```" if "```" not in card.command else "~~~~"
    return f"{fence}console\n$ {card.command}\n{fence}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)( at commit (?P<commit>[0-9a-f]{40}))?")


def _link(name: str) -> str:
    """'org/name' as a link to the Hub, other text as it is."""
    found = _ID.fullmatch(name)
    if found is None:
        return f"`{name}`"
    repo, commit = found["repo"], found["commit"]
    at = f" ([{commit[:7]}](https://huggingface.co/{repo}/tree/{commit}))" if commit else ""
    return f"[{repo}](https://huggingface.co/{repo}){at}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
