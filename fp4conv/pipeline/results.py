"""What a step's kernels measured, and its form in the journal. Imports no kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fp4conv.hints.runs import Run, runs_from
from fp4conv.model import JSON


@dataclass(frozen=True)
class StepResult:
    """What a step's kernels measured.

    `sums` over all values, each rounded once: 'signal' x^2 and 'noise' (x - decoded)^2 where it quantised;
    'forward_signal' and 'forward_noise' against the values of training's forward pass where they can differ.
    `counts`: 'lossy_blocks', 'nonfinite' values copied, 'forward_differs' of 'forward_values', 'hints_used' and
    'hints_stale' blocks of MXFP4. `runs`: where the records of its hints are.
    """

    sums: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()

    def payload(self) -> dict[str, JSON]:
        """For the journal; float.hex keeps every bit."""
        sums: dict[str, JSON] = {name: value.hex() for name, value in self.sums.items()}
        counts: dict[str, JSON] = dict(self.counts)
        runs: list[JSON] = [run.payload() for run in self.runs]
        return {"sums": sums, "counts": counts, "runs": runs}

    @staticmethod
    def from_payload(payload: Mapping[str, JSON]) -> StepResult:
        sums, counts = payload["sums"], payload["counts"]
        assert isinstance(sums, dict)
        assert isinstance(counts, dict)
        return StepResult(
            {name: float.fromhex(str(value)) for name, value in sums.items()},
            {name: value for name, value in counts.items() if isinstance(value, int)},
            runs_from(payload["runs"]),
        )


@dataclass(frozen=True)
class Outcome:
    """`hinted_sets`, `stale_sets`: sets that share a tensor scale and took, or did not take, their round-trip hints.

    `split_sets`: those that took theirs and whose tensor scales differ. `bytes_read`: of the source and of adapters,
    by this run, without what an earlier one had done.
    """

    results: Mapping[str, StepResult]
    hinted_sets: int
    stale_sets: int
    bytes_read: int
    split_sets: tuple[str, ...] = ()
