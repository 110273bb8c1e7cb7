"""Run servers' own code on what fp4conv writes, and say what came of it. scripts/servers makes the environment.

scripts/servers                       everything
scripts/servers gguf sglang           some of: vllm, faults (planted ones, fed to vLLM), sglang, gguf
scripts/servers --json FILE           the results as JSON too
scripts/servers --docs                and write them into docs/servers.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from servers_checks.checkpoints import Checkpoints
from servers_checks.results import FaultRow, Row, as_fault_table, as_lines, as_table

REPOSITORY = Path(__file__).resolve().parents[2]
DOC = REPOSITORY / "docs" / "servers.md"
PARTS = ("gguf", "sglang", "vllm", "faults")
MARKS = {"rows": ("<!-- what was run -->", "<!-- end of what was run -->"),
         "faults": ("<!-- planted faults -->", "<!-- end of planted faults -->")}  # fmt: skip


def main() -> int:
    given = arguments()
    rows: list[Row | FaultRow] = []
    with tempfile.TemporaryDirectory(prefix="fp4conv-servers-") as scratch:
        checkpoints = Checkpoints(_reference(), Path(scratch))
        checkpoints.make()
        for part in given.parts or PARTS:
            for row in _run(part, checkpoints):
                rows.append(row)
                print(_line(row), flush=True)
    checks = [row for row in rows if isinstance(row, Row)]
    faults = [row for row in rows if isinstance(row, FaultRow)]
    if given.json:
        content = {"checks": [asdict(row) for row in checks], "faults": [asdict(row) for row in faults]}
        given.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if given.docs:
        _write_docs(checks, faults)
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows) - failed} checks came out as they must, {failed} did not")
    return 1 if failed else 0


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"there is no part {text!r}; choose from {', '.join(PARTS)}")
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/servers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # not choices=: before Python 3.12.3 argparse takes the empty list for a choice that is not there
    parser.add_argument(
        "parts", nargs="*", type=_part, metavar="PART", help=f"{', '.join(PARTS)}; default: all of them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--docs", action="store_true", help="write the results into docs/servers.md; needs all parts")
    given = parser.parse_args()
    if given.docs and given.parts:
        parser.error("--docs needs the results of all parts: name none")
    return given


def _reference() -> Path:
    """The reference checkpoints: the whole ones where FP4CONV_REFERENCE names them, else fixtures/."""
    return Path(os.environ.get("FP4CONV_REFERENCE") or REPOSITORY / "fixtures").resolve()


def _run(part: str, checkpoints: Checkpoints) -> Iterator[Row | FaultRow]:
    command = [sys.executable, "-m", "servers_checks.part", part, str(checkpoints.reference), str(checkpoints.scratch)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            held = json.loads(line)
            kind = FaultRow if held.pop("kind") == "FaultRow" else Row
            yield kind(**held)
        if process.wait() != 0:
            log.seek(0)
            last = " ".join(log.read().strip().splitlines()[-3:])
            yield Row(part, "", f"the checks of {part} did not end", last or f"exit code {process.returncode}", False)


def _line(row: Row | FaultRow) -> str:
    if isinstance(row, Row):
        return as_lines([row])
    return f"{'ok  ' if row.ok else 'FAIL'} vLLM      fault {row.fault}: {row.vllm}\n{'':15}verify says: {row.verify}"


def _write_docs(checks: list[Row], faults: list[FaultRow]) -> None:
    text = DOC.read_text(encoding="utf-8")
    for key, table in (("rows", as_table(checks)), ("faults", as_fault_table(faults))):
        begin, end = MARKS[key]
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table}\n{end}{rest.split(end)[1]}"
    DOC.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
