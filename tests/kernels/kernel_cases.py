"""What the kernel tests share: arrays to write to, and values that are hard to round."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from fp4conv.formats import BlockFormat, ScaleRule, Ties
from fp4conv.kernels import small_floats

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
BF16 = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Encoded:
    """The result of an encode call; packed and scales as the call left them."""

    position: int
    packed: U8
    scales: U8
    signal: F64
    noise: F64

    @property
    def codes(self) -> U8:
        """[N, K] codes of row-major results."""
        return np.stack([self.packed & 15, self.packed >> 4], axis=-1).reshape(self.packed.shape[0], -1)


def encode(
    kernels: ModuleType,
    fmt: BlockFormat,
    x: BF16 | F32,
    rule: ScaleRule,
    ties: Ties = Ties.EVEN,
    *,
    tensor_scale: float = 1.0,
    x_kn: bool = False,
    out_kn: bool = False,
) -> Encoded:
    """Call `encode_mxfp4` or `encode_nvfp4` of a kernel module, the outputs filled with rubbish before."""
    n, k = x.shape[::-1] if x_kn else x.shape
    shapes = [(n, k // 2), (n, k // fmt.block)]
    packed, scales = (np.full(s[::-1] if out_kn else s, 0xA5, dtype=np.uint8) for s in shapes)
    signal, noise = np.full(n, np.nan), np.full(n, np.nan)
    if fmt.tensor_scale:
        position = kernels.encode_nvfp4(x, x_kn, tensor_scale, rule, ties, packed, scales, signal, noise, out_kn=out_kn)
    else:
        position = kernels.encode_mxfp4(x, x_kn, rule, ties, packed, scales, signal, noise, out_kn=out_kn)
    return Encoded(position, packed, scales, signal, noise)


def decode(kernels: ModuleType, fmt: BlockFormat, packed: U8, scales: U8, *, tensor_scale: float = 1.0) -> F32:
    """Decode row-major codes to float32 [N, K]."""
    out = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.float32)
    if fmt.tensor_scale:
        kernels.decode_nvfp4(packed, scales, False, tensor_scale, out)
    else:
        kernels.decode_mxfp4(packed, scales, False, out)
    return out


def assert_same(left: Encoded, right: Encoded) -> None:
    """Equal in every bit: bytes, sums, positions; outputs count only where every value was finite."""
    assert left.position == right.position
    if left.position >= 0:
        return
    for name in ("scales", "packed", "signal", "noise"):
        ours, theirs = getattr(left, name), getattr(right, name)
        differ = np.argwhere(ours.view(np.uint8) != theirs.view(np.uint8))
        assert not differ.size, f"{name} differs first at {differ[0]}"


def to_bf16(values: npt.ArrayLike) -> BF16:
    return small_floats.f32_to_bf16(np.asarray(values, dtype=np.float32))


def normal(shape: tuple[int, int], seed: int = 0, spread: int = 0) -> F32:
    """N(0, 1) times a random power of two within 2^+-spread a value; one block of zeros, some zeros of both signs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-spread, spread + 1, shape))
    x[rng.random(shape) < 0.05] = 0.0
    x[rng.random(shape) < 0.05] = -0.0
    x[0, :32] = 0.0
    return x.astype(np.float32)


# -- hypothesis ---------------------------------------------------------------------------------

_GRID = [
    m * s for m in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0) for s in (1, -1)
]


def block_values(size: int) -> st.SearchStrategy[F32]:
    """`size` float32 near each other's scale: codes, midpoints between codes, and one ulp beside them, times 2^k.

    k spans all exponents of float32, so subnormals and values that overflow when scaled come too.
    """

    def build(grid: list[float], nudges: list[int], exponents: list[int], shift: int, other: float) -> F32:
        with np.errstate(over="ignore", under="ignore"):
            scale = np.exp2(np.float64(shift)) * other
            values = (np.array(grid) * np.exp2(np.array(exponents, dtype=np.float64)) * scale).astype(np.float32)
        moved = (values.view(np.int32) + np.array(nudges, dtype=np.int32)).view(np.float32)
        usable = np.isfinite(moved) & (np.signbit(moved) == np.signbit(values))
        values = np.where(usable, moved, values)
        return np.where(np.isfinite(values), values, np.float32(0)).astype(np.float32)

    return st.builds(
        build,
        st.lists(st.sampled_from(_GRID), min_size=size, max_size=size),
        st.lists(st.sampled_from([0, 0, 0, 1, -1, 2, -2]), min_size=size, max_size=size),
        st.lists(st.sampled_from([0, 0, 0, 0, 1, -1, -2, 3]), min_size=size, max_size=size),
        st.integers(-149, 127),
        st.sampled_from([1.0, 1.0, 1.1, 4 / 3, 1.5, 1.999, float(np.float32(1 / 3))]),
    )


def matrices(block: int) -> st.SearchStrategy[F32]:
    """float32 [N, K] of adversarial blocks, N up to 3 and K up to 3 blocks."""

    def shaped(rows: int, columns: int) -> st.SearchStrategy[F32]:
        return st.lists(block_values(block), min_size=rows * columns, max_size=rows * columns).map(
            lambda blocks: np.concatenate(blocks).reshape(rows, columns * block)
        )

    return st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(lambda shape: shaped(*shape))
