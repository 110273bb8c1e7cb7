"""What a file's bytes are, in the two ways in which the Hub names them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.model import JSON

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Content:
    """`sha256`: of large files, which lie outside git; `blob`: SHA-1 by which git names the same bytes."""

    nbytes: int
    sha256: str
    blob: str

    @classmethod
    def of_bytes(cls, content: bytes) -> Content:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return cls(len(content), hashlib.sha256(content).hexdigest(), blob.hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> Content:
        nbytes = path.stat().st_size
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                sha256.update(chunk)
                blob.update(chunk)
        return cls(nbytes, sha256.hexdigest(), blob.hexdigest())

    def is_in(self, tree: Mapping[str, RepoFile], name: str) -> bool:
        """Whether a revision's tree has these bytes under `name`."""
        found = tree.get(name)
        if found is None or found.size != self.nbytes:
            return False
        return found.lfs.sha256 == self.sha256 if found.lfs is not None else found.blob_id == self.blob

    def payload(self) -> dict[str, JSON]:
        """For the journal."""
        return {"bytes": self.nbytes, "sha256": self.sha256, "blob": self.blob}

    @staticmethod
    def from_payload(payload: Mapping[str, JSON]) -> Content | None:
        match payload:
            case {"bytes": int(nbytes), "sha256": str(sha256), "blob": str(blob)}:
                return Content(nbytes, sha256, blob)
        return None
