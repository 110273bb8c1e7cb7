"""MXFP4 -> NVFP4: the window of exponents, code shifts at both ends of it, and what it cannot hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import F64, U8, decode

from fp4conv.formats import MXFP4, NVFP4
from fp4conv.kernels import compiled, reference, small_floats
from fp4conv.kernels.window import (
    TENSOR_EXPONENTS,
    WINDOW_LENGTH,
    WINDOW_OFFSET,
    choose_window,
    new_window_counts,
    valid_shifts,
)

BOTH = (reference, compiled)


def block(codes: list[int]) -> U8:
    """A block of 32 with the codes repeated, packed."""
    full = np.resize(np.array(codes, dtype=np.uint8), 32)
    return full[0::2] | full[1::2] << np.uint8(4)


def model(*blocks: tuple[list[int], int]) -> tuple[U8, U8]:
    """One row of MXFP4: (codes, scale byte) a block."""
    packed = np.concatenate([block(codes) for codes, _ in blocks])[None]
    return packed, np.array([[byte for _, byte in blocks]], dtype=np.uint8)


def window(packed: U8, scales: U8) -> tuple[int, int]:
    """The choice of m, from counts on which both kernels agree."""
    counts = [new_window_counts() for _ in BOTH]
    for kernels, (starts, ends) in zip(BOTH, counts, strict=True):
        assert kernels.window_counts(packed, scales, starts, ends) == -1
    assert np.array_equal(counts[0], counts[1])
    return choose_window(*counts[0])


def transcode(kernels: object, packed: U8, scales: U8, m: int, out_kn: bool = False) -> tuple[int, U8, U8, F64, F64]:
    n, half_k = packed.shape
    shapes = [(n, half_k), (n, half_k // 8)]
    new_packed, new_scales = (np.full(s[::-1] if out_kn else s, 0xA5, dtype=np.uint8) for s in shapes)
    signal, noise = np.full(n, np.nan), np.full(n, np.nan)
    lossy = kernels.transcode_mxfp4_nvfp4(packed, scales, m, new_packed, new_scales, signal, noise, out_kn)  # type: ignore[attr-defined]
    if out_kn:
        new_packed, new_scales = np.ascontiguousarray(new_packed.T), np.ascontiguousarray(new_scales.T)
    return lossy, new_packed, new_scales, signal, noise


def checked(packed: U8, scales: U8, m: int) -> tuple[int, U8, U8, F64, F64]:
    """Transcode by oracle and compiled kernel, either orientation; all must agree in every bit."""
    expected = transcode(reference, packed, scales, m)
    for out_kn in (False, True):
        found = transcode(compiled, packed, scales, m, out_kn)
        assert found[0] == expected[0]
        for i in range(1, 5):
            assert np.asarray(found[i]).tobytes() == np.asarray(expected[i]).tobytes()
    return expected


def same_bits(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> bool:
    return left.tobytes() == right.tobytes()


ANY_CODES = [1, 2, 3, 4, 5, 6, 7, 9, 15, 0, 8]


def test_ordinary_tensor_takes_kmax_less_eight_and_copies_codes() -> None:
    packed, scales = model((ANY_CODES, 120), (ANY_CODES, 103), (ANY_CODES, 111))
    m, lossy = window(packed, scales)
    assert (m, lossy) == (120 - 127 - 8, 0)
    count, new_packed, new_scales, signal, noise = checked(packed, scales, m)
    assert count == 0
    assert not noise.any()
    assert np.array_equal(new_packed, packed)
    assert small_floats.E4M3_VALUES[new_scales].tolist() == [[256.0] * 2 + [2.0**-9] * 2 + [0.5] * 2]
    values = decode(reference, MXFP4, packed, scales)
    assert same_bits(decode(reference, NVFP4, new_packed, new_scales, tensor_scale=2.0**m), values)
    assert signal[0] == (values.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize(
    ("codes", "shifts"),
    [
        ([1], (-3, 0)),  # .5 doubles up to 4
        ([2], (-2, 1)),  # 1: .5 below, 4 above
        ([4], (-1, 2)),
        ([6], (0, 3)),  # 4 halves down to .5
        ([3], (-2, 0)),  # 1.5 -> 3 -> 6
        ([5], (-1, 1)),
        ([7], (0, 2)),
        ([1, 7], (0, 0)),
        ([1, 2, 4], (-1, 0)),
        ([4, 6], (0, 2)),
        ([5, 7], (0, 1)),
        ([3, 2], (-2, 0)),
        ([0, 8, 14, 0], (0, 3)),  # zeros and signs do not matter
    ],
)
def test_shifts_and_the_interval_they_give(codes: list[int], shifts: tuple[int, int]) -> None:
    magnitudes = np.array(codes, dtype=np.uint8) & 7
    assert valid_shifts(magnitudes.astype(np.uint8)) == list(range(shifts[0], shifts[1] + 1))
    packed, scales = model((codes, 127))
    starts, ends = new_window_counts()
    compiled.window_counts(packed, scales, starts, ends)
    halves = 2
    assert starts[shifts[0] - 8 + WINDOW_OFFSET] == halves
    assert ends[shifts[1] + 9 + WINDOW_OFFSET] == halves
    assert starts.sum() == ends.sum() == halves


def test_block_above_the_window_is_saved_by_doubling_its_codes() -> None:
    """kmax - kmin = 20 > 17: only because the top block's .5s can become 4s does everything fit."""
    packed, scales = model(([1, 9, 0, 8], 140), (ANY_CODES, 120))
    m, lossy = window(packed, scales)
    assert (m, lossy) == (140 - 3 - 127 - 8, 0)
    count, new_packed, new_scales, _, noise = checked(packed, scales, m)
    assert (count, noise[0]) == (0, 0.0)
    assert np.array_equal(new_packed[0, :16], block([6, 14, 0, 8])), "4 with both signs, zeros as they were"
    assert small_floats.E4M3_VALUES[new_scales[0]].tolist() == [256.0] * 2 + [2.0**-9] * 2
    values = decode(reference, MXFP4, packed, scales)
    assert same_bits(decode(reference, NVFP4, new_packed, new_scales, tensor_scale=2.0**m), values)


