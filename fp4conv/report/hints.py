"""What became of round-trip hints, as a value: how much is kept of them, or how many were of use."""

from __future__ import annotations

from dataclasses import dataclass

from fp4conv.hints.values import BESIDE, facts_bytes
from fp4conv.model import JSON
from fp4conv.pipeline.results import Outcome
from fp4conv.plan import Plan


@dataclass(frozen=True)
class HintsResult:
    """`kept_bytes`: what they take beside a dense result, in a dry run at the most.

    On the way back: MXFP4 blocks and NVFP4 sets (that share a tensor scale) that took theirs, and those that have
    changed since and were quantised anew.
    """

    kept_bytes: int = 0
    blocks_used: int = 0
    blocks_stale: int = 0
    sets_used: int = 0
    sets_stale: int = 0
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, JSON]:
        return {
            "kept_bytes": self.kept_bytes,
            "blocks_used": self.blocks_used,
            "blocks_stale": self.blocks_stale,
            "sets_used": self.sets_used,
            "sets_stale": self.sets_stale,
        }


def part_bytes(plan: Plan) -> int:
    """What the files of hints take of which the plan knows the size."""
    inside = [shard.nbytes for name, shard in plan.shards.items() if name.startswith(BESIDE)]
    return sum(inside) + sum(file.nbytes for file in plan.files if file.name.startswith(BESIDE))


def planned_hints(plan: Plan) -> HintsResult:
    """The upper bound, but for codes that no value tells: see `Plan.disk_bytes`."""
    noted = plan.kept.record_bytes // 2 + len(facts_bytes(plan.kept.facts)) if plan.kept else 0
    return HintsResult(part_bytes(plan) + noted)


def hints_result(plan: Plan, noted: int, outcome: Outcome) -> HintsResult:
    """`noted`: the bytes of the files that the plan did not know the size of."""
    counts = [result.counts for result in outcome.results.values()]
    warnings: tuple[str, ...] = ()
    if outcome.split_sets:
        warnings = (
            f"{len(outcome.split_sets)} sets that servers fuse have their old tensor scales back, which differ within "
            f"the set as they did before ({outcome.split_sets[0]}): servers misread that. --no-hints gives each one",
        )
    return HintsResult(
        kept_bytes=part_bytes(plan) + noted,
        blocks_used=sum(count.get("hints_used", 0) for count in counts),
        blocks_stale=sum(count.get("hints_stale", 0) for count in counts),
        sets_used=outcome.hinted_sets,
        sets_stale=outcome.stale_sets,
        warnings=warnings,
    )
