"""What a conversion brings from the Hub: how much, where it goes meanwhile, and whether the disks have room."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fp4conv.errors import OutputError, UsageError
from fp4conv.hub.client import in_cache, snapshot_folder
from fp4conv.model import Pinned
from fp4conv.pipeline.supply import FOLDER, FromHub, cached_bytes, source_bytes
from fp4conv.plan import Plan
from fp4conv.report.converted import DownloadForecast
from fp4conv.sizes import format_size, parse_size
from fp4conv.staging import Staging
from fp4conv.staging.places import nearest_existing
from fp4conv.streaming import disk_bound, smallest_disk


@dataclass(frozen=True)
class Fetching:
    """`missing_bytes`: what the cache does not have of `total_bytes`. `least`: the smallest --max-disk that works.

    `limit`: with --stream, what lies on the disk at the most, source and result; `beside`: what of it is in the cache,
    and stays. All zero for a local source.
    """

    plan: Plan
    pinned: Pinned | None = None
    total_bytes: int = 0
    missing_bytes: int = 0
    least: int = 0
    limit: int | None = None
    beside: int = 0

    @classmethod
    def of(
        cls, plan: Plan, *, stream: bool = False, max_disk: int | str | None = None, published: bool = False
    ) -> Fetching:
        """UsageError for options that do not fit together, PlanError for a bound that is too small.

        `published`: with --stream, files of the result go as well.
        """
        pinned = plan.model.source.pinned
        if max_disk is not None and not stream:
            raise UsageError("--max-disk bounds what --stream keeps", hint="add --stream")
        if pinned is None and not published:
            if stream:
                found = "--stream has nothing to let go of: SRC is a folder, and DST stays"
                raise UsageError(found, hint="give a SRC on the Hub, or add --push-to-hub")
            return cls(plan)
        whole = source_bytes(plan, pinned, streamed=False) if pinned else {}
        missing = sum(nbytes for name, nbytes in whole.items() if pinned and not in_cache(pinned, name))
        streamed = source_bytes(plan, pinned, streamed=True) if pinned else {}
        beside = cached_bytes(plan)
        least = smallest_disk(plan, streamed, result_stays=not published) + beside
        limit = None
        if stream:
            # Without a bound: room for two more files of each side, so that neither has to wait often.
            leaving = [shard.nbytes for shard in plan.shards.values()] if published else []
            ample = least + 2 * max(streamed.values(), default=0) + 2 * max(leaving, default=0)
            asked = parse_size(str(max_disk)) if max_disk is not None else ample
            limit = disk_bound(plan, streamed, asked, result_stays=not published, beside=beside)
        return cls(plan, pinned, sum(whole.values()), missing, least, limit, beside)

    @property
    def room(self) -> int | None:
        """What of `limit` is left for files that come and go."""
        return None if self.limit is None else self.limit - self.beside

    def disk_bytes(self, destination: Path) -> int:
        """What the disk of `destination` has to hold at the most. OutputError where that of the cache is too small."""
        whole = self.plan.disk_bytes + self.missing_bytes
        if self.pinned is None or self.limit is not None:
            return whole if self.limit is None else min(self.limit, whole)
        cache = nearest_existing(snapshot_folder(self.pinned))
        if cache.stat().st_dev == nearest_existing(destination.absolute()).stat().st_dev:
            return whole
        free = shutil.disk_usage(cache).free
        if self.missing_bytes > free:
            raise OutputError(
                f"the disk is too small for the download: {format_size(self.missing_bytes)} are needed, "
                f"{format_size(free)} are free",
                where=str(cache),
                hint="Free some space, set HF_HUB_CACHE to a folder on another disk, or add --stream.",
            )
        return self.plan.disk_bytes

    def forecast(self) -> DownloadForecast | None:
        """For a dry run; None where nothing comes and nothing goes."""
        if self.pinned is None and self.limit is None:
            return None
        return DownloadForecast(self.missing_bytes, self.total_bytes - self.missing_bytes, self.least, self.limit)

    def supply(self, out: Staging, on_fetch: Callable[[int], None] | None) -> FromHub | None:
        """Who brings the source's files; None for a local source."""
        if self.pinned is None:
            return None
        folder = out.path(FOLDER) if self.limit is not None else None
        return FromHub(self.plan, self.pinned, folder=folder, on_bytes=on_fetch)