def test_block_below_the_window_is_saved_by_halving_its_codes() -> None:
    packed, scales = model((ANY_CODES, 140), ([6, 14, 0], 120))
    m, lossy = window(packed, scales)
    assert (m, lossy) == (140 - 127 - 8, 0)
    count, new_packed, new_scales, _, noise = checked(packed, scales, m)
    assert (count, noise[0]) == (0, 0.0)
    assert np.array_equal(new_packed[0, 16:], block([1, 9, 0]))
    assert small_floats.E4M3_VALUES[new_scales[0, 2:]].tolist() == [2.0**-9] * 2
    values = decode(reference, MXFP4, packed, scales)
    assert same_bits(decode(reference, NVFP4, new_packed, new_scales, tensor_scale=2.0**m), values)


def test_both_ends_at_once() -> None:
    """17 + 3 + 3 exponents apart, the most that shifts can bridge; one more and a block is lost."""
    top, bottom = ([1], 150), ([6], 150 - 23)
    packed, scales = model(top, bottom)
    m, lossy = window(packed, scales)
    assert lossy == 0
    assert checked(packed, scales, m)[0] == 0
    packed, scales = model(top, ([6], 150 - 24))
    m, lossy = window(packed, scales)
    assert lossy == 2
    assert checked(packed, scales, m)[0] == 2


def test_fewest_lossy_halves_win_over_the_largest_scale() -> None:
    """One block far above two: the two are kept, the one is clipped by the MSE rule."""
    packed, scales = model((ANY_CODES, 160), (ANY_CODES, 120), (ANY_CODES, 121))
    m, lossy = window(packed, scales)
    assert (m, lossy) == (121 - 127 - 8, 2)
    count, new_packed, new_scales, _, noise = checked(packed, scales, m)
    assert count == lossy
    assert noise[0] > 0
    assert (new_scales[0, :2] == 126).all(), "448, as near as E4M3 comes"
    values = decode(reference, MXFP4, packed, scales)
    got = decode(reference, NVFP4, new_packed, new_scales, tensor_scale=2.0**m)
    assert same_bits(got[:, 32:], values[:, 32:])
    assert noise[0] == pytest.approx(((values.astype(np.float64) - got) ** 2).sum(), rel=1e-12)


