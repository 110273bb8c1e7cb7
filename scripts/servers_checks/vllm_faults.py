"""The planted faults of tests/faults.py, fed to vLLM: what it does with each, beside what `fp4conv verify` says."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fp4conv
from servers_checks import vllm_engine
from servers_checks.checkpoints import Checkpoints
from servers_checks.isolated import isolated
from servers_checks.results import FaultRow
from servers_checks.vllm_checks import Server
from servers_checks.vllm_engine import Outcome

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import faults

REFUSES, SILENT, HIDDEN, HARMLESS = "refuses", "silent", "hidden", "harmless"
# What vLLM 0.32 does: words of the error with which it refuses, or else one of these. SILENT: it generates other
# tokens, or from NaN, and says nothing. HIDDEN: the parameters differ, the tokens happen not to. HARMLESS: the
# parameters are those of the healthy checkpoint.
EXPECTED = {
    "missing-scales": SILENT,
    "missing-tensor-scale": SILENT,
    "missing-norm": "not initialized from checkpoint",
    "missing-bias": SILENT,
    "missing-expert": SILENT,
    "missing-layer": "was never loaded",
    "shard-not-in-index": "not initialized from checkpoint",
    "index-to-missing-shard": "referenced in index but missing",
    "index-to-wrong-shard": HARMLESS,
    "tensor-in-two-shards": HARMLESS,
    "truncated-shard": "SafetensorError",
    "broken-config": "not a valid JSON",
    "orphan-tensor": "no module or parameter named",
    "wrong-dtype": HARMLESS,
    "wrong-rows": "exceeds dimension size",
    "wrong-vocabulary": "AssertionError",
    "expert-count": "must match the size",
    "qkv-tensor-scales": SILENT,
    "gate-up-tensor-scales": HIDDEN,
    "set-in-part": "some but not all shards",
    "missing-input-scale": SILENT,
    "nan-block-scale": "was never loaded",
    "nan-block-scale-mxfp4": SILENT,
    "zero-block-scale": HIDDEN,
    "overflowing-block-scale": SILENT,
    "zero-tensor-scale": SILENT,
    "nan-tensor-scale": SILENT,
    "nan-in-norm": SILENT,
    "layer-prefix-ignored": "no module or parameter named",
    "quantised-but-ignored": "no module or parameter named",
    "nested-only-file": "Unknown ModelOpt quant algo",
    "nested-only-key": "Unknown ModelOpt quant algo",
    "transposed-experts-bf16": "must match the size",
    "transposed-experts-mxfp4": "must match the size",
    "transposed-experts-nvfp4": "must match the size",
    "bf16-under-blocks": HARMLESS,
    "group-size-in-neither": HARMLESS,
    "group-size-differs": "AssertionError",
    "algorithms-differ": HARMLESS,
    "ignore-lists-differ": HARMLESS,
}


@dataclass(frozen=True)
class Reaction:
    kind: str
    words: str


def checks(server: Server, checkpoints: Checkpoints) -> Iterator[FaultRow]:
    for fault in faults.FAULTS:
        healthy = checkpoints.theirs(fault.base)
        with tempfile.TemporaryDirectory() as scratch:
            folder = faults.planted(fault, healthy, Path(scratch) / fault.name)
            found = reaction(server.generated(healthy), vllm_engine.generate(folder))
            words = found.words.replace(str(folder), fault.name)
            verdict = isolated(partial(_verdict, folder), "fp4conv").value or "does not end"
        expected = EXPECTED.get(fault.name, "nothing: say in EXPECTED of vllm_faults.py what vLLM does")
        ok = expected in found.words if found.kind == REFUSES else found.kind == expected
        yield FaultRow(fault.name, fault.base, words if ok else f"{words} (expected: {expected})", verdict, ok)


def reaction(healthy: Outcome, faulty: Outcome) -> Reaction:
    """What vLLM made of the fault, by what it loaded and what it generated from the same prompts."""
    if faulty.error:
        return Reaction(REFUSES, f"refuses: {faulty.error}")
    if any(math.isnan(value) for row in faulty.logprobs for value in row):
        return Reaction(SILENT, "**wrong in silence**: generates from NaN")
    if (faulty.tokens, faulty.logprobs) != (healthy.tokens, healthy.logprobs):
        words = "**wrong in silence**: other tokens or log-probabilities"
        return Reaction(SILENT, words + _warned(healthy, faulty))
    if faulty.parameters != healthy.parameters:
        return Reaction(HIDDEN, "loads it; the tokens of this small model are the same" + _warned(healthy, faulty))
    return Reaction(HARMLESS, "no harm: the parameters of the healthy checkpoint" + _warned(healthy, faulty))


def _warned(healthy: Outcome, faulty: Outcome) -> str:
    new = [line for line in faulty.warnings if line not in healthy.warnings]
    return f"; warns: {' '.join(new[0].split())}" if new else ""


def _verdict(folder: Path) -> str:
    """The gravest problem that verify sees, as it is for vLLM."""
    problems = fp4conv.verify(folder, for_server="vllm").problems
    if not problems:
        return "nothing"
    worst = min(problems, key=lambda problem: problem.severity.value != "error")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{worst.severity.value}: {worst.found}: {worst.consequence}{more}"
