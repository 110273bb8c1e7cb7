"""What a conversion did, as a value with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from fp4conv.model import JSON
from fp4conv.publishing.published import Published
from fp4conv.report.hints import HintsResult
from fp4conv.servers import Verdict


@dataclass(frozen=True)
class ForwardDifference:
    """`values` of the `of` values in `tensors` weights are not those of training's forward pass; SQNR against it."""

    tensors: int
    values: int
    of: int
    sqnr_db: float | None


@dataclass(frozen=True)
class DownloadForecast:
    """What comes from the Hub and what the cache has of it; --max-disk: the smallest that works, and the one kept to.

    Also of a result that is published while it is made, from a local source: then nothing comes.
    """

    download_bytes: int
    cached_bytes: int
    least_max_disk_bytes: int
    max_disk_bytes: int | None


@dataclass(frozen=True)
class Forecast:
    """What a dry run says of the result: bytes of each shard, disk and memory that the run takes at the most.

    `disk_needed_bytes` counts what a download takes of the same disk meanwhile.
    """

    shards: Mapping[str, int]
    disk_needed_bytes: int
    disk_free_bytes: int
    memory_bound_bytes: int
    download: DownloadForecast | None = None

    def to_json(self) -> dict[str, JSON]:
        return {
            "shards": [{"file": file, "bytes": nbytes} for file, nbytes in self.shards.items()],
            "disk_needed_bytes": self.disk_needed_bytes,
            "disk_free_bytes": self.disk_free_bytes,
            "memory_bound_bytes": self.memory_bound_bytes,
            "download": asdict(self.download) if self.download else None,
        }


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did, or (with a `forecast`: a dry run) would do.

    `sqnr_db` is None where nothing was lost or nothing measured. `bytes_read` and `seconds` are this run's own,
    without what an earlier one had done before it was stopped. `per_tensor`: SQNR in dB of every tensor that was
    quantised. `lossy_blocks`: 16-value blocks of an MXFP4 source that NVFP4 could not hold exactly. `merged`: every
    tensor that adapters changed, with the norm of the change relative to that of the tensor before, None where it
    was replaced or not measured. `beside_sqnr_db`: of quantised linear layers whose adapter was trained beside them
    (LoRA-QAT), against Q(W) + B A. `commits`: repository@revision -> commit, of all that came from the Hub.
    `published`: where on the Hub the result is.
    """

    source: str
    source_format: str
    destination: str
    format: str
    layout: str
    converted: int
    copied: int
    merged: Mapping[str, float | None]
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    lossy_blocks: int
    sqnr_db: float | None
    per_tensor: Mapping[str, float | None]
    forward_difference: ForwardDifference | None
    beside_sqnr_db: float | None
    hints: HintsResult
    servers: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    commits: Mapping[str, str] = field(default_factory=dict)
    forecast: Forecast | None = None
    published: Published | None = None

    def to_json(self) -> dict[str, JSON]:
        return {
            "source": self.source,
            "source_format": self.source_format,
            "destination": self.destination,
            "format": self.format,
            "layout": self.layout,
            "tensors": {"converted": self.converted, "copied": self.copied, "merged": len(self.merged)},
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "lossy_blocks": self.lossy_blocks,
            "sqnr_db": self.sqnr_db,
            "per_tensor": dict(self.per_tensor),
            "merged": dict(self.merged),
            "forward_difference": asdict(self.forward_difference) if self.forward_difference else None,
            "beside_sqnr_db": self.beside_sqnr_db,
            "hints": self.hints.to_json(),
            "servers": [_verdict_json(verdict) for verdict in self.servers],
            "warnings": list(self.warnings),
            "commits": dict(self.commits),
            "published": self.published.to_json() if self.published else None,
            "dry_run": self.forecast is not None,
            **(self.forecast.to_json() if self.forecast else {}),
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
