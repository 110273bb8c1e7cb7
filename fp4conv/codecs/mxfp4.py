"""MXFP4: E2M1 codes, one E8M0 scale for 32 values (OCP MX v1.0, section 5.4)."""

from __future__ import annotations

from fp4conv.codecs.base import Codes, Coding, Rows, Tally
from fp4conv.formats import MXFP4
from fp4conv.kernels import compiled


class Mxfp4:
    format = MXFP4

    def encode(self, rows: Rows, coding: Coding, out: Codes, tally: Tally) -> int:
        return compiled.encode_mxfp4(
            rows.array,
            rows.kn,
            coding.rule,
            coding.ties,
            out.packed,
            out.block_scale,
            tally.signal,
            tally.noise,
            out.kn,
        )

    def decode(self, codes: Codes, tensor_scale: float, out: Rows, *, inverse: bool = False) -> int:
        return compiled.decode_mxfp4(codes.packed, codes.block_scale, codes.kn, out.array, out.kn)
