"""What a conversion did, as a value with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fp4conv.model import JSON
from fp4conv.servers import Verdict


@dataclass(frozen=True)
class ForwardDifference:
    """`values` of the `of` values in `tensors` weights are not those of training's forward pass; SQNR against it."""

    tensors: int
    values: int
    of: int
    sqnr_db: float | None


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did, or (`dry_run`) would do. `sqnr_db` is None where nothing was lost or nothing measured.

    `per_tensor`: SQNR in dB of every tensor that was quantised. `lossy_blocks`: 16-value blocks of an MXFP4
    source that NVFP4 could not hold exactly.
    """

    source: str
    source_format: str
    destination: str
    format: str
    layout: str
    converted: int
    copied: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    lossy_blocks: int
    sqnr_db: float | None
    per_tensor: Mapping[str, float | None]
    forward_difference: ForwardDifference | None
    servers: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    dry_run: bool = False

    def to_json(self) -> dict[str, JSON]:
        return {
            "source": self.source,
            "source_format": self.source_format,
            "destination": self.destination,
            "format": self.format,
            "layout": self.layout,
            "tensors": {"converted": self.converted, "copied": self.copied, "merged": 0},
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "lossy_blocks": self.lossy_blocks,
            "sqnr_db": self.sqnr_db,
            "per_tensor": dict(self.per_tensor),
            "forward_difference": asdict(self.forward_difference) if self.forward_difference else None,
            "servers": [_verdict_json(verdict) for verdict in self.servers],
            "warnings": list(self.warnings),
            "dry_run": self.dry_run,
        }


def _verdict_json(verdict: Verdict) -> dict[str, JSON]:
    return {
        "server": verdict.server,
        "version": verdict.version,
        "loads": verdict.loads,
        "outcome": verdict.outcome,
        "note": verdict.note,
        "source": verdict.source,
    }
