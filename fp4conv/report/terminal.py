"""What the commands print for people: rich tables on stdout, at any width. Machines take --json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from fp4conv.families import EXCLUDED
from fp4conv.formats import BLOCK_FORMATS
from fp4conv.hints.values import BESIDE
from fp4conv.plan import Action, Plan
from fp4conv.publishing.published import Published
from fp4conv.report.converted import ConvertResult, DownloadForecast, Forecast
from fp4conv.report.hints import HintsResult, part_bytes
from fp4conv.report.verified import Verified
from fp4conv.report.visible import visible
from fp4conv.servers import Verdict
from fp4conv.sizes import as_option, format_size
from fp4conv.training_rules import taken_as

_VERBS = {
    Action.COPY: "copied as they are",
    Action.CAST: "cast",
    Action.QUANTIZE: "quantised",
    Action.DEQUANTIZE: "decoded",
    Action.TRANSCODE: "transcoded",
    Action.REBLOCK: "blocks of 32 split into 16",
    Action.MERGE: "merged with adapters",
}


def console(stderr: bool = False) -> Console:
    """A console that wraps at the terminal's width, and at 120 columns where there is no terminal.

    Without markup and emoji: names of files and tensors may have brackets and colons, and are printed as they are.
    """
    plain = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not plain.is_terminal:
        plain.width = 120
    return plain


@dataclass(frozen=True)
class Shown:
    """A view whose text cannot steer the terminal: styles are ours, characters in names are not."""

    view: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.view, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def grid(*alignments: str) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for align in alignments:
        table.add_column(justify="right" if align == ">" else "left", overflow="fold")
    return table


def plan_view(plan: Plan, *, forecast: Forecast, publish: str = "") -> RenderableType:
    """The plan of a dry run: tensors by action, sizes, shards, disk, memory, servers; where it would be published."""
    counts = Counter((step.action, step.target) for step in plan.model_steps)
    written: Counter[tuple[Action, str]] = Counter()
    for step in plan.model_steps:
        written[step.action, step.target] += step.bytes_written
    actions = grid("<", ">", "<", ">")
    for (action, target), count in sorted(counts.items(), key=lambda item: -written[item[0]]):
        wording = _VERBS[action] + (f" ({target})" if action is Action.COPY else f" to {target}")
        actions.add_row("", f"{count:,}", wording, format_size(written[action, target]))
    facts = grid("<", "<")
    model = plan.model
    kind = f"{taken_as(model)}, {model.layout} layout, family {model.family.name}"
    rule = f", scale rule {plan.rule.value}" if plan.rule else ""
    twice = f", {format_size(plan.scan_bytes)} of it twice" if plan.scan_bytes else ""
    count = sum(not name.startswith(BESIDE) for name in plan.shards)
    shards = f"{count:,} shard{'s' if count > 1 else ''}"
    facts.add_row("source", f"{model.source.name}  ({kind})")
    if model.source.pinned is not None:
        facts.add_row("commit", model.source.pinned.commit)
    facts.add_row("target", f"{plan.target}, {plan.layout} layout{rule}")
    facts.add_row("reads", format_size(plan.bytes_read) + twice)
    facts.add_row("writes", f"{format_size(plan.total_bytes)} in {shards} and {len(plan.files)} small files")
    if words := _kept_words(plan):
        facts.add_row("hints", words)
    if forecast.download is not None:
        if model.source.pinned is not None:
            facts.add_row("download", _download_words(forecast.download))
        facts.add_row("stream", _stream_words(forecast.download))
    if publish:
        facts.add_row("publishes", publish)
    needed, free = forecast.disk_needed_bytes, forecast.disk_free_bytes
    disk = Text(f"needs {format_size(needed)}, {format_size(free)} free")
    if needed > free:
        disk.append(": not enough", style="bold red")
    facts.add_row("disk", disk)
    facts.add_row("memory", f"at most {format_size(forecast.memory_bound_bytes)}")
    choice = _choice_view(plan) if plan.target in BLOCK_FORMATS else []
    return Group(facts, Text(), Text("tensors"), actions, Text(), *choice, *servers_view(plan.servers))


def _download_words(download: DownloadForecast) -> str:
    """What comes down, and what is here."""
    here = f", {format_size(download.cached_bytes)} are in the cache" if download.cached_bytes else ""
    return f"{format_size(download.download_bytes)}{here}"


def _stream_words(download: DownloadForecast) -> str:
    """The bound of --stream, or what it could be: source and result together."""
    least = as_option(download.least_max_disk_bytes)
    if download.max_disk_bytes is None:
        return f"with --stream, --max-disk {least} is enough for source and result"
    return f"source and result take at most {format_size(download.max_disk_bytes)}; the least is --max-disk {least}"


def _choice_view(plan: Plan) -> list[RenderableType]:
    """Which modules end up quantised, and which matrices stay dense, with the reason."""
    quantized: Counter[str] = Counter()
    dense: dict[str, Counter[str]] = {}
    for step in plan.model_steps:
        if step.weight is None or not step.weight.is_matrix:
            continue
        leaf = step.weight.module.rpartition(".")[2]
        if step.target in BLOCK_FORMATS:
            quantized[leaf] += 1
        else:
            dense.setdefault(EXCLUDED.get(step.weight.role, "not selected"), Counter())[leaf] += 1
    table = grid("<", "<")
    table.add_row("quantised", _leaves(quantized))
    for reason, leaves in dense.items():
        table.add_row("dense", Text.assemble(_leaves(leaves), (f"  ({reason})", "dim")))
    return [table, Text()]


def _leaves(leaves: Counter[str]) -> str:
    """'q_proj x36, k_proj x36', the first few."""
    shown = [f"{leaf} x{count}" if count > 1 else leaf for leaf, count in list(leaves.items())[:8]]
    return ", ".join(shown) + (", ..." if len(leaves) > 8 else "")


def _kept_words(plan: Plan) -> str:
    """What round-trip hints will take beside a dense result, or that there are some to go by."""
    fixed = part_bytes(plan)
    if plan.kept is not None:
        most = format_size(fixed + plan.kept.record_bytes // 2)
        rare = f"; {format_size(plan.kept.code_bytes // 2)} more if {plan.target} can hold no value exactly"
        return f"in fp4conv/, at most {most}{rare if plan.kept.code_bytes else ''}; --no-hints leaves them out"
    if fixed:
        return f"{format_size(fixed)} in fp4conv/ come along"
    return f"of {len(plan.hints.weights):,} weights, where they still fit" if plan.hints else ""


def servers_view(servers: Sequence[Verdict]) -> list[RenderableType]:
    """One line a server: whether it loads exactly this, and why not or on what condition."""
    if not servers:
        return []
    table = grid("<", "<", "<")
    for verdict in servers:
        word, style = _OUTCOMES[verdict.outcome]
        table.add_row(verdict.server, Text(word, style=style), Text(verdict.note, style="dim"))
    return [Text("servers (as their sources say; --for SERVER makes a refusal an error)"), table]


_NUMBER = re.compile(r"\.\d+\.")
_MOST_MERGED = 24  # more lines than that are read by nobody: --json has them all

_OUTCOMES = {
    "loads": ("loads", "green"),
    "refuses": ("refuses", "yellow"),
    "silent-damage": ("wrong, in silence", "bold red"),
    "unknown": ("unknown", "dim"),
}


def warnings_view(warnings: Iterable[str]) -> list[RenderableType]:
    return [Text.assemble(("warning: ", "yellow"), warning) for warning in warnings]


def convert_view(result: ConvertResult) -> RenderableType:
    """What a conversion did: where, how large, how fast, what it cost, and which servers load it."""
    facts = grid("<", "<")
    facts.add_row("source", f"{result.source}  (taken as {result.source_format})")
    for asked, commit in result.commits.items():
        facts.add_row("commit", f"{commit} of {asked}")
    facts.add_row("written", f"{result.destination}  ({result.format}, {result.layout} layout)")
    if result.published:
        facts.add_row("published", published_words(result.published))
    facts.add_row("tensors", f"{result.converted:,} converted, {result.copied:,} copied")
    if result.merged:
        facts.add_row("merged", merge_words(result))
    rate = result.bytes_read / result.seconds if result.seconds else 0.0
    sizes = f"{format_size(result.bytes_read)} read, {format_size(result.bytes_written)} written"
    facts.add_row("size", f"{sizes}, in {result.seconds:.1f} s ({format_size(rate)}/s)")
    facts.add_row("memory", f"{format_size(result.peak_rss_bytes)} at the most")
    facts.add_row("loss", error_words(result))
    if words := hint_words(result.hints):
        facts.add_row("hints", words)
    return Group(facts, Text(), *merged_view(result), *servers_view(result.servers))


def pushed_view(found: Verified, published: Published) -> RenderableType:
    """What a push did: from where, to where, and which servers load it."""
    facts = grid("<", "<")
    facts.add_row("source", f"{found.source}  ({found.format}, {found.layout} layout)")
    facts.add_row("published", published_words(published))
    facts.add_row("commit", published.commit)
    return Group(facts, Text(), *servers_view(found.servers))


def published_words(published: Published) -> str:
    """Where the model is, how it came there, and what had to go."""
    gone = f"; {len(published.deleted)} older files were removed" if published.deleted else ""
    return f"{published.url}  ({published.files} files, by {published.pull_request}{gone})"


def merge_words(result: ConvertResult) -> str:
    sizes = [size for size in result.merged.values() if size is not None]
    words = f"{len(result.merged):,} tensors with adapters"
    if sizes:
        words += f", changed by {min(sizes):.2%} to {max(sizes):.2%} of their norm"
    return words


def merged_view(result: ConvertResult) -> list[RenderableType]:
    """Each tensor that adapters changed, and by how much; many of a kind share a line."""
    if not result.merged:
        return []
    kinds: dict[str, list[float | None]] = {}
    for name, size in result.merged.items():
        kinds.setdefault(_NUMBER.sub(".*.", name), []).append(size)
    few = len(result.merged) <= _MOST_MERGED
    rows = {name: [size] for name, size in result.merged.items()} if few else kinds
    table = grid("<", ">", "<")
    for name, sizes in rows.items():
        known = [size for size in sizes if size is not None]
        change = " to ".join(f"{size:.2%}" for size in sorted({min(known), max(known)})) if known else "replaced"
        table.add_row(Text(name), "" if few else f"{len(sizes):,}", change)
    return [Text("merged (norm of the change against that of the tensor)"), table, Text()]


def hint_words(hints: HintsResult) -> str:
    """What is kept for the way back, or what came of it; empty where there are no hints."""
    words = []
    if hints.kept_bytes:
        words.append(f"{format_size(hints.kept_bytes)} in fp4conv/, so that the way back gives the same bytes")
    for used, stale, what in (
        (hints.blocks_used, hints.blocks_stale, "blocks"),
        (hints.sets_used, hints.sets_stale, "sets that share a tensor scale"),
    ):
        if used or stale:
            changed = f"; {stale:,} have changed since, and were quantised anew" if stale else ""
            words.append(f"{used:,} {what} have their old bytes back{changed}")
    return "; ".join(words)


def error_words(result: ConvertResult) -> str:
    """SQNR in dB and the weight that lost most; or that nothing was lost."""
    known = {name: db for name, db in result.per_tensor.items() if db is not None}
    if not result.per_tensor:
        return "nothing was quantised"
    if not known or result.sqnr_db is None:
        return "none: every value is as it was"
    worst = min(known, key=lambda name: known[name])
    words = f"SQNR {result.sqnr_db:.2f} dB; lowest {known[worst]:.2f} dB in {worst}"
    if result.lossy_blocks:
        words += f"; {result.lossy_blocks:,} blocks of 16 could not be held exactly"
    return words


def tour_view(source_bytes: int, stops: Sequence[tuple[str, bool, ConvertResult]]) -> RenderableType:
    """The demo's table: what each conversion wrote, and what it cost."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("checkpoint", "from", "size", "of BF16", "values against its source"):
        table.add_column(title, justify="right" if title in ("size", "of BF16") else "left", overflow="fold")
    table.add_row("bf16", "", format_size(source_bytes), "100 %", "")
    for name, exact, result in stops:
        share = f"{100 * result.bytes_written / source_bytes:.0f} %"
        cost = Text("all equal", style="green") if exact else Text(f"SQNR {result.sqnr_db or 0:.2f} dB")
        table.add_row(name, PurePath(result.source).name, format_size(result.bytes_written), share, cost)
    return table
