"""Run a plan: threads that each read a block, run one kernel and write the result at its known place."""

from __future__ import annotations

from fp4conv.pipeline.run import Outcome, StepResult, run

__all__ = ["Outcome", "StepResult", "run"]
