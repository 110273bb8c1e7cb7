"""Streams over the values of a model, alone or beside a reference: figures within a bound of memory, nothing written.

`measure` is what `inspect` shows, `compare` what `diff` and `verify` ask. Rows come in bands, each read by its place
and handed to one kernel after the other while it is in the cache. Sums are kept a row, counts and maxima do not depend
on an order: figures are the same with any number of workers and any bound of memory.
"""

from __future__ import annotations

from fp4conv.pipeline.measuring.comparing import Compared, TensorComparison, compare
from fp4conv.pipeline.measuring.run import Measured, measure

__all__ = ["Compared", "Measured", "TensorComparison", "compare", "measure"]
