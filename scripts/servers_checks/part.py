"""One server's checks in a process that imports no other server: a JSON object a line, as they come."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from servers_checks.checkpoints import Checkpoints
from servers_checks.results import FaultRow, Row


def rows(part: str, checkpoints: Checkpoints) -> Iterator[Row | FaultRow]:
    if part == "gguf":
        from servers_checks import gguf_checks

        yield from gguf_checks.checks(checkpoints)
    elif part == "sglang":
        from servers_checks import sglang_checks

        yield from sglang_checks.checks(checkpoints, _with_a_byte_changed(checkpoints))
    else:
        from servers_checks import vllm_checks, vllm_engine, vllm_faults

        server = vllm_checks.Server(vllm_engine.prepare())
        if part == "vllm":
            yield from vllm_checks.checks(server, checkpoints, _with_a_byte_changed(checkpoints))
        else:
            yield from vllm_faults.checks(server, checkpoints)


def _with_a_byte_changed(checkpoints: Checkpoints) -> Path:
    """Our W4A4 Llama with the last byte of its last tensor changed."""
    changed = checkpoints.scratch / "changed"
    if not changed.exists():
        shutil.copytree(checkpoints.ours("llama-nvfp4-w4a4"), changed)
        shard = max(changed.glob("*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    return changed


def main() -> None:
    part, reference, scratch = sys.argv[1:]
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # servers print what they like; the results have a line of their own
    for row in rows(part, Checkpoints(Path(reference), Path(scratch))):
        results.write(json.dumps({"kind": type(row).__name__, **asdict(row)}) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
