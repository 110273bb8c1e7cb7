"""What came of a publication, as a value with a JSON form."""

from __future__ import annotations

from dataclasses import dataclass

from fp4conv.model import JSON


@dataclass(frozen=True)
class Published:
    """A model on main. `files`: how many were sent, by all runs; `deleted`: what was there before and had to go."""

    repo: str
    url: str
    pull_request: str
    commit: str
    files: int
    deleted: tuple[str, ...]

    def to_json(self) -> dict[str, JSON]:
        return {
            "repo": self.repo,
            "url": self.url,
            "pull_request": self.pull_request,
            "commit": self.commit,
            "files": self.files,
            "deleted": list(self.deleted),
        }