def test_zeros_count_nowhere_and_keep_their_signs() -> None:
    packed, scales = model(([0, 8], 254), ([0], 0), (ANY_CODES, 127))
    assert window(packed, scales) == (-8, 0)
    count, new_packed, new_scales, _, _ = checked(packed, scales, -8)
    assert count == 0
    assert np.array_equal(new_packed, packed)
    assert new_scales[0, :4].tolist() == [small_floats.E4M3_ONE] * 4
    assert window(*model(([0, 8], 30))) == (0, 0), "nothing but zeros"


def test_halves_of_one_block_part_ways() -> None:
    """The first half can be shifted, the second is zeros."""
    packed, scales = model((ANY_CODES, 140), (ANY_CODES, 120))
    packed[0, 16:24] = block([6])[:8]
    packed[0, 24:] = 0x80
    m, lossy = window(packed, scales)
    assert lossy == 0
    count, _, new_scales, _, _ = checked(packed, scales, m)
    assert count == 0
    assert small_floats.E4M3_VALUES[new_scales[0, 2:]].tolist() == [2.0**-9, 1.0]


def test_tensor_scale_stays_a_normal_float32() -> None:
    """kmax - 8 = -135 would be subnormal: m stops at -126, and whatever is too small to hold is counted."""
    packed, scales = model((ANY_CODES, 0), (ANY_CODES, 1))
    m, lossy = window(packed, scales)
    assert m == TENSOR_EXPONENTS[0]
    assert (lossy, checked(packed, scales, m)[0]) == (0, 0)
    packed, scales = model((ANY_CODES, 254))
    assert window(packed, scales) == (119, 0)
    assert checked(packed, scales, 119)[0] == 0


def test_ends_of_the_counts_are_inside_the_arrays() -> None:
    starts, ends = new_window_counts()
    assert starts.shape == ends.shape == (WINDOW_LENGTH,)
    packed, scales = model(([1], 0), ([6], 254))
    compiled.window_counts(packed, scales, starts, ends)
    assert starts[0] == 2, "2^-127 shifted down by 3 and held at 2^8"
    assert ends[-1] == 2, "2^127 shifted up by 3 and held at 2^-9"


def test_nan_scale_and_overflow_are_reported() -> None:
    packed, scales = model((ANY_CODES, 127), (ANY_CODES, 255))
    for kernels in BOTH:
        assert kernels.window_counts(packed, scales, *new_window_counts()) == 32
        assert transcode(kernels, packed, scales, 0)[0] == -1 - 32
    packed, scales = model((ANY_CODES, 127), ([1, 1, 4], 254))
    for kernels in BOTH:
        assert transcode(kernels, packed, scales, 0)[0] == -1 - (32 + 2), "2 x 2^127, in a half to be encoded anew"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([[1], [2, 4], [7], [3, 5], [6], [0, 8], list(range(16))]), min_size=1, max_size=2),
            st.integers(0, 252),
        ),
        min_size=1,
        max_size=9,
    ),
    st.integers(1, 70),
    st.integers(-126, 119),
)
def test_oracle_and_compiled_agree_on_any_model(blocks: list[tuple[list[list[int]], int]], spread: int, m: int) -> None:
    """Under the chosen m, where the count of lossy halves is as foretold, and under any other."""
    packed, scales = model(
        *[([code for codes in sets for code in codes], 120 + byte % spread) for sets, byte in blocks]
    )
    chosen, lossy = window(packed, scales)
    assert checked(packed, scales, chosen)[0] == lossy
    assert checked(packed, scales, m)[0] >= lossy
